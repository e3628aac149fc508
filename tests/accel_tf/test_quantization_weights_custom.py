"""Weight-only schemes round the matrices of custom layers, whatever they are named and used for."""

import keras
import numpy as np
import pytest

import accel_tf as at
from accel_tf.layers import functional, sqnr
from accel_tf.quantization import fake_quantize_weights

L, ops = keras.layers, keras.ops
X = np.random.default_rng(0).normal(size=(8, 64)).astype("float32")


@keras.saving.register_keras_serializable("weights_custom")
class WeightNormalized(L.Layer):
    """A product with a matrix that it scales first, so that no weight is multiplied as it is."""

    def build(self, shape):
        self.v = self.add_weight((shape[-1], 64), name="v")
        self.g = self.add_weight((64,), "ones", name="g")
        self.token = self.add_weight((1, 64), "zeros", name="token")

    def call(self, x):
        return ops.matmul(x, self.v * (self.g / ops.norm(self.v, axis=0))) + self.token


def weight_normalized():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((64,)), WeightNormalized(name="mine"), L.ReLU()])


@pytest.mark.parametrize("scheme, size", [(at.Int8Weights(), 7500), (at.Int4Weights(), 5500)])
def test_a_weight_that_a_layer_computes_with_is_rounded_and_stored_so(scheme, size, tmp_path):
    model = weight_normalized()
    quantized = at.calibrate(model, None, scheme, verbose=0)
    by_hand = weight_normalized()
    v = by_hand.layers[0].v
    v.assign(fake_quantize_weights(v.value, scheme.weight_bits, (-1,), scheme.group_size))
    assert sqnr(np.asarray(by_hand(X)), np.asarray(quantized(X))) > 120
    (entry,) = at.report_of(quantized).done
    assert entry.note.startswith(f"weights int{scheme.weight_bits} per ")
    assert entry.note.endswith(", token stays in float")
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    assert found.size < size and found.float_weights == ()
    assert sqnr(np.asarray(quantized(X)), at.export.run_litert(tmp_path / "m.tflite", X)) > 30


class Projected(keras.Model):
    def build(self, shape):
        self.matrix = self.add_weight((64, 16), name="matrix")
        self.built = True

    def call(self, x):
        return ops.matmul(x, self.matrix)


def test_the_matrix_of_a_subclassed_model_is_rounded_and_stored_so(tmp_path):
    model = Projected()
    model(X)
    quantized = at.calibrate(functional(model, X), None, at.Int8Weights(), verbose=0)
    rounded = fake_quantize_weights(model.matrix.value, 8, (-1,))
    assert sqnr(X @ np.asarray(rounded), np.asarray(quantized(X))) > 120
    assert dict(at.report_of(quantized).done) == {"matrix": "weights int8 per channel"}
    found = at.export.litert(quantized, tmp_path / "m.tflite")
    assert found.float_weights == () and found.size < 64 * 16 * 3
    assert sqnr(np.asarray(quantized(X)), at.export.run_litert(tmp_path / "m.tflite", X)) > 30


@pytest.mark.parametrize("scheme", [at.Int8Weights(), at.Float16()])
def test_a_model_without_matrices_has_nothing_to_quantize(scheme):
    model = keras.Sequential([keras.Input((64,)), L.Rescaling(0.5), L.ReLU()])
    with pytest.raises(ValueError, match="nothing to quantize in model .* none of its layers has"):
        at.calibrate(model, None, scheme, verbose=0)
    with pytest.raises(ValueError, match="or all of them are excluded"):
        at.quantize_aware(weight_normalized(), scheme, exclude=["mine"])
