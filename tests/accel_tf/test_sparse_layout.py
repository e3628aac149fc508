"""The packed layout of sparse matrices: its rules, and a product that follows it step by step."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accel_tf.sparse._layout import (
    HEIGHTS,
    Layout,
    Sizes,
    coordinates,
    count_blocks,
    empty_plan,
    pack,
)


def csr(w):
    """Row pointers and columns of (in, out), by output."""
    rows, columns = np.nonzero(w.T)
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=w.shape[1]))]), columns


def values_of(layout, values):
    return np.where(layout.order < 0, 0, np.append(values, 0)[layout.order])


def parts(layout):
    tile, chunks, slices = layout.plan[:3]
    tiles = -(-layout.in_features // tile)
    lengths = [chunks + 1, chunks * tiles + 1, slices + 1, slices * layout.height]
    assert layout.plan.size == 3 + sum(lengths)
    return tile, tiles, *np.split(layout.plan[3:], np.cumsum(lengths)[:-1])


def multiply(x, layout, values):
    """The product as the kernels do it, one multiply-add at a time, in float64."""
    tile, tiles, chunk_rows, slice_starts, step_starts, slice_rows = parts(layout)
    height = layout.height
    y = np.zeros((len(x), layout.out_features))
    for chunk, (begin, end) in enumerate(zip(chunk_rows[:-1], chunk_rows[1:], strict=True)):
        sums = np.zeros((len(x), end - begin + 1))  # and one for "no row"
        for t in range(tiles):
            x_tile = np.zeros((len(x), tile + 1))  # and a column of zeros
            width = min(tile, layout.in_features - t * tile)
            x_tile[:, :width] = x[:, t * tile : t * tile + width]
            for s in range(*slice_starts[chunk * tiles + t :][:2]):
                rows = slice_rows[s * height : (s + 1) * height]
                for step in range(*step_starts[s:][:2]):
                    lanes = np.arange(step * height, (step + 1) * height)
                    columns = layout.columns[step if layout.shared else lanes]
                    sums[:, rows] += values[lanes] * x_tile[:, columns].reshape(len(x), -1)
        y[:, begin:end] = sums[:, :-1]
    return y


@st.composite
def patterns(draw):
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 15, 16, 17, 33, 70, 200])
    in_features, out_features = draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.normal(size=(in_features, out_features))
    w *= rng.random(w.shape) < draw(st.sampled_from([0, 0.02, 0.3, 1])) * rng.random(out_features)
    return w, {
        "tile": draw(st.sampled_from([None, 1, 3, 16, 64, 4096])),
        "max_rows": draw(st.sampled_from([16, 48, 512])),
        "chunks": draw(st.sampled_from([1, 3, 16])),
    }


@pytest.mark.parametrize("height, shared", HEIGHTS.values())
@settings(max_examples=60)
@given(patterns())
@example((np.ones((3, 600)), {}))
def test_layout(height, shared, pattern):
    w, options = pattern
    pointers, columns = csr(w)
    layout = pack(pointers, columns, w.shape, height=height, shared=shared, **options)
    values = w.T[w.T != 0]
    packed = values_of(layout, values)

    x = np.random.default_rng(0).normal(size=(3, w.shape[0]))
    np.testing.assert_allclose(multiply(x, layout, packed), x @ w, rtol=1e-9, atol=1e-9)

    # Every non-zero is stored once, where the coordinates say.
    stored = layout.order >= 0
    np.testing.assert_array_equal(np.sort(layout.order[stored]), np.arange(values.size))
    rows, at = (a.numpy() for a in coordinates(layout.plan, layout.columns, **layout.attributes))
    np.testing.assert_array_equal(w[at[stored], rows[stored]], packed[stored])
    inside = (rows < w.shape[1]) & (at < w.shape[0])
    assert np.all(inside[stored])
    if shared:
        assert not np.any(w[at[inside & ~stored], rows[inside & ~stored]])
        assert layout.padded == np.any(inside & ~stored)
        assert packed.size == height * count_blocks(pointers, columns, w.shape, height)
    else:
        np.testing.assert_array_equal(inside, stored)

    # The rules of the format.
    tile, _, chunk_rows, slice_starts, step_starts, slice_rows = parts(layout)
    assert layout.plan.dtype == np.int32 and layout.columns.dtype == np.uint16
    assert 1 <= tile <= 4096 and layout.columns.max(initial=0) <= tile
    assert chunk_rows[0] == 0 and chunk_rows[-1] == w.shape[1]
    assert np.all(chunk_rows[:-1] % 16 == 0)
    sizes = np.diff(chunk_rows)
    assert np.all((sizes >= 1) & (sizes <= options.get("max_rows", 512)))
    assert slice_starts[0] == 0 and slice_starts[-1] == step_starts.size - 1
    assert np.all(np.diff(slice_starts) >= 0) and np.all(np.diff(step_starts) > 0)
    assert step_starts[0] == 0 and step_starts[-1] * height == packed.size
    for cell, (begin, end) in enumerate(zip(slice_starts[:-1], slice_starts[1:], strict=True)):
        lanes = slice_rows[begin * height : end * height]
        size = sizes[cell // max(-(-w.shape[0] // tile), 1)]
        used = lanes[lanes < size]
        assert np.unique(used).size == used.size and lanes.max(initial=0) <= size
        assert np.all(np.diff(np.diff(step_starts)[begin:end]) <= 0)  # longest first
        if shared:
            assert np.all(lanes[::height] % height == 0)
            assert np.all(lanes == np.minimum(np.repeat(lanes[::height], height) + np.tile(np.arange(height), end - begin), size))  # fmt: skip


@pytest.mark.parametrize("height, shared", HEIGHTS.values())
@pytest.mark.parametrize("shape", [(40, 600), (300, 17), (0, 5), (5, 0), (9, 1)])
def test_room_for_a_matrix_is_a_plan_of_the_same_size_for_zeros(height, shared, shape):
    rng = np.random.default_rng(0)
    w = rng.random(shape) < 0.2
    layout = pack(*csr(w), shape, height=height, shared=shared, tile=16)
    plan = empty_plan(Sizes.of(layout), *shape, height, shared)
    assert plan.shape == layout.plan.shape and plan.dtype == layout.plan.dtype
    columns = np.full_like(layout.columns, plan[0])
    empty = Layout(plan, columns, np.full_like(layout.order, -1), *shape, height, shared)
    chunk_rows = parts(empty)[2]
    assert np.all((np.diff(chunk_rows) >= 1) & (np.diff(chunk_rows) <= 512))
    x = rng.normal(size=(2, shape[0]))
    np.testing.assert_array_equal(multiply(x, empty, np.ones(layout.order.size)), 0)


@pytest.mark.parametrize("height, shared", HEIGHTS.values())
def test_duplicates_and_unsorted_columns(height, shared):
    pointers = np.array([0, 4, 4, 6, 7])
    columns = np.array([5, 2, 5, 5, 2, 0, 2], np.int32)
    values = np.arange(1.0, 8.0)
    layout = pack(pointers, columns, (6, 4), height=height, shared=shared, tile=3)
    w = np.zeros((6, 4))
    np.add.at(w, (columns, np.repeat(np.arange(4), np.diff(pointers))), values)
    x = np.random.default_rng(0).normal(size=(2, 6))
    np.testing.assert_allclose(multiply(x, layout, values_of(layout, values)), x @ w, atol=1e-12)


def test_work_is_balanced_and_padding_small():
    rng = np.random.default_rng(0)
    w = rng.random((1024, 1024)) < np.linspace(0.02, 0.4, 1024)  # of unequal rows
    pointers, columns = csr(w)
    layout = pack(pointers, columns, w.shape)
    assert layout.order.size < 1.02 * columns.size
    chunk_rows = parts(layout)[2]
    work = np.diff(pointers[chunk_rows])
    assert work.size == 16 and work.max() < 1.5 * work.mean()
    again = pack(pointers, columns, w.shape)
    for a, b in [(layout.plan, again.plan), (layout.order, again.order)]:
        np.testing.assert_array_equal(a, b)


def test_wide_matrices_have_wide_tiles():
    """Where a row would have next to nothing in a tile of the usual width."""
    pointers, columns = np.arange(0, 20001, 2), np.arange(20000) * 7919 % 100_003
    layout = pack(pointers, columns.astype(np.int32), (100_003, 10_000))
    assert 3500 < layout.plan[0] <= 4096
    rows, at = coordinates(layout.plan, layout.columns, **layout.attributes)
    stored = layout.order >= 0
    np.testing.assert_array_equal(at.numpy()[stored], columns[layout.order[stored]])
    np.testing.assert_array_equal(rows.numpy()[stored], layout.order[stored] // 2)
