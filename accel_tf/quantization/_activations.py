"""Activations on the integer grid: which kernel computes each, and where that rounds."""

import functools
import math

import keras
import tensorflow as tf

from accel_tf.layers import Operator
from accel_tf.quantization._fake import apart
from accel_tf.quantization._grids import has_grid, note_steps, requantized, steps_of
from accel_tf.quantization._integers import hard_swish, leaky_relu, product

_L = keras.layers

# Computed inside the kernel before them: the ends of what they clip to.
FUSED = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}

# Ranges that the integer kernels prescribe for their output, in steps of 1/256 or 1/128.
FIXED = {
    "softmax": (0.0, 255 / 256),
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}

# One kernel each, whose output has a range of its own.
ONE_KERNEL = ("leaky_relu", "hard_silu", "gelu", "gelu_approximate", "exponential")

# Several kernels: the tensors between them, each with the activation that prescribes its range.
COMPOSED = {
    "silu": {"gate": "sigmoid"},
    "hard_sigmoid": {"clipped": None},
}

# What `apply` computes, and not the layer.
APPLIED = (*COMPOSED, "hard_silu", "softplus", "log_sigmoid", "log_softmax")

# No integer kernel: the tensor becomes float for them, and is quantized again.
FLOAT = ("elu", "selu", "celu", "softplus", "softsign", "mish", "log_softmax", "log_sigmoid")

KNOWN = ("linear", *FUSED, *FIXED, *ONE_KERNEL, *COMPOSED, *FLOAT)

_OPERATORS = {
    "Elu": "elu",
    "Gelu": "gelu",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "LeakyRelu": "leaky_relu",
    "LogSigmoid": "log_sigmoid",
    "LogSoftmax": "log_softmax",
    "Relu": "relu",
    "Relu6": "relu6",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softmax": "softmax",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Tanh": "tanh",
}


def _softplus(x):
    # The converter's own form, log(1 + exp(x)), is infinite from 89 on.
    return tf.maximum(x, 0.0) + tf.math.log(1.0 + tf.exp(-tf.abs(x)))


def _log_softmax(x):
    # The kernel of LiteRT ends at -16, so the converter must not find its pattern, one x for both.
    x -= tf.reduce_max(x, -1, keepdims=True)
    return x - tf.math.log(tf.reduce_sum(tf.exp(apart(x)), -1, keepdims=True))


# Where Keras has no name, or another function of that name does the same, in a form that converts.
_FUNCTIONS = {
    "gelu_approximate": functools.partial(keras.activations.gelu, approximate=True),
    "log_sigmoid": lambda x: -_softplus(-x),
    "log_softmax": _log_softmax,
    "softplus": _softplus,
}
_TENSORFLOWS = {
    tf.nn.relu: "relu",
    tf.nn.relu6: "relu6",
    tf.nn.sigmoid: "sigmoid",
    tf.nn.softmax: "softmax",
    tf.nn.tanh: "tanh",
    tf.nn.silu: "silu",
    tf.nn.gelu: "gelu",
    tf.nn.elu: "elu",
    tf.nn.selu: "selu",
    tf.nn.softplus: "softplus",
    tf.nn.softsign: "softsign",
    tf.nn.leaky_relu: "leaky_relu",
}


def name_of(layer) -> str | None:
    """Returns the name of the activation that `layer` ends with, `None` if it has none.

    Layers such as `ReLU(6)` are named by the activation that they amount to; what has no name here
    is returned as its Keras name, or as the class's.
    """
    if isinstance(layer, Operator):
        layer = layer.operation
    if not isinstance(layer, keras.Layer):
        return _name_of_operation(layer)
    if isinstance(layer, _L.ReLU):
        return _name_of_relu(layer)
    if isinstance(layer, _L.Softmax):
        return "softmax"
    if isinstance(layer, _L.LeakyReLU):
        return "leaky_relu"
    if isinstance(layer, _L.ELU):
        return "elu"
    if not hasattr(layer, "activation"):
        return None
    return _name_of_function(layer.activation)


@functools.lru_cache
def _name_of_function(function) -> str:
    """Returns Keras's name of an activation, also if another function is one operator of Keras."""
    for name in KNOWN:
        if name != "gelu_approximate" and keras.activations.get(name) is function:
            return name
    if function in _TENSORFLOWS:
        return _TENSORFLOWS[function]
    name = getattr(function, "__name__", type(function).__name__)
    # Not its name alone: anybody may call anything gelu.
    other = f"{name} of {function.__module__}" if name in KNOWN else name
    return _traced_name(function) or other


def _traced_name(function) -> str | None:
    """Returns the name of an activation that a function computes by one operator."""
    if isinstance(function, keras.Layer):  # which a call would leave its trace in
        return None
    x = keras.KerasTensor((None, 2))
    try:
        operation, _, _ = function(x)._keras_history
        (node,) = operation._inbound_nodes
        (given,) = node.arguments.keras_tensors
    except Exception:  # whatever a function does with a symbolic tensor
        return None
    name = _name_of_operation(operation)
    # Those of Keras's activations, by whose names a layer is made again.
    if name == "leaky_relu" and operation.negative_slope != 0.2:
        return None
    if name == "elu" and operation.alpha != 1.0:
        return None
    return None if given is not x or (name == "softmax" and operation.axis != -1) else name


def _name_of_operation(operation) -> str | None:
    name = _OPERATORS.get(type(operation).__name__)
    if name == "log_softmax" and operation.axis != -1:
        return None
    return "gelu_approximate" if name == "gelu" and operation.approximate else name


def _name_of_relu(layer):
    if layer.negative_slope and layer.max_value is None and not layer.threshold:
        return "leaky_relu"
    if layer.negative_slope or layer.threshold or layer.max_value not in (None, 6):
        return (
            f"ReLU(max_value={layer.max_value}, negative_slope={layer.negative_slope}, "
            f"threshold={layer.threshold})"
        )
    return "relu" if layer.max_value is None else "relu6"


def fixed_range(name: str | None, scheme) -> tuple[float, float] | None:
    """Returns the range that the kernels prescribe behind an activation, or `None`."""
    if name not in FIXED:
        return None
    if scheme.symmetric:
        limit = 1 - 2.0 ** (1 - scheme.activation_bits)
        return -limit, limit
    return FIXED[name]


def inside(name: str | None) -> dict[str, str | None]:
    """Returns the tensors within an activation that are rounded, see `QuantizedLayer.inside`."""
    return COMPOSED.get(name, {})


def float_island(name: str | None) -> str:
    """Returns why an activation is computed in float, or `""`."""
    return f"LiteRT has no int8 kernel for {name}" if name in FLOAT else ""


def note_clipped(name: str, x, y):
    """Notes on `y` how the runtime computes it: an activation that clips `x`.

    In the kernel that computes `x`, or, if that is on a grid already, on its way to another grid.

    Args:
        name: One of `FUSED`.
        x, y: Tensors.

    Returns:
        `y`.
    """
    steps = steps_of(x) or (has_grid(x) and functools.partial(requantized, x))
    if not steps:
        return y
    low, high = FUSED[name]

    def clipped(grid):
        return tf.clip_by_value(steps(grid), low / grid.step, high / grid.step)

    return note_steps(y, clipped)


def apply(name: str, x, on_grid):
    """Applies the activation called `name`.

    Args:
        name: One of `KNOWN`.
        x: The tensor, on a grid.
        on_grid: A function `(name, tensor)` that rounds the tensors named by `inside(name)`.
    """
    if name == "silu":
        return product(x, on_grid("gate", tf.sigmoid(x)))
    if name == "hard_sigmoid":
        return on_grid("clipped", tf.nn.relu6(x + 3.0)) * (1 / 6)
    x = apart(x) if name in FLOAT else x
    y = (_FUNCTIONS.get(name) or keras.activations.get(name))(x)
    y = apart(y) if name in FLOAT else y
    if name == "hard_silu" and has_grid(x):
        return note_steps(y, functools.partial(hard_swish, x, y))
    if name == "leaky_relu" and has_grid(x):
        return note_steps(y, functools.partial(leaky_relu, x, 0.2, y))
    return y
