"""Every verb on random models: the function is preserved, or the error is a documented one.

A failure names the model as `random_model(seed, size)`; a smaller size gives a part of the model.
"""

import inspect
import pathlib
import re
import tempfile
import traceback
import zlib

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_inputs import SAMPLES, STARTING
from random_layers import FAMILIES, Draw
from random_models import (
    LEFT_OUT,
    MASK_WARNING,
    arrays_of,
    random_model,
    run,
    sqnr,
)

import accel_tf as at
from accel_tf._litert import quiet
from accel_tf.export._runtimes import runtime_of

L = keras.layers
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{MASK_WARNING}"),
    # Constants of each sort leave some models without a signal in 8 bits, in TensorFlow's files as well.
    pytest.mark.filterwarnings("ignore:The quantized model"),
]

# In dB, to the original model. float64 models are exported and fused in float32, too.
LOSSLESS = {"float32": 100, "float64": 100, "mixed_float16": 45}
# How much worse than TensorFlow's own quantization a quantized model or file may be, in dB.
MARGIN = 3
# What stands in an error that some other library raised, or that nobody was meant to read.
RAW = ("zip()", "loc(", "NoneType", "no attribute", "KerasTensor", "\x1b[", ".cc:", "without.")
# The arguments that an error may name as the way out, besides the layer where it happened.
ARGUMENTS = ("batch_size", "exclude", "include", "allow_float", "data", "opset")
# The layers that have an integer form.
QUANTIZABLE = (
    "Dense EinsumDense Conv1D Conv2D DepthwiseConv1D DepthwiseConv2D SeparableConv1D "
    "SeparableConv2D Conv1DTranspose Conv2DTranspose BatchNormalization Rescaling "
    "LayerNormalization MultiHeadAttention LSTM GRU SimpleRNN Bidirectional Activation ReLU Softmax "
    "LeakyReLU ELU PReLU Add Subtract Multiply Average Concatenate Flatten Reshape Permute "
    "RepeatVector MaxPooling1D MaxPooling2D AveragePooling1D AveragePooling2D GlobalMaxPooling1D "
    "GlobalMaxPooling2D GlobalAveragePooling1D GlobalAveragePooling2D ZeroPadding1D ZeroPadding2D "
    "Cropping1D Cropping2D UpSampling1D UpSampling2D Resizing Dropout Identity RandomFlip RandomCrop"
).split()


# The verbs: each returns a model or the path of a file, which is to compute what the model does.


def fuse(model, x, folder):
    return at.fuse(model)


def sparsify(model, x, folder):
    return at.sparsify(model, min_sparsity=0.5)


def rebuild(model, x, folder):
    return at.layers.rebuild(model, lambda path, layer: None)


def functional(model, x, folder):
    return at.layers.functional(Subclassed(model), x)


class Subclassed(keras.Model):
    """A model that has no graph of layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.built = inner, True

    def call(self, x):
        return self.inner(x)


def prune(model, x, folder):
    at.prune(model, at.ConstantSparsity(0.0))
    at.strip_pruning(model)
    return model


def cluster(model, x, folder):
    at.cluster(model, 2**14)
    at.strip_clustering(model)
    return model


def remove_channels(model, x, folder):
    at.mask_channels(model, 0.5)
    return at.remove_channels(model)


def litert(model, x, folder):
    at.export.litert(model, folder / "float.tflite")
    return folder / "float.tflite"


def litert_of_one(model, x, folder):
    at.export.litert(model, folder / "one.tflite", batch_size=1)
    return folder / "one.tflite"


def onnx(model, x, folder):
    return at.export.onnx(model, folder / "float.onnx")


def saved_model(model, x, folder):
    return at.export.saved_model(model, folder / "saved")


def fused_and_saved(model, x, folder):
    return _reloaded(at.fuse(model), model, folder)


def sparsified_and_saved(model, x, folder):
    return _reloaded(at.sparsify(model, min_sparsity=0.5), model, folder)


def _reloaded(made, original, folder):
    """Returns a model once saved and loaded; or as it is, if Keras cannot load the original either."""
    if any(type(layer) is keras.layers.Lambda for _, layer in at.layers.walk(original)):
        return made
    made.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


IN_MEMORY = (fuse, sparsify, rebuild, functional, prune, cluster, remove_channels)
# The fraction of random models that a verb may refuse, each with a documented error.
REFUSALS = {
    **dict.fromkeys((fuse, sparsify, rebuild, functional), 0.1),
    **dict.fromkeys((fused_and_saved, sparsified_and_saved, saved_model), 0.1),
    # Models without kernels, without channels that nothing else needs; strings, tables and 3-d kernels.
    **dict.fromkeys((prune, cluster), 0.4),
    remove_channels: 0.9,
    **dict.fromkeys((litert, litert_of_one, onnx), 0.5),
}
# Of layers that have rules, so that most verbs find something to do.
FAMILIAR = (remove_channels, litert, litert_of_one, onnx)


def is_documented(error, model) -> bool:
    """Whether an error was raised by accel_tf, as documented, and says where and why."""
    if type(error) not in (ValueError, ImportError):
        return False
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    names = {layer.name for _, layer in at.layers.walk(model)} | set(ARGUMENTS)
    names |= {call.layer.name for call in at.layers.calls(model)} | {f"model '{model.name}'"}
    return (
        "accel_tf" in raised_in.parts[-4:]
        and any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error)) for name in names)
        and not any(raw in str(error) for raw in RAW)
    )


def check(verb, sample) -> str:
    """Applies a verb to a model, and compares what it made with the model as it was.

    Returns:
        `"same"`, or the message of a documented error.

    Raises:
        AssertionError: The error is no documented one, or outputs differ.
    """
    model, x = sample.model, sample.x
    expected, masks = run(model, x)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = verb(model, x, pathlib.Path(folder))
        except Exception as error:
            assert is_documented(error, model), f"{sample.origin}: {verb.__name__} raised"
            return str(error)
        if verb is remove_channels:  # The new model computes what the masked one does.
            expected, masks = run(model, x)
        if isinstance(made, keras.Model):
            got, masks_got = run(made, x)
            assert masks_got == masks, f"{sample.origin}: {verb.__name__} changed the mask"
        else:
            got = arrays_of(runtime_of(made).outputs(model, keras.tree.flatten(x)))
    assert [y.shape for y in got] == [y.shape for y in expected], sample.origin
    decibels = [sqnr(y, z) for y, z in zip(expected, got, strict=True)]
    assert min(decibels) >= LOSSLESS[sample.policy], f"{sample.origin}: {verb.__name__} {decibels}"
    return "same"


# Quantization: the reference is TensorFlow's own, on the same data.


def _int8(converter, data, io_dtype=tf.int8):
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = data
    if all(array.dtype == np.float32 for array in next(data()).values()):
        # As in our files: an input that is rounded, too, costs what it costs.
        converter.inference_input_type = converter.inference_output_type = io_dtype


def _int16(converter, data):
    _int8(converter, data, tf.int16)
    wide = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    converter.target_spec.supported_ops = [wide, tf.lite.OpsSet.TFLITE_BUILTINS]


# Each scheme, with what tells TensorFlow's converter the same, or the least SQNR in dB. TensorFlow
# leaves kernels of less than 1,024 weights in float where activations are. The least follows from
# WELL_POSED: rounding to float16 loses 72 dB more than to float32, to 8 bits 96 dB and to 4 bits all.
SCHEMES = {
    "int8": (at.Int8(), _int8),
    "int16x8": (at.Int16x8(), _int16),
    "int8 weights": (at.Int8Weights(), 14.0),
    "int4 weights": (at.Int4Weights(), 0.0),
    "float16": (at.Float16(), 38.0),
}


def reference(model, x, configure, path) -> list[np.ndarray] | None:
    """Returns the outputs of the file that TensorFlow's converter makes; `None` if it fails."""
    arrays = {t.name: a for t, a in zip(model.inputs, keras.tree.flatten(x), strict=True)}
    specs = {t.name: tf.TensorSpec((1, *t.shape[1:]), t.dtype, name=t.name) for t in model.inputs}

    def call(**tensors):
        given = [tensors[t.name] for t in model.inputs]
        outputs = model(keras.tree.pack_sequence_as(x, given), training=False)
        return {f"output_{i}": y for i, y in enumerate(keras.tree.flatten(outputs))}

    def data():
        for i in range(SAMPLES):
            yield {name: array[i : i + 1] for name, array in arrays.items()}

    module = tf.Module()
    module.call = tf.function(call, autograph=False)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            tf.saved_model.save(
                module, folder, signatures=module.call.get_concrete_function(**specs)
            )
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            configure(converter, data)
            path.write_bytes(converter.convert())
        return arrays_of(at.export.run_litert(path, arrays))
    except Exception:  # Whatever TensorFlow cannot convert is no reference.
        return None


def check_quantized(name, sample) -> str:
    """Quantizes a model, writes its file, and compares both with the model; returns as `check`."""
    model, x, what = sample.model, sample.x, f"{sample.origin}: {name}"
    scheme, standard = SCHEMES[name]
    expected, _ = run(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.tflite"
        try:
            quantized = at.calibrate(model, x, scheme, verbose=0)
            at.export.litert(quantized, path, data=x if name == "int16x8" else None)
        except Exception as error:
            assert is_documented(error, model), f"{what} raised"
            return str(error)
        got, _ = run(quantized, x)
        filed = arrays_of(runtime_of(path).outputs(model, keras.tree.flatten(x)))
        details = at.export.LiteRTRunner(path).outputs
        steps = [float(detail["quantization"][0]) for detail in details]
        if callable(standard):
            theirs = reference(model, x, standard, path)
            least = [sqnr(y, z) - MARGIN for y, z in zip(expected, theirs or (), strict=False)]
        else:
            least = [standard] * len(expected)
    assert all(map(np.array_equal, run(model, x)[0], expected)), f"{what} changed the model"
    for ours, ours_filed, step in zip(got, filed, steps, strict=True):
        off = np.abs(ours - ours_filed).max()
        if name == "int8":  # Outputs of a float island have no steps.
            assert off <= 1.01 * step or not step and sqnr(ours, ours_filed) > 30, f"{what}: {off}"
    for y, bound, step, *made in zip(expected, least, steps, got, filed, strict=False):
        for kind, z in zip(("model", "file"), made, strict=True):
            # Less than one step of the output is as good as an integer output gets.
            found = sqnr(y, z)
            assert found >= bound or np.abs(y - z).max() <= step, f"{what} {kind}: {found} dB"
    return "same"


# The tests: 300 models, and in the long form 5,040, `FULL` for each verb and for each scheme.

FULL = 280


def _each(name, body, count, refusals, only=None):
    """Calls `body` with `count` models, the same ones in each run.

    Args:
        name: What the models depend on, besides their number.
        refusals: The fraction of models for which the verb may raise a documented error.
        only: As for `random_model`.
    """
    refused = []

    def test(seed):
        answer = body(random_model(seed, only=only))
        if answer != "same":
            refused.append(answer)

    drawn = given(st.integers(0, 2**32 - 1))(test)
    limited = settings(max_examples=count, phases=[Phase.generate])(drawn)
    hypothesis.seed(zlib.crc32(name.encode()))(limited)()
    assert len(refused) <= refusals * count, "\n".join(refused)


@pytest.mark.parametrize("verb", REFUSALS, ids=lambda verb: verb.__name__)
def test_a_verb_preserves_the_function(verb):
    _each(
        verb.__name__,
        lambda sample: check(verb, sample),
        32 if verb in IN_MEMORY else 6,
        REFUSALS[verb],
        QUANTIZABLE if verb in FAMILIAR else None,
    )


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", REFUSALS, ids=lambda verb: verb.__name__)
def test_a_verb_preserves_the_function_of_many_models(verb):
    _each(verb.__name__, lambda sample: check(verb, sample), FULL, REFUSALS[verb])


@pytest.mark.parametrize("name", SCHEMES)
def test_quantization_is_as_good_as_tensorflows(name):
    count = 14 if name == "int8" else 4
    _each(name, lambda sample: check_quantized(name, sample), count, 0.3, QUANTIZABLE)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SCHEMES)
def test_quantization_of_many_models_is_as_good_as_tensorflows(name):
    _each(name, lambda sample: check_quantized(name, sample), FULL // 2, 0.3, QUANTIZABLE)


@pytest.mark.parametrize("name", SCHEMES)
def test_any_model_is_quantized_or_refused_in_words(name):
    _each(name, lambda sample: check_quantized(name, sample), 2, 1.0)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SCHEMES)
def test_any_of_many_models_is_quantized_or_refused_in_words(name):
    _each(name, lambda sample: check_quantized(name, sample), FULL // 2, 1.0)


# The generator


def test_every_layer_of_keras_is_drawn_or_left_out_for_a_reason():
    drawn = {layer for family in FAMILIES.values() for layer in family} | set(STARTING)
    every = {x for _, x in inspect.getmembers(L, inspect.isclass)}
    assert every == drawn | {getattr(L, name) for name in LEFT_OUT if hasattr(L, name)}
    assert not drawn & {getattr(L, name, None) for name in LEFT_OUT}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_draws_the_layers_that_it_names(family):
    shapes = {1: (4,), 2: (6, 3), 3: (5, 5, 3), 4: (3, 4, 4, 2), 5: (2, 3, 3, 3, 2)}
    for layer, (ranks, make) in FAMILIES[family].items():
        start = keras.Input(shapes[ranks[-1]])
        made = make(Draw(0), start.shape[1:])
        model = keras.Model(start, made(start))
        cells = [getattr(found, "cell", None) for _, found in at.layers.walk(model)]
        assert layer in {type(found) for _, found in at.layers.walk(model)} | {*map(type, cells)}


def test_a_seed_always_makes_the_same_model():
    one, other = random_model(3), random_model(3)
    assert one.model.get_config() == other.model.get_config()
    for a, b in zip(run(one.model, one.x)[0], run(other.model, other.x)[0], strict=True):
        np.testing.assert_array_equal(a, b)
