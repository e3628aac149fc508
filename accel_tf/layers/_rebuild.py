"""A copy of a model, in which some layers are replaced."""

import warnings
from collections.abc import Callable

import keras

from accel_tf.layers._operator import Operator
from accel_tf.layers._walk import Functional, require_model, walk


def anew(layer: keras.Layer, path: str, /, **changes) -> keras.Layer:
    """Returns a layer made of the configuration of another, not built.

    Args:
        layer: The other.
        path: Its path, for the message.
        **changes: Entries of the configuration that are to be others.

    Raises:
        ValueError: The configuration does not make the layer.
    """
    try:
        with warnings.catch_warnings():
            if changes:  # Most likely it is the lambda that goes.
                warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
            config = layer.get_config()
        return type(layer).from_config({**config, **changes})
    except Exception as error:
        raise ValueError(
            f"Layer {path!r} ({type(layer).__name__}) cannot be copied, as its configuration does not "
            "make it again: its get_config has to return all that its constructor takes. "
            f"{type(error).__name__}: {str(error).strip()}"
        ) from error


class _Removed(keras.layers.Layer):
    """Stands in a graph that is being rebuilt for a layer that is to go."""

    def call(self, inputs):
        return inputs


# What `rebuild` is answered for a layer that is to go.
REMOVED = object()


def rebuild(
    model: keras.Model,
    replace: Callable[[str, keras.Layer], keras.Layer | None],
    on_input: Callable[[int], keras.Layer | None] | None = None,
    input_shape: Callable[[keras.KerasTensor], tuple] | None = None,
    on_operator: Callable[[keras.Operation], keras.Layer | None] | None = None,
) -> keras.Model:
    """Returns a copy of `model`, sharing nothing with it, in which some layers are replaced.

    Nested functional and sequential models are rebuilt too; a layer used several times is replaced
    once and stays shared. Layers that are kept are made anew from their configuration and get the
    weights of the original.

    Args:
        model: A built functional or sequential model.
        replace: Called once per layer with its path and the layer; returns the new layer, `None` to
            keep it, or `REMOVED` to pass its one input on as its output. A new layer may be unbuilt:
            setting its weights is up to the caller.
        on_input: Called with the position of each input of `model`; returns a layer to put behind
            that input, or `None`.
        input_shape: Called with each input of `model` and of the models nested in it; returns its
            shape in the copy, with the batch. By default it keeps the shape that it has.
        on_operator: Called once per operator between layers; returns a layer made by `Operator.of`,
            or one around it, or `None` to keep the operator.

    Returns:
        A new model of the same class and name, not compiled.

    Raises:
        ValueError: `model`, or a model nested in it, is subclassed, so that it has no graph of
            layers to rebuild; or the configuration of a layer does not make it again.
    """
    require_model(model, "rebuild")
    paths = {id(layer): path for path, layer in walk(model)}
    kept: list[tuple[keras.Layer, keras.Layer]] = []
    made: dict[int, keras.Layer] = {}

    def clone(layer):
        if id(layer) not in made:
            made[id(layer)] = _clone(layer)
        return made[id(layer)]

    def _clone(layer):
        path = paths.get(id(layer), layer.name)
        if isinstance(layer, keras.Model):
            return copy(layer, path)
        if not isinstance(layer, keras.Layer):
            return (on_operator and on_operator(layer)) or layer
        new = replace(path, layer)
        if new is REMOVED:
            return _Removed(name=layer.name)
        if new is None:
            new = anew(layer, path)
            kept.append((layer, new))
        return new

    def copy(part, path):
        if not isinstance(part, (keras.Sequential, Functional)):
            raise ValueError(
                f"Model {path!r} ({type(part).__name__}) is subclassed: it has no graph of layers "
                "to rebuild. Write it as a functional or sequential model, or apply the technique "
                "to the functional models inside it."
            )
        # A compiled model's clone would be compiled too, with what its loss and metrics were then.
        compiled, part.compiled = part.compiled, False
        try:
            new = _clone_model(part, clone, _starts(part, input_shape))
        finally:
            part.compiled = compiled
        if not part.trainable:
            new.trainable = False
        return new

    new_model = copy(model, model.name)
    if on_input is not None:
        new_model = _enter_by(new_model, [on_input(i) for i in range(len(new_model.inputs))])
    for old, new in kept:
        if old.weights:
            new.set_weights(old.get_weights())
        new.trainable = old.trainable
    return new_model


def _clone_model(model, clone, starts):
    """Keras's `clone_model`, without the layers that `clone` replaces by `_Removed`."""
    if isinstance(model, keras.Sequential):
        new = keras.models.clone_model(model, input_tensors=starts, clone_function=clone)
        rest = [layer for layer in new.layers if not isinstance(layer, _Removed)]
        return new if len(rest) == len(new.layers) else _sequential(new, rest)

    def call(layer, *args, **kwargs):
        if isinstance(layer, _Removed):
            return args[0]
        if isinstance(getattr(layer, "layer", layer), Operator):  # It holds the other arguments.
            given = keras.tree.flatten((args, kwargs))
            tensors = [x for x in given if isinstance(x, keras.KerasTensor)]
            return layer(tensors[0] if len(tensors) == 1 else tensors)
        return layer(*args, **kwargs)

    return keras.models.clone_model(
        model, input_tensors=starts, clone_function=clone, call_function=call
    )


def _sequential(model, layers):
    """A sequential model of `layers`, of the name and input of `model`."""
    (tensor,) = model.inputs
    start = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
    return keras.Sequential([start, *layers], name=model.name)


def _starts(model, input_shape):
    """Inputs for a copy of `model` of the shapes that `input_shape` gives, or `None`: they stay."""
    if input_shape is None or all(input_shape(t) == tuple(t.shape) for t in model.inputs):
        return None
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(
        lambda t: keras.Input(batch_shape=input_shape(t), dtype=t.dtype, name=t.name), structure
    )


def _enter_by(model, entries):
    """Returns `model`, its layers moved to a new one whose inputs pass the layers `entries` first."""
    if not any(entries):
        return model
    if isinstance(model, keras.Sequential):
        return _sequential(model, [*entries, *model.layers])
    entered = {}

    def enter(tensor):
        if not isinstance(tensor, keras.KerasTensor) or id(tensor) not in entered:
            return tensor
        return entered[id(tensor)]

    def call(layer, *args, **kwargs):
        args, kwargs = keras.tree.map_structure(enter, (args, kwargs))
        return layer(*args, **kwargs)

    starts = keras.tree.map_structure(
        lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name), model.input
    )
    for start, entry in zip(keras.tree.flatten(starts), entries, strict=True):
        if entry is not None:
            entered[id(start)] = entry(start)
    return keras.models.clone_model(
        model, input_tensors=starts, clone_function=lambda layer: layer, call_function=call
    )
