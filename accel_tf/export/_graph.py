"""The graph that a file is made of: float32, without variables, named after the model's layers."""

import contextlib
import functools
import re

import keras
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from accel_tf import _keras
from accel_tf import layers as graphs
from accel_tf.quantization import QuantizedLayer
from accel_tf.quantization._checks import require_finite
from accel_tf.quantization._weight_only import WeightOnlyLayer


class NotConstant(ValueError):
    """Says why no graph of constants computes what a model does, before any converter has seen it."""


def frozen_graph(model, batch_size: int | None = None):
    """Returns the inference of a functional or sequential model as one function of constants.

    Its operators have names `<path of the layer>/<operator>`, see `scope`.

    Args:
        model: The model, as from `plain`.
        batch_size: Fixes the number of inputs; `None` leaves it open.

    Raises:
        NotConstant: A layer looks its inputs up in a table, or changes a variable in inference.
    """
    specs = [
        tf.TensorSpec((batch_size or t.shape[0], *t.shape[1:]), t.dtype, name=t.name)
        for t in model.inputs
    ]

    if path := table_in(model):
        raise NotConstant(
            f"Layer {path!r} looks its inputs up in a table, which a file of constants cannot hold. Export "
            "the part of the model behind it, or use accel_tf.export.saved_model."
        )
    for path, layer in graphs.walk(model):
        if isinstance(layer, QuantizedLayer):
            require_finite(layer.layer, path)

    def forward(*tensors):
        single = isinstance(model, keras.Sequential)
        packed = tensors[0] if single else keras.tree.pack_sequence_as(model.input, tensors)
        # The seeds of dropout within recurrent layers move on in inference, too; constants cannot.
        with graphs.Changes() as changes:
            outputs = model(packed, training=False)
        changed.update(changes.of_state(model))
        return outputs

    changed: dict[str, keras.Variable] = {}
    with intercepted(graphs.walk(model), _within), plain_errors():
        graph = tf.function(forward, autograph=False).get_concrete_function(*specs)
    _require_no_state(model, {path: v.name for path, v in changed.items()}, graph)
    return convert_variables_to_constants_v2(graph)


def _require_no_state(model, changed, graph):
    """Raises an error if layers of a model have changed variables, or would do so in its graph.

    Args:
        model: The model.
        changed: The names of variables of Keras that were changed, by the path of the layer.
        graph: The graph.
    """
    layers = dict(graphs.walk(model))
    scopes = {scope(path): path for path in layers}
    for op in graph.graph.get_operations():  # variables of TensorFlow, which Keras knows nothing of
        if op.type.startswith("Assign") and op.type.endswith("VariableOp"):
            path = scopes.get(nearest(op.name, scopes), model.name)
            changed = {**changed, path: op.inputs[0].name}
    for path, name in changed.items():
        if getattr(layers.get(path), "stateful", False):
            raise NotConstant(
                f"Layer {path!r} keeps its state between calls (stateful=True), and a LiteRT or ONNX file "
                "has none: build the model with stateful=False, or give the state as inputs and outputs."
            )
        raise NotConstant(
            f"Layer {path!r} changes its variable {name!r} in inference, and a LiteRT or ONNX file has "
            "constants only: change the variable in training alone, or make it an input and an output."
        )


def table_in(model) -> str | None:
    """Returns the path of the first layer that keeps a table, which no graph of constants holds."""
    tables = (path for path, layer in graphs.walk(model) if hasattr(layer, "get_vocabulary"))
    return next(tables, None)


_POLICIES = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")


def plain(model):
    """Returns a model that computes in float32 and lives on no distribution strategy."""
    policies = {layer.compute_dtype for _, layer in graphs.walk(model)}
    mirrored = any(isinstance(v.value, tf.distribute.DistributedValues) for v in model.variables)
    if policies <= {"float32", None} and not mirrored:
        return model
    made = []

    def replace(path, layer):
        config = layer.get_config()
        floats = _in_float32(config)
        changes = {key: floats[key] for key in config if floats[key] is not config[key]}
        new = graphs.anew(layer, path, **changes)
        made.append((layer, new, path))
        return new

    copy = graphs.rebuild(model, replace)
    for old, new, path in made:
        graphs.copy_state(old, new, path)
    for layer in (copy, *(layer for _, layer in graphs.walk(copy))):
        layer.dtype_policy = "float32"
    return copy


def _in_float32(config):
    """Returns a configuration with float32 for each data type policy of other floats, nested ones too.

    What contains none is returned as it is.
    """
    if isinstance(config, dict):
        made = {
            key: "float32" if key == "dtype" and _is_other_float(value) else _in_float32(value)
            for key, value in config.items()
        }
        return made if any(made[key] is not config[key] for key in made) else config
    if isinstance(config, (list, tuple)):
        made = type(config)(map(_in_float32, config))
        return made if any(a is not b for a, b in zip(made, config, strict=True)) else config
    return config


def _is_other_float(policy) -> bool:
    """Whether the entry `dtype` of a configuration is a policy of floats other than float32."""
    if isinstance(policy, dict):
        policy = policy.get("config", {}).get("name")
    return policy in _POLICIES


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


@contextlib.contextmanager
def plain_errors():
    """While it is entered, Keras raises errors of a layer as they are, without terminal colours."""
    filtered = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filtered:
            keras.config.enable_traceback_filtering()


def _within(path, call):
    """Names what a layer computes after it; Keras' own scopes get numbers."""

    def named(*args, **kwargs):
        # The ending slash makes TensorFlow take the name as it is, wherever the layer is called.
        with tf.name_scope(scope(path) + "/"):
            return call(*args, **kwargs)

    return named


@contextlib.contextmanager
def unrolled(model):
    """While it is entered, recurrent layers are unrolled: TensorFlow's lists of steps do not convert.

    A layer that goes backwards is computed as one that goes forwards through the reversed sequence.
    Keras' own unrolled form zeroes its outputs by the mask in the order of the input, which is wrong.

    Raises:
        ValueError: A layer takes sequences of any length.
    """
    layers = {
        path: layer for path, layer in graphs.walk(model) if isinstance(layer, keras.layers.RNN)
    }
    backwards = {path: layer for path, layer in layers.items() if layer.go_backwards}
    before = {path: layer.unroll for path, layer in layers.items()}
    for layer in layers.values():
        layer.unroll = True
    try:
        with (
            intercepted(backwards.items(), lambda path, call: _reversed(layers[path], call)),
            intercepted(layers.items(), _of_known_length),
        ):
            yield
    finally:
        for path, layer in layers.items():
            layer.unroll = before[path]


def _of_known_length(path, call):
    def checked(sequences, *args, **kwargs):
        if keras.tree.flatten(sequences)[0].shape[1] is None:
            raise ValueError(
                f"Layer {path!r} takes sequences of any length, and a file without a loop needs to "
                "know the number of time steps. Give the model's input a length, as in "
                "keras.Input((100, 8)). Pass batch_size=1 instead if this is accel_tf.export.litert, which "
                "then keeps the loop."
            )
        return call(sequences, *args, **kwargs)

    return checked


def _reversed(layer, call):
    def backwards(sequences, initial_state=None, mask=None, **kwargs):
        sequences, mask = keras.tree.map_structure(_last_first, (sequences, mask))
        layer.go_backwards = False
        try:
            return call(sequences, initial_state=initial_state, mask=mask, **kwargs)
        finally:
            layer.go_backwards = True

    return backwards


def _last_first(x):
    """Returns a tensor with its time steps in reverse order, `None` for `None`."""
    return None if x is None else tf.stack(tf.unstack(x, axis=1)[::-1], axis=1)


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


def output_keys(model) -> list[str] | None:
    """Returns the keys of a dictionary of outputs in the order of the graph's, else `None`."""
    structure = model.output if isinstance(model, graphs.Functional) else None
    if not isinstance(structure, dict) or any(map(keras.tree.is_nested, structure.values())):
        return None
    places = keras.tree.pack_sequence_as(structure, range(len(structure)))
    return [str(key) for key in sorted(places, key=places.get)]


def output_names(model) -> list[str]:
    """Returns the names of a model's outputs: its keys, or those of the layers that make them."""
    if keys := output_keys(model):
        return keys
    names = [_keras.operation_of(tensor).name for tensor in model.outputs]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def named_outputs(graph, model):
    """Returns a graph from `frozen_graph` whose outputs bear the keys of the model's dictionary."""
    keys = output_keys(model)
    if keys is None:
        return graph

    def serve(*tensors):
        return dict(zip(keys, tf.nest.flatten(graph(*tensors)), strict=True))

    specs = [tf.TensorSpec(t.shape, t.dtype, name=t.op.name) for t in graph.inputs]
    return tf.function(serve, autograph=False).get_concrete_function(*specs)
