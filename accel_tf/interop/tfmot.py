"""To and from the TensorFlow Model Optimization Toolkit (TFMOT) and the legacy tf_keras it works on.

Importing TFMOT makes `tf.keras` mean tf_keras, not Keras 3, in the whole process; so it is imported
only when `to_tfmot` is called, and this module uses `keras` and `tf_keras` by their own names. The
converters of models need tf_keras alone. Both come with `pip install accel-tf[tfmot]`.

    import accel_tf as at
    from accel_tf.interop.tfmot import from_tf_keras, to_tf_keras, to_tfmot

    legacy = tfmot.sparsity.keras.prune_low_magnitude(to_tf_keras(model), to_tfmot(schedule))
    …                                                  # train it with TFMOT
    model = from_tf_keras(tfmot.sparsity.keras.strip_pruning(legacy))
"""

import importlib
import inspect

import keras

from accel_tf.layers import require_model, require_same, run, samples
from accel_tf.pruning import ConstantSparsity, PolynomialDecay
from accel_tf.pruning._schedules import Schedule

# Equal names that compute different functions: Keras 3 has relu6(x + 3) / 6, tf_keras
# clip(0.2 x + 0.5, 0, 1).
_DIFFERENT_ACTIVATIONS = ("hard_sigmoid",)
# What one calls otherwise than the other: class, argument in Keras 3, argument in tf_keras.
_RENAMED = (("LeakyReLU", "negative_slope", "alpha"),)
# What says how a layer is built or computed, not what it computes.
_NOT_ARGUMENTS = (
    *("batch_input_shape", "batch_shape", "build_config", "implementation"),
    *("query_shape", "key_shape", "value_shape"),
)


def to_tfmot(schedule: Schedule):
    """Returns the TFMOT pruning schedule that equals ours.

    TFMOT numbers the first optimizer step 1 and updates before it; ours is applied after it, and has
    a step 0 as well, when `prune` is called. Values and update steps are the same.

    Args:
        schedule: A `ConstantSparsity` or `PolynomialDecay`.

    Returns:
        A `tfmot.sparsity.keras.ConstantSparsity` or `PolynomialDecay`.

    Raises:
        ValueError: `schedule` is neither.
        ImportError: TFMOT is not installed.

    Example:

    >>> theirs = to_tfmot(ConstantSparsity(0.5))
    >>> type(theirs).__name__, theirs.target_sparsity
    ('ConstantSparsity', 0.5)
    """
    config = schedule.get_config() if isinstance(schedule, Schedule) else None
    if type(schedule) is ConstantSparsity:
        config["target_sparsity"] = config.pop("sparsity")
    elif type(schedule) is not PolynomialDecay:
        raise ValueError(
            "TFMOT has schedules that equal ConstantSparsity and PolynomialDecay of accel_tf. "
            f"Received: {schedule!r}"
        )
    theirs = _require("tensorflow_model_optimization").sparsity.keras
    return getattr(theirs, type(schedule).__name__)(**config)


def from_tfmot(schedule) -> Schedule:
    """Returns our schedule that equals one of TFMOT's.

    Args:
        schedule: A `ConstantSparsity` or `PolynomialDecay` of TFMOT, or the dictionary that its
            `get_config` returns. (TFMOT's own `from_config` does not read that dictionary: it
            expects the one below the key "config".)

    Returns:
        A `ConstantSparsity` or a `PolynomialDecay`.

    Raises:
        ValueError: The schedule is another one, or never prunes; see `PolynomialDecay`.

    Example:

    >>> config = {"target_sparsity": 0.5, "begin_step": 0, "end_step": -1, "frequency": 100}
    >>> from_tfmot({"class_name": "ConstantSparsity", "config": config})
    ConstantSparsity(sparsity=0.5, begin_step=0, end_step=-1, frequency=100)
    """
    known = {"ConstantSparsity": ConstantSparsity, "PolynomialDecay": PolynomialDecay}
    serialized = schedule
    if not isinstance(schedule, dict) and hasattr(schedule, "get_config"):
        serialized = schedule.get_config()
    if not isinstance(serialized, dict) or serialized.get("class_name") not in known:
        raise ValueError(
            "from_tfmot expects TFMOT's ConstantSparsity or PolynomialDecay, or what its "
            f"get_config returns. Received: {schedule!r}"
        )
    config = dict(serialized["config"])
    if "target_sparsity" in config:
        config["sparsity"] = config.pop("target_sparsity")
    return known[serialized["class_name"]](**config)


def to_tf_keras(model: keras.Model, *, verify: bool = True):
    """Returns a tf_keras model with the layers and weights of a Keras 3 model.

    Args:
        model: A built functional or sequential model; models nested in it may be either, and
            layers may be shared.
        verify: Whether to compare the new model with `model` on a few samples made from its input
            specification.

    Returns:
        A `tf_keras.Model` of the same names, not compiled.

    Raises:
        ValueError: A layer, or an argument of one, has no counterpart in tf_keras; the message
            names it. Or the new model does not compute what `model` does.
        ImportError: tf_keras is not installed.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> legacy = to_tf_keras(model)
    >>> type(legacy).__module__
    'tf_keras.src.engine.sequential'
    """
    require_model(model, "to_tf_keras")
    legacy = _Converter(keras, _require("tf_keras"), _call_keras_graph).convert(model)
    if verify:
        require_same("to_tf_keras", model, legacy)
    return legacy


def from_tf_keras(model, *, verify: bool = True) -> keras.Model:
    """Returns a Keras 3 model with the layers and weights of a tf_keras model.

    Args:
        model: A built functional or sequential `tf_keras.Model`. Strip TFMOT's wrappers before:
            `tfmot.sparsity.keras.strip_pruning(model)`.
        verify: Whether to compare the new model with `model` on a few samples made from its input
            specification.

    Returns:
        A `keras.Model` of the same names, not compiled.

    Raises:
        ValueError: `model` is not of tf_keras or not built; or a layer, or an argument of one, has
            no counterpart in Keras 3; the message names it. Or the new model does not compute what
            `model` does.
        ImportError: tf_keras is not installed.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> from_tf_keras(to_tf_keras(model)).count_params()
    10
    """
    tf_keras = _require("tf_keras")
    if not isinstance(model, tf_keras.Model) or not model.built:
        raise ValueError(f"from_tf_keras expects a built tf_keras.Model. Received: {model!r}")
    new = _Converter(tf_keras, keras, _call_tf_keras_graph).convert(model)
    x = samples(new) if verify else None
    if x is not None:
        require_same("from_tf_keras", new, new, x, expected=run(model, x))
    return new


class _Converter:
    """Makes the layers of one Keras anew in another, and calls them as the model does.

    Args:
        source: The module `keras` or `tf_keras`.
        target: The other one.
        call_graph: Calls `(model, inputs, convert)`: sends inputs through the graph of a functional
            model of the source, with each layer replaced by `convert(layer)`.
    """

    def __init__(self, source, target, call_graph):
        self.source, self.target, self.call_graph = source, target, call_graph
        self.made = {}

    def convert(self, model):
        new = self._layer(model)
        for old, layer in self.made.values():
            if not isinstance(old, self.source.Model):
                self._copy_weights(old, layer)
        return new

    def _layer(self, layer):
        """The counterpart of a layer or nested model; the same one for a layer that is shared."""
        if id(layer) not in self.made:
            make = self._model if isinstance(layer, self.source.Model) else self._plain_layer
            self.made[id(layer)] = layer, make(layer)
        return self.made[id(layer)][1]

    def _model(self, model):
        inputs = [
            self.target.Input(batch_shape=tuple(x.shape), dtype=_name(x.dtype), name=_input_name(x))
            for x in model.inputs or ()
        ]
        if isinstance(model, self.source.Sequential) and inputs:
            layers = [self._layer(layer) for layer in model.layers]
            new = self.target.Sequential([*inputs, *layers], name=model.name)
        elif type(model).__name__ == "Functional" or type(model) is self.source.Model:
            outputs = self.call_graph(model, inputs, self._layer)
            struct = keras.tree.pack_sequence_as(_input_struct(model), inputs)
            new = self.target.Model(struct, outputs, name=model.name)
        else:
            raise ValueError(
                f"Model {model.name!r} ({type(model).__name__}) is not a functional or sequential "
                "model with known inputs, so there is no graph of layers to convert."
            )
        if not model.trainable:
            new.trainable = False
        return new

    def _plain_layer(self, layer):
        kind = type(layer).__name__
        is_layer = isinstance(layer, self.source.layers.Layer)  # not the operation of its name
        if not is_layer or not hasattr(self.target.layers, kind):
            raise ValueError(
                f"{layer.name!r} is a {kind}, which {self.target.__name__} has no layer for. "
                "Operations such as x + y need their layer, here keras.layers.Add."
            )
        config = self._arguments(kind, layer.get_config(), layer.name)
        cls = getattr(self.target.layers, kind)
        # tf_keras's MultiHeadAttention.from_config insists on shapes that only a built one knows.
        return cls(**config) if kind == "MultiHeadAttention" else cls.from_config(config)

    def _arguments(self, kind, config, path):
        """The configuration of a layer as the other Keras writes it."""
        accepted = _parameters(getattr(self.target.layers, kind))
        defaults = _parameters(getattr(self.source.layers, kind))
        for name, *arguments in _RENAMED:
            old, new = arguments if self.source is keras else arguments[::-1]
            if name == kind and old in config:
                config[new] = config.pop(old)
        if kind == "BatchNormalization" and self.source is not keras:
            (config["axis"],) = keras.tree.flatten(config["axis"])  # tf_keras has it as a list
        arguments = {}
        for key, value in config.items():
            if key in accepted:
                arguments[key] = self._value(value, f"{path}.{key}")
            elif key in _NOT_ARGUMENTS or key.endswith("_initializer"):  # weights are copied
                continue
            elif value not in (None, False, defaults.get(key)):
                raise ValueError(
                    f"{path!r}: {kind} of {self.target.__name__} has no argument {key!r}, which is "
                    f"{value!r} here."
                )
        return arguments

    def _value(self, value, path):
        if isinstance(value, str) and value in _DIFFERENT_ACTIVATIONS:
            raise ValueError(
                f"{path!r} is {value!r}, which is another function in {self.target.__name__}. "
                "Write it as a layer or choose another activation."
            )
        if not isinstance(value, dict) or "class_name" not in value:
            return value
        kind, config = value["class_name"], value["config"]
        if kind.endswith("Policy"):
            return config["name"]
        if hasattr(self.source.layers, kind):  # the layer within a wrapper
            config = self._arguments(kind, dict(config), path)
        else:  # an initializer, a regularizer, a constraint
            config = {k: v for k, v in config.items() if v is not None}
        return {**value, "config": config}

    def _copy_weights(self, old, new):
        values = old.get_weights()
        if [v.shape for v in values] != [tuple(w.shape) for w in new.weights]:
            raise ValueError(
                f"{old.name!r}: {type(old).__name__} of {self.source.__name__} has weights of the "
                f"shapes {[v.shape for v in values]}, that of {self.target.__name__} "
                f"{[tuple(w.shape) for w in new.weights]}."
            )
        new.set_weights(values)


def _call_keras_graph(model, inputs, convert):
    def call(operation):
        layer = convert(operation)
        return lambda *args, **kwargs: layer(*args, **_given(kwargs))

    return model._run_through_graph(inputs, operation_fn=call)


def _call_tf_keras_graph(model, inputs, convert):
    tensors = {}

    def store(references, values):
        # `map_arguments` pops, so each tensor is there as often as it is used.
        for x, y in zip(references, keras.tree.flatten(values), strict=True):
            tensors[str(id(x))] = [y] * model._tensor_usage_count[str(id(x))]

    store(model.inputs, inputs)
    for _, nodes in sorted(model._nodes_by_depth.items(), reverse=True):
        for node in nodes:
            if not node.is_input:
                args, kwargs = node.map_arguments(tensors)
                outputs = convert(node.layer)(*args, **_given(kwargs))
                store(keras.tree.flatten(node.outputs), outputs)
    return keras.tree.map_structure(lambda x: tensors[str(id(x))].pop(), model._nested_outputs)


def _given(kwargs):
    return {key: value for key, value in kwargs.items() if value is not None}


def _parameters(cls) -> dict:
    """The constructor's arguments and their defaults, those it passes on to its bases included."""
    found = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    # tf_keras takes these from **kwargs.
    hidden = {"name": None, "trainable": True, "dtype": None}
    if "return_sequences" in found:
        hidden["zero_output_for_mask"] = False
    return hidden | found


def _name(dtype) -> str:
    return dtype if isinstance(dtype, str) else dtype.name


def _input_name(tensor) -> str:
    history = getattr(tensor, "_keras_history", None)
    return getattr(history, "operation", getattr(history, "layer", None)).name


def _input_struct(model):
    return model._inputs_struct if isinstance(model, keras.Model) else model._nested_inputs


def _require(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is not installed: pip install 'accel-tf[tfmot]'. ({error})"
        ) from error
