"""How sparse a model is: the table `sparsity`, and its picture."""

import dataclasses

import keras
import numpy as np

from accel_tf.layers import require_model, walk
from accel_tf.pruning._constraint import MaskConstraint
from accel_tf.pruning._selection import Weight, is_kernel, weights_of
from accel_tf.report import Table
from accel_tf.sparse import SparseLayer


@dataclasses.dataclass(frozen=True)
class SparsityTable(Table):
    """How sparse each kernel of a model is, as a `Table`, and all together, as a number.

    Attributes:
        total: The fraction of zeros among the weights listed, a float in [0, 1].
    """

    total: float = 0.0


def sparsity(model: keras.Model) -> SparsityTable:
    """Returns how many weights of each kernel of `model` are zero.

    Args:
        model: Any built Keras model, pruned or not; a weight that is shared counts once.

    Returns:
        A `SparsityTable`: one row per kernel that `prune` selects by default or has pruned, and a
        last row for all; `.total` is the sparsity of all, as a float.

    Raises:
        ValueError: The model is not built.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="head")])
    >>> model.set_weights([np.array([[1.0, 0.0], [0.0, 0.0]]), np.zeros(2)])
    >>> print(at.sparsity(model))
    layer  weight  shape   weights  zeros  sparsity
    -----  ------  ------  -------  -----  --------
    head   kernel  (2, 2)        4      3      0.75
    total                        4      3      0.75
    """
    require_model(model, "sparsity")
    rows, unfinished = [], {}
    for path, layer, v, reason in weights_of(model):
        pruned = isinstance(v.constraint, MaskConstraint)
        if not pruned and not is_kernel(Weight(path, layer, v, reason)):
            continue
        values = keras.ops.convert_to_numpy(v)
        zeros = values.size - int(np.count_nonzero(values))
        rows.append((path, v.name, str(tuple(v.shape)), values.size, zeros, zeros / values.size))
        if pruned and v.constraint.masks.unfinished:
            unfinished[v.constraint.masks.unfinished] = None
    for path, layer in walk(model):
        if isinstance(layer, SparseLayer):  # holds the kernel's other elements only
            shape = layer.matrix.shape
            size = shape[0] * shape[1]
            zeros = size - int(np.count_nonzero(keras.ops.convert_to_numpy(layer.values)))
            rows.append((path, "kernel", str(shape), size, zeros, zeros / size))
    n, zeros = sum(row[3] for row in rows), sum(row[4] for row in rows)
    total = zeros / n if n else 0.0
    rows.append(("total", "", "", n, zeros, total))
    columns = ("layer", "weight", "shape", "weights", "zeros", "sparsity")
    return SparsityTable(columns, rows, note="\n".join(unfinished), total=total)
