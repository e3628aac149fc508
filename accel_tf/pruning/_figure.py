"""What the pictures of results share: matplotlib, which the library does not need for anything else."""


def axes_or_new(axes, width: float, height: float):
    """Returns `axes`, or those of a new figure of `width` × `height` inches if it is `None`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]
