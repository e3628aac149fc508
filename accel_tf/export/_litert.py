"""Export: LiteRT (`.tflite`) files from Keras models, checked after they are written.

A model from `accel_tf.quantize_aware` or `accel_tf.calibrate` becomes a file whose inputs, outputs
and operators are 8-bit integers; any other model becomes a float32 file.
"""

import os
import pathlib
import tempfile

import keras
import tensorflow as tf
from keras.src.models.functional import Functional  # Keras exports no public name for it.
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf._litert import (
    LiteRTFile,
    LiteRTRunner,
    Operator,
    inspect,
    inspect_litert,
    litert_module,
    quiet,
    run_litert,
)
from accel_tf.quantization import QuantizedLayer
from accel_tf.quantization._fake import freezing

__all__ = ["LiteRTFile", "LiteRTRunner", "Operator", "inspect_litert", "litert", "run_litert"]


def litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    allow_float: bool = False,
) -> LiteRTFile:
    """Writes `model` as a LiteRT file and inspects what was written.

    Args:
        model: A model made by `quantize_aware` or `calibrate`, which gives a file that computes in
            int8, input and output included; or any other Keras model, which gives a float32 file.
            float16 computation is exported as float32.
        path: Where to write; usually ends in `.tflite`.
        batch_size: Fixes the number of inputs per run; with `None` the file takes any number, by
            `resize_tensor_input`.
        allow_float: Whether a quantized model may keep operators that are not int8, such as those
            of layers that were excluded. Its inputs and outputs are float32 then. The converter
            computes an excluded layer in int8 all the same where it has an integer kernel for it.

    Returns:
        What the file contains, as from `inspect_litert`.

    Raises:
        ValueError: The model is quantized but has seen no data, has 4-bit weights, or an operator
            did not become int8 although `allow_float` is false (the message names them; no file is
            left behind); or the converter failed.
        ImportError: ai_edge_litert, which reads the file back, is not installed.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="relu")])
    >>> quantized = at.calibrate(model, np.random.default_rng(0).random((64, 8)), verbose=0)
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> at.export.litert(quantized, path).int8_fraction
    1.0
    """
    graphs.require_model(model, "litert")
    litert_module("schema_py_generated")  # Missing? Then say so before the work, not after.
    path = pathlib.Path(path)
    quantizers = [layer for _, layer in graphs.walk(model) if isinstance(layer, QuantizedLayer)]
    for layer in quantizers:
        _require_exportable(layer)
    content = _convert(_plain(model), batch_size, bool(quantizers), allow_float)
    found = inspect(content, path)
    if quantizers and not allow_float and found.not_int8:
        raise ValueError(
            f"Operators of {model.name!r} did not become int8: {report.shorten(found.not_int8)}. "
            "Layers excluded from quantization stay in float (see accel_tf.report_of); pass "
            "allow_float=True to export them so. No file was written."
        )
    path.write_bytes(content)
    return found


def _require_exportable(layer):
    if layer.scheme.weight_bits != 8:
        raise ValueError(
            f"Layer {layer.name!r} has {layer.scheme.weight_bits}-bit weights "
            f"({type(layer.scheme).__name__}), which a LiteRT file would store and compute in 8 "
            "bits. Quantize the float model with Int8() to export it."
        )
    for quantizer in layer.quantizers:
        _ = quantizer.range  # Raises a ValueError naming the layer if no data has been seen.


def _plain(model):
    """Returns a model that computes in float32 and lives on no distribution strategy."""
    policies = {layer.compute_dtype for _, layer in graphs.walk(model)}
    mirrored = any(isinstance(v.value, tf.distribute.DistributedValues) for v in model.variables)
    if policies <= {"float32", None} and not mirrored:
        return model
    copy = graphs.rebuild(model, lambda path, layer: None)
    for _, layer in graphs.walk(copy):
        layer.dtype_policy = "float32"
    return copy


def _convert(model, batch_size, quantized, allow_float) -> bytes:
    with quiet() as log, freezing(), tempfile.TemporaryDirectory() as folder:
        try:
            converter = _converter(model, batch_size, folder)
            if quantized:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
                if not allow_float:
                    converter.inference_input_type = converter.inference_output_type = tf.int8
            return converter.convert()
        except Exception as error:
            raise ValueError(
                f"TensorFlow's converter to LiteRT failed on model {model.name!r}: "
                f"{str(error)[-500:]}\n{log()[-1000:]}"
            ) from error


def _converter(model, batch_size, folder):
    if not isinstance(model, (keras.Sequential, Functional)):
        if batch_size is not None:
            raise ValueError("a fixed batch size needs a functional or sequential model.")
        return tf.lite.TFLiteConverter.from_keras_model(model)
    specs = [
        tf.TensorSpec((batch_size or t.shape[0], *t.shape[1:]), t.dtype, name=t.name)
        for t in model.inputs
    ]

    def forward(*tensors):
        single = isinstance(model, keras.Sequential)
        packed = tensors[0] if single else keras.tree.pack_sequence_as(model.input, tensors)
        return model(packed, training=False)

    # A graph without variables is saved and read back in a third of the time that a model takes,
    # and that is where a conversion spends it.
    graph = tf.function(forward, autograph=False).get_concrete_function(*specs)
    module = tf.Module()
    module.graph = convert_variables_to_constants_v2(graph)
    # Without gradients, which nobody takes from it: TensorFlow cannot save that of swish.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, folder, signatures=module.graph, options=options)
    return tf.lite.TFLiteConverter.from_saved_model(folder)
