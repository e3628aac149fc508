"""The runtimes that files are checked in: their outputs, and every tensor that they compute."""

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from accel_tf import layers as graphs
from accel_tf._litert import LiteRTRunner, natural, quiet, to_floats
from accel_tf._litert_schema import litert_module
from accel_tf.export._graph import input_names, output_keys, output_names
from accel_tf.export._onnx import onnx_module
from accel_tf.export._weights import without_groups


def runtime_of(path):
    """Returns the runtime of a file, with methods `outputs` and `tensors`."""
    if path.is_dir():
        return SavedModel(path)
    kinds = {".tflite": LiteRT, ".onnx": ONNX}
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix not in kinds:
        raise ValueError(
            f"verify knows .tflite and .onnx files and SavedModel folders; received {path.name!r}."
        )
    return kinds[path.suffix](path)


class LiteRT:
    """A `.tflite` file in ai_edge_litert."""

    name = "LiteRT"

    def __init__(self, path):
        self.path = path
        self._runner = LiteRTRunner(path)

    @property
    def batch_size(self) -> int | None:
        """How many inputs the file takes, `None` if any number."""
        size = int(self._runner.inputs[0]["shape_signature"][0])
        return None if size < 0 else size

    def outputs(self, model, arrays) -> list[np.ndarray]:
        """Returns the outputs for the arrays of the model's inputs, as floats."""
        outputs = self._runner(self._by_name(model, arrays))
        if isinstance(outputs, dict):
            keys = output_keys(model) or []
            keys = keys if set(keys) == set(outputs) else sorted(outputs)  # As keras.tree does.
            return [outputs[key] for key in keys]
        return outputs if isinstance(outputs, list) else [outputs]

    def tensors(self, model, arrays) -> list[tuple[str, np.ndarray]]:
        """Returns the name and the float values of each tensor that is computed."""
        return _Watched(self.path).tensors(self._by_name(model, arrays))

    def _by_name(self, model, arrays):
        names = input_names(model) if getattr(model, "inputs", None) else []
        if sorted(names) == sorted(detail["key"] for detail in self._runner.inputs):
            return dict(zip(names, arrays, strict=True))
        return arrays


class _Watched(LiteRTRunner):
    """Keeps every tensor, and so does without the delegates, which do not."""

    def _content(self, content):
        return without_groups(content, self.path)

    def _options(self):
        kinds = litert_module("interpreter").OpResolverType
        return {
            "experimental_preserve_all_tensors": True,
            "experimental_op_resolver_type": kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        }

    def tensors(self, inputs):
        self.prepare(inputs)()
        found = []
        for detail in self._interpreter.get_tensor_details():
            try:
                values = self._interpreter.get_tensor(detail["index"])
            except ValueError:  # It is not in use, or a part of another tensor.
                continue
            if values.dtype.kind in "fiu" and values.ndim:
                found.append((detail["name"], to_floats(values, detail).astype(np.float32)))
        return found


class ONNX:
    """An `.onnx` file in onnxruntime."""

    def __init__(self, path):
        self.path = path
        self.name, levels = "onnxruntime", onnx_module("onnxruntime").GraphOptimizationLevel
        failure = onnx_module("onnxruntime.capi.onnxruntime_pybind11_state").Fail
        self._plain = levels.ORT_DISABLE_ALL
        content = path.read_bytes()
        try:
            with quiet():
                self._session = self._open(content, levels.ORT_ENABLE_ALL)
        except failure:  # Its rewriting trips over unrolled recurrent layers.
            self.name += " without integer kernels"
            self._session = self._open(content, self._plain)

    def _open(self, content, level):
        library = onnx_module("onnxruntime")
        options = library.SessionOptions()
        options.graph_optimization_level = level
        # Without it, integer kernels saturate at 16 bits where a processor has no VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
        return library.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    @property
    def batch_size(self) -> int | None:
        size = (self._session.get_inputs()[0].shape or [None])[0]
        return size if isinstance(size, int) else None

    def outputs(self, model, arrays) -> list[np.ndarray]:
        names = [entry.name for entry in self._session.get_outputs()]
        return _in_batches(
            lambda part: self._run(self._session, names, part), arrays, self.batch_size
        )

    def tensors(self, model, arrays) -> list[tuple[str, np.ndarray]]:
        library = onnx_module("onnx")
        proto = library.load(self.path)
        present = {entry.name for entry in proto.graph.output}
        names = [name for node in proto.graph.node for name in node.output if name]
        more = [library.ValueInfoProto(name=name) for name in names if name not in present]
        proto.graph.output.extend(more)
        values = self._run(self._open(proto.SerializeToString(), self._plain), names, arrays)
        return [
            (name, value.astype(np.float32))
            for name, value in zip(names, values, strict=True)
            if value.dtype.kind == "f" and value.ndim
        ]

    def _run(self, session, names, arrays):
        given = [entry.name for entry in session.get_inputs()]
        return session.run(names, dict(zip(given, arrays, strict=True)))


class SavedModel:
    """A SavedModel folder in TensorFlow."""

    name = "TensorFlow"

    def __init__(self, path):
        self._model = tf.saved_model.load(str(path))  # Its variables live as long as it does.
        self._run = self._model.signatures["serving_default"]

    @property
    def batch_size(self) -> int | None:
        specs = tf.nest.flatten(self._run.structured_input_signature)
        return specs[0].shape[0]

    def outputs(self, model, arrays) -> list[np.ndarray]:
        def run(part):
            results = self._run(**self._by_name(model, part))
            known = output_names(model) if graphs.has_graph(model) else []
            known = [name for name in known if name in results]
            numbered = all(name.startswith("output_") for name in results)
            others = sorted(results, key=natural if numbered else None)
            names = known if len(known) == len(results) else others
            return [results[name].numpy() for name in names]

        return _in_batches(run, arrays, self.batch_size)

    def tensors(self, model, arrays) -> list[tuple[str, np.ndarray]]:
        # Functions within functions become one graph, so that what is inside can be fetched.
        flat = convert_variables_to_constants_v2(self._run)
        computed = [
            tensor
            for op in flat.graph.get_operations()
            for tensor in op.outputs
            if op.type not in ("Const", "Placeholder") and tensor.dtype == tf.float32
        ]
        run = flat.prune(flat.inputs, computed)
        named = self._by_name(model, arrays)
        values = run(*(named[t.name.split(":")[0]] for t in flat.inputs))
        return [
            (tensor.name, value.numpy())
            for tensor, value in zip(computed, values, strict=True)
            if value.shape.rank
        ]

    def _by_name(self, model, arrays):
        specs = self._run.structured_input_signature[1]
        names = input_names(model) if getattr(model, "inputs", None) else []
        if set(names) != set(specs):
            names = sorted(specs)
        return {
            name: tf.constant(array, specs[name].dtype)
            for name, array in zip(names, arrays, strict=True)
        }


def _in_batches(run, arrays, size):
    """Runs a file on all inputs, `size` at a time, and joins its outputs."""
    n = len(arrays[0])
    size = size or n
    if n % size:
        raise ValueError(f"The file takes {size} inputs per run; {n} is no multiple of it.")
    parts = [run([a[i : i + size] for a in arrays]) for i in range(0, n, size)]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
