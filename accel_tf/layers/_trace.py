"""The graph of one custom layer, found by calling it with symbolic tensors."""

import contextlib
import inspect
from typing import Any, NamedTuple

import keras

from accel_tf import _keras
from accel_tf.layers._batch import of_the_batch, unknown_sizes
from accel_tf.layers._parts import (
    Constant,
    LayerGraph,
    MaskedLayerGraph,
    MaskOf,
    OwnWeight,
    WithMask,
)
from accel_tf.layers._walk import calls


class NoGraph(ValueError):
    """A layer has no graph; the message says why."""


class Trace(NamedTuple):
    """What a call of a layer with symbolic tensors gave.

    Attributes:
        inputs: The symbolic tensor that it was called with, or a list of them.
        outputs: What it returned.
        passes_mask: Whether the output gets the mask of the first input, as Keras has it by default.
    """

    inputs: Any
    outputs: Any
    passes_mask: bool


def graph_of_layer(layer: keras.Layer, function) -> keras.Model:
    """Returns a functional model of what a layer computes.

    Args:
        layer: A layer in a graph.
        function: What it computes, such as its `call`.

    Raises:
        NoGraph: The layer has no graph.
    """
    graph = _model(layer, function)
    for call in calls(graph):
        if found := variables_given(call.layer):
            raise NoGraph(f"it uses the weight {found[0].path} of a layer in it")
        if unknown_sizes(call.layer):
            raise NoGraph(
                f"keras.ops.{_function_name(call.layer)} is given a size that is only known when the "
                "model runs, such as ops.shape(x)[0], and a graph cannot tell which one: write -1 for it "
                "in a reshape, or a number"
            )
    # Some operators of Keras tell a wrong symbolic shape.
    shapes = [y.shape for y in graph.outputs]
    expected = [y.shape for y in layer._inbound_nodes[0].outputs]
    if not all(map(_fits, shapes, expected)):
        raise NoGraph(f"its graph has outputs of shape {shapes}, and the layer {expected}")
    # What it computes in training alone, besides what its sublayers do, would be no part of the graph.
    if _kinds(_model(layer, function, training=True)) != _kinds(graph):
        raise NoGraph("it computes something else in training")
    return graph


def _fits(shape, expected) -> bool:
    """Whether a shape is as expected, or known where that is not, except for the batch."""
    if len(shape) != len(expected) or shape[:1] != expected[:1]:
        return False
    return all(m in (None, n) for n, m in zip(shape[1:], expected[1:], strict=True))


def _kinds(graph):
    return [type(call.layer) for call in calls(graph)]


def _model(layer, function, training=None, keeps_masks=False) -> keras.Model:
    inputs, outputs, passes_mask = trace(layer, function, training, keeps_masks)
    if inputs is outputs:
        raise NoGraph("it returns what it is called with")
    given = {id(x) for x in keras.tree.flatten(inputs)}

    def through(y):  # as a model must not return what it is called with
        return keras.layers.Identity(dtype=y.dtype)(y) if id(y) in given else y

    kind = MaskedLayerGraph if passes_mask else LayerGraph
    try:
        graph = kind(inputs, keras.tree.map_structure(through, outputs), name=layer.name)
    except ValueError as error:  # an output that does not depend on any input
        raise _failed(error) from error
    if not keeps_masks and any(isinstance(call.layer, MaskOf) for call in calls(graph)):
        return _model(layer, function, training, keeps_masks=True)
    return of_the_batch(graph)


def trace(layer: keras.Layer, function, training=None, keeps_masks=False) -> Trace:
    """Calls a layer with symbols for the tensors of its first call in a graph.

    Args:
        layer: The layer.
        function: What it computes, such as its `call`.
        training: Given to it; with `None` sublayers compute as is asked for when the graph is run.
        keeps_masks: Whether the layers in it get copies of inputs that have masks. A MultiHeadAttention
            removes the mask of its query, which another layer of the graph may read later.

    Raises:
        NoGraph: It does not take symbols.
    """
    if len({len(node.arguments.keras_tensors) for node in layer._inbound_nodes}) > 1:
        raise NoGraph(
            "it is called with several numbers of tensors, of which each would have a graph"
        )
    arguments = layer._inbound_nodes[0].arguments
    tensors = []

    def fresh(x):
        if not isinstance(x, keras.KerasTensor):
            return x
        tensors.append(keras.Input(batch_shape=x.shape, dtype=x.dtype))
        return tensors[-1]

    args, kwargs = keras.tree.map_structure(fresh, (arguments.args, arguments.kwargs))
    copies = _note_masks(layer, tensors, keeps_masks)
    args, kwargs = keras.tree.map_structure(lambda x: copies.get(id(x), x), (args, kwargs))
    kwargs |= _masks_to_give(layer, args, kwargs)
    if "training" in inspect.signature(function).parameters and kwargs.get("training") is None:
        kwargs["training"] = training
    try:
        with with_symbols(layer, tensors[0]):
            outputs = function(*args, **kwargs)
            symbols = [isinstance(y, keras.KerasTensor) for y in keras.tree.flatten(outputs)]
            if not all(symbols):
                raise NoGraph("it returns something that is no tensor computed of its inputs")
            outputs, passes_mask = _with_masks(layer, args, kwargs, outputs)
    except NoGraph:
        raise
    except Exception as error:  # whatever a function does with a symbolic tensor
        raise _failed(error) from error
    return Trace(tensors[0] if len(tensors) == 1 else tensors, outputs, passes_mask)


def _failed(error) -> NoGraph:
    line = str(error).strip().partition("\n")[0].rstrip(".")
    hint = (
        ". The size of the batch, such as ops.shape(x)[0], is None there: write -1 for it in "
        "ops.reshape, or ops.broadcast_to(y, (ops.shape(x)[0], ...)), or let the operators broadcast"
    )
    hint = hint if "None" in line else ""
    return NoGraph(f"called with symbolic tensors, it raises {type(error).__name__}: {line}{hint}")


def _note_masks(layer, tensors, copied) -> dict:
    """Notes on symbols the masks that the tensors have which they stand for, in any call of the layer.

    Returns:
        What the layer is called with for each symbol that has a mask, by the symbol's id: a copy of the
        symbol if `copied`, unless its mask is an input, too; or the symbol.
    """
    copies = {}
    columns = list(
        zip(*(node.arguments.keras_tensors for node in layer._inbound_nodes), strict=True)
    )
    for x, column in zip(tensors, columns, strict=True):
        masks = [m for m in map(_keras.mask_of, column) if m is not None]
        if not masks:
            continue
        # The mask may be an input of the layer itself.
        given = [t for t, (old, *_) in zip(tensors, columns, strict=True) if old is masks[0]]
        mask = given[0] if given else MaskOf(len(masks[0].shape))(x)
        reads = copies[id(x)] = WithMask(dtype=x.dtype)(x) if copied and not given else x
        _keras.set_mask(reads, mask)
    return copies


def _masks_to_give(layer, args, kwargs) -> dict:
    """Returns the masks that Keras gives to `call` besides the arguments, by the name of the argument."""
    parameters = inspect.signature(layer.call)
    given = parameters.bind(*args, **kwargs).arguments
    tensors = {
        name: x
        for name, x in given.items()
        if (leaves := keras.tree.flatten(x))
        and all(isinstance(leaf, keras.KerasTensor) for leaf in leaves)
    }
    names = ["mask"] if len(tensors) == 1 else [f"{name}_mask" for name in tensors]
    return {
        name: keras.tree.map_structure(_keras.mask_of, x)
        for name, x in zip(names, tensors.values(), strict=True)
        if name in parameters.parameters and given.get(name) is None
    }


def _with_masks(layer, args, kwargs, outputs):
    """Returns the outputs with the masks of `compute_mask`, and whether these are left to the graph."""
    if not layer.supports_masking:
        return outputs, False
    first = args[0] if args else next(iter(kwargs.values()))
    own = keras.tree.map_structure(_keras.mask_of, first)
    mask = kwargs.get("mask")
    by_default = type(layer).compute_mask is keras.Layer.compute_mask
    if by_default and isinstance(first, keras.KerasTensor) and (mask is None or mask is own):
        return outputs, True
    masks = keras.tree.flatten(layer.compute_mask(first, own if mask is None else mask))
    flat = keras.tree.flatten(outputs)
    for i, (y, mask) in enumerate(zip(flat, masks, strict=False)):
        if mask is not None and _keras.mask_of(y) is None:
            flat[i] = WithMask(dtype=y.dtype)(y, mask=mask)
    return keras.tree.pack_sequence_as(outputs, flat), False


def _function_name(operation) -> str:
    name = type(operation).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def variables_given(operation) -> list[keras.Variable]:
    """Returns the weights among the arguments of a call, which the graph does not hold."""
    arguments = operation._inbound_nodes[0].arguments
    leaves = keras.tree.flatten((arguments.args, arguments.kwargs))
    return [x for x in leaves if isinstance(x, keras.Variable)]


class _Reads(keras.StatelessScope):
    """Notes which weights are read or set as numbers, rather than by a layer that a graph consists of."""

    def __init__(self):
        super().__init__()
        self.read = []

    def get_current_value(self, variable):
        self.read.append(variable)
        return super().get_current_value(variable)

    def add_update(self, update):
        self.read.append(update[0])
        super().add_update(update)


class _Sublayer:
    """Stands for a sublayer, and calls it with symbols also where it is called with numbers.

    So is a table of positions: what it returns for them depends on its weights.
    """

    def __init__(self, layer, tensor):
        self._layer, self._tensor = layer, tensor

    def __getattr__(self, name):
        return getattr(self._layer, name)

    def __call__(self, *args, **kwargs):
        given = keras.tree.flatten((args, kwargs))
        if not any(isinstance(x, keras.KerasTensor) for x in given):
            args, kwargs = keras.tree.map_structure(self._symbol, (args, kwargs))
        return self._layer(*args, **kwargs)

    def _symbol(self, x):
        if not keras.ops.is_tensor(x) or isinstance(x, keras.Variable):
            return x
        dtype = keras.backend.standardize_dtype(x.dtype)
        return Constant(keras.ops.convert_to_numpy(x), dtype)(self._tensor)


@contextlib.contextmanager
def with_symbols(layer, tensor):
    """While it is entered, `layer` can be called with symbols: its own weights are such, too.

    As numbers they would be constants of the graph, and lost with the layer.

    Args:
        layer: A custom layer, or a subclassed model.
        tensor: One of the symbols that it is called with.

    Raises:
        ValueError: A weight is a sublayer's, too; or one was read as a number all the same, or changed.
    """
    own = {name: x for name, x in vars(layer).items() if isinstance(x, keras.Variable)}
    below = {id(v) for sub in layer._flatten_layers(include_self=False) for v in sub.weights}
    if shared := [v.path for v in own.values() if id(v) in below]:
        raise ValueError(f"It shares weights with a layer in it: {shared[0]}.")
    trainable = {id(v) for v in layer._trainable_variables}
    symbols = {name: OwnWeight.of(v, layer, id(v) in trainable)(tensor) for name, v in own.items()}
    sublayers = {name: x for name, x in vars(layer).items() if isinstance(x, keras.Layer)}
    symbols |= {name: _Sublayer(x, tensor) for name, x in sublayers.items()}
    vars(layer).update(symbols)  # not by setattr, which takes note of weights that come and go
    try:
        with _Reads() as numbers:
            yield
    finally:
        vars(layer).update({**own, **sublayers})
    if numbers.read:
        raise ValueError(f"It reads or sets weights by themselves: {numbers.read[0].path}.")
