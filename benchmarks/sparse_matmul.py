"""Compares the sparse product of accel_tf with dense and sparse peers, beside the host's roofline.

    .venv/bin/python benchmarks/sparse_matmul.py            # some minutes
    .venv/bin/python benchmarks/sparse_matmul.py --quick    # four cases, half a minute
    .venv/bin/python benchmarks/sparse_matmul.py --full     # every layer at every sparsity, an hour

A candidate is timed on a chain of eight products, each of which acts on what the one before gave.
Those of TensorFlow run inside one tf.function; SciPy and MKL are called eight times, and so is
CSRSparseMatrix ("CSR") besides, as it is faster so. What the calls cost, a tf.function of the identity
or eight tiny products, is measured in the same rounds and subtracted. All run in this process and take
turns. Before anything is timed, each result is compared with that of the chain in double precision.
"""

import sys
import time

import _common as common
import _mkl
import numpy as np
import tensorflow as tf
from _products import CANDIDATES, CHAIN, DENSE, FORMATS, OURS, PEERS, Layer, cycle, square
from tqdm import tqdm

import accel_tf as at
from accel_tf.report import Table

SLOW = (
    0.025  # seconds: of a peer whose product takes that long, one product is timed instead of eight
)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
GRID = square(2048)
LAYERS = [
    *map(square, (512, 1024, 4096)),
    Layer("transformer FFN", 768, 3072),
    Layer("MobileNetV1, 28 × 28", 256, 256, pixels=28 * 28),
    Layer("MobileNetV1, 14 × 14", 512, 512, pixels=14 * 14),
    Layer("MobileNetV1, 7 × 7", 1024, 1024, pixels=7 * 7),
    Layer("ResNet-50, 56 × 56", 256, 64, pixels=56 * 56),
    Layer("ResNet-50, 28 × 28", 512, 128, pixels=28 * 28),
    Layer("ResNet-50, 14 × 14", 1024, 256, pixels=14 * 14),
    Layer("ResNet-50, 7 × 7", 2048, 512, pixels=7 * 7),
]


def beyond_the_cache() -> list[Layer]:
    """Layers whose dense weights do not fit the last-level cache; of the last two, nor do the sparse."""
    side = 1024
    while 4 * side**2 <= common.last_level_cache():
        side *= 2
    return [square(side), square(side, CHAIN), square(2 * side)]


def cases(options) -> dict[str, list[tuple[Layer, float, list[int]]]]:
    """The tables to make: of each a list of layers, with a sparsity and the batch sizes."""
    if options.quick:
        return {"First look": [(GRID, sparsity, [1, 128]) for sparsity in (0.5, 0.9)]}
    sparsities = SPARSITIES if options.full else (0.9,)

    def batches(layer):
        if layer.pixels == 1:
            return [1, 32, 128, 512] if options.full else [1, 128]
        return [1, 8] if options.full else [1]

    return {
        "Squares of 2048": [(GRID, sparsity, [1, 32, 128, 512]) for sparsity in SPARSITIES],
        "Layers": [(layer, s, batches(layer)) for layer in LAYERS for s in sparsities],
        "One sample, weights beyond the last-level cache": [
            (layer, s, [1]) for layer in beyond_the_cache() for s in sparsities
        ],
    }


def measure(layer: Layer, sparsity: float, batches, budget, report) -> list[dict]:
    """Returns a record for each batch size, with the raw times of each candidate."""
    taking_part = {n: c for n, c in CANDIDATES.items() if 1 in batches or not c.one_sample}
    weights, products = {}, {}
    for name, candidate in taking_part.items():
        kind = candidate.height, candidate.int8
        if kind not in weights:
            weights[kind] = layer.weights(sparsity, *kind)
        products[name] = [candidate.prepare(a) for a in weights[kind]]
    records = []
    for batch in batches:
        report(f"{layer.name}, {sparsity:.0%} zeros, batch {batch}")
        rows = batch * layer.pixels
        chains, calls, entries = {}, {}, {}
        # Rows in random order out of eight: each can be checked, and few need to be computed twice.
        rng = np.random.default_rng(1)
        base = rng.standard_normal((8, layer.inputs), np.float32)
        order = rng.integers(0, 8, rows)
        for name, candidate in taking_part.items():
            if candidate.one_sample and rows > 1:
                continue
            matrices = weights[candidate.height, candidate.int8]
            chain, length = checked_chain(candidate, products[name], matrices, base, order)
            nonzeros = float(np.mean([a.nnz for a in matrices]))
            stored = candidate.stored * (
                layer.inputs * layer.outputs if name == DENSE else nonzeros
            )
            chains[name] = chain
            calls[name] = candidate.calls(length, base[order])
            entries[name] = {
                "products": length,
                "density": nonzeros / (layer.inputs * layer.outputs),
                "flops": 2 * nonzeros * rows,
                "bytes": stored + 4 * rows * (layer.inputs + layer.outputs),
            }
        times = common.turns(
            chains | {f"calls of {name}": call for name, call in calls.items()}, **budget
        )
        for name, entry in entries.items():
            entry["seconds"], entry["seconds_of_calls"] = times[name], times[f"calls of {name}"]
        records.append(
            {
                "layer": layer.name,
                "shape": [layer.inputs, layer.outputs],
                "matrices": layer.matrices,
                "sparsity": sparsity,
                "batch": batch,
                "rows": rows,
                "candidates": entries,
            }
        )
        report(None)
    return records


def checked_chain(candidate, products, matrices, base, order):
    """Returns the chain that will be timed, and its length, after a comparison with float64."""

    def check(length):
        chain = candidate.chain(cycle(products, length), base[order])
        want = base.T.astype(np.float64)
        for a in cycle(matrices, length):
            want = a.astype(np.float64) @ want
        error = candidate.rows(chain()) - want.T[order]
        relative = np.linalg.norm(error, axis=1).max() / np.linalg.norm(want, axis=0).min()
        assert relative < 1e-5, f"{candidate} is wrong by {relative:.1e}"
        return chain

    single = check(1)
    start = time.perf_counter()
    single()
    peer = candidate in [CANDIDATES[name] for name in PEERS]
    if peer and time.perf_counter() - start > SLOW:
        return single, 1
    return check(CHAIN), CHAIN


def one_product(entry: dict) -> np.ndarray:
    """The seconds of a product, from each round: a chain's without what its calls cost."""
    calls = common.median(entry["seconds_of_calls"])
    return (np.array(entry["seconds"]) - calls) / entry["products"]


def table(title: str, records: list[dict], limits) -> Table:
    """One line for each case and each format of ours."""
    lines = []
    for record in records:
        entries = record["candidates"]
        times = {name: common.median(one_product(e)) for name, e in entries.items()}
        for name in filter(entries.get, FORMATS):
            entry, ours = entries[name], times[name]
            speedup = times[DENSE] / ours
            lines.append(
                [
                    record["layer"],
                    f"{record['batch']}",
                    f"{record['sparsity']:.0%}",
                    name.removeprefix(OURS).strip() or "unstructured",
                    common.spread(one_product(entry)),
                    f"{speedup:.2f}",
                    f"{speedup * entry['density']:.2f}",
                    *(
                        f"{times[peer] / ours:.2f}" if name == OURS else "–"
                        for peer in PEERS
                    ),
                    f"{entry['flops'] / ours / 1e9:.1f}",
                    f"{entry['bytes'] / ours / 1e9:.1f}",
                    f"{limits.bound(entry['flops'], entry['bytes']) / ours:.0%}",
                ]
            )  # fmt: skip
    return Table(
        ["layer", "batch", "zeros", "format", "one product: median (quartiles)",
         f"vs {DENSE}", "efficiency", *(f"vs {peer}" for peer in PEERS),
         "GFLOP/s", "GB/s", "of roofline"],
        lines,
        title=title,
    )  # fmt: skip


def call_costs(budget) -> Table:
    """What a program pays on top, each time that it calls from Python."""
    x, small = tf.ones((1, 2048)), tf.ones((1, 16))
    matrix = at.SparseMatrix.from_dense(np.eye(16), format="unstructured")
    identity = tf.function(tf.identity, autograph=False)
    product = tf.function(lambda x: at.sparse_matmul(x, matrix), autograph=False)
    calls = {
        "tf.function of the identity": lambda: identity(x),
        "tf.function of a 16 × 16 sparse product": lambda: product(small),
        "eager sparse_matmul, 16 × 16": lambda: at.sparse_matmul(small, matrix),
        "eager tf.matmul, 16 × 16": lambda: tf.matmul(small, small, transpose_b=True),
    }
    times = common.turns(calls, **budget)
    rows = [(name, common.spread(samples)) for name, samples in times.items()]
    return Table(["one call from Python", "time"], rows)


def main() -> None:
    options = common.options(__doc__, "sparse_matmul")
    if _mkl.load() is not None:
        _mkl.load().MKL_Set_Num_Threads(options.threads)
    budget = {
        "seconds": 0.15 if options.quick else 2 if options.full else 0.4,
        "rounds": 200 if options.full else 50,
    }
    host, limits = common.head(options.threads)
    print(call_costs({"seconds": 1, "rounds": 200}), end="\n\n", flush=True)
    groups = cases(options)
    records = {}
    total = sum(len(batches) for group in groups.values() for _, _, batches in group)
    with tqdm(total=total, unit="case", file=sys.stderr, disable=None) as progress:

        def report(what):
            progress.set_postfix_str(what) if what else progress.update()

        for title, group in groups.items():
            records[title] = [r for case in group for r in measure(*case, budget, report)]
            progress.clear()
            print(table(title, records[title], limits), end="\n\n", flush=True)
    common.save({**host, "records": records}, options.output)


if __name__ == "__main__":
    main()
