"""Magnitude pruning: set the smallest weights to zero while the model trains.

::

    _schedules   ConstantSparsity, PolynomialDecay     how sparse, at which step
    _patterns    Unstructured, Block, NM, Channels     which weights go together
    _prune       prune, sparsity                       the verb, and how sparse a model is
    _forms       which axes of a kernel are its inputs and outputs
    _constraint  the weight constraint that `prune` puts on the variables
    _selection   which variables of a model are pruned by default, by `include` and `exclude`

Pruned weights are zeros in ordinary dense kernels: the model compresses better, yet Keras's dense
kernels run no faster. `accel_tf.sparsify` replaces layers by ones that skip the zeros.
"""

from accel_tf.pruning._patterns import NM, Block, Channels, Pattern, Unstructured
from accel_tf.pruning._prune import SparsityTable, prune, sparsity
from accel_tf.pruning._schedules import ConstantSparsity, PolynomialDecay, Schedule

__all__ = [
    "NM",
    "Block",
    "Channels",
    "ConstantSparsity",
    "Pattern",
    "PolynomialDecay",
    "Schedule",
    "SparsityTable",
    "Unstructured",
    "prune",
    "sparsity",
]
