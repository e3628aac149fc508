"""Which weights are pruned together: the granularity of a mask.

A pattern turns a kernel into a vector of scores, one for each unit that is kept or pruned as a whole,
and a vector of decisions back into a mask. It sees the kernel with the inputs first and the outputs
as the last axis, see `_forms`; the sparsity of a schedule is the fraction of units.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from accel_tf.pruning._config import Configured
from accel_tf.pruning._schedules import Schedule, levels


class Pattern(Configured):
    """What the patterns share. A subclass is a frozen dataclass with `scores` and `expand`."""

    def scores(self, importance: tf.Tensor) -> tf.Tensor:
        """Returns the importance of each unit, as a vector.

        Args:
            importance: What each weight is worth, its magnitude say, float32 (…, inputs, outputs).

        Returns:
            A float32 vector. A unit whose score is infinite is never pruned.
        """
        raise NotImplementedError

    def expand(self, keep: tf.Tensor, shape) -> tf.Tensor:
        """Returns the bool mask of `shape` for the decisions `keep`, in the order of `scores`."""
        return tf.reshape(keep, shape)

    def levels(self, schedule: Schedule) -> np.ndarray:
        """Returns the sparsity at each update of `schedule`, float32; the last holds ever after.

        Raises:
            ValueError: The schedule asks for a sparsity that the pattern cannot have.
        """
        return levels(schedule)

    def obstacle(self, shape, layer=None) -> str:
        """Returns why a kernel of `shape` (…, inputs, outputs) cannot take the pattern, or ""."""
        return ""

    def remark(self, shape) -> str:
        """Returns what to say of a kernel of `shape` (…, inputs, outputs) in the report, or ""."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Each weight is kept or pruned on its own, by its magnitude.

    The finest pattern, hence the most accurate at a given sparsity. Dense kernels do not skip its
    zeros: files compress, latency stays. Above about 80 % sparsity `accel_tf.sparsify` is faster.

    Example:

    >>> Unstructured().scores(tf.constant([[1.0, 3.0]])).numpy()
    array([1., 3.], dtype=float32)

    Reference: Han et al., "Learning both weights and connections" (2015);
    https://arxiv.org/abs/1506.02626.
    """

    def scores(self, importance):
        return tf.reshape(importance, [-1])

    def remark(self, shape):
        return ""


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Blocks of neighbouring weights are kept or pruned as a whole, by their mean or largest magnitude.

    The kernel counts as a matrix (inputs, outputs), that of a convolution as one of height · width ·
    input channels. The blocks (1, 4) and (1, 16), neighbouring outputs that share an input, are the
    formats "4x1" and "16x1" of `accel_tf.sparsify`, faster than single zeros at the same sparsity;
    LiteRT has kernels for (1, 4) and (1, 16), too. Other shapes have no kernel that skips them faster.

    Where `shape` does not divide the matrix, the last blocks are cut off, and scores are pooled as
    TFMOT pools them: with padding on both sides, hence from windows that lie up to half a block
    before the block. Choose shapes that divide.

    Args:
        shape: Two integers ≥ 1: how many inputs by how many outputs.
        pooling: What of its magnitudes scores a block, "AVG" or "MAX".

    Raises:
        ValueError: An argument is not what is expected.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16)])
    >>> report = at.prune(model, at.ConstantSparsity(0.75), pattern=at.Block((1, 4)))
    >>> np.sum(model.layers[0].kernel.numpy() != 0, axis=1) % 4
    array([0, 0, 0, 0, 0, 0, 0, 0])

    Reference: Narang et al., "Block-sparse recurrent neural networks" (2017);
    https://arxiv.org/abs/1711.02782. `block_size` and `block_pooling_type` of TFMOT.
    """

    shape: tuple[int, int]
    pooling: str = "AVG"

    def __post_init__(self):
        shape = _integers("Block: shape", self.shape, 2)
        object.__setattr__(self, "shape", shape)
        if min(shape) < 1:
            raise ValueError(f"Block: shape must be ≥ 1 by ≥ 1. Received: {shape}")
        if self.pooling not in ("AVG", "MAX"):
            raise ValueError(f'Block: pooling is "AVG" or "MAX". Received: {self.pooling!r}')

    def scores(self, importance):
        size = _matrix(importance.shape)
        blocks = self._blocks(size)
        # SAME padding: what is missing goes to both sides, the odd one to the end.
        missing = [n * b - s for n, b, s in zip(blocks, self.shape, size, strict=True)]
        padding = [(m // 2, m - m // 2) for m in missing]

        def split(matrix):
            (rows, columns), (height, width) = blocks, self.shape
            return matrix.reshape(rows, height, columns, width)

        outside = -math.inf if self.pooling == "MAX" else 0.0
        padded = tf.pad(tf.reshape(importance, size), padding, constant_values=outside)
        pieces = tf.reshape(padded, split(np.empty(np.add(size, missing))).shape)
        if self.pooling == "MAX":
            return tf.reshape(tf.reduce_max(pieces, axis=(1, 3)), [-1])
        counts = split(np.pad(np.ones(size, np.float32), padding)).sum(axis=(1, 3))
        return tf.reshape(tf.reduce_sum(pieces, axis=(1, 3)) / counts, [-1])

    def expand(self, keep, shape):
        (height, width), size = self.shape, _matrix(shape)
        rows, columns = self._blocks(size)
        blocks = tf.reshape(keep, [rows, 1, columns, 1])
        whole = tf.broadcast_to(blocks, [rows, height, columns, width])
        whole = tf.reshape(whole, [rows * height, columns * width])
        return tf.reshape(whole[: size[0], : size[1]], shape)

    def remark(self, shape):
        size = _matrix(shape)
        cut = any(s % b for s, b in zip(size, self.shape, strict=True))
        return repr(self) + (f", the last blocks of {size} cut off" if cut else "")

    def _blocks(self, size):
        return tuple(-(-s // b) for s, b in zip(size, self.shape, strict=True))


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """n of every m neighbouring inputs of an output are zero: those of the smallest magnitude.

    Its sparsity is n / m, so that is what the schedule has to end at. On its way there it prunes the
    smallest of the weights that may go, so at most n of m. The pattern is that of the sparse tensor
    cores of NVIDIA's GPUs (2 of 4); on CPUs no kernel of Keras, LiteRT or this package skips its
    zeros: files get smaller, not models faster.

    Neighbours are taken along the input channels, within one place of a convolution. Where m does
    not divide their number, the last group is padded with zeros, which are the first to go.

    Args:
        n: The zeros, at least 1.
        m: The neighbours that they are among, more than n.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> pattern = at.NM(2, 4)
    >>> report = at.prune(model, at.ConstantSparsity(pattern.sparsity), pattern=pattern)
    >>> np.sum(model.layers[0].kernel.numpy().reshape(2, 4, 3) == 0, axis=1)
    array([[2, 2, 2],
           [2, 2, 2]])

    Reference: Mishra et al., "Accelerating sparse deep neural networks" (2021);
    https://arxiv.org/abs/2104.08378. `sparsity_m_by_n` of TFMOT, which counts alike.
    """

    n: int
    m: int

    def __post_init__(self):
        n, m = _integers("NM: n and m", (self.n, self.m), 2)
        if not 1 <= n < m:
            raise ValueError(f"NM: n zeros of m need 1 ≤ n < m. Received: n={n}, m={m}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, n / m."""
        return self.n / self.m

    def scores(self, importance):
        inputs, missing = importance.shape[-2], -importance.shape[-2] % self.m
        rows = tf.linalg.matrix_transpose(importance)
        padding = [(0, 0)] * (len(rows.shape) - 1) + [(0, missing)]
        rows = tf.pad(rows, padding, constant_values=-math.inf)
        groups = tf.reshape(rows, [-1, self.m])
        # Ranks rather than a threshold: of equal weights exactly so many stay.
        ranks = tf.argsort(tf.argsort(groups, direction="DESCENDING"))
        groups = tf.where(ranks < self.m - self.n, math.inf, groups)
        rows = tf.reshape(groups, rows.shape)[..., :inputs]
        return tf.reshape(tf.linalg.matrix_transpose(rows), [-1])

    def levels(self, schedule):
        reached = levels(schedule)
        if reached.max() > self.sparsity + 1e-6 or reached[-1] < self.sparsity - 1e-6:
            raise ValueError(
                f"{self!r} has a sparsity of its own, {self.n} / {self.m} = {self.sparsity:.4g}, "
                f"at which the schedule has to end. Received one that rises to {reached.max():.4g} "
                f"and ends at {reached[-1]:.4g}: {schedule!r}. ConstantSparsity({self.n} / {self.m}) "
                "prunes at once."
            )
        # All that may go goes, whatever the rounding of n / m of the weights.
        return np.where(reached > self.sparsity - 1e-6, np.float32(1), reached)

    def obstacle(self, shape, layer=None):
        kept = self.m - self.n
        if shape[-2] > kept:
            return ""
        return f"{self!r} keeps {kept} of {self.m} inputs, and there are {shape[-2]}"

    def remark(self, shape):
        cut = f", the last groups of {shape[-2]} inputs cut off" if shape[-2] % self.m else ""
        return repr(self) + cut


@dataclasses.dataclass(frozen=True)
class Channels(Pattern):
    """Whole outputs are kept or pruned: filters of a convolution, columns of a dense layer or a head.

    Only the kernel's weights become zero; the bias and a normalization behind it keep what they have.
    Zeros are not skipped: what makes the model smaller and faster is to remove the channels, which
    makes it a smaller dense model. Leave the last layer out, whose outputs are the model's:
    `exclude="head"`.

    The schedule's sparsity is the fraction of outputs; with scope "global", of those of all kernels.

    Args:
        criterion: What of a channel's weights scores it: their norm, `"l2"`, or their mean magnitude,
            `"mean"`, which compares kernels of different sizes in the scope "global".

    Raises:
        ValueError: `criterion` is neither.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(6, 3)])
    >>> report = at.prune(model, at.ConstantSparsity(0.5), pattern=at.Channels())
    >>> int(np.sum(np.all(model.layers[0].kernel.numpy() == 0, axis=(0, 1, 2))))
    3

    Reference: Li et al., "Pruning filters for efficient ConvNets" (2017);
    https://arxiv.org/abs/1608.08710; its norm is `"mean"`, up to the number of weights.
    """

    criterion: str = "l2"

    def __post_init__(self):
        if self.criterion not in ("l2", "mean"):
            raise ValueError(f'Channels: criterion is "l2" or "mean". Received: {self.criterion!r}')

    def scores(self, importance):
        importance = tf.reshape(importance, _matrix(importance.shape))
        if self.criterion == "l2":
            return tf.norm(importance, axis=0)
        return tf.reduce_mean(importance, axis=0)

    def expand(self, keep, shape):
        return tf.broadcast_to(keep, shape)

    def obstacle(self, shape, layer=None):
        width = getattr(layer, "units", None) or getattr(layer, "filters", None)
        if not hasattr(layer, "recurrent_kernel") or width is None or shape[-1] == width:
            return ""
        return "a unit has a column in the kernel for each gate, which Channels would prune apart"


def keep_largest(scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
    """Returns which `scores` to keep: exactly k of them, and of equal ones those that come first.

    k = max(round(n·(1 − sparsity)), 1) in float32, halves to even, is TFMOT's number. TFMOT then
    keeps all that reach the k-th score, hence too many where scores are equal; ranks do not.

    Args:
        scores: A vector of length n; what is infinite is kept, even if that is more than k.
        sparsity: A float32 scalar, the fraction to drop.

    Returns:
        A bool vector of length n.
    """
    n = scores.shape[0]
    kept = tf.maximum(tf.round(tf.cast(n, tf.float32) * (1.0 - sparsity)), 1.0)
    # The length of top_k has to be static for XLA, so all are sorted and the first k marked.
    _, order = tf.math.top_k(scores, k=n)
    keep = tf.scatter_nd(order[:, None], tf.range(n) < tf.cast(kept, tf.int32), [n])
    return keep | tf.math.is_inf(scores)


def _matrix(shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _integers(what, values, count) -> tuple[int, ...]:
    given = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    whole = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in given)
    if len(given) != count or not whole:
        raise ValueError(f"{what} must be {count} integers. Received: {values!r}")
    return tuple(map(int, given))
