"""Zeros and clusters of a model that is quantized, kept while it is trained on and in its file.

A pruned or clustered model may have been stripped, or come from a file: nothing but its weights tells
then what they were trained to be. So zeros and clusters are found in the weights, and constraints
like those of `prune` and `cluster` hold them in the quantized model.
"""

import keras
import numpy as np
import tensorflow as tf

from accel_tf import layers as graphs
from accel_tf.clustering import ClusterConstraint, constraint_of
from accel_tf.pruning._constraint import MaskConstraint, Scores, local_variable
from accel_tf.quantization._fake import frozen
from accel_tf.quantization._weights import round_weights, straight_through

_L = keras.layers
# A share of exact zeros that training does not leave by itself.
_SPARSE = 0.1
# As many values as 8 bits have; fewer where numbers have half the bits, and coincide by chance.
_MOST_CLUSTERS = 256
_MOST_OF_HALF = 64
# The convolutions whose kernel takes in a BatchNormalization and still holds the same integers.
_FOLDING = (_L.Conv2D, _L.DepthwiseConv2D)


def keep(model: keras.Model) -> dict[str, str]:
    """Puts constraints on the weights of `model`, a quantized one, that hold zeros and clusters.

    Returns:
        What is kept in each layer, for its report, by the layer's path.
    """
    notes, clusters = {}, False
    for path, v in _kernels(model):
        zeros, values = _found(v)
        if not (zeros or values):
            continue
        hold(v, bool(zeros), values)
        clusters |= bool(values)
        kept = [f"{zeros / v.shape.num_elements():.0%} zeros"] if zeros else []
        kept += [f"{values} clusters"] if values else []
        notes.setdefault(path, []).append(f"{v.name}: {' and '.join(kept)} kept")
    if clusters:
        for _, layer in graphs.walk(model):
            if not isinstance(layer, _L.BatchNormalization) or not _is_positive(layer):
                continue
            if layer.gamma.constraint is None:
                # A factor below zero would fold into negated integers, further values of the kernel.
                layer.gamma_constraint = layer.gamma.constraint = Positive()
    return {path: ", ".join(parts) for path, parts in notes.items()}


def hold(variable, zeros: bool, clusters: int, now: bool = True) -> None:
    """Holds the zeros and clusters that a weight has, in place of what held them before.

    Args:
        variable: The Keras variable.
        zeros: Whether zeros stay zero.
        clusters: The number of its values, zero among them; 0 if it has no clusters.
        now: Whether it has its values already; if not, they are taken when training starts.
    """
    if zeros:
        MaskConstraint.attach(KeptZeros(variable, now), variable)
    if clusters:
        ClusterConstraint.attach(variable, clusters, seed=0, now=now)


def hold_again(layer: keras.Layer, kept: list[list]) -> None:
    """Holds in a new layer what `held` returned of one, once it has got its weights."""
    for position, zeros, clusters in kept:
        hold(layer.weights[position], zeros, clusters, now=False)


def held(layer: keras.Layer) -> list[list]:
    """Returns what is held in the weights of a layer, to be saved with it.

    Returns:
        For each such weight its position among `layer.weights`, and what `hold` takes.
    """
    weights = [
        [i, isinstance(v.constraint, MaskConstraint), clusters_of(v)]
        for i, v in enumerate(layer.weights)
    ]
    return [entry for entry in weights if any(entry[1:])]


def clusters_of(variable) -> int:
    """Returns how many values the weights of a Keras variable share; 0 if it is not clustered."""
    constraint = constraint_of(variable)
    return constraint.clusters if constraint else 0


def catch_up(variable) -> None:
    """Takes the zeros and clusters from the weights as they are, if that is still to be done."""
    if tf.inside_function():
        return  # the constraints do it when a step is traced
    mask = variable.constraint
    if isinstance(mask, MaskConstraint) and isinstance(mask.masks, KeptZeros):
        mask.masks.catch_up()
    if constraint := constraint_of(variable):
        constraint.catch_up()


def can_fold(layer: keras.Layer, normalization: keras.Layer) -> bool:
    """Whether the kernel of `layer` stays what it is when `normalization` is folded into it.

    One of clusters is written with the same integers in each channel, in channels of different
    scales. The converter folds into that only for convolutions, and only by positive factors.
    """
    if not any(is_kernel(v) and _found(v)[1] for v in layer.weights):
        return True
    return type(layer) in _FOLDING and (not normalization.scale or _is_positive(normalization))


def round_clusters(variable, wrapper: keras.Layer, axes) -> tf.Tensor:
    """Returns the values of a clustered weight rounded to the format of its layer's scheme.

    For `Int8`, each cluster becomes one integer of a single grid. Scales for each channel would make
    it as many integers as there are channels, and a BatchNormalization that is folded would do so
    again. The gradient passes straight through.

    Args:
        variable: The Keras variable.
        wrapper: The `QuantizedLayer` that it belongs to.
        axes: As for `round_weights`.
    """
    scheme = wrapper.scheme
    if scheme.weight_type != "int" or scheme.activation_bits != 8:
        return round_weights(variable.value, scheme, axes)
    return round_on_one_grid(variable, wrapper)


def round_on_one_grid(variable, wrapper: keras.Layer) -> tf.Tensor:
    """Returns the values of a weight rounded to 8 bits with one scale for all of them.

    It is an operator of quantization here, not plain arithmetic, since the converter takes its
    integers as they are, where it would find a scale for each channel in constants. The gradient
    passes straight through.

    Args:
        variable: The Keras variable.
        wrapper: The `QuantizedLayer` that it belongs to.
    """
    return straight_through(
        lambda w: _one_grid(w, variable, wrapper), tf.convert_to_tensor(variable.value)
    )


def _one_grid(w, variable, wrapper):
    layer, x = wrapper.layer, tf.cast(w, tf.float32)
    limit = tf.maximum(tf.reduce_max(tf.abs(x)), 1e-12)
    if frozen():
        with tf.init_scope():  # A converter wants a constant.
            limit = float(np.max(np.abs(_float32(variable)), initial=1e-12))
    options = {"num_bits": wrapper.scheme.weight_bits, "narrow_range": True}
    if type(layer) in _FOLDING and wrapper.output_mode is None and wrapper.scheme.per_channel:
        # Equal limits for each channel: into what has one limit, no normalization is folded.
        inputs = x.shape[2] if type(layer) is _L.Conv2D else 1  # depthwise as in the file
        x = tf.reshape(x, (*x.shape[:2], inputs, -1))
        limits = tf.fill(x.shape[-1:], limit)
        y = tf.quantization.fake_quant_with_min_max_vars_per_channel(x, -limits, limits, **options)
        return tf.cast(tf.reshape(y, w.shape), w.dtype)
    # Axes in the order of the file: the converter would move them behind the quantization, and loses
    # the integers on the way if the layer is called twice.
    order = range(len(x.shape))
    if type(layer) is _L.Conv2D:
        order = (3, 0, 1, 2)
    elif len(order) == 2 and variable.name.endswith("kernel"):
        order = (1, 0)
    y = tf.transpose(x, order)
    y = tf.quantization.fake_quant_with_min_max_vars(y, -limit, limit, **options)
    return tf.cast(tf.transpose(y, np.argsort(order)), w.dtype)


class KeptZeros:
    """The mask of one weight, in place of the `Masks` of `prune`: what is zero stays zero.

    Args:
        variable: The Keras variable.
        now: Whether it has its values already; if not, `catch_up` takes them.
    """

    unfinished = ""  # as there is no schedule
    scores = Scores()  # of no use here: nothing is decided

    def __init__(self, variable, now: bool = True):
        self._variable, self._pending = variable, not now
        mask = _float32(variable) != 0 if now else np.ones(variable.shape, bool)
        self._mask = local_variable(tf.constant(mask), "kept_zeros", variable)
        self.masks = {id(variable): self._mask}

    def remove(self, variable) -> None:
        """Leaves the weight to another verb: nothing to do, as it shares its mask with none."""

    def update(self, variable) -> None:
        """Follows weights that were restored, before the step that is traced."""
        if tf.inside_function():
            with tf.init_scope():
                self._pending = True
                self.catch_up()

    def catch_up(self) -> None:
        """Takes the zeros of the weight as it is, if that is still to be done."""
        if self._pending:
            self._pending = False
            self._mask.assign(_float32(self._variable) != 0)


@keras.saving.register_keras_serializable(package="accel_tf")
class Positive(keras.constraints.Constraint):
    """Keeps weights from zero up, just above it: a folded scale must not vanish."""

    def __call__(self, w):
        return keras.ops.maximum(w, 1e-4)


def _kernels(model):
    """Yields the path of the layer, a whole one of the graph, and each kernel or table in it once."""
    seen = set()
    for path, layer in graphs.walk(model):
        if isinstance(layer, keras.Model):
            continue
        for v in layer.weights:
            if id(v) not in seen and is_kernel(v):
                yield path, v
            seen.add(id(v))


def is_kernel(v) -> bool:
    """Whether a Keras variable is a kernel or a table, by its name, its rank and its dtype."""
    named = v.name.endswith(("kernel", "embeddings"))
    return named and len(v.shape) >= 2 and keras.backend.is_float_dtype(v.dtype)


def _found(v) -> tuple[int, int]:
    """Returns how many zeros are to be kept in a kernel, and how many values; 0 for none."""
    w = _float32(v).ravel()
    alive = w[w != 0]
    zeros = w.size - alive.size
    clustered = _are_few(alive, exact=v.dtype == "float32")
    if not alive.size or zeros < (1 if clustered else _SPARSE * w.size):
        zeros = 0
    return zeros, np.unique(alive).size + bool(zeros) if clustered else 0


def _are_few(numbers, exact: bool) -> bool:
    """Whether numbers share so few values that it is no coincidence; `exact` ones never coincide."""
    most = (_MOST_CLUSTERS if exact else _MOST_OF_HALF) - 1
    if numbers.size < 8 or np.unique(numbers[:4096]).size > most:
        return False
    values = np.unique(numbers).size
    return 2 <= values <= min(most, numbers.size - 1 if exact else numbers.size // 2)


def _is_positive(normalization) -> bool:
    return normalization.scale and bool((_float32(normalization.gamma) > 0).all())


def _float32(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32"))
