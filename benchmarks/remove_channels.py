"""Compares networks with half of their channels removed with the dense ones they came from.

    .venv/bin/python benchmarks/remove_channels.py            # 128 × 128 pixels
    .venv/bin/python benchmarks/remove_channels.py --quick    # two networks
    .venv/bin/python benchmarks/remove_channels.py --full     # 224 × 224 pixels

The outputs of the smaller network are compared with those of the dense one whose channels are masked.
Both are called in the same way, as a tf.function of the model with a fixed shape.
"""

import _common as common
import keras
import numpy as np
import tensorflow as tf

import accel_tf as at
from accel_tf.report import Table

AMOUNT = 0.5
APPLICATIONS = ("MobileNetV2", "ResNet50", "DenseNet121", "EfficientNetB0", "ConvNeXtTiny")
TWINS = "two inputs, shared layers"


def application(name: str, size: int) -> keras.Model:
    make = getattr(keras.applications, name)
    return make(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)


def twins(size: int) -> keras.Model:
    """Two images through the same convolutions, compared by a perceptron."""
    one, two = keras.Input((size, size, 3)), keras.Input((size, size, 3))
    body = keras.Sequential(
        [
            keras.layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")
            for width in (64, 128, 256)
        ]
    )
    pool = keras.layers.GlobalAveragePooling2D()
    joined = keras.layers.Concatenate()([pool(body(one)), pool(body(two))])
    hidden = keras.layers.Dense(256, activation="relu")(joined)
    return keras.Model([one, two], keras.layers.Dense(2)(hidden), name="twins")


def call(model: keras.Model, x: list):
    """Returns a function of no arguments: the outputs of the model for `x`."""
    run = tf.function(lambda x: model(x, training=False), autograph=False)
    x = x[0] if len(x) == 1 else x
    return lambda: run(x)


def difference(small: keras.Model, masked: keras.Model, x: list) -> float:
    ours, want = call(small, x)().numpy(), call(masked, x)().numpy()
    return float(np.abs(ours - want).max() / np.abs(want).max())


def measure(name: str, size: int, batches, budget: dict) -> dict:
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    dense = twins(size) if name == TWINS else application(name, size)
    small = at.remove_channels(dense, AMOUNT)
    rng = np.random.default_rng(0)
    record = {
        "network": name,
        "parameters": [dense.count_params(), small.count_params()],
        "flops": [at.benchmark.flops(dense), at.benchmark.flops(small)],
        "seconds": {},
    }
    for batch in batches:
        x = [
            tf.constant(rng.uniform(0, 1, (batch, *tensor.shape[1:])), tf.float32)
            for tensor in dense.inputs
        ]
        runs = {"dense": call(dense, x), "removed": call(small, x)}
        record["seconds"][batch] = common.turns(runs, **budget)
    at.mask_channels(dense, AMOUNT)
    record["difference"] = difference(small, dense, x)
    assert record["difference"] < 1e-4, f"{name} differs by {record['difference']:.1e}"
    return record


def table(records: list[dict], size: int) -> Table:
    rows = []
    for record in records:
        for batch, seconds in record["seconds"].items():
            rows.append(
                [
                    record["network"],
                    f"{record['parameters'][0] / 1e6:.2f} M",
                    *(f"{b / a:.2f}" for a, b in (record["parameters"], record["flops"])),
                    f"{batch}",
                    *(common.spread(samples) for samples in seconds.values()),
                    f"{common.median(seconds['removed']) / common.median(seconds['dense']):.2f}",
                    f"{record['difference']:.0e}",
                ]
            )
    columns = ["network", "parameters", "left", "FLOPs left", "batch", "dense", "removed"]
    return Table(
        [*columns, "time left", "difference"],
        rows,
        title=f"remove_channels at {AMOUNT:.0%}, {size} × {size} pixels",
        note="left: what is left, as a fraction of the dense network's.\n"
        "difference: the largest to the masked network, as a fraction of the largest output.",
    )


def main() -> None:
    options = common.options(__doc__, "remove_channels")
    size = 224 if options.full else 128
    budget = {"seconds": 0.5 if options.quick else 10, "rounds": 50}
    host, _ = common.head(options.threads)
    names = [*APPLICATIONS, TWINS] if not options.quick else ["MobileNetV2", TWINS]
    records = [measure(name, size, (1, 8), budget) for name in names]
    print(table(records, size), end="\n\n")
    common.save({**host, "size": size, "records": records}, options.output)


if __name__ == "__main__":
    main()
