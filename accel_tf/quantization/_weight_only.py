"""Weight-only quantization of any layer: its kernels and tables are rounded, and it runs as it is."""

import functools

import keras

from accel_tf import _keras
from accel_tf import layers as graphs
from accel_tf.quantization import _preserve
from accel_tf.quantization._kernels import channel_axes
from accel_tf.quantization._layers import QuantizedLayer
from accel_tf.quantization._rules import obstacle, rule_of

_L = keras.layers


@keras.saving.register_keras_serializable(package="accel_tf")
class WeightOnlyLayer(QuantizedLayer):
    """Runs a layer of any kind, with the kernels and tables in it rounded, for weight-only schemes.

    The layer is called with whatever arguments its own `call` takes, and returns what that returns.

    Args:
        layer: The layer, which may hold further layers.
        scheme: A scheme without integer activations, such as `Int8Weights()`.
        quantize_inputs, output, activation, kept, shared, kwargs: As for `QuantizedLayer`.
        exclude: The paths below `layer` of layers whose weights are left as they are.
    """

    rounds_weights = True

    def __init__(self, layer, scheme, *args, exclude=(), **kwargs):
        # Keras reads off the signature of `call` which masks a layer takes, and whether it trains.
        run = functools.partial(type(self)._run, self)
        self.call = functools.update_wrapper(run, layer.call)
        kwargs.setdefault("autocast", layer.autocast)
        super().__init__(layer, scheme, *args, **kwargs)
        self.supports_masking = True  # The layer itself warns if it does not.
        self.exclude = list(exclude)

    def inside(self):
        return {}

    def build(self, input_shape=None):
        """Does nothing: the layer is built by its own first call, of whatever shapes that takes."""

    def compute_output_spec(self, *args, **kwargs):
        """Calls the layer with symbolic tensors, which builds it as in a model of its own."""
        outputs = self.layer(*args, **kwargs)
        _preserve.hold_again(self.layer, self._kept)
        self._kept = ()
        return outputs

    def _run(self, *args, **kwargs):
        rounded = [
            (weight, self.rounded(weight, axes))
            for weight, axes in kernels_of(self.layer, self.scheme.group_size, self.exclude)
        ]
        scope = graphs.Changes(state_mapping=rounded, collect_losses=True)
        with scope:
            outputs = self.layer(*args, **kwargs)
        # What the layer changed meanwhile, such as moving averages and the state of a recurrent layer.
        for variable in scope.variables:
            variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss)
        return outputs

    def compute_mask(self, *args, **kwargs):
        return self.layer.compute_mask(*args, **kwargs) if self.layer.supports_masking else None

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def get_config(self):
        return {**super().get_config(), "exclude": self.exclude}


def anew(layer: keras.Layer, path: str) -> keras.Layer:
    """Returns a copy of a layer without its weights, of its configuration or its constructor's arguments.

    Args:
        layer: The layer.
        path: Its path, for the message.

    Raises:
        ValueError: Neither makes the layer again.
    """
    try:
        lora = {"lora_rank": None} if getattr(layer, "lora_enabled", False) else {}
        return graphs.anew(layer, path, **lora)
    except ValueError:
        arguments = _keras.constructor_arguments(layer)
        if arguments is None:
            raise
        try:
            return type(layer)(**{**arguments, "name": layer.name})
        except TypeError:
            pass
        raise


def kernels_of(layer: keras.Layer, group_size=None, exclude=()) -> list[tuple]:
    """Returns the kernels, tables and matrices of a layer and of the layers in it, see `_is_rounded`.

    Args:
        layer: The layer, built.
        group_size: That of the scheme. A table has a scale for each row only if it is not `None`.
        exclude: The paths below `layer` of layers to leave out.

    Returns:
        Pairs of the Keras variable and the axes of its channels, as for `round_weights`.
    """
    return [
        (v, _axes(v, owner, group_size))
        for v, path, owner in _owned(layer)
        if _is_rounded(v, owner) and not any(f"{path}/".startswith(f"{p}/") for p in exclude)
    ]


def holds_matrices(layer: keras.Layer) -> bool:
    """Whether a layer itself, rather than a layer in it, has weights that are rounded."""
    below = {id(v) for _, inner in graphs.walk(layer) for v in inner.weights}
    return any(id(v) not in below and _is_rounded(v, layer) for v in layer.weights)


def _is_rounded(variable, owner) -> bool:
    """Whether a weight is rounded: kernels and tables, and whatever else a custom layer multiplies by.

    What Keras' own layers have besides is small, such as an initial state. In a layer of the user's any
    name may stand for a kernel, so each trainable matrix is one that is neither a bias nor a vector of
    further axes of length 1.
    """
    if _preserve.is_kernel(variable):
        return True
    custom = isinstance(owner, graphs.OwnWeight) or not type(owner).__module__.startswith("keras.")
    is_matrix = sum(size > 1 for size in variable.shape) >= 2
    is_float = keras.backend.is_float_dtype(variable.dtype)
    return (
        custom
        and is_matrix
        and is_float
        and variable.trainable
        and not variable.name.endswith("bias")
    )


def has_wrapper(call, scheme) -> bool:
    """Whether the layer of a call has a wrapper of its own that rounds its weights and can run the call."""
    layer, rule = call.layer, rule_of(call.layer)
    if rule is None or rule.wrapper is None or not rule.wrapper.rounds_weights:
        return False
    if isinstance(layer, _L.MultiHeadAttention):
        known_length = all(x.shape[1] is not None for x in call.inputs)
        takes = known_length or not layer._inbound_nodes[0].arguments.kwargs.get("use_causal_mask")
    else:
        takes = len(call.inputs) == 1
    return takes and len(call.outputs) == 1 and obstacle(layer, call.inputs, scheme) is None


def excluded_in(layer: keras.Layer, path: str, scheme_at) -> list[str]:
    """Returns the paths below `layer` of layers that stay in float.

    Args:
        layer: A layer that is quantized as one, whatever layers it holds.
        path: Its path.
        scheme_at: A function from the path of a layer to its scheme, or to `None` for float.

    Raises:
        ValueError: A layer in it has another scheme.
    """
    scheme, excluded = scheme_at(path), []
    for name, _ in graphs.walk(layer):
        found = scheme_at(f"{path}/{name}")
        if found is None:
            excluded.append(name)
        elif found != scheme:
            raise ValueError(
                f"Mixed gives layer {path!r} ({type(layer).__name__}) the scheme {scheme}, and "
                f"{name!r} in it {found}. This layer cannot be taken apart, so it has one scheme. "
                f"Give {path + '*'!r} one, or None to leave all of it in float."
            )
    return excluded


def note(done: str, layer, excluded=()) -> str:
    """Returns what is to be said of a layer in the report: what was done, and what stays in float.

    Besides excluded layers, that are its weights of two and more axes that are not rounded, but for biases.
    """
    owned = _owned(layer) if isinstance(layer, keras.Layer) else []
    others = [
        v.name
        for v, _, owner in owned
        if len(v.shape) >= 2
        and v.trainable
        and keras.backend.is_float_dtype(v.dtype)
        and not _is_rounded(v, owner)
        and not v.name.endswith("bias")
    ]
    kept = [f"{name} stays in float" for name in (*excluded, *dict.fromkeys(others))]
    return ", ".join(filter(None, [done, *kept]))


def _owned(layer):
    """Returns each weight with the path below `layer` and the innermost layer that holds it."""
    found = {}
    for path, owner in (("", layer), *graphs.walk(layer)):  # A layer comes before those in it.
        found.update((id(v), (v, path, owner)) for v in owner.weights)
    return list(found.values())


def _axes(variable, owner, group_size):
    if variable.name == "depthwise_kernel":
        return (-2, -1)
    if variable.name.endswith("embeddings") and variable.name != "reverse_embeddings":
        return () if group_size is None else (0,)
    return channel_axes(owner)
