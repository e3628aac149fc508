"""Sizes that a custom layer takes of its input, such as `ops.shape(x)[0]`, in its graph.

While a layer is called with symbols, the size of the batch is `None`, and operators record that.
"""

import math

import keras

from accel_tf.layers._parts import Repeated
from accel_tf.layers._walk import calls

# The arguments of operators that may hold the size of the batch here.
_SIZES = {"Reshape": "newshape", "BroadcastTo": "shape"}


def unknown_sizes(operation) -> bool:
    """Whether an operator of a graph was given sizes of which one is `None`."""
    if isinstance(operation, keras.Layer) or type(operation).__name__ == "GetItem":
        return False  # whose None is a new axis
    arguments = operation._inbound_nodes[0].arguments
    given = (*vars(operation).values(), *arguments.args, *arguments.kwargs.values())
    return any(isinstance(x, tuple | list) and any(y is None for y in x) for x in given)


def of_the_batch(graph: keras.Model) -> keras.Model:
    """Returns the graph of a layer, with operators that find the size of the batch when they run.

    What is no reshape or broadcast stays as it is, as does what could mean another size.

    Args:
        graph: A functional model, of which nothing else is changed.
    """
    found = [c.layer for c in calls(graph) if unknown_sizes(c.layer)]
    known = all(None not in x.shape[1:] for x in graph.inputs)
    forms = {id(op): form for op in found if (form := _form(op, known)) is not None}
    if not forms:
        return graph
    starts = keras.tree.map_structure(
        lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name), graph.input
    )
    first = keras.tree.flatten(starts)[0]

    def call(layer, *args, **kwargs):
        if id(layer) in forms:
            return forms[id(layer)](args[0], first)
        return layer(*args, **kwargs)

    return keras.models.clone_model(
        graph, input_tensors=starts, clone_function=lambda layer: layer, call_function=call
    )


def _form(operation, known):
    """Returns what an operator computes, as a function of its tensor and of one with the whole batch.

    Args:
        operation: The operator, one of whose sizes is `None`.
        known: Whether that is the size of the batch for certain, as all others are known.
    """
    kind = type(operation).__name__
    (x,) = operation._inbound_nodes[0].arguments.keras_tensors
    sizes = list(getattr(operation, _SIZES.get(kind, ""), ()))
    if sizes.count(None) != 1:
        return None
    place = sizes.index(None)
    if kind == "Reshape":
        if -1 in sizes:
            if not known or None in x.shape[1:]:
                return None
            rest = math.prod(n for n in sizes if n not in (None, -1))
            sizes[sizes.index(-1)] = math.prod(x.shape[1:]) // rest
        sizes[place] = -1
        return lambda x, _: keras.ops.reshape(x, sizes)
    if place or not known:
        return None
    shape = [1] * (len(sizes) - len(x.shape)) + list(x.shape)
    if shape[0] != 1 or None in shape:
        return None
    repeats = [n // m for n, m in zip(sizes[1:], shape[1:], strict=True)]
    return lambda x, batch: Repeated(repeats)([x, batch])
