"""Observers that look at all values, not only at the extremes: percentile, squared error, entropy.

They share one state: how many values fell into each of `BINS` equal bins of [−limit, limit], where
the limit is a power of two. When larger values come, the limit doubles and each two bins become one,
which is exact, so the counts do not depend on the order of the batches.
"""

import dataclasses

import keras
import tensorflow as tf

from accel_tf.quantization._observers import Observer, remember_extremes

BINS = 4096
_HALF = BINS // 2


class HistogramObserver(Observer):
    """Counts values in equal bins, and clips them where a subclass finds it best.

    Training computes with what was found so far, so each batch pays for the search; it takes about
    a millisecond for each tensor, more than `MinMax`, and is meant for `calibrate`.
    """

    def build(self, layer):
        layer.state("counts", (BINS,))
        for name in ("limit", "smallest", "largest", "low", "high", "weight"):
            layer.state(name)

    def observe(self, layer, x):
        low, high, valid = layer.extremes(x)
        smallest, largest = remember_extremes(layer, low, high, valid, ("smallest", "largest"))
        old, counts = layer.limit.value, layer.counts.value
        # Not below 1e-12, so that zeros alone fall into a bin, too.
        limit = power_of_two_above(tf.maximum(tf.maximum(largest, -smallest), 1e-12))
        width = limit / _HALF
        # Each doubling halves the distance of a bin from the middle.
        doublings = tf.minimum(_exponent(limit) - _exponent(old), 31)
        merged = tf.bitwise.right_shift(tf.range(BINS) - _HALF, doublings) + _HALF
        counts = tf.math.unsorted_segment_sum(counts, merged, BINS)
        new = layer.over_replicas(_count(tf.cast(tf.floor(x / width), tf.int32) + _HALF))
        counts += tf.where(valid, new, 0.0)
        layer.limit.assign(limit)
        layer.counts.assign(counts)

        found = self.search(counts, width, smallest, largest, layer)
        for state, value in zip((layer.low, layer.high), found, strict=True):
            state.assign(value)

    def search(self, counts, width, smallest, largest, layer) -> tuple:
        """Returns `(low, high)` for a histogram of bins of a width and the extremes of all values."""
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Percentile(HistogramObserver):
    """Clips a given share of the values at each end, so that a few outliers do not set the scale.

    Args:
        percentile: How many percent of all values lie below the upper end, above 50 and up to 100;
            as many lie above the lower end. It is exact to a bin, about a thousandth of the range.

    Raises:
        ValueError: `percentile` is not above 50 and at most 100.

    Example:

    >>> import numpy as np
    >>> from accel_tf.quantization import FakeQuantize, Percentile
    >>> quantize = FakeQuantize(observer=Percentile(99.0))
    >>> _ = quantize(np.linspace(0.0, 1.0, 1001), training=True)
    >>> round(quantize.range[1], 2)
    0.99

    Reference:
        Wu et al., "Integer quantization for deep learning inference", arXiv:2004.09602, section 4.2.
    """

    percentile: float = 99.99

    def __post_init__(self):
        if not 50 < self.percentile <= 100:
            raise ValueError(
                "Percentile needs a percentile above 50 and at most 100, received "
                f"percentile={self.percentile!r}."
            )

    def search(self, counts, width, smallest, largest, layer):
        share = tf.constant(1.0 - self.percentile / 100, tf.float64)
        low = -_quantile(counts[::-1], share, width)
        high = _quantile(counts, share, width)
        # Inside a bin they are guesses, which must not pass what is known.
        return tf.clip_by_value(low, smallest, largest), tf.clip_by_value(high, smallest, largest)


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class MSE(HistogramObserver):
    """Clips where the squared error of rounding and clipping together is the smallest.

    A wider range clips less and rounds more coarsely. The range is [−t, t], or what the values
    take of it, for the best t of 128, from the largest magnitude down to a 64th of it.

    Example:

    >>> import numpy as np
    >>> from accel_tf.quantization import FakeQuantize, MSE
    >>> values = np.append(np.linspace(0.0, 1.0, 10_000), 4.0)
    >>> quantize = FakeQuantize(bits=4, observer=MSE())
    >>> _ = quantize(values, training=True)
    >>> 0.9 < quantize.range[1] < 1.5  # the outlier is clipped, for 15 fine steps
    True

    Reference:
        Banner et al., "Post training 4-bit quantization of convolutional networks for rapid
        deployment", NeurIPS 2019, section 3, which has the error in closed form.
    """

    def search(self, counts, width, smallest, largest, layer):
        ends = tf.maximum(largest, -smallest) * 2.0 ** tf.linspace(-6.0, 0.0, 128)[:, None]
        low, high = layer.grid(tf.maximum(-ends, smallest), tf.minimum(ends, largest))
        step = (high - low) / (2**layer.bits - 1 - layer.symmetric)
        centers = (tf.range(-_HALF, _HALF, dtype=tf.float32) + 0.5) * width
        low = tf.round(low / step) * step
        high = low + (2**layer.bits - 1 - layer.symmetric) * step
        rounded = tf.clip_by_value(tf.round(centers / step) * step, low, high)
        # The bin at 0 holds the zeros of a ReLU, which are on every grid.
        weights = tf.where(tf.range(BINS) == _HALF, 0.0, counts)
        errors = tf.linalg.matvec(tf.square(rounded - centers), weights)
        # Of equal ones the last, so that nothing is clipped in vain.
        best = tf.gather(ends[::-1, 0], tf.argmin(errors[::-1]))
        return tf.maximum(-best, smallest), tf.minimum(best, largest)


@keras.saving.register_keras_serializable(package="accel_tf")
@dataclasses.dataclass(frozen=True)
class Entropy(HistogramObserver):
    """Clips where the distribution of the rounded magnitudes diverges least from the original's.

    It is the calibration of TensorRT: each of many clipping points is judged by the Kullback–Leibler
    divergence of the histogram of magnitudes, clipped, from the same in 2^(bits−1) levels. It tends
    to clip more than `MSE`. As in NVIDIA's code, the bin at 0 counts as its neighbour: a ReLU's many
    zeros are exact on every grid.

    Example:

    >>> import numpy as np
    >>> from accel_tf.quantization import Entropy, FakeQuantize
    >>> rng = np.random.default_rng(0)
    >>> quantize = FakeQuantize(observer=Entropy())
    >>> _ = quantize(np.append(rng.normal(size=100_000), 20.0), training=True)
    >>> 3.0 < quantize.range[1] < 10.0
    True

    Reference:
        Migacz, "8-bit inference with TensorRT", GPU Technology Conference 2017, slides 26–38.
    """

    def search(self, counts, width, smallest, largest, layer):
        magnitudes = counts[_HALF:] + counts[_HALF - 1 :: -1]
        magnitudes = tf.concat([magnitudes[1:2], magnitudes[1:]], 0)
        levels = min(2 ** (layer.bits - 1), _HALF // 2)
        # How many bins each candidate keeps, one in a row; as TensorRT, from one bin for a level.
        kept = tf.range(levels, _HALF + 1, max(1, (_HALF - levels) // 120))
        best = tf.gather(kept, tf.argmin(_divergence(magnitudes, kept, levels)))
        best = tf.cast(best, tf.float32) * width
        return tf.maximum(-best, smallest), tf.minimum(best, largest)


def _divergence(counts, kept, levels):
    """Returns the Kullback–Leibler divergence of rounding to `levels`, for each number of bins."""
    candidates, bins = tf.shape(kept)[0], tf.range(_HALF)
    inside = bins < kept[:, None]
    total = tf.cumsum(counts)
    clipped = total[-1] - tf.gather(total, kept - 1)
    original = tf.where(inside, counts, 0.0)
    reference = original + tf.where(bins == kept[:, None] - 1, clipped[:, None], 0.0)
    # Each level's values are spread evenly over those of its bins that are not empty.
    level = bins * levels // kept[:, None]
    segment = tf.where(inside, level + levels * tf.range(candidates)[:, None], -1)
    full = reference > 0
    sums, sizes = (
        tf.math.unsorted_segment_sum(values, segment, candidates * levels)
        for values in (original, tf.cast(full, tf.float32))
    )
    mean = tf.gather(sums / tf.maximum(sizes, 1.0), tf.maximum(segment, 0))
    p = reference / tf.maximum(tf.reduce_sum(reference, 1, keepdims=True), 1.0)
    q = tf.where(full, mean, 0.0)
    q /= tf.maximum(tf.reduce_sum(q, 1, keepdims=True), 1e-12)
    # A bin of outliers alone has no mass in q; the small constant makes that dear, not infinite.
    logs = tf.math.log(tf.where(full, p, 1.0)) - tf.math.log(tf.where(full, q, 1.0) + 1e-9)
    return tf.reduce_sum(p * logs, 1)


def _quantile(counts, share, width):
    """Returns where the last `share` of the values begins, linear inside a bin."""
    # Many small numbers are added to large ones, and a share may be one in a million.
    counts = tf.cast(counts, tf.float64)
    after = tf.cumsum(counts, reverse=True, exclusive=True)
    target = share * tf.reduce_sum(counts)
    bin_ = tf.argmax(tf.cast(after <= target, tf.int32), output_type=tf.int32)
    beyond, here = tf.gather(after, bin_), tf.gather(counts, bin_)
    inside = (target - beyond) / tf.maximum(here, 1.0)
    edge = tf.cast(bin_ + 1 - _HALF, tf.float64) - tf.minimum(inside, 1.0)
    return tf.cast(edge, tf.float32) * width


def _count(indices):
    """Returns how often each bin occurs, as float32; other indices go to the first and last."""
    indices = tf.clip_by_value(tf.reshape(indices, [-1]), 0, BINS - 1)
    # tf.math.bincount computes the number of bins, which XLA has to know.
    return tf.raw_ops.DenseBincount(input=indices, size=BINS, weights=tf.zeros(0))


def power_of_two_above(x):
    """Returns the smallest power of two that is larger than a float32 ≥ 0, exactly."""
    return tf.bitcast(tf.bitwise.left_shift(tf.minimum(_exponent(x) + 1, 254), 23), tf.float32)


def _exponent(x):
    """Returns the biased exponent of a float32 ≥ 0: 127 for 1.0."""
    return tf.bitwise.right_shift(tf.bitcast(x, tf.int32), 23)
