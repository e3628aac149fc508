"""Replaces the pruned layers of a model by sparse ones."""

import math

import keras
import numpy as np

from .. import fusion, layers
from ..report import Entry, Report, attach, report_of
from . import _choice
from ._attention import (
    PROJECTIONS,
    SparseEinsumDense,
    SparseMultiHeadAttention,
    contraction,
    einsum_matrix,
)
from ._conv import SparseConv1D, SparseConv2D
from ._layers import SparseDense
from ._layout import HEIGHTS
from ._matrix import SparseMatrix

_CONVOLUTIONS = {keras.layers.Conv1D: SparseConv1D, keras.layers.Conv2D: SparseConv2D}
# What an axis of unknown length, such as that of a text, is taken for.
_UNKNOWN = 32


def sparsify(
    model: keras.Model,
    *,
    min_sparsity: float | str = "auto",
    format: str = "auto",
    batch_size: int = _choice.BATCH,
    fuse: bool = True,
    verify: bool = True,
) -> keras.Model:
    """Returns a copy of a pruned model whose sparse layers run on the compiled op.

    `Dense`, `Conv1D`, `Conv2D`, `EinsumDense` and `MultiHeadAttention` layers with enough zeros in
    their kernels become `SparseDense`, `SparseConv1D`, `SparseConv2D`, `SparseEinsumDense` and
    `SparseMultiHeadAttention`; all other layers are copied. Layers keep their names, weights, activations and regularizers; nested
    models are descended into, and a shared layer stays shared. A custom layer of pruned layers becomes
    a nested model of these if its `call` is made of layers, weights and `keras.ops`. The new model
    computes the same function, up to the rounding of sums. It is not compiled, and its pattern is
    fixed: what was pruned stays pruned if it is trained on.

    How many zeros are enough, and how the others are packed, is predicted for each layer by the
    `costs()` of the kernels. Those built in are of one host; `tune` measures yours.

    `accel_tf.report_of(new_model)` tells what became of each layer, and why.

    Args:
        model: A built functional or sequential model.
        min_sparsity: `"auto"`, or the fraction of zeros in [0, 1] from which a kernel is made sparse
            even if that is predicted to be slower.
        format: How to pack kernels, as in `SparseMatrix`; `"auto"` takes the fastest for each.
        batch_size: The number of samples per call to choose for.
        fuse: Whether to begin with `accel_tf.fuse`, by which normalizations and activations behind
            kernels become part of them. False keeps a `BatchNormalization` that is to be trained on.
        verify: Whether to compare the new model with `model` on a few samples made from its input
            specification.

    Returns:
        A new model of the same class and name.

    Raises:
        ValueError: An argument is out of range, `model` is not built, or it is subclassed; or the new
            model does not compute what `model` does, which is an error in accel_tf or in a custom layer.

    Example:

    >>> import keras, numpy as np, accel_tf as at
    >>> model = keras.Sequential([keras.Input((1024,)), keras.layers.Dense(1024, name="wide")])
    >>> kernel = np.zeros((1024, 1024), "float32"); kernel[::16] = 1
    >>> model.layers[0].set_weights([kernel, np.zeros(1024)])
    >>> fast = at.sparsify(model)
    >>> at.report_of(fast).done[0].note  # doctest: +ELLIPSIS
    'Dense (1024, 1024), 93.8 % zeros → SparseDense, ...× as fast by prediction'
    """
    if min_sparsity != "auto" and not 0 <= min_sparsity <= 1:
        raise ValueError(
            f"min_sparsity is 'auto' or a fraction of zeros in [0, 1]. Received: {min_sparsity!r}"
        )
    if format not in ("auto", *HEIGHTS):
        raise ValueError(
            f"format must be 'auto', {', '.join(map(repr, HEIGHTS))}. Received: {format!r}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive. Received: {batch_size!r}")
    layers.require_model(model, "sparsify")
    given = model
    if isinstance(model, keras.Sequential | layers.Functional):
        model = layers.expand(model, _graph_of)
    if fuse:
        model = fusion.fuse(model, verify=False)
    sparsifier = _Sparsifier(min_sparsity, format, batch_size)
    new_model = layers.rebuild(
        model,
        sparsifier.replace,
        on_failure=lambda path: sparsifier.skipped.append(Entry(path, layers.NOT_COPIED)),
    )
    for path, layer in layers.walk(model):
        if path not in sparsifier.seen and layer.weights and _obstacle(layer) is None:
            parent = path.rpartition("/")[0]
            note = f"it belongs to the layer {parent!r}, which is kept whole"
            sparsifier.skipped.append(Entry(path, note))
    fused = {path: f"; {note}" for path, note in report_of(model).done} if fuse else {}
    done, skipped = (
        tuple(Entry(path, note + fused.get(path, "")) for path, note in entries)
        for entries in (sparsifier.done, sparsifier.skipped)
    )
    note = layers.require_same("sparsify", given, new_model) if verify else ""
    attach(new_model, Report("sparsify", done, skipped, note))
    return new_model


class _Sparsifier:
    """Decides layer by layer, and keeps account."""

    def __init__(self, min_sparsity, format, batch_size):
        self.min_sparsity, self.batch_size = min_sparsity, batch_size
        self.formats = tuple(HEIGHTS) if format == "auto" else (format,)
        self.done: list[Entry] = []
        self.skipped: list[Entry] = []
        self.seen: set[str] = set()

    def replace(self, path, layer):
        """The layer to take the place of `layer`, or None."""
        self.seen.add(path)
        if type(layer) is keras.layers.MultiHeadAttention:
            return self._attention(path, layer)
        return self._layer(path, layer, _lead(layer))

    def _attention(self, path, attention):
        projections = {}
        for name, attribute in PROJECTIONS.items():
            layer = getattr(attention, attribute, None)
            if layer is None:
                continue
            self.seen.add(f"{path}/{layer.name}")
            # Queries may be fewer than keys; what is known of the layer's output is their number.
            new = self._layer(f"{path}/{layer.name}", layer, _lead(attention))
            if new is not None:
                projections[name] = new
        if not projections:
            return None
        new = SparseMultiHeadAttention.from_attention(attention, projections)
        new.trainable = attention.trainable
        return new

    def _layer(self, path, layer, lead):
        """The sparse form of a layer that is called on `lead` rows per sample, or None."""
        reason = _obstacle(layer)
        if reason is None:
            kernel = keras.ops.convert_to_numpy(layer.kernel).astype("float32")
            zeros = 1 - np.count_nonzero(kernel) / max(kernel.size, 1)
            what = f"{type(layer).__name__} {kernel.shape}, {zeros:.1%} zeros".replace("%", " %")
            matrix = SparseMatrix.from_dense(_as_matrix(layer, kernel))
            choice = self._choose(layer, matrix, lead * self.batch_size, zeros)
            speed = f"{choice.speedup:.1f}× as fast by prediction"
            if choice.format != "dense":
                new = _sparse(layer, matrix.with_format(choice.format))
                note = f"{what} → {type(new).__name__}, {choice.format}, {speed}"
                if layer.kernel_constraint is not None:
                    note += "; the kernel's constraint is dropped, as the pattern is fixed"
                self.done.append(Entry(path, note))
                return new
            if self.min_sparsity == "auto":
                reason = f"{what}: a sparse form would be {speed}"
            else:
                reason = f"{what}, less than min_sparsity = {self.min_sparsity:g}"
        if layer.weights and not isinstance(layer, keras.Model):
            self.skipped.append(Entry(path, reason))
        return None

    def _choose(self, layer, matrix, batch, zeros) -> _choice.Choice:
        formats = self.formats
        if self.min_sparsity == "auto":
            formats = ("dense", *formats)
        elif zeros < self.min_sparsity:
            return _choice.Choice("dense", 1)
        dense, extra = None, 0.0
        if type(layer) in _CONVOLUTIONS and math.prod(layer.kernel_size) > 1:
            costs = _choice.costs()
            dense = costs.convolve(batch, layer.kernel.shape)
            extra = costs.unroll(batch, matrix.shape[0])
        return matrix._pattern.choose(batch, formats=formats, dense=dense, extra=extra)


def _obstacle(layer) -> str | None:
    """Why `layer` has no sparse form; None if it has one."""
    kind = type(layer)
    if kind not in (keras.layers.Dense, keras.layers.EinsumDense, *_CONVOLUTIONS):
        return f"{kind.__name__} has no sparse form"
    if getattr(layer, "quantization_mode", None):
        return f"its kernel is quantized ({layer.quantization_mode})"
    if getattr(layer, "lora_enabled", False):
        return "it carries a LoRA update; merge it into the kernel first"
    if kind in _CONVOLUTIONS and (layer.groups != 1 or layer.data_format != "channels_last"):
        return (
            f"{kind.__name__} with groups={layer.groups}, data_format={layer.data_format!r}; only 1, "
            "'channels_last' has a sparse form"
        )
    if kind is keras.layers.EinsumDense:
        try:
            contraction(layer.equation, layer.bias_axes)
        except ValueError as error:
            return str(error)
    return None


def _graph_of(path, layer):
    """Returns what a custom layer computes, if there are pruned layers in it."""
    if type(layer).__module__.partition(".")[0] in ("keras", "accel_tf"):
        return None
    below = layer._flatten_layers(include_self=False)
    pruned = any(v.built and _obstacle(v) is None and _has_zeros(v.kernel) for v in below)
    return layer.call if pruned else None


def _has_zeros(kernel) -> bool:
    return not keras.ops.convert_to_numpy(kernel).all()


def _lead(layer) -> int:
    """How many products of a row with the kernel a call makes per sample: pixels, or tokens."""
    if not layer._inbound_nodes:
        return 1
    shape = layer._inbound_nodes[0].outputs[0].shape[1:-1]
    return math.prod(_UNKNOWN if size is None else size for size in shape)


def _as_matrix(layer, kernel) -> np.ndarray:
    if isinstance(layer, keras.layers.EinsumDense):
        return einsum_matrix(layer.equation, kernel)
    return kernel.reshape(-1, kernel.shape[-1])


def _sparse(layer, matrix):
    """The sparse layer that computes what `layer` does."""
    bias = None if layer.bias is None else keras.ops.convert_to_numpy(layer.bias)
    common = dict(
        bias=bias,
        activation=layer.activation,
        values_regularizer=layer.kernel_regularizer,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        activity_regularizer=layer.activity_regularizer,
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )
    if isinstance(layer, keras.layers.Dense):
        return SparseDense.from_matrix(matrix, **common)
    if isinstance(layer, keras.layers.EinsumDense):
        shape = layer.partial_output_shape
        return SparseEinsumDense.from_matrix(matrix, layer.equation, shape, **common)
    return _CONVOLUTIONS[type(layer)].from_matrix(
        matrix,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        **common,
    )
