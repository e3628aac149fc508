"""Which axes of a kernel are inputs and which outputs: patterns see every kernel as a matrix.

Dense kernels are (inputs, outputs) as they stand, convolutions (…, inputs, outputs); the kernels of
transposed and depthwise convolutions and of EinsumDense have their axes in another order.
"""

import math
from typing import NamedTuple

import keras
import tensorflow as tf

_TRANSPOSED = tuple(getattr(keras.layers, f"Conv{n}DTranspose") for n in (1, 2, 3))
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class Form(NamedTuple):
    """The axes of a kernel that are summed over, the innermost last, and those of the outputs."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def shape(self, shape) -> tuple[int, ...]:
        """Returns what `of` makes of a kernel of `shape`: the sizes of the inputs, then one of outputs."""
        return (*(shape[i] for i in self.inputs), math.prod(shape[i] for i in self.outputs))

    def of(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns `kernel` with its input axes first, and its outputs as the last axis."""
        return tf.reshape(self._turn(kernel, self.inputs + self.outputs), self.shape(kernel.shape))

    def back(self, mask: tf.Tensor, shape) -> tf.Tensor:
        """Returns a mask of the form as one of the kernel, which has `shape`."""
        axes = self.inputs + self.outputs
        mask = tf.reshape(mask, [shape[i] for i in axes])
        return self._turn(mask, tuple(axes.index(i) for i in range(len(axes))))

    @staticmethod
    def _turn(tensor, axes):
        return tensor if axes == tuple(range(len(axes))) else tf.transpose(tensor, axes)


def form_of(variable, layer=None) -> Form:
    """Returns the `Form` of a weight of rank ≥ 2; without its layer, the last axis is the outputs."""
    axes = tuple(range(len(variable.shape)))
    if isinstance(layer, _TRANSPOSED):
        return Form((*axes[:-2], axes[-1]), (axes[-2],))
    if isinstance(layer, _DEPTHWISE) or variable.name == "depthwise_kernel":
        return Form(axes[:-2], axes[-2:])  # each input has outputs of its own
    if isinstance(layer, keras.layers.EinsumDense) and variable is layer.kernel:
        taken, kernel, made = layer.equation.replace(" ", "").replace("->", ",").split(",")
        inputs = tuple(kernel.index(axis) for axis in taken if axis in kernel and axis not in made)
        return Form(inputs, tuple(kernel.index(axis) for axis in made if axis in kernel))
    return Form(axes[:-1], axes[-1:])
