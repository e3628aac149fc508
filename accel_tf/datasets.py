"""Small, real data sets that need no network: the ones that the book and the tests use.

Each loader returns `(x_train, y_train), (x_test, y_test)`, as `keras.datasets` does, and gives the
same arrays on every call and every machine.
"""

import random

import numpy as np

_Split = tuple[np.ndarray, np.ndarray]


def digits() -> tuple[_Split, _Split]:
    """Loads 1,797 scanned handwritten digits of 8×8 pixels, shipped with scikit-learn.

    Returns:
        `(x_train, y_train), (x_test, y_test)` with 1,437 and 360 images. `x` is float32 of shape
        `(n, 8, 8, 1)` in [0, 1]; `y` is int32 of shape `(n,)`, 0 to 9. The split is stratified:
        each class has the same share in both parts.

    Raises:
        ImportError: scikit-learn is not installed.

    Reference:
        Alpaydin and Kaynak (1998), Optical recognition of handwritten digits, UCI Machine Learning
        Repository, https://doi.org/10.24432/C50P49 (scikit-learn ships its test part).

    Example:

    >>> (x_train, y_train), (x_test, y_test) = at.datasets.digits()
    >>> x_train.shape, x_test.shape
    ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise _missing("digits", "scikit-learn") from error

    bunch = load_digits()
    x = (bunch.images[..., np.newaxis] / 16).astype(np.float32)
    y = bunch.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=360, stratify=y, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def mnist1d(samples: int = 4000, test_samples: int = 1000, seed: int = 42) -> tuple[_Split, _Split]:
    """Generates MNIST-1D: ten digit-like curves, shifted, scaled, sheared and noisy.

    It is small enough to train on in seconds, yet separates model families as MNIST does not. The
    defaults make the set of the paper, whose test accuracies are 32 % for logistic regression,
    68 % for a multilayer perceptron, 94 % for a convolutional network and 91 % for a GRU.

    Args:
        samples: Number of training samples, at least 1.
        test_samples: Number of test samples, at least 1.
        seed: Seed of the generator. NumPy's and Python's global generators are left as they were.

    Returns:
        `(x_train, y_train), (x_test, y_test)`. `x` is float32 of shape `(n, 40, 1)`, standardised
        over the whole set; `y` is int32 of shape `(n,)`, 0 to 9.

    Raises:
        ImportError: The package `mnist1d` is not installed.
        ValueError: A number of samples is below 1.

    Reference:
        Greydanus and Kobak (2020), Scaling down deep learning with MNIST-1D, arXiv:2011.14439.

    Example:

    >>> (x_train, y_train), (x_test, y_test) = at.datasets.mnist1d(samples=80, test_samples=20)
    >>> x_train.shape, y_test.shape
    ((80, 40, 1), (20,))
    """
    if samples < 1 or test_samples < 1:
        raise ValueError(
            "mnist1d needs at least one training and one test sample. "
            f"Received: samples={samples}, test_samples={test_samples}"
        )
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise _missing("mnist1d", "mnist1d") from error

    options = get_dataset_args()
    options.seed = seed
    options.num_samples = -(-(samples + test_samples) // 10) * 10  # the same number of each class
    # The package seeds the global generators; a loader must not change the caller's random numbers.
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        data = make_dataset(options)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    x = np.concatenate([data["x"], data["x_test"]])[..., np.newaxis].astype(np.float32)
    y = np.concatenate([data["y"], data["y_test"]]).astype(np.int32)
    test = slice(samples, samples + test_samples)
    return (x[:samples], y[:samples]), (x[test], y[test])


def _missing(loader: str, package: str) -> ImportError:
    return ImportError(
        f"datasets.{loader}() needs the package {package}, which is not installed. "
        'Install it with: pip install "accel-tf[data]"'
    )
