"""Calls the sparse products with malformed inputs; run by tests/custom_ops/test_fuzz.py under AddressSanitizer.

    python fuzz_op.py FOLDER CALLS SEED

loads the op's library from FOLDER. Each call takes a valid problem and spoils it in one way; a quarter as
many calls more take a plan of the right size and fill it with nonsense, which may be accepted, but must be
safe.
"""

import functools
import os
import sys

import numpy as np
import tensorflow as tf
from fuzzing import INT32, INT64, campaign, other_size, rogue

FORMS = [(4, False), (4, True), (16, True)]
ACTIVATIONS = {
    "linear": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
}
OPS = {
    "accel_tf_sparse_mat_mul": ("x", "plan", "columns", "values", "scales", "bias", "activation"),
    "accel_tf_sparse_mat_mul_grad_x": ("dy", "plan", "columns", "values"),
    "accel_tf_sparse_mat_mul_grad_values": ("dy", "x", "plan", "columns"),
}
ATTRIBUTES = ("in_features", "out_features", "height", "shared")


def pack(pattern, tile, chunk_rows, height, shared):
    """Packs a boolean (out, in) matrix by the rules of kernels/sliced.h, one after the other.

    Returns `(plan, columns, places)`; places: for each value its row and column, (out, in) for none.
    """
    out_features, in_features = pattern.shape
    slices, columns, places = [], [], []
    slice_starts, step_starts = [0], [0]
    for begin, end in zip(chunk_rows[:-1], chunk_rows[1:], strict=True):
        for first in range(0, in_features, tile):
            part = pattern[begin:end, first : first + tile]
            # Each slice: its rows, and the columns of each.
            if shared:
                found = []
                for r in range(0, end - begin, height):
                    at = np.flatnonzero(part[r : r + height].any(0))
                    rows = [min(r + i, end - begin) for i in range(height)]
                    found += [(rows, [at] * height)] if at.size else []
                found.sort(key=lambda block: -block[1][0].size)
            else:
                lanes = [(r, np.flatnonzero(row)) for r, row in enumerate(part) if row.any()]
                lanes.sort(key=lambda lane: -lane[1].size)
                lanes += [(end - begin, np.zeros(0, int))] * (-len(lanes) % height)
                found = [
                    list(zip(*lanes[i : i + height], strict=True))
                    for i in range(0, len(lanes), height)
                ]
            for rows, at in found:
                steps = at[0].size
                slices += rows
                step_starts.append(step_starts[-1] + steps)
                for step in range(steps):
                    here = [int(a[step]) if step < a.size else tile for a in at]
                    columns += here[:1] if shared else here
                    for row, column in zip(rows, here, strict=True):
                        places.append((
                            begin + row if begin + row < end else out_features,
                            first + column if column < tile else in_features,
                        ))  # fmt: skip
            slice_starts.append(len(step_starts) - 1)
    plan = [tile, len(chunk_rows) - 1, len(step_starts) - 1]
    plan = np.array([*plan, *chunk_rows, *slice_starts, *step_starts, *slices], np.int32)
    return plan, np.array(columns, np.uint16), np.array(places, int).reshape(-1, 2).T


@functools.cache
def matrix(number):
    """One of the matrices that all calls share: packing in Python takes longer than a call."""
    rng = np.random.default_rng(number)
    height, shared = FORMS[number % 3]
    out_features, in_features = (int(n) for n in rng.integers(1, 70, 2))
    pattern = rng.random((out_features, in_features)) < rng.choice([0.02, 0.3, 1.0])
    tile = int(rng.choice([1, 3, 8, 20, 64, 4096]))
    rows = height * int(rng.choice([1, 2, 5]))
    chunk_rows = [*range(0, out_features, rows), out_features]
    attributes = {"in_features": in_features, "out_features": out_features}
    attributes |= {"height": height, "shared": shared}
    return attributes, pack(pattern, tile, chunk_rows, height, shared)


def problem(rng):
    attributes, (plan, columns, (rows, at)) = matrix(rng.integers(300))
    in_features, out_features = attributes["in_features"], attributes["out_features"]
    inside = (rows < out_features) & (at < in_features)
    int8 = rng.random() < 0.5
    values = rng.integers(-128, 128, rows.size) if int8 else rng.normal(size=rows.size)
    values = (values * inside).astype(np.int8 if int8 else np.float32)
    lead = tuple(rng.integers(0, [[], [40], [5, 9]][rng.integers(3)]).tolist())
    full = attributes | {
        "x": rng.normal(size=(*lead, in_features)).astype(np.float32),
        "dy": rng.normal(size=(*lead, out_features)).astype(np.float32),
        "plan": plan.copy(),
        "columns": columns.copy(),
        "values": values,
        "scales": rng.normal(size=out_features if int8 else 0).astype(np.float32) / 64,
        "bias": rng.normal(size=out_features * rng.integers(2)).astype(np.float32),
        "activation": list(ACTIVATIONS)[rng.integers(3)],
    }
    op = list(OPS)[rng.integers(3)]

    def check(result):
        w = np.zeros((out_features + 1, in_features + 1))
        np.add.at(w, (rows, at), values.astype(float))
        w = w[:-1, :-1]
        if op.endswith("mul"):
            y = full["x"] @ w.T
            y = y * (full["scales"].astype(float) if int8 else 1)
            want = ACTIVATIONS[full["activation"]](y + (full["bias"] if full["bias"].size else 0))
        elif op.endswith("grad_x"):
            want = full["dy"] @ w
        else:
            dy, x = (
                np.pad(full[name].reshape(-1, size).astype(float), [(0, 0), (0, 1)])
                for name, size in (("dy", out_features), ("x", in_features))
            )
            want = np.einsum("bp,bp->p", dy[:, rows], x[:, at])
        np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-3 if int8 else 1e-4)

    return op, {name: full[name] for name in OPS[op] + ATTRIBUTES}, check


def section(a, name):
    """The first position of an array in the plan, and the array."""
    plan = a["plan"]
    tiles = -(-a["in_features"] // int(plan[0]))
    sizes = [3, plan[1] + 1, plan[1] * tiles + 1, plan[2] + 1, plan[2] * a["height"]]
    number = 1 + ["chunk_rows", "slice_starts", "step_starts", "slice_rows"].index(name)
    first = sum(map(int, sizes[:number]))
    return first, plan[first : first + int(sizes[number])]


def boundary(rng):
    return ["chunk_rows", "slice_starts", "step_starts"][rng.integers(3)]


def tile(a, rng):
    a["plan"][0] = rogue(rng, 1, 4097, INT32)
    return rf": plan\[0\] = {a['plan'][0]}, expected a value from 1 to 4096(?!\d)"


def other_tile(a, rng):
    """As many tiles more or less as no longer fit the size of the plan."""
    tiles = -(-a["in_features"] // np.arange(1, 4097))
    others = 1 + np.flatnonzero(tiles != tiles[a["plan"][0] - 1])
    if not others.size:
        return tile(a, rng)
    a["plan"][0] = rng.choice(others)
    return rf": plan has {a['plan'].size} elements, expected \d+ for"


def count(a, rng):
    position = rng.integers(1, 3)
    old = a["plan"][position]
    a["plan"][position] = rogue(rng, old, old + 1, INT32)
    if a["plan"][position] < 0:
        return rf": plan\[{position}\] = -\d+, expected a number of \w+, not negative"
    return rf": plan has {a['plan'].size} elements, expected \d+ for"


def plan_size(a, rng):
    a["plan"] = np.resize(a["plan"], other_size(rng, a["plan"].size))
    return rf": plan has {a['plan'].size} elements, expected (at least 3|\d+ for)"


def first_boundary(a, rng):
    first, array = section(a, boundary(rng))
    array[0] = rogue(rng, 0, 1, INT32)
    return rf": plan\[{first}\] = {array[0]}, expected 0(?!\d)"


def last_boundary(a, rng):
    first, array = section(a, boundary(rng))
    if array.size == 1:
        return first_boundary(a, rng)
    array[-1] = rogue(rng, array[-1], array[-1] + 1, INT32)
    return rf": plan\[{first + array.size - 1}\] = {array[-1]}, expected (the number of|\d+ to \d+ more than)"


def inner_boundary(a, rng):
    name = boundary(rng)
    first, array = section(a, name)
    if array.size < 3:
        return first_boundary(a, rng)
    n = rng.integers(1, array.size - 1)
    array[n] = rogue(
        rng, array[n - 1] + (name == "chunk_rows"), array[n + 1] + (name != "chunk_rows"), INT32
    )
    at = (
        first + n
        if array[n] < array[n - 1] + (name == "chunk_rows")
        else rf"({first + n}|{first + n + 1})"
    )
    return rf": plan\[{at}\] = -?\d+, expected [01] to \d+ more than plan\[\d+\] = -?\d+(?!\d)"


def row(a, rng):
    first, rows = section(a, "slice_rows")
    if not rows.size:
        return first_boundary(a, rng)
    i = rng.integers(rows.size)
    chunk_rows, slice_starts = section(a, "chunk_rows")[1], section(a, "slice_starts")[1]
    tiles = (slice_starts.size - 1) // (chunk_rows.size - 1)
    chunk = np.searchsorted(slice_starts[::tiles], i // a["height"], side="right") - 1
    limit = chunk_rows[chunk + 1] - chunk_rows[chunk]
    rows[i] = rogue(rng, 0, limit + 1, INT32)
    return rf": plan\[{first + i}\] = {rows[i]}, expected a value from 0 to {limit}(?!\d)"


def column(a, rng):
    if not a["columns"].size:
        return first_boundary(a, rng)
    limit = int(a["plan"][0])
    p = rng.integers(a["columns"].size)
    a["columns"][p] = rng.choice([limit + 1, limit + rng.integers(1, 100), 2**15, 2**16 - 1])
    return rf": columns\[{p}\] = {a['columns'][p]}, expected a value from 0 to {limit}(?!\d)"


def columns_all_random(a, rng):
    if not a["columns"].size:
        return first_boundary(a, rng)
    a["columns"] = rng.integers(a["plan"][0] + 1, 2**16, a["columns"].size).astype(np.uint16)
    return rf": columns\[0\] = {a['columns'][0]}, expected a value from 0 to {a['plan'][0]}(?!\d)"


def columns_size(a, rng):
    a["columns"] = np.zeros(other_size(rng, a["columns"].size), np.uint16)
    return r"expected (the number of steps that columns has|a multiple of 4)"


def values_size(a, rng):
    if "values" not in a:
        return columns_size(a, rng)
    size = a["values"].size
    a["values"] = np.zeros(other_size(rng, size), a["values"].dtype)
    return rf": values has shape \[\d+\], expected \[{size}\], the steps of the plan"


def per_output_size(a, rng):
    if "bias" not in a:
        return values_size(a, rng)
    name, size = ("scales", "bias")[rng.integers(2)], a["out_features"]
    a[name] = np.zeros(rng.choice([n for n in (size - 1, size + 1, 3 * size) if n]), np.float32)
    return rf": {name} has shape \[\d+\], expected \[{size}\], out_features, or \[0\]"


def rank(a, rng):
    names = [n for n in ("plan", "columns", "values", "scales", "bias") if n in a]
    name = names[rng.integers(len(names))]
    array = a[name]
    a[name] = [array[None], array[:, None], array.sum(dtype=array.dtype)][rng.integers(3)]
    return rf": {name} has shape"


def activation_size(a, rng):
    name = "x" if "x" in a else "dy"
    wrong = a[name].shape[-1] + int(rng.choice([-1, 1, 7]))
    a[name] = np.zeros((*a[name].shape[:-1], wrong), np.float32)
    return rf": {name} has shape .*, expected \[\.\.\., \d+\]"


def activation_scalar(a, rng):
    names = [n for n in ("x", "dy") if n in a]
    name = names[rng.integers(len(names))]
    a[name] = np.float32(1)
    return rf": {name} has shape \[\], expected"


def batch(a, rng):
    if "x" not in a or "dy" not in a:
        return activation_scalar(a, rng)
    a["dy"] = np.zeros((int(rng.integers(50, 60)), *a["dy"].shape), np.float32)
    return r": dy has shape .*, expected .*, x having shape"


def dtype(a, rng):
    name, wrong = [
        ("plan", np.int64),
        ("plan", np.float32),
        ("columns", np.int32),
        ("columns", np.int16),
        ("values", np.float64),
        ("values", np.uint8),
        ("values", np.int32),
        ("scales", np.float64),
        ("x", np.float64),
        ("dy", np.int32),
    ][rng.integers(10)]
    if name not in a:
        name, wrong = "columns", np.int64
    a[name] = a[name].astype(wrong)
    return r"expected to be|not in the list of allowed values|[Cc]annot compute|could not find"


def features(a, rng):
    name = ("in_features", "out_features")[rng.integers(2)]
    a[name] = int(rng.choice([2**31, 2**40, INT64.max, -1, -int(rng.integers(1, 2**40))]))
    if a[name] < 0:
        return rf"{name}' of -\d+ must be at least minimum 0"
    return rf": out_features = \d+ and in_features = \d+, expected a value from 0 to {INT32.max}"


def height(a, rng):
    a["height"] = int(rng.choice([-1, 0, 3, 5, 8, 32, 2**40] + [16] * (not a["shared"])))
    return r": height = \d+ and shared|height' of -?\d+ must be at least minimum 4"


def shared(a, rng):
    if not a["columns"].size:
        return height(a, rng)
    a["shared"] = not a["shared"]
    return r": height = 16 and shared = false|the number of steps that columns has"


def activation(a, rng):
    if "activation" not in a:
        return shared(a, rng)
    a["activation"] = ["tanh", "", "RELU"][rng.integers(3)]
    return r"activation' of \"\w*\" is not in the list of allowed values"


SPOILERS = [tile, other_tile, count, plan_size, first_boundary, last_boundary, inner_boundary, row,
            column, columns_all_random, columns_size, values_size, per_output_size, rank,
            activation_size, activation_scalar, batch, dtype, features, height, shared,
            activation]  # fmt: skip


def nonsense(library, calls, seed):
    """Makes `calls` calls with plans of consistent sizes, each of whose parts is sound or random bytes."""
    rng = np.random.default_rng(seed)
    accepted = refused = 0

    def bounds(size, last):
        return np.sort(np.r_[0, rng.integers(0, last + 1, max(size - 2, 0)), last])[-size:]

    for _ in range(calls):
        op, a, _ = problem(rng)
        bad = rng.random(6) < 0.1
        a["plan"][0] = tile_width = rng.integers(1, 4097) if rng.random() < 0.5 else a["plan"][0]
        chunk_rows = section(a, "chunk_rows")[1]
        chunks, tiles = chunk_rows.size - 1, -(-a["in_features"] // int(tile_width))
        slices = int(rng.integers(1, 9))
        steps = a["columns"].size // (1 if a["shared"] else a["height"])
        parts = [
            np.array([tile_width, chunks, slices]),
            chunk_rows,
            bounds(chunks * tiles + 1, slices),
            bounds(slices + 1, steps),
            rng.integers(0, np.diff(chunk_rows).min() + 1, slices * a["height"]),
        ]
        anything = [rng.integers(INT32.min, INT32.max, part.size, endpoint=True) for part in parts]
        parts = [r if is_bad else p for p, r, is_bad in zip(parts, anything, bad, strict=False)]
        a["plan"] = np.concatenate(parts).astype(np.int32)
        a["columns"] = rng.integers(0, 2**16 if bad[5] else tile_width + 1, a["columns"].size)
        a["columns"] = a["columns"].astype(np.uint16)
        if "values" in a:
            size = a["values"].nbytes
            a["values"] = np.frombuffer(rng.bytes(size), a["values"].dtype)
        try:
            result = getattr(library, op)(**a)
        except tf.errors.InvalidArgumentError:
            refused += 1
        else:
            accepted += 1
            want = {"mul": ("x", "out_features"), "_x": ("dy", "in_features")}
            for ending, (name, last) in want.items():
                if op.endswith(ending) and result.shape != (*a[name].shape[:-1], a[last]):
                    sys.exit(f"{op}: a result of shape {result.shape}")
    print(f"{calls} calls with nonsense: {accepted} accepted, {refused} refused")


if __name__ == "__main__":
    ops = tf.load_op_library(os.path.join(sys.argv[1], "_accel_tf_ops.so"))
    total, first_seed = int(sys.argv[2]), int(sys.argv[3])
    campaign(ops, total, first_seed, problem, SPOILERS)
    nonsense(ops, total // 4, first_seed)
