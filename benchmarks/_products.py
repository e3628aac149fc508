"""The candidates that multiply by sparse weights, and the chains of products that are timed."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import _mkl
import numpy as np
import scipy.sparse
import tensorflow as tf
from tensorflow.python.ops.linalg.sparse import sparse_csr_matrix_ops as csr_ops

import accel_tf as at

CHAIN = 8  # products


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to multiply by sparse weights.

    Attributes:
        prepare: From a SciPy CSR matrix (out, in) to a function of activations.
        stored: Bytes that each non-zero takes where the product reads it.
        height: How many outputs share their zeros.
        int8: Whether weights are 8-bit integers, times a scale for each output.
        run: How a chain is run: "graph", inside one tf.function; "eager", as calls of TensorFlow; or
            "library", as calls with NumPy arrays.
        transposed: Whether activations are (features, batch), instead of (batch, features). The sparse
            peers multiply from the left. They get them so, for free.
        one_sample: Whether it is meant for batch 1 only.
    """

    prepare: Callable
    stored: float
    height: int = 1
    int8: bool = False
    run: str = "graph"
    transposed: bool = False
    one_sample: bool = False

    def chain(self, products, x: np.ndarray) -> Callable:
        """Returns a function that applies the products one after the other."""
        x = np.ascontiguousarray(x.T) if self.transposed else x
        if self.run != "library":
            x = tf.constant(x)
        elif x.shape[1] == 1:
            x = x[:, 0]  # SciPy and MKL have a kernel for vectors

        def run(x):
            for product in products:
                x = product(x)
            return x

        run = tf.function(run, autograph=False) if self.run == "graph" else run
        return lambda: run(x)

    def calls(self, length: int, x: np.ndarray) -> Callable:
        """Returns a function that does all of a chain except for the products: what calls cost.

        One call of a tf.function, or as many calls as there are products, then of tiny ones.
        """
        if self.run == "graph":
            return self.chain([tf.identity], x)
        tiny = self.prepare(scipy.sparse.identity(16, np.float32, "csr"))
        return self.chain([tiny] * length, np.ones((min(len(x), 2), 16), np.float32))

    def rows(self, y) -> np.ndarray:
        """The result of a chain as (batch, out)."""
        y = np.asarray(y)
        return np.atleast_2d(y.T) if self.transposed else y


def _dense(a):
    return functools.partial(tf.matmul, b=tf.constant(a.toarray().T))


def _ours(a, format, int8=False):
    matrix = at.SparseMatrix(a.indptr, a.indices, a.data, a.shape[::-1], format=format)
    matrix = matrix.quantize() if int8 else matrix
    return lambda x: at.sparse_matmul(x, matrix)


def _tf_sparse(a):
    coo = a.tocoo()
    indices = np.stack([coo.row, coo.col], axis=1).astype(np.int64)
    return tf.SparseTensor(indices, coo.data, a.shape)


def _csr_sparse_matrix(a):
    return functools.partial(csr_ops.matmul, csr_ops.CSRSparseMatrix(_tf_sparse(a)))


OURS, DENSE = "accel_tf", "tf.matmul"
_LEFT = {"transposed": True}
CANDIDATES = {
    OURS: Candidate(lambda a: _ours(a, "unstructured"), 4 + 2),
    f"{OURS} 4x1": Candidate(lambda a: _ours(a, "4x1"), 4 + 2 / 4, height=4),
    f"{OURS} 16x1": Candidate(lambda a: _ours(a, "16x1"), 4 + 2 / 16, height=16, one_sample=True),
    f"{OURS} int8": Candidate(
        lambda a: _ours(a, "unstructured", True), 1 + 2, int8=True, one_sample=True
    ),
    f"{OURS} int8 16x1": Candidate(
        lambda a: _ours(a, "16x1", True), 1 + 2 / 16, height=16, int8=True, one_sample=True
    ),
    DENSE: Candidate(_dense, 4),
    "tf.sparse": Candidate(
        lambda a: functools.partial(tf.sparse.sparse_dense_matmul, _tf_sparse(a)), 4 + 16, **_LEFT
    ),
    # It is slower inside a tf.function than outside, so it has its turn in both.
    "CSR eager": Candidate(_csr_sparse_matrix, 4 + 4, run="eager", **_LEFT),
    "CSR in graph": Candidate(_csr_sparse_matrix, 4 + 4, **_LEFT),
    "SciPy": Candidate(lambda a: a.__matmul__, 4 + 4, run="library", **_LEFT),
}
if _mkl.load() is not None:
    CANDIDATES["MKL"] = Candidate(_mkl.Product, 4 + 4, run="library", **_LEFT)
FORMATS = [name for name in CANDIDATES if name.startswith(OURS)]
PEERS = [name for name in CANDIDATES if name not in (*FORMATS, DENSE)]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of a chain, which serve again and again, so that they stay in the cache if they fit.

    Weights (in, out) that are not square alternate with their mirror (out, in), as in the feed-forward
    block of a transformer and in the bottleneck of a ResNet.

    Attributes:
        matrices: How many different ones there are, of squares.
        pixels: Rows of activations for each sample.
    """

    name: str
    inputs: int
    outputs: int
    matrices: int = 1
    pixels: int = 1

    def weights(self, sparsity: float, height: int, int8: bool) -> list[scipy.sparse.csr_matrix]:
        """Random matrices (out, in), float32, with zeros in blocks of `height` outputs.

        They keep the scale of what they are multiplied by, on average. With `int8`, each row is made
        of integers up to 127 times a number.
        """
        rng = np.random.default_rng(0)
        shapes = [(self.outputs, self.inputs)] * self.matrices
        if self.inputs != self.outputs:
            shapes.append((self.inputs, self.outputs))
        return [_random(rng, *shape, sparsity, height, int8) for shape in shapes]


def square(n: int, matrices: int = 1) -> Layer:
    name = f"square {n}" + (f", {matrices} different" if matrices > 1 else "")
    return Layer(name, n, n, matrices)


def cycle(items, length: int = CHAIN) -> list:
    """The first `length` of the items repeated."""
    return list(itertools.islice(itertools.cycle(items), length))


def _random(rng, outputs, inputs, sparsity, height, int8) -> scipy.sparse.csr_matrix:
    kept = rng.random((outputs // height, inputs), np.float32) >= sparsity
    a = scipy.sparse.csr_matrix(np.repeat(kept, height, axis=0), dtype=np.float32)
    a.data = rng.standard_normal(a.nnz, np.float32) / np.float32(np.sqrt(a.nnz / outputs))
    if int8:
        largest = abs(a).max(axis=1).toarray()[:, 0]
        scales = np.repeat(np.maximum(largest, 1e-30) / 127, np.diff(a.indptr))
        a.data = (np.rint(a.data / scales) * scales).astype(np.float32)
    return a
