"""Walk the layers of any Keras model, and rebuild a model with some of its layers replaced.

Every technique needs these two, and they have to treat nested, shared and wrapped layers alike.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
from keras.src.models.functional import Functional  # Keras exports no public name for it.


def walk(model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yields each layer below `model` once, depth first, with its path.

    Nested models and the sublayers of wrappers and custom layers are descended into; a layer that
    is shared is yielded once, under the path at which it is met first.

    Args:
        model: A functional, sequential or subclassed model, or a layer.

    Yields:
        `(path, layer)`: the names from the model down, joined by `/`, and the layer.
    """
    seen = {id(model)}

    def below(parent, prefix):
        for layer in parent._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = prefix + layer.name
            yield path, layer
            yield from below(layer, path + "/")

    yield from below(model, "")


class Call(NamedTuple):
    """One call of a layer in a model's graph: the layer, the tensors it got and those it returned."""

    layer: keras.Operation
    inputs: tuple[keras.KerasTensor, ...]
    outputs: tuple[keras.KerasTensor, ...]


def calls(model: keras.Model) -> list[Call]:
    """Returns the calls in the graph of `model`, in an order in which they can be executed.

    A nested model is one call; its own graph is had by `calls` again. A shared layer occurs as
    often as it is called. Operators such as `x + y` between tensors occur too.

    Args:
        model: A built functional or sequential model.

    Raises:
        ValueError: `model` has no graph of layers, because it is subclassed.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not isinstance(graph, Functional):
        raise ValueError(
            f"Model {model.name!r} ({type(model).__name__}) is subclassed: it has no graph of "
            "layers to follow. Make it one that has, with accel_tf.layers.functional(model, x), or "
            "apply the technique to the functional models inside it."
        )
    return [
        Call(node.operation, tuple(node.input_tensors), tuple(node.outputs))
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


def require_model(model, verb: str) -> None:
    """Raises a `ValueError` unless `model` is a built Keras 3 model.

    Args:
        model: What the user passed.
        verb: The verb that needs it, for the message.
    """
    if not isinstance(model, keras.Model):
        legacy = type(model).__module__.startswith(("tf_keras", "tensorflow.python.keras"))
        hint = (
            " It is a legacy tf_keras model; convert it with accel_tf.interop.tfmot.from_tf_keras."
            if legacy
            else ""
        )
        raise ValueError(f"{verb} expects a keras.Model, received {type(model).__name__}.{hint}")
    if not model.built:
        raise ValueError(
            f"{verb} needs the weights of model {model.name!r}, which is not built yet. "
            "Call it on a batch, or call model.build(input_shape), first."
        )


@keras.saving.register_keras_serializable(package="accel_tf")
class Operator(keras.layers.Layer):
    """An operator between layers, such as `x + 1`, as a layer of its tensors.

    Args:
        operation: The operator, of a node in a functional model's graph.
        args, kwargs: What it was called with, where `Operator.slot(i)` stands for tensor i.
        **options: As for any Keras layer.
    """

    def __init__(self, operation, args=(), kwargs=None, **options):
        options.setdefault("name", operation.name)
        super().__init__(**options)
        self.operation, self.args, self.kwargs = operation, args, kwargs or {}

    @classmethod
    def of(cls, operation: keras.Operation) -> "Operator":
        """Returns the layer for an operator that is called once in a graph."""
        arguments, count = operation._inbound_nodes[0].arguments, iter(range(99))

        def stand_in(x):
            return cls.slot(next(count)) if isinstance(x, keras.KerasTensor) else x

        args, kwargs = keras.tree.map_structure(stand_in, (arguments.args, arguments.kwargs))
        return cls(operation, args, kwargs)

    @staticmethod
    def slot(i: int) -> str:
        """Returns what stands for tensor `i` in the arguments."""
        return f"<tensor {i}>"

    def run(self, inputs, on_constant=lambda x: x):
        """Returns the operator's result, with `on_constant` applied to each constant argument."""
        args, kwargs = self._filled(dict(enumerate(keras.tree.flatten(inputs))), on_constant)
        return self.operation(*args, **kwargs)

    def _filled(self, tensors, on_constant=lambda x: x):
        slots = {self.slot(i): x for i, x in tensors.items()}

        def fill(x):
            return slots[x] if isinstance(x, str) and x in slots else on_constant(x)

        return keras.tree.map_structure(fill, (self.args, self.kwargs))

    def call(self, inputs):
        return self.run(inputs)

    def compute_output_spec(self, inputs):
        args, kwargs = self._filled(dict(enumerate(keras.tree.flatten(inputs))))
        return self.operation.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        one = isinstance(input_shape, tuple) and not isinstance(input_shape[0], tuple | list)
        shapes = [input_shape] if one else input_shape
        tensors = [keras.KerasTensor(shape, self.compute_dtype) for shape in shapes]
        return self.compute_output_spec(tensors).shape

    def get_config(self):
        save = keras.saving.serialize_keras_object
        own = {
            "operation": save(self.operation),
            "args": save(self.args),
            "kwargs": save(self.kwargs),
        }
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        load = keras.saving.deserialize_keras_object
        own = {key: load(config[key]) for key in ("operation", "args", "kwargs")}
        return cls(**{**config, **own})


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
            layers to rebuild.
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
            new = type(layer).from_config(layer.get_config())
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


def functional(model: keras.Model, inputs) -> keras.Model:
    """Returns a functional model of what a subclassed one computes, which shares its layers.

    Args:
        model: A model whose `call` is made of layers and `keras.ops`.
        inputs: An example of what it is called with, an array (n, …) or a structure of arrays. Only
            their types, and their shapes but for n, matter.

    Raises:
        ValueError: `call` uses something else, which has no graph.

    Example:

    >>> import numpy as np
    >>> class Own(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.dense = keras.layers.Dense(2)
    ...     def call(self, x):
    ...         return self.dense(x) + 1.0
    >>> [type(c.layer).__name__ for c in calls(functional(Own(), np.zeros((1, 3), "float32")))]
    ['InputLayer', 'Dense', 'Add']
    """

    def symbolic(x):
        x = keras.ops.convert_to_tensor(x)
        return keras.Input(x.shape[1:], dtype=x.dtype)

    tensors = keras.tree.map_structure(symbolic, inputs)
    try:
        return keras.Model(tensors, model.call(tensors), name=model.name)
    except Exception as error:
        raise ValueError(
            f"Model {model.name!r} ({type(model).__name__}) has no graph: its call uses more than "
            f"layers and keras.ops, which works on numbers only. {type(error).__name__}: {error}"
        ) from error


def expand(
    model: keras.Model, graph_of: Callable[[str, keras.Layer], Callable | None]
) -> keras.Model:
    """Returns `model` with some custom layers replaced by nested models of the layers in them.

    The graph of such a layer is found by calling a function on symbolic tensors, so that has to be
    made of layers and `keras.ops`. Nothing is copied: the layers are those of `model`. What cannot
    be expanded, because it uses something else or weights of its own, stays as it is.

    Args:
        model: A built functional or sequential model.
        graph_of: Called with the path of each layer that is no model, and the layer; returns the
            function that the layer computes, such as its `call`, or `None` to keep the layer.

    Returns:
        A new model of the same class, name and weights; `model` itself if there is nothing to do.
    """
    paths = {id(layer): path for path, layer in walk(model)}
    made: dict[int, keras.Layer] = {}

    def clone(layer):
        if id(layer) not in made:
            made[id(layer)] = expanded(layer)
        return made[id(layer)]

    def expanded(layer):
        graph = layer
        if not isinstance(layer, (keras.Sequential, Functional)):
            path = paths.get(id(layer))
            function = path and graph_of(path, layer)
            graph = function and _traced(layer, function)
        if not graph:
            return layer
        return expand(graph, lambda path, below: graph_of(paths.get(id(below), path), below))

    def call(layer, *args, **kwargs):
        if id(layer) in graphs:  # It has its other arguments.
            given = keras.tree.flatten((args, kwargs))
            tensors = [x for x in given if isinstance(x, keras.KerasTensor)]
            return layer(tensors[0] if len(tensors) == 1 else tensors)
        return layer(*args, **kwargs)

    layers = [c.layer for c in calls(model)]
    graphs = {id(clone(layer)) for layer in layers if clone(layer) is not layer}
    if not graphs:
        return model
    if isinstance(model, keras.Sequential):
        return keras.models.clone_model(model, clone_function=clone)
    return keras.models.clone_model(model, clone_function=clone, call_function=call)


def _traced(layer, function) -> keras.Model | None:
    """Returns a functional model of what a layer computes, or `None` if it has no graph."""
    arguments = layer._inbound_nodes[0].arguments
    inputs = {}

    def fresh(x):
        if not isinstance(x, keras.KerasTensor):
            return x
        inputs.setdefault(id(x), keras.Input(batch_shape=x.shape, dtype=x.dtype))
        return inputs[id(x)]

    args, kwargs = keras.tree.map_structure(fresh, (arguments.args, arguments.kwargs))
    tensors = list(inputs.values())
    try:
        outputs = function(*args, **kwargs)
        graph = keras.Model(tensors[0] if len(tensors) == 1 else tensors, outputs, name=layer.name)
    except Exception:  # whatever a function does with a symbolic tensor
        return None
    nodes = [node for each in graph._nodes_by_depth.values() for node in each]
    leaves = [
        x for node in nodes for x in keras.tree.flatten(tuple(node.arguments._flat_arguments))
    ]
    # A weight among the arguments is no layer's, so it would be lost with the layer.
    return None if any(isinstance(x, keras.Variable) for x in leaves) else graph
