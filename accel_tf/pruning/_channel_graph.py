"""The channels of a model: which live or die together, which are pinned, which are dead already.

A channel is one index of a tensor's last axis; it is a number, its id. Channels that can only be
removed together are tied (a union-find): those added to one another, those that one channel becomes
when it is normalized or flattened. The ids of a tensor are an array, so an axis of a weight is known
to be indexed by channels, and removing some is to index it by the others.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from accel_tf import layers
from accel_tf.pruning._channel_rules import Channelwise, Response, rule_of


class Slot(NamedTuple):
    """An axis of a weight that channels index; `zero`: whether masking a channel zeroes it."""

    variable: Any
    axis: int
    ids: np.ndarray
    zero: bool


@dataclasses.dataclass(eq=False)
class Part:
    """What a layer has to do with channels.

    Attributes:
        layer: The Keras layer.
        path: Its path in the model.
        rule: How it treats channels.
        slots: The axes of its weights that channels index.
        reads: The ids of the input channels, if each output is a sum over them; else `None`.
        makes: The ids of the output channels, if its kernel makes them; else `None`.
        resize: Given a function that counts the channels that remain of some ids, returns what
            changes in the layer's configuration; or `None`.
    """

    layer: keras.Layer
    path: str
    rule: Channelwise | None = None
    slots: list[Slot] = dataclasses.field(default_factory=list)
    reads: np.ndarray | None = None
    makes: np.ndarray | None = None
    resize: Callable[[Callable[[np.ndarray], int]], dict] | None = None
    first: tuple = ()

    def slot(self, variable, axis, ids, zero=True):
        """Notes that `ids` index an axis of a weight."""
        self.slots.append(Slot(variable, axis, ids, zero))

    @functools.cached_property
    def response(self) -> Response:
        """What the layer's sums make of constants."""
        return Response(self.layer)


class Dead(NamedTuple):
    """What can be removed of a model as it is, and why the rest cannot.

    Attributes:
        removed: For each id, whether it can be removed.
        read: For each root that varies and is read, by which layer.
        constant: For each root that is constant, yet cannot be part of a bias, why not.
        shifts: For each layer, by its `id`, what its bias gains in place of constants that it no
            longer reads, a float64 array.
    """

    removed: np.ndarray
    read: dict[int, str]
    constant: dict[int, str]
    shifts: dict[int, np.ndarray]


class ChannelGraph:
    """The channels of a built functional or sequential model, with the models nested in it.

    Attributes:
        ids: The ids of a tensor's channels by the tensor's `id`, or `None` where it has none.
        parts: A `Part` for each layer with a rule, by the layer's `id`.
        unruled: For each layer with no rule, by path, the reason.
        pinned: For each root that has to stay, the reason.
        root: For each id, the root of those that it is tied to.
    """

    def __init__(self, model: keras.Model):
        self.ids: dict[int, np.ndarray | None] = {}
        self.parts: dict[int, Part] = {}
        self.unruled: dict[str, str] = {}
        self._model, self._parent, self._pins = model, [], []
        self._steps: list[tuple] = []
        self._nested: set[int] = set()
        self._paths = {id(layer): path for path, layer in layers.walk(model)}
        self._follow(model)
        for tensor in model.outputs:
            # First, as it is the reason that counts, whatever others there are.
            if self.ids[id(tensor)] is not None:
                self._pins.insert(0, (self.ids[id(tensor)], "they are outputs of the model"))
        self.root = np.array([self._find(i) for i in range(len(self._parent))], int)
        self.pinned: dict[int, str] = {}
        for ids, reason in self._pins:
            for i in ids:
                self.pinned.setdefault(self.root[i], reason)

    def new(self, n: int) -> np.ndarray:
        """Makes n channels."""
        start = len(self._parent)
        self._parent += range(start, start + n)
        return np.arange(start, start + n)

    def tie(self, a, b):
        """Lets the channels a[i] and b[i] live or die together."""
        for i, j in zip(a, b, strict=True):
            self._parent[self._find(i)] = self._find(j)

    def pin(self, ids, reason: str):
        """Keeps channels, for a reason."""
        if ids is not None:
            self._pins.append((ids, reason))

    def spread(self, roots) -> np.ndarray:
        """Returns a bool for each id: whether its root is one of `roots`."""
        chosen = np.zeros(len(self.root), bool)
        chosen[list(roots)] = True
        return chosen[self.root]

    def keep_one(self, removed: np.ndarray) -> np.ndarray:
        """Returns `removed` without a channel of each tensor that would have none left."""
        removed = removed.copy()
        for ids in self.ids.values():
            if ids is not None and len(ids) and removed[ids].all():
                removed[self.root == self.root[ids[0]]] = False
        return removed

    def _find(self, i):
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def _follow(self, model):
        for call in layers.calls(model):
            layer = call.layer
            if isinstance(layer, keras.layers.InputLayer):
                for tensor in call.outputs:
                    if id(tensor) not in self.ids:
                        self.ids[id(tensor)] = self._unknown(tensor, "they are the model's inputs")
            elif layers.has_graph(layer):
                self._enter(layer, call)
            else:
                self._apply(call)

    def _enter(self, model, call):
        """A nested model's inputs and outputs are those of each call of it."""
        for inner, outer in zip(model.inputs, call.inputs, strict=True):
            ids = self.ids[id(outer)]
            known = self.ids.setdefault(id(inner), ids)
            if known is not ids and known is not None and ids is not None:
                self.tie(known, ids)
        self._steps.append((None, list(zip(call.inputs, model.inputs, strict=True))))
        if id(model) not in self._nested:
            self._nested.add(id(model))
            self._follow(model)
        for inner, outer in zip(model.outputs, call.outputs, strict=True):
            self.ids[id(outer)] = self.ids[id(inner)]
        self._steps.append((None, list(zip(model.outputs, call.outputs, strict=True))))

    def _apply(self, call):
        layer, xs = call.layer, [self.ids[id(t)] for t in call.inputs]
        part = self.parts.get(id(layer))
        if part is not None and (part.slots or part.resize):  # called before: its weights tie them
            ins, out = part.first
            for before, now in zip(ins, xs, strict=True):
                if before is not None and now is not None:
                    self.tie(before, now)
            self._steps.append((part, call))
            self.ids[id(call.outputs[0])] = out
            return
        path = self._paths.get(id(layer), layer.name)
        part = part or Part(layer, path)
        rule = rule_of(layer, xs)
        out = rule if isinstance(rule, str) else self._link(rule, part, call, xs)
        if isinstance(out, str):
            self.unruled[path] = out
            for ids in xs:
                self.pin(ids, f"{path!r} reads them: {out}")
            for tensor in call.outputs:
                self.ids[id(tensor)] = self._unknown(tensor, f"{path!r} makes them: {out}")
            return
        part.rule, part.first = rule, (xs, out)
        self.parts[id(layer)] = part
        self._steps.append((part, call))
        self.ids[id(call.outputs[0])] = out

    def _link(self, rule: Channelwise, part, call, xs):
        if not isinstance(call.outputs[0].shape[-1], int):
            return "the number of its output's channels is not known"
        return rule.link(self, part, call, xs)

    def _unknown(self, tensor, reason):
        if len(tensor.shape) < 2 or tensor.shape[-1] is None:
            return None
        ids = self.new(tensor.shape[-1])
        self.pin(ids, reason)
        return ids

    def dead(self) -> "Dead":
        """Finds the channels that add nothing, or the same everywhere, to whatever reads them."""
        seen = self._constants()
        read: dict[int, str] = {}
        constant: dict[int, str] = {}
        for part in self.parts.values():
            if part.reads is None:
                continue
            x = np.stack(seen[id(part)])
            used = part.response.touched.any(-1).ravel()
            same = ~np.isnan(x[0]) & np.all(x == x[0], axis=0)
            for i in part.reads[used & ~same]:
                read.setdefault(self.root[i], f"{part.path!r} reads them")
            if not part.response.exact:
                for i in part.reads[used & same & (x[0] != 0)]:
                    constant[self.root[i]] = (
                        f"{part.path!r} reads them, constant but not zero; as it pads its input, "
                        "they are no part of its bias"
                    )
        constant = {r: reason for r, reason in constant.items() if r not in {**read, **self.pinned}}
        roots = set(self.root) - set(read) - set(constant) - set(self.pinned)
        removed = self.keep_one(self.spread(roots))
        shifts = {}
        for part in self.parts.values():
            if part.reads is not None and part.response.exact:
                gain, used = part.response.gain, part.response.touched.any(-1).ravel()
                x = np.where(removed[part.reads] & used, seen[id(part)][0], 0)
                if np.any(x):
                    x = x.reshape(gain.shape[:2])
                    shifts[id(part.layer)] = np.einsum("gi,gio->go", x, gain).ravel()
        return Dead(removed, read, constant, shifts)

    def _constants(self) -> dict[int, list[np.ndarray]]:
        """Returns, for each part with sums, what it reads at each call: constants, or NaN."""
        values: dict[int, np.ndarray | None] = {}
        entered: dict[int, np.ndarray] = {}
        nested = {id(t) for part, links in self._steps if part is None for _, t in links}
        while True:
            seen, before = {}, dict(entered)
            values = {}
            for part, what in self._steps:
                if part is None:
                    for source, target in what:
                        self._carry(values, entered, source, target)
                    continue
                xs = [self._value(values, t) for t in what.inputs]
                seen.setdefault(id(part), []).append(xs[0])
                values[id(what.outputs[0])] = part.rule.value(part, what, xs)
            if all(_same(before.get(k), entered.get(k)) for k in nested):
                return seen

    def _carry(self, values, entered, source, target):
        """A nested model is followed once for all its calls: it gets what they have in common."""
        if self.ids[id(source)] is None:
            return
        value = self._value(values, source)
        if id(target) in entered:
            known = entered[id(target)]
            value = np.where(known == value, known, np.nan)
        entered[id(target)] = values[id(target)] = value

    def _value(self, values, tensor):
        if id(tensor) not in values:  # an input, or what a layer with no rule made
            ids = self.ids[id(tensor)]
            values[id(tensor)] = None if ids is None else np.full(len(ids), np.nan)
        return values[id(tensor)]


def _same(a, b) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True))
