"""Calls the ops with malformed inputs; run by tests/custom_ops/test_fuzz.py under AddressSanitizer.

    python fuzz_op.py FOLDER CALLS SEED

loads the op's library from FOLDER. Each call takes a valid problem and spoils it in one way; the op must
answer with an InvalidArgumentError that says what is wrong. In between, valid problems must give the right
product, so that an op that refuses everything does not pass.
"""

import collections
import os
import re
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

INT64 = np.iinfo(np.int64)
INT32 = np.iinfo(np.int32)


def problem(rng):
    """A valid problem: the arguments of all three ops, and the dense matrix."""
    out_features, in_features = rng.integers(1, 40, 2)
    dense = rng.normal(size=(out_features, in_features)).astype(np.float32)
    dense *= rng.random(dense.shape) < rng.choice([0.05, 0.3, 1.0])
    rows, columns = np.nonzero(dense)
    pointers = np.zeros(out_features + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=out_features), out=pointers[1:])
    lead = tuple(rng.integers(1, [[], [40], [5, 9]][rng.integers(3)]).tolist())
    return {
        "x": rng.normal(size=(*lead, in_features)).astype(np.float32),
        "dy": rng.normal(size=(*lead, out_features)).astype(np.float32),
        "row_pointers": pointers,
        "columns": columns.astype(np.int32),
        "values": dense[rows, columns],
        "in_features": int(in_features),
    }, dense


def rogue(rng, below, above, limits):
    """A number below `below` or not below `above`: near the edge, or as far as the type goes."""
    near = int(rng.integers(1, 100))
    low = [below - near, limits.min, limits.min + near]
    high = [above + near - 1, limits.max, limits.max - near, above]
    return int(rng.choice([v for v in low if v < below] + [v for v in high if v >= above]))


def first_pointer(a, rng):
    a["row_pointers"][0] = rogue(rng, 0, 1, INT64)
    return r"row_pointers\[0\] = -?\d+, expected 0"


def last_pointer(a, rng):
    a["row_pointers"][-1] = rogue(rng, 0, a["columns"].size + 1, INT64)
    return r"row_pointers\[\d+\] = -?\d+(, expected the number of values, \d+| is less than)"


def inner_pointer(a, rng):
    pointers = a["row_pointers"]
    if pointers.size < 3:
        return first_pointer(a, rng)
    n = rng.integers(1, pointers.size - 1)
    pointers[n] = rogue(rng, pointers[n - 1], pointers[n + 1] + 1, INT64)
    return r"row_pointers\[\d+\] = -?\d+ is less than row_pointers\[\d+\] = \d+"


def column(a, rng):
    if a["columns"].size == 0:
        return first_pointer(a, rng)
    p = rng.integers(a["columns"].size)
    width = a["in_features"] if "in_features" in a else a["x"].shape[-1]
    a["columns"][p] = rogue(rng, 0, width, INT32)
    return rf"columns\[{p}\] = -?\d+, expected a value in \[0, {width}\)"


def columns_all_random(a, rng):
    if a["columns"].size == 0:
        return first_pointer(a, rng)
    a["columns"] = rng.integers(INT32.min, 0, a["columns"].size).astype(np.int32)
    return r"columns\[0\] = -\d+"


def values_size(a, rng):
    if "values" not in a:
        return columns_size(a, rng)
    size = a["values"].size
    a["values"] = np.zeros(
        rng.choice([n for n in (0, size - 1, size + 1, 3 * size + 2) if 0 <= n != size]), np.float32
    )
    return r"values has shape .*expected that of columns"


def columns_size(a, rng):
    size = a["columns"].size
    a["columns"] = np.zeros(
        rng.choice([n for n in (0, size - 1, size + 1, 3 * size + 2) if 0 <= n != size]), np.int32
    )
    return r"values has shape|expected the number of values"


def rank(a, rng):
    names = [n for n in ("row_pointers", "columns", "values") if n in a]
    name = names[rng.integers(len(names))]
    a[name] = [a[name][None], a[name][:, None], a[name].sum(dtype=a[name].dtype)][rng.integers(3)]
    return r"has shape"


def no_pointers(a, rng):
    a["row_pointers"] = np.zeros(0, np.int64)
    return r"row_pointers has shape \[0\], expected \[out_features \+ 1\]"


def activation_size(a, rng):
    # Where nothing else gives the number of inputs, x of any width is as good.
    name = "x" if "x" in a and "in_features" in a else "dy"
    wrong = a[name].shape[-1] + int(rng.choice([-1, 1, 7]))
    a[name] = np.zeros((*a[name].shape[:-1], wrong), np.float32)
    return rf"{name} has shape .*, expected \[\.\.\., \d+\]"


def activation_scalar(a, rng):
    names = [n for n in ("x", "dy") if n in a]
    a[names[rng.integers(len(names))]] = np.float32(1)
    return r"has shape \[\], expected"


def batch(a, rng):
    if "x" not in a or "dy" not in a:
        return activation_scalar(a, rng)
    a["dy"] = np.zeros((int(rng.integers(50, 60)), *a["dy"].shape), np.float32)
    return r"dy has shape .*, expected .*, x having shape"


def dtype(a, rng):
    name, wrong = [
        ("row_pointers", np.int32),
        ("row_pointers", np.float32),
        ("columns", np.int64),
        ("columns", np.float32),
        ("x", np.float64),
        ("dy", np.int32),
    ][rng.integers(6)]
    if name not in a:
        name, wrong = "columns", np.int64
    a[name] = a[name].astype(wrong)
    return r"expected to be|not in the list of allowed values|[Cc]annot compute|could not find"


def wide(a, rng):
    if "in_features" not in a:
        return no_pointers(a, rng)
    a["in_features"] = int(rng.choice([2**31, 2**40, INT64.max]))
    return r"in_features = \d+, expected at most 2147483647|x has shape"


def negative_width(a, rng):
    if "in_features" not in a:
        return no_pointers(a, rng)
    a["in_features"] = -int(rng.integers(1, 2**40))
    return r"in_features"


SPOILERS = [first_pointer, last_pointer, inner_pointer, column, columns_all_random, values_size,
            columns_size, rank, no_pointers, activation_size, activation_scalar, batch, dtype, wide,
            negative_width]  # fmt: skip

OPS = {
    "accel_tf_sparse_mat_mul": ("x", "row_pointers", "columns", "values", "in_features"),
    "accel_tf_sparse_mat_mul_grad_x": ("dy", "row_pointers", "columns", "values", "in_features"),
    "accel_tf_sparse_mat_mul_grad_values": ("dy", "x", "row_pointers", "columns"),
}


def expected(op, a, dense):
    """The valid answer, in double precision."""
    w = dense.astype(np.float64)
    if op.endswith("mul"):
        return a["x"] @ w.T
    if op.endswith("grad_x"):
        return a["dy"] @ w
    full = np.einsum(
        "bn,bk->nk", *(a[n].reshape(-1, a[n].shape[-1]).astype(np.float64) for n in ("dy", "x"))
    )
    return full[np.nonzero(dense)]


def main(folder, calls, seed):
    library = tf.load_op_library(os.path.join(folder, "_accel_tf_ops.so"))
    rng = np.random.default_rng(seed)
    refused = collections.Counter()
    valid = 0
    while refused.total() < calls:
        full, dense = problem(rng)
        op = list(OPS)[rng.integers(len(OPS))]
        arguments = {name: full[name] for name in OPS[op]}
        where = f"call {refused.total()} of seed {seed}, {op}"
        if rng.random() < 0.05:
            got = getattr(library, op)(**arguments).numpy()
            want = expected(op, arguments, dense)
            if got.shape != want.shape or not np.allclose(got, want, rtol=1e-4, atol=1e-4):
                sys.exit(f"{where}: a valid call gave a wrong result")
            valid += 1
            continue
        spoil = SPOILERS[rng.integers(len(SPOILERS))]
        pattern = spoil(arguments, rng)
        try:
            result = getattr(library, op)(
                **{k: v if k == "in_features" else tf.constant(v) for k, v in arguments.items()}
            )
        except tf.errors.InvalidArgumentError as error:
            if not re.search(pattern, error.message):
                sys.exit(f"{where}, {spoil.__name__}: expected {pattern!r}, got: {error.message}")
            refused[spoil.__name__] += 1
        else:
            sys.exit(f"{where}, {spoil.__name__}: accepted, result of shape {result.shape}")
    print(f"{refused.total()} malformed calls refused, {valid} valid ones right")
    print(dict(refused))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
