"""What must hold for numbers to have a grid: finite weights, and ranges that were found."""

import numpy as np
import tensorflow as tf

from accel_tf.layers import walk
from accel_tf.quantization._fake import FakeQuantize


def require_finite(layer, path: str) -> None:
    """Raises a ValueError if a weight of `layer`, which is at `path`, is NaN or infinite."""
    for variable in layer.weights:
        if not variable.dtype.startswith(("float", "bfloat")):
            continue
        if not tf.reduce_all(tf.math.is_finite(variable.value)):
            bad = np.argwhere(~np.isfinite(np.asarray(variable.value, "float32")))
            raise ValueError(
                f"Layer {path!r} has {len(bad)} NaN or infinite weights in {variable.name!r}, the first "
                f"at {tuple(bad[0].tolist())}; there is no integer for them. If training diverged, "
                f"train anew; if they are meant, leave the layer in float with exclude=[{path!r}]."
            )


def require_ranges(model) -> None:
    """Raises a ValueError if a layer of `model` that has been run for its range has found none.

    Args:
        model: A model that was run in `observing`.
    """
    for path, layer in walk(model):
        if not isinstance(layer, FakeQuantize) or layer.fixed is not None or not layer.used:
            continue
        if not layer.observer.seen(layer):
            half = layer.compute_dtype == "float16"
            way = " In float16 values above 65504 are: use float32, or bfloat16." if half else ""
            raise ValueError(
                f"No range could be found for {path!r}: in each batch its values were NaN or "
                f"infinite, though the data are finite.{way} Look at the layers before it."
            )
        _ = layer.range  # raises if there is no grid for it
