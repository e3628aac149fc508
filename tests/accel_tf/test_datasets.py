"""accel_tf.datasets: shapes, ranges, determinism, and no trace left in the caller's generators."""

import random
import sys

import keras
import numpy as np
import pytest

from accel_tf import datasets


def test_digits_are_stratified_and_in_range(digits):
    (x_train, y_train), (x_test, y_test) = digits
    assert x_train.shape == (1437, 8, 8, 1) and x_test.shape == (360, 8, 8, 1)
    assert y_train.shape == (1437,) and y_test.shape == (360,)
    assert x_train.dtype == x_test.dtype == np.float32
    assert y_train.dtype == y_test.dtype == np.int32
    for x in (x_train, x_test):
        assert x.min() == 0 and x.max() == 1
    share = np.bincount(y_train) / 1437 - np.bincount(y_test) / 360
    assert np.abs(share).max() < 0.003  # one image of a class of the test part


def test_digits_parts_make_up_the_whole_set(digits):
    from sklearn.datasets import load_digits

    (x_train, _), (x_test, _) = digits
    rows = np.concatenate([x_train, x_test]).reshape(1797, 64) * 16
    np.testing.assert_array_equal(
        rows[np.lexsort(rows.T)], (data := load_digits().data)[np.lexsort(data.T)]
    )


@pytest.mark.parametrize("load", [datasets.digits, lambda: datasets.mnist1d(40, 20)])
def test_loading_twice_gives_the_same_arrays(load):
    for first, second in zip(load(), load(), strict=True):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


def test_mnist1d_default_is_the_published_set():
    from mnist1d.data import get_dataset_args, make_dataset

    (x_train, y_train), (x_test, y_test) = datasets.mnist1d()
    published = make_dataset(get_dataset_args())
    assert x_train.shape == (4000, 40, 1) and x_test.shape == (1000, 40, 1)
    assert x_train.dtype == np.float32 and y_train.dtype == np.int32
    np.testing.assert_array_equal(x_train[..., 0], published["x"].astype(np.float32))
    np.testing.assert_array_equal(x_test[..., 0], published["x_test"].astype(np.float32))
    np.testing.assert_array_equal(y_train, published["y"])
    np.testing.assert_array_equal(y_test, published["y_test"])


@pytest.mark.parametrize(("samples", "test_samples"), [(1, 1), (13, 4), (64, 16)])
def test_mnist1d_has_the_sizes_asked_for(samples, test_samples):
    (x_train, y_train), (x_test, y_test) = datasets.mnist1d(samples, test_samples)
    assert x_train.shape == (samples, 40, 1) and y_train.shape == (samples,)
    assert x_test.shape == (test_samples, 40, 1) and y_test.shape == (test_samples,)


def test_mnist1d_seed_changes_the_data():
    assert not np.array_equal(
        datasets.mnist1d(40, 10, seed=1)[0][0], datasets.mnist1d(40, 10, seed=2)[0][0]
    )


def test_mnist1d_leaves_global_generators_alone():
    np.random.seed(5)
    random.seed(5)
    expected = np.random.rand(), random.random()
    np.random.seed(5)
    random.seed(5)
    datasets.mnist1d(20, 10)
    assert (np.random.rand(), random.random()) == expected


@pytest.mark.parametrize("sizes", [(0, 10), (10, 0), (-1, 10)])
def test_mnist1d_rejects_empty_sets(sizes):
    with pytest.raises(ValueError, match=rf"Received: samples={sizes[0]}, test_samples={sizes[1]}"):
        datasets.mnist1d(*sizes)


@pytest.mark.parametrize(
    ("load", "module"), [(datasets.digits, "sklearn.datasets"), (datasets.mnist1d, "mnist1d.data")]
)
def test_a_missing_package_says_how_to_install_it(load, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import an ImportError
    with pytest.raises(ImportError, match=r'pip install "accel-tf\[data\]"'):
        load()


def test_trained_cnn_is_accurate_and_each_copy_is_fresh(trained_cnn, digits):
    model = trained_cnn()
    _, accuracy = model.evaluate(*digits[1], verbose=0)
    assert accuracy > 0.96
    assert any(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)
    model.layers[0].kernel.assign(model.layers[0].kernel * 0)
    assert np.any(trained_cnn().layers[0].kernel.numpy())


# Docstrings of installed packages


@pytest.fixture(scope="module")
def texts():
    return datasets.docstrings()


def test_docstrings_are_many_unique_and_labelled(texts):
    (x_train, y_train), (x_test, y_test) = texts
    x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
    assert len(x) > 7000 and len(set(x)) == len(x)
    assert all(isinstance(text, str) and len(text.split()) >= 8 for text in x)
    assert y.dtype == np.int32 and np.bincount(y).min() > 800
    for label in range(5):
        assert np.mean(y_test[y_test == label].size / np.sum(y == label)) == pytest.approx(
            0.2, abs=1e-3
        )
    assert not any("Parameters ----" in text or ">>>" in text or "Args:" in text for text in x)
    again = datasets.docstrings()
    np.testing.assert_array_equal(again[0][0], x_train)
    np.testing.assert_array_equal(again[1][1], y_test)


def test_docstrings_tell_their_package(texts):
    """Words alone do, so the labels fit the texts, and are no gift."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB

    (x_train, y_train), (x_test, y_test) = texts
    words = TfidfVectorizer(min_df=2)
    model = MultinomialNB(alpha=0.1).fit(words.fit_transform(x_train), y_train)
    assert 0.6 < model.score(words.transform(x_test), y_test) < 0.95


LONG = "one two three four five six seven eight"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of files, given as source by path."""

    def make(name, **files):
        for path, source in {"__init__": "", **files}.items():
            file = tmp_path / name / f"{path.replace('__in__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return make


def function(docstring, kind="def f():"):
    return f"{kind}\n    {docstring!r}\n"


def test_docstrings_are_the_prose_before_everything_else(package):
    endings = (
        "Args:\n    x: y", "Parameters\n----------\nx : int", ">>> f(1)", "```python", "Returns:\n",
        ":param x: y", ".. note:: z",
    )  # fmt: skip
    sources = {f"m{i}": function(f"{LONG} {i}.\n\n{end}\n") for i, end in enumerate(endings)}
    sources["a_class"] = function(f"{LONG}\n  of a class", "class C:")
    sources["coroutine"] = function(f"{LONG} async", "async def f():")
    sources["short"] = function("one two three four five six seven")
    sources["twice"] = function(f"{LONG} async")
    sources["broken"] = "def f(:"
    sources["test_x"] = sources["x_test"] = sources["tests__in__x"] = function(f"{LONG} in a test")
    sources["both"] = function(f"{LONG} in both")
    name = package("first_of_two", **sources)
    other = package(
        "second_of_two", a=function(f"{LONG} o"), b=function(f"{LONG} p"), c=sources["both"]
    )
    (x_train, y_train), (x_test, y_test) = datasets.docstrings([name, other])
    found = dict(zip([*x_train, *x_test], [*y_train, *y_test], strict=True))
    expected = {f"{LONG} {i}.": 0 for i in range(len(endings))}
    expected |= {f"{LONG} of a class": 0, f"{LONG} async": 0, f"{LONG} o": 1, f"{LONG} p": 1}
    assert found == expected
    assert sorted(y_test) == [0, 1] and name not in sys.modules


def test_docstrings_need_packages_with_prose(package):
    silent = package("a_silent_package")
    with pytest.raises(ValueError, match="'a_silent_package' has fewer than two docstrings"):
        datasets.docstrings(["numpy", silent])
    for missing in ("no_such_package", "ast", "numpy.no_such_part"):
        with pytest.raises(ImportError, match=f"'{missing}', which is not installed, or is not a"):
            datasets.docstrings(["numpy", missing])
    for packages in ("numpy", ["numpy"], ["numpy", "numpy"], []):
        with pytest.raises(ValueError, match="two packages or more, each once"):
            datasets.docstrings(packages)
