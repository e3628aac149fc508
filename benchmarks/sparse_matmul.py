"""Compares the sparse product of accel_tf with dense and sparse peers, beside the host's roofline.

    .venv/bin/python benchmarks/sparse_matmul.py            # all of it, some minutes
    .venv/bin/python benchmarks/sparse_matmul.py --quick    # a few sizes, half a minute

All candidates run in this process and take turns (so that a change of clock speed or a busy neighbour
meets them all), and are compared by their median. Each multiplies the same activations by the same
2048 × 2048 weights and is checked against the dense product first.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import scipy.sparse
import tensorflow as tf
from tensorflow.python.ops.linalg.sparse import sparse_csr_matrix_ops
from tqdm import tqdm

import accel_tf as at
from accel_tf.report import Table

SIZE = 2048
RESULTS = Path(__file__).parent / "results" / "sparse_matmul.json"
OURS, DENSE = "accel_tf", "tf.matmul"


def candidates(w: np.ndarray, x: np.ndarray) -> dict:
    """Returns, by name, functions that compute x · W, or its transpose where that is natural.

    The sparse peers multiply from the left and want the activations transposed. They get them so, for
    free; accel_tf and tf.matmul take them as Keras has them, one row per sample.
    """
    matrix = at.SparseMatrix.from_dense(w)
    x_tf, w_tf = tf.constant(x), tf.constant(w)
    x_t = np.ascontiguousarray(x.T)
    x_t_tf = tf.constant(x_t)
    coo = tf.sparse.from_dense(w.T)
    csr = sparse_csr_matrix_ops.dense_to_csr_sparse_matrix(
        tf.constant(np.ascontiguousarray(w.T)), tf.where(w.T != 0)
    )
    scipy_csr = scipy.sparse.csr_matrix(w.T)
    return {
        OURS: lambda: at.sparse_matmul(x_tf, matrix),
        DENSE: lambda: tf.matmul(x_tf, w_tf),
        "tf.sparse": lambda: (
            tf.transpose(tf.sparse.sparse_dense_matmul(coo, x_t_tf))
            if x.shape[0] == 1
            else tf.sparse.sparse_dense_matmul(coo, x_t_tf)
        ),
        "CSRSparseMatrix": lambda: sparse_csr_matrix_ops.sparse_matrix_mat_mul(csr, x_t_tf),
        "SciPy": lambda: scipy_csr @ x_t,
    }


def check(functions: dict, w: np.ndarray, x: np.ndarray) -> None:
    """Raises unless every candidate computes the product."""
    want = x.astype(np.float64) @ w
    scale = np.abs(x).astype(np.float64) @ np.abs(w)
    for name, function in functions.items():
        got = np.asarray(function())
        got = got if got.shape == want.shape else got.T
        error = np.max(np.abs(got - want) / np.maximum(scale, 1e-30))
        assert error < 1e-5, f"{name} is wrong by {error:.1e} of the sum of magnitudes"


def measure(sparsities, batches, seconds: float, rounds: int) -> list[dict]:
    """Returns one record for each sparsity and batch size, with the raw times of each candidate."""
    rng = np.random.default_rng(0)
    records = []
    with tqdm(total=len(sparsities) * len(batches), unit="size", file=sys.stderr) as progress:
        for sparsity in sparsities:
            w = rng.normal(size=(SIZE, SIZE)).astype(np.float32)
            w *= rng.random(w.shape) >= sparsity
            nnz = int(np.count_nonzero(w))
            for batch in batches:
                progress.set_postfix_str(f"sparsity {sparsity:.0%}, batch {batch}")
                x = rng.normal(size=(batch, SIZE)).astype(np.float32)
                functions = candidates(w, x)
                check(functions, w, x)
                times = at.benchmark.measure_latency(
                    {name: lambda _, f=f: f() for name, f in functions.items()},
                    None,
                    rounds=rounds,
                    warmup=1,
                    max_seconds=seconds,
                    verbose=0,
                )
                records.append(
                    {
                        "sparsity": sparsity,
                        "batch": batch,
                        "nnz": nnz,
                        "flops": 2 * nnz * batch,
                        "bytes": 8 * nnz + 4 * 2 * batch * SIZE,
                        "seconds": {name: list(t.samples) for name, t in times.items()},
                    }
                )
                progress.update()
    return records


def tables(records: list[dict], limits) -> list[Table]:
    """Two tables: the times with their spread, and the ratios with the roofline."""
    names = list(records[0]["seconds"])
    times, ratios = [], []
    for r in records:
        label = [f"{r['sparsity']:.0%}", str(r["batch"])]
        low, middle, high = (
            {n: np.percentile(t, q) * 1e3 for n, t in r["seconds"].items()} for q in (25, 50, 75)
        )
        times.append(label + [f"{middle[n]:.3g} ({low[n]:.3g}–{high[n]:.3g})" for n in names])
        ours = middle[OURS] / 1e3
        bound = limits.bound(r["flops"], r["bytes"])
        ratios.append(
            label
            + [f"{middle[n] / middle[OURS]:.2f}" for n in names if n != OURS]
            + [
                f"{middle[DENSE] / middle[OURS] * r['nnz'] / SIZE**2:.2f}",
                f"{r['flops'] / ours / 1e9:.1f}",
                f"{r['bytes'] / ours / 1e9:.1f}",
                f"{bound / ours:.0%}",
            ]
        )
    return [
        Table(
            ["sparsity", "batch", *names],
            times,
            title="Time per call in ms: median (quartiles)",
        ),
        Table(
            ["sparsity", "batch", *(f"vs {n}" for n in names if n != OURS),
             "efficiency", "GFLOP/s", "GB/s", "of roofline"],
            ratios,
            title=f"{OURS}: how many times faster, and how near to what the host can do",
            note="efficiency: speed-up over tf.matmul × density; 1 means that no zero costs anything.\n"
            "of roofline: max(FLOPs / peak, bytes / memory bandwidth) / time; more than 100 % where the\n"
            "matrix stays in a cache that is faster than memory.",
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few sizes and rounds only")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file of raw times")
    options = parser.parse_args()

    sparsities = (0.5, 0.9) if options.quick else (0.5, 0.8, 0.9, 0.95, 0.98)
    batches = (1, 128) if options.quick else (1, 32, 128, 512)
    seconds, rounds = (0.3, 50) if options.quick else (2, 200)

    machine, limits = at.benchmark.host(), at.benchmark.roofline()
    print(machine.table)
    print(f"\nkernels: {at.sparse.isa()}; SciPy {scipy.__version__}; roofline: {limits}\n")
    records = measure(sparsities, batches, seconds, rounds)
    for table in tables(records, limits):
        print(table, end="\n\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "host": dataclasses.asdict(machine),
        "isa": at.sparse.isa(),
        "roofline": dataclasses.asdict(limits),
        "records": records,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"raw times: {options.output}")


if __name__ == "__main__":
    main()
