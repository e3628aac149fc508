"""Which kernel is the fastest for a matrix: a small model of their costs.

A product of a batch of B samples with K inputs and N outputs takes, by the model,

    call + B · (stored · weight(B) + (K + N) · move)

nanoseconds: a price for the call itself, for each weight that is stored, and for each number that
goes in or comes out, as a kernel packs the ones and lays out the others. That of a weight depends on
the batch, for weights are read once per batch. The dense kernel stores K · N weights. The numbers
below are of one host; `tune` measures those of another.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from ..report import Table
from ._layout import HEIGHTS

FORMATS = ("dense", *HEIGHTS)
# A sparse kernel must promise this much, as predictions of small products err that much.
MARGIN = 1.2
# And to save this many seconds: what a call costs varies by as much.
LEAST_GAIN = 15e-6
# What a batch is taken for where nothing is known of it.
BATCH = 32


class Price(NamedTuple):
    """What a kernel costs, in nanoseconds.

    Attributes:
        call: For each call.
        move: For each input and output of a sample.
        weight: For each weight that is stored, and sample, at each of the batch sizes of `Costs`.
    """

    call: float
    move: float
    weight: tuple[float, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Costs:
    """What the kernels cost on a host, in nanoseconds. Prints as a table.

    Attributes:
        batches: The batch sizes of the prices of weights, which are interpolated between them.
        prices: For each of `"dense"`, `"unstructured"`, `"4x1"` and `"16x1"`, its `Price`.
        convolution: For each weight and pixel of a dense convolution larger than 1×1.
        patches: For each number of the patches into which the sparse one copies its input.
        host: What was measured.
    """

    batches: tuple[int, ...]
    prices: dict[str, Price]
    convolution: float
    patches: float
    host: str

    def predict(self, kernel: str, batch: int, shape: tuple[int, int], stored: int) -> float:
        """Returns the seconds that a product takes.

        Args:
            kernel: `"dense"`, `"unstructured"`, `"4x1"` or `"16x1"`.
            batch: The number of samples.
            shape: `(in, out)`.
            stored: The number of weights that the kernel stores, padding included.

        Example:

        >>> import accel_tf as at
        >>> costs = at.sparse.costs()
        >>> dense = costs.predict("dense", 64, (2048, 2048), 2048 * 2048)
        >>> dense > costs.predict("unstructured", 64, (2048, 2048), 2048 * 2048 // 20)
        True
        """
        price = self.prices[kernel]
        weight = float(np.interp(np.log(max(batch, 1)), np.log(self.batches), price.weight))
        return 1e-9 * (price.call + batch * (stored * weight + sum(shape) * price.move))

    def convolve(self, pixels: int, kernel) -> float:
        """Returns the seconds of a dense convolution with a kernel of that shape, larger than 1×1."""
        return 1e-9 * (self.prices["dense"].call + pixels * math.prod(kernel) * self.convolution)

    def unroll(self, pixels: int, width: int) -> float:
        """Returns the seconds of copying `width` numbers for each pixel together, see `_conv.py`."""
        return 1e-9 * (self.prices["dense"].call + pixels * width * self.patches)

    @property
    def table(self) -> Table:
        """The prices of weights, and the sparsity from which sparse products are faster."""
        rows = [
            (f"{kernel}, ps per weight", *(1000 * weight for weight in price.weight))
            for kernel, price in self.prices.items()
        ]
        for kernel in [kernel for kernel in self.prices if kernel != "dense"]:
            breaks = (f"{self.break_even(batch, kernel):.0%}" for batch in self.batches)
            rows.append((f"{kernel}, break-even", *breaks))
        dense, sparse = self.prices["dense"], self.prices["unstructured"]
        return Table(
            ("", *(f"batch {batch}" for batch in self.batches)),
            rows,
            title=f"costs of {self.host}",
            note=(
                "ps per weight: and per sample.\nbreak-even: the sparsity from which the kernel beats "
                "the dense one on 1024 × 1024 weights.\n"
                f"Besides, dense and sparse: {dense.move:.2g} and {sparse.move:.2g} ns for a number in "
                f"or out, {dense.call / 1000:.2g} and {sparse.call / 1000:.2g} µs for a call."
            ),
        )

    def break_even(self, batch: int, kernel: str = "unstructured", size: int = 1024) -> float:
        """Returns the sparsity from which `kernel` beats the dense one on size×size weights."""
        shape = (size, size)
        dense = self.predict("dense", batch, shape, size**2)
        none = self.predict(kernel, batch, shape, 0)
        all_of_them = self.predict(kernel, batch, shape, size**2)
        return float(np.clip(1 - (dense - none) / (all_of_them - none), 0, 1))

    def __str__(self) -> str:
        return str(self.table)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


# Measured by `tune` on two cores of an AMD EPYC with AVX-512.
_costs = Costs(
    batches=(1, 8, 32, 128, 512),
    prices={
        "dense": Price(4000, 0.354, (0.0818, 0.0156, 0.0102, 0.0092, 0.0087)),
        "unstructured": Price(6650, 0.15, (0.173, 0.0423, 0.0174, 0.0153, 0.0145)),
        "4x1": Price(6650, 0.15, (0.139, 0.0352, 0.012, 0.0107, 0.0105)),
        "16x1": Price(6650, 0.15, (0.0889, 0.0287, 0.0116, 0.0106, 0.0106)),
    },
    convolution=0.0086,
    patches=0.455,
    host="an x86-64 machine with AVX-512, 2 threads (the built-in numbers)",
)


def costs() -> Costs:
    """Returns the costs by which formats are chosen: those of `tune`, or else built-in ones.

    Example:

    >>> import accel_tf as at
    >>> at.sparse.costs().break_even(batch=64) < 0.8
    True
    """
    return _costs


@dataclasses.dataclass(frozen=True)
class Choice:
    """A format, and what the model of costs says of it.

    Attributes:
        format: The one that is predicted to be the fastest.
        speedup: How many times as fast as the dense one the best sparse format is, as predicted.
    """

    format: str
    speedup: float


def choose(stored, shape, batch: int, formats=FORMATS, dense=None, extra: float = 0) -> Choice:
    """Chooses the fastest of `formats` for a matrix; "dense" if no other is faster by a margin.

    Args:
        stored: A function that tells how many weights a format stores.
        shape: `(in, out)`.
        batch: The number of samples.
        formats: Those that may be chosen.
        dense: The seconds of the dense layer; `None` for those of a dense product.
        extra: The seconds that a sparse layer takes besides the product.
    """
    if dense is None:
        dense = _costs.predict("dense", batch, shape, shape[0] * shape[1])
    seconds = {
        format: _costs.predict(format, batch, shape, stored(format)) + extra
        for format in formats
        if format != "dense"
    }
    best = min(seconds, key=seconds.__getitem__, default="dense")
    took = seconds.get(best, dense)
    speedup = dense / took
    if "dense" in formats and (speedup < MARGIN or dense - took < LEAST_GAIN):
        return Choice("dense", speedup)
    return Choice(best, speedup)


def use(costs: Costs) -> None:
    """Makes later choices of this process by `costs`."""
    global _costs
    _costs = costs
