"""The machine under the measurements: what it is, and what it reaches at most."""

import dataclasses
import os
import pathlib
import platform
import re

import keras
import numpy as np
import tensorflow as tf

import accel_tf
from accel_tf.benchmark._latency import measure_latency
from accel_tf.report import Table

# Those that decide which kernel runs, in x86's and in Arm's names.
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclasses.dataclass(frozen=True)
class Host:
    """The machine and the software that a measurement was made on.

    Attributes:
        cpu: The name of the processor.
        cores: The number of logical cores that this process may use.
        instruction_sets: The vector extensions of the processor that matter for kernels.
        gpus: The names of the GPUs that TensorFlow sees.
        memory: Bytes of main memory, 0 if unknown.
        system: Operating system and architecture.
        versions: Versions of Python and of the packages that compute.
    """

    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    gpus: tuple[str, ...]
    memory: int
    system: str
    versions: dict[str, str]

    @property
    def table(self) -> Table:
        """The host as a table of two columns."""
        rows = [
            ("processor", self.cpu),
            ("logical cores", f"{self.cores}"),
            ("instruction sets", ", ".join(self.instruction_sets) or "–"),
            ("GPU", ", ".join(self.gpus) or "none"),
            ("memory", f"{self.memory / 2**30:.1f} GiB" if self.memory else "–"),
            ("system", self.system),
            *self.versions.items(),
        ]
        return Table(("host", "value"), rows)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        devices = [f"{self.cpu}, {self.cores} cores", *self.gpus]
        return f"{'; '.join(devices)}; {self.system}; {versions}"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def host() -> Host:
    """Describes this machine and the versions in use, to stand beside every measurement.

    Returns:
        A `Host`; its `str` is one line, in a notebook it is a table.

    Example:

    >>> at.benchmark.host().cores >= 1
    True
    """
    info = _read("/proc/cpuinfo")
    flags = set((_field(info, "flags") or _field(info, "Features") or "").split())
    gpus = tf.config.list_physical_devices("GPU")
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    return Host(
        cpu=_field(info, "model name") or platform.processor() or platform.machine(),
        cores=_cores(),
        instruction_sets=tuple(flag for flag in _INSTRUCTION_SETS if flag in flags),
        gpus=tuple(
            tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
            for gpu in gpus
        ),
        memory=int(memory[1]) * 1024 if memory else 0,
        system=f"{platform.system()} {platform.machine()}",
        versions={
            "Python": platform.python_version(),
            "TensorFlow": tf.__version__,
            "Keras": keras.__version__,
            "NumPy": np.__version__,
            "accel_tf": accel_tf.__version__,
        },
    )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The two limits of a machine, and what they allow a computation to reach.

    Attributes:
        peak: The highest rate of arithmetic, in FLOP/s.
        bandwidth: The highest rate of memory traffic, in bytes/s.
    """

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """The arithmetic intensity, in FLOP/byte, above which arithmetic is the limit."""
        return self.peak / self.bandwidth

    def attainable(self, intensity):
        """The highest FLOP/s at an arithmetic intensity, `min(peak, bandwidth · intensity)`.

        Args:
            intensity: FLOPs per byte moved, a number or an array.

        Returns:
            FLOP/s, of the same shape.
        """
        return np.minimum(self.peak, self.bandwidth * np.asarray(intensity))

    def bound(self, flops: float, bytes_moved: float) -> float:
        """The least time in seconds for `flops` operations on `bytes_moved` bytes."""
        return max(flops / self.peak, bytes_moved / self.bandwidth)

    def __str__(self) -> str:
        return (
            f"{self.peak / 1e9:.1f} GFLOP/s, {self.bandwidth / 1e9:.1f} GB/s, "
            f"ridge at {self.ridge:.1f} FLOP/byte"
        )


def roofline(matrix: int = 1024, megabytes: int = 64, rounds: int = 20) -> Roofline:
    """Measures the two limits of this machine, as TensorFlow reaches them with all its threads.

    The peak of arithmetic is that of a float32 product of two large square matrices; the peak of
    memory traffic that of adding one array to another, both too large for the caches (two are read,
    one is written). The
    fastest of several runs counts, since a limit is what is sought. Both are lower bounds of the
    hardware's own limits, and the right ones to hold a model against.

    Args:
        matrix: The side of the matrices.
        megabytes: The size of each array, in 10⁶ bytes; take several times the last-level cache.
        rounds: The number of timed runs.

    Returns:
        A `Roofline`, in FLOP/s and bytes/s.

    Raises:
        ValueError: A size is below 1.

    Reference:
        Williams, Waterman and Patterson (2009), Roofline: an insightful visual performance model
        for multicore architectures, CACM 52(4). McCalpin (1995), STREAM.

    Example:

    >>> limits = at.benchmark.roofline(matrix=256, megabytes=8, rounds=5)
    >>> bool(limits.attainable(1e9) == limits.peak)
    True
    """
    if matrix < 1 or megabytes < 1:
        raise ValueError(f"roofline needs sizes of at least 1. Received: {matrix=}, {megabytes=}")
    square = tf.random.stateless_normal((matrix, matrix), seed=(0, 0))
    line = tf.random.stateless_normal((megabytes * 250_000,), seed=(0, 1))
    total = tf.Variable(tf.zeros_like(line))  # added in place: fresh memory would cost page faults

    # One element is brought back: enough to wait for all, on a GPU too.
    @tf.function
    def product():
        return tf.matmul(square, square)[0, 0]

    @tf.function
    def add():
        return total.assign_add(line)[0]

    times = measure_latency(
        {"product": lambda _: product(), "sum": lambda _: add()},
        None,
        rounds=rounds,
        warmup=2,
        max_seconds=30,
        verbose=0,
    )
    return Roofline(
        peak=2 * matrix**3 / min(times["product"].samples),
        bandwidth=3 * 4 * int(line.shape[0]) / min(times["sum"].samples),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:  # not Linux
        return ""


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""
