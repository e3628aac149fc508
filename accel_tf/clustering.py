"""Weight clustering: each kernel holds a few distinct values, which its weights share.

A kernel of 16 values needs 4 bits for each weight and a table of 16 numbers; as a plain Keras file it
compresses accordingly. Dense kernels run no faster. `accel_tf.quantize_aware` keeps clusters.
"""

import keras
import numpy as np
import tensorflow as tf

from accel_tf.layers import require_model
from accel_tf.pruning._constraint import MaskConstraint, local_variable
from accel_tf.pruning._schedules import require_integer
from accel_tf.pruning._selection import weights_of
from accel_tf.pruning._start import TrainingStart
from accel_tf.pruning._strip import free
from accel_tf.report import Entry, Report, attach

__all__ = ["cluster", "strip_clustering"]


def cluster(
    model: keras.Model, clusters: int = 16, *, include=None, exclude=None, seed: int = 0
) -> Report:
    """Clusters the weights of `model` in place, now and after each optimizer step.

    The weights of a kernel are divided by k-means, and each becomes the mean of its cluster. From
    then on they move together: after each optimizer step a cluster takes the mean of its weights, so
    a step of training is one along the mean gradient of each cluster. As with `prune`, this is a
    constraint on the variable, which works in `fit`, custom loops, under XLA, mixed precision and
    `tf.distribute`, and the model stays a plain Keras model.

    Zeros stay zeros, and count as one of the values: cluster a pruned model, and it is sparse and
    clustered, however the schedule goes on. Prune before you cluster: zeros that `prune` makes in a
    clustered model are one value more. Call it again to cluster the weights as they
    are then, and after loading a model or weights: where a kernel has no more than `clusters` values
    already, they are its clusters. `fit` warns when it starts if weights were replaced by others of
    more values. A model that is loaded from a file and trained without this call loses its clusters,
    and nothing can warn of it. Optimizers with `use_ema=True` would bring back other values.
    `strip_clustering` ends it. It costs some ten nanoseconds for each weight and step on a processor
    of two cores, where it was 6 % of a step of MobileNetV2 (96×96 pixels, batches of 32).

    Args:
        model: A built Keras model: functional, sequential or subclassed. Compile it before or after.
        clusters: The number of values of a kernel at most, zero among them, ≥ 2. Powers of two make
            the most of their bits: 16 take 4.
        include: Only these layers, and those below them, written as for `prune`, which chooses the
            same weights by default: the kernels of dense, convolutional and recurrent layers.
        exclude: Leave these layers alone, and those below them.
        seed: Of the random choice of the first means, k-means++.

    Returns:
        A `Report`: how many values each kernel has, and how far they are from its weights, as the
        root of the sum of squares of the differences, relative to that of the weights.

    Raises:
        ValueError: The model is not built, nothing in it can be clustered, a selector matches no
            layer, `clusters` is not an integer ≥ 2, or a weight is not finite.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(10, name="head")])
    >>> report = at.cluster(model, clusters=8)
    >>> np.unique(model.layers[0].kernel.numpy()).size
    8

    Reference: Han et al., "Deep compression: compressing deep neural networks with pruning, trained
    quantization and Huffman coding", ICLR 2016; https://arxiv.org/abs/1510.00149. There, the
    gradients of a cluster are added up; the mean here keeps the learning rate of single weights.
    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007).
    """
    require_model(model, "cluster")
    require_integer("clusters", clusters, 2)
    done, left = {}, {}
    chosen = []
    for path, _, v, reason in weights_of(model, include, exclude):
        if reason:
            left.setdefault(path, reason)
            continue
        w = _float64(v)
        if not np.isfinite(w).all():
            raise ValueError(f"The weight {v.path!r} of layer {path!r} is not finite.")
        chosen.append((path, v, w))
    if not chosen:
        report = Report("cluster", (), tuple(Entry(*entry) for entry in left.items()))
        raise ValueError(f"Nothing in model {model.name!r} can be clustered:\n{report}")
    training_start = TrainingStart(model, "cluster")
    for path, v, w in chosen:
        ClusterConstraint.attach(v, clusters, seed, training_start=training_start)
        now = _float64(v)
        size = np.linalg.norm(w)
        error = np.linalg.norm(now - w) / size if size else 0.0
        note = f"{v.name} {tuple(v.shape)}: {np.unique(now).size} values, {error:.1%} off"
        done.setdefault(path, []).append(note)
    if model.compiled:
        model.train_function = None  # traced without these constraints; `fit` makes it anew
    report = Report(
        "cluster",
        tuple(Entry(path, "; ".join(notes)) for path, notes in done.items()),
        tuple(Entry(path, reason) for path, reason in left.items() if path not in done),
    )
    attach(model, report)
    return report


def strip_clustering(model: keras.Model, *, include=None, exclude=None) -> Report:
    """Ends the clustering of `model` in place: its values stay until training moves them apart.

    Saving, exporting, converting and quantizing need no such call, as a clustered model is a plain
    Keras model. Call it to train each weight by itself again. What else held a weight, such as the
    mask of `prune`, still does. A `tf.function` of your own that contains the training step has to be
    made after the call.

    Args:
        model: A model that `cluster` was applied to, or one that has it as a part.
        include: Free only these layers, and those below them, written as for `cluster`.
        exclude: Leave these layers clustered, and those below them.

    Returns:
        A `Report`: which weights are free, with how many values, and which layers stay as they are.

    Raises:
        ValueError: The model is not built, a selector matches no layer, or none of the selected
            weights is clustered.

    Example:

    >>> import keras
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(10, name="head")])
    >>> report = at.cluster(model, clusters=8)
    >>> print(at.strip_clustering(model))
    strip_clustering: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  --------------------------------
    head   yes      kernel (32, 10): 8 values, as is
    """

    def release(v):
        ClusterConstraint.detach(v)
        return f"{np.unique(_float64(v)).size} values"

    return free(
        model,
        "strip_clustering",
        include,
        exclude,
        lambda v: constraint_of(v) is not None,
        release,
        "clustered",
        "In a model that was loaded from a file nothing keeps clusters",
    )


class ClusterConstraint(keras.constraints.Constraint):
    """Gives the weights of a cluster their mean; `cluster` puts it on `variable.constraint`.

    On a pruned weight it is the inner constraint of the mask, so that the mask comes first and last.

    Args:
        variable: The Keras variable.
        clusters: The number of its values at most.
        seed: That of k-means++.
        inner: The constraint that the variable had before, or `None`; it stays in force.
        training_start: The `TrainingStart` of the call of `cluster`; by default nothing is said.
    """

    def __init__(self, variable, clusters: int, seed: int, inner=None, training_start=None):
        self.inner, self.clusters = inner, clusters
        self._training_start = training_start
        if training_start is not None:
            training_start.members.append(self)
        self._variable, self._seed = variable, seed
        self._pending = False  # whether the weights have yet to be divided
        self._cluster = local_variable(tf.zeros(variable.shape, tf.int32), "cluster", variable)

    @classmethod
    def attach(
        cls, variable, clusters: int, seed: int, now: bool = True, training_start=None
    ) -> None:
        """Puts it on `variable`, in place of one that was there before, and applies it.

        Args:
            variable: The Keras variable.
            clusters: The number of its values at most.
            seed: That of k-means++.
            now: Whether to divide the weights as they are now; otherwise `catch_up` does.
            training_start: The `TrainingStart` of the call of `cluster`; by default nothing is said.
        """
        cls.detach(variable)
        mask = variable.constraint if isinstance(variable.constraint, MaskConstraint) else None
        inner = mask.inner if mask else variable.constraint
        constraint = cls(variable, clusters, seed, inner, training_start)
        if mask:
            mask.inner = constraint
        else:
            variable.constraint = constraint
        constraint._pending = not now
        if now:
            constraint.divide(zero=mask is not None)
            variable.assign(constraint.means(variable))

    @classmethod
    def detach(cls, variable) -> None:
        """Removes it from `variable`, if it is there."""
        mask = variable.constraint if isinstance(variable.constraint, MaskConstraint) else None
        if (constraint := constraint_of(variable)) is None:
            return
        if mask:
            mask.inner = constraint.inner
        else:
            variable.constraint = constraint.inner

    def divide(self, zero: bool = False) -> None:
        """Divides the weights, as they are, into clusters.

        Args:
            zero: Keep one of the values for zeros even if there are none yet.
        """
        w = _float64(self._variable)
        alive = w != 0
        # Of those that are zero, any: they are left out of the mean. If they come to life, as a mask
        # may allow, they join the nearest.
        k = self.clusters - (zero or not alive.all())
        centers = k_means(w[alive], k, self._seed)
        self._cluster.assign(nearest(w, centers))

    def __call__(self, w):
        if self._training_start is not None:
            self._training_start()
        if tf.inside_function():
            with tf.init_scope():
                self._follow()
        if self.inner is not None:
            # On means, so that it makes zeros of whole clusters, and before means, as it may move
            # weights apart.
            w = self.inner(self.means(w))
        return self.means(w)

    def means(self, w) -> tf.Tensor:
        """Returns `w` with the mean of its cluster in place of each element that is not zero."""
        w = tf.convert_to_tensor(w)
        # In double precision, or a sum of millions of equal weights would drift from step to step.
        values = tf.reshape(tf.cast(w, tf.float64), [-1])
        alive = tf.cast(tf.not_equal(values, 0), tf.float64)
        cluster = tf.reshape(tf.convert_to_tensor(self._cluster), [-1])
        # A histogram, since sums by segments take fifteen times as long.
        size = {"minlength": self.clusters, "maxlength": self.clusters}
        sums = tf.math.bincount(cluster, weights=values, **size)
        counts = tf.math.bincount(cluster, weights=alive, **size)
        means = tf.cast(sums / tf.maximum(counts, 1), w.dtype)
        shared = tf.reshape(tf.gather(means, cluster), w.shape)
        return tf.where(tf.equal(w, 0), tf.zeros((), w.dtype), shared)

    def shortfall(self, batches: int) -> str:
        """Returns "": no training is too short for clusters, which are there from the start."""
        return ""

    def replaced(self) -> list[str]:
        """Returns the path of the weight if it has more values than there are clusters, or zero."""
        if constraint_of(self._variable) is not self or self._holds():
            return []
        w = _float64(self._variable)
        return [self._variable.path] if np.unique(w[w != 0]).size > self.clusters else []

    def catch_up(self) -> None:
        """Divides the weights as they are, if that is still to be done."""
        if self._pending:
            self._follow()

    def _follow(self):
        """Lets the clusters follow from weights that were restored, before the step that is traced.

        `keras.callbacks.BackupAndRestore` restores them when `fit` starts.
        """
        self._pending = False
        if not self._holds():
            self.divide(zero=not _float64(self._variable).all())

    def _holds(self) -> bool:
        """Whether the elements of each cluster that are not zero are equal."""
        w, cluster = _float64(self._variable).ravel(), self._cluster.numpy().ravel()
        value = np.zeros(self.clusters)
        alive = w != 0
        value[cluster[alive]] = w[alive]
        return not (value[cluster] != w)[alive].any()


def constraint_of(variable) -> ClusterConstraint | None:
    """Returns what clusters a Keras variable, or `None`; it may be within the mask of `prune`."""
    constraint = variable.constraint
    if isinstance(constraint, MaskConstraint):
        constraint = constraint.inner
    return constraint if isinstance(constraint, ClusterConstraint) else None


def k_means(values: np.ndarray, clusters: int, seed: int = 0) -> np.ndarray:
    """Returns the centers that k-means finds on a line, in ascending order.

    Args:
        values: Numbers of any shape.
        clusters: How many centers at most; there are fewer if there are fewer distinct values.
        seed: That of the first centers, which k-means++ chooses.

    Returns:
        A float64 vector of at least one number, unless there are no values.
    """
    x = np.sort(np.asarray(values, np.float64), axis=None)
    distinct = np.unique(x)
    if len(distinct) <= clusters:
        return distinct if len(distinct) else np.zeros(1)
    rng = np.random.default_rng(seed)
    centers = [x[rng.integers(x.size)]]
    distance = (x - centers[0]) ** 2
    while len(centers) < clusters:
        chance = np.cumsum(distance)
        at = np.searchsorted(chance, rng.uniform(0, chance[-1]), side="right")
        centers.append(x[min(at, x.size - 1)])
        distance = np.minimum(distance, (x - centers[-1]) ** 2)
    # On a line a cluster is a stretch of the sorted values, and its sum a difference of running sums.
    centers, running = np.sort(centers), np.concatenate([[0.0], np.cumsum(x)])
    for _ in range(300):
        edges = np.searchsorted(x, (centers[:-1] + centers[1:]) / 2, side="right")
        edges = np.concatenate([[0], edges, [x.size]])
        counts, sums = np.diff(edges), np.diff(running[edges])
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def nearest(values: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Returns the index of the nearest of the ascending `centers`, int32, in the shape of `values`."""
    return np.searchsorted((centers[:-1] + centers[1:]) / 2, values).astype(np.int32)


def _float64(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")).astype(np.float64)
