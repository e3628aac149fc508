"""Which weights are pruned together: the granularity of a mask.

A pattern turns a weight into a vector of scores, one for each unit that is kept or pruned as a whole,
and a vector of decisions back into a mask of the weight's shape.
"""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Each weight is kept or pruned on its own, by its magnitude.

    The finest pattern, hence the most accurate at a given sparsity. Dense kernels do not skip its
    zeros: files compress, latency stays. Above about 80 % sparsity `accel_tf.sparsify` is faster.

    Example:

    >>> Unstructured().scores(tf.constant([[1.0, -3.0]])).numpy()
    array([1., 3.], dtype=float32)

    Reference: Han et al., "Learning both weights and connections" (2015);
    https://arxiv.org/abs/1506.02626.
    """

    def scores(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the importance of each unit of `weights`, as a vector."""
        return tf.reshape(tf.abs(weights), [-1])

    def expand(self, keep: tf.Tensor, shape) -> tf.Tensor:
        """Returns the mask of `shape` for the decisions `keep`, in the order of `scores`."""
        return tf.reshape(keep, shape)

    def get_config(self) -> dict:
        """Returns the arguments, for `from_config`: none."""
        return {}

    @classmethod
    def from_config(cls, config: dict):
        """Makes the pattern anew from what `get_config` returned."""
        return cls(**config)


def keep_largest(scores: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
    """Returns which `scores` to keep: exactly k of them, and of equal ones those that come first.

    k = max(round(n·(1 − sparsity)), 1) in float32, halves to even, is TFMOT's number. TFMOT then
    keeps all that reach the k-th score, hence too many where scores are equal; ranks do not.

    Args:
        scores: A vector of length n.
        sparsity: A float32 scalar, the fraction to drop.

    Returns:
        A bool vector of length n.
    """
    n = scores.shape[0]
    kept = tf.maximum(tf.round(tf.cast(n, tf.float32) * (1.0 - sparsity)), 1.0)
    # The length of top_k has to be static for XLA, so all are sorted and the first k marked.
    _, order = tf.math.top_k(scores, k=n)
    return tf.scatter_nd(order[:, None], tf.range(n) < tf.cast(kept, tf.int32), [n])
