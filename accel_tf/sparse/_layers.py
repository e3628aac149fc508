"""The Dense layer with a sparse kernel."""

import keras
import numpy as np

from ._base import SparseLayer
from ._matrix import SparseMatrix


@keras.saving.register_keras_serializable(package="accel_tf")
class SparseDense(SparseLayer):
    """A Dense layer whose kernel is sparse: `activation(x · W + bias)`.

    The pattern is fixed, the values train. Like `keras.layers.Dense` it acts on the last dimension.
    Products are computed in float32 under every dtype policy; with `mixed_float16` the inputs and
    outputs are float16. The bias, and `relu` or `relu6`, are part of the product and cost next to
    nothing; other activations are computed by Keras.

    Make it from trained weights with `from_matrix`, or let `sparsify` do that for a whole model. By
    itself it starts from a random pattern with, as near as may be, the same number of inputs for
    each output.

    Args:
        units: The number of outputs.
        sparsity: The fraction of weights that are zero, in [0, 1). Ignored if `nonzeros` is given.
        activation: As in `keras.layers.Dense`.
        use_bias: Whether to add a bias.
        format: How the kernel is packed: `"unstructured"`, or in blocks, `"4x1"` or `"16x1"`.
        nonzeros: The exact number of weights, from 0 to in·units.
        seed: Seed of the random pattern and values; `None` draws one, repeatably after
            `keras.utils.set_random_seed`.
        values_regularizer, bias_regularizer: Keras regularizers of the values and of the bias.
        bias_constraint: Keras constraint of the bias.
        packed: Sizes of the packed kernel, as written by `get_config`; the kernel is then to be
            loaded.
        **kwargs: `name`, `dtype`, `trainable`, as for every Keras layer.

    Raises:
        ValueError: `units`, `sparsity`, `format` or `nonzeros` is out of range.

    Example:

    >>> import numpy as np, keras, accel_tf as at
    >>> layer = at.SparseDense(10, sparsity=0.75, activation="relu", seed=0)
    >>> layer(np.ones((2, 64), "float32")).shape
    TensorShape([2, 10])
    >>> layer.matrix
    SparseMatrix(shape=(64, 10), nnz=160, density=0.25, format='unstructured')
    """

    def __init__(self, units, sparsity=0.9, activation=None, use_bias=True, **kwargs):
        super().__init__(sparsity, activation, use_bias, **kwargs)
        self.supports_masking = True  # as in Dense; convolutions end a mask
        if not isinstance(units, (int, np.integer)) or units < 1:
            raise ValueError(f"units must be a positive integer. Received: {units!r}")
        self.units = int(units)

    @classmethod
    def from_matrix(cls, matrix: SparseMatrix, bias=None, **kwargs) -> "SparseDense":
        """Returns an unbuilt layer that will take its weights from `matrix` and `bias`.

        Args:
            matrix: The kernel, of shape (in, out). The layer has its format, or `"unstructured"` if
                that is `"dense"`. The values of a quantized matrix do not train.
            bias: (out,) float32, or `None` for a layer without bias.
            **kwargs: Arguments of `SparseDense`, except for `units`, `use_bias`, `format` and
                `nonzeros`.

        Example:

        >>> import numpy as np, accel_tf as at
        >>> layer = at.SparseDense.from_matrix(at.SparseMatrix.from_dense(2 * np.eye(3)))
        >>> layer(np.ones((1, 3), "float32")).numpy()
        array([[2., 2., 2.]], dtype=float32)
        """
        layer = cls(matrix.shape[1], use_bias=bias is not None, **kwargs)
        return layer._take(matrix, bias)

    def build(self, input_shape):
        if input_shape[-1] is None:
            raise ValueError(
                f"{self._name_for_errors} needs to know the last dimension of its input. "
                f"Received input_shape={tuple(input_shape)}."
            )
        self._build_kernel(input_shape[-1], self.units)
        self.input_spec = keras.layers.InputSpec(min_ndim=1, axes={-1: input_shape[-1]})

    def call(self, inputs):
        return self._product(inputs)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}
