"""Small, real data sets that need no network: the ones that the book and the tests use.

Each loader returns `(x_train, y_train), (x_test, y_test)`, as `keras.datasets` does, and gives the
same arrays on every call and every machine; `docstrings`, on every machine with the same packages.
"""

import ast
import functools
import importlib.util
import pathlib
import random
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_Split = tuple[np.ndarray, np.ndarray]

# What ends the prose of a docstring: an underlined title of NumPy's style, a heading of Google's, a
# field or directive of Sphinx's, an example.
_NO_PROSE = re.compile(
    r"^[ \t]*(\S.*\n[ \t]*[-=~]{3,}\s*$"
    r"|(Args|Arguments|Attributes|Call arguments|Examples?|Input shape|Notes?|Output shape|Parameters"
    r"|Raises|References?|Returns?|Usage|Yields)\s*:"
    r"|:\w|\.\. |>>>|```)",
    re.MULTILINE,
)
_FEWEST_WORDS = 8


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


def docstrings(
    packages: Sequence[str] = ("keras", "matplotlib", "numpy", "scipy", "sklearn"),
) -> tuple[_Split, _Split]:
    """Collects real English prose to classify: what installed packages say of their own functions.

    Each text is the opening prose of the docstring of a function or class, up to the first list of
    arguments, heading or example, in at least 8 words; the label says which package it is from. So
    it is the subject that gives a package away, more than its style. The packages are read, not
    imported; their tests are left out, and so is what several of them say in the same words. With the
    default ones there are about 10,000 texts, of 20 words in the median; reading takes some seconds
    the first time. Releases differ: give the versions with what you measure.

    Args:
        packages: Names of two or more installed packages, in the order of the labels.

    Returns:
        `(x_train, y_train), (x_test, y_test)`, shuffled; a fifth of each package's texts are for the
        test. `x` is an array of `str` (dtype object) of shape `(n,)`, as
        `keras.layers.TextVectorization` takes it; `y` is int32 of shape `(n,)`, an index into
        `packages`.

    Raises:
        ImportError: A package is not installed.
        ValueError: There are fewer than two packages, one comes twice, or one has no such texts.

    Example:

    >>> (x_train, y_train), (x_test, y_test) = at.datasets.docstrings(("keras", "numpy"))
    >>> sorted(set(y_test.tolist())), min(len(text.split()) for text in x_train)
    ([0, 1], 8)
    """
    packages = (packages,) if isinstance(packages, str) else tuple(packages)
    if len(packages) < 2 or len(set(packages)) < len(packages):
        raise ValueError(
            f"docstrings needs two packages or more, each once. Received: packages={packages!r}"
        )
    texts = [_prose_of(package) for package in packages]
    seen = Counter(text for of_one in texts for text in of_one)
    shuffler = random.Random(0)
    parts = ([], [])  # to train and to test, as pairs of text and label
    for label, (package, of_one) in enumerate(zip(packages, texts, strict=True)):
        own = [(text, label) for text in of_one if seen[text] == 1]
        if len(own) < 2:
            raise ValueError(
                f"The package {package!r} has fewer than two docstrings with {_FEWEST_WORDS} words of "
                "prose of its own."
            )
        shuffler.shuffle(own)
        of_test = max(len(own) // 5, 1)
        parts[0].extend(own[of_test:])
        parts[1].extend(own[:of_test])
    for part in parts:
        shuffler.shuffle(part)
    return tuple(
        (np.array([text for text, _ in part], object), np.array([y for _, y in part], np.int32))
        for part in parts
    )


@functools.cache
def _prose_of(package: str) -> tuple[str, ...]:
    """The prose of each docstring in a package's files, each text once, in the order of its files."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a part of a package that is not there
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"docstrings needs the package {package!r}, which is not installed, or is not a package. "
            f"Install it, or leave it out: docstrings(packages=…)."
        )
    found = {}
    for root in map(pathlib.Path, spec.submodule_search_locations):
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if any(part.startswith("test") for part in inside.parts) or path.stem.endswith("_test"):
                continue
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # a template, or for another Python
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    prose = _NO_PROSE.split(ast.get_docstring(node) or "", maxsplit=1)[0].split()
                    if len(prose) >= _FEWEST_WORDS:
                        found[" ".join(prose)] = None
    return tuple(found)


def _missing(loader: str, package: str) -> ImportError:
    return ImportError(
        f"datasets.{loader}() needs the package {package}, which is not installed. "
        'Install it with: pip install "accel-tf[data]"'
    )
