"""Replaces the pruned layers of a model by sparse ones."""

import keras
import numpy as np

from .. import layers
from ..report import Entry, Report, attach
from ._layers import SparseDense
from ._matrix import SparseMatrix


def sparsify(model: keras.Model, *, min_sparsity: float = 0.8) -> keras.Model:
    """Returns a copy of a pruned model whose sparse layers run on the compiled op.

    `Dense` and 1×1 `Conv2D` layers with enough zeros in their kernel become `SparseDense`; all
    other layers are copied. Layers keep their names, weights, activations and regularizers; nested
    models are descended into, and a shared layer stays shared. The new model computes the same
    function, up to the rounding of sums. It is not compiled, and its pattern is fixed: what was
    pruned stays pruned if it is trained on.

    `accel_tf.report_of(new_model)` tells what became of each layer, and why.

    Args:
        model: A built functional or sequential model.
        min_sparsity: The fraction of zeros in [0, 1] from which a kernel is made sparse. Below about
            0.8 the dense product is faster on most hosts.

    Returns:
        A new model of the same class and name.

    Raises:
        ValueError: `min_sparsity` is out of range, `model` is not built, or it is subclassed.

    Example:

    >>> import keras, numpy as np, accel_tf as at
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8, name="head")])
    >>> kernel = np.zeros((64, 8), "float32"); kernel[::16] = 1
    >>> model.layers[0].set_weights([kernel, np.zeros(8)])
    >>> fast = at.sparsify(model)
    >>> print(at.report_of(fast))
    sparsify: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  -----------------------------------------
    head   yes      Dense (64, 8), 93.8 % zeros → SparseDense
    """
    if not 0 <= min_sparsity <= 1:
        raise ValueError(
            f"min_sparsity is a fraction of zeros in [0, 1]. Received: {min_sparsity!r}"
        )
    layers.require_model(model, "sparsify")
    done: list[Entry] = []
    skipped: list[Entry] = []
    seen: set[str] = set()

    def replace(path, layer):
        seen.add(path)
        reason = _obstacle(layer)
        if reason is None:
            kernel = keras.ops.convert_to_numpy(layer.kernel).astype("float32")
            zeros = 1 - np.count_nonzero(kernel) / max(kernel.size, 1)
            what = f"{type(layer).__name__} {kernel.shape}, {zeros:.1%} zeros".replace("%", " %")
            if zeros >= min_sparsity:
                note = f"{what} → SparseDense"
                if layer.kernel_constraint is not None:
                    note += "; the kernel's constraint is dropped, as the pattern is fixed"
                done.append(Entry(path, note))
                return _sparse(layer, kernel)
            reason = f"{what}, less than min_sparsity = {min_sparsity:g}"
        if layer.weights and not isinstance(layer, keras.Model):
            skipped.append(Entry(path, reason))
        return None

    new_model = layers.rebuild(model, replace)
    for path, layer in layers.walk(model):
        if path not in seen and layer.weights and _obstacle(layer) is None:
            parent = path.rpartition("/")[0]
            skipped.append(Entry(path, f"it belongs to the layer {parent!r}, which is kept whole"))
    attach(new_model, Report("sparsify", tuple(done), tuple(skipped)))
    return new_model


def _obstacle(layer) -> str | None:
    """Why `layer` cannot become a SparseDense; None if it can."""
    kind = type(layer)
    if kind not in (keras.layers.Dense, keras.layers.Conv2D):
        return f"{kind.__name__} has no sparse form"
    if getattr(layer, "quantization_mode", None):
        return f"its kernel is quantized ({layer.quantization_mode})"
    if getattr(layer, "lora_enabled", False):
        return "it carries a LoRA update; merge it into the kernel first"
    if kind is keras.layers.Dense:
        return None
    if layer.kernel_size != (1, 1):
        return f"Conv2D {layer.kernel_size[0]}×{layer.kernel_size[1]}: only 1×1 has a sparse form"
    if layer.strides != (1, 1) or layer.groups != 1 or layer.data_format != "channels_last":
        return (
            f"1×1 Conv2D with strides={layer.strides}, groups={layer.groups}, "
            f"data_format={layer.data_format!r}; only (1, 1), 1, 'channels_last' has a sparse form"
        )
    return None


def _sparse(layer, kernel) -> SparseDense:
    # At stride 1, a 1×1 convolution is a Dense layer on the last axis.
    matrix = SparseMatrix.from_dense(kernel.reshape(kernel.shape[-2:]))
    return SparseDense.from_matrix(
        matrix,
        bias=keras.ops.convert_to_numpy(layer.bias) if layer.use_bias else None,
        activation=layer.activation,
        values_regularizer=layer.kernel_regularizer,
        bias_regularizer=layer.bias_regularizer,
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )
