"""How to draw each layer of Keras with arguments that suit the shape of its input."""

import math

import keras
import numpy as np

L = keras.layers

COMMON_ACTIVATIONS = (None, "relu", "relu6", "sigmoid", "tanh", "softmax", "gelu", "silu", "elu")
OTHER_ACTIVATIONS = (
    "celu exponential hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid "
    "log_softmax mish relu selu soft_shrink softplus softsign sparse_plus sparse_sigmoid sparsemax "
    "squareplus tanh_shrink"
).split()


class Draw:
    """Random choices, all of which follow from a seed.

    Args:
        *seed: Non-negative integers.
        only: The names of the classes of layers to choose from; by default any.
    """

    def __init__(self, *seed: int, only=None):
        self.rng, self.only = np.random.default_rng(seed), only

    def allows(self, layer) -> bool:
        return self.only is None or layer.__name__ in self.only

    def chance(self, probability=0.5) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *options):
        return options[self.rng.integers(len(options))]

    def between(self, low, high) -> int:
        return int(self.rng.integers(low, high + 1))

    def units(self) -> int:
        return self.between(1, 6)

    def activation(self):
        common = self.only is not None or self.chance(0.8)
        return self.one_of(*(COMMON_ACTIVATIONS if common else OTHER_ACTIVATIONS))


def _window(d, s):
    """Returns a kernel size and a padding that fit the axes between batch and channels."""
    size = d.between(1, min(3, *s[:-1]))
    return size, d.one_of("valid", "same")


def _convolution(layer, **fixed):
    def make(d, s):
        size, padding = _window(d, s)
        if layer is L.Conv1D and d.chance(0.2):
            padding = "causal"
        stretch = d.one_of({}, {}, {"strides": 2})
        # TensorFlow's processor kernels do not dilate transposed convolutions.
        if padding != "valid" and "Transpose" not in layer.__name__ and d.chance(0.2):
            stretch = {"dilation_rate": 2}
        groups = {"groups": s[-1]} if _takes_groups(layer) and d.chance(0.1) else {}
        filters = {"filters": d.units() * groups.get("groups", 1)}
        if layer in (L.DepthwiseConv1D, L.DepthwiseConv2D):
            filters = {"depth_multiplier": d.between(1, 2)}
        options = {"activation": d.activation(), "use_bias": d.chance(0.8), "padding": padding}
        return layer(kernel_size=size, **filters, **options, **stretch, **groups, **fixed)

    return make


def _takes_groups(layer):
    return layer in (L.Conv1D, L.Conv2D, L.Conv3D)


def _einsum(d, s):
    letters = "bcdef"[: len(s)]
    out = d.units()
    bias = d.one_of(None, "z")
    equation = f"a{letters},{letters[-1]}z->a{letters[:-1]}z"
    return L.EinsumDense(equation, (*s[:-1], out), bias_axes=bias, activation=d.activation())


def _pooling(layer):
    def make(d, s):
        size, padding = _window(d, s)
        return layer(size, strides=d.one_of(None, 1, 2), padding=padding)

    return make


def _recurrent_options(d):
    return {
        "return_sequences": d.chance(0.6),
        "go_backwards": d.chance(0.2),
        "unroll": d.chance(0.1),
    }


def _recurrent(layer, **options):
    def make(d, s):
        more = {key: d.one_of(*values) for key, values in options.items()}
        more |= {"activation": d.one_of("tanh", "relu", "sigmoid"), "use_bias": d.chance(0.8)}
        return layer(d.units(), dropout=d.one_of(0.0, 0.2), **more, **_recurrent_options(d))

    return make


def _cells(layer):
    return lambda d, s: L.RNN(layer(d.units(), use_bias=d.chance(0.8)), **_recurrent_options(d))


def _stacked(d, s):
    cells = [d.one_of(L.LSTMCell, L.GRUCell, L.SimpleRNNCell)(d.units()) for _ in range(2)]
    return L.RNN(L.StackedRNNCells(cells), return_sequences=d.chance())


def _bidirectional(d, s):
    layer = d.one_of(L.LSTM, L.GRU, L.SimpleRNN)(d.units(), return_sequences=d.chance(0.6))
    return L.Bidirectional(layer, merge_mode=d.one_of("concat", "concat", "sum", "mul", "ave"))


def _conv_lstm(layer):
    def make(d, s):
        size, padding = _window(d, s[1:])
        sequences = d.chance()
        return layer(d.units(), size, padding=padding, return_sequences=sequences)

    return make


def _time_distributed(d, s):
    if len(s) == 2:
        inner = L.Dense(d.units(), activation=d.activation())
        if d.chance(0.3):
            inner = keras.Sequential([keras.Input(s[1:]), inner, L.LayerNormalization()])
    else:
        inner = d.one_of(L.Flatten(), L.Dense(d.units()), L.BatchNormalization())
    return L.TimeDistributed(inner)


def _spectral(d, s):
    if len(s) == 3:
        return L.SpectralNormalization(
            L.Conv2D(d.units(), d.between(1, min(s[:2])), padding="same")
        )
    return L.SpectralNormalization(L.Dense(d.units()))


def _attention(d, s):
    layer = L.MultiHeadAttention(
        d.between(1, 2),
        d.between(1, 4),
        value_dim=d.one_of(None, 3),
        use_bias=d.chance(0.8),
        dropout=d.one_of(0.0, 0.1),
    )
    causal = d.chance(0.3)
    return lambda x: layer(x, x, use_causal_mask=causal)


def _grouped_attention(d, s):
    layer = L.GroupQueryAttention(d.between(1, 4), 2, d.between(1, 2), use_bias=d.chance(0.8))
    return lambda x: layer(x, x)


def _scored(layer, **options):
    def make(d, s):
        attention = layer(**{key: d.one_of(*values) for key, values in options.items()})
        key = L.Dense(s[-1])
        return lambda x: attention([x, key(x)])

    return make


def _merging(layer, most=4):
    def make(d, s):
        merge = layer()
        others = [L.Dense(s[-1]) for _ in range(d.between(1, most - 1))]
        return lambda x: merge([x, *(other(x) for other in others)])

    return make


def _concatenation(d, s):
    merge = L.Concatenate(axis=d.one_of(-1, -1, len(s)))
    others = [L.Dense(d.units()) for _ in range(d.between(1, 3))]
    return lambda x: merge([x, *(other(x) for other in others)])


def _dot(d, s):
    other = L.Dense(s[-1])
    merge = L.Dot(axes=-1, normalize=d.chance(0.3))
    return lambda x: merge([x, other(x)])


def _batch_normalization(d, s):
    axis = -1 if d.chance(0.8) else d.between(1, len(s))
    return L.BatchNormalization(axis=axis, center=d.chance(0.8), scale=d.chance(0.8))


def _group_normalization(d, s):
    groups = d.one_of(*(n for n in range(1, s[-1] + 1) if s[-1] % n == 0))
    return L.GroupNormalization(groups)


def _prelu(d, s):
    return L.PReLU("random_uniform", shared_axes=list(range(1, len(s))) if d.chance() else None)


def _reshape(d, s):
    size = math.prod(s)
    factor = d.one_of(*(n for n in range(1, size + 1) if size % n == 0))
    return L.Reshape(d.one_of((factor, size // factor), (factor, -1), (size,), (factor, 1, -1)))


def _permute(d, s):
    return L.Permute(tuple(int(i) + 1 for i in d.rng.permutation(len(s))))


def _cropping(layer):
    return lambda d, s: layer(1 if min(s[:-1]) > 2 else 0)


def _adaptive(layer):
    return lambda d, s: layer(d.between(1, min(s[:-1])))


def _plain(layer, **options):
    return lambda d, s: layer(**{key: d.one_of(*values) for key, values in options.items()})


def _lambda(d, s):
    return L.Lambda(keras.ops.negative)


ANY, SPATIAL = (1, 2, 3, 4), (2, 3, 4)


def _by_rank(name, make, ranks=(2, 3, 4), **options):
    """Returns the layers that Keras has of a kind for one, two and three axes."""
    found = {f"{name}{rank - 1}D": rank for rank in ranks}
    return {
        getattr(L, key): ((rank,), make(getattr(L, key), **options)) for key, rank in found.items()
    }


FAMILIES = {
    "products": {
        L.Dense: (
            ANY,
            lambda d, s: L.Dense(d.units(), activation=d.activation(), use_bias=d.chance(0.8)),
        ),
        L.EinsumDense: (ANY, _einsum),
        L.SpectralNormalization: ((1, 2, 3), _spectral),
        **_by_rank("Conv", _convolution),
        **{
            getattr(L, f"Conv{n}DTranspose"): (
                (n + 1,),
                _convolution(getattr(L, f"Conv{n}DTranspose")),
            )
            for n in (1, 2, 3)
        },
        **_by_rank("DepthwiseConv", _convolution, (2, 3)),
        **_by_rank("SeparableConv", _convolution, (2, 3)),
    },
    "recurrent": {
        L.LSTM: ((2,), _recurrent(L.LSTM, recurrent_activation=("sigmoid", "hard_sigmoid"))),
        L.GRU: ((2,), _recurrent(L.GRU, reset_after=(True, False))),
        L.SimpleRNN: ((2,), _recurrent(L.SimpleRNN)),
        L.LSTMCell: ((2,), _cells(L.LSTMCell)),
        L.GRUCell: ((2,), _cells(L.GRUCell)),
        L.SimpleRNNCell: ((2,), _cells(L.SimpleRNNCell)),
        L.RNN: ((2,), _cells(L.LSTMCell)),
        L.StackedRNNCells: ((2,), _stacked),
        L.Bidirectional: ((2,), _bidirectional),
        L.TimeDistributed: ((2, 3), _time_distributed),
        L.ConvLSTM1D: ((3,), _conv_lstm(L.ConvLSTM1D)),
        L.ConvLSTM2D: ((4,), _conv_lstm(L.ConvLSTM2D)),
        L.ConvLSTM3D: ((5,), _conv_lstm(L.ConvLSTM3D)),
    },
    "attention": {
        L.MultiHeadAttention: ((2,), _attention),
        L.GroupQueryAttention: ((2,), _grouped_attention),
        L.Attention: (
            (2,),
            _scored(L.Attention, use_scale=(True, False), score_mode=("dot", "concat")),
        ),
        L.AdditiveAttention: ((2,), _scored(L.AdditiveAttention, use_scale=(True, False))),
    },
    "normalization": {
        L.BatchNormalization: (ANY, _batch_normalization),
        L.LayerNormalization: (
            ANY,
            _plain(L.LayerNormalization, center=(True, False), scale=(True, False)),
        ),
        L.GroupNormalization: (SPATIAL, _group_normalization),
        L.RMSNormalization: (ANY, _plain(L.RMSNormalization)),
        L.UnitNormalization: (ANY, _plain(L.UnitNormalization)),
        L.Rescaling: (ANY, _plain(L.Rescaling, scale=(0.5, -3.0), offset=(0.0, 1.5))),
    },
    "activations": {
        L.Activation: (ANY, lambda d, s: L.Activation(d.activation() or "linear")),
        L.ReLU: (
            ANY,
            _plain(L.ReLU, max_value=(None, 6.0, 1.5), negative_slope=(0.0, 0.1), threshold=(0.0,)),
        ),
        L.LeakyReLU: (ANY, _plain(L.LeakyReLU, negative_slope=(0.3, 0.01))),
        L.PReLU: (ANY, _prelu),
        L.ELU: (ANY, _plain(L.ELU, alpha=(1.0, 0.5))),
        L.Softmax: (ANY, _plain(L.Softmax, axis=(-1, -1, 1))),
        L.Lambda: (ANY, _lambda),
    },
    "pooling": {
        **_by_rank("MaxPooling", _pooling),
        **_by_rank("AveragePooling", _pooling),
        **_by_rank("GlobalMaxPooling", _plain, keepdims=(True, False)),
        **_by_rank("GlobalAveragePooling", _plain, keepdims=(True, False)),
        **_by_rank("AdaptiveMaxPooling", _adaptive),
        **_by_rank("AdaptiveAveragePooling", _adaptive),
    },
    "reshaping": {
        L.Flatten: (ANY, _plain(L.Flatten)),
        L.Reshape: (ANY, _reshape),
        L.Permute: (SPATIAL, _permute),
        L.RepeatVector: ((1,), lambda d, s: L.RepeatVector(d.between(1, 4))),
        **_by_rank("Cropping", _cropping),
        **_by_rank("ZeroPadding", _plain, padding=(1, 2)),
        L.UpSampling1D: ((2,), _plain(L.UpSampling1D, size=(1, 2))),
        L.UpSampling2D: (
            (3,),
            _plain(L.UpSampling2D, size=(1, 2), interpolation=("nearest", "bilinear")),
        ),
        L.UpSampling3D: ((4,), _plain(L.UpSampling3D, size=(1, 2))),
        L.Resizing: (
            (3,),
            _plain(L.Resizing, height=(3, 5), width=(4, 6), interpolation=("nearest", "bilinear")),
        ),
        L.CenterCrop: ((3,), _plain(L.CenterCrop, height=(1, 2), width=(1, 2))),
    },
    "merging": {
        **{
            layer: (ANY, _merging(layer))
            for layer in (L.Add, L.Multiply, L.Average, L.Maximum, L.Minimum)
        },
        L.Subtract: (ANY, _merging(L.Subtract, most=2)),
        L.Concatenate: (ANY, _concatenation),
        L.Dot: ((1, 2), _dot),
    },
    "regularization": {
        **{
            layer: (ANY, _plain(layer, rate=(0.2,)))
            for layer in (L.Dropout, L.AlphaDropout, L.GaussianDropout)
        },
        **_by_rank("SpatialDropout", _plain, rate=(0.2,)),
        L.GaussianNoise: (ANY, _plain(L.GaussianNoise, stddev=(0.3,))),
        L.ActivityRegularization: (ANY, _plain(L.ActivityRegularization, l1=(0.1,))),
        L.Identity: (ANY, _plain(L.Identity)),
        L.Masking: ((2,), _plain(L.Masking, mask_value=(0.0, 1.0))),
    },
    # In inference they return their input; RandomCrop its center.
    "augmentation": {
        **{
            getattr(L, name): ((3,), _plain(getattr(L, name), factor=(0.1, 0.3)))
            for name in (
                "RandomBrightness RandomColorDegeneration RandomContrast RandomElasticTransform "
                "RandomErasing RandomGaussianBlur RandomGrayscale RandomHue RandomInvert "
                "RandomPerspective RandomRotation RandomSaturation RandomSharpness RandAugment "
                "AugMix CutMix"
            ).split()
        },
        L.MixUp: ((3,), _plain(L.MixUp, alpha=(0.2,))),
        L.RandomColorJitter: ((3,), _plain(L.RandomColorJitter, brightness_factor=(0.2,))),
        L.RandomPosterization: ((3,), _plain(L.RandomPosterization, factor=(4,))),
        L.RandomFlip: ((3,), _plain(L.RandomFlip, mode=("horizontal", "vertical"))),
        L.RandomShear: ((3,), _plain(L.RandomShear, x_factor=(0.2,), y_factor=(0.1,))),
        L.RandomTranslation: (
            (3,),
            _plain(L.RandomTranslation, height_factor=(0.2,), width_factor=(0.1,)),
        ),
        L.RandomZoom: ((3,), _plain(L.RandomZoom, height_factor=(0.2,))),
        L.RandomCrop: ((3,), _plain(L.RandomCrop, height=(1, 2), width=(1, 2))),
    },
}
