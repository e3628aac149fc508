"""The layers of a transformer with sparse kernels: EinsumDense, and attention made of it."""

import math

import keras
import numpy as np

from ._base import SparseLayer
from ._matrix import SparseMatrix


@keras.saving.register_keras_serializable(package="accel_tf")
class SparseEinsumDense(SparseLayer):
    """An EinsumDense layer whose kernel is sparse, for equations that are a product of matrices.

    Those are the projections of attention, `"abc,cde->abde"` and `"abcd,cde->abe"`, feed-forward
    layers such as `"abc,cd->abd"`, and the like: the kernel takes the last axes of the input, and puts
    its own in their place.

    Args:
        equation: As in `keras.layers.EinsumDense`.
        output_shape: An integer or a tuple; only the axes that the kernel makes are looked at.
        sparsity, activation: As in `SparseDense`.
        bias_axes: All of the axes that the kernel makes, or `None` for no bias.
        **kwargs: The other arguments of `SparseDense`.

    Raises:
        ValueError: The equation is no product of a matrix, or `bias_axes` lacks an axis.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> heads = at.SparseEinsumDense("abc,cde->abde", (None, 4, 8), sparsity=0.9, bias_axes="de")
    >>> heads(np.ones((2, 5, 32), "float32")).shape
    TensorShape([2, 5, 4, 8])
    >>> heads.matrix.shape  # 32 inputs, 4 · 8 outputs
    (32, 32)
    """

    def __init__(
        self, equation, output_shape, sparsity=0.9, activation=None, bias_axes=None, **kwargs
    ):
        super().__init__(sparsity, activation, bias_axes is not None, **kwargs)
        self.equation = equation
        self.partial_output_shape = (
            (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
        )
        self.bias_axes = bias_axes
        _, self._contracted, self._made = contraction(equation, bias_axes)
        self._sizes = self.partial_output_shape[-len(self._made) :]
        if len(self._sizes) < len(self._made) or not all(self._sizes):
            raise ValueError(
                f"output_shape must give the sizes of the axes {self._made!r} of the equation "
                f"{equation!r}. Received: {self.partial_output_shape}"
            )

    @classmethod
    def from_matrix(cls, matrix: SparseMatrix, equation, output_shape, bias=None, **kwargs):
        """Returns an unbuilt layer that will take its weights from `matrix` and `bias`.

        Args:
            matrix: The kernel, of shape (contracted, made), its axes in the order of the input and of
                the output; `einsum_matrix` brings a kernel into that form.
            equation, output_shape: As in `SparseEinsumDense`.
            bias: float32, of the shape that `bias_axes` says, or `None` for a layer without bias.
            **kwargs: Arguments of `SparseEinsumDense`, except for `format` and `nonzeros`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> matrix = at.SparseMatrix.from_dense(2 * np.eye(3))
        >>> layer = at.SparseEinsumDense.from_matrix(matrix, "...x,xy->...y", 3)
        >>> layer(np.ones((1, 3), "float32")).numpy()
        array([[2., 2., 2.]], dtype=float32)
        """
        if bias is not None:
            kwargs.setdefault("bias_axes", contraction(equation)[2])
        return cls(equation, output_shape, **kwargs)._take(matrix, bias)

    def build(self, input_shape):
        taken = input_shape[-len(self._contracted) :]
        if None in taken:
            raise ValueError(
                f"{self._name_for_errors} needs to know the axes {self._contracted!r} of its input. "
                f"Received input_shape={tuple(input_shape)} for {self.equation!r}."
            )
        self._build_kernel(math.prod(taken), math.prod(self._sizes))
        last = {-1 - i: size for i, size in enumerate(reversed(taken))}
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=last)

    def call(self, inputs):
        lead = keras.ops.shape(inputs)[: -len(self._contracted)]
        if len(self._contracted) > 1:
            inputs = keras.ops.reshape(inputs, (*lead, self._shape[0]))
        y = self._product(inputs)
        return y if len(self._made) == 1 else keras.ops.reshape(y, (*lead, *self._sizes))

    def compute_output_shape(self, input_shape):
        return (*input_shape[: -len(self._contracted)], *self._sizes)

    def get_config(self):
        config = super().get_config()
        del config["use_bias"]  # as bias_axes says
        return {
            **config,
            "equation": self.equation,
            "output_shape": self.partial_output_shape,
            "bias_axes": self.bias_axes,
        }


def contraction(equation: str, bias_axes: str | None = None) -> tuple[str, str, str]:
    """Returns the axes `(lead, contracted, made)` of an equation that is a product of matrices.

    Args:
        equation: Of `EinsumDense`: `input,kernel->output`.
        bias_axes: Those of the bias; all of `made`, or `None`.

    Raises:
        ValueError: The equation is something else.
    """
    inputs, kernel, output = equation.replace(" ", "").replace("->", ",").split(",")
    made = "".join(axis for axis in output if axis in kernel)
    contracted = "".join(axis for axis in inputs if axis in kernel)
    lead = inputs.removesuffix(contracted)
    regular = (
        made
        and contracted
        and not set(made) & set(contracted)
        and sorted(kernel) == sorted(contracted + made)
        and inputs == lead + contracted
        and output == lead + made
    )
    if not regular:
        raise ValueError(
            f"The equation {equation!r} is no product with a matrix: the kernel must take the last "
            "axes of the input, and its other axes must be the last ones of the output, as in "
            "'abc,cd->abd' or 'abcd,cde->abe'."
        )
    if bias_axes is not None and bias_axes != made:
        raise ValueError(
            f"bias_axes must be {made!r} for the equation {equation!r}. Received: {bias_axes!r}"
        )
    return lead, contracted, made


def einsum_matrix(equation: str, kernel) -> np.ndarray:
    """Returns the kernel of an EinsumDense layer as a matrix (inputs, outputs).

    Args:
        equation: As in `SparseEinsumDense`.
        kernel: An array whose axes are those of the equation's second term.
    """
    _, contracted, made = contraction(equation)
    axes = equation.replace(" ", "").replace("->", ",").split(",")[1]
    kernel = np.transpose(kernel, [axes.index(axis) for axis in contracted + made])
    return kernel.reshape(math.prod(kernel.shape[: len(contracted)]), -1)


# The projections of keras.layers.MultiHeadAttention, and the attributes that hold them.
PROJECTIONS = {
    "query": "_query_dense",
    "key": "_key_dense",
    "value": "_value_dense",
    "gate": "_gate_dense",
    "attention_output": "_output_dense",
}


@keras.saving.register_keras_serializable(package="accel_tf")
class SparseMultiHeadAttention(keras.layers.MultiHeadAttention):
    """A MultiHeadAttention layer whose projections are sparse.

    The products of queries, keys and values among each other are dense, as ever.

    Args:
        num_heads, key_dim: As in `keras.layers.MultiHeadAttention`.
        sparsity: Of each projection, as in `SparseDense`.
        projections: For each of `"query"`, `"key"`, `"value"`, `"attention_output"` (and `"gate"`) an
            EinsumDense or `SparseEinsumDense` layer, or its configuration; `None` makes sparse ones.
        **kwargs: The other arguments of `keras.layers.MultiHeadAttention`.

    Example:

    >>> import numpy as np, accel_tf as at
    >>> layer = at.SparseMultiHeadAttention(num_heads=4, key_dim=8, sparsity=0.9)
    >>> x = np.ones((2, 5, 32), "float32")
    >>> layer(x, x).shape
    TensorShape([2, 5, 32])
    """

    def __init__(self, num_heads, key_dim, sparsity=0.9, *, projections=None, **kwargs):
        super().__init__(num_heads, key_dim, **kwargs)
        self.sparsity = float(sparsity)
        # A function, for Keras would take a dictionary of layers for layers of its own.
        self._projection = (projections or {}).get
        self._kept: dict[str, list] = {}

    @classmethod
    def from_attention(cls, attention, projections) -> "SparseMultiHeadAttention":
        """Returns an unbuilt copy of an attention layer, some of whose projections are replaced.

        Args:
            attention: A built `keras.layers.MultiHeadAttention`.
            projections: For some of its projections, the layer to take its place. The others are
                copied with their weights.
        """
        config = attention.get_config()
        dense = {
            name: getattr(attention, attribute)
            for name, attribute in PROJECTIONS.items()
            if name not in projections and hasattr(attention, attribute)
        }
        copies = {name: keras.saving.serialize_keras_object(old) for name, old in dense.items()}
        layer = cls(
            **{**config, "dtype": attention.dtype_policy}, projections={**copies, **projections}
        )
        layer._kept = {name: old.get_weights() for name, old in dense.items()}
        return layer

    def build(self, query_shape, value_shape, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
            raise ValueError(
                f"{self.name!r}: all dimensions of value and key, except for the last one, must be "
                f"equal. Received: value_shape={value_shape}, key_shape={key_shape}"
            )
        heads, attended = self._num_heads, (*query_shape[:-1], self._num_heads, self._value_dim)
        self._add("query", query_shape, (heads, self._key_dim))
        self._add("key", key_shape, (heads, self._key_dim))
        self._add("value", value_shape, (heads, self._value_dim))
        if getattr(self, "_use_gate", False):
            self._add("gate", query_shape, (heads, self._value_dim), activation="sigmoid")
        self._build_attention(len(value_shape) + 1)
        self._add("attention_output", attended, self._output_shape or query_shape[-1:], taken=2)
        self._kept = {}

    def _add(self, name, input_shape, sizes, taken=1, activation=None):
        """Adds and builds a projection of the last `taken` axes of its input to axes of `sizes`."""
        layer = self._projection(name)
        if layer is None:
            axes = "abcdefghijklm"[: taken + len(sizes)]
            contracted, made = axes[:taken], axes[taken:]
            layer = SparseEinsumDense(
                f"...{contracted},{axes}->...{made}",
                tuple(sizes),
                sparsity=self.sparsity,
                activation=activation,
                bias_axes=made if self._use_bias else None,
                values_regularizer=self._kernel_regularizer,
                bias_regularizer=self._bias_regularizer,
                bias_constraint=self._bias_constraint,
                activity_regularizer=self._activity_regularizer,
                dtype=self.dtype_policy,
                name=name,
            )
        elif isinstance(layer, dict):
            layer = keras.saving.deserialize_keras_object(layer)
        if not layer.built:
            layer.build(tuple(input_shape))
        if name in self._kept:
            layer.set_weights(self._kept[name])
        setattr(self, PROJECTIONS[name], layer)

    def get_config(self):
        made = {
            name: keras.saving.serialize_keras_object(getattr(self, attribute))
            for name, attribute in PROJECTIONS.items()
            if self.built and hasattr(self, attribute)
        }
        return {**super().get_config(), "sparsity": self.sparsity, "projections": made or None}
