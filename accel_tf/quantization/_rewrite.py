"""The model rewrite: the new model, made as a `Plan` says."""

import dataclasses
import uuid
from collections import Counter
from collections.abc import Sequence

import keras

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf.quantization import _preserve, _weight_only
from accel_tf.quantization._checks import require_finite
from accel_tf.quantization._fake import FakeQuantize, unrounded
from accel_tf.quantization._layers import QuantizedLayer
from accel_tf.quantization._plan import Plan
from accel_tf.quantization._rules import graph_of, rule_of
from accel_tf.quantization._schemes import Int8, Mixed, Scheme, schemes_by_path


def quantize_aware(
    model: keras.Model,
    scheme: Scheme | Mixed | None = None,
    *,
    exclude: Sequence[str] = (),
    verify: bool = True,
) -> keras.Model:
    """Returns a copy of `model` with fake quantization, to be fine-tuned by `compile` and `fit`.

    Training observes the ranges of activations and lets the weights adapt to rounding; inference
    uses the ranges found so far. Before it has seen data, the new model rounds only its weights.
    `accel_tf.report_of` tells what was done to each layer.

    A kernel whose weights are exactly zero to a tenth or more, or share few values, as `prune` and
    `cluster` leave them, keeps its zeros and clusters while the new model is trained, also if the
    model was stripped or comes from a file. With `Int8` each cluster is one integer in the LiteRT file.
    `strip_pruning` and `strip_clustering` of the new model let go of them.

    Args:
        model: A built functional or sequential model. Nested models and shared layers are fine. It
            is not changed, and nothing is shared with it. The layers of Keras are known but for a
            few: dense, convolutional (transposed, depthwise, separable), recurrent, attention,
            embedding, normalization, activation, merging, pooling, padding, resizing and
            reshaping layers, and the operators of `keras.ops` between layers, such as `x + y`. An
            operator without an integer form computes in float between quantized tensors, and the
            report names it. A layer of your own is taken apart if its `call` is made of such layers,
            of weights and of `keras.ops`, and computes the same in training, but for what its layers
            do then.
        scheme: The number format, `Int8()` if not given; `Mixed` for several. `Int8Weights`,
            `Int4Weights` and `Float16` take layers of any kind: they round the kernels and tables, and
            the layer computes as before.
        exclude: Paths of layers and operators to leave in float, as `accel_tf.report_of` shows
            them; `*` and `?` are wildcards, and a nested model's path excludes all of it. How a
            runtime computes them is up to its converter; see `accel_tf.export.litert`.
        verify: Whether to compare the new model, with nothing rounded, with `model` on a few samples
            made from its input specification.

    Returns:
        A new model of the same class, not compiled, with the layers' names kept. A process that
        loads its `.keras` file imports `accel_tf.quantization` first, so that Keras knows the
        layers.

    Raises:
        ValueError: A layer has no integer form here (the message names its path), `model` is
            subclassed, not built or quantized already, or a pattern matches nothing; or the new model,
            with nothing rounded, does not compute what `model` does, which is an error in accel_tf or
            in a custom layer.

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
    Checked without rounding on 4 samples against the original: equal outputs.

    Reference:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", CVPR 2018, section 3.
    """
    quantized = rewrite(model, scheme or Int8(), exclude, "quantize_aware")
    if verify:
        require_same_unrounded("quantize_aware", model, quantized)
    return quantized


def require_same_unrounded(verb, model, quantized, x=None) -> None:
    """Raises a ValueError unless a quantized model computes what `model` does while nothing is rounded.

    The report of the quantized model notes it.
    """
    with unrounded():
        note = graphs.require_same(verb, model, quantized, x, how="without rounding ")
    report.attach(quantized, dataclasses.replace(report.report_of(quantized), note=note))


def rewrite(model, scheme, exclude, verb) -> keras.Model:
    """Builds the fake-quantized copy for `quantize_aware` and `calibrate`, and attaches its report."""
    graphs.require_model(model, verb)
    if not isinstance(scheme, Scheme | Mixed):
        raise ValueError(f"{verb} expects a scheme such as Int8(), received {scheme!r}.")
    layers = graphs.walk(model)
    paths = [path for path, v in layers if not isinstance(v, keras.layers.InputLayer)]
    scheme_at = schemes_by_path(scheme, exclude, [*paths, *_operators(model)])
    _require_floats(model, scheme_at, verb)

    def graph(path, layer):
        scheme = scheme_at(path)
        if rule_of(layer) or scheme is None:
            return None
        if scheme.activation_bits is None and _weight_only.holds_matrices(layer):
            return None  # In a graph of operators nothing would round them.
        return graph_of(layer)

    model = graphs.expand(model, graph)
    plan = Plan(model, scheme_at)
    wrappers = _Wrappers(plan)
    new_model = graphs.rebuild_calls(
        model, wrappers.of_call, lambda i: _input_quantizer(model, plan, i)
    )
    if not any(isinstance(v, QuantizedLayer | FakeQuantize) for _, v in graphs.walk(new_model)):
        raise ValueError(
            f"{verb} has nothing to quantize in model {model.name!r}: none of its layers has a kernel, a table "
            f"or another matrix that {scheme} takes, or all of them are excluded. accel_tf.fuse(model) "
            "returns a copy in float."
        )
    wrappers.copy_state(new_model)
    kept = _preserve.keep(new_model)
    report.attach(new_model, _report(verb, model, plan, wrappers.inner, kept))
    return new_model


class _Wrappers:
    """The wrappers that take the place of the calls of layers, as a `Plan` says.

    Attributes:
        inner: The copy of each layer that its wrappers run, one for all of its calls, by the `id` of the
            layer.
    """

    def __init__(self, plan):
        self.inner: dict[int, keras.Layer] = {}
        self._plan = plan
        self._uses = Counter(id(layer) for layer in plan.layers.values())
        self._keys: dict[int, str] = {}

    def of_call(self, site, path, layer):
        """Returns the wrapper for a call of a layer or operator, `None` if it stays as it is."""
        step = self._plan.steps.get(site)
        if step is None or step.wrapper is None:
            return None
        if id(layer) not in self.inner:
            path = self._plan.paths[id(layer)]
            if isinstance(layer, keras.Layer):
                require_finite(layer, path)
            self.inner[id(layer)] = step.inner(layer, path)
        wrapper = step.wrap(self.inner[id(layer)])
        if self._uses[id(layer)] > 1:
            wrapper.shared = self._keys.setdefault(id(layer), uuid.uuid4().hex)
        return wrapper

    def copy_state(self, new_model):
        """Gives the layers inside of wrappers the state of those that they are copies of."""
        frozen = set()
        layers = {id(v): v for v in self._plan.layers.values() if isinstance(v, keras.Layer)}
        for key in layers.keys() & self.inner.keys():
            old, new = layers[key], self.inner[key]
            graphs.copy_state(old, new, self._plan.paths[key])
            new.trainable = old.trainable
            if not old.trainable:
                frozen.add(id(new))
        for _, wrapper in graphs.walk(new_model):
            if isinstance(wrapper, QuantizedLayer) and id(wrapper.layer) in frozen:
                wrapper.trainable = False


def _input_quantizer(model, plan, i):
    """Returns the quantizer of the model's input i, or `None`.

    An input is observed once, however many layers read it, as it has one scale and zero point in a file.
    """
    scheme = plan.input_schemes[i]
    if scheme is None:
        return None
    return FakeQuantize(
        scheme.activation_bits,
        scheme.observer,
        symmetric=scheme.symmetric,
        name=f"{model.inputs[i].name}_quantizer",
    )


def _operators(model, prefix=""):
    """Yields the paths of the operators between the layers of a model and of the models in it."""
    if not graphs.has_graph(model):
        return  # which has no graph of operators
    for call in graphs.calls(model):
        if not isinstance(call.layer, keras.Layer):
            yield prefix + call.layer.name
        else:
            yield from _operators(call.layer, f"{prefix}{call.layer.name}/")


def _require_floats(model, scheme_at, verb):
    """Raises a ValueError if a model, or a layer that is to be quantized, is quantized already."""
    for path, layer in graphs.walk(model):
        if isinstance(layer, FakeQuantize):
            raise ValueError(
                f"Model {model.name!r} is quantized already (layer {path!r}). Give {verb} the float model "
                "that it was made from."
            )
        mode = getattr(layer, "quantization_mode", None)
        if mode and scheme_at(path) is not None:
            raise ValueError(
                f"Layer {path!r} ({type(layer).__name__}) was quantized by Keras, with "
                f"quantize({mode!r}): its weights are integers already. Give {verb} the model as it was "
                f"before, or leave the layer as it is with exclude=[{path!r}]."
            )


def _report(verb, model, plan, inner, kept):
    done = [
        report.Entry(tensor.name, "input of the model, observed")
        for tensor, scheme in zip(model.inputs, plan.input_schemes, strict=True)
        if scheme is not None
    ]
    by_layer: dict[int, list] = {}
    for site, step in plan.steps.items():
        by_layer.setdefault(id(plan.layers[site]), []).append(step)
    skipped = []
    for key, steps in by_layer.items():
        path = plan.paths[key]
        # A shared layer has one line, and a note for each of its calls that differs from the others.
        notes = [*dict.fromkeys(step.note for step in steps), kept.get(path)]
        if len(steps) > 1 and any(step.output for step in steps):
            notes.append(f"ranges of their own for {len(steps)} calls")
        note = ", ".join(filter(None, notes))
        changed = key in inner and any(step.changes for step in steps)
        if changed or note:  # An operator that makes a mask is neither.
            (done if changed else skipped).append(report.Entry(path, note))
    return report.Report(verb, tuple(done), tuple(skipped))
