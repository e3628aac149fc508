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


def compare(names, ours, here: dict, theirs, there: dict):
    """Yields a row for each family: what becomes of its member with us and with the peer.

    Both run at once, each in a process of its own, which gives its memory back.

    Args:
        names: The families.
        ours, theirs: Functions of a member's name, which return a dictionary.
        here, there: The members of Keras 3 and of tf_keras, by family.

    Yields:
        Dictionaries with `family`, `member`, `ours` and `tfmot`.
    """
    for family in names:
        with worker() as one, worker() as other:
            outcome = _start(one, ours, here, family, "not in Keras 3")
            peer = _start(other, theirs, there, family, "not in tf_keras")
            member = here.get(family, there.get(family))
            yield {"family": family, "member": member, "ours": outcome(), "tfmot": peer()}


def worker() -> ProcessPoolExecutor:
    """Returns a new process to run functions in."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _start(process, run, members, family, absent):
    if family not in members:
        return lambda: {"absent": absent}
    return process.submit(run, members[family]).result
