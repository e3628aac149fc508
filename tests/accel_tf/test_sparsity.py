"""The picture of `sparsity`; what the table counts is tested where models are pruned."""

import matplotlib

matplotlib.use("Agg")

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest

import accel_tf as at


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def mlp():
    model = keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(40, name="wide"),
            keras.layers.Dense(1, name="thin"),
        ]
    )
    at.prune(model, at.ConstantSparsity(0.75), include="wide")
    return model


def bars(axes):
    """The blue ones, from top to bottom: (length, thickness)."""
    blue = axes.containers[1]
    return [(bar.get_width(), bar.get_height()) for bar in blue]


def labels(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_a_bar_is_as_long_as_its_kernel_is_sparse_and_thicker_with_more_weights():
    axes = at.sparsity(mlp()).plot()
    (wide, thick), (thin, slim) = bars(axes)
    assert (wide, thin) == (0.75, 0.0)
    # 400 weights and 40; beside a least thickness, as their roots.
    assert (slim - 0.15) / (thick - 0.15) == pytest.approx(np.sqrt(40 / 400))
    assert labels(axes) == ["wide", "thin"]
    assert {"400", "40"} <= {text.get_text() for text in axes.texts}
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is at the top
    (line,) = axes.lines
    assert list(line.get_xdata()) == [at.sparsity(mlp()).total] * 2


def test_it_draws_where_it_is_told_to():
    _, given = plt.subplots()
    assert at.sparsity(mlp()).plot(given) is given
    assert len(plt.get_fignums()) == 1


def test_kernels_of_one_layer_are_told_apart():
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(2, name="lstm")])
    names = ["lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"]
    assert labels(at.sparsity(model).plot()) == names


def test_names_of_many_layers_do_not_overlap():
    layers = [keras.layers.Dense(4, name=f"block_{i}_dense") for i in range(120)]
    axes = at.sparsity(keras.Sequential([keras.Input((4,)), *layers])).plot()
    axes.figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    assert len(boxes) == 120
    assert all(below.y1 <= above.y0 for above, below in zip(boxes[:-1], boxes[1:], strict=True))
    assert axes.figure.get_figheight() < 20


def test_a_model_without_kernels_is_an_empty_picture():
    model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])
    assert bars(at.sparsity(model).plot()) == []


@pytest.mark.parametrize(
    "n, text", [(640, "640"), (4608, "4.61 k"), (2.36e6, "2.36 M"), (3e9, "3 G")]
)
def test_numbers_of_weights_are_short(n, text):
    from accel_tf.pruning._sparsity import _short

    assert _short(n) == text


def test_no_matplotlib_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        at.sparsity(mlp()).plot()
