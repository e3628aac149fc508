"""Walk the layers of any Keras model, and rebuild a model with some of its layers replaced.

Every technique needs these two, and they have to treat nested, shared and wrapped layers alike.
"""

from accel_tf.layers._expand import OwnWeight, expand, functional, passes_on
from accel_tf.layers._operator import Operator
from accel_tf.layers._rebuild import REMOVED, anew, rebuild
from accel_tf.layers._walk import Call, calls, require_model, walk
from accel_tf.layers._walk import Functional as Functional

__all__ = [
    "REMOVED",
    "Call",
    "Operator",
    "OwnWeight",
    "anew",
    "calls",
    "expand",
    "functional",
    "passes_on",
    "rebuild",
    "require_model",
    "walk",
]
