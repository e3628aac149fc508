"""Which channels go: their scores, and how many of those that depend on one another remain."""

import math
from collections.abc import Callable

import keras
import numpy as np

from accel_tf import layers
from accel_tf.pruning._channel_graph import ChannelGraph, Part
from accel_tf.pruning._selection import Selection

Criterion = str | Callable[[str, keras.Layer], np.ndarray]

_NORMS = {"magnitude": 1, "l2": 2}


def validate(amount, criterion, multiple_of):
    """Raises a `ValueError` for an argument that is out of range."""
    if not isinstance(amount, (int, float)) or not 0 < amount < 1:
        raise ValueError(f"amount is a fraction above 0 and below 1. Received: {amount!r}")
    if criterion not in _NORMS and not callable(criterion):
        raise ValueError(
            f"criterion is {', '.join(map(repr, _NORMS))} or a function (path, layer) -> scores. "
            f"Received: {criterion!r}"
        )
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of is a positive int. Received: {multiple_of!r}")


def pin_unselected(graph: ChannelGraph, model, include, exclude) -> None:
    """Pins the channels that layers make which are excluded, or not included."""
    paths = [(model.name, model), *layers.walk(model)]
    included, excluded = Selection(include, paths), Selection(exclude, paths)
    for part in graph.parts.values():
        if part.makes is None:
            continue
        if part.layer in excluded:
            reason = f"{part.path!r} is excluded"
        elif include is not None and part.layer not in included:
            reason = f"{part.path!r} is not included"
        else:
            continue
        for root in graph.root[part.makes]:
            graph.pinned.setdefault(root, reason)


def choose(graph: ChannelGraph, amount: float, criterion, multiple_of: int) -> np.ndarray:
    """Returns for each id of `graph` whether it is to go: of each family `amount`, by lowest score.

    A family are the channels that the same layers make. Those of one layer are one family; if
    others' outputs are added to them, these belong to it, too.
    """
    makers: dict[int, list[int]] = {}
    scores: dict[int, list[float]] = {}
    for index, part in enumerate(graph.parts.values()):
        if part.makes is None:
            continue
        roots = graph.root[part.makes]
        for root, score in zip(roots, _scores(part, criterion), strict=True):
            scores.setdefault(root, []).append(score)
        for root in dict.fromkeys(roots):
            makers.setdefault(root, []).append(index)
    families: dict[tuple, list[int]] = {}
    for root, indices in makers.items():
        if root not in graph.pinned:
            families.setdefault(tuple(indices), []).append(root)
    gone = []
    for roots in families.values():
        n = len(roots)
        # Of 10 at 0.9, one remains; 10 · (1 − 0.9) is a little less or more than that.
        kept = max(1, math.ceil(n * (1 - amount) - 1e-6))
        kept = min(n, -(-kept // multiple_of) * multiple_of)
        order = np.argsort([-np.mean(scores[root]) for root in roots], kind="stable")
        gone += [roots[i] for i in order[kept:]]
    return graph.keep_one(graph.spread(gone))


def _scores(part: Part, criterion) -> np.ndarray:
    n = len(part.makes)
    if callable(criterion):
        scores = np.asarray(criterion(part.path, part.layer), np.float64)
        if scores.shape != (n,) or np.isnan(scores).any():
            raise ValueError(
                f"The criterion has to give {n} numbers for layer {part.path!r}, one for each "
                f"output channel. Received: {scores!r}"
            )
        return scores
    kernel = _kernel(part).astype(np.float64)
    norms = np.linalg.norm(kernel, ord=_NORMS[criterion], axis=1)
    return norms / max(norms.mean(), 1e-30)


def _kernel(part: Part) -> np.ndarray:
    """The kernel that makes a layer's outputs, as a matrix with one row for each."""
    kernels = [slot for slot in part.slots if len(slot.variable.shape) > 1]
    slot = next((s for s in kernels if s.ids is part.makes), kernels[-1])
    kernel = np.moveaxis(keras.ops.convert_to_numpy(slot.variable), slot.axis, 0)
    if slot.ids is not part.makes:  # a depthwise one: (in, multiplier) are the outputs
        kernel = np.moveaxis(kernel, -1, 1)
    return kernel.reshape(len(part.makes), -1)
