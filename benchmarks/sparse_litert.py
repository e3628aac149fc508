"""Compares the sparse product of accel_tf with LiteRT's block-sparse fully connected layer.

    .venv/bin/python benchmarks/sparse_litert.py            # some seconds

LiteRT has fast kernels for weights whose zeros come in blocks of four or of sixteen inputs of one
output (1x4, 1x16). They take one sample and one thread, and so does accel_tf here: hence a process of
its own. Each candidate runs through eight layers of 1024 × 1024 weights, all different, eight times,
in one LiteRT file or in one tf.function: 64 products. What the call costs from Python, that of a file
of one tiny layer or of a tf.function of the identity, is measured in the same rounds and subtracted.
"""

import functools

import _common as common
import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import accel_tf as at
from accel_tf._litert import quiet
from accel_tf.report import Table

SIZE, LAYERS, PASSES = 1024, 8, 8
SPARSITIES = (0.8, 0.9, 0.95)
# The blocks in which each format has its zeros, as outputs × inputs.
OURS = {"unstructured": (1, 1), "4x1": (4, 1), "16x1": (16, 1)}
CALL = "a call of"
LITERT = {"dense": (1, 1), "1x4": (1, 4), "1x16": (1, 16)}


def weights(sparsity: float, block: tuple[int, int]) -> list[np.ndarray]:
    """Matrices (in, out) with zeros in blocks of outputs × inputs, that keep the scale of x."""
    rng = np.random.default_rng(0)
    outputs, inputs = block
    matrices = []
    for _ in range(LAYERS):
        kept = rng.random((SIZE // inputs, SIZE // outputs)) >= sparsity
        kept = np.repeat(np.repeat(kept, inputs, axis=0), outputs, axis=1)
        w = kept * rng.standard_normal(kept.shape) / np.sqrt(kept.sum() / SIZE)
        matrices.append(w.astype(np.float32))
    return matrices


def litert(matrices, sparse: bool):
    """Returns a function of x that runs the layers as a LiteRT model, in one thread."""
    inputs = x = keras.Input((len(matrices[0]),), batch_size=1)
    layers = [keras.layers.Dense(w.shape[1], use_bias=False) for w in matrices]
    for layer in layers * PASSES:
        x = layer(x)
    model = keras.Model(inputs, x)
    for layer, w in zip(layers, matrices, strict=True):
        layer.set_weights([w])
    with quiet():
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if sparse:
            converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        content = converter.convert()
        # A tenth of the weights and their indices: or else the format was not taken up.
        assert not sparse or len(content) < 0.5 * sum(w.nbytes for w in matrices), len(content)
        interpreter = Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
    (x_details,), (y_details,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x):
        interpreter.set_tensor(x_details["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(y_details["index"])

    return run


def graph(products):
    """Returns a function of x that runs the products in one tf.function."""

    @tf.function(autograph=False)
    def run(x):
        for product in products * PASSES:
            x = product(x)
        return x

    return run


def ours(matrices, format: str):
    sparse = [at.SparseMatrix.from_dense(w, format=format) for w in matrices]
    return graph([functools.partial(at.sparse_matmul, matrix=m) for m in sparse])


def dense(matrices):
    return graph([functools.partial(tf.matmul, b=tf.constant(w)) for w in matrices])


def check(name: str, run, matrices, x: np.ndarray) -> None:
    want = x.astype(np.float64)
    for w in matrices * PASSES:
        want = want @ w
    error = np.linalg.norm(run(x) - want) / np.linalg.norm(want)
    assert error < 1e-4, f"{name} is wrong by {error:.1e}"


def measure(sparsity: float, budget) -> dict[str, list[float]]:
    """Returns the seconds of each round: of the candidates' 64 products, and of the calls alone."""
    x = np.random.default_rng(1).standard_normal((1, SIZE), np.float32)
    runs = {}

    def add(name, make, block, *arguments):
        matrices = weights(sparsity, block)
        run = make(matrices, *arguments)
        check(name, run, matrices, x)
        runs[name] = functools.partial(run, tf.constant(x) if make is not litert else x)

    add("tf.matmul", dense, (1, 1))
    for name, block in LITERT.items():
        add(f"LiteRT {name}", litert, block, name != "dense")
    for format, block in OURS.items():
        add(f"accel_tf {format}", ours, block, format)
    tiny = litert([np.eye(16, dtype=np.float32)], False)
    runs[f"{CALL} LiteRT"] = functools.partial(tiny, np.ones((1, 16), np.float32))
    identity = tf.function(tf.identity, autograph=False)
    runs[f"{CALL} TensorFlow"] = functools.partial(identity, tf.constant(x))
    return common.turns(runs, **budget)


def table(sparsity: float, seconds: dict[str, list[float]]) -> Table:
    products = {}
    for name, samples in seconds.items():
        if not name.startswith(CALL):
            framework = "LiteRT" if name.startswith("LiteRT") else "TensorFlow"
            call = common.median(seconds[f"{CALL} {framework}"])
            products[name] = (np.array(samples) - call) / (LAYERS * PASSES)
    times = {name: common.median(samples) for name, samples in products.items()}
    best = min(times[f"LiteRT {name}"] for name in LITERT)
    rows = [
        (name, common.spread(products[name]), f"{times['tf.matmul'] / t:.2f}", f"{best / t:.2f}")
        for name, t in times.items()
    ]
    calls = [f"{n} {common.spread(t)}" for n, t in seconds.items() if n.startswith(CALL)]
    return Table(
        ["", "one product: median (quartiles)", "vs tf.matmul", "vs the best of LiteRT"],
        rows,
        title=f"{SIZE} × {SIZE} weights, {sparsity:.0%} zeros, batch 1, one thread",
        note="; ".join(calls),
    )


def main() -> None:
    options = common.options(__doc__, "sparse_litert", threads=1)
    host, _ = common.head(options.threads)
    budget = {"seconds": 0.5 if options.quick else 2, "rounds": 50 if options.quick else 200}
    records = {}
    for sparsity in (0.9,) if options.quick else SPARSITIES:
        records[sparsity] = measure(sparsity, budget)
        print(table(sparsity, records[sparsity]), end="\n\n", flush=True)
    common.save({**host, "records": records}, options.output)


if __name__ == "__main__":
    main()
