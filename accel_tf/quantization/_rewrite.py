"""The model rewrite: the new model, made as a `Plan` says."""

from collections.abc import Sequence

import keras

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf.quantization import _preserve
from accel_tf.quantization._checks import require_finite
from accel_tf.quantization._fake import FakeQuantize
from accel_tf.quantization._plan import Plan, schemes_by_path
from accel_tf.quantization._rules import graph_of, rule_of
from accel_tf.quantization._schemes import Int8, Mixed, Scheme


def quantize_aware(
    model: keras.Model, scheme: Scheme | Mixed | None = None, *, exclude: Sequence[str] = ()
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
        scheme: The number format, `Int8()` if not given; `Mixed` for several.
        exclude: Paths of layers and operators to leave in float, as `accel_tf.report_of` shows
            them; `*` and `?` are wildcards, and a nested model's path excludes all of it. How a
            runtime computes them is up to its converter; see `accel_tf.export.litert`.

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
    if not isinstance(scheme, Scheme | Mixed):
        raise ValueError(f"{verb} expects a scheme such as Int8(), received {scheme!r}.")
    if quantized := [path for path, layer in graphs.walk(model) if isinstance(layer, FakeQuantize)]:
        raise ValueError(
            f"Model {model.name!r} is quantized already ({report.shorten(quantized, 2)}). "
            f"Give {verb} the float model that it was made from."
        )
    layers = graphs.walk(model)
    paths = [path for path, v in layers if not isinstance(v, keras.layers.InputLayer)]
    scheme_at = schemes_by_path(scheme, exclude, [*paths, *_operators(model)])

    def graph(path, layer):
        return None if rule_of(layer) or scheme_at(path) is None else graph_of(layer)

    model = graphs.expand(model, graph)
    plan = Plan(model, scheme_at)
    made = []

    def replaced(layer):
        step = plan.steps.get(id(layer))
        if step is None or step.wrapper is None:
            return None
        if isinstance(layer, keras.Layer):
            require_finite(layer, plan.paths[id(layer)])
        new = step.wrap(layer, plan.paths[id(layer)])
        made.append((layer, new))
        return new

    def on_input(i):
        scheme = plan.input_schemes[i]
        if scheme is None:
            return None
        # Observed once, however many layers read it: the file has one grid for each input.
        return FakeQuantize(
            scheme.activation_bits,
            scheme.observer,
            symmetric=scheme.symmetric,
            name=f"{model.inputs[i].name}_quantizer",
        )

    new_model = graphs.rebuild(
        model, lambda path, layer: replaced(layer), on_input, on_operator=replaced
    )
    for old, new in made:
        if isinstance(old, keras.Layer):
            if old.weights:
                new.layer.set_weights(old.get_weights())
            new.trainable = old.trainable
    report.attach(new_model, _report(verb, model, plan, made, _preserve.keep(new_model)))
    return new_model


def _operators(model, prefix=""):
    """Yields the paths of the operators between the layers of a model and of the models in it."""
    if not isinstance(model, keras.Sequential | graphs.Functional):
        return  # which has no graph of operators
    for call in graphs.calls(model):
        if not isinstance(call.layer, keras.Layer):
            yield prefix + call.layer.name
        else:
            yield from _operators(call.layer, f"{prefix}{call.layer.name}/")


def _report(verb, model, plan, made, kept):
    done = [
        report.Entry(tensor.name, "input of the model, observed")
        for tensor, scheme in zip(model.inputs, plan.input_schemes, strict=True)
        if scheme is not None
    ]
    changed, skipped = {id(old) for old, _ in made}, []
    for key, step in plan.steps.items():
        path = plan.paths[key]
        notes = filter(None, [step.note, kept.get(path)])
        entries = done if key in changed and step.changes else skipped
        entries.append(report.Entry(path, ", ".join(notes)))
    return report.Report(verb, tuple(done), tuple(skipped))
