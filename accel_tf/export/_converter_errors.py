"""What TensorFlow's converter to LiteRT says when it fails, in words that name layers and the way out."""

import re

from accel_tf import report
from accel_tf.export._graph import nearest

# What to write instead of operators of TensorFlow that LiteRT does not have.
_INSTEAD = {
    "Erf": "an approximation in tanh, such as keras.ops.gelu(x, approximate=True) for gelu",
    "Roll": "keras.ops.concatenate([x[:, -n:], x[:, :-n]], axis=1) for keras.ops.roll(x, n, axis=1)",
    "AccelTfSparseMatMul": "the dense model, which is the one that was given to accel_tf.sparsify",
    "BitwiseAnd": "tf.argmax(x, axis) or tf.argmin(x, axis) in a layer of your own; those of keras.ops "
    "tell -0.0 from 0.0 by its bits",
}
_ELSE = "Or export with accel_tf.export.saved_model, which can hold every operator of TensorFlow."


def explain(message: str, log: str, known) -> str:
    """Returns why a conversion failed.

    Args:
        message: That of the converter's error.
        log: What TensorFlow logged meanwhile.
        known: The model's layers, `Known`, by their scopes in the file.
    """
    places = re.findall(r'fused\["(\w+):", "([^"@]+)', message)
    if missing := dict.fromkeys(re.findall(r"'tf\.(\w+)' op is neither a custom op", message)):
        lines = [
            f"LiteRT has no operator for {name} ({_where(places, known, name)}). Write "
            f"{_INSTEAD.get(name, 'operators that LiteRT has')}."
            for name in missing
        ]
        return " ".join([*lines, _ELSE])
    if "Unsupported output type" in message:
        return (
            "an output is computed in float, as LiteRT has no integer kernel for the layer before it. Pass "
            'io_dtype="float32".'
        )
    if found := re.search(r"'tfl?\.(\w+)' op ([^\n]+)", message):
        return (
            f"it made the operator {found[1]} and then refused it ({found[2].strip()}), "
            f"{_where(places, known)}. Try another batch_size, or None. {_ELSE}"
        )
    lines = f"{message}\n{log}".splitlines()
    # TensorFlow logs some lines at all times.
    return "\n".join(line for line in lines if line and not re.search(r"\.cc:\d+\]", line))[:800]


def _where(places, known, kind=None) -> str:
    """Returns the layers that hold operators, all or those of one kind, in words."""
    scopes = {nearest(place, known) for name, place in places if kind in (None, name)}
    paths = sorted({known[found].path for found in scopes if found})
    return f"in {report.shorten(paths)}" if paths else "between layers"
