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
