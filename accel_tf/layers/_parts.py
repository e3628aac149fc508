"""The layers that the graph of a custom layer has besides those that it is made of."""

import keras
import numpy as np

from accel_tf import _keras
from accel_tf.layers._walk import Functional


@keras.saving.register_keras_serializable(package="accel_tf")
class LayerGraph(Functional):
    """The graph that stands for a custom layer, and takes masks as that does.

    Keras warns that a nested model loses a mask. A graph hands the masks of its inputs to its layers, and
    an output has the mask that its last layer gives it, as the output of a custom layer has.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.supports_masking = True

    def compute_mask(self, inputs, previous_mask=None):
        return None


@keras.saving.register_keras_serializable(package="accel_tf")
class MaskedLayerGraph(LayerGraph):
    """The graph of a custom layer with `supports_masking`, whose output gets the mask of its first input."""

    def compute_mask(self, inputs, previous_mask=None):
        return keras.tree.flatten(previous_mask)[:1]


class _WithoutMask(keras.layers.Layer):
    """A layer whose output has no mask, whatever mask its input has."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True  # Otherwise Keras warns that the mask is lost.

    def compute_mask(self, inputs, previous_mask=None):
        return None


@keras.saving.register_keras_serializable(package="accel_tf")
class MaskOf(_WithoutMask):
    """Returns the mask of its input, bool of shape (batch, …); without a mask, all of it is True.

    Args:
        rank: How many axes the mask has.
        **kwargs: As for any Keras layer.
    """

    def __init__(self, rank, **kwargs):
        super().__init__(**kwargs)
        self.rank = rank

    def call(self, inputs, mask=None):
        if mask is not None:
            return mask
        return keras.ops.ones(keras.ops.shape(inputs)[: self.rank], "bool")

    def compute_output_spec(self, inputs, mask=None):
        return keras.KerasTensor(inputs.shape[: self.rank], "bool")

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}


@keras.saving.register_keras_serializable(package="accel_tf")
class WithMask(keras.layers.Layer):
    """Returns its input, with a mask that it is called with unless the input has a mask already.

    This layer stands for the `compute_mask` of a custom layer.

    Args:
        **kwargs: As for any Keras layer.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs, mask=None):
        return keras.ops.copy(inputs)  # The tensor itself may have other readers, without the mask.

    def compute_mask(self, inputs, previous_mask=None):
        own = _keras.mask_of(inputs)
        return previous_mask if own is None else own

    def compute_output_spec(self, inputs, mask=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="accel_tf")
class Constant(_WithoutMask):
    """Returns numbers that a custom layer calls a sublayer with, whatever it is called with itself.

    Args:
        value: The numbers, as an array or as nested lists.
        value_dtype: Their type.
        **kwargs: As for any Keras layer.
    """

    def __init__(self, value, value_dtype, **kwargs):
        super().__init__(**kwargs)
        self.value, self.value_dtype = np.asarray(value), value_dtype

    def call(self, inputs):
        return keras.ops.convert_to_tensor(self.value, self.value_dtype)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(self.value.shape, self.value_dtype)

    def get_config(self):
        own = {"value": self.value.tolist(), "value_dtype": self.value_dtype}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="accel_tf")
class Repeated(_WithoutMask):
    """Repeats a tensor for each sample of a batch, and along its other axes: (1, …) becomes (batch, …).

    It is called with the tensor and with one of the batch, of which only the size is used.

    Args:
        repeats: How often along each axis but the first; they may be more than the tensor has.
        **kwargs: As for any Keras layer.
    """

    def __init__(self, repeats, **kwargs):
        super().__init__(**kwargs)
        self.repeats = list(repeats)

    def call(self, inputs):
        x, batch = inputs
        return keras.ops.tile(x, (keras.ops.shape(batch)[0], *self.repeats))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(
            self.compute_output_shape([x.shape for x in inputs]), inputs[0].dtype
        )

    def compute_output_shape(self, input_shape):
        shape, (batch, *_) = input_shape
        rest = [1] * (len(self.repeats) + 1 - len(shape)) + list(shape)
        return (batch, *(n * m for n, m in zip(rest[1:], self.repeats, strict=True)))

    def get_config(self):
        return {**super().get_config(), "repeats": self.repeats}


@keras.saving.register_keras_serializable(package="accel_tf")
class OwnWeight(_WithoutMask):
    """A weight that a custom layer has besides those of its sublayers, as a layer of its graph.

    It returns the weight, whatever it is called with.

    Args:
        shape: That of the weight.
        weight_dtype: That of the weight.
        weight_name: Its name.
        learned: Whether it is trained with the layer.
        regularizer: As for any weight of a Keras layer.
        constraint: Likewise.
        **kwargs: As for any Keras layer.
    """

    def __init__(
        self,
        shape,
        weight_dtype,
        weight_name,
        learned=True,
        regularizer=None,
        constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.shape, self.weight_dtype, self.weight_name = tuple(shape), weight_dtype, weight_name
        self.learned = learned
        self.regularizer = keras.regularizers.get(regularizer)
        self.constraint = keras.constraints.get(constraint)

    @classmethod
    def of(cls, variable, owner: keras.Layer, learned: bool) -> "OwnWeight":
        """Returns the layer that holds `variable`, a weight of the layer `owner`."""
        constraint = variable.constraint
        while hasattr(constraint, "inner"):  # What techniques put there is no part of the layer.
            constraint = constraint.inner
        layer = cls(
            *(variable.shape, variable.dtype, variable.name, learned),
            *(variable.regularizer, constraint),
            dtype=owner.dtype_policy,
            name=variable.name,
        )
        layer.weight, layer.built = variable, True
        layer.trainable = owner.trainable
        return layer

    def build(self, input_shape=None):
        self.weight = self.add_weight(
            shape=self.shape,
            initializer="zeros",
            dtype=self.weight_dtype,
            name=self.weight_name,
            trainable=self.learned,
            regularizer=self.regularizer,
            constraint=self.constraint,
        )

    def call(self, inputs):
        return keras.ops.copy(self.weight)  # a tensor, as of any layer

    def compute_output_spec(self, inputs):
        is_float = keras.backend.is_float_dtype(self.weight_dtype)
        return keras.KerasTensor(self.shape, self.compute_dtype if is_float else self.weight_dtype)

    def get_config(self):
        config = {
            "shape": self.shape,
            "weight_dtype": self.weight_dtype,
            "weight_name": self.weight_name,
            "learned": self.learned,
            "regularizer": keras.regularizers.serialize(self.regularizer),
            "constraint": keras.constraints.serialize(self.constraint),
        }
        return {**super().get_config(), **config}


# None of them is a layer of the user's, to be taken apart.
PARTS = (Constant, MaskOf, OwnWeight, Repeated, WithMask)
