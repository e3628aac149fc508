"""Graphs for what has none: subclassed models and custom layers, of the layers that they are made of."""

from collections.abc import Callable

import keras

from accel_tf.layers._check import require_same
from accel_tf.layers._parts import PARTS
from accel_tf.layers._trace import NoGraph, graph_of_layer, trace, variables_given, with_symbols
from accel_tf.layers._walk import Functional, calls, walk


def functional(model: keras.Model, inputs, *, verify: bool = True) -> keras.Model:
    """Returns a functional model of what a subclassed one computes, which shares its weights.

    Args:
        model: A model whose `call` is made of layers, weights and `keras.ops`.
        inputs: An example of what it is called with, an array (n, …) or a structure of arrays. Only
            their types, and their shapes but for n, matter.
        verify: Whether to compare the graph with `model` on `inputs`.

    Raises:
        ValueError: `call` uses something else, which has no graph; or the graph does not compute what
            `model` does, as `call` depends on something that is no tensor.

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

    def symbolic(x, name=None):
        x = keras.ops.convert_to_tensor(x)
        return keras.Input(x.shape[1:], dtype=keras.backend.standardize_dtype(x.dtype), name=name)

    if isinstance(inputs, dict) and not any(map(keras.tree.is_nested, inputs.values())):
        tensors = {name: symbolic(x, name) for name, x in inputs.items()}  # as Keras wants it
    else:
        tensors = keras.tree.map_structure(symbolic, inputs)
    try:
        with with_symbols(model, keras.tree.flatten(tensors)[0]):
            outputs = model.call(tensors)
        graph = keras.Model(tensors, outputs, name=model.name)
        if lost := [v.path for call in calls(graph) for v in variables_given(call.layer)]:
            raise ValueError(f"It uses {lost[0]} as it is, which is no attribute of the model.")
    except Exception as error:
        raise ValueError(
            f"Model {model.name!r} ({type(model).__name__}) has no graph: its call uses more than "
            f"layers, weights and keras.ops, which works on numbers only. {type(error).__name__}: {error}"
        ) from error
    if verify:
        require_same("functional", model, graph, inputs)
    return graph


def expand(
    model: keras.Model, graph_of: Callable[[str, keras.Layer], Callable | None]
) -> keras.Model:
    """Returns `model` with some custom layers replaced by nested models of the layers in them.

    The graph of such a layer is found by calling a function on symbolic tensors, so that has to be
    made of layers, weights and `keras.ops`. Nothing is copied: layers and weights are those of
    `model`; a custom layer's own weight becomes an `OwnWeight`. What cannot be expanded, because it
    uses something else, stays as it is.

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
            path = None if isinstance(layer, PARTS) else paths.get(id(layer))
            function = path and graph_of(path, layer)
            graph = function and _graph_or_none(layer, function)
        if not graph:
            return layer
        return expand(graph, lambda path, below: graph_of(paths.get(id(below), path), below))

    def call(layer, *args, **kwargs):
        if id(layer) in traced:  # It has its other arguments.
            given = keras.tree.flatten((args, kwargs))
            tensors = [x for x in given if isinstance(x, keras.KerasTensor)]
            return layer(tensors[0] if len(tensors) == 1 else tensors)
        return layer(*args, **kwargs)

    layers = [c.layer for c in calls(model)]
    changed = [layer for layer in layers if clone(layer) is not layer]
    if not changed:
        return model
    traced = {id(clone(layer)) for layer in changed if not isinstance(layer, keras.Model)}
    if isinstance(model, keras.Sequential):
        return keras.models.clone_model(model, clone_function=clone)
    return keras.models.clone_model(model, clone_function=clone, call_function=call)


def _graph_or_none(layer, function):
    try:
        return graph_of_layer(layer, function)
    except NoGraph:
        return None


def why_kept(layer: keras.Layer, function: Callable) -> str:
    """Returns why `expand` keeps a layer, in a sentence without its full stop; `""` if it does not.

    Args:
        layer: A layer in a graph.
        function: What the layer computes, as `graph_of` returns it to `expand`.
    """
    try:
        graph_of_layer(layer, function)
    except NoGraph as error:
        return str(error)
    return ""


def passes_on(layer: keras.Layer) -> bool:
    """Whether a custom layer returns its one input as it is in inference, whatever it does in training."""
    try:
        traced = trace(layer, layer.call)
    except NoGraph:
        return False
    return traced.inputs is traced.outputs
