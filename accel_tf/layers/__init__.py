"""Walks, rebuilds, copies and checks Keras models; every technique needs these functions.

They treat nested, shared and wrapped layers alike.
"""

from accel_tf.layers._check import (
    batch_of,
    difference,
    require_same,
    run,
    samples,
    sqnr,
    tells,
    varying,
)
from accel_tf.layers._expand import expand, functional, passes_on, why_kept
from accel_tf.layers._operator import Operator
from accel_tf.layers._parts import Constant, OwnWeight, Repeated, WithMask
from accel_tf.layers._rebuild import NOT_COPIED, REMOVED, Site, anew, rebuild, rebuild_calls
from accel_tf.layers._state import Changes, copy_state, unsaved
from accel_tf.layers._walk import Call, calls, has_graph, require_model, walk
from accel_tf.layers._walk import Functional as Functional

__all__ = [
    "NOT_COPIED",
    "REMOVED",
    "Call",
    "Changes",
    "Constant",
    "Operator",
    "OwnWeight",
    "Repeated",
    "Site",
    "WithMask",
    "anew",
    "batch_of",
    "calls",
    "copy_state",
    "difference",
    "expand",
    "functional",
    "has_graph",
    "passes_on",
    "rebuild",
    "rebuild_calls",
    "require_model",
    "require_same",
    "run",
    "samples",
    "sqnr",
    "tells",
    "unsaved",
    "varying",
    "walk",
    "why_kept",
]
