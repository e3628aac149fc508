"""The plan of a rewrite: which layers are quantized how, and where the runtime rounds.

LiteRT fuses a convolution with the BatchNormalization and the ReLU behind it into one kernel that
rounds once, at its end. The plan finds these groups, so that fake quantization rounds there too.
"""

import dataclasses

import keras

from accel_tf import layers as graphs
from accel_tf.quantization import (
    _activations,
    _affine,
    _composite,
    _layers,
    _preserve,
    _same_grid,
    _softmax,
    _weight_only,
)
from accel_tf.quantization._rules import OWN_IDENTITY, Rule, lack_of_rule, obstacle, rule_of
from accel_tf.quantization._schemes import Scheme

_L = keras.layers


@dataclasses.dataclass
class Step:
    """What becomes of one call of a layer; `wrapper` is `None` if it stays as it is."""

    wrapper: type | None
    scheme: Scheme | None = None
    quantize_inputs: list[bool] = dataclasses.field(default_factory=list)
    output: str | None = None
    activation: str | None = None
    why: str = ""
    exclude: list[str] = dataclasses.field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether the layer computes something else than before, besides handing on its grid."""
        on_same_grid = (_same_grid.QuantizedGrid, _same_grid.QuantizedIdentity)
        return self.wrapper not in on_same_grid or any(self.quantize_inputs)

    @property
    def note(self) -> str:
        """The step in words, for the report."""
        parts = ["input quantized"] if any(self.quantize_inputs) else []
        if self.wrapper is not None and self.wrapper.rounds_weights:
            parts.append(_weights_note(self.scheme))
        if self.why:
            parts.append(self.why)
        if self.activation and self.activation not in _activations.FUSED:
            parts.append(f"quantized before {self.activation}")
        if self.output:
            parts.append("output observed")
        return ", ".join(parts)

    def inner(self, layer, path: str) -> keras.Layer:
        """Returns the layer for the wrapper to run, a copy of `layer` at `path` without its weights."""
        if not isinstance(layer, keras.Layer):
            return graphs.Operator.of(layer)
        # A LoRA update becomes a part of the kernel when the state is copied.
        changes = {"lora_rank": None} if getattr(layer, "lora_enabled", False) else {}
        if self.activation:
            # By Keras's name, as a function of the user's could not be loaded.
            fused = self.activation in _activations.FUSED
            changes["activation"] = self.activation if fused else None
        if self.wrapper is _weight_only.WeightOnlyLayer:
            return _weight_only.anew(layer, path)
        return graphs.anew(layer, path, **changes)

    def wrap(self, inner) -> keras.Layer:
        """Returns the layer that stands for one call, around what `inner` returned."""
        after = None if self.activation in _activations.FUSED else self.activation
        more = {"exclude": self.exclude} if self.exclude else {}
        return self.wrapper(inner, self.scheme, self.quantize_inputs, self.output, after, **more)


def _weights_note(scheme):
    if scheme.weight_type == "float":
        return f"weights float{scheme.weight_bits}"
    per = "channel" if scheme.per_channel else "tensor"
    if scheme.group_size is not None:
        per = f"group of {scheme.group_size}"
    return f"weights int{scheme.weight_bits} per {per}"


class Plan:
    """Decides on a `Step` for each call of a layer by following the graph from inputs to outputs.

    Quantization parameters belong to a call: a shared layer may read tensors of different ranges.

    Args:
        model: The model to rewrite.
        scheme_at: A function from the path of a layer to its scheme, or to `None` for float.

    Attributes:
        paths: The path of each layer and operator, by id.
        steps: The `Step` of each call of a layer or operator, by its `Site`.
        layers: The layer or operator of each of these calls.
        input_schemes: For each input of the model the scheme to quantize it with, or `None`.
    """

    def __init__(self, model, scheme_at):
        self.paths = {
            id(layer): path
            for path, layer in graphs.walk(model)
            if not isinstance(layer, _L.InputLayer)
        }
        self._scheme_at = scheme_at
        self.steps: dict[graphs.Site, Step] = {}
        self.layers: dict[graphs.Site, keras.Operation] = {}
        self._constants: set[int] = set()  # tensors that are weights, or computed of them alone
        graph = _Graph(model, self)
        self.input_schemes = [self._scheme_of_input(tensor, graph) for tensor in model.inputs]
        bits = [s and s.activation_bits for s in self.input_schemes]
        self._follow(model, bits, ())

    def scheme_of(self, layer) -> Scheme | None:
        """Returns the scheme of a layer or operator, `None` if it stays in float."""
        return self._scheme_at(self.paths[id(layer)])

    def _scheme_of_input(self, tensor, graph):
        """Observed once, however many layers read it: the file has one grid for each input."""
        if not keras.backend.is_float_dtype(tensor.dtype):
            return None
        schemes = [self.scheme_of(call.layer) for call in graph.readers.get(id(tensor), [])]
        bits = {scheme and scheme.activation_bits for scheme in schemes}
        return schemes[0] if len(bits) == 1 and None not in bits else None

    def _follow(self, model, input_bits, site) -> list[int | None]:
        """Plans the calls in `model`; returns each output's bits, `None` if it is not quantized."""
        graph = _Graph(model, self)
        bits = {id(t): b for t, b in zip(model.inputs, input_bits, strict=True)}
        for call in graph.calls:
            if isinstance(call.layer, _L.InputLayer):
                continue
            given = [bits[id(t)] for t in call.inputs]
            here = (*site, id(call.outputs[0]))
            if self._is_nested(call.layer):
                results = self._follow(call.layer, given, here)
            else:
                step, result = self._plan(call, given, graph)
                if step is not None:
                    self.steps[here], self.layers[here] = step, call.layer
                results = [result] * len(call.outputs)
            bits.update((id(t), b) for t, b in zip(call.outputs, results, strict=True))
        return [bits[id(t)] for t in model.outputs]

    def _is_nested(self, layer) -> bool:
        """Whether the calls in a layer are planned one by one."""
        if (scheme := self.scheme_of(layer)) is None or not isinstance(layer, keras.Model):
            return False
        # A subclassed model has no graph to follow; a scheme of weights alone needs none.
        return scheme.activation_bits is not None or graphs.has_graph(layer)

    def _plan(self, call, given, graph) -> tuple[Step | None, int | None]:
        """Returns the step for a call whose inputs have `given` bits, and the bits of its output."""
        layer, scheme = call.layer, self.scheme_of(call.layer)
        weight_only = scheme is not None and scheme.activation_bits is None
        if weight_only and isinstance(layer, keras.Layer) and _weight_only.kernels_of(layer):
            return self._weight_only(call, scheme), None
        if not _has_float(call.outputs):  # an index, a mask or a string
            reads_floats = not isinstance(layer, keras.Layer) and _has_float(call.inputs)
            if reads_floats and scheme and scheme.activation_bits:
                return Step(_composite.QuantizedIndex, scheme), None
            return None, None
        if not weight_only and self._is_constant(call):
            # Computed beforehand, and put on a grid by what it meets.
            self._constants.update(id(t) for t in call.outputs)
            return Step(None, why="a weight, rounded where it meets activations"), None
        if scheme is None:
            return Step(None, why="excluded: stays in float"), None
        unchanged = given[0] if given and len(set(given)) == 1 else None
        if weight_only:
            rule = rule_of(layer)
            step = Step(None, why=_weight_only.note("no weights to quantize", layer))
            return step, unchanged if rule and rule.kind in ("grid", "identity") else None
        rule = self._check(call)
        if rule.kind == "identity":
            wrapper = rule.wrapper if unchanged else None
            return Step(wrapper, scheme, why="nothing to compute in inference"), unchanged
        if rule.kind == "float":
            why = f"stays in float: LiteRT has no int8 kernel for {type(layer).__name__}"
            return Step(None, why=why), None
        step = self._step(call, rule, graph)
        step.scheme = scheme
        step.quantize_inputs = [
            "weight"
            if id(t) in self._constants
            else b != scheme.activation_bits and _wants_grid(t, rule)
            for b, t in zip(given, call.inputs, strict=True)
        ]
        if any(step.quantize_inputs) and step.wrapper is None:
            step.wrapper = _layers.QuantizedLayer
        return step, scheme.activation_bits

    def _weight_only(self, call, scheme) -> Step:
        """Returns the step for a layer with kernels or tables, whose activations stay in float."""
        layer = call.layer
        excluded = _weight_only.excluded_in(layer, self.paths[id(layer)], self._scheme_at)
        if not excluded and _weight_only.has_wrapper(call, scheme):
            return Step(rule_of(layer).wrapper, scheme)
        if not _weight_only.kernels_of(layer, exclude=excluded):
            return Step(None, why="excluded: stays in float")
        step = Step(_weight_only.WeightOnlyLayer, scheme, exclude=excluded)
        return dataclasses.replace(step, why=_weight_only.note("", layer, excluded))

    def _is_constant(self, call) -> bool:
        if isinstance(call.layer, graphs.OwnWeight | graphs.Constant):
            return True
        of_weights = call.inputs and all(id(t) in self._constants for t in call.inputs)
        return bool(of_weights) and not isinstance(call.layer, keras.Layer)

    def _step(self, call, rule: Rule, graph) -> Step:
        layer = call.layer
        if rule.kind == "grid":
            rounds = rule.wrapper is not None and rule.wrapper.rounds_weights
            return Step(rule.wrapper, why="" if rounds else "int8 on its input's grid")
        follower = graph.fused_into(call)
        output = None if follower else "observe"
        why = f"computed in one kernel with {self.paths[id(follower.layer)]}" if follower else ""
        if graph.folds(call):
            why = ", ".join(filter(None, ["folded into the kernel before it", why]))
            return Step(_affine.QuantizedFolded, output=output, why=why)
        if rule.kind in ("kernel", "weights") and hasattr(layer, "activation"):
            name = _activations.name_of(layer)
            return Step(rule.wrapper, None, [], output, None if name == "linear" else name, why)
        if rule.kind == "affine":
            why = why or "one integer kernel"
        return Step(rule.wrapper, output=output, why=why or rule.wrapper.island(layer))

    def _check(self, call) -> Rule:
        """Returns the rule of a call's layer; raises a ValueError if it cannot be quantized."""
        layer, kind = call.layer, type(call.layer).__name__
        path = self.paths[id(layer)]
        rule = rule_of(layer)
        if rule is None and isinstance(layer, keras.Layer) and graphs.passes_on(layer):
            return OWN_IDENTITY
        if rule is None and not isinstance(layer, keras.Layer):
            inside, _, _ = path.rpartition("/")
            out = f"exclude=[{inside!r}]" if inside else "a layer of your own that you exclude"
            raise ValueError(
                f"Cannot quantize the operator {kind!r} ({path}): there is no integer form of it "
                f"here. Leave it in float with {out}."
            )
        out = f"Leave it in float with exclude=[{path!r}]"
        if rule is None:
            raise ValueError(f"Cannot quantize layer {path!r}: {lack_of_rule(layer, out)}")
        if reason := obstacle(layer, call.inputs, self.scheme_of(layer)):
            raise ValueError(f"Cannot quantize layer {path!r} ({kind}): {reason}. {out}.")
        return rule


def _has_float(tensors):
    return any(keras.backend.is_float_dtype(t.dtype) for t in tensors)


def _wants_grid(tensor, rule):
    """Whether a tensor that is on no grid has to be put on one; indices and masks do not."""
    return keras.backend.is_float_dtype(tensor.dtype) or rule.kind == "affine"


class _Graph:
    """The calls of one model, and which of them the runtime computes in one kernel.

    Fusion is for calls whose output goes to one place only.
    """

    def __init__(self, model, plan):
        self.calls = graphs.calls(model)
        self.plan = plan
        prefix = f"{plan.paths[id(model)]}/" if id(model) in plan.paths else ""
        self.outputs = {id(t) for t in model.outputs}
        self.readers: dict[int, list[graphs.Call]] = {}
        self.writer = {id(t): call for call in self.calls for t in call.outputs}
        for call in self.calls:
            # An operator has none in the model, nor has an input.
            plan.paths.setdefault(id(call.layer), f"{prefix}{call.layer.name}")
            for tensor in call.inputs:
                self.readers.setdefault(id(tensor), []).append(call)

    def fused_into(self, call):
        """Returns the call whose kernel rounds the output of `call`, or `None`: it does itself."""
        reader = self._only_reader(call)
        if reader is None:
            return None
        layer, after = call.layer, reader.layer
        rule, kind = rule_of(layer), self._kind(after)
        if kind is None or self.plan.scheme_of(after) != self.plan.scheme_of(layer):
            return None
        activation = _activations.name_of(layer)
        linear = activation in (None, "linear")
        if kind == "concatenation":
            # All inputs of a concatenation share the grid of its output.
            fits = rule.kind != "grid" and activation not in _activations.FIXED
            return reader if fits else None
        if kind == "masked softmax":  # which rounds the scores, with those that are masked
            return reader if rule.kind == "arithmetic" else None
        if not linear or not rule.fuses or self._reshapes_at_its_end(call):
            return None
        if kind == "activation":
            return reader if _activations.name_of(after) in _activations.FUSED else None
        if kind == "affine":
            return reader if rule.kind == "kernel" and _preserve.can_fold(layer, after) else None
        if kind == "scaled sum":  # which multiplies its second input first, as an affine layer does
            second = self._same(reader.inputs[1], call.outputs[0])
            return reader if rule.kind == "kernel" and second else None
        return None

    def _kind(self, layer):
        rule = rule_of(layer)
        if type(layer) is _L.Concatenate or type(layer).__name__ == "Concatenate":
            return "concatenation"
        if rule is None:
            return None
        if isinstance(layer, _softmax.MaskedSoftmax):
            return "masked softmax"
        if rule.kind == "affine":
            # A Rescaling or Normalization stands at the input, where there is nothing to fold into.
            return None if isinstance(layer, _L.Rescaling | _L.Normalization) else "affine"
        if rule.kind == "activation":
            return "activation"
        return "scaled sum" if type(layer).__name__ == "CustomScaleLayer" else None

    @staticmethod
    def _reshapes_at_its_end(call):
        """Whether the runtime's kernel is followed by a reshape, past which it fuses nothing."""
        if isinstance(call.layer, _L.Conv1DTranspose):
            return True
        dense = isinstance(call.layer, _L.Dense | _L.EinsumDense)
        return dense and len(call.outputs[0].shape) > 2

    def _same(self, tensor, other):
        """Whether `tensor` is `other`, passed on by layers that do nothing in inference."""
        while tensor is not other:
            call = self.writer[id(tensor)]
            if not call.inputs:
                return False
            tensor = call.inputs[0]
        return True

    def folds(self, call) -> bool:
        """Whether the layer of `call` is affine and the kernel before it takes it in."""
        if self._kind(call.layer) != "affine":
            return False
        writer = self.writer[id(call.inputs[0])]
        while writer and _is_identity(writer.layer) and writer.inputs:
            writer = self.writer[id(writer.inputs[0])]
        rule = writer and rule_of(writer.layer)
        return bool(rule) and rule.kind == "kernel" and self.fused_into(writer) is call

    def _only_reader(self, call):
        """Returns the one call that reads the output of `call`, past layers that do nothing.

        Equal activations of one tensor are one operator in the file: of them it is the first.
        """
        readers = self._readers_of(call)
        if not readers:
            return None
        first, *others = (self._same_in_file(reader.layer) for reader in readers)
        same = all(first is not None and first == other for other in others)
        return readers[0] if same else None

    def _readers_of(self, call):
        """Returns who reads the output, past layers that do nothing; `None` if the caller does."""
        if len(call.outputs) != 1 or id(call.outputs[0]) in self.outputs:
            return None
        found = []
        for reader in self.readers.get(id(call.outputs[0]), []):
            more = self._readers_of(reader) if _is_identity(reader.layer) else [reader]
            if more is None:
                return None
            found += more
        return found

    def _same_in_file(self, layer):
        """Returns what makes activations of one tensor equal; `None` for any other layer."""
        name = _activations.name_of(layer) if self._kind(layer) == "activation" else None
        return (name, self.plan.scheme_of(layer)) if name in _activations.FUSED else None


def _is_identity(layer):
    rule = rule_of(layer)
    return rule is not None and rule.kind == "identity"
