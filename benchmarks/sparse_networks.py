"""Compares pruned networks, dense in Keras and made sparse by accel_tf, from input to output.

    .venv/bin/python benchmarks/sparse_networks.py            # two minutes
    .venv/bin/python benchmarks/sparse_networks.py --quick    # the multilayer perceptron alone

The kernels of every Dense, EinsumDense and 1 × 1 convolution lose the smallest 90 % of their weights.
Both networks are called in the same way, as a tf.function of the model with a fixed shape, plain and
compiled by XLA, and the faster way of each counts. Their outputs are compared first.
"""

import time

import _common as common
import keras
import numpy as np
import tensorflow as tf

import accel_tf as at
from accel_tf.report import Table

SPARSITY = 0.9


def perceptron() -> keras.Model:
    """Four layers of 2048 units."""
    return keras.Sequential(
        [keras.Input((2048,)), *(keras.layers.Dense(2048, activation="relu") for _ in range(4))]
    )


def encoder() -> keras.Model:
    """A block of a transformer's encoder, of BERT-base's sizes: sequence 128, 12 heads, 768/3072."""
    inputs = keras.Input((128, 768))
    attended = keras.layers.MultiHeadAttention(12, 64, name="attention")(inputs, inputs)
    x = keras.layers.LayerNormalization()(keras.layers.Add()([inputs, attended]))
    y = keras.layers.Dense(3072, activation="gelu")(x)
    y = keras.layers.Dense(768)(y)
    return keras.Model(inputs, keras.layers.LayerNormalization()(keras.layers.Add()([x, y])))


def mobilenet() -> keras.Model:
    """MobileNetV1 with its 1000 classes, before the softmax."""
    return keras.applications.MobileNet(weights=None, classifier_activation=None)


NETWORKS = {
    "MLP, 4 × 2048": (perceptron, (32, 128)),
    "transformer encoder block": (encoder, (1, 8)),
    "MobileNetV1, 224 × 224": (mobilenet, (1, 8)),
}
KERAS, OURS = "Keras", "accel_tf"
WAYS = {"plain": False, "XLA": True}  # jit_compile


def prune(model: keras.Model, height: int) -> None:
    """Sets the smallest weights of each kernel to zero, in blocks of `height` outputs, in place.

    The rest is scaled up, so that activations keep their magnitude through many layers.
    """
    for variable in model.trainable_variables:
        if variable.name != "kernel" or (len(variable.shape) == 4 and variable.shape[0] > 1):
            continue
        w = variable.numpy()
        size = np.abs(w).reshape(-1, height).sum(axis=1)
        kept = np.repeat(size > np.quantile(size, SPARSITY), height).reshape(w.shape)
        variable.assign(w * kept * (np.linalg.norm(w) / np.linalg.norm(w * kept)))


def inference(model: keras.Model, jit_compile: bool, x):
    """Returns a function of no arguments: the outputs of the model for `x`."""
    run = tf.function(lambda x: model(x, training=False), jit_compile=jit_compile, autograph=False)
    return lambda: run(x)


def training(model: keras.Model, jit_compile: bool, x, y):
    """Returns a function of no arguments: a step of Adam on the mean squared error, and its loss."""
    weights = model.get_weights()
    model = keras.models.clone_model(model)  # each way of running it trains its own
    model.set_weights(weights)
    optimizer = keras.optimizers.Adam(1e-4)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return lambda: step(x, y)


def measure(make, dense: keras.Model, sparse: keras.Model, slow: set, budget, *arguments) -> dict:
    """Compares the first results of both models, then times them; returns the raw times.

    A way that takes more than three times as long as the plain one is not timed, and added to `slow`,
    whose members are left out: XLA takes ten times as long for depthwise convolutions on a CPU.
    """
    runs = {
        f"{name} {way}": make(model, jit_compile, *arguments)
        for name, model in ((KERAS, dense), (OURS, sparse))
        for way, jit_compile in WAYS.items()
        if f"{name} {way}" not in slow
    }
    results = {name: np.asarray(run()) for name, run in runs.items()}
    want = results[f"{KERAS} plain"]
    difference = max(float(np.abs(y - want).max() / np.abs(want).max()) for y in results.values())
    assert difference < 1e-4, f"results differ by {difference:.1e} of the largest"
    once = {name: seconds(run) for name, run in runs.items()}
    for name in runs:
        if once[name] > 3 * once[f"{name.split()[0]} plain"]:
            slow.add(name)
    runs = {name: run for name, run in runs.items() if name not in slow}
    return {"difference": difference, "seconds": common.turns(runs, **budget)}


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(records: list[dict], title: str) -> Table:
    columns = [f"{who} {way}" for who in (KERAS, OURS) for way in WAYS]
    rows = []
    for record in records:
        times = {name: common.median(samples) for name, samples in record["seconds"].items()}
        best = [
            min(t for name, t in times.items() if name.startswith(who)) for who in (KERAS, OURS)
        ]
        rows.append(
            [
                *(record[key] for key in ("network", "pattern", "layers")),
                f"{record['batch']}",
                *(common.spread(record["seconds"][c]) if c in times else "slower" for c in columns),
                f"{best[0] / best[1]:.2f}",
                f"{record['difference']:.0e}",
            ]
        )
    return Table(
        ["network", "zeros", "sparse layers", "batch", *columns, "speed-up", "difference"],
        rows,
        title=title,
        note="speed-up: the faster way of Keras over the faster way of accel_tf.\n"
        "difference: the largest between results, as a fraction of the largest result.\n"
        "slower: by more than a factor of three than plain, and not timed.",
    )


def main() -> None:
    options = common.options(__doc__, "sparse_networks")
    budget = {"seconds": 0.5 if options.quick else 3, "rounds": 50 if options.quick else 200}
    host, _ = common.head(options.threads)
    rng = np.random.default_rng(0)
    records, steps = [], []
    for network, (build, batches) in list(NETWORKS.items())[: 1 if options.quick else None]:
        slow = set()
        for height, pattern in ((1, "unstructured"), (4, "4x1"))[: 1 if options.quick else None]:
            keras.utils.set_random_seed(0)
            dense = build()
            prune(dense, height)
            facts = {"network": network, "pattern": pattern}
            for batch in batches:
                sparse = at.sparsify(dense, batch_size=batch)
                facts["layers"] = len(at.report_of(sparse).done)
                shape = (batch, *dense.input_shape[1:])
                x = tf.constant(rng.standard_normal(shape, np.float32))
                measured = measure(inference, dense, sparse, slow, budget, x)
                records.append({**facts, "batch": batch, **measured})
            if build is perceptron:
                y = tf.constant(rng.standard_normal(x.shape, np.float32))
                measured = measure(training, dense, sparse, set(), budget, x, y)
                steps.append({**facts, "batch": batch, **measured})
    print(table(records, f"Inference, {SPARSITY:.0%} zeros"), end="\n\n")
    print(table(steps, f"A step of training with Adam, {SPARSITY:.0%} zeros"), end="\n\n")
    common.save({**host, "inference": records, "training": steps}, options.output)


if __name__ == "__main__":
    main()
