"""How good a model is: accuracy for labels, root-mean-square error for real values, or any metric."""

from collections.abc import Callable

import keras
import numpy as np


def metric_for(metric, y, name: str, outputs) -> "str | Callable | keras.Metric":
    """Returns what `compare` computes: `metric`, or what fits the targets if it is `None`.

    Args:
        metric: As in `compare`.
        y: The targets, an array.
        name: The name of the model that computed the outputs, for messages.
        outputs: The outputs of one model for all samples.

    Returns:
        `"accuracy"`, the function `rmse`, a `keras.Metric`, or the function that the user passed.

    Raises:
        ValueError: There are several outputs and no metric, or `metric` is none.
    """
    if metric is None:
        outputs = _single(name, outputs)
        real = isinstance(_labels(y, outputs), str) and _has_shape_of(y, outputs)
        return rmse if real else "accuracy"
    if isinstance(metric, str) and metric != "accuracy":
        return keras.metrics.get(metric)
    if isinstance(metric, (str, keras.Metric)) or callable(metric):
        return metric
    raise ValueError(
        "metric must be None, the name of a Keras metric, a keras.Metric or a function "
        f"(y, outputs) -> float. Received: {metric!r}"
    )


def title_of(metric) -> str:
    """Returns the heading of the column for what `metric_for` returned."""
    if metric is rmse:
        return "RMSE"
    name = metric if isinstance(metric, str) else getattr(metric, "name", None)
    return name or getattr(metric, "__name__", "metric")


def score(metric, y, name: str, outputs) -> float:
    """Returns the value of a metric, as `metric_for` returns it, for the outputs of one model."""
    if isinstance(metric, str):
        return _accuracy(y, name, _single(name, outputs))
    if metric is rmse:
        outputs = _single(name, outputs)
        if not _has_shape_of(y, outputs):
            raise ValueError(
                f"Targets of shape {y.shape} do not fit the outputs of model {name!r}, of shape "
                f"{outputs.shape}."
            )
        return rmse(y.reshape(outputs.shape), outputs)
    if isinstance(metric, keras.Metric):
        metric.reset_state()
        metric.update_state(y, outputs)
        return float(metric.result())
    return float(np.mean(metric(y, outputs)))


def rmse(y, outputs) -> float:
    """Returns the root-mean-square error, which has the unit of the targets."""
    return float(np.sqrt(np.mean(np.square(np.subtract(outputs, y, dtype=np.float64)))))


def _accuracy(y, name, outputs) -> float:
    found = _labels(y, outputs)
    if not isinstance(found, str):
        predicted, actual = found
        return float(np.mean(predicted == actual))
    if _has_shape_of(y, outputs):
        way = (
            "Leave metric out to get the root-mean-square error, or pass the name of another metric"
        )
    else:
        way = "Pass labels, or a metric of your own: a function (y, outputs) -> float"
    raise ValueError(
        f"Accuracy compares labels with the outputs of model {name!r}, but {found}. {way}."
    )


def _labels(y, outputs) -> tuple[np.ndarray, np.ndarray] | str:
    """Returns the predicted and the true labels, of equal shapes, or why `y` holds no labels."""
    if y.dtype.kind not in "biuf":
        return f"y holds values of type {y.dtype}, which are no numbers"
    if outputs.dtype.kind in "iu" and y.size == outputs.size:  # The model ends with an arg-max.
        actual = y.reshape(outputs.shape)
        return _first_other(y, y == np.floor(y), "is no integer") or (outputs, actual)
    classes = outputs.shape[-1] if outputs.ndim > 1 else 1
    if y.size == outputs.size and (classes == 1 or y.shape == outputs.shape):
        if problem := _first_other(y, (y == 0) | (y == 1), "is neither 0 nor 1"):
            return problem
        if classes > 1 and np.all(np.sum(y, -1) == 1):
            return outputs.argmax(-1), y.argmax(-1)
        return outputs > 0.5, y.reshape(outputs.shape) > 0.5
    predicted = outputs.argmax(-1) if classes > 1 else outputs
    if y.size != predicted.size:
        return (
            f"labels of shape {y.shape} do not fit outputs of shape {outputs.shape}: expected "
            "integers, one for each row, or one-hot of that shape"
        )
    fits = (y == np.floor(y)) & (y >= 0) & (y < classes)
    problem = _first_other(y, fits, f"is no integer from 0 to {classes - 1}")
    return problem or (predicted, y.reshape(predicted.shape))


def _first_other(y, fits, what) -> str | None:
    if np.all(fits):
        return None
    position = tuple(int(i) for i in np.argwhere(~fits)[0])
    return f"y{list(position)} = {y[position]} {what}"


def _has_shape_of(y, outputs) -> bool:
    """Whether targets and outputs have equal shapes, up to axes of length 1."""
    equal = [n for n in y.shape if n != 1] == [n for n in outputs.shape if n != 1]
    return equal and y.dtype.kind in "biuf"


def _single(name, outputs) -> np.ndarray:
    """Returns the only output of a model, which may return it in a list or dictionary."""
    leaves = keras.tree.flatten(outputs)
    if len(leaves) != 1:
        raise ValueError(
            f"Model {name!r} has {len(leaves)} outputs, for which compare chooses no metric. Pass "
            "metric=a function (y, outputs) -> float."
        )
    return leaves[0]
