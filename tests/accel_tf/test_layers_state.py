"""Copies keep what layers hold besides their weights: statistics, tables, seeds, LoRA updates."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf import layers

L = keras.layers
RNG = np.random.default_rng(0)
FAR = RNG.normal(100, 50, (64, 16)).astype("float32")


def adapted_normalization():
    normalization = L.Normalization()
    normalization.adapt(FAR)
    return normalization


def decibels(expected, received):
    return layers.difference([np.asarray(expected)], [np.asarray(received)])


LOSSLESS = {
    "fuse": at.fuse,
    "sparsify": lambda model: at.sparsify(model, min_sparsity=0.0),
    "rebuild": lambda model: layers.rebuild(model, lambda path, layer: None),
}


@pytest.mark.parametrize("verb", LOSSLESS)
def test_an_adapted_normalization_keeps_its_statistics(verb):
    model = keras.Sequential([keras.Input((16,)), adapted_normalization(), L.Dense(3)])
    copy = LOSSLESS[verb](model)
    if verb == "sparsify":
        assert decibels(model(FAR), copy(FAR)) > 100
    else:
        np.testing.assert_array_equal(copy(FAR), model(FAR))


def test_quantized_copies_keep_an_adapted_normalization():
    model = keras.Sequential([keras.Input((16,)), adapted_normalization(), L.Dense(3)])
    quantized = at.calibrate(model, FAR, verbose=0)
    assert decibels(model(FAR), quantized(FAR)) > 30
    assert "Checked without rounding on 16 samples" in at.report_of(quantized).note


def test_removing_channels_keeps_an_adapted_normalization():
    model = keras.Sequential(
        [keras.Input((16,)), adapted_normalization(), L.Dense(8), L.Dense(3, name="head")]
    )
    small = at.remove_channels(model, 0.5)
    at.mask_channels(model, 0.5)
    assert decibels(model(FAR), small(FAR)) > 100


def lookups():
    words = np.array([["a"], ["b"], ["c"]])
    yield L.StringLookup(), words, "string"
    yield L.IntegerLookup(), np.array([[3], [5], [9]]), "int64"
    yield L.TextVectorization(output_sequence_length=4), words, "string"
    yield L.StringLookup(output_mode="tf_idf"), words, "string"


@pytest.mark.parametrize("i", range(4))
def test_lookup_layers_keep_their_tables(i):
    lookup, data, dtype = list(lookups())[i]
    lookup.adapt(data)
    inputs = keras.Input((1,), dtype=dtype)
    x = lookup(inputs)
    if i < 3:
        x = L.Flatten()(L.Embedding(12, 8)(x))
    model = keras.Model(inputs, L.Dense(2)(x))
    x = tf.constant(data)
    np.testing.assert_array_equal(at.fuse(model)(x), model(x))
    if i < 3:  # numbers of words, and so no layer to exclude
        quantized = at.calibrate(model, x, verbose=0)
        assert decibels(model(x), quantized(x)) > 30


def test_a_discretization_keeps_its_boundaries():
    bins = L.Discretization(num_bins=5)
    bins.adapt(FAR)
    model = keras.Sequential([keras.Input((16,)), bins, L.Embedding(5, 4), L.Flatten(), L.Dense(2)])
    np.testing.assert_array_equal(at.fuse(model)(FAR), model(FAR))


def test_random_seeds_are_copied():
    model = keras.Sequential([keras.Input((16,)), L.Dense(8), L.Dropout(0.5, seed=3)])
    model(FAR, training=True)  # moves the seed on
    copy = layers.rebuild(model, lambda path, layer: None)
    np.testing.assert_array_equal(copy(FAR, training=True), model(FAR, training=True))


def test_a_lora_update_is_a_part_of_copies():
    x = RNG.normal(size=(32, 16)).astype("float32")
    model = keras.Sequential([keras.Input((16,)), L.Dense(8, "relu"), L.Dense(2)])
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(RNG.normal(size=(2, 8)))
    assert decibels(model(x), at.fuse(model)(x)) > 100
    quantized = at.calibrate(model, x, verbose=0)
    assert decibels(model(x), quantized(x)) > 30
    assert not quantized.layers[1].layer.lora_enabled


def test_layers_that_keras_quantized_are_refused_by_name():
    model = keras.Sequential([keras.Input((16,)), L.Dense(8, name="wide"), L.Dense(2)])
    model.quantize("int8", filters=["wide"])
    with pytest.raises(
        ValueError, match=r"'wide' \(Dense\) was quantized by Keras.*exclude=\['wide'\]"
    ):
        at.calibrate(model, FAR, verbose=0)


@keras.saving.register_keras_serializable("tests")
class Forgetful(L.Layer):
    """Its configuration lacks an argument that has a default, so a copy computes something else."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return x * self.factor

    def get_config(self):
        return {"name": self.name}


@keras.saving.register_keras_serializable("tests")
class Unmade(Forgetful):
    def __init__(self, factor, **kwargs):
        super().__init__(factor, **kwargs)


def test_a_copy_that_computes_something_else_is_an_error():
    model = keras.Sequential(
        [keras.Input((16,)), L.Dense(4), Forgetful(3.0, name="mine"), L.Dense(2)]
    )
    for verb in (at.fuse, at.sparsify):
        with pytest.raises(
            ValueError, match=r"outputs differ: .* dB .*behind layer 'mine'.*verify=False"
        ):
            verb(model)
    wrong = at.fuse(model, verify=False)
    assert decibels(model(FAR), wrong(FAR)) < 10


def test_a_layer_that_cannot_be_copied_is_shared_and_reported():
    model = keras.Sequential([keras.Input((16,)), L.Dense(4), Unmade(3.0, name="mine"), L.Dense(2)])
    fused = at.fuse(model)
    np.testing.assert_array_equal(fused(FAR), model(FAR))
    assert fused.get_layer("mine") is model.get_layer("mine")
    assert ("mine", layers.NOT_COPIED) in at.report_of(fused).skipped
    with pytest.raises(ValueError, match="'mine' .* cannot be copied"):
        at.quantize_aware(model, exclude=["mine"])


def test_lambdas_are_copied_with_what_they_refer_to():
    offset = np.float32(2.0)
    model = keras.Sequential([keras.Input((16,)), L.Dense(4), L.Lambda(lambda x: x * offset)])
    fused = at.fuse(model)
    np.testing.assert_array_equal(fused(FAR), model(FAR))
    assert fused.layers[-1] is not model.layers[-1]


class Inner(keras.Model):
    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = L.Dense(units)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {"name": self.name, "units": self.units}


def test_a_nested_subclassed_model_is_a_layer_like_others():
    inputs = keras.Input((16,))
    x = L.Dense(8, "relu", name="first")(L.Dense(8, name="zeroth")(inputs))
    model = keras.Model(inputs, L.Dense(2)(Inner(name="inner")(x)))
    small = at.remove_channels(model, 0.5)
    assert small.get_layer("zeroth").units == 4 and small.get_layer("first").units == 8
    reasons = dict(at.report_of(small).skipped)
    assert "no rule" in reasons["inner"]
    np.testing.assert_array_equal(at.fuse(model)(FAR), model(FAR))


@pytest.mark.filterwarnings("ignore:Layer 'conv1d")  # Keras says so of the float model.
def test_masks_end_at_sparse_convolutions_as_at_dense_ones():
    inputs = keras.Input((6,), dtype="int32")
    x = L.Conv1D(8, 3, padding="same")(L.Embedding(9, 8, mask_zero=True)(inputs))
    model = keras.Model(inputs, L.GlobalAveragePooling1D()(x))
    ids = np.array([[3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    assert decibels(model(ids), at.sparsify(model, min_sparsity=0.0)(ids)) > 100


def test_outputs_that_are_not_finite_never_agree_with_others():
    finite, nan = np.ones((2, 3)), np.full((2, 3), np.nan)
    assert layers.sqnr(finite, nan) == layers.sqnr(nan, finite) == -np.inf
    assert layers.sqnr(nan, nan) == np.inf and not layers.tells([nan, 0 * finite])
    assert layers.difference([finite, finite], [finite, nan]) == -np.inf


def test_activations_with_other_parameters_than_keras_have_are_kept():
    x = RNG.normal(size=(32, 16)).astype("float32")
    for activation in (
        lambda x: keras.ops.leaky_relu(x, 0.5),
        lambda x: keras.ops.elu(x, 0.3),
    ):
        model = keras.Sequential([keras.Input((16,)), L.Dense(4, activation=activation)])
        with pytest.raises(ValueError, match="its activation '<lambda>' is none of"):
            at.calibrate(model, x, verbose=0)


def test_a_large_constant_in_the_outputs_hides_no_fault():
    model = keras.Sequential([keras.Input((16,)), Forgetful(3.0, name="mine"), L.Dense(2)])
    model.layers[-1].bias.assign([1e4, 1e4])
    with pytest.raises(ValueError, match="20 dB of what varies between samples"):
        at.fuse(model)


def stateful(*layers):
    return keras.Sequential([keras.Input(batch_shape=(8, 4, 3)), *layers, L.Dense(2)])


SIGNALS = RNG.normal(size=(3, 8, 4, 3)).astype("float32")
STATEFUL = {
    **LOSSLESS,
    "Int8Weights": lambda model: at.calibrate(model, None, at.Int8Weights(), verbose=0),
    "excluded": lambda model: at.calibrate(model, SIGNALS[2], exclude=["r*"], verbose=0),
    "observed": lambda model: at.calibrate(
        model, SIGNALS.reshape(24, 4, 3), exclude=["r*"], verbose=0
    ),
}


@pytest.mark.parametrize("verb", STATEFUL)
@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.GRU(8, stateful=True, name="r"),
        lambda: L.RNN([L.GRUCell(4), L.LSTMCell(5)], stateful=True, name="r"),
    ],
    ids=["GRU", "stacked"],
)
def test_copies_of_stateful_layers_go_on_from_the_state_of_the_original(verb, layer):
    model = stateful(layer())
    model(SIGNALS[2])
    before = [v.numpy() for _, r in layers.walk(model) for v in layers.unsaved(r)]
    copy = STATEFUL[verb](model)
    after = [v.numpy() for _, r in layers.walk(model) for v in layers.unsaved(r)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new, old)
    for batch in SIGNALS:
        assert decibels(model(batch), copy(batch)) > (100 if verb in LOSSLESS else 25)


@keras.saving.register_keras_serializable("tests")
class Counter(L.Layer):
    def build(self, shape):
        self.count = self.add_weight((), "zeros", trainable=False, name="count")

    def call(self, x):
        self.count.assign(self.count + 1.0)
        return x * self.count


def test_verbs_leave_a_counter_as_it_is():
    model = keras.Sequential([keras.Input((16,)), L.Dense(4), Counter(name="mine"), L.Dense(2)])
    quantized = at.calibrate(model, FAR[:40], exclude=["mine"], verbose=0)
    fused = at.fuse(model)
    assert {float(m.get_layer("mine").count) for m in (model, quantized, fused)} == {0}
    for times in (1, 2):
        assert decibels(model(FAR), fused(FAR)) > 100
        assert float(model.get_layer("mine").count) == times


class Unnamed(L.Layer):
    """A layer without a get_config of its own, and one in it, so that Keras chooses their names anew."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = L.Dense(4)

    def call(self, x):
        return self.dense(x)


def test_copies_keep_the_names_that_keras_chose(tmp_path):
    model = keras.Sequential([keras.Input((16,)), L.Dense(4), Unnamed(), L.Dense(2)])
    names = [path for path, _ in layers.walk(model)]
    assert [path for path, _ in layers.walk(at.fuse(model))] == names
    quantized = at.calibrate(model, FAR, exclude=[names[-3]], verbose=0)
    assert {names[-3], names[-2]} <= {path for path, _ in layers.walk(quantized)}
    found = at.export.litert(quantized, tmp_path / "m.tflite", allow_float=True)
    assert names[-2] in {op.layer for op in found.operators}
