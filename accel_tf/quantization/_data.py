"""The data of a calibration: batches of inputs, checked against what the model takes."""

import numbers
from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf

from accel_tf.layers import batch_of


def batches_of(model: keras.Model, data, batch_size: int) -> Iterable:
    """Returns the batches of calibration data, as `calibrate` takes them.

    Args:
        model: A functional or sequential model.
        data: As in `calibrate`, but not `None`.
        batch_size: The number of samples in each batch of an array, if the inputs of the model take any.

    Raises:
        ValueError: `data` is neither arrays nor batches, is infinite, or holds another number of arrays than the model
            has inputs; or the number of samples is no multiple of the batch that the inputs take.
    """
    if isinstance(data, tf.data.Dataset):
        if data.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("calibrate needs a finite dataset; end this one with .take(batches).")
        return data
    if isinstance(data, keras.utils.PyDataset):
        return [data[i] for i in range(len(data))]
    if isinstance(data, (str, bytes)) or not (_is_array(data) or isinstance(data, Iterable)):
        raise ValueError(
            "calibrate takes an array, a list or dictionary of arrays, a tf.data.Dataset or another "
            f"iterable of batches. Received: {type(data).__name__} {data!r:.60}"
        )
    if isinstance(data, (list, tuple, dict)):
        if not data:
            raise ValueError(
                f"calibrate needs at least one sample; received an empty {type(data).__name__}. "
                "Write calibrate(model, x) with an array x of inputs."
            )
        data = _one_array_per_input(model, data)
    leaves = keras.tree.flatten(data) if isinstance(data, (list, dict)) else [data]
    if not all(map(_is_array, leaves)):
        return data
    _require_whole_batches(model, len(leaves[0]), "calibrate received arrays of")
    size = batch_of(model) or 1
    return _slices(data, leaves, max(batch_size // size, 1) * size)


def _one_array_per_input(model, data):
    """Returns a list or dictionary of arrays, one array, or an iterable of batches, as it is."""
    if isinstance(data, dict):
        return {name: _array_of_numbers(value) for name, value in data.items()}
    data = _array_of_numbers(data)
    if _is_array(data):
        return data
    if not any(map(_is_array, data)):
        return iter(data)  # tuples, lists or dictionaries: each is a batch
    count = len(model.inputs)
    if len(data) != count or not all(map(_is_array, data)):
        shapes = ", ".join(str(tuple(a.shape)) if _is_array(a) else type(a).__name__ for a in data)
        raise ValueError(
            f"Model {model.name!r} has {count} input{'s' if count > 1 else ''}, and calibrate "
            f"received a {type(data).__name__} of {len(data)}: {shapes}. It takes one array for each "
            "input, and no labels: for (x, y) write calibrate(model, x). For a list of batches write "
            "calibrate(model, iter(batches))."
        )
    return list(data)


def _array_of_numbers(data):
    """Returns nested lists of numbers as an array, and anything else as it is."""
    leaves = keras.tree.flatten(data) if isinstance(data, (list, tuple)) else []
    only_numbers = bool(leaves) and all(isinstance(leaf, numbers.Number) for leaf in leaves)
    return np.asarray(data) if only_numbers else data


def parts_of(model: keras.Model, inputs, position: int) -> list:
    """Returns the inputs of a batch in parts of as many samples as the model takes.

    Args:
        model: A functional or sequential model.
        inputs: As from `inputs_of`.
        position: The number of the batch, for the message.

    Raises:
        ValueError: The number of samples is no multiple of that number.
    """
    size = batch_of(model)
    if size is None:
        return [inputs]
    leaves = keras.tree.flatten(inputs)
    _require_whole_batches(model, len(leaves[0]), f"Batch {position} of the calibration data has")
    return _slices(inputs, leaves, size)


def _require_whole_batches(model, count, what):
    """Raises a ValueError if `count` samples cannot be run in batches of the size that a model takes."""
    size = batch_of(model)
    if size is not None and count % size:
        raise ValueError(
            f"{what} {count} samples, and the inputs of model {model.name!r} take {size} at a time "
            f"(batch_shape={model.inputs[0].shape}), so their number must be a multiple of {size}: write "
            f"x[: {count - count % size}] for an array, and .batch({size}, drop_remainder=True) for a dataset."
        )


def _slices(data, arrays, size):
    # A list of batches looks like a list of inputs; batches have ranks like the inputs' as well, so
    # a plain list of arrays is always one array per input, as in `model.predict`.
    lengths = {len(array) for array in arrays}
    if len(lengths) > 1:
        raise ValueError(
            f"The arrays of several inputs must have the same length, received {sorted(lengths)}. "
            "For batches of different sizes pass a generator or a tf.data.Dataset."
        )
    starts = range(0, lengths.pop(), size)
    return [keras.tree.map_structure(lambda a, s=s: a[s : s + size], data) for s in starts]


def inputs_of(model: keras.Model, batch, position: int):
    """Returns the inputs of a batch in a structure that `model` takes.

    Args:
        model: A functional or sequential model.
        batch: Inputs, or a tuple `(x, y)` or `(x, y, sample_weight)`, of which x is used.
        position: The number of the batch, for messages.

    Raises:
        ValueError: The batch is empty, or its arrays do not fit the inputs of the model.
    """
    where = f"Batch {position} of the calibration data"
    if isinstance(batch, tuple):
        batch = keras.utils.unpack_x_y_sample_weight(batch)[0]
    names = _names(model)
    by_name = isinstance(batch, dict) and not any(map(keras.tree.is_nested, batch.values()))
    if by_name:
        if missing := [name for name in names if name not in batch]:
            raise ValueError(
                f"{where} is a dictionary with the keys {sorted(batch)}, and the model needs "
                f"{missing}. Name the arrays after the inputs of the model: {names}."
            )
        flat = [batch[name] for name in names]
    else:
        flat = keras.tree.flatten(batch)
    if len(flat) != len(names):
        raise ValueError(
            f"{where} has {len(flat)} array{'' if len(flat) == 1 else 's'}, and the model takes "
            f"{len(names)}: {names}. Pass one array for each input: a list of arrays, or a "
            "dictionary by name."
        )
    tensors = [_tensor(x, i, where) for x, i in zip(flat, model.inputs, strict=True)]
    if by_name or len(tensors) == 1:
        return keras.tree.pack_sequence_as(_structure(model), tensors)
    return keras.tree.pack_sequence_as(batch, tensors)


def _tensor(x, expected, where) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is no array of numbers: {error}") from error
    shape, wanted = tuple(tensor.shape), tuple(expected.shape)
    if not _fits(shape, wanted):
        single = _fits((1, *shape), wanted)
        raise ValueError(
            f"{where} has the shape {shape}, and input {expected.name!r} takes {wanted}. "
            + (
                "It looks like a single sample: write .batch(32) for a dataset of samples, "
                "and x[None] for one array."
                if single
                else "Pass inputs as model.predict takes them."
            )
        )
    if 0 in shape:
        raise ValueError(f"{where} is empty: its shape is {shape}. Leave such batches out.")
    _check_type(tensor, expected, where)
    return tensor


def _check_type(tensor, expected, where) -> None:
    given, wanted = tensor.dtype, tf.as_dtype(expected.dtype)
    fits = (given == tf.string) == (wanted == tf.string) and not given.is_complex
    if given.is_floating and wanted.is_integer:  # which Keras would cut off
        fits = bool(tf.reduce_all(tensor == tf.floor(tensor)))
    if not fits:
        raise ValueError(
            f"{where} has {given.name} values that input {expected.name!r}, of type {wanted.name}, "
            "does not hold. Pass inputs as model.predict takes them."
        )


def _fits(shape, wanted) -> bool:
    """Whether Keras takes a batch of this shape; it adds and removes a last axis of length 1."""
    if len(shape) == len(wanted) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    elif len(shape) == len(wanted) - 1 and wanted[-1] == 1:
        shape = (*shape, 1)
    return len(shape) == len(wanted) > 0 and all(
        size in (None, n) for size, n in zip(wanted[1:], shape[1:], strict=True)
    )


def _structure(model):
    """Returns the structure of the model's inputs; a sequential model has one."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _names(model) -> list[str]:
    structure = _structure(model)
    flat = isinstance(structure, dict) and len(structure) == len(model.inputs)
    return sorted(structure) if flat else [tensor.name for tensor in model.inputs]


def _is_array(x) -> bool:
    return hasattr(x, "shape") and len(x.shape) > 0
