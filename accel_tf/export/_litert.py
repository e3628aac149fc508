"""LiteRT files: the number format follows from the schemes of the model's layers."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections import Counter

import keras
import numpy as np
import tensorflow as tf

from accel_tf import layers as graphs
from accel_tf import report
from accel_tf._litert import quiet
from accel_tf._litert_file import read_litert, with_output_keys
from accel_tf._litert_schema import litert_module, operator_name
from accel_tf.export import _weights
from accel_tf.export._check import draft, require_same_file
from accel_tf.export._converter_errors import explain
from accel_tf.export._graph import (
    NotConstant,
    frozen_graph,
    mixed_scopes,
    named_outputs,
    plain,
    schemes_by_scope,
    scope,
    unrolled,
)
from accel_tf.export._inspect import Known, LiteRTFile, inspect, layer_of
from accel_tf.export._loops import integer_loops
from accel_tf.quantization import FakeQuantize, QuantizedLayer
from accel_tf.quantization._fake import floating, freezing
from accel_tf.quantization._rules import rule_of
from accel_tf.quantization._weight_only import WeightOnlyLayer, kernels_of

_INT16 = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8


def litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    batch_size: int | None = None,
    allow_float: bool = False,
    data=None,
    sparse: bool = False,
    io_dtype: str | None = None,
    verify: bool = True,
) -> LiteRTFile:
    """Writes `model` as a LiteRT file and inspects what was written.

    The schemes of a model made by `quantize_aware` or `calibrate` decide on the format:

    - `Int8`: integers from input to output. Operators for which LiteRT has no integer kernel, such
      as a layer normalization's, stay in float between integers; the result names them.
    - `Int16x8`: 16-bit activations, whose ranges the converter takes from `data`.
    - `Int8Weights`, `Int4Weights`: integer weights, floats in and out. Dense and Conv2D round what
      they read to 8 bits as they run ("dynamic range"), each sample by its own range; other
      kernels expand the weights to float. In a layer that accel_tf does not know, weights that the
      converter folds into other constants are stored as float32; `float_weights` names such layers.
    - `Float16`: weights of half the size, which are expanded to float.
    - `Mixed` of `Int8` with the latter three, or of these.

    Any other model becomes a float32 file. float16 computation is exported as float32.

    Args:
        model: Any Keras model.
        path: Where to write; usually ends in `.tflite`.
        batch_size: Fixes the number of inputs per run; with `None` the file takes any number, by
            `resize_tensor_input`. With a number, recurrent layers of a float model stay loops; with
            `None` they are unrolled, so that the file grows with the number of time steps, which has
            to be known. Recurrent layers of `Int8` and of weights-only schemes are always loops.
        allow_float: Whether operators may compute in float that the schemes want in integers, such
            as those of layers that were excluded. Inputs and outputs are float32 then. The
            converter computes an excluded layer in int8 all the same where it can.
        data: Representative inputs for `Int16x8`: an array (n, …), or a list or dict of them for
            several inputs.
        sparse: Whether to store Dense kernels whose zeros come in blocks of 4 or 16 inputs of one
            output (`accel_tf.pruning.Block`) as sparse, which LiteRT multiplies faster. For float
            models.
        io_dtype: The data type of the inputs and outputs of an `Int8` model: `"uint8"` for a program
            that feeds images as they are, `"float32"` for one that knows of no quantization. By
            default it is `"int8"`, and `"int16"` for `Int16x8`. Inputs of indices stay int32. For one
            scale per weight tensor, quantize with `Int8(per_channel=False)`.
        verify: Whether to run the file on a few samples made from the input specification of `model`,
            and to compare the outputs; the result notes how well they agree.

    Returns:
        What the file contains, as from `inspect_litert`.

    Raises:
        ValueError: The model keeps state between calls, such as that of a recurrent layer with
            `stateful=True`; it is quantized but has seen no data; an operator did not become an
            integer one although `allow_float` is false (the message names them; no file is left
            behind); the schemes cannot be mixed; `data` is missing; no kernel is sparse in blocks;
            `io_dtype` does not fit the schemes; or the converter failed; or the file does not compute
            what `model` does, which is an error in accel_tf or in the converter.
        ImportError: ai_edge_litert, which reads the file back, is not installed.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="relu")])
    >>> quantized = at.calibrate(model, np.random.default_rng(0).random((64, 8)), verbose=0)
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> at.export.litert(quantized, path).int8_fraction
    1.0
    """
    graphs.require_model(model, "litert")
    litert_module("schema_py_generated")  # Missing? Then say so before the work, not after.
    path = pathlib.Path(path)
    plan = _Plan(model, allow_float, data, sparse, io_dtype)
    content, left = plan.convert(batch_size), ()
    if plan.weights_only:
        content, stored = _weights.shrink(
            content, plan.weights_only, mixed_scopes(model), plan.rounded_kernels
        )
        left = plan.left_in_float(stored)
    content = with_output_keys(content)
    found = dataclasses.replace(inspect(content, path, plan.known), float_weights=left)
    _require_sums(content, plan.known)
    if plan.quantized and not allow_float:
        plan.require_integers(found)
    if sparse and not _weights.sparse_tensors(content):
        raise ValueError(
            f"sparse=True found no Dense kernel in {model.name!r} whose zeros come in blocks of 4 or "
            "16 inputs of one output. Prune it so, with "
            "prune(model, ..., pattern=Block((4, 1))). No file was written."
        )
    with draft(path, ".tflite") as made:
        made.write_bytes(content)
        if verify:
            note = require_same_file("litert", model, made, batch_size)
            found = dataclasses.replace(found, note=note)
    return found


class _Plan:
    """What kind of file a model becomes, by the schemes of its layers.

    Attributes:
        known: The layers by scope, with the reasons why some compute in float.
        quantized: Whether activations are integers, at least some.
        weights_only: The schemes of layers whose weights alone are quantized, by scope; `None` for what
            is excluded in one of them.
    """

    def __init__(self, model, allow_float, data, sparse, io_dtype):
        self.model, self.data, self.sparse, self.io_dtype = model, data, sparse, io_dtype
        self._allow_float = allow_float
        layers = list(graphs.walk(model))
        wrapped = {path: layer for path, layer in layers if isinstance(layer, QuantizedLayer)}
        integer = {type(w.scheme).__name__: w for w in wrapped.values() if w.scheme.activation_bits}
        self.quantized = bool(integer)
        self.wide = any(w.scheme.activation_bits == 16 for w in integer.values())
        self._weight_only = {
            path: layer
            for path, layer in wrapped.items()
            if not layer.scheme.activation_bits and layer.rounds_weights
        }
        schemes = schemes_by_scope(model)
        rounding = {scope(path) for path in self._weight_only}
        self.weights_only = {k: s for k, s in schemes.items() if s is None or k in rounding}
        self.known = _known(layers, wrapped)
        floats = allow_float or bool(self.weights_only)
        self.float_io = floats or io_dtype == "float32"
        self._check_io(floats)
        self._check(list(wrapped.values()), list(integer))

    def _check(self, wrapped, integer):
        for layer in wrapped:
            _require_exportable(layer)
        if self.quantized and not self.wide:
            require_data(self.model)
        if self.wide and (len(integer) > 1 or self.weights_only):
            others = (type(layer.scheme).__name__ for layer in self._weight_only.values())
            names = sorted({*integer, *others})
            raise ValueError(
                f"LiteRT's converter computes with 16-bit activations in all of a file or nowhere; "
                f"{self.model.name!r} mixes {', '.join(names)}. Use Int16x8 for all layers."
            )
        if self.wide and self.data is None:
            raise ValueError(
                f"Model {self.model.name!r} has 16-bit activations, whose ranges LiteRT's converter "
                "wants to observe itself: pass data=, some hundred inputs as for calibrate."
            )
        if self.sparse and (self.quantized or self.weights_only):
            raise ValueError(
                f"sparse=True is for float models; {self.model.name!r} is quantized, and LiteRT's "
                "sparse kernels are those of float32. Export it without sparse, or the float model."
            )

    def _check_io(self, floats):
        """Raises a ValueError if inputs and outputs cannot be of the type that is asked for."""
        known = ["float32"]
        if self.quantized and not floats:
            known += ["int16"] if self.wide else ["int8", "uint8"]
        if self.io_dtype not in (None, *known):
            raise ValueError(
                f"io_dtype={self.io_dtype!r} does not fit: the schemes of {self.model.name!r} and "
                f"allow_float let it be {' or '.join(map(repr, known))}. For integers, quantize all "
                "of the model: accel_tf.calibrate(model, data, accel_tf.Int8())."
            )

    def convert(self, batch_size) -> bytes:
        """Returns the content of the file, weights-only schemes left aside."""
        entered = floating() if self.wide else freezing(integers=True)
        with quiet() as log, entered, tempfile.TemporaryDirectory() as folder:
            try:
                converter = _converter(plain(self.model), batch_size, folder)
                self._configure(converter)
                return integer_loops(converter.convert())
            except NotConstant:
                raise
            except Exception as error:
                why = explain(str(error), log(), self.known)
                raise ValueError(
                    f"TensorFlow's converter to LiteRT failed on model {self.model.name!r}: {why}"
                ) from error

    def _configure(self, converter):
        if self.sparse:
            converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        if not self.quantized:
            return
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if self.wide:
            converter.representative_dataset = lambda: _samples(self.model, self.data)
            converter.target_spec.supported_ops = [_INT16, tf.lite.OpsSet.TFLITE_BUILTINS]
        if not self.float_io:
            kind = self.io_dtype or ("int16" if self.wide else "int8")
            converter.inference_input_type = converter.inference_output_type = tf.as_dtype(kind)

    def rounded_kernels(self, owner) -> list[np.ndarray]:
        """Returns the kernels of the layer of a scope as its scheme rounds them."""
        wrapper = next((w for p, w in self._weight_only.items() if scope(p) == owner), None)
        if wrapper is None:
            return []
        left_out = wrapper.exclude if isinstance(wrapper, WeightOnlyLayer) else ()
        kernels = kernels_of(wrapper.layer, wrapper.scheme.group_size, left_out)
        return [np.asarray(wrapper.rounded(v, axes)) for v, axes in kernels]

    def left_in_float(self, stored) -> tuple[str, ...]:
        """Returns the layers whose weights are stored as float32, not all in the bits of their scheme.

        Args:
            stored: How many numbers the file stores in fewer bits, by scope.

        Raises:
            ValueError: A layer of a kind whose weights the converter should leave as they are is among
                them, and `allow_float` is false.
        """
        counts, paths = (
            Counter(),
            {},
        )  # by layer, as one that is called several times may be stored once
        for path, layer in self._weight_only.items():
            key = layer.shared or path
            counts[key] += stored.get(scope(path), 0)
            # The layers of further calls have longer names, which the user's model does not have.
            paths[key] = min(paths.get(key, path), path, key=len)
        left, wrong = [], []
        for path in paths.values():
            layer, wanted = self._weight_only[path], 1
            if isinstance(layer, WeightOnlyLayer):
                kernels = kernels_of(layer.layer, exclude=layer.exclude)
                wanted = sum(v.shape.num_elements() for v, _ in kernels)
            if counts[layer.shared or path] < wanted:
                left.append(path)
                wrong += [] if isinstance(layer, WeightOnlyLayer) else [path]
        if wrong and not self._allow_float:
            raise ValueError(
                f"The weights of {report.shorten(sorted(wrong))} are not stored in fewer bits: the "
                "converter folded other constants into them, so that no scale per channel or group fits. "
                f"Exclude these layers, with exclude={sorted(wrong)}, or pass allow_float=True to store them as float32. No file was "
                "written."
            )
        return tuple(left)

    def require_integers(self, found):
        """Raises a ValueError if an operator computes in float and no layer says that it should."""
        floats = [op for op in found.operators if op.kind == "float"]
        real = [op for op in floats if op.name not in ("QUANTIZE", "DEQUANTIZE")]
        reasons = {known.why for known in self.known.values()} - {""}
        stray = [op for op in real if op.why not in reasons]
        if floats and not real and not self.float_io:
            stray = floats
        if stray:
            where = [f"{op.name} ({op.layer})" if op.layer else op.name for op in stray]
            raise ValueError(
                f"Operators of {self.model.name!r} did not become int8: {report.shorten(where)}. "
                "Layers excluded from quantization stay in float (see accel_tf.report_of); pass "
                "allow_float=True to export them so. No file was written."
            )


def _known(layers, wrapped) -> dict[str, Known]:
    """Returns the layers by scope; a part of a quantized layer counts as that layer."""
    known, outer = {}, None
    for path, layer in layers:  # A layer's parts follow it.
        if outer is None or not path.startswith(outer + "/"):
            outer = path if path in wrapped else None
            entry = Known(path, _why_float(layer) if wrapped else "")
        known[scope(path)] = entry
    return known


def _why_float(layer) -> str:
    """Why a layer of a quantized model computes in float, or `""` if it should not."""
    if isinstance(layer, QuantizedLayer):
        if not layer.scheme.activation_bits:
            return f"{type(layer.scheme).__name__} leaves activations in float"
        return layer.float_island
    rule = rule_of(layer)
    if rule is not None and rule.kind == "float":
        return f"LiteRT has no int8 kernel for {type(layer).__name__}"
    return ""


def require_data(model) -> None:
    """Raises a `ValueError` that names the layer if a quantized one has seen no data."""
    for _, layer in graphs.walk(model):
        if isinstance(layer, FakeQuantize):
            _ = layer.range


def _require_exportable(layer):
    scheme = layer.scheme
    if scheme.activation_bits and scheme.weight_bits != 8:
        raise ValueError(
            f"Layer {layer.name!r} has {scheme.weight_bits}-bit weights "
            f"({type(scheme).__name__}), which a LiteRT file would store and compute in 8 bits where "
            "activations are integers. Quantize the float model with Int8(), or with Int4Weights(), "
            "to export it."
        )


def _require_sums(content, known):
    """Raises a ValueError for a sum that would end the process that runs the file."""
    file = read_litert(content, "The converted model")
    for graph in file.subgraphs:
        for op in graph.operators:
            if operator_name(file, op) not in ("ADD", "SUB"):
                continue
            grids = [graph.tensors[i].quantization for i in (*op.inputs, *op.outputs)]
            scales = [float(g.scale[0]) for g in grids if g is not None and g.scale is not None]
            # LiteRT's kernel requires of its multiplier that 2·max(in) / (2²⁰·out) is less than 1.
            if len(scales) == 3 and 2 * max(scales[:2]) >= 2**20 * scales[2]:
                raise ValueError(
                    f"The sum in layer {layer_of(file, graph, op, known).path!r} has a range a "
                    f"million times smaller than what it adds: steps of {scales[2]:.1e} for inputs "
                    f"in steps of {max(scales[:2]):.1e}, which LiteRT cannot compute. Such ranges "
                    "come of activations that vanish, in a model that is not trained or on data "
                    "that are all 0. No file was written."
                )


def _samples(model, data):
    """Yields the inputs one at a time, by the names that the converter knows them under."""
    if not graphs.has_graph(model):
        raise ValueError("data= needs a functional or sequential model.")
    names = [tensor.name for tensor in model.inputs]
    if isinstance(data, dict):
        arrays = [data[name] for name in names]
    else:
        arrays = list(data) if isinstance(data, (list, tuple)) else [data]
    if len(arrays) != len(names):
        raise ValueError(f"data= has {len(arrays)} arrays, the model has the inputs {names}.")
    for i in range(len(arrays[0])):
        yield {
            name: np.asarray(array[i : i + 1]).astype(tensor.dtype)
            for name, array, tensor in zip(names, arrays, model.inputs, strict=True)
        }


def _converter(model, batch_size, folder):
    if not graphs.has_graph(model):
        if batch_size is not None:
            raise ValueError("a fixed batch size needs a functional or sequential model.")
        return tf.lite.TFLiteConverter.from_keras_model(model)
    # A graph without variables is saved and read back in a third of the time that a model takes,
    # and that is where a conversion spends it.
    module = tf.Module()
    # With a batch of known size a recurrent layer converts to a loop, otherwise not.
    with contextlib.nullcontext() if batch_size else unrolled(model):
        module.graph = frozen_graph(model, batch_size)
    # Without gradients, which nobody takes from it: TensorFlow cannot save that of swish.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(
        module, folder, signatures=named_outputs(module.graph, model), options=options
    )
    return tf.lite.TFLiteConverter.from_saved_model(folder)
