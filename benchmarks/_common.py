"""What the benchmarks share: options, threads, turns, and the file of raw times.

Import it before TensorFlow: it sets the environment that TensorFlow and MKL read when they load.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# MKL's threads go to sleep as soon as a product is done. By default they would spin for 200 ms, and
# take the cores from whoever has the next turn.
os.environ["KMP_BLOCKTIME"] = "0"

import numpy as np
import tensorflow as tf

import accel_tf as at


def options(doc: str, name: str, threads: int = 2, **flags: str) -> argparse.Namespace:
    """Reads the command line, and gives TensorFlow its number of threads.

    `flags` are more options, by name, each with its line of help.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a first look, in seconds")
    size.add_argument("--full", action="store_true", help="every case, with more rounds")
    parser.add_argument("--threads", type=int, default=threads, help=f"default: {threads}")
    results = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--output", type=Path, default=results, help="the JSON file of raw times")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    chosen = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # many functions are traced here, each of them once
    tf.config.threading.set_intra_op_parallelism_threads(chosen.threads)
    return chosen


def head(threads: int) -> tuple[dict, "at.benchmark.Roofline"]:
    """Prints the machine; returns it for the file of results, and its roofline."""
    machine, limits = at.benchmark.host(), at.benchmark.roofline()
    print(machine.table)
    print(
        f"\nkernels: {at.sparse.isa()}; {threads} thread{'s' * (threads > 1)}; "
        f"last-level cache: {last_level_cache() / 2**20:.0f} MiB; roofline: {limits}\n",
        flush=True,
    )
    return {
        "host": dataclasses.asdict(machine),
        "isa": at.sparse.isa(),
        "threads": threads,
        "last_level_cache": last_level_cache(),
        "roofline": dataclasses.asdict(limits),
    }, limits


def save(result: dict, path: Path) -> None:
    write(result, path)
    print(f"raw times: {path}")


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def last_level_cache() -> int:
    """The size of the largest cache in bytes; 32 MiB where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().rstrip("K\n")) * 1024 for s in sizes), default=32 * 2**20)


def turns(candidates: dict, *, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Times the candidates in interleaved rounds: seconds per call, of each round."""

    def without_result(call):
        def run(_):
            call()  # measure_latency would copy the result; on the CPU it is there already

        return run

    times = at.measure_latency(
        {name: without_result(call) for name, call in candidates.items()},
        None,
        rounds=rounds,
        warmup=1,
        max_seconds=seconds,
        verbose=0,
    )
    return {name: list(latency.samples) for name, latency in times.items()}


def median(samples) -> float:
    return float(np.median(samples))


def spread(samples) -> str:
    """The median and the quartiles in a unit that suits them."""
    low, middle, high = np.percentile(samples, (25, 50, 75))
    unit, size = ("ms", 1e3) if middle >= 0.9995e-3 else ("µs", 1e6)
    return f"{middle * size:.3g} ({low * size:.3g}–{high * size:.3g}) {unit}"
