"""How sparse a model is: the table `sparsity`, and its picture."""

import dataclasses

import keras
import numpy as np

from accel_tf.layers import require_model, walk
from accel_tf.pruning._constraint import MaskConstraint
from accel_tf.pruning._figure import axes_or_new
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

    def plot(self, axes=None):
        """Draws a bar for each kernel: as long as it is sparse, thicker if it has more weights.

        The grey part is what remains. Thickness grows with the square root of the number of weights,
        which is at the right; the dashed line is the sparsity of all.

        Args:
            axes: matplotlib axes to draw on; by default, those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        *kernels, _ = self.rows
        n = len(kernels)
        pitch = max(0.14, 0.3 - n / 500)  # inches per kernel
        axes = axes_or_new(axes, 7.2, 0.9 + pitch * n)
        sizes = np.array([row[3] for row in kernels], float)
        thick = 0.15 + 0.75 * np.sqrt(sizes / sizes.max(initial=1))
        at = np.arange(n)
        layers = [row[0] for row in kernels]
        names = [
            layer if layers.count(layer) == 1 else f"{layer}/{row[1]}"
            for layer, row in zip(layers, kernels, strict=True)
        ]
        size = 72 * pitch * 0.6 if n > 25 else "small"
        axes.barh(at, np.ones(n), thick, color="#dddddd")
        axes.barh(at, [row[5] for row in kernels], thick, color="#0072B2")
        axes.axvline(self.total, color="#D55E00", lw=1, ls="--")
        axes.set_title(f"sparsity {self.total:.4g}", fontsize="medium", color="#D55E00")
        axes.set_yticks(at, names, fontsize=size)
        for y, count in zip(at, sizes, strict=True):
            axes.text(1.01, y, _short(count), va="center", fontsize=size, color="#555555")
        axes.set(
            xlim=(0, 1),
            ylim=(n - 0.4, -0.6),
            xlabel="fraction of zeros; at the right, the number of weights",
        )
        axes.grid(False, axis="y")
        return axes


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


def _short(n: float) -> str:
    """Formats a number of weights: `640`, `4.61 k`, `2.36 M`."""
    for unit in ("", " k", " M"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} G"
