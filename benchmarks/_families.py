"""The families of keras.applications, for the benchmarks that try a verb on each with its peer."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np

SHAPE, CLASSES, BATCH = (96, 96, 3), 10, 4  # InceptionV3 wants 75 pixels, the others less
# Where the smallest member is not the one that comes first when sorted by name and number.
SMALLEST = {
    "convnext": "ConvNeXtTiny",
    "mobilenet_v3": "MobileNetV3Small",
    "nasnet": "NASNetMobile",
}
QUICK = ("mobilenet", "mobilenet_v2", "vgg16")


def families(applications) -> dict[str, str]:
    """Returns the smallest member of each family, a module of `applications` that builds models."""

    def by_number(name):
        return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]

    members: dict[str, list[str]] = {}
    for name, build in vars(applications).items():
        if name[0].isupper() and callable(build):
            members.setdefault(build.__module__.rpartition(".")[2], []).append(name)
    return {
        family: SMALLEST.get(family, min(members[family], key=by_number))
        for family in sorted(members)
    }


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (BATCH, *SHAPE)).astype("float32")
    return x, rng.integers(0, CLASSES, BATCH)


def reason(error: Exception) -> str:
    """Returns the first sentence of an error, and the class that TFMOT names at its end."""
    text = " ".join(str(error).split())
    passed = re.search(r"You passed: <class '(?:.*\.)?(\w+)'>", text)
    first = f"{type(error).__name__}: {re.split(r'(?<=[.:!?]) ', text)[0]}"
    return f"{first} You passed: {passed[1]}" if passed else first


def worker() -> ProcessPoolExecutor:
    """Returns a process that gives its memory back after a few models."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=4)


def start(process: ProcessPoolExecutor, run, members: dict, family: str, absent: str):
    """Lets a process run a family's member; returns a function that waits for the outcome."""
    if family not in members:
        return lambda: {"absent": absent}
    return process.submit(run, members[family]).result
