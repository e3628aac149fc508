"""Layers with sparse weights of a fixed pattern."""

import random

import keras
import numpy as np

from ._matrix import SparseMatrix, sparse_matmul


@keras.saving.register_keras_serializable(package="accel_tf")
class SparseDense(keras.layers.Layer):
    """A Dense layer whose kernel is sparse: `activation(x · W + bias)`.

    The pattern is fixed, the values train. Like `keras.layers.Dense` it acts on the last dimension.
    Kernels are computed in float32 under every dtype policy; with `mixed_float16` the inputs and
    outputs are float16. Keras does not compile the layer with XLA (`supports_jit` is false).

    Make it from trained weights with `from_matrix`, or let `sparsify` do that for a whole model. By
    itself it starts from a random pattern with, as near as may be, the same number of inputs for
    each output.

    Args:
        units: The number of outputs.
        sparsity: The fraction of weights that are zero, in [0, 1). Ignored if `nonzeros` is given.
        activation: As in `keras.layers.Dense`.
        use_bias: Whether to add a bias.
        nonzeros: The exact number of weights, from 0 to in·units.
        seed: Seed of the random pattern and values; `None` draws one, repeatably after
            `keras.utils.set_random_seed`.
        values_regularizer, bias_regularizer: Keras regularizers of the values and of the bias.
        **kwargs: `name`, `dtype`, `trainable`, as for every Keras layer.

    Raises:
        ValueError: `units`, `sparsity` or `nonzeros` is out of range.

    Example:

    >>> import numpy as np, keras, accel_tf as at
    >>> layer = at.SparseDense(10, sparsity=0.75, activation="relu", seed=0)
    >>> layer(np.ones((2, 64), "float32")).shape
    TensorShape([2, 10])
    >>> layer.matrix
    SparseMatrix(shape=(64, 10), nnz=160, density=0.25)
    """

    def __init__(
        self,
        units,
        sparsity=0.9,
        activation=None,
        use_bias=True,
        *,
        nonzeros=None,
        seed=None,
        values_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(units, (int, np.integer)) or units < 1:
            raise ValueError(f"units must be a positive integer. Received: {units!r}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is a fraction of zeros in [0, 1). Received: {sparsity!r}")
        if nonzeros is not None and nonzeros < 0:
            raise ValueError(f"nonzeros must not be negative. Received: {nonzeros!r}")
        self.units = int(units)
        self.sparsity = float(sparsity)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.nonzeros = None if nonzeros is None else int(nonzeros)
        self.seed = seed if seed is not None else random.randrange(2**31)
        self.values_regularizer = keras.regularizers.get(values_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.supports_jit = False
        self._initial: tuple | None = None

    @classmethod
    def from_matrix(cls, matrix: SparseMatrix, bias=None, **kwargs) -> "SparseDense":
        """Returns an unbuilt layer that will take its weights from `matrix` and `bias`.

        Args:
            matrix: The kernel, of shape (in, out).
            bias: (out,) float32, or `None` for a layer without bias.
            **kwargs: Arguments of `SparseDense`, except for `units`, `use_bias` and `nonzeros`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> layer = at.SparseDense.from_matrix(at.SparseMatrix.from_dense(2 * np.eye(3)))
        >>> layer(np.ones((1, 3), "float32")).numpy()
        array([[2., 2., 2.]], dtype=float32)
        """
        layer = cls(matrix.shape[1], use_bias=bias is not None, nonzeros=matrix.nnz, **kwargs)
        layer._initial = (matrix, bias)
        return layer

    def build(self, input_shape):
        in_features = input_shape[-1]
        if in_features is None:
            raise ValueError(
                f"SparseDense {self.name!r} needs to know the last dimension of its input. "
                f"Received input_shape={tuple(input_shape)}."
            )
        size = in_features * self.units
        if self.nonzeros is None:
            self.nonzeros = round(size * (1 - self.sparsity))
        if self.nonzeros > size:
            raise ValueError(
                f"SparseDense {self.name!r} has nonzeros={self.nonzeros}, more than the {size} "
                f"weights of a kernel of shape {(in_features, self.units)}."
            )
        matrix, bias = self._initial or (self._random_matrix(in_features), None)
        if matrix.shape[0] != in_features:
            raise ValueError(
                f"SparseDense {self.name!r} was made from a matrix of shape {matrix.shape}, and "
                f"cannot take an input of shape {tuple(input_shape)}."
            )
        self._initial = None
        self._in_features = in_features

        def add(name, value, **kwargs):
            return self.add_weight(
                shape=value.shape, initializer=_Given(value), name=name, autocast=False, **kwargs
            )

        # The pattern is part of the weights: it is saved, loaded and replicated with them.
        self.row_pointers = add("row_pointers", matrix.row_pointers, dtype="int64", trainable=False)
        self.columns = add("columns", matrix.columns, dtype="int32", trainable=False)
        self.values = add("values", matrix.values, regularizer=self.values_regularizer)
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.units,),
                initializer="zeros" if bias is None else _Given(bias),
                regularizer=self.bias_regularizer,
                name="bias",
            )
        self.input_spec = keras.layers.InputSpec(min_ndim=1, axes={-1: in_features})

    @property
    def matrix(self) -> SparseMatrix:
        """The kernel, a `SparseMatrix` of the current values and shape (in, out)."""
        self._require_built()
        return SparseMatrix(
            keras.ops.convert_to_numpy(self.row_pointers),
            keras.ops.convert_to_numpy(self.columns),
            keras.ops.convert_to_numpy(self.values).astype("float32"),
            (self._in_features, self.units),
        )

    def call(self, inputs):
        matrix = SparseMatrix._of_variables(
            keras.ops.convert_to_tensor(self.row_pointers),
            keras.ops.convert_to_tensor(self.columns),
            keras.ops.cast(self.values, "float32"),
            (self._in_features, self.units),
        )
        x = keras.ops.cast(inputs, "float32")
        y = keras.ops.cast(sparse_matmul(x, matrix), self.compute_dtype)
        if self.bias is not None:
            y = keras.ops.add(y, self.bias)
        return self.activation(y)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "sparsity": self.sparsity,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "nonzeros": self.nonzeros,
            "seed": self.seed,
            "values_regularizer": keras.regularizers.serialize(self.values_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }

    def _require_built(self):
        if not self.built:
            raise ValueError(
                f"SparseDense {self.name!r} has no matrix yet: it is built when it is first called."
            )

    def _random_matrix(self, in_features) -> SparseMatrix:
        rng = np.random.default_rng(self.seed)
        counts = np.full(self.units, self.nonzeros // self.units)
        counts[: self.nonzeros % self.units] += 1
        columns = [np.sort(rng.choice(in_features, n, replace=False)) for n in counts]
        # Glorot's limit, with the fans that the pattern leaves.
        density = self.nonzeros / max(in_features * self.units, 1)
        limit = np.sqrt(6 / max((in_features + self.units) * density, 1e-9))
        return SparseMatrix(
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate(columns) if self.nonzeros else np.zeros(0, np.int32),
            rng.uniform(-limit, limit, self.nonzeros).astype(np.float32),
            (in_features, self.units),
        )


class _Given(keras.initializers.Initializer):
    """Starts a variable from a given array."""

    def __init__(self, value):
        self.value = value

    def __call__(self, shape, dtype=None, **kwargs):
        return keras.ops.cast(keras.ops.reshape(self.value, shape), dtype)
