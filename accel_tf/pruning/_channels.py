"""The verbs `mask_channels` and `remove_channels`: whole channels to zero, and out of the model."""

import dataclasses
import math

import keras
import numpy as np

from accel_tf import layers
from accel_tf.pruning._channel_choice import Criterion, choose, pin_unselected, validate
from accel_tf.pruning._channel_graph import ChannelGraph, Dead, Part
from accel_tf.report import Entry, Report, attach


def mask_channels(
    model: keras.Model,
    amount: float = 0.5,
    *,
    criterion: Criterion = "magnitude",
    include=None,
    exclude=None,
    multiple_of: int = 1,
) -> Report:
    """Sets whole channels of `model` to zero, in place: those that `remove_channels` would remove.

    A channel is masked where it is made and where it is read: zero are the column of the kernel that
    makes it, with its bias, the scale and shift of normalizations that it passes, and the rows of the
    kernels that read it. What is masked thus adds nothing, whatever lies between; and removing it
    changes nothing. Channels that are added or multiplied are masked together.

    Args:
        model: A built functional or sequential model; models nested in it are followed.
        amount: The fraction of channels to mask, above 0 and below 1: of each layer, or of each set
            of layers whose channels depend on one another. At least one remains.
        criterion: `"magnitude"` masks the channels whose kernels have the smallest sum of absolute
            values, `"l2"` the smallest Euclidean norm; each relative to the mean of its layer,
            averaged over the layers that make the channel. A function `(path, layer) -> scores` gives
            one score per output channel, of which the lowest go, not relative to anything.
        include: Mask only the outputs of these layers, and of those below them: a layer, a layer
            class, a name or path with wildcards (`"block_*"`), a function `(path, layer) -> bool`, or
            a sequence of those.
        exclude: Keep all outputs of these layers, and of those below them; written as `include`.
        multiple_of: Round the number that remains up to a multiple of this, for hardware that likes
            such numbers.

    Returns:
        A `Report`: how many channels of each layer are masked, and why others are not.

    Raises:
        ValueError: An argument is out of range, a selector matches no layer, nothing can be masked,
            or the model is not built, or subclassed.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(6, name="hidden"), keras.layers.Dense(2, name="head")]
    ... )
    >>> at.mask_channels(model, 0.5).done[0]
    Entry(layer='hidden', note='3 of 6 output channels masked')

    Reference: Li et al., "Pruning filters for efficient ConvNets" (2017), section 3.1, for the
    magnitude; Fang et al., "DepGraph: towards any structural pruning" (2023), section 3.2, for the
    channels that depend on one another; https://arxiv.org/abs/1608.08710 and
    https://arxiv.org/abs/2301.12900.
    """
    layers.require_model(model, "mask_channels")
    validate(amount, criterion, multiple_of)
    graph = ChannelGraph(model)
    pin_unselected(graph, model, include, exclude)
    removed = choose(graph, amount, criterion, multiple_of)
    report = _mask_report(graph, removed)
    if not report.done:
        raise ValueError(f"No channel of model {model.name!r} can be masked:\n{report}")
    _mask(graph, removed)
    attach(model, report)
    return report


def _mask(graph, removed) -> None:
    """Sets the weights of removed channels to zero, in place."""
    for part in graph.parts.values():
        for slot in (slot for slot in part.slots if slot.zero):
            value = np.moveaxis(np.array(keras.ops.convert_to_numpy(slot.variable)), slot.axis, 0)
            value[removed[slot.ids]] = 0
            slot.variable.assign(np.moveaxis(value, 0, slot.axis))


def remove_channels(
    model: keras.Model,
    amount: float | None = None,
    *,
    criterion: Criterion = "magnitude",
    include=None,
    exclude=None,
    multiple_of: int = 1,
    verify: bool = True,
) -> keras.Model:
    """Returns a smaller copy of `model`: a plain, dense Keras model that has fewer channels.

    With `amount`, the channels of lowest score go, and the new model computes what `model` would
    after `mask_channels` with the same arguments. Without, those go that are masked already: the new
    model computes what `model` does. These are channels that no kernel reads, and those that are zero
    where they are read, by zeros in kernels, biases and normalizations. One that is constant
    instead, as a shift of BatchNormalization makes it, becomes part of the bias of the layer that
    reads it; but not where that layer pads its input, as the sum is another one at the border: there
    it stays, and the report says so. Both are equalities of inference, up to rounding.

    Dependencies are followed through normalizations per channel, activations, depthwise and grouped
    convolutions, sums, products, concatenations, reshapes, pooling, shared layers and nested models.
    Inputs and outputs of the model keep their shapes, and so does whatever is read or made by
    a layer that has no rule: of your own, recurrent ones, attention; and LayerNormalization, whose
    statistics would be others with fewer channels. `accel_tf.report_of(new_model)` tells of each.

    Layers keep their names and configuration, apart from their sizes. The new model is not compiled,
    and constraints by `prune` are not carried over. It runs on Keras's dense kernels, hence is faster
    without any special one. Train it a little to regain accuracy.

    Args:
        model: A built functional or sequential model; models nested in it are made smaller, too.
        amount: The fraction of channels to remove of each layer, or of each set of layers whose
            channels depend on one another; above 0 and below 1. `None` removes what is masked.
        criterion: Which go first: `"magnitude"`, `"l2"` or a function, as in `mask_channels`.
        include: Remove only outputs of these layers, and of those below them; written as in `prune`.
        exclude: Keep all outputs of these layers, and of those below them.
        multiple_of: Round the number that remains up to a multiple of this; with `amount`.
        verify: Whether to compare the new model, on a few samples made from the input specification,
            with `model` once its channels are masked.

    Returns:
        A new model of the same class and name, not compiled.

    Raises:
        ValueError: An argument is out of range, a selector matches no layer, nothing can be removed,
            or the model is not built, or subclassed; or the new model does not compute what `model`
            does, which is an error in accel_tf or in a custom layer.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(6, name="hidden"), keras.layers.Dense(2, name="head")]
    ... )
    >>> small = at.remove_channels(model, 0.5)
    >>> print(at.report_of(small))  # doctest: +ELLIPSIS
    remove_channels: 2 layers changed, 0 left alone
    layer   changed  note
    ------  -------  -------------------------------------------------------------------------
    hidden  yes      outputs 6 → 3, weights 54 → 27
    head    yes      inputs 6 → 3, weights 14 → 8; outputs stay: they are outputs of the model
    Checked on 4 samples against the original: ...
    >>> at.mask_channels(model, 0.5).done[0].note, small.count_params()
    ('3 of 6 output channels masked', 35)
    >>> at.remove_channels(model).count_params()  # what is masked is found again
    35

    Reference: as of `mask_channels`.
    """
    layers.require_model(model, "remove_channels")
    graph = ChannelGraph(model)
    pin_unselected(graph, model, include, exclude)
    if amount is None:
        dead = graph.dead()
    else:
        validate(amount, criterion, multiple_of)
        dead = Dead(choose(graph, amount, criterion, multiple_of), {}, {}, {})
    report = _removal_report(graph, dead)
    if not report.done:
        raise ValueError(f"No channel of model {model.name!r} can be removed:\n{report}")
    new_model = _smaller(graph, model, dead.removed, dead.shifts)
    if verify:
        note = _checked(graph, model, new_model, dead.removed if amount is not None else None)
        report = dataclasses.replace(report, note=note)
    attach(new_model, report)
    return new_model


def _checked(graph, model, new_model, masked) -> str:
    """Compares a smaller model with the one that it was made of, once channels of that are masked."""
    x = layers.samples(model)
    if masked is None or x is None:
        return layers.require_same("remove_channels", model, new_model, x)
    before = model.get_weights()
    try:
        _mask(graph, masked)
        expected = layers.run(model, x)
    finally:
        model.set_weights(before)
    return layers.require_same("remove_channels", model, new_model, x, expected)


def _smaller(graph, model, removed, shifts) -> keras.Model:
    made: list[tuple[Part, keras.Layer]] = []

    def count(ids):
        return int(np.sum(~removed[ids]))

    def replace(path, layer):
        part = graph.parts.get(id(layer))
        if part is None or not (_changes(part, removed) or id(layer) in shifts):
            return None
        config = layer.get_config()
        if part.resize:
            config.update(part.resize(count))
        if id(layer) in shifts:
            config["use_bias"] = True
        new = type(layer).from_config(config)
        made.append((part, new))
        return new

    def shape_of(tensor):
        ids = graph.ids[id(tensor)]
        return tensor.shape if ids is None else (*tensor.shape[:-1], count(ids))

    new_model = layers.rebuild(model, replace, input_shape=shape_of)
    for part, new in made:
        new.set_weights(_weights(part, removed, shifts.get(id(part.layer))))
        new.trainable = part.layer.trainable
    return new_model


def _weights(part, removed, shift) -> list[np.ndarray]:
    """The weights of a layer without those of removed channels, its bias shifted."""
    values = {id(w): keras.ops.convert_to_numpy(w) for w in part.layer.weights}
    if shift is not None:
        bias = getattr(part.layer, "bias", None)
        key = "new bias" if bias is None else id(bias)  # the last, as in a layer made with one
        values[key] = np.asarray(shift + values.get(key, 0), part.layer.variable_dtype)
    slots = part.slots
    if shift is not None and key == "new bias":
        values[key] = values[key][~removed[part.makes]]
    for slot in slots:
        value = values[id(slot.variable)]
        values[id(slot.variable)] = np.take(value, np.flatnonzero(~removed[slot.ids]), slot.axis)
    return list(values.values())


def _changes(part, removed) -> bool:
    return any(removed[slot.ids].any() for slot in part.slots) or (
        part.resize is not None and part.makes is None and removed[part.first[1]].any()
    )


def _mask_report(graph, removed) -> Report:
    done, left = [], []
    for part in graph.parts.values():
        if part.makes is None:
            continue
        n = int(removed[part.makes].sum())
        if n:
            note = f"{n} of {len(part.makes)} output channels masked"
            done.append(Entry(part.path, note))
        else:
            left.append(Entry(part.path, _why(graph, part)))
    left += [Entry(path, reason) for path, reason in graph.unruled.items()]
    return Report("mask_channels", tuple(done), tuple(left))


def _removal_report(graph, dead: Dead) -> Report:
    removed, done, left = dead.removed, [], []
    for part in graph.parts.values():
        notes = []
        if part.makes is not None:
            constant = [r for r in graph.root[part.makes] if r in dead.constant]
            if constant:
                notes.append(f"{len(constant)} outputs stay: {dead.constant[constant[0]]}")
            elif not removed[part.makes].any():
                notes.append(f"outputs stay: {_why(graph, part, dead.read)}")
        if part.slots and (_changes(part, removed) or id(part.layer) in dead.shifts):
            if id(part.layer) in dead.shifts:
                notes.insert(0, "constants that it read are in its bias")
            done.append(Entry(part.path, "; ".join([_sizes(part, removed), *notes])))
        elif notes:
            left.append(Entry(part.path, notes[0]))
    left += [Entry(path, reason) for path, reason in graph.unruled.items()]
    return Report("remove_channels", tuple(done), tuple(left))


def _sizes(part, removed) -> str:
    """What becomes smaller: the channels of a layer and its weights, before and after."""
    ins, out = part.first
    named = (
        [("inputs", part.reads), ("outputs", part.makes)]
        if part.makes is not None
        else [("channels", out)]
    )
    notes = []
    for what, ids in named:
        if ids is not None and removed[ids].any():
            notes.append(f"{what} {len(ids)} → {int(np.sum(~removed[ids]))}")
    before = sum(math.prod(w.shape) for w in part.layer.weights)
    after = sum(w.size for w in _weights(part, removed, None))
    return ", ".join([*notes, f"weights {before:,} → {after:,}"])


def _why(graph, part, read=None) -> str:
    """Why none of the channels that a layer makes goes: they are pinned, or `read`."""
    roots = graph.root[part.makes]
    reasons = [where[r] for where in (graph.pinned, read or {}) for r in roots if r in where]
    return reasons[0] if reasons else "they are too few to lose one"
