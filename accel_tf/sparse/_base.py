"""What the layers with sparse kernels share: packed weights, their product, and saving them."""

import random

import keras
import numpy as np
import tensorflow as tf

from . import _op
from ._layout import HEIGHTS, Sizes, coordinates, empty_plan, tile_of
from ._matrix import SparseMatrix

_NONE = np.zeros(0, np.float32)
# What the op does by itself, after it has added the bias.
_FUSED = {
    keras.activations.linear: "linear",
    keras.activations.relu: "relu",
    keras.activations.relu6: "relu6",
}


class SparseLayer(keras.layers.Layer):
    """The base of layers whose kernel is a sparse matrix of a fixed pattern; not to be used itself.

    The kernel is held packed, as weights: the pattern in `plan` and `columns`, and the trainable
    `values`, in the order in which the op reads them. So it is saved, loaded and replicated with
    the layer; nothing of it is captured when a function is traced.

    A subclass names what it is made for with its own arguments, calls `_build_kernel` when it knows
    the kernel's shape, and then `_product`. See `SparseDense` for the arguments.
    """

    def __init__(
        self,
        sparsity,
        activation,
        use_bias,
        *,
        format="unstructured",
        nonzeros=None,
        seed=None,
        values_regularizer=None,
        bias_regularizer=None,
        bias_constraint=None,
        packed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is a fraction of zeros in [0, 1). Received: {sparsity!r}")
        if nonzeros is not None and nonzeros < 0:
            raise ValueError(f"nonzeros must not be negative. Received: {nonzeros!r}")
        if format not in HEIGHTS:
            raise ValueError(
                f"format must be one of {', '.join(map(repr, HEIGHTS))}. Received: {format!r}"
            )
        self.sparsity = float(sparsity)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.format = format
        self.nonzeros = None if nonzeros is None else int(nonzeros)
        self.seed = random.randrange(2**31) if seed is None and packed is None else seed
        self.values_regularizer = keras.regularizers.get(values_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.supports_jit = _op.supports_jit()
        self._packed = None if packed is None else Sizes(**packed)
        self._initial: tuple | None = None

    def _take(self, matrix: SparseMatrix, bias):
        """Makes the layer start from a matrix, which is not copied."""
        if matrix.format == "dense":
            matrix = matrix.with_format("unstructured")
        self.format, self.nonzeros, self.seed = matrix.format, matrix.nnz, None
        self._initial = (matrix, bias)
        return self

    def _build_kernel(self, in_features: int, out_features: int):
        """Adds the weights: those that were given, those of the seed, or room for those of a file."""
        self._shape = (in_features, out_features)
        matrix, bias = self._initial or (None, None)
        self._initial = None
        if matrix is not None and matrix.shape != self._shape:
            raise ValueError(
                f"{self._name_for_errors} was made from a matrix of shape {matrix.shape}, and its "
                f"input needs one of shape {self._shape}."
            )
        if matrix is None and self.seed is not None:
            matrix = self._random_matrix()
        if matrix is not None:
            layout = matrix._pattern.layout
            sizes = Sizes.of(layout, int8=matrix.scales is not None)
            if self._packed is None:
                self._packed = sizes
        if matrix is not None and sizes == self._packed:
            plan, columns = layout.plan, layout.columns
            values = np.asarray(matrix._packed_values)
            kept = layout.order >= 0
        else:  # zeros, to be loaded into
            plan = empty_plan(self._packed, *self._shape, *HEIGHTS[self.format])
            height, shared = HEIGHTS[self.format]
            columns = np.full(self._packed.steps * (1 if shared else height), plan[0], np.uint16)
            values = np.zeros(self._packed.steps * height, np.float32)
            kept = np.zeros(values.size, bool)
        if self._packed.int8:
            values = values.astype(np.int8)

        def add(name, value, **kwargs):
            return self.add_weight(
                shape=value.shape, initializer=_Given(value), name=name, autocast=False, **kwargs
            )

        def add_fixed(name, value):
            return add(name, value, dtype=value.dtype.name, trainable=False)

        self.plan = add_fixed("plan", plan)
        self.columns = add_fixed("columns", columns)
        self.scales = self.kept = self.bias = None
        if self._packed.int8:
            self.values = add_fixed("values", values)
            scales = np.ones(out_features) if matrix is None else matrix.scales.numpy()
            self.scales = add_fixed("scales", scales.astype(np.float32))
        else:
            self.values = add("values", values, regularizer=self.values_regularizer)
        if self._packed.padded:
            self.kept = add_fixed("kept", kept)
        if self.use_bias:
            bias = np.zeros(out_features) if bias is None else np.asarray(bias)
            self.bias = add(
                "bias",
                bias.reshape(-1),
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def _product(self, x):
        """`activation(x · kernel + bias)`, of the compute dtype."""
        tensor = keras.ops.convert_to_tensor
        values = tensor(self.values)
        if self.scales is None:
            values = tf.cast(values, tf.float32)
        if self.kept is not None:
            values = _with_gradient_where(values, tensor(self.kept))
        fused = _FUSED.get(self.activation)
        y = _op.multiply(
            tf.cast(x, tf.float32),
            tensor(self.plan),
            tensor(self.columns),
            values,
            _NONE if self.scales is None else tensor(self.scales),
            _NONE if self.bias is None else tf.cast(tensor(self.bias), tf.float32),
            activation=fused or "linear",
            **self._attributes,
        )
        y = keras.ops.cast(y, self.compute_dtype)
        return y if fused else self.activation(y)

    @property
    def _attributes(self):
        height, shared = HEIGHTS[self.format]
        in_features, out_features = self._shape
        return {
            "in_features": in_features,
            "out_features": out_features,
            "height": height,
            "shared": shared,
        }

    @property
    def matrix(self) -> SparseMatrix:
        """The kernel, a `SparseMatrix` of the current values, of shape (inputs, outputs)."""
        if not self.built:
            raise ValueError(
                f"{self._name_for_errors} has no matrix yet: it is built when it is first called."
            )
        array = keras.ops.convert_to_numpy
        plan, columns, values = array(self.plan), array(self.columns), array(self.values)
        rows, columns = (a.numpy() for a in coordinates(plan, columns, **self._attributes))
        inside = (rows < self._shape[1]) & (columns < self._shape[0])
        if self.kept is not None:
            inside &= array(self.kept).astype(bool)
        rows, columns, values = rows[inside], columns[inside], values[inside]
        order = np.lexsort((columns, rows))
        counts = np.bincount(rows, minlength=self._shape[1])
        matrix = SparseMatrix(
            np.concatenate([[0], np.cumsum(counts)]),
            columns[order],
            values[order].astype(np.float32),
            self._shape,
            format=self.format,
        )
        if self.scales is None:
            return matrix
        return SparseMatrix._of(matrix._pattern, values[order], array(self.scales))

    @property
    def _name_for_errors(self):
        return f"{type(self).__name__} {self.path or self.name!r}"

    def get_config(self):
        return {
            **super().get_config(),
            "sparsity": self.sparsity,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "format": self.format,
            "nonzeros": self.nonzeros,
            "seed": self.seed,
            "values_regularizer": keras.regularizers.serialize(self.values_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "packed": None if self._packed is None else self._packed._asdict(),
        }

    def load_own_variables(self, store):
        variables = self._trainable_variables + self._non_trainable_variables
        saved = [tuple(store[key].shape) for key in sorted(store.keys(), key=int)]
        if saved != [tuple(v.shape) for v in variables]:
            raise ValueError(
                f"{self._name_for_errors} cannot load these weights, as they have another pattern "
                f"of non-zeros: saved are arrays of shapes {saved}, expected "
                f"{[tuple(v.shape) for v in variables]}. Load the whole model with "
                "keras.models.load_model, or make the layer from the same pattern first."
            )
        super().load_own_variables(store)

    def _random_matrix(self) -> SparseMatrix:
        """A pattern with the same number of inputs for each output, also in each tile.

        As near as may be. So the sizes of the packed weights depend on the numbers only, not on the
        seed, and weights of one seed can be loaded into a layer of another.
        """
        in_features, out_features = self._shape
        height, shared = HEIGHTS[self.format]
        group = height if shared else 1
        size = in_features * out_features
        if self.nonzeros is None:
            self.nonzeros = round(size * (1 - self.sparsity) / group) * group
        if self.nonzeros > size:
            raise ValueError(
                f"{self._name_for_errors} has nonzeros={self.nonzeros}, more than the {size} "
                f"weights of a kernel of shape {self._shape}."
            )
        if self.nonzeros % group or out_features % group:
            raise ValueError(
                f"{self._name_for_errors} has format={self.format!r}, so the number of outputs "
                f"and nonzeros must be multiples of {group}. Received: {out_features}, "
                f"{self.nonzeros}"
            )
        rng = np.random.default_rng(self.seed)
        units, blocks = out_features // group, self.nonzeros // group
        each, more = divmod(blocks, max(units, 1))
        tile = tile_of(in_features, self.nonzeros / max(out_features, 1))
        edges = np.minimum(np.arange(0, in_features + tile, tile), in_features)
        parts = []
        for begin, end in [(0, more), (more, units)]:
            count = each + (begin < more)
            quota = np.diff(edges * count // max(in_features, 1))
            picks = [
                first + _pick(rng, end - begin, last - first, n)
                for first, last, n in zip(edges[:-1], edges[1:], quota, strict=True)
            ]
            parts.append(np.concatenate([np.zeros((end - begin, 0), np.int64), *picks], axis=1))
        columns = np.concatenate([np.repeat(part, group, axis=0).ravel() for part in parts])
        counts = np.repeat(np.arange(units) < more, group) + each
        # Glorot's limit, with the fans that the pattern leaves.
        density = self.nonzeros / max(size, 1)
        limit = np.sqrt(6 / max((in_features + out_features) * density, 1e-9))
        return SparseMatrix(
            np.concatenate([[0], np.cumsum(counts)]),
            columns,
            rng.uniform(-limit, limit, self.nonzeros).astype(np.float32),
            self._shape,
            format=self.format,
        )


def _pick(rng, rows, width, count):
    """For each of `rows`, `count` different numbers below `width`, in ascending order."""
    order = np.argsort(rng.random((rows, width)), axis=1)
    return np.sort(order[:, :count], axis=1)


@tf.custom_gradient
def _with_gradient_where(values, kept):
    """The values, of which only those of the pattern get a gradient: padding of blocks stays 0."""
    return tf.identity(values), lambda upstream: (upstream * tf.cast(kept, tf.float32), None)


class _Given(keras.initializers.Initializer):
    """Starts a variable from a given array."""

    def __init__(self, value):
        self.value = value

    def __call__(self, shape, dtype=None, **kwargs):
        return keras.ops.cast(keras.ops.reshape(self.value, shape), dtype)
