"""Calls the product of two sparse matrices with malformed inputs; run by tests/custom_ops/test_fuzz.py.

    python fuzz_gustavson.py FOLDER CALLS SEED

loads the op's library from FOLDER. Each call takes a valid problem and spoils it in one way.
"""

import os
import sys

import numpy as np
import tensorflow as tf
from fuzzing import INT32, INT64, campaign, other_size, rogue

NAMES = ("row_pointers", "columns", "values")


def matrix(rng, rows, columns):
    """A random matrix: dense in float64, and the three arrays of its CSR form, columns in any order."""
    dense = rng.normal(size=(rows, columns)) * (
        rng.random((rows, columns)) < rng.choice([0.05, 0.3, 1.0])
    )
    where = [rng.permutation(np.flatnonzero(row)) for row in dense]
    at = np.concatenate(where).astype(np.int32)
    pointers = np.zeros(rows + 1, np.int64)
    np.cumsum([w.size for w in where], out=pointers[1:])
    values = dense[np.repeat(np.arange(rows), np.diff(pointers)), at]
    return dense, dict(zip(NAMES, (pointers, at, values.astype(np.float32)), strict=True))


def problem(rng):
    rows, inner, columns = rng.integers(1, 40, 3)
    columns *= rng.choice([1, 1, 50])
    (a, a_arrays), (b, b_arrays) = matrix(rng, rows, inner), matrix(rng, inner, columns)
    arguments = {f"a_{name}": array for name, array in a_arrays.items()}
    arguments |= {f"b_{name}": array for name, array in b_arrays.items()}
    arguments["out_columns"] = int(columns)

    def check(result):
        pointers, at, values = (part.numpy() for part in result)
        got = np.zeros((rows, columns))
        row = np.repeat(np.arange(rows), np.diff(pointers))
        got[row, at] = values
        np.testing.assert_allclose(got, a @ b, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(at, np.nonzero((a != 0) @ (b != 0).astype(float))[1])

    return "accel_tf_sparse_sparse_mat_mul", arguments, check


def operand(rng):
    return "ab"[rng.integers(2)]


def width(a, side):
    return a["out_columns"] if side == "b" else a["b_row_pointers"].size - 1


def first_pointer(a, rng, side=None):
    side = side or operand(rng)
    a[f"{side}_row_pointers"][0] = rogue(rng, 0, 1, INT64)
    return rf": {side}_row_pointers\[0\] = -?\d+, expected 0"


def last_pointer(a, rng):
    side = operand(rng)
    a[f"{side}_row_pointers"][-1] = rogue(rng, 0, a[f"{side}_columns"].size + 1, INT64)
    return rf": {side}_row_pointers\[\d+\] = -?\d+(, expected the number of values, \d+| is less)"


def inner_pointer(a, rng):
    side = operand(rng)
    pointers = a[f"{side}_row_pointers"]
    if pointers.size < 3:
        return first_pointer(a, rng, side)
    n = rng.integers(1, pointers.size - 1)
    pointers[n] = rogue(rng, pointers[n - 1], pointers[n + 1] + 1, INT64)
    return rf": {side}_row_pointers\[\d+\] = -?\d+ is less than row_pointers\[\d+\] = \d+"


def column(a, rng):
    side = operand(rng)
    columns = a[f"{side}_columns"]
    if columns.size == 0:
        return first_pointer(a, rng, side)
    p = rng.integers(columns.size)
    columns[p] = rogue(rng, 0, width(a, side), INT32)
    return rf": {side}_columns\[{p}\] = -?\d+, expected a value in \[0, {width(a, side)}\)"


def fewer_rows_of_b(a, rng):
    """B loses the rows that A's largest column names."""
    used = a["a_columns"].max(initial=-1)
    if used < 0:
        return first_pointer(a, rng, "a")
    a["b_row_pointers"] = a["b_row_pointers"][: rng.integers(1, used + 2)]
    a["b_columns"] = a["b_columns"][: a["b_row_pointers"][-1]]
    a["b_values"] = a["b_values"][: a["b_row_pointers"][-1]]
    return rf": a_columns\[\d+\] = \d+, expected a value in \[0, {a['b_row_pointers'].size - 1}\)"


def fewer_columns(a, rng):
    used = int(a["b_columns"].max(initial=-1))
    if used < 0:
        return first_pointer(a, rng, "b")
    a["out_columns"] = int(rng.integers(0, used + 1))
    return rf": b_columns\[\d+\] = \d+, expected a value in \[0, {a['out_columns']}\)"


def size(a, rng):
    side, name = operand(rng), ("columns", "values")[rng.integers(2)]
    array = a[f"{side}_{name}"]
    a[f"{side}_{name}"] = np.zeros(other_size(rng, array.size), array.dtype)
    return rf"{side}_values has shape .*, expected that of {side}_columns"


def rank(a, rng):
    name = f"{operand(rng)}_{NAMES[rng.integers(3)]}"
    array = a[name]
    a[name] = [array[None], array[:, None], array.sum(dtype=array.dtype)][rng.integers(3)]
    return r": [ab]_\w+ has shape"


def no_pointers(a, rng):
    side = operand(rng)
    a[f"{side}_row_pointers"] = np.zeros(0, np.int64)
    return rf": {side}_row_pointers has shape \[0\], expected \[rows \+ 1\]"


def dtype(a, rng):
    name, wrong = [
        ("row_pointers", np.int32),
        ("row_pointers", np.float32),
        ("columns", np.int64),
        ("columns", np.float32),
        ("values", np.float64),
    ][rng.integers(5)]
    name = f"{operand(rng)}_{name}"
    a[name] = a[name].astype(wrong)
    return r"expected to be|not in the list of allowed values|[Cc]annot compute|could not find"


def wide(a, rng):
    a["out_columns"] = int(rng.choice([2**31, 2**40, INT64.max]))
    return r"out_columns = \d+, expected at most 2147483647"


def negative_width(a, rng):
    a["out_columns"] = -int(rng.integers(1, 2**40))
    return r"out_columns"


SPOILERS = [first_pointer, last_pointer, inner_pointer, column, fewer_rows_of_b, fewer_columns, size,
            rank, no_pointers, dtype, wide, negative_width]  # fmt: skip


if __name__ == "__main__":
    campaign(
        tf.load_op_library(os.path.join(sys.argv[1], "_accel_tf_ops.so")),
        int(sys.argv[2]),
        int(sys.argv[3]),
        problem,
        SPOILERS,
    )
