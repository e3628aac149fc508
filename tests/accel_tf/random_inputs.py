"""Random inputs of Keras models, with the layers that stand at the start of a model only."""

import keras
import numpy as np

L = keras.layers

SAMPLES = 32
WORDS = np.array("a bee sees the sea and the ant sees a tree in the wind".split())

# The layers that the functions below put at the start.
STARTING = (
    *(L.InputLayer, L.Embedding, L.ReversibleEmbedding, L.Normalization, L.Discretization),
    *(L.StringLookup, L.IntegerLookup, L.TextVectorization, L.CategoryEncoding, L.Hashing),
    *(L.HashedCrossing, L.MelSpectrogram, L.STFTSpectrogram, L.AutoContrast, L.Equalization),
    *(L.Solarization, L.ContrastLimitedAdaptiveHistogramEqualization),
)

# Each function returns the pairs of symbolic input and array, and the tensor to go on with.


def _input(d, array, dtype="float32"):
    name = f"{d.one_of('alpha', 'beta', 'omega')}_{d.between(0, 10**6)}"
    return keras.Input(array.shape[1:], dtype=dtype, name=name), array


def _shaped(*shape):
    def start(d):
        factor = d.one_of(1.0, 1.0, 20.0)
        tensor, array = _input(d, (d.rng.normal(size=(SAMPLES, *shape)) * factor).astype("float32"))
        return [(tensor, array)], tensor if factor == 1 else L.Rescaling(1 / factor)(tensor)

    return start


def _normalized(d):
    shape = d.one_of((4,), (6, 3), (5, 5, 3))
    array = d.rng.normal(100, 50, (SAMPLES, *shape)).astype("float32")
    layer = L.Normalization(axis=d.one_of(-1, -1, None))
    layer.adapt(array)
    tensor, _ = _input(d, array)
    return [(tensor, array)], layer(tensor)


def _pixels(d):
    layer = d.one_of(
        L.Rescaling(1 / 255),
        L.AutoContrast(),
        L.Equalization(),
        L.Solarization(threshold_factor=0.5),
        L.ContrastLimitedAdaptiveHistogramEqualization(tile_grid_size=(2, 2)),
    )
    array = d.rng.integers(0, 256, (SAMPLES, 6, 6, 3)).astype("float32")
    tensor, _ = _input(d, array)
    y = layer(tensor)
    return [(tensor, array)], y if isinstance(layer, L.Rescaling) else L.Rescaling(1 / 255)(y)


def _waveform(d):
    layer = d.one_of(
        L.MelSpectrogram(8, 4, num_mel_bins=3, sampling_rate=100, min_freq=5.0),
        L.STFTSpectrogram(mode=d.one_of("log", "magnitude"), frame_length=8, frame_step=4),
    )
    tensor, array = _input(d, d.rng.normal(size=(SAMPLES, 32)).astype("float32"))
    is_mel = isinstance(layer, L.MelSpectrogram)
    return [(tensor, array)], layer(tensor if is_mel else L.Reshape((32, 1))(tensor))


def _embedded(d, tokens, count):
    options = {"mask_zero": d.chance(0.6)}
    layer = L.ReversibleEmbedding if d.chance(0.15) else L.Embedding
    return layer(count, d.between(2, 5), **options)(tokens)


def _tokens(d):
    array = d.rng.integers(1, 9, (SAMPLES, 5)).astype("int32")
    array[np.arange(5) >= d.rng.integers(1, 6, (SAMPLES, 1))] = 0  # texts of various lengths
    tensor, _ = _input(d, array, "int32")
    return [(tensor, array)], _embedded(d, tensor, 9)


def _looked_up(d, layer, mode, array, dtype):
    """The rest of the way from entries of a vocabulary to numbers."""
    layer.adapt(array)
    tensor, _ = _input(d, array, dtype)
    y = layer(tensor)
    if mode == "int":
        y = _embedded(d, y, layer.vocabulary_size())
    return [(tensor, array)], y


def _words(d):
    mode = d.one_of("int", "multi_hot", "count", "tf_idf")
    array = d.rng.choice(WORDS, (SAMPLES, 4))
    layer = L.StringLookup(output_mode=mode, mask_token="" if mode == "int" else None)
    return _looked_up(d, layer, mode, array, "string")


def _numbers(d):
    mode = d.one_of("int", "multi_hot", "count", "tf_idf")
    layer = L.IntegerLookup(output_mode=mode, mask_token=0 if mode == "int" else None)
    array = d.rng.choice([3, 5, 8, 1000], (SAMPLES, 4)).astype("int64")
    return _looked_up(d, layer, mode, array, "int64")


def _text(d):
    mode = d.one_of("int", "multi_hot", "count", "tf_idf")
    length = {"output_sequence_length": 5} if mode == "int" else {}
    layer = L.TextVectorization(output_mode=mode, **length)
    array = np.array([" ".join(d.rng.choice(WORDS, d.between(1, 7))) for _ in range(SAMPLES)])
    return _looked_up(d, layer, mode, array, "string")


def _bins(d):
    array = d.rng.normal(size=(SAMPLES, 3)).astype("float32")
    layer = L.Discretization(num_bins=4, output_mode=d.one_of("int", "one_hot", "multi_hot"))
    layer.adapt(array)
    tensor, _ = _input(d, array)
    y = layer(tensor)
    return [(tensor, array)], L.Embedding(4, 3)(y) if layer.output_mode == "int" else y


def _hashed(d):
    array = d.rng.choice(WORDS, (SAMPLES, 3))
    tensor, _ = _input(d, array, "string")
    return [(tensor, array)], L.Embedding(6, 3)(L.Hashing(6)(tensor))


def _crossed(d):
    arrays = [d.rng.choice(WORDS[:4], (SAMPLES, 1)) for _ in range(2)]
    pairs = [_input(d, array, "string") for array in arrays]
    return pairs, L.HashedCrossing(7, output_mode="one_hot")([tensor for tensor, _ in pairs])


def _encoded(d):
    tensor, array = _input(d, d.rng.integers(0, 5, (SAMPLES, 3)).astype("int32"), "int32")
    encoded = L.CategoryEncoding(5, output_mode=d.one_of("multi_hot", "count"))(tensor)
    return [(tensor, array)], encoded


PLAIN_STARTS = (
    *(_shaped(4), _shaped(6, 3), _shaped(6, 3), _shaped(5, 5, 3), _shaped(5, 5, 3)),
    *(_tokens, _tokens, _tokens, _normalized, _normalized),
)
STARTS = (
    *(*PLAIN_STARTS, _shaped(3, 4, 4, 2), _shaped(2, 3, 3, 3, 2), _words, _numbers, _text, _bins),
    *(_pixels, _waveform, _hashed, _crossed, _encoded),
)
