"""Export: files for other runtimes from Keras models, checked after they are written.

    litert           a `.tflite` file, of integers where the model is quantized        _litert.py
    inspect_litert   what such a file contains, and what stayed in float and why       _inspect.py
    run_litert       runs it on float inputs; `LiteRTRunner` keeps it open       accel_tf/_litert.py
    onnx             an `.onnx` file, for onnxruntime and others                       _onnx.py
    saved_model      a folder for TensorFlow and TensorFlow Serving                    _saved_model.py
    verify           runs a file in its own runtime; names the first layer that differs _verify.py

A model from `accel_tf.quantize_aware` or `accel_tf.calibrate` becomes a file of its number format;
any other model becomes a float32 file.
"""

from accel_tf._litert import LiteRTRunner, run_litert
from accel_tf.export._inspect import LiteRTFile, Operator, inspect_litert
from accel_tf.export._litert import litert
from accel_tf.export._onnx import onnx
from accel_tf.export._saved_model import saved_model
from accel_tf.export._verify import Verification, verify

__all__ = [
    "LiteRTFile",
    "LiteRTRunner",
    "Operator",
    "Verification",
    "inspect_litert",
    "litert",
    "onnx",
    "run_litert",
    "saved_model",
    "verify",
]
