"""Magnitude pruning: set the smallest weights to zero while the model trains.

::

    _schedules   ConstantSparsity, PolynomialDecay, …  how sparse, at which step; as in TFMOT
    _curves      CosineDecay, Cyclical, …              the schedules that TFMOT does not have
    _patterns    Unstructured, Block, NM, Channels     which weights go together
    _criteria    Magnitude, Movement, Taylor, …        which of them go first
    _prune       prune                                 the verb
    _sparsity    sparsity                              how sparse a model is, layer by layer
    _sensitivity sensitivity                           which layers can be pruned, and how far
    _log         SparsityLog                           a callback: how sparse, and whether it will be
    _figure                                            axes for pictures of results
    _strip       strip_pruning                         the weights are free again
    _channels    mask_channels, remove_channels        whole channels to zero, and out of the model
    _dynamic     train_sparse, SET, RigL               sparse from the first step, rewired on the way
    _rewiring    the masks that `train_sparse` moves
    _config      what of them goes into a dictionary, and comes back
    _forms       which axes of a kernel are its inputs and outputs
    _distribution                                      how kernels share the active weights
    _constraint  the weight constraint that `prune` puts on the variables
    _start       the warnings when training starts: too short, or weights replaced
    _selection   which variables of a model are pruned by default, by `include` and `exclude`
    _channel_graph, _channel_rules, _channel_choice    which channels depend on one another, and go

Pruned weights are zeros in ordinary dense kernels: the model compresses better, yet Keras's dense
kernels run no faster. `accel_tf.sparsify` replaces layers by ones that skip the zeros;
`remove_channels` makes the kernels smaller, where whole channels are zero.
"""

from accel_tf.pruning._channels import mask_channels, remove_channels
from accel_tf.pruning._criteria import Criterion, Magnitude, Movement, SoftThreshold, Taylor
from accel_tf.pruning._curves import CosineDecay, Cyclical, ExponentialDecay, FunctionSchedule
from accel_tf.pruning._dynamic import SET, RigL, train_sparse
from accel_tf.pruning._log import SparsityLog
from accel_tf.pruning._patterns import NM, Block, Channels, Pattern, Unstructured
from accel_tf.pruning._prune import prune
from accel_tf.pruning._schedules import ConstantSparsity, OneShot, PolynomialDecay, Schedule
from accel_tf.pruning._sensitivity import Sensitivity, sensitivity
from accel_tf.pruning._sparsity import SparsityTable, sparsity
from accel_tf.pruning._strip import strip_pruning

__all__ = [
    "NM",
    "SET",
    "Block",
    "Channels",
    "ConstantSparsity",
    "CosineDecay",
    "Criterion",
    "Cyclical",
    "ExponentialDecay",
    "FunctionSchedule",
    "Magnitude",
    "Movement",
    "OneShot",
    "Pattern",
    "PolynomialDecay",
    "RigL",
    "Schedule",
    "Sensitivity",
    "SoftThreshold",
    "SparsityLog",
    "SparsityTable",
    "Taylor",
    "Unstructured",
    "mask_channels",
    "prune",
    "remove_channels",
    "sensitivity",
    "sparsity",
    "strip_pruning",
    "train_sparse",
]
