"""Finds, checks and loads the compiled op, and ties its gradients together.

The family has three members, of which the last two are linear in each of their inputs; W is the
packed matrix of `_layout.py`, s are the scales of int8 values:

    y  = multiply(x, v)             y[b, n]  = f(s[n] · Σ_p v[p] · x[b, k(p)] + bias[n])   p in row n
    dx = multiply_transposed(dy, v) dx[b, k] = Σ_p v[p] · dy[b, n(p)]                      p in column k
    dv = sampled(dy, x)             dv[p]    = Σ_b dy[b, n(p)] · x[b, k(p)]

The gradient of each is made of the other two, so derivatives of any order exist.
"""

import ctypes
import functools
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import tensorflow as tf

from ._layout import coordinates

_LIBRARY = "_accel_tf_ops.so"
_XLA_LIBRARY = "_accel_tf_xla.so"
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


def _load_xla(folder: Path) -> bool:
    """Teaches XLA to compile the op; returns whether that is so. The op runs without it as well."""
    path = folder / _XLA_LIBRARY
    if not path.is_file():
        return False
    try:
        tf.load_library(str(path))
    except tf.errors.OpError as error:
        warnings.warn(
            f"XLA cannot compile the op of accel_tf, which runs without: {error}. To build it "
            f"again:\n    {_REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _load():
    """Returns the op's functions and its library, what stands in the way, for the first use, and
    whether XLA can compile the op.

    Importing must not fail: `import accel_tf` comes here, also for users of other techniques.
    """
    folder = next((f for f in _folders() if (f / _LIBRARY).is_file()), None)
    if folder is None:
        return None, None, None, False
    record = json.loads((folder / _RECORD).read_text())
    try:
        check_version(record["tensorflow"], tf.__version__)
    except OpVersionError as error:
        return None, None, error, False
    path = str(folder / _LIBRARY)
    ops = tf.load_op_library(path)  # first: it makes functions of what registers while it loads
    library = ctypes.CDLL(path)
    library.accel_tf_isa.restype = library.accel_tf_available_isas.restype = ctypes.c_char_p
    return ops, library, None, _load_xla(folder)


ops, _library, _version_error, _xla = _load()


def _compiled() -> bool:
    """Whether there is a compiled op; raises if it is for another TensorFlow."""
    if _version_error is not None:
        raise _version_error
    return ops is not None


def supports_jit() -> bool:
    """Whether XLA can compile what calls the op.

    Not on a machine with a GPU, for which Keras would have it compiled unasked (`"auto"`).
    """
    return _xla and not tf.config.list_physical_devices("GPU")


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


def multiply(x, plan, columns, values, scales, bias, *, activation="linear", **attributes):
    """y = activation(scales · (x · W) + bias), for a packed W.

    Args:
        x: [..., in] float32.
        plan, columns: int32, uint16, see `_layout.py`.
        values: float32 or int8, see there.
        scales: (out,) float32 if `values` are int8, else (0,).
        bias: (out,) float32, or (0,) for none.
        activation: "linear", "relu" or "relu6".
        **attributes: `in_features`, `out_features`, `height`, `shared`, see there.

    Returns:
        [..., out] float32.
    """
    arguments = dict(x=x, plan=plan, columns=columns, values=values, scales=scales, bias=bias)
    if not _compiled():
        _say_that_there_is_no_op()
        return _multiply_without_op(**arguments, activation=activation, **attributes)
    return ops.accel_tf_sparse_mat_mul(**arguments, activation=activation, **attributes)


def multiply_transposed(dy, plan, columns, values, **attributes):
    """dx[..., k] = Σ values[p] · dy[..., n(p)], p over the non-zeros of column k; float32."""
    return ops.accel_tf_sparse_mat_mul_grad_x(
        dy=dy, plan=plan, columns=columns, values=values, **attributes
    )


def sampled(dy, x, plan, columns, **attributes):
    """dvalues[p] = Σ_b dy[b, n(p)] · x[b, k(p)], for each stored value; float32."""
    return ops.accel_tf_sparse_mat_mul_grad_values(
        dy=dy, x=x, plan=plan, columns=columns, **attributes
    )


def _multiply_without_op(x, plan, columns, values, scales, bias, activation, **attributes):
    in_features, out_features = attributes["in_features"], attributes["out_features"]
    x = tf.convert_to_tensor(x)
    rows, columns = coordinates(plan, columns, **attributes)
    # One row more to be thrown away, and one column more that is zero, for what is padding.
    matrix = tf.SparseTensor(
        tf.stack([rows, columns], axis=1),
        tf.cast(values, tf.float32),
        [out_features + 1, in_features + 1],
    )
    # Not reshape([-1, K]): the batch cannot be inferred when K is 0.
    batch = tf.reduce_prod(tf.shape(x)[:-1])
    flat = tf.pad(tf.reshape(x, tf.stack([batch, in_features])), [[0, 0], [0, 1]])
    y = tf.transpose(tf.sparse.sparse_dense_matmul(matrix, flat, adjoint_b=True))[:, :-1]
    if scales.shape[0]:
        y *= scales
    if bias.shape[0]:
        y += bias
    y = {"linear": tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}[activation](y)
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], [out_features]], axis=0))
    y.set_shape([*x.shape[:-1], out_features])
    return y


_NONE = np.zeros(0, np.float32)
_ATTRIBUTES = ("in_features", "out_features", "height", "shared")


def _attributes(op) -> dict:
    return {name: op.get_attr(name) for name in _ATTRIBUTES}


def _multiply_linear(x, plan, columns, values, attributes):
    ones = values.dtype == tf.int8
    scales = tf.ones([attributes["out_features"]]) if ones else _NONE
    return multiply(x, plan, columns, values, scales, _NONE, **attributes)


if ops is not None:

    @tf.RegisterGradient("AccelTfSparseMatMul")
    def _multiply_gradient(op, dy):
        x, plan, columns, values, scales, bias = op.inputs
        attributes = _attributes(op)
        activation = tf.compat.as_str(op.get_attr("activation"))
        if activation == "relu":
            dy = tf.raw_ops.ReluGrad(gradients=dy, features=op.outputs[0])
        elif activation == "relu6":
            dy = tf.raw_ops.Relu6Grad(gradients=dy, features=op.outputs[0])
        dbias = None
        if bias.shape[0] != 0:
            dbias = tf.reduce_sum(dy, axis=tf.range(tf.rank(dy) - 1))[: tf.size(bias)]
        if values.dtype == tf.int8:  # weights to infer with: no gradient of values and scales
            dx = multiply_transposed(dy * scales, plan, columns, values, **attributes)
            return dx, None, None, None, None, dbias
        dx = multiply_transposed(dy, plan, columns, values, **attributes)
        dvalues = sampled(dy, x, plan, columns, **attributes)
        return dx, None, None, dvalues, None, dbias

    @tf.RegisterGradient("AccelTfSparseMatMulGradX")
    def _multiply_transposed_gradient(op, g):
        dy, plan, columns, values = op.inputs
        attributes = _attributes(op)
        ddy = _multiply_linear(g, plan, columns, values, attributes)
        if values.dtype == tf.int8:
            return ddy, None, None, None
        return ddy, None, None, sampled(dy, g, plan, columns, **attributes)

    @tf.RegisterGradient("AccelTfSparseMatMulGradValues")
    def _sampled_gradient(op, g):
        dy, x, plan, columns = op.inputs
        attributes = _attributes(op)
        ddy = _multiply_linear(x, plan, columns, g, attributes)
        return ddy, multiply_transposed(dy, plan, columns, g, **attributes), None, None
