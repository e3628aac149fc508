"""Graphs for what has none: subclassed models and custom layers, of the layers that they are made of."""

import contextlib
import inspect
from collections.abc import Callable

import keras

from accel_tf.layers._check import require_same
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
        with _weights_as_layers(model, keras.tree.flatten(tensors)[0]):
            outputs = model.call(tensors)
        graph = keras.Model(tensors, outputs, name=model.name)
        if lost := [v.path for call in calls(graph) for v in _variables_given(call.layer)]:
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
            path = None if isinstance(layer, OwnWeight) else paths.get(id(layer))
            function = path and graph_of(path, layer)
            graph = function and _traced(layer, function)
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


def passes_on(layer: keras.Layer) -> bool:
    """Whether a custom layer returns its one input as it is in inference, whatever it does in training."""
    traced = _trace(layer, layer.call)
    return traced is not None and traced[0] is traced[1]


def _traced(layer, function) -> keras.Model | None:
    """Returns a functional model of what a layer computes, or `None` if it has no graph."""
    graph = _model(layer, function)
    if graph is None or any(_lacks_something(call.layer) for call in calls(graph)):
        return None
    # Some operators of Keras tell a wrong symbolic shape.
    if [y.shape for y in graph.outputs] != [y.shape for y in layer._inbound_nodes[0].outputs]:
        return None
    # What it computes in training alone, besides what its sublayers do, would be no part of the graph.
    trained = _model(layer, function, training=True)
    return graph if trained is not None and _kinds(trained) == _kinds(graph) else None


def _kinds(graph):
    return [type(call.layer) for call in calls(graph)]


def _model(layer, function, training=None) -> keras.Model | None:
    traced = _trace(layer, function, training)
    if traced is None or traced[0] is traced[1]:
        return None
    inputs, outputs = traced
    given = {id(x) for x in keras.tree.flatten(inputs)}

    def through(y):  # as a model must not return what it is called with
        return keras.layers.Identity(dtype=y.dtype)(y) if id(y) in given else y

    try:
        return LayerGraph(inputs, keras.tree.map_structure(through, outputs), name=layer.name)
    except ValueError:  # an output that does not depend on any input
        return None


def _trace(layer, function, training=None):
    """Returns the symbolic inputs and outputs of a layer, or `None` if it does not take symbols.

    With `training=None` sublayers compute as is asked for when the graph is run.
    """
    if len({len(node.arguments.keras_tensors) for node in layer._inbound_nodes}) > 1:
        return None  # called in different ways, of which each would be a graph of its own
    arguments = layer._inbound_nodes[0].arguments
    tensors = []

    def fresh(x):
        if not isinstance(x, keras.KerasTensor):
            return x
        tensors.append(keras.Input(batch_shape=x.shape, dtype=x.dtype))
        return tensors[-1]

    args, kwargs = keras.tree.map_structure(fresh, (arguments.args, arguments.kwargs))
    if "training" in inspect.signature(function).parameters and kwargs.get("training") is None:
        kwargs["training"] = training
    try:
        with _weights_as_layers(layer, tensors[0]):
            outputs = function(*args, **kwargs)
    except Exception:  # whatever a function does with a symbolic tensor
        return None
    if not all(isinstance(y, keras.KerasTensor) for y in keras.tree.flatten(outputs)):
        return None
    return tensors[0] if len(tensors) == 1 else tensors, outputs


def _lacks_something(operation) -> bool:
    """Whether a call in a graph was given what does not stay with the graph.

    That is a sublayer's weight, or a size that is only known at run time, as `None`.
    """
    if _variables_given(operation):
        return True
    if isinstance(operation, keras.Layer) or type(operation).__name__ == "GetItem":
        return False  # whose None is a new axis
    arguments = operation._inbound_nodes[0].arguments
    given = (*vars(operation).values(), *arguments.args, *arguments.kwargs.values())
    return any(isinstance(x, tuple | list) and any(y is None for y in x) for x in given)


def _variables_given(operation) -> list[keras.Variable]:
    """Returns the weights among the arguments of a call, which the graph does not hold."""
    arguments = operation._inbound_nodes[0].arguments
    leaves = keras.tree.flatten((arguments.args, arguments.kwargs))
    return [x for x in leaves if isinstance(x, keras.Variable)]


@keras.saving.register_keras_serializable(package="accel_tf")
class LayerGraph(Functional):
    """The graph that stands for a custom layer, and takes masks as that does.

    Keras warns that a nested model loses a mask. This one has it as an input, or hands it to its layers.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.supports_masking = True

    def compute_mask(self, inputs, previous_mask=None):
        return None


class _Reads(keras.StatelessScope):
    """Notes which weights are read as numbers, rather than by a layer that a graph consists of."""

    def __init__(self):
        super().__init__()
        self.read = []

    def get_current_value(self, variable):
        self.read.append(variable)
        return super().get_current_value(variable)


@contextlib.contextmanager
def _weights_as_layers(layer, tensor):
    """While it is entered, `layer` can be called with symbols: its own weights are such, too.

    As numbers they would be constants of the graph, and lost with the layer.

    Raises:
        ValueError: A weight is a sublayer's, too; or one was read as a number all the same, or changed.
    """
    own = {name: x for name, x in vars(layer).items() if isinstance(x, keras.Variable)}
    below = {id(v) for sub in layer._flatten_layers(include_self=False) for v in sub.weights}
    if shared := [v.path for v in own.values() if id(v) in below]:
        raise ValueError(f"It shares weights with a layer in it: {shared[0]}.")
    trainable = {id(v) for v in layer._trainable_variables}
    symbols = {name: OwnWeight.of(v, layer, id(v) in trainable)(tensor) for name, v in own.items()}
    vars(layer).update(symbols)  # not by setattr, which takes note of weights that come and go
    try:
        with _Reads() as numbers:
            yield
    finally:
        vars(layer).update(own)
    if changed := [*numbers.read, *(variable for variable, _ in numbers.state_mapping.values())]:
        raise ValueError(f"It reads or sets weights by themselves: {changed[0].path}.")


@keras.saving.register_keras_serializable(package="accel_tf")
class OwnWeight(keras.layers.Layer):
    """A weight that a custom layer has besides those of its sublayers, as a layer of its graph.

    It returns the weight, whatever it is called with.

    Args:
        shape: That of the weight.
        weight_dtype: That of the weight.
        weight_name: Its name.
        learned: Whether it is trained with the layer.
        regularizer: As for any weight of a Keras layer.
        constraint: Likewise.
        **kwargs: As for any Keras layer.
    """

    def __init__(
        self,
        shape,
        weight_dtype,
        weight_name,
        learned=True,
        regularizer=None,
        constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.shape, self.weight_dtype, self.weight_name = tuple(shape), weight_dtype, weight_name
        self.learned = learned
        self.regularizer = keras.regularizers.get(regularizer)
        self.constraint = keras.constraints.get(constraint)

    @classmethod
    def of(cls, variable, owner: keras.Layer, learned: bool) -> "OwnWeight":
        """Returns the layer that holds `variable`, a weight of the layer `owner`."""
        constraint = variable.constraint
        while hasattr(constraint, "inner"):  # What techniques put there is no part of the layer.
            constraint = constraint.inner
        layer = cls(
            *(variable.shape, variable.dtype, variable.name, learned),
            *(variable.regularizer, constraint),
            dtype=owner.dtype_policy,
            name=variable.name,
        )
        layer.weight, layer.built = variable, True
        layer.trainable = owner.trainable
        return layer

    def build(self, input_shape=None):
        self.weight = self.add_weight(
            shape=self.shape,
            initializer="zeros",
            dtype=self.weight_dtype,
            name=self.weight_name,
            trainable=self.learned,
            regularizer=self.regularizer,
            constraint=self.constraint,
        )

    def call(self, inputs):
        return keras.ops.copy(self.weight)  # a tensor, as of any layer

    def compute_output_spec(self, inputs):
        is_float = keras.backend.is_float_dtype(self.weight_dtype)
        return keras.KerasTensor(self.shape, self.compute_dtype if is_float else self.weight_dtype)

    def get_config(self):
        config = {
            "shape": self.shape,
            "weight_dtype": self.weight_dtype,
            "weight_name": self.weight_name,
            "learned": self.learned,
            "regularizer": keras.regularizers.serialize(self.regularizer),
            "constraint": keras.constraints.serialize(self.constraint),
        }
        return {**super().get_config(), **config}
