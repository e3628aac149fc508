"""Which kernel is the fastest for a matrix: a small model of their costs, and its measurement.

A product of a batch of B samples with K inputs and N outputs takes, by the model,

    call + B · (stored · c(kernel, B) + (K + N) · move)

nanoseconds: `stored` weights at a price that depends on the kernel and on the batch, for weights are
read once per batch; inputs to be packed and outputs to be written; and the call itself. The dense
kernel has no `move`, and stores K · N weights. The numbers below are of one host; `tune` measures
those of another.
"""

import dataclasses
import math

import numpy as np

from ..report import Table
from ._layout import HEIGHTS

FORMATS = ("dense", *HEIGHTS)
# A sparse kernel must promise this much, as predictions err by some percent.
MARGIN = 1.1
# What a batch is taken for where nothing is known of it.
BATCH = 32


@dataclasses.dataclass(frozen=True, repr=False)
class Costs:
    """What the kernels cost on a host, in nanoseconds. Prints as a table.

    Attributes:
        batches: The batch sizes at which the weights were priced; prices between them are
            interpolated.
        per_weight: For each kernel, the price of a stored weight and sample at each batch size.
        convolution: The same for a dense convolution of large images.
        move: The price of an input or output of a sample.
        patches: The price of an element of the patches into which a k×k convolution is unrolled.
        call: The price of a call.
        host: What was measured, and with how many threads.
    """

    batches: tuple[int, ...]
    per_weight: dict[str, tuple[float, ...]]
    convolution: float
    move: float
    patches: float
    call: float
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
        prices = np.log(self.per_weight[kernel])
        price = math.exp(np.interp(math.log(max(batch, 1)), np.log(self.batches), prices))
        moved = 0 if kernel == "dense" else sum(shape) * self.move
        return 1e-9 * (self.call + batch * (stored * price + moved))

    def convolve(self, pixels: int, kernel) -> float:
        """Returns the seconds of a dense convolution with a kernel of that shape, larger than 1×1."""
        return 1e-9 * (self.call + pixels * math.prod(kernel) * self.convolution)

    def unroll(self, pixels: int, width: int) -> float:
        """Returns the seconds of copying `width` numbers for each pixel together, see `_conv.py`."""
        return 1e-9 * (self.call + pixels * width * self.patches)

    @property
    def table(self) -> Table:
        """Prices in picoseconds, and the sparsity from which the unstructured kernel wins."""
        rows = [
            (kernel, *(1000 * price for price in prices))
            for kernel, prices in self.per_weight.items()
        ]
        rows.append(("break-even", *(f"{self.break_even(batch):.0%}" for batch in self.batches)))
        return Table(
            ("ps per weight and sample", *(f"batch {batch}" for batch in self.batches)),
            rows,
            title=f"costs of {self.host}",
            note=(
                "break-even: the sparsity of a 1024 × 1024 matrix from which unstructured sparse "
                f"products beat dense ones. Besides: {self.move:.2g} ns per input and output, "
                f"{self.call / 1000:.2g} µs per call."
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


# Two cores of an AVX2 x86-64 machine at about 2.5 GHz, measured by `tune`.
_costs = Costs(
    batches=(1, 8, 64),
    per_weight={
        "dense": (0.1, 0.02, 0.01),
        "unstructured": (0.25, 0.05, 0.018),
        "4x1": (0.2, 0.04, 0.012),
        "16x1": (0.15, 0.035, 0.012),
    },
    convolution=0.012,
    move=0.3,
    patches=0.6,
    call=5000.0,
    host="an x86-64 machine with AVX2, 2 threads (the built-in numbers)",
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
    speedup = dense / seconds.get(best, dense)
    if "dense" in formats and speedup < MARGIN:
        return Choice("dense", speedup)
    return Choice(best, speedup)


def use(costs: Costs) -> None:
    """Makes later choices of this process by `costs`."""
    global _costs
    _costs = costs
