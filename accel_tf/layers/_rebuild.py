"""A copy of a model, in which some layers are replaced."""

import warnings
from collections.abc import Callable

import keras

from accel_tf import _keras
from accel_tf.layers._operator import Operator
from accel_tf.layers._state import copy_state
from accel_tf.layers._walk import calls, has_graph, require_model, walk


def anew(layer: keras.Layer, path: str, /, **changes) -> keras.Layer:
    """Returns a layer made of the configuration of another, not built.

    Args:
        layer: The other.
        path: Its path, for the message.
        **changes: Entries of the configuration that are to be others.

    Raises:
        ValueError: The configuration does not make the layer.
    """
    if type(layer) is keras.layers.Lambda:
        return _lambda(layer, changes)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
            config = layer.get_config()
        # A configuration holds a lambda as bytes only, which Keras refuses to load.
        lambdas = {name: vars(layer).get(name) for name in config}
        lambdas = {k: f for k, f in lambdas.items() if getattr(f, "__name__", "") == "<lambda>"}
        new = type(layer).from_config({**config, **lambdas, **changes})
        if "name" not in changes:
            new.name = layer.name  # A configuration may lack a name that Keras chose.
        return new
    except Exception as error:
        raise ValueError(
            f"Layer {path!r} ({type(layer).__name__}) cannot be copied, as its configuration does not "
            "make it again: its get_config has to return all that its constructor takes. "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def _lambda(layer, changes):
    """Returns another Lambda of the same function, which a configuration holds as bytes only."""
    return keras.layers.Lambda(
        layer.function,
        output_shape=_keras.lambda_output_shape(layer),
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=changes.get("dtype", layer.dtype_policy),
        trainable=layer.trainable,
    )


class _Removed(keras.layers.Layer):
    """Stands in a graph that is being rebuilt for a layer that is to go."""

    def call(self, inputs):
        return inputs


# What a report says of a layer that `rebuild` could not make anew.
NOT_COPIED = "shared with the original model, as its configuration does not make it again"

# What `rebuild` is answered for a layer that is to go.
REMOVED = object()

# One call of a layer in a model and the models nested in it: the `id` of the first tensor that each
# call returns, from the outermost nested model down to the layer.
Site = tuple[int, ...]


def rebuild(
    model: keras.Model,
    replace: Callable[[str, keras.Layer], keras.Layer | None],
    on_input: Callable[[int], keras.Layer | None] | None = None,
    input_shape: Callable[[keras.KerasTensor], tuple] | None = None,
    on_failure: Callable[[str], None] | None = None,
) -> keras.Model:
    """Returns a copy of `model` in which some layers are replaced.

    The copy shares nothing with `model`, except for layers that `on_failure` is told of.

    Nested functional and sequential models are rebuilt too; a layer used several times is replaced
    once and stays shared. Layers that are kept are copied by their configuration and get the state of
    the original, see `copy_state`.

    Args:
        model: A built functional or sequential model.
        replace: Called once per layer with its path and the layer; returns the new layer, `None` to
            keep it, or `REMOVED` to pass its one input on as its output. A new layer may be unbuilt:
            setting its weights is up to the caller.
        on_input: Called with the position of each input of `model`; returns a layer to put behind
            that input, or `None`.
        input_shape: Called with each input of `model` and of the models nested in it; returns its
            shape in the copy, with the batch. By default it keeps the shape that it has.
        on_failure: Called with the path of each layer that cannot be copied, which both models share
            then. By default that is an error.

    Returns:
        A new model of the same class and name, not compiled.

    Raises:
        ValueError: `model` is subclassed, so that it has no graph of layers to rebuild; or the
            configuration of a layer does not make it again.
    """
    copier = _Copier(model, lambda site, path, layer: replace(path, layer))
    copier.input_shape, copier.on_failure = input_shape, on_failure
    return copier.copy(on_input)


def rebuild_calls(
    model: keras.Model,
    replace: Callable[[Site, str, keras.Operation], keras.Layer | None],
    on_input: Callable[[int], keras.Layer | None] | None = None,
) -> keras.Model:
    """Returns a copy of `model` in which each call of a layer has a layer of its own.

    It is `rebuild` for techniques that keep something for each call, such as a range of activations.
    A nested model that is called several times is copied for each call. The copies of what `replace`
    keeps are shared by all calls, as in `model`; what it returns may share weights in the same way.
    The layer of a second call is renamed to `<name>_call_2`, as names are unique in a graph.

    Args:
        model: A built functional or sequential model.
        replace: Called once per call, with the `Site` of the call, the path of the layer or operator,
            and the layer or operator itself; returns a new layer, or `None` to keep it.
        on_input: As for `rebuild`.

    Returns:
        As `rebuild`.

    Raises:
        ValueError: As `rebuild`.
    """
    return _Copier(model, replace, per_call=True).copy(on_input)


class _Copier:
    """One copy of a model under way."""

    def __init__(self, model, replace, per_call=False):
        require_model(model, "rebuild")
        self._model, self._replace = model, replace
        self._per_call = per_call
        self.input_shape = self.on_failure = None
        self._paths = {id(layer): path for path, layer in walk(model)}
        self._kept: list[tuple[keras.Layer, keras.Layer, str]] = []
        self._made: dict[tuple, keras.Layer] = {}
        self._calls: dict[tuple, int] = {}

    def copy(self, on_input) -> keras.Model:
        """Returns the copy, with the layers of `on_input` behind its inputs."""
        new_model = self._copy_model(self._model, self._model.name, ())
        if on_input is not None:
            count = len(new_model.inputs)
            new_model = _enter_by(new_model, [on_input(i) for i in range(count)])
        for old, new, path in self._kept:
            copy_state(old, new, path)
            new.trainable = old.trainable
        return new_model

    def _copy_model(self, part, path, site, name=None):
        if not has_graph(part):
            raise ValueError(
                f"Model {path!r} ({type(part).__name__}) is subclassed: it has no graph of layers "
                "to rebuild. Write it as a functional or sequential model, or apply the technique "
                "to the functional models inside it."
            )
        sequence = iter(calls(part))  # in the order in which Keras runs through the graph

        def clone(layer):
            call = next(call for call in sequence if call.layer is layer)
            return self._copy_layer(layer, (*site, id(call.outputs[0])))

        # A compiled model's clone would be compiled too, with what its loss and metrics were then.
        compiled, part.compiled = part.compiled, False
        try:
            new = _clone_model(part, clone, _starts(part, self.input_shape))
        finally:
            part.compiled = compiled
        if name is not None:
            new.name = name
        if not part.trainable:
            new.trainable = False
        return new

    def _copy_layer(self, layer, site):
        key = site if self._per_call else (id(layer),)
        if key not in self._made:
            self._made[key] = self._new_layer(layer, site)
        return self._made[key]

    def _new_layer(self, layer, site):
        path = self._paths.get(id(layer), layer.name)
        parent = (*site[:-1], id(layer))
        count = self._calls[parent] = self._calls.get(parent, 0) + 1
        name = f"{layer.name}_call_{count}" if count > 1 else None
        if has_graph(layer):
            return self._copy_model(layer, path, site, name)
        if not isinstance(layer, keras.Layer) and not self._per_call:
            return layer
        new = self._replace(site, path, layer)
        if new is REMOVED:
            return _Removed(name=layer.name)
        if new is None:
            return self._keep(layer, path)
        if name is not None:
            new.name = name
        return new

    def _keep(self, layer, path):
        if not isinstance(layer, keras.Layer):
            return layer
        key = ("kept", id(layer))
        if key not in self._made:
            self._made[key] = new = self._anew(layer, path)
            if hasattr(layer, "save_assets"):
                copy_state(
                    layer, new, path
                )  # A table decides on the shape of what comes out of it.
            else:
                self._kept.append((layer, new, path))
        return self._made[key]

    def _anew(self, layer, path):
        try:
            return anew(layer, path)
        except ValueError:
            if self.on_failure is None:
                raise
            self.on_failure(path)
            return layer


def _clone_model(model, clone, starts):
    """Keras's `clone_model`, without the layers that `clone` replaces by `_Removed`."""
    if isinstance(model, keras.Sequential):
        new = keras.models.clone_model(model, input_tensors=starts, clone_function=clone)
        rest = [layer for layer in new.layers if not isinstance(layer, _Removed)]
        return new if len(rest) == len(new.layers) else _sequential(new, rest)

    def call(layer, *args, **kwargs):
        layer = clone(layer)
        if isinstance(layer, _Removed):
            return args[0]
        if isinstance(getattr(layer, "layer", layer), Operator):  # It holds the other arguments.
            given = keras.tree.flatten((args, kwargs))
            tensors = [x for x in given if isinstance(x, keras.KerasTensor)]
            return layer(tensors[0] if len(tensors) == 1 else tensors)
        return layer(*args, **kwargs)

    # Keras asks for the clone of a layer once, but calls it for each node of the graph.
    return keras.models.clone_model(
        model, input_tensors=starts, clone_function=lambda layer: layer, call_function=call
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
