"""The model rewrite: which layers are quantized how, and the new model made of them.

LiteRT fuses a convolution with the BatchNormalization and the ReLU behind it into one kernel that
rounds once, at its end. The plan finds these groups, so that fake quantization rounds there too.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence

import keras

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf.quantization import _layers
from accel_tf.quantization._fake import FakeQuantize
from accel_tf.quantization._schemes import Int8, Scheme

_L = keras.layers
_WEIGHTED = (_L.Dense, _L.Conv2D, _L.DepthwiseConv2D)
_AFFINE = (_L.BatchNormalization, _L.Rescaling)
_ACTIVATION = (_L.Activation, _L.ReLU, _L.Softmax, _L.LeakyReLU)
# Computed by integer kernels that round once at the end, with a range of their own.
_ARITHMETIC = (_L.Add, _L.Subtract, _L.Multiply, _L.Concatenate, _L.GlobalAveragePooling2D)
# Those whose kernel takes in a ReLU behind them.
_FUSE_RELU = (*_WEIGHTED, *_AFFINE, _L.Add, _L.Subtract, _L.Multiply)
_RESHAPE = (_L.Flatten, _L.Reshape)
# The integers of the output are those of the input, moved, chosen or averaged: same grid.
_SAME_GRID = (
    *_RESHAPE,
    _L.MaxPooling2D,
    _L.AveragePooling2D,
    _L.GlobalMaxPooling2D,
    _L.ZeroPadding2D,
    _L.Cropping2D,
    _L.Permute,
)
# Nothing at all in inference; fusion looks through them.
_IDENTITY = (
    _L.Dropout,
    _L.SpatialDropout2D,
    _L.GaussianNoise,
    _L.GaussianDropout,
    _L.Identity,
    _L.ActivityRegularization,
)
_SUPPORTED = (*_WEIGHTED, *_AFFINE, *_ACTIVATION, *_ARITHMETIC, *_SAME_GRID, *_IDENTITY)


def quantize_aware(
    model: keras.Model, scheme: Int8 | None = None, *, exclude: Sequence[str] = ()
) -> keras.Model:
    """Returns a copy of `model` with fake quantization, to be fine-tuned by `compile` and `fit`.

    Training observes the ranges of activations and lets the weights adapt to rounding; inference
    uses the ranges found so far. Before it has seen data, the new model rounds only its weights.
    `accel_tf.report_of` tells what was done to each layer.

    Args:
        model: A built functional or sequential model of layers that LiteRT has integer kernels
            for: Dense, Conv2D, DepthwiseConv2D, BatchNormalization, Rescaling, activations (relu,
            relu6, leaky_relu, silu, sigmoid, tanh, softmax), Add, Subtract, Multiply,
            Concatenate, max, average and global pooling, ZeroPadding2D, Cropping2D, Flatten,
            Reshape, Permute, Dropout. Nested models and shared layers are fine. It is not changed,
            and nothing is shared with it.
        scheme: The number format; `Int8()` if not given.
        exclude: Paths of layers to leave in float, as `accel_tf.report_of` shows them; `*` and `?`
            are wildcards, and a nested model's path excludes all of it. How a runtime computes
            them is up to its converter; see `accel_tf.export.litert`.

    Returns:
        A new model of the same class, not compiled, with the layers' names kept. A process that
        loads its `.keras` file imports `accel_tf.quantization` first, so that Keras knows the
        layers.

    Raises:
        ValueError: A layer has no integer form here (the message names its path), `model` is
            subclassed, not built or quantized already, or a pattern matches nothing.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,), name="x"), keras.layers.Dense(4, name="y")])
    >>> print(at.report_of(at.quantize_aware(model)))
    quantize_aware: 2 layers changed, 0 left alone
    layer  changed  note
    -----  -------  -----------------------------------------
    x      yes      input of the model, observed
    y      yes      weights int8 per channel, output observed

    Reference:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", CVPR 2018, section 3.
    """
    return rewrite(model, scheme or Int8(), exclude, "quantize_aware")


def rewrite(model, scheme, exclude, verb) -> keras.Model:
    """Builds the fake-quantized copy for `quantize_aware` and `calibrate`, and attaches its report."""
    graphs.require_model(model, verb)
    if not isinstance(scheme, Scheme):
        raise ValueError(f"{verb} expects a scheme such as Int8(), received {scheme!r}.")
    paths = {
        id(layer): path
        for path, layer in graphs.walk(model)
        if not isinstance(layer, keras.layers.InputLayer)
    }
    if quantized := [path for path, layer in graphs.walk(model) if isinstance(layer, FakeQuantize)]:
        raise ValueError(
            f"Model {model.name!r} is quantized already ({report.shorten(quantized, 2)}). "
            f"Give {verb} the float model that it was made from."
        )
    plan = _Plan(model, paths, _excluded(paths, exclude))
    made = []

    def replace(path, layer):
        step = plan.steps.get(id(layer))
        if step is None or step.wrapper is None:
            return None
        new = _wrap(layer, step, scheme)
        made.append((layer, new))
        return new

    def on_input(i):
        if not plan.inputs_on_grid[i]:
            return None
        # Observed once, however many layers read it: the file has one grid for each input.
        name = f"{model.inputs[i].name}_quantizer"
        return FakeQuantize(
            scheme.activation_bits, scheme.observer, symmetric=scheme.symmetric, name=name
        )

    new_model = graphs.rebuild(model, replace, on_input)
    for old, new in made:
        if old.weights:
            new.layer.set_weights(old.get_weights())
        new.trainable = old.trainable
    entries = [
        report.Entry(tensor.name, "input of the model, observed")
        for tensor, on_grid in zip(model.inputs, plan.inputs_on_grid, strict=True)
        if on_grid
    ]
    changed = {entry.layer for entry in entries}
    entries += [report.Entry(paths[key], step.note(scheme)) for key, step in plan.steps.items()]
    changed |= {paths[id(old)] for old, _ in made}
    report.attach(
        new_model,
        report.Report(
            verb,
            done=tuple(e for e in entries if e.layer in changed),
            skipped=tuple(e for e in entries if e.layer not in changed),
        ),
    )
    return new_model


@dataclasses.dataclass
class _Step:
    """What becomes of one layer; `wrapper` is `None` if it stays as it is."""

    wrapper: type | None
    quantize_inputs: list[bool]
    output: str | None = None
    activation: str | None = None
    why: str = ""

    def note(self, scheme) -> str:
        parts = ["input quantized"] if any(self.quantize_inputs) else []
        if self.wrapper is _layers.QuantizedWeights:
            parts.append(f"weights int{scheme.weight_bits} per channel")
        if self.why:
            parts.append(self.why)
        if self.activation and self.activation not in _layers.FUSED:
            parts.append(f"quantized before {self.activation}")
        if self.output:
            parts.append("output observed")
        return ", ".join(parts)


class _Plan:
    """Decides on a `_Step` for each layer by following the graph from the inputs to the outputs."""

    def __init__(self, model, paths, excluded):
        self.paths = paths
        self.excluded = excluded
        self.steps: dict[int, _Step] = {}
        graph = _Graph(model)
        self.inputs_on_grid = [
            keras.backend.is_float_dtype(tensor.dtype)
            and not any(id(call.layer) in excluded for call in graph.readers.get(id(tensor), []))
            for tensor in model.inputs
        ]
        self._follow(model, self.inputs_on_grid)

    def _follow(self, model, inputs_on_grid) -> list[bool]:
        """Plans the layers of `model`; returns for each of its outputs whether it is on a grid."""
        graph = _Graph(model)
        on_grid = {id(t): on for t, on in zip(model.inputs, inputs_on_grid, strict=True)}
        for call in graph.calls:
            if isinstance(call.layer, _L.InputLayer):
                continue
            ready = [on_grid[id(t)] for t in call.inputs]
            if isinstance(call.layer, keras.Model) and id(call.layer) not in self.excluded:
                results = self._follow(call.layer, ready)
            else:
                results = [self._plan(call, ready, graph)] * len(call.outputs)
            on_grid.update((id(t), on) for t, on in zip(call.outputs, results, strict=True))
        return [on_grid[id(t)] for t in model.outputs]

    def _plan(self, call, ready, graph) -> bool:
        layer = call.layer
        if id(layer) in self.excluded:
            self.steps.setdefault(id(layer), _Step(None, [], why="excluded: stays in float"))
            return False
        self._check(call)
        step = self._step(layer, graph)
        if type(layer) in _IDENTITY:
            self.steps[id(layer)] = step
            return all(ready)
        step.quantize_inputs = [not on for on in ready]
        if any(step.quantize_inputs) and step.wrapper is None:
            step.wrapper = _layers.QuantizedLayer
        if earlier := self.steps.get(id(layer)):  # Shared: what any of its calls needs.
            flags = zip(step.quantize_inputs, earlier.quantize_inputs, strict=True)
            step.quantize_inputs = [a or b for a, b in flags]
            step.wrapper = step.wrapper or earlier.wrapper
            step.output = step.output or earlier.output
        self.steps[id(layer)] = step
        return True

    def _step(self, layer, graph) -> _Step:
        follower = graph.fused_into(layer)
        if type(layer) in _IDENTITY:
            return _Step(None, [], why="nothing to compute in inference")
        if type(layer) in _RESHAPE:
            return _Step(_layers.QuantizedReshape, [], why="keeps its input's grid")
        if type(layer) in _SAME_GRID:
            return _Step(None, [], why="int8 on its input's grid, nothing to add")
        output = None if follower else "observe"
        why = f"computed in one kernel with {self.paths[id(follower)]}" if follower else ""
        if type(layer) in _WEIGHTED:
            activation = _layers.activation_of(layer)
            activation = None if activation == "linear" else activation
            return _Step(_layers.QuantizedWeights, [], output, activation, why)
        if type(layer) in _AFFINE and not graph.folds(layer):
            return _Step(_layers.QuantizedAffine, [], output, why=why or "one integer kernel")
        if type(layer) in _AFFINE:
            why = ", ".join(filter(None, ["folded into the kernel before it", why]))
        if output is None and type(layer) not in _ACTIVATION:
            return _Step(None, [], None, why=why)
        return _Step(_layers.QuantizedLayer, [], output, why=why)

    def _check(self, call):
        layer = call.layer
        path = self.paths.get(id(layer), layer.name)
        kind = type(layer).__name__
        out = f"Leave it in float with exclude=[{path!r}]"
        if not isinstance(layer, keras.Layer):
            raise ValueError(
                f"Cannot quantize the operator {kind!r} ({path}) between layers: use a layer such "
                "as keras.layers.Add instead."
            )
        if type(layer) not in _SUPPORTED:
            raise ValueError(
                f"Cannot quantize layer {path!r}: there is no integer form of {kind}. {out}, or "
                "build the model from the layers that quantize_aware lists."
            )
        name = _layers.activation_of(layer)
        if name is not None and name not in _layers.ACTIVATIONS:
            raise ValueError(
                f"Cannot quantize layer {path!r} ({kind}): its activation {name!r} is none of "
                f"{', '.join(_layers.ACTIVATIONS)}. {out}."
            )
        if getattr(layer, "data_format", "channels_last") == "channels_first":
            raise ValueError(
                f"Cannot quantize layer {path!r} ({kind}): the integer kernels are channels_last. "
                "Build the model with data_format='channels_last'."
            )
        if any(rate != 1 for rate in getattr(layer, "dilation_rate", ())):
            raise ValueError(
                f"Cannot quantize layer {path!r} ({kind}): a dilated convolution is three operators "
                f"in LiteRT, and its bias is added in float. {out}."
            )
        rank = len(call.inputs[0].shape)
        if isinstance(layer, _L.BatchNormalization) and layer.axis not in (-1, rank - 1):
            raise ValueError(
                f"Cannot quantize layer {path!r} ({kind}): it normalizes axis {layer.axis} and "
                f"not the last one. {out}."
            )


class _Graph:
    """The calls of one model, and which of its layers the runtime computes in one kernel.

    Fusion is for layers that are called once and whose output goes to one place only.
    """

    def __init__(self, model):
        self.calls = graphs.calls(model)
        self.outputs = {id(t) for t in model.outputs}
        self.by_layer: dict[int, list[graphs.Call]] = {}
        self.readers: dict[int, list[graphs.Call]] = {}
        self.writer = {id(t): call for call in self.calls for t in call.outputs}
        for call in self.calls:
            self.by_layer.setdefault(id(call.layer), []).append(call)
            for tensor in call.inputs:
                self.readers.setdefault(id(tensor), []).append(call)

    def fused_into(self, layer):
        """Returns the layer whose kernel rounds the output of `layer`, or `None`: it does itself."""
        call = self._only_call(layer)
        reader = call and self._only_reader(call)
        if reader is None or len(self.by_layer[id(reader.layer)]) > 1:
            return None
        after = reader.layer
        activation = _layers.activation_of(layer)
        linear = activation in (None, "linear")
        if type(after) in _ACTIVATION and linear and type(layer) in _FUSE_RELU:
            return after if _layers.activation_of(after) in _layers.FUSED else None
        if type(after) is _L.BatchNormalization and linear and type(layer) in _WEIGHTED:
            return after
        # All inputs of a concatenation share the grid of its output.
        if type(after) is _L.Concatenate and activation not in _layers.FIXED:
            fits = (*_WEIGHTED, *_AFFINE, *_ACTIVATION, *_ARITHMETIC)
            return after if type(layer) in fits else None
        return None

    def folds(self, layer) -> bool:
        """Whether `layer` is a BatchNormalization that the kernel before it takes in."""
        call = self._only_call(layer)
        writer = call and self.writer[id(call.inputs[0])]
        while writer and type(writer.layer) in _IDENTITY and writer.inputs:
            writer = self.writer[id(writer.inputs[0])]
        return (
            bool(writer)
            and type(writer.layer) in _WEIGHTED
            and (self.fused_into(writer.layer) is layer)
        )

    def _only_call(self, layer):
        found = self.by_layer[id(layer)]
        return found[0] if len(found) == 1 else None

    def _only_reader(self, call):
        while len(call.outputs) == 1 and id(call.outputs[0]) not in self.outputs:
            readers = self.readers.get(id(call.outputs[0]), [])
            if len(readers) != 1:
                return None
            call = readers[0]
            if type(call.layer) not in _IDENTITY:
                return call
        return None


def _excluded(paths, patterns) -> set[int]:
    if isinstance(patterns, str):
        raise ValueError(f"exclude expects a list of paths, received the string {patterns!r}.")
    excluded = set()
    for pattern in patterns:
        found = {
            key
            for key, path in paths.items()
            if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern + "/*")
        }
        if not found:
            raise ValueError(
                f"exclude={pattern!r} matches no layer. There are {report.shorten(paths.values())}."
            )
        excluded |= found
    return excluded


def _wrap(layer, step, scheme):
    config = layer.get_config()
    if step.activation and step.activation not in _layers.FUSED:
        config["activation"] = None
        activation = step.activation
    else:
        activation = None
    inner = type(layer).from_config(config)
    return step.wrapper(inner, scheme, step.quantize_inputs, step.output, activation)
