"""The graph that a file is made of: float32, without variables, named after the model's layers."""

import contextlib
import functools
import re

import keras
import tensorflow as tf
from keras.src.models.functional import Functional  # Keras exports no public name for it.
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from accel_tf import layers as graphs
from accel_tf.quantization import QuantizedLayer
from accel_tf.quantization._checks import require_finite
from accel_tf.quantization._weight_only import WeightOnlyLayer


def frozen_graph(model, batch_size: int | None = None):
    """Returns the inference of a functional or sequential model as one function of constants.

    Its operators have names `<path of the layer>/<operator>`, see `scope`.

    Args:
        model: The model, as from `plain`.
        batch_size: Fixes the number of inputs; `None` leaves it open.
    """
    specs = [
        tf.TensorSpec((batch_size or t.shape[0], *t.shape[1:]), t.dtype, name=t.name)
        for t in model.inputs
    ]

    for path, layer in graphs.walk(model):
        if isinstance(layer, QuantizedLayer):
            require_finite(layer.layer, path)

    def forward(*tensors):
        single = isinstance(model, keras.Sequential)
        packed = tensors[0] if single else keras.tree.pack_sequence_as(model.input, tensors)
        return model(packed, training=False)

    with intercepted(graphs.walk(model), _within):
        graph = tf.function(forward, autograph=False).get_concrete_function(*specs)
    return convert_variables_to_constants_v2(graph)


def has_graph(model) -> bool:
    """Whether a model is functional or sequential, which `frozen_graph` asks for."""
    return isinstance(model, (keras.Sequential, Functional))


def plain(model):
    """Returns a model that computes in float32 and lives on no distribution strategy."""
    policies = {layer.compute_dtype for _, layer in graphs.walk(model)}
    mirrored = any(isinstance(v.value, tf.distribute.DistributedValues) for v in model.variables)
    if policies <= {"float32", None} and not mirrored:
        return model
    copy = graphs.rebuild(model, lambda path, layer: None)
    for _, layer in graphs.walk(copy):
        layer.dtype_policy = "float32"
    return copy


def scope(path: str) -> str:
    """Returns the name under which the operators of the layer at `path` are found in a file."""
    return re.sub(r"[^A-Za-z0-9_.\-/]", "_", path).lstrip("_-/") or "layer"


def nearest(name: str, scopes):
    """Returns the innermost of `scopes` that the tensor called `name` lies in, or `None`.

    Args:
        name: As in a file; a fused operator's holds several, joined by `;`.
        scopes: What `scope` returned, in any container that `in` can search.
    """
    for part in name.split(";"):
        while "/" in part:
            part = part.rpartition("/")[0]
            if part in scopes:
                return part
    return None


@contextlib.contextmanager
def intercepted(layers, make):
    """While it is entered, `make(path, call)` stands for the method `call` of each layer.

    Args:
        layers: Pairs of path and layer.
        make: Returns the function that takes the place of the layer's `call`.
    """
    before = []
    for path, layer in layers:
        before.append((layer, layer.__dict__.get("call")))
        object.__setattr__(layer, "call", functools.wraps(layer.call)(make(path, layer.call)))
    try:
        yield
    finally:
        for layer, call in reversed(before):
            del layer.__dict__["call"]
            if call is not None:
                object.__setattr__(layer, "call", call)


def _within(path, call):
    """Names what a layer computes after it; Keras' own scopes get numbers."""

    def named(*args, **kwargs):
        # The ending slash makes TensorFlow take the name as it is, wherever the layer is called.
        with tf.name_scope(scope(path) + "/"):
            return call(*args, **kwargs)

    return named


@contextlib.contextmanager
def unrolled(model):
    """While it is entered, recurrent layers are unrolled: TensorFlow's lists of steps do not convert."""
    layers = [layer for _, layer in graphs.walk(model) if isinstance(layer, keras.layers.RNN)]
    before = [layer.unroll for layer in layers]
    for layer in layers:
        layer.unroll = True
    try:
        yield
    finally:
        for layer, unroll in zip(layers, before, strict=True):
            layer.unroll = unroll


def schemes_by_scope(model) -> dict:
    """Returns the scheme of each quantized layer, by its scope; `None` for what is excluded in one."""
    schemes = {}
    for path, layer in graphs.walk(model):
        if isinstance(layer, QuantizedLayer):
            schemes[scope(path)] = layer.scheme
        if isinstance(layer, WeightOnlyLayer):
            schemes.update((scope(f"{path}/{layer.layer.name}/{p}"), None) for p in layer.exclude)
    return schemes


def mixed_scopes(model) -> set[str]:
    """Returns the scopes of layers that may hold other constants besides the weights they round."""
    return {scope(path) for path, v in graphs.walk(model) if isinstance(v, WeightOnlyLayer)}


def input_names(model) -> list[str]:
    """Returns the names of a model's inputs in the order of its graph's."""
    return [tensor.name for tensor in model.inputs]


def output_names(model) -> list[str]:
    """Returns the names of a model's outputs, which are those of the layers that make them."""
    names = [tensor._keras_history.operation.name for tensor in model.outputs]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
