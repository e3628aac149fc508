"""Quantizes every family of keras.applications to an int8 file, with accel_tf and with TFMOT.

    .venv/bin/python benchmarks/quantization_families.py            # half an hour to one
    .venv/bin/python benchmarks/quantization_families.py --quick    # three families
    .venv/bin/python benchmarks/quantization_families.py --book     # also into book/_data
    .venv/bin/python benchmarks/quantization_families.py --resume   # families still missing there

Of each family the smallest member, trained on the digits for some eighty steps, as there are no weights
from elsewhere and those of no training amplify any difference: quantize_aware, one step of training,
a `.keras` file and back, a LiteRT file. Counted are the operators that compute in float, and how far
the file is from the quantized model on the images of that step (SQNR in dB, before the softmax).
Nothing is timed, so both sides run at once, in processes of their own: TFMOT makes tf.keras another
package.
"""

import collections
import importlib.metadata
import json
import tempfile
from pathlib import Path

import _common as common
import keras
import numpy as np
from _families import CLASSES, QUICK, compare, families, reason

import accel_tf as at
from accel_tf.report import Table

BOOK = Path(__file__).parent.parent / "book" / "_data" / "quantization_families.json"
# Products, sums and pools: what has to be int8. A MEAN is a global pool.
COMPUTING = (
    *("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"),
    *("ADD", "AVERAGE_POOL_2D", "MAX_POOL_2D", "MEAN"),
)
ENOUGH = 20  # dB
BATCH, STEPS = 16, 80  # InceptionV3 wants 75 pixels, the others less
SEEN = 64  # images of the one step, and of the statistics before it
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def shape_of(member: str) -> tuple[int, int, int]:
    """Returns the shape of the images for a member: small ones, but what it asks for at least."""
    size = 75 if member.startswith(("Inception", "Xception")) else 48
    return size, size, 3


def sqnr(signal, noisy) -> float:
    signal, noisy = np.asarray(signal, "float64"), np.asarray(noisy, "float64")
    return float(10 * np.log10((signal**2).sum() / max(((signal - noisy) ** 2).sum(), 1e-30)))


def pictures(member: str, x: np.ndarray) -> np.ndarray:
    """Returns digits as colour images in the range that a member expects: some take 0 to 255.

    With a little noise: a digit has 17 greys, many of them halves of a step where the range is −1 to 1,
    and these are rounded up or down by their last bit, differently in TensorFlow and in LiteRT.
    """
    takes_pixels = member.startswith(("EfficientNet", "MobileNetV3", "ConvNeXt"))
    x = np.repeat(keras.ops.image.resize(x, shape_of(member)[:2]), 3, axis=-1)
    x = np.clip(x + np.random.default_rng(0).normal(0, 0.02, x.shape), 0, 1).astype("float32")
    return x * 255 if takes_pixels else x * 2 - 1


def train(model, member: str) -> None:
    """Trains a model for a few steps, and takes the statistics of its normalizations from data."""
    (x, y), _ = at.datasets.digits()
    rng = np.random.default_rng(0)
    model.compile(keras.optimizers.Adam(1e-3), LOSS)
    for _ in range(STEPS):
        chosen = rng.choice(len(x), BATCH, replace=False)
        model.train_on_batch(pictures(member, x[chosen]), y[chosen])
    norms = [v for _, v in at.layers.walk(model) if isinstance(v, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:  # Their average lags far behind after so few steps.
        norm.momentum = 0.0
    model(pictures(member, x[:SEEN]), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def ours(member: str) -> dict:
    """Takes a member to an int8 file with accel_tf, and compares."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    build = getattr(keras.applications, member)
    model = build(
        weights=None, input_shape=shape_of(member), classes=CLASSES, classifier_activation=None
    )
    train(model, member)
    (x, y), _ = at.datasets.digits()
    x, y = pictures(member, x[:SEEN]), y[:SEEN]
    quantized = at.quantize_aware(model)
    quantized.compile(keras.optimizers.SGD(1e-4), LOSS)
    quantized.train_on_batch(x, y)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        expected = np.asarray(quantized(x))
        quantized.save(folder / "model.keras")
        loaded = keras.models.load_model(folder / "model.keras", compile=False)
        if (np.asarray(loaded(x)) != expected).any():
            return {"refusal": "the model changed on its way through the .keras file"}
        try:
            found = at.export.litert(loaded, folder / "model.tflite")
        except ValueError as error:
            return {"refusal": reason(error)}
        real = at.export.run_litert(folder / "model.tflite", x)
    in_float = [op for op in found.operators if op.kind == "float"]
    return {
        "operators": len(found.operators),
        "float": dict(collections.Counter(op.name for op in in_float)),
        "why": sorted({op.why for op in in_float}),
        "sqnr": sqnr(expected, real),
        "sqnr_float": sqnr(model(x), expected),
    }


def theirs(member: str) -> dict:
    """Takes a member to an int8 file with TFMOT; or returns why it refuses."""
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    build = getattr(tf_keras.applications, member)
    model = build(weights=None, input_shape=shape_of(member), classes=CLASSES)
    (x, y), _ = at.datasets.digits()
    x = pictures(member, x[:BATCH])
    try:
        with tfmot.quantization.keras.quantize_scope():
            model = tfmot.quantization.keras.quantize_model(model)
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.train_on_batch(x, y[:BATCH])
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            path.write_bytes(converter.convert())
            found = at.inspect_litert(path)
    except Exception as error:  # whatever it is, it is the answer
        return {"refusal": reason(error)}
    in_float = [op.name for op in found.operators if op.kind == "float"]
    return {"operators": len(found.operators), "float": dict(collections.Counter(in_float))}


def passes(outcome: dict) -> bool:
    """Whether products, sums and pools are int8, but for islands, and the numbers are the model's."""
    if "operators" not in outcome:
        return False
    named = all(outcome.get("why", [""]))
    computing = not set(COMPUTING) & set(outcome["float"])
    return (computing or named) and outcome.get("sqnr", np.inf) >= ENOUGH


def describe(outcome: dict) -> str:
    """Says in a few words what became of a model."""
    if "refusal" in outcome:
        return "refused"
    if "absent" in outcome:
        return outcome["absent"]
    rest = sum(outcome["float"].values())
    text = f"{outcome['operators']} operators, {rest or 'none'} in float"
    if "sqnr" not in outcome:
        return text
    return f"{text}, {outcome['sqnr']:.0f} dB" if outcome["sqnr"] < 200 else f"{text}, exact"


def table(rows: list[dict]) -> Table:
    def says(outcome):
        reasons = [outcome["refusal"]] if "refusal" in outcome else outcome.get("why", [])
        if outcome.get("sqnr", np.inf) < ENOUGH:
            left = f"8 bits leave {outcome['sqnr_float']:.0f} dB of the float network"
            reasons = [*reasons, f"{left}: it magnifies the last bit of a sum as much as rounding"]
        return "; ".join(reasons)

    return Table(
        [
            "family",
            "smallest member",
            "accel_tf on Keras 3",
            "says",
            "TFMOT on tf_keras",
            "TFMOT says",
        ],
        [
            [
                *(row["family"], row["member"], describe(row["ours"]), says(row["ours"])),
                *(describe(row["tfmot"]), says(row["tfmot"])),
            ]
            for row in rows
        ],
        title="quantize_aware, one step, .keras, LiteRT",
        note=summary(rows),
    )


def summary(rows: list[dict]) -> str:
    here = [row for row in rows if "absent" not in row["ours"]]
    there = [row for row in rows if "absent" not in row["tfmot"]]
    return (
        f"accel_tf: {sum(passes(row['ours']) for row in here)} of {len(here)} families in int8, with "
        f"at least {ENOUGH} dB between file and model. "
        f"TFMOT: {sum(passes(row['tfmot']) for row in there)} of {len(there)} in int8."
    )


def main() -> None:
    import tf_keras

    options = common.options(
        __doc__,
        "quantization_families",
        book=f"also write {BOOK.name} for the book",
        resume="run only the families that the JSON file does not have yet",
    )
    host = at.benchmark.host()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("tensorflow-model-optimization", "tf_keras")
    }
    print(f"{host}, {', '.join(' '.join(item) for item in versions.items())}\n", flush=True)
    here, there = families(keras.applications), families(tf_keras.applications)
    names = QUICK if options.quick else sorted({**here, **there})
    goes_on = options.resume and options.output.exists()
    rows = json.loads(options.output.read_text())["rows"] if goes_on else []
    names = [name for name in names if name not in [row["family"] for row in rows]]
    for row in compare(names, ours, here, theirs, there):
        rows = sorted([*rows, row], key=lambda row: row["family"])
        print(row["family"], describe(row["ours"]), describe(row["tfmot"]), sep=": ", flush=True)
        # Saved as they come: the run is long.
        found = {"host": str(host), "versions": {**host.versions, **versions}, "rows": rows}
        for path in [options.output, *([BOOK] if options.book else [])]:
            common.write(found, path)
    print(f"\n{table(rows)}\n")


if __name__ == "__main__":
    main()
