"""Quantization: train and calibrate models so that they run in 8-bit integers.

A real number x is stored as an integer q with x ≈ s·(q − z): scale s, zero point z (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, equation 1). Both verbs return the same kind of model, one that computes in float on the
very grid that the integer runtime will use::

    quantize_aware   fake quantization to train with `fit` (QAT)                _rewrite.py
    calibrate        the same, ranges from data, without training (PTQ)         _calibrate.py
    Int8, …          the number format                                          _schemes.py
    MovingAverage, … how the ranges of activations are observed                 _observers.py
    MSE, …           those that need a histogram of all values                  _histograms.py
    FakeQuantize     one tensor on its grid: observer and rounding              _fake.py
    quantization_error   which layers it hurts, and what to leave in float      _error.py
    Quantized…       the layers that replace those of the model                 _layers.py
                     those with a factor and an offset per channel              _affine.py
                     those that stay on the grid of their input                 _same_grid.py
                     biases on the grid of the sums that they go to             _grids.py
                     what integer kernels compute, to the last bit              _integers.py
                     zeros and clusters, kept in training and in the file       _preserve.py

`accel_tf.export.litert` turns the result into a LiteRT file.
"""

from accel_tf.quantization._affine import QuantizedAffine
from accel_tf.quantization._calibrate import calibrate
from accel_tf.quantization._error import QuantizationError, quantization_error
from accel_tf.quantization._fake import FakeQuantize, observing
from accel_tf.quantization._histograms import MSE, Entropy, Percentile
from accel_tf.quantization._layers import QuantizedLayer, QuantizedWeights
from accel_tf.quantization._observers import Learned, MinMax, MovingAverage, Observer
from accel_tf.quantization._rewrite import quantize_aware
from accel_tf.quantization._same_grid import QuantizedReshape
from accel_tf.quantization._schemes import (
    Float16,
    Int4Weights,
    Int8,
    Int8Weights,
    Int16x8,
    Mixed,
    Scheme,
)
from accel_tf.quantization._weights import fake_quantize_weights

__all__ = [
    "MSE",
    "Entropy",
    "FakeQuantize",
    "Float16",
    "Int4Weights",
    "Int8",
    "Int8Weights",
    "Int16x8",
    "Learned",
    "MinMax",
    "Mixed",
    "MovingAverage",
    "Observer",
    "Percentile",
    "QuantizationError",
    "QuantizedAffine",
    "QuantizedLayer",
    "QuantizedReshape",
    "QuantizedWeights",
    "Scheme",
    "calibrate",
    "fake_quantize_weights",
    "observing",
    "quantization_error",
    "quantize_aware",
]
