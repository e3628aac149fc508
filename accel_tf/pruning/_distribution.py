"""How the kernels of a model share its active weights."""

import math

import numpy as np

DISTRIBUTIONS = ("uniform", "erdos_renyi", "erdos_renyi_kernel")


def active_weights(shapes, sparsity: float, distribution: str) -> list[int]:
    """Returns how many elements of each kernel are active: together round(n · (1 − sparsity)).

    Args:
        shapes: The shapes of the kernels, inputs before outputs, spatial dimensions before those.
        sparsity: The fraction of zeros in all of them together.
        distribution: `"uniform"`, `"erdos_renyi"` or `"erdos_renyi_kernel"`; see `SET`.

    Returns:
        One `int` for each shape, at least 1 and at most the kernel's size.

    Example:

    >>> active_weights([(40, 256), (256, 256), (256, 10)], 0.95, "erdos_renyi")
    [1080, 1867, 970]

    Reference: Evci et al. (2020), section 3; what a kernel cannot take, as it is dense already, goes
    to the others.
    """
    sizes = np.array([math.prod(shape) for shape in shapes])
    total = max(round(float(sizes.sum()) * (1 - sparsity)), len(shapes))
    if distribution == "uniform":
        share = sizes
    else:  # size · (sum of dimensions) / (their product)
        counted = [s if distribution == "erdos_renyi_kernel" else s[-2:] for s in shapes]
        share = sizes * np.array([sum(s) / math.prod(s) for s in counted])
    wanted, dense = sizes * 0.0, np.zeros(len(sizes), bool)
    while not dense.all():
        wanted[~dense] = share[~dense] * ((total - sizes[dense].sum()) / share[~dense].sum())
        too_many = (wanted > sizes) & ~dense
        if not too_many.any():
            break
        wanted[too_many], dense = sizes[too_many], dense | too_many
    # Whole numbers, at least one each, that add up: those that are furthest off give or take one.
    kept = np.clip(np.round(wanted).astype(int), 1, sizes)
    while (missing := total - kept.sum()) != 0:
        change = int(np.sign(missing))
        possible = (kept + change >= 1) & (kept + change <= sizes)
        kept[np.argmax(np.where(possible, change * (wanted - kept), -np.inf))] += change
    return kept.tolist()
