"""How a sparse matrix lies in memory for the kernels: slices of rows, cut into tiles of columns.

The product is written row by output: a *row* is an output, a *column* an input.

    tile     consecutive columns, so few that their activations stay in the L1 cache
    chunk    consecutive rows, which one thread owns; about equal in non-zeros
    slice    `height` rows of one chunk that have non-zeros in one tile, computed side by side
    step     one multiply-add of each row of a slice

Without `shared`, a slice takes the rows of a tile that are alike in non-zeros; each step has a column
for each row, and rows that run out of non-zeros are padded. With `shared`, the rows of a slice are
neighbours, and a step is a block of height×1: one column, and a value for each row.

This is SELL-C-σ of M. Kreutzer, G. Hager, G. Wellein, H. Fehske, A. R. Bishop, "A Unified Sparse Matrix
Data Format for Efficient General Sparse Matrix-Vector Multiply on Modern Processors with Wide SIMD
Units", SIAM J. Sci. Comput. 36(5), 2014, §3, cut into tiles. What the kernels read:

    plan     int32: tile, C, S, then one after the other
             chunk_rows[C + 1]         from 0 to the number of rows
             slice_starts[C·T + 1]     of each tile of each chunk; T = ⌈columns / tile⌉
             step_starts[S + 1]        of each slice
             slice_rows[S · height]    relative to the chunk; the chunk's length stands for no row
    columns  uint16, (steps) or, without `shared`, (steps · height): relative to the tile; the
             width of the tile stands for a column of zeros
    values   (steps · height), of which `order` tells where they come from
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Measured on the kernels: 256 inputs of 32 samples are as large as most L1 caches. Narrower tiles stay in
# them, but the sums are then fetched and stored more often.
TILE = 256
MAX_TILE = 4096
# Rows whose sums a thread keeps at once, and the pieces of work to balance threads with.
MAX_ROWS = 512
MIN_ROWS = 64
CHUNKS = 16

# Chunks begin at multiples of every height.
_ALIGNMENT = 16
HEIGHTS = {"unstructured": (4, False), "4x1": (4, True), "16x1": (16, True)}


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The pattern of a matrix, packed: all that the kernels read except for the values.

    Attributes:
        plan: int32, see the top of the module.
        columns: uint16, see there.
        order: int32, one for each stored value: the non-zero of the CSR form that it is, or -1 for
            padding, whose value is 0.
        in_features, out_features: The number of columns and of rows.
        height: The rows of a slice, 4 or 16.
        shared: Whether the rows of a slice share their columns.
    """

    plan: np.ndarray
    columns: np.ndarray
    order: np.ndarray
    in_features: int
    out_features: int
    height: int
    shared: bool

    @property
    def attributes(self) -> dict:
        """What the ops need to know besides the tensors."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "height": self.height,
            "shared": self.shared,
        }

    @property
    def padded(self) -> bool:
        """Whether a block has zeros that are not of the pattern, beside weights that are.

        Their gradient is not 0 by itself, as that of other padding is, whose column is zeros.
        """
        if not self.shared:
            return False
        rows, _ = coordinates(self.plan, self.columns, **self.attributes)
        return bool(np.any((self.order < 0) & (rows.numpy() < self.out_features)))


def pack(
    row_pointers: np.ndarray,
    columns: np.ndarray,
    shape: tuple[int, int],
    *,
    height: int = 4,
    shared: bool = False,
    tile: int | None = None,
    max_rows: int = MAX_ROWS,
    chunks: int = CHUNKS,
) -> Layout:
    """Packs a pattern in CSR form, a pair of which may occur more than once.

    Args:
        row_pointers: (out + 1,) integers, checked.
        columns: (nnz,) integers in [0, in), in any order within a row.
        shape: `(in, out)`.
        height: The rows of a slice: 4, or 16 with `shared`.
        shared: Whether to store blocks of height×1.
        tile: The columns of a tile, at most 4,096; `None` decides by the density.
        max_rows: The rows of a chunk at most: a multiple of 16, up to 512.
        chunks: The number of chunks to aim at, where they have at least `MIN_ROWS` rows.

    Raises:
        ValueError: The matrix is too large for 32-bit positions.
    """
    in_features, out_features = shape
    lengths = np.diff(row_pointers)
    rows = np.repeat(np.arange(out_features), lengths)
    starts = _chunk_rows(lengths, max_rows, chunks)
    tile = tile_of(in_features, rows.size / max(out_features, 1)) if tile is None else tile
    tiles = -(-in_features // tile)

    source, step_of, unit, column = _steps(rows, columns, in_features, height if shared else 1)
    # A segment: the steps of one unit (a row, or with `shared` the rows of a block) in one tile.
    change = np.ones(unit.size, bool)
    change[1:] = (unit[1:] != unit[:-1]) | (column[1:] // tile != column[:-1] // tile)
    first = np.flatnonzero(change)
    count = np.diff(first, append=unit.size)
    row = unit[first] * (height if shared else 1)
    chunk = np.searchsorted(starts, row, side="right") - 1
    cell = chunk * tiles + column[first] // tile
    by_cell = np.lexsort((row, -count, cell))

    per_cell = np.bincount(cell, minlength=(starts.size - 1) * tiles)
    lanes = 1 if shared else height
    slice_starts = _sums(-(-per_cell // lanes))
    rank = np.arange(first.size) - np.repeat(_sums(per_cell)[:-1], per_cell)
    in_slice = slice_starts[cell[by_cell]] + rank // lanes
    leads = rank % lanes == 0  # segments are sorted: the first of a slice is its longest
    step_starts = _sums(count[by_cell[leads]])

    ends = starts[1:] - starts[:-1]
    slice_chunk = chunk[by_cell[leads]]
    slice_rows = np.repeat(ends[slice_chunk][:, None], height, axis=1)
    local = (row - starts[chunk])[by_cell]
    if shared:
        slice_rows = np.minimum(local[:, None] + np.arange(height), slice_rows)
    else:
        slice_rows[in_slice, rank % lanes] = local

    total = int(step_starts[-1]) * height
    if max(total, slice_starts.size, slice_rows.size) >= 2**31:
        raise ValueError(
            f"A matrix of shape {shape} with {rows.size} non-zeros takes {total} stored values in "
            "blocks or slices; at most 2^31 - 1 can be addressed. Split the matrix by its outputs."
        )
    # Where each segment's first step lies, counted in columns, and with it each of its steps.
    base = np.empty(first.size, np.int64)
    base[by_cell] = step_starts[in_slice] * lanes + rank % lanes
    position = np.repeat(base - first * lanes, count) + np.arange(unit.size) * lanes
    packed = np.full(int(step_starts[-1]) * lanes, tile, np.uint16)
    packed[position] = column % tile
    order = np.full(total, -1, np.int32)
    if shared:
        position = position[step_of] * height + rows[source] % height
    order[position] = source
    plan = [[tile, starts.size - 1, slice_chunk.size], starts, slice_starts, step_starts]
    plan = np.concatenate([*plan, slice_rows.ravel()]).astype(np.int32)
    return Layout(plan, packed, order, in_features, out_features, height, shared)


def coordinates(plan, columns, in_features, out_features, height, shared):
    """Returns the row and the column of each stored value; out of range for what is padding.

    Args:
        plan, columns: Tensors or arrays, see the top of the module.
        in_features, out_features, height, shared: As in `Layout`.

    Returns:
        `(rows, columns)`: int64 tensors of shape (steps · height,). A row is `out_features`, or a
        column is `in_features`, where the stored value is padding.
    """
    plan = tf.cast(plan, tf.int64)
    columns = tf.cast(columns, tf.int64)
    tile, chunks, slices = plan[0], plan[1], plan[2]
    tiles = -(-in_features // tile)
    parts = tf.split(
        plan[3:],
        tf.stack([chunks + 1, chunks * tiles + 1, slices + 1, slices * height]),
        num=4,
    )
    chunk_rows, slice_starts, step_starts, slice_rows = parts
    cell = tf.repeat(tf.range(chunks * tiles), slice_starts[1:] - slice_starts[:-1])
    chunk = cell // tf.maximum(tiles, 1)
    slice_rows = tf.reshape(slice_rows, [-1, height])
    begin, end = tf.gather(chunk_rows, chunk)[:, None], tf.gather(chunk_rows, chunk + 1)[:, None]
    slice_rows = tf.where(begin + slice_rows < end, begin + slice_rows, out_features)
    of_step = tf.repeat(tf.range(slices), step_starts[1:] - step_starts[:-1])
    local = tf.reshape(columns, [-1, 1 if shared else height])
    offset = tf.gather(cell % tf.maximum(tiles, 1) * tile, of_step)[:, None]
    column = tf.where(local < tile, tf.minimum(offset + local, in_features), in_features)
    rows = tf.reshape(tf.gather(slice_rows, of_step), [-1])
    return rows, tf.reshape(tf.broadcast_to(column, [tf.size(of_step), height]), [-1])


class Sizes(NamedTuple):
    """What decides the shapes of packed weights, so that room for them can be made.

    Attributes:
        tile, chunks, slices, steps: As at the top of the module.
        padded: `Layout.padded`.
        int8: Whether the values are int8, with scales.
    """

    tile: int
    chunks: int
    slices: int
    steps: int
    padded: bool = False
    int8: bool = False

    @classmethod
    def of(cls, layout: Layout, int8: bool = False) -> "Sizes":
        tile, chunks, slices = map(int, layout.plan[:3])
        return cls(tile, chunks, slices, layout.order.size // layout.height, layout.padded, int8)


def empty_plan(sizes: Sizes, in_features, out_features, height, shared) -> np.ndarray:
    """Returns a plan of the given sizes whose slices have no rows: that of a matrix of zeros."""
    tile, chunks, slices, steps = sizes[:4]
    tiles = -(-in_features // tile)
    units = -(-out_features // _ALIGNMENT)
    chunk_rows = np.arange(chunks + 1) * units // max(chunks, 1) * _ALIGNMENT
    chunk_rows = np.minimum(chunk_rows, out_features)
    slice_starts = np.zeros(chunks * tiles + 1, np.int64)
    slice_starts[-1:] = slices
    step_starts = np.zeros(slices + 1, np.int64)
    step_starts[-1:] = steps
    last = int(chunk_rows[-1] - chunk_rows[-2]) if chunks else 0
    slice_rows = np.full(slices * height, last)
    plan = [[tile, chunks, slices], chunk_rows, slice_starts, step_starts, slice_rows]
    return np.concatenate(plan).astype(np.int32)


def count_blocks(row_pointers, columns, shape, height: int) -> int:
    """Returns the number of height×1 blocks that have a non-zero."""
    rows = np.repeat(np.arange(shape[1]), np.diff(row_pointers))
    return _steps(rows, columns, shape[0], height)[2].size


def _steps(rows, columns, in_features, group):
    """Sorts the non-zeros by unit, i.e. `group` neighbouring rows, and column, and merges those of
    the same step.

    Returns:
        `(source, step_of, unit, column)`: for each non-zero, its number in CSR order and its step;
        for each step, its unit and its column.
    """
    unit, columns = rows // group, columns.astype(np.int64)
    key = unit * in_features + columns
    source = np.arange(rows.size)
    if np.any(key[1:] < key[:-1]):
        source = np.argsort(key, kind="stable")
        key, unit, columns = key[source], unit[source], columns[source]
    if group == 1:
        return source, source, unit, columns
    # The sort is stable, so that the non-zeros of a place are neighbours if there are several. The
    # k-th of them goes to the k-th step of its block.
    again = _occurrence(key * group + rows[source] % group)
    if np.any(again):
        by_step = np.lexsort((again, key))
        source, key, again = source[by_step], key[by_step], again[by_step]
        unit, columns = unit[by_step], columns[by_step]
    new = np.ones(key.size, bool)
    new[1:] = (key[1:] != key[:-1]) | (again[1:] != again[:-1])
    return source, np.cumsum(new) - 1, unit[new], columns[new]


def _occurrence(sorted_key):
    """How often each element has occurred before."""
    new = np.ones(sorted_key.size, bool)
    new[1:] = sorted_key[1:] != sorted_key[:-1]
    first = np.flatnonzero(new)
    return np.arange(sorted_key.size) - np.repeat(first, np.diff(first, append=sorted_key.size))


def _sums(counts):
    """0 and the running sums."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def tile_of(in_features, per_row):
    """Tiles of equal width. A row that has few non-zeros in a tile costs more to begin than to sum
    up, so sparser matrices get wider tiles."""
    tile = TILE
    while tile < MAX_TILE and tile < in_features and per_row * tile < 8 * in_features:
        tile *= 2
    tile = min(tile, MAX_TILE)
    tiles = max(-(-in_features // tile), 1)
    return max(-(-in_features // tiles), 1)


def _chunk_rows(lengths, max_rows, chunks):
    """The first row of each chunk, and the number of rows; a row costs as much as four non-zeros."""
    out_features = lengths.size
    if out_features == 0:
        return np.zeros(1, np.int64)
    # A quarter less than a chunk may have, so that one with cheap rows rarely has too many.
    least = -(-4 * out_features // (3 * max_rows))
    chunks = max(min(chunks, out_features // MIN_ROWS), least, 1)
    cost = np.cumsum(lengths + 4)
    cuts = np.searchsorted(cost, cost[-1] / chunks * np.arange(1, chunks))
    cuts = (cuts + _ALIGNMENT // 2) // _ALIGNMENT * _ALIGNMENT
    starts = np.unique(np.concatenate([[0], np.minimum(cuts, out_features), [out_features]]))
    starts = starts.astype(np.int64)
    halves = starts[:0]
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        if end - begin > max_rows:
            pieces = -(-(end - begin) // max_rows)
            rows = -(-(end - begin) // (pieces * _ALIGNMENT)) * _ALIGNMENT
            halves = np.concatenate([halves, np.arange(begin + rows, end, rows)])
    return np.sort(np.concatenate([starts, halves]))
