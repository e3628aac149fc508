"""Random Keras models with inputs for them; each follows from a seed.

A model is a chain of steps from one or two inputs to one or two outputs. A step is a layer of
`random_layers.FAMILIES`, an operator, a custom layer, or a structure: a residual sum, a layer or a
nested model that is called twice on tensors of different scale.
"""

import math
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from random_inputs import PLAIN_STARTS, STARTS
from random_layers import FAMILIES, Draw

import accel_tf as at

L = keras.layers

SORTS = ("equal", "zero", "huge", "denormal", "one channel", "one element")
POLICIES = ("float32",) * 8 + ("mixed_float16", "float64")
# What a model may lose by rounding each weight once more, in dB, in float32 and in float16.
WELL_POSED = {"float32": 110, "float64": 110, "mixed_float16": 50}
STATISTICS = (L.Normalization, L.Discretization, L.IntegerLookup, L.MelSpectrogram)
# Keras gives this warning wherever a mask ends, which is nothing that a verb changes.
MASK_WARNING = r"(?s).*does not (support|know how to handle) mask"


class Sample(NamedTuple):
    """A model, its inputs, and what to write to make them again."""

    model: keras.Model
    x: Any
    policy: str
    origin: str


# The layers that no model here has, with the reason.
LEFT_OUT = {
    "InputSpec": "it describes inputs and is no layer",
    "Layer": "it is the base class; the custom layers below derive from it",
    "Wrapper": "it is the base class of wrappers",
    "FlaxLayer": "it needs Flax",
    "JaxLayer": "it needs JAX",
    "TorchModuleWrapper": "it needs PyTorch",
    "TFSMLayer": "it reads a SavedModel from a folder",
    "MaxNumBoundingBoxes": "it takes a dictionary of bounding boxes",
    "Pipeline": "it is made of preprocessing layers for tf.data, outside of models",
}


# Custom layers


@keras.saving.register_keras_serializable(package="random_models")
class Gate(L.Layer):
    """Multiplies each channel by a weight of its own; in training it adds noise."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(shape[-1],), initializer="ones", name="gate")

    def call(self, x, training=False):
        if training:
            x = x + keras.random.normal(keras.ops.shape(x), dtype=x.dtype)
        return x * self.gate


@keras.saving.register_keras_serializable(package="random_models")
class Block(L.Layer):
    """A residual block of sublayers with a factor of its own; it keeps the mask."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units, self.supports_masking = units, True
        self.norm = L.LayerNormalization(dtype=self.dtype_policy)
        self.hidden = L.Dense(units, activation="relu", dtype=self.dtype_policy)

    def build(self, shape):
        self.out = L.Dense(shape[-1], dtype=self.dtype_policy)
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")
        self.norm.build(shape)
        self.hidden.build(shape)
        self.out.build((*shape[:-1], self.units))

    def call(self, x, training=None):
        return x + self.factor * self.out(self.hidden(self.norm(x)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="random_models")
class MaskedMean(L.Layer):
    """The mean of the time steps that the mask keeps."""

    def call(self, x, mask=None):
        if mask is None:
            return keras.ops.mean(x, axis=1)
        kept = keras.ops.cast(mask, x.dtype)[..., None]
        return keras.ops.sum(x * kept, axis=1) / (keras.ops.sum(kept, axis=1) + 1)

    def compute_mask(self, x, mask=None):
        return None


# Steps


def layer_step(d, shape):
    """Returns a layer, or a function of layers, that takes a tensor of `shape`."""
    fitting = {}
    for name, family in FAMILIES.items():
        for layer, (ranks, make) in family.items():
            if len(shape) in ranks and d.allows(layer):
                fitting.setdefault(name, []).append(make)
    return d.one_of(*fitting[d.one_of(*fitting)])(d, shape)


def _custom(d, shape):
    options = [Gate(), Block(d.units())] + [MaskedMean()] * (len(shape) == 2)
    return d.one_of(*options)


def _operator(d, shape):
    ops = keras.ops
    return d.one_of(
        lambda x: x * 2.0 + 1.0,
        lambda x: 0.5 - x,
        lambda x: ops.relu(x) / 2.0,
        lambda x: ops.tanh(x) + x,
        lambda x: ops.maximum(x, -ops.abs(x)),
        lambda x: ops.concatenate([x[:, :1], x], axis=1),
        lambda x: ops.mean(x, axis=-1, keepdims=True) + x,
        lambda x: ops.stack([x, -x], axis=-1) if len(shape) < 3 else ops.square(x),
        lambda x: ops.split(x, 2, axis=-1)[0] if shape[-1] % 2 == 0 else ops.exp(-ops.abs(x)),
        lambda x: ops.swapaxes(x, 1, -1),
    )


def _keeping(d, shape):
    """Returns a layer that keeps the shape of its input."""
    if len(shape) == 3 and d.chance(0.7):
        return L.Conv2D(shape[-1], 3, padding="same", activation=d.activation())
    if len(shape) == 2 and d.chance(0.5):
        return L.Conv1D(shape[-1], 3, padding=d.one_of("same", "causal"))
    return L.Dense(shape[-1], activation=d.activation())


def _residual(d, shape):
    layer, norm = _keeping(d, shape), d.one_of(None, L.BatchNormalization())
    merge = d.one_of(L.Add(), lambda pair: pair[0] + pair[1], L.Concatenate())
    return lambda x: merge([x, norm(layer(x)) if norm else layer(x)])


def _twice(d, shape):
    """A layer or a nested model, called on the tensor and on a multiple of it."""
    shared = d.one_of(_keeping, _nested)(d, shape)
    factor, merge = d.one_of(37.0, 0.05, -3.0), d.one_of(L.Add(), L.Concatenate())
    return lambda x: merge([shared(x), shared(L.Rescaling(factor)(x))])


def _nested(d, shape):
    """Returns a sequential or functional model of one to three steps."""
    start, steps = keras.Input(shape), []
    x = start
    for _ in range(d.between(1, 3)):
        step = layer_step(d, x.shape[1:])
        y = step(x)
        if _fits(y):
            steps.append(step)
            x = y
    if not steps:
        return keras.Sequential([start, L.Dense(2)])
    if all(isinstance(step, L.Layer) for step in steps) and d.chance():
        return keras.Sequential([keras.Input(shape), *steps])
    return keras.Model(start, x)


def _step(d, shape):
    kinds = [layer_step] * 12 + [_residual, _twice, _nested] * 2
    if d.only is None:
        kinds += [_custom, _operator]
    return d.one_of(*kinds)(d, shape)


def _fits(tensor) -> bool:
    """Whether a tensor is of a size to go on with."""
    return len(tensor.shape) <= 6 and 0 < math.prod(tensor.shape[1:]) <= 400


# Models


def random_model(seed: int, size: int | None = None, only=None) -> Sample:
    """Returns the model of a seed.

    Args:
        seed: A non-negative integer.
        size: The number of steps, for a smaller model that begins like that of the seed alone.
        only: The names of the classes to draw layers from, for a float32 model without custom
            layers and operators; by default all of Keras, and these.
    """
    for attempt in range(40):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", MASK_WARNING)
            warnings.filterwarnings("error", "(?s).*You are using a softmax")
            sample = _attempt(seed, attempt, size, only)
            if _is_well_posed(sample):
                return sample
    raise RuntimeError(f"No model of seed {seed} has finite outputs that vary.")


def _attempt(seed, attempt, size, only) -> Sample:
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed % 2**32)
    d = Draw(seed, attempt, 0, only=only)
    policy = d.one_of(*POLICIES) if only is None else "float32"
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        pairs, outputs = _graph(d, size)
    finally:
        keras.config.set_dtype_policy(before)
    inputs, x = _structured(d, pairs)
    model = keras.Model(inputs, outputs)
    if d.chance(0.7) and _is_chain(model):
        model = keras.Sequential(model.layers)
    _set_weights(model, Draw(seed, attempt, 1))
    return Sample(model, x, policy, f"random_model({seed}, {size}{', QUANTIZABLE' * bool(only)})")


def _is_chain(model) -> bool:
    """Whether each layer is called once, on the output of the one before it and nothing else."""
    calls = at.layers.calls(model)
    tensors = [call.outputs for call in calls]
    return (
        all(isinstance(call.layer, L.Layer) for call in calls)
        and [call.layer for call in calls] == model.layers
        and [call.inputs for call in calls] == [(), *tensors[:-1]]
        and not isinstance(model.input, dict | list)
        and not isinstance(model.output, dict | list)
        and all(not node.arguments.kwargs for x in model.layers for node in x._inbound_nodes)
    )


def _graph(d, size):
    """Returns the pairs of input and array, and the output, or a list or dictionary of two."""
    starts = STARTS if d.only is None else PLAIN_STARTS
    pairs, x = d.one_of(*starts)(d)
    steps = d.between(1, 6) if size is None else size
    second = d.one_of(*starts)(d) if d.chance(0.2) and steps > 1 else None
    first, joined = x, second is None
    for number in range(steps):
        if not joined and number == steps // 2:
            x = _joined([x, second[1]])
            pairs, joined = pairs + second[0], True
        y = _step(d, tuple(x.shape[1:]))(x)
        if _fits(y):
            x = y
    if steps == 0 or x in [tensor for tensor, _ in pairs]:
        x = L.Dense(3)(x)
    if not d.chance(0.2):
        return pairs, x
    outputs = [L.Dense(2)(first), x]
    return pairs, outputs if d.chance() else {"second": outputs[0], "first": outputs[1]}


def _joined(tensors):
    return L.Concatenate()([L.Dense(3)(L.Flatten()(x)) for x in tensors])


def _structured(d, pairs):
    """Returns symbolic inputs and arrays, alike structured: one, a list, or a dictionary."""
    tensors, arrays = zip(*pairs, strict=True)
    if d.chance(0.2):
        names = [tensor.name for tensor in tensors]
        return dict(zip(names, tensors, strict=True)), dict(zip(names, arrays, strict=True))
    return (tensors[0], arrays[0]) if len(pairs) == 1 else (list(tensors), list(arrays))


def _set_weights(model, d):
    """Draws weights as after training, some of them constants of one of `SORTS`."""
    fixed = {
        id(v)
        for _, layer in at.layers.walk(model)
        if isinstance(layer, STATISTICS)
        for v in layer.weights
    }
    constants = d.chance(0.4)
    for v in model.weights:
        if id(v) in fixed or "float" not in v.dtype or v.name.startswith("vector"):
            continue
        value = _weight(d, v.name, tuple(v.shape))
        if constants and d.chance(0.3):
            value = _constant(d, d.one_of(*SORTS), value, v.name)
        v.assign(value)


def _weight(d, name, shape):
    if name in ("gamma", "moving_variance", "scale", "gate", "factor"):
        return d.rng.uniform(0.5, 1.5, shape)
    if len(shape) < 2:
        return d.rng.normal(size=shape) * 0.3
    value = d.rng.normal(size=shape) * math.sqrt(1.5 / math.prod(shape[:-1]))
    return value * (d.rng.random(shape) < 0.3) if d.chance(0.2) else value


def _constant(d, sort, value, name):
    if name == "moving_variance":
        return np.full(value.shape, d.one_of(1.0, 0.3, 40.0))
    if sort == "equal":
        return np.full(value.shape, d.one_of(1.0, -4.6, 0.3))
    if sort == "zero":
        return np.zeros(value.shape)
    if sort == "huge":
        return value * 1000
    if sort == "denormal":
        return np.full(value.shape, 1e-40)
    only = np.zeros(value.shape)
    if value.ndim == 0:
        return only
    place = d.between(0, value.shape[-1] - 1)
    if sort == "one channel":
        only[..., place] = value[..., place]
    else:
        only.flat[d.between(0, only.size - 1)] = 1.0
    return only


def arrays_of(outputs) -> list[np.ndarray]:
    """Returns the outputs of a model as a list of float64 arrays."""
    return [np.asarray(y, np.float64) for y in keras.tree.flatten(outputs)]


def run(model, x) -> tuple[list, list]:
    """Returns the outputs of a model in inference, and their masks."""
    outputs = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    masks = [getattr(y, "_keras_mask", None) for y in keras.tree.flatten(outputs)]
    return arrays_of(outputs), [None if m is None else np.asarray(m).tolist() for m in masks]


def sqnr(signal, noisy) -> float:
    """Returns the signal-to-quantization-noise ratio in dB."""
    noise = ((signal - noisy) ** 2).sum()
    return 10 * np.log10((signal**2).sum() / noise) if noise else np.inf


def _is_well_posed(sample) -> bool:
    """Whether outputs are finite, vary, and hardly change if each weight is rounded once more."""
    try:
        outputs, _ = run(sample.model, sample.x)
    except UserWarning:  # Keras says that a softmax over one channel is constant.
        return False
    except ValueError:  # Keras' Softmax takes no mask of time steps, and the shape of RandomCrop's
        return False  # output is not always the one that it tells.
    except TypeError:  # Keras' ReLU of integers takes no slope that is a fraction.
        return False
    except (tf.errors.NotFoundError, tf.errors.InvalidArgumentError):
        return False  # TensorFlow lacks a kernel for float16 or float64.
    for y in outputs:
        if not np.isfinite(y).all() or np.abs(y).max() > 1e4 or np.ptp(y, axis=0).max() < 1e-2:
            return False
    weights = [(v, v.numpy()) for v in sample.model.weights if "float" in v.dtype]
    rounding = 2**-10 if sample.policy == "mixed_float16" else 2**-23
    rng = np.random.default_rng(0)
    for v, value in weights:
        v.assign(value * (1 + rounding * rng.uniform(-1, 1, value.shape)))
    moved, _ = run(sample.model, sample.x)
    for v, value in weights:
        v.assign(value)
    return all(
        np.isfinite(z).all() and sqnr(y, z) > WELL_POSED[sample.policy]
        for y, z in zip(outputs, moved, strict=True)
    )
