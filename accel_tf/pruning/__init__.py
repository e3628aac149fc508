"""Magnitude pruning: set the smallest weights to zero while the model trains.

    schedules    ConstantSparsity, PolynomialDecay     how sparse, at which step
    patterns     Unstructured                          which weights go together
    prune        prune, sparsity                       the verb, and how sparse a model is
    constraint   the weight constraint that `prune` puts on the variables
    selection    which variables of a model are pruned by default, by `include` and `exclude`

Pruned weights are zeros in ordinary dense kernels: the model compresses better, yet Keras's dense
kernels run no faster. `accel_tf.sparsify` replaces layers by ones that skip the zeros.
"""

from accel_tf.pruning.patterns import Unstructured
from accel_tf.pruning.prune import SparsityTable, prune, sparsity
from accel_tf.pruning.schedules import ConstantSparsity, PolynomialDecay

__all__ = [
    "ConstantSparsity",
    "PolynomialDecay",
    "SparsityTable",
    "Unstructured",
    "prune",
    "sparsity",
]
