"""Finds, checks and loads the compiled op, and ties its gradients together.

The family has three members, each of which is linear in each of its inputs:

    y  = multiply(x, v)         y[b, n]  = Σ_p v[p] · x[b, k(p)]    p over the non-zeros of row n
    dx = multiply_t(dy, v)      dx[b, k] = Σ_p v[p] · dy[b, n(p)]   p over the non-zeros of column k
    dv = sampled(dy, x)         dv[p]    = Σ_b dy[b, n(p)] · x[b, k(p)]

The gradient of each is made of the other two, so derivatives of any order exist.
"""

import ctypes
import functools
import json
import os
import sys
import warnings
from pathlib import Path

import tensorflow as tf

_LIBRARY = "_accel_tf_ops.so"
_RECORD = "_accel_tf_ops.json"
_REBUILD = (
    "pip install scikit-build-core cmake ninja && "
    "pip install --no-build-isolation --no-deps --force-reinstall <accel-tf or the path of its source>"
)


class OpVersionError(ImportError):
    """The compiled op was built for another TensorFlow than the one that is running.

    Example:

    >>> from accel_tf.sparse import OpVersionError
    >>> issubclass(OpVersionError, ImportError)
    True
    """


def _folders() -> list[Path]:
    """Where the library can be: beside this file, or, when this file is imported from the sources,
    in site-packages. `ACCEL_TF_OP_DIR` names another folder, such as that of a build to debug."""
    override = os.environ.get("ACCEL_TF_OP_DIR")
    if override:
        return [Path(override)]
    return [Path(__file__).parent, *(Path(p or ".") / "accel_tf" / "sparse" for p in sys.path)]


def check_version(built_for: str, running: str) -> None:
    """Raises `OpVersionError` unless both versions agree in major and minor number.

    TensorFlow's C++ interface, to which the library is bound, changes with each minor version.
    """
    if built_for.split(".")[:2] != running.split(".")[:2]:
        raise OpVersionError(
            f"The compiled op of accel_tf was built for TensorFlow {built_for}, but TensorFlow "
            f"{running} is running. Rebuild it for this TensorFlow:\n    {_REBUILD}\n"
            f"or install TensorFlow {built_for}."
        )


def _load():
    """Returns the op's functions and its library, or what stands in the way, for the first use.

    Importing must not fail: `import accel_tf` comes here, also for users of other techniques.
    """
    folder = next((f for f in _folders() if (f / _LIBRARY).is_file()), None)
    if folder is None:
        return None, None, None
    record = json.loads((folder / _RECORD).read_text())
    try:
        check_version(record["tensorflow"], tf.__version__)
    except OpVersionError as error:
        return None, None, error
    path = str(folder / _LIBRARY)
    ops = tf.load_op_library(path)  # first: it makes functions of what registers while it loads
    library = ctypes.CDLL(path)
    library.accel_tf_isa.restype = library.accel_tf_available_isas.restype = ctypes.c_char_p
    return ops, library, None


ops, _library, _version_error = _load()


def _compiled() -> bool:
    """Whether there is a compiled op; raises if it is for another TensorFlow."""
    if _version_error is not None:
        raise _version_error
    return ops is not None


@functools.cache
def _say_that_there_is_no_op() -> None:
    warnings.warn(
        "accel_tf.sparse found no compiled op, and uses TensorFlow's own sparse product: the "
        "results are the same, but it is many times slower. The op is built when accel_tf is "
        f"installed on Linux with a C++17 compiler; to build it now:\n    {_REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )


def isa() -> str:
    """Returns the instruction set of the kernels in use.

    The best one that the host runs is chosen when the op is first used; the environment variable
    `ACCEL_TF_ISA`, set before, forces one.

    Returns:
        A name out of `available_isas()`; `"tensorflow"` when there is no compiled op.

    Example:

    >>> import accel_tf as at
    >>> at.sparse.isa() in at.sparse.available_isas()
    True
    """
    return _library.accel_tf_isa().decode() if _compiled() else "tensorflow"


def available_isas() -> tuple[str, ...]:
    """Returns the instruction sets for which this build has kernels and which the host runs.

    Returns:
        Names, the best one last: `"scalar"`, `"avx2"`; `("tensorflow",)` without a compiled op.

    Example:

    >>> import accel_tf as at
    >>> "avx2" in at.sparse.available_isas() or "scalar" in at.sparse.available_isas()
    True
    """
    names = _library.accel_tf_available_isas().decode() if _compiled() else "tensorflow"
    return tuple(names.split())


def multiply(x, row_pointers, columns, values, in_features: int):
    """y[..., n] = Σ values[p] · x[..., columns[p]], p over the non-zeros of row n; float32."""
    if not _compiled():
        _say_that_there_is_no_op()
        return _multiply_without_op(x, row_pointers, columns, values, in_features)
    return ops.accel_tf_sparse_mat_mul(
        x=x, row_pointers=row_pointers, columns=columns, values=values, in_features=in_features
    )


def multiply_transposed(dy, row_pointers, columns, values, in_features: int):
    """dx[..., k] = Σ values[p] · dy[..., n(p)], p over the non-zeros of column k; float32."""
    return ops.accel_tf_sparse_mat_mul_grad_x(
        dy=dy, row_pointers=row_pointers, columns=columns, values=values, in_features=in_features
    )


def sampled(dy, x, row_pointers, columns):
    """dvalues[p] = Σ_b dy[b, n(p)] · x[b, columns[p]]; float32."""
    return ops.accel_tf_sparse_mat_mul_grad_values(
        dy=dy, x=x, row_pointers=row_pointers, columns=columns
    )


def _multiply_without_op(x, row_pointers, columns, values, in_features: int):
    x = tf.convert_to_tensor(x)
    out_features = tf.size(row_pointers) - 1
    lengths = row_pointers[1:] - row_pointers[:-1]
    rows = tf.repeat(tf.range(tf.cast(out_features, tf.int64)), lengths)
    matrix = tf.SparseTensor(
        tf.stack([rows, tf.cast(columns, tf.int64)], axis=1),
        values,
        tf.stack([tf.cast(out_features, tf.int64), in_features]),
    )
    # Not reshape([-1, K]): the batch cannot be inferred when K is 0.
    batch = tf.reduce_prod(tf.shape(x)[:-1])
    flat = tf.reshape(x, tf.stack([batch, in_features]))
    y = tf.transpose(tf.sparse.sparse_dense_matmul(matrix, flat, adjoint_b=True))
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], [out_features]], axis=0))
    y.set_shape(
        [*x.shape[:-1], None if row_pointers.shape[0] is None else row_pointers.shape[0] - 1]
    )
    return y


if ops is not None:

    @tf.RegisterGradient("AccelTfSparseMatMul")
    def _multiply_gradient(op, dy):
        x, row_pointers, columns, values = op.inputs
        dx = multiply_transposed(dy, row_pointers, columns, values, op.get_attr("in_features"))
        return dx, None, None, sampled(dy, x, row_pointers, columns)

    @tf.RegisterGradient("AccelTfSparseMatMulGradX")
    def _multiply_transposed_gradient(op, g):
        dy, row_pointers, columns, values = op.inputs
        ddy = multiply(g, row_pointers, columns, values, op.get_attr("in_features"))
        return ddy, None, None, sampled(dy, g, row_pointers, columns)

    @tf.RegisterGradient("AccelTfSparseMatMulGradValues")
    def _sampled_gradient(op, g):
        dy, x, row_pointers, columns = op.inputs
        # The width of x need not be known when a graph is traced, but its gradient's attribute is.
        in_features = x.shape[-1]
        if in_features is None:
            raise ValueError(
                "The second derivative of sparse_matmul needs the last dimension of x to be known "
                f"when the function is traced; x has shape {x.shape}. Give it an input_signature."
            )
        ddy = multiply(x, row_pointers, columns, g, in_features)
        return ddy, multiply_transposed(dy, row_pointers, columns, g, in_features), None, None
