"""SavedModel folders: for TensorFlow, TensorFlow Serving and everything that converts from them."""

import os
import pathlib
import warnings

import keras
import tensorflow as tf

from accel_tf import layers as graphs
from accel_tf._litert import quiet
from accel_tf.export._check import draft, require_same_file
from accel_tf.export._graph import (
    NotConstant,
    frozen_graph,
    input_names,
    output_names,
    plain,
    table_in,
)
from accel_tf.export._litert import require_data


def saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    verify: bool = True,
) -> pathlib.Path:
    """Writes the inference of `model` as a SavedModel folder, which needs TensorFlow alone.

    The weights are constants of the graph and the ranges of a quantized model are fixed, so the
    folder computes what `model(x, training=False)` does and cannot be trained on. A result that falls
    on a tie between two integers may be rounded either way, as between `model(x)` and
    `model.predict(x)`, since TensorFlow optimizes graphs. float16 computation is exported as float32. To
    save a model for training use `model.save`.

    The folder of a model from `accel_tf.sparsify` needs the compiled operator of accel_tf as well:
    `import accel_tf.sparse` before `tf.saved_model.load`, and TensorFlow Serving has to be built with
    it. The dense form, which needs TensorFlow alone, is the folder of the model that `sparsify` was
    given.

    Args:
        model: Any functional or sequential Keras model. A subclassed one, one with the table of a lookup
            layer, and one that keeps state between calls, such as that of a recurrent layer with
            `stateful=True`, is written by Keras' `model.export`, its weights and state as variables.
        path: The folder to write; it is made.
        batch_size: Fixes the number of inputs per run; with `None` the folder takes any number.
        verify: Whether to run the folder on a few samples made from the input specification of `model`,
            and to compare the outputs.

    Returns:
        The path of the folder. `tf.saved_model.load(path).signatures["serving_default"]` runs it;
        its inputs and outputs are named after the model's.

    Raises:
        ValueError: The model is quantized but has seen no data, or a fixed batch size is asked of
            a model that Keras writes; or the folder does not compute what `model` does, which is an
            error in accel_tf.

    Warns:
        UserWarning: The folder needs operators of accel_tf.

    Example:

    >>> import tempfile, keras, tensorflow as tf
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,), name="x"), keras.layers.Dense(4, name="y")])
    >>> path = at.export.saved_model(model, tempfile.mkdtemp() + "/model")
    >>> run = tf.saved_model.load(path).signatures["serving_default"]
    >>> run(x=tf.zeros((3, 8)))["y"].shape
    TensorShape([3, 4])
    """
    graphs.require_model(model, "saved_model")
    require_data(model)
    path = pathlib.Path(path)
    constants = _constants(model, batch_size)
    if constants is None and batch_size is not None:
        raise ValueError(
            f"A fixed batch size needs a functional or sequential model without lookup layers and state; "
            f"{model.name!r} is none. Leave batch_size out."
        )
    with draft(path) as made:
        if constants is not None:
            _write(constants, model, made)
        else:
            with quiet():
                model.export(str(made), verbose=False)
        if verify:
            require_same_file("saved_model", model, made, batch_size)
    return path


def _constants(model, batch_size):
    """Returns what a model computes as a graph of constants, `None` if there is no such graph."""
    if not graphs.has_graph(model) or table_in(model):
        return None
    with quiet():
        try:
            return frozen_graph(plain(model), batch_size)
        except NotConstant:
            return None


def _write(graph, model, path):
    """Writes a graph of constants, of the inputs and outputs of `model`."""
    with quiet():
        names, outputs = input_names(model), output_names(model)
        signature = {
            name: tf.TensorSpec(t.shape, t.dtype, name)
            for name, t in zip(names, graph.inputs, strict=True)
        }

        def serve(**inputs):
            results = tf.nest.flatten(graph(*(inputs[name] for name in names)))
            return dict(zip(outputs, results, strict=True))

        module = tf.Module()
        module.graph = graph
        module.serve = tf.function(serve, autograph=False)
        served = module.serve.get_concrete_function(**signature)
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, str(path), signatures=served, options=options)
    _warn_of_own_operators(graph, model)


def _warn_of_own_operators(graph, model):
    """Warns if a graph contains operators that TensorFlow alone does not have."""
    own = {op.type for op in graph.graph.get_operations() if op.type.startswith("AccelTf")}
    if own:
        warnings.warn(
            f"The folder of {model.name!r} needs {', '.join(sorted(own))}, which TensorFlow alone does "
            "not have: import accel_tf.sparse before tf.saved_model.load. Export the model that "
            "sparsify was given for a folder that needs TensorFlow alone.",
            stacklevel=4,
        )
