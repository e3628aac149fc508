# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A sparse product that is really faster
#
# **From ten lines of scalar C++ to SIMD, tiles, blocks and XLA: skip the zeros of a pruned layer, at nearly the speed of a dense product.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 15 minutes to read, under a minute to run · **You need** Keras, a little C++ · **Module** {py:mod}`accel_tf.sparse`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import ctypes
import pathlib
import subprocess
import sys
import tempfile

import keras
import matplotlib.pyplot as plt
import matplotlib_inline.backend_inline
import numpy as np
import scipy.sparse
import tensorflow as tf
from myst_nb import glue

import accel_tf as at

plt.style.use("accel_tf.book")
matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
keras.utils.set_random_seed(0)

# %% [markdown]
# ## You will learn to
#
# - **multiply** by a sparse matrix in NumPy, in ten lines of C++, and in ten others that are much faster;
# - **explain** by counting loads and bytes why tiles, blocks, and small weights make such a product fast;
# - **decide** from a measured curve when a pruned layer should stay dense.
#
# ## Intuition: store what is there
#
# A pruned kernel is full of zeros, yet `tf.matmul` multiplies by each of them, and at full speed: a dense product does not look.
# To skip the zeros, we have to stop storing them.
#
# The plain way is a list of triples, row, column and value, called *COO*. But the row number repeats for a whole row. *CSR*,
# {term}`compressed sparse rows <CSR>`, keeps only where each row begins {footcite}`saad2003iterative`:

# %% mystnb={"image": {"alt": "A four by five matrix with six coloured non-zeros; beside it the same six values as rows of COO triples, and as the three arrays of CSR, in which the row numbers have become five row pointers."}, "figure": {"caption": "One matrix, three ways to store it. In CSR the pointers say: row 0 is values 0–1, row 1 is empty, row 2 is values 2–4, row 3 is value 5.", "name": "fig-csr"}} tags=["hide-input"]
small = np.zeros((4, 5), np.int64)
small[[0, 0, 2, 2, 2, 3], [1, 4, 0, 2, 3, 2]] = [7, 2, 5, 1, 8, 3]
rows, columns = np.nonzero(small)
pointers = np.concatenate([[0], np.cumsum(np.count_nonzero(small, axis=1))])
shades = ["#0072B2", "#999999", "#D55E00", "#009E73"]

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), width_ratios=(1, 2.3))
for (i, j), value in np.ndenumerate(small):
    box = plt.Rectangle((j, -i), 1, 1, fc=shades[i] if value else "white", ec="#bbbbbb")
    left.add_patch(box)
    left.text(
        j + 0.5,
        -i + 0.5,
        value,
        ha="center",
        va="center",
        color="w" if value else "#bbbbbb",
    )
left.set(xlim=(0, 5), ylim=(-3, 1), aspect="equal", title="dense: 20 numbers")
lines = [
    ("COO row", rows, rows),
    ("column", columns, rows),
    ("value", small[rows, columns], rows),
]
lines += [("CSR pointer", pointers, None), *lines[1:]]
for y, (name, numbers, of_row) in enumerate(lines):
    y = -1.05 * y - (0.8 if y > 2 else 0)
    right.text(-0.2, y + 0.5, name, ha="right", va="center")
    for k, number in enumerate(numbers):
        shade = "#333333" if of_row is None else shades[of_row[k]]
        right.add_patch(plt.Rectangle((k, y), 0.94, 0.94, fc=shade))
        right.text(k + 0.47, y + 0.47, number, ha="center", va="center", color="w")
right.set(xlim=(-2.6, 6), ylim=(-6.1, 1), title="sparse: 18 or 17")
for axes in (left, right):
    axes.axis("off")
plt.show()

# %% tags=["remove-cell"]
assert list(pointers) == [0, 2, 2, 5, 6]
assert small.size == 20 and 3 * rows.size == 18 and pointers.size + 2 * rows.size == 17

# %% [markdown]
# We store one row for each *output* of the layer. Output $n$ of sample $b$ is then a sum over the non-zeros $p$ of row $n$ only,
#
# $$
# y_{bn} \;=\; \sum_{p \,=\, r_n}^{r_{n+1}-1} v_p \, x_{b,\,k_p}
# $$ (eq-spmm)
#
# with $r$ the row pointers, $k$ the columns and $v$ the values: $\mathrm{nnz}$ multiply-adds for each sample, instead of $KN$ for
# a kernel of $K$ inputs and $N$ outputs. If nothing else cost time, a layer of {term}`density` $d = \mathrm{nnz}/KN$ would be
# $1/d$ times as fast as the dense one. So let us call *efficiency* the measured speed-up times $d$: 1 is ideal. The whole chapter is
# about what stands between us and that 1.
#
# ## From scratch
#
# In NumPy, {eq}`eq-spmm` is a loop over the rows. We hold the activations with one row for each *input*; the columns then pick
# rows of it, for the whole batch at once:


# %%
def to_csr(w):
    """Row pointers, columns, values of (inputs, outputs); a row per output."""
    rows, columns = np.nonzero(w.T)
    pointers = np.searchsorted(rows, np.arange(w.shape[1] + 1))
    return pointers.astype(np.int64), columns.astype(np.int32), w.T[rows, columns]


def csr_matmul(x, pointers, columns, values):
    y = np.zeros((len(x), len(pointers) - 1), np.float32)
    x_by_input = np.ascontiguousarray(x.T)
    for n in range(len(pointers) - 1):
        row = slice(pointers[n], pointers[n + 1])
        y[:, n] = values[row] @ x_by_input[columns[row]]
    return y


# %% [markdown]
# Does it give what a dense product gives, on a kernel with 90 % zeros?


# %%
def random_kernel(size, sparsity, block=1):
    """Zeros in blocks of `block` outputs; scaled so that activations stay as large as they are."""
    kept = np.random.random((size, size // block)) >= sparsity
    w = np.random.normal(size=(size, size)) * np.repeat(kept, block, axis=1)
    return (w / np.sqrt(size * (1 - sparsity))).astype(np.float32)


w = random_kernel(2048, sparsity=0.9)
x = np.random.normal(size=(128, 2048)).astype(np.float32)
csr = to_csr(w)
error = csr_matmul(x, *csr) - x @ w
print(f"largest difference: {np.abs(error).max():.1e}")

# %% [markdown]
# It does, up to rounding. The same loop in C++ is ten lines:

# %%
SCALAR = r"""
#include <cstdint>
extern "C" void multiply(int64_t batch, int64_t K, int64_t N, const float* x,
                         const int64_t* pointers, const int32_t* columns,
                         const float* values, float* y) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < N; ++n) {
      float sum = 0;
      for (int64_t p = pointers[n]; p < pointers[n + 1]; ++p)
        sum += values[p] * x[b * K + columns[p]];
      y[b * N + n] = sum;
    }
}"""

# %% [markdown]
# Count what one multiply-add costs here: *three loads*, the weight, its column and an input. A core can start about as many loads in a
# cycle as multiply-adds, so most of the time the arithmetic waits. The input is picked from anywhere, and so
# these are single numbers, not vectors. Each sum waits for its last multiply-add, some four cycles. And every sample reads all
# weights again.
#
# Now turn the loops around. The batch goes to the *inside*, with the same input of 32 samples side by side. One weight then meets 32
# numbers that lie together, which is what {term}`SIMD` is for:

# %%
VECTORS = r"""
#include <cstdint>
extern "C" void multiply(int64_t batch, int64_t K, int64_t N, const float* x,
                         const int64_t* pointers, const int32_t* columns,
                         const float* values, float* y) {  // x: (K, batch), y: (N, batch)
  for (int64_t b = 0; b < batch; b += 32)
    for (int64_t n = 0; n < N; ++n) {
      float sum[32] = {};
      for (int64_t p = pointers[n]; p < pointers[n + 1]; ++p) {
        const float* column = x + columns[p] * batch + b;
        for (int i = 0; i < 32; ++i) sum[i] += values[p] * column[i];
      }
      for (int i = 0; i < 32; ++i) y[n * batch + b + i] = sum[i];
    }
}"""

# %% [markdown]
# We compile both, and call them with `ctypes`:

# %%
folder = pathlib.Path(tempfile.mkdtemp())


def compiled(name, source):
    (folder / f"{name}.cc").write_text(source)
    flags = ["-O2", "-march=native", "-shared", "-fPIC"]
    command = ["g++", *flags, f"{name}.cc", "-o", f"{name}.so"]
    subprocess.run(command, cwd=folder, check=True)
    multiply = ctypes.CDLL(str(folder / f"{name}.so")).multiply

    def call(x, shape, y_shape, *csr):
        y = np.empty(y_shape, np.float32)
        sizes = [ctypes.c_int64(n) for n in (*shape, len(csr[0]) - 1)]
        multiply(*sizes, *(ctypes.c_void_p(a.ctypes.data) for a in (x, *csr, y)))
        return y

    return call


scalar, vectors = compiled("scalar", SCALAR), compiled("vectors", VECTORS)


def scalar_matmul(x, *csr):
    return scalar(x, x.shape, (len(x), len(csr[0]) - 1), *csr)


def vector_matmul(x, *csr):
    y = vectors(np.ascontiguousarray(x.T), x.shape, (len(csr[0]) - 1, len(x)), *csr)
    return np.ascontiguousarray(y.T)


# %% [markdown]
# ## With `accel_tf`
#
# {py:class}`~accel_tf.sparse.SparseMatrix` holds the matrix, in one of several formats, and {py:func}`~accel_tf.sparse.sparse_matmul` is
# the op. A bias and a ReLU ride along at next to no cost:

# %%
matrix = at.SparseMatrix.from_dense(w, format="unstructured")
y = at.sparse_matmul(x, matrix, bias=np.ones(2048, np.float32), activation="relu")
matrix

# %% tags=["remove-cell"]
exact = x.astype(np.float64) @ w
magnitude = np.abs(x).astype(np.float64) @ np.abs(w)
for result in (
    at.sparse_matmul(x, matrix).numpy(),
    scalar_matmul(x, *csr),
    vector_matmul(x, *csr),
    csr_matmul(x, *csr),
):  # prose: all agree up to rounding
    assert np.max(np.abs(result - exact) / magnitude) < 1e-5
assert np.allclose(y, np.maximum(exact + 1, 0), atol=1e-4)
arrays = (matrix.row_pointers, matrix.columns, matrix.values)
assert all(np.array_equal(a, b) for a, b in zip(csr, arrays, strict=True))

# %% [markdown]
# All of them agree with the product in double precision, up to rounding. They differ in time (median and interquartile range):

# %%
ladder = at.measure_latency(
    {
        "NumPy loop": lambda x: csr_matmul(x, *csr),
        "ten lines of C++": lambda x: scalar_matmul(x, *csr),
        "loops turned around": lambda x: vector_matmul(x, *csr),
        "accel_tf": lambda x: at.sparse_matmul(x, matrix),
    },
    x,
    rounds=9,
    warmup=1,
    max_seconds=1,
    verbose=0,
)
at.report.Table(
    ["2048 × 2048, 90 % zeros", "batch of 128"],
    [[name, str(time)] for name, time in ladder.items()],
)

# %% tags=["remove-cell"]
medians = {name: time.median for name, time in ladder.items()}
turned = medians["ten lines of C++"] / medians["loops turned around"]
gain = medians["ten lines of C++"] / medians["accel_tf"]
glue("turned", f"{turned:.0f}", display=False)
glue("gain", f"{gain:.0f}", display=False)
glue("isa", at.sparse.isa(), display=False)
assert at.sparse.isa() != "tensorflow"  # the compiled op runs
assert turned > 1.2 and gain > 2  # prose: times faster
# prose: no slower at the very least, as cores that others use add noise
assert medians["accel_tf"] < 1.3 * medians["loops turned around"]

# %% [markdown]
# Turning the loops around made our C++ {glue:text}`turned` times faster. The op is {glue:text}`gain` times faster than where we began. It uses all
# cores, but that is not the whole story. What else does it do?
#
# ### Tiles: keep the inputs close
#
# Vectors brought a new problem. The inputs of 32 samples take 128 bytes for each column, 256 KB for 2,048 columns. The fast L1 cache of a
# core holds 32 or 48, so most vectors come from farther away. So the matrix is cut into *tiles* of some hundred columns, and what
# belongs to one tile is done before the next. In a tile, a row has but a few non-zeros left, and short loops waste time at their ends.
# So four rows go *in step*, as a *slice*: one loop, and four sums that do not wait for each other. Rows of unequal length would have to
# wait, so they are sorted first, and the little that is missing is padded. With the sorting and the slices, this is the format
# {term}`SELL-C-σ` {footcite}`kreutzer2014unified`:

# %% mystnb={"image": {"alt": "Left, an 8 by 12 matrix whose rows have one colour each, cut into two tiles of six columns. Right, its non-zeros packed: for each tile, two slices of four lanes, their rows sorted from the longest to the shortest, so that few grey cells of padding remain."}, "figure": {"caption": "A matrix of eight rows, cut into two tiles. In each, the rows are sorted by length and go in step, four at a time; numbers are columns, counted from the start of the tile. Grey cells are padding; four rows at a time make a slice.", "name": "fig-slices"}} tags=["hide-input"]
rng = np.random.default_rng(5)
pattern = rng.random((8, 12)) < np.linspace(0.12, 0.5, 8)[rng.permutation(8), None]
shades = ["#0072B2", "#E69F00", "#009E73", "#D55E00"]
shades += ["#56B4E9", "#CC79A7", "#8C6D31", "#555555"]


def cell(axes, x, y, shade, text=""):
    axes.add_patch(plt.Rectangle((x, -y), 0.94, 0.94, fc=shade, ec="none"))
    axes.text(x + 0.47, 0.47 - y, text, ha="center", va="center", color="w", size=8)


figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.1), width_ratios=(12, 13))
for i, j in np.ndindex(pattern.shape):
    cell(left, j, i, shades[i] if pattern[i, j] else "#f4f4f4")
left.plot([5.97, 5.97], [-7.3, 1.2], color="#333333")
stored = 0
for tile in range(2):
    part = pattern[:, 6 * tile : 6 * tile + 6]
    order = np.argsort(-part.sum(axis=1), kind="stable")
    left.text(6 * tile + 3, 1.3, f"tile {tile}", ha="center")
    right.text(6 * tile + 2, 1.3, f"tile {tile}", ha="center")
    for k, y in enumerate((0, 4.6)):
        right.text(
            6 * tile - 0.3,
            -y - 1.5,
            f"slice {k}",
            rotation=90,
            ha="right",
            va="center",
            size=8,
        )
    for lane, row in enumerate(order[part[order].any(axis=1)]):
        columns = np.flatnonzero(part[row])
        steps = part[order[lane - lane % 4]].sum()
        stored += steps
        for p in range(steps):
            inside = p < columns.size
            y = lane + lane // 4 * 0.6
            cell(
                right,
                6 * tile + p,
                y,
                shades[row] if inside else "#cccccc",
                columns[p] if inside else "",
            )
left.set(xlim=(-0.2, 12.2), ylim=(-8, 2.2), aspect="equal")
right.set(xlim=(-1.5, 11.5), ylim=(-8, 2.2), aspect="equal")
for axes in (left, right):
    axes.axis("off")
plt.show()

# %% tags=["remove-cell"]
from accel_tf.sparse import _layout

packed = _layout.pack(
    np.concatenate([[0], np.cumsum(pattern.sum(axis=1))]),
    np.nonzero(pattern)[1],
    (12, 8),
    tile=6,
)
# Lanes without a row are stored as well, and not drawn.
assert np.count_nonzero(packed.order >= 0) == pattern.sum() <= stored
assert stored <= packed.order.size

# %% [markdown]
# A step of a slice is this, the innermost loop of everything that follows. `Step` calls itself for each of the four rows, and the
# compiler writes them out one after the other:
#
# ```{literalinclude} ../custom_ops/kernels/generic_multiply.h
# :language: cpp
# :start-after: "// [sparse-step]"
# :end-before: "// [/sparse-step]"
# ```
#
# `Vec` is a set of instructions. This template is compiled once for each, from plain C++ to AVX-512, and the best that the
# processor can run is chosen when the op is first used: here {glue:text}`isa`. A column is an offset in its tile, so 16 bits are
# enough: four weights have their columns in one load.
#
# ### Blocks: load once, use four times
#
# Count again. Each `MultiplyAdd` ({term}`FMA`) needs a `Load` of a vector of inputs, as each row has columns of its own. So the loads
# set the pace. But if the *four rows of a slice have the same columns*, one load serves four multiply-adds:
#
# ```{literalinclude} ../custom_ops/kernels/generic_multiply.h
# :language: cpp
# :start-after: "// [block-step]"
# :end-before: "// [/block-step]"
# ```
#
# Now arithmetic is the limit, as it is in a dense product. That is the format `"4x1"`: blocks of four outputs that share an input. The zeros have to
# come in blocks as well, which leaves pruning less choice and may cost accuracy at the same sparsity {footcite}`mao2017regularity`. {py:func}`accel_tf.pruning.prune` picks
# single weights ([](pruning.py)); blocks are for a pruning of your own.
#
# ## Measure: how near to ideal?
#
# **The bound first.** For a batch of 128 the weights are read once and used many times, so multiply-adds decide: the speed-up is **at most
# $1/d$** over a dense product that is as good. To time the products and not the calls from Python, eight of them make a chain in one
# `tf.function`, each working on what the last one gave:


# %%
def race(products, x, length=8, seconds=0.3):
    """The median time of each product in seconds, all in turns."""

    def chain(product):
        def run(x):
            for _ in range(length):
                x = product(x)
            return x

        signature = tf.TensorSpec(x.shape)
        return tf.function(run, autograph=False).get_concrete_function(signature)

    chains = {name: chain(product) for name, product in products.items()}
    times = at.measure_latency(chains, x, warmup=2, max_seconds=seconds, verbose=0)
    return {name: time.median / length for name, time in times.items()}


# %%
def speedup(sparsity, size=1024, batch=128):
    """How many times as fast as tf.matmul the two formats are."""
    scattered, blocks = (random_kernel(size, sparsity, block) for block in (1, 4))
    dense = tf.constant(scattered)
    unstructured = at.SparseMatrix.from_dense(scattered, format="unstructured")
    by_four = at.SparseMatrix.from_dense(blocks, format="4x1")
    times = race(
        {
            "dense": lambda x: tf.matmul(x, dense),
            "unstructured": lambda x: at.sparse_matmul(x, unstructured),
            "4x1": lambda x: at.sparse_matmul(x, by_four),
        },
        tf.random.normal((batch, size)),
    )
    return times["dense"] / np.array([times["unstructured"], times["4x1"]])


sparsities = np.array([0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
speedups = np.array([speedup(s) for s in sparsities])

# %% mystnb={"image": {"alt": "Speed-up over the dense product against sparsity, on logarithmic axes. Both measured curves rise with sparsity, along and below the dashed line of the ideal, one over density; blocks of four by one run nearer to it than scattered weights."}, "figure": {"caption": "How many times faster than `tf.matmul` a sparse product is, for a batch of 128 and 1024 × 1024 weights, on the machine that built this page. In the shaded part dense wins. Dashed: the ideal, $1/d$.", "name": "fig-sparse-speedup"}} tags=["hide-input"]
density = 1 - sparsities
figure, axes = plt.subplots()
axes.axhspan(0.5, 1, color="#eeeeee", zorder=0)
axes.axhline(1, color="#555555", linewidth=1)
axes.plot(density, 1 / density, "--", color="#555555", label="ideal $1/d$")
axes.plot(density, speedups[:, 1], marker="s", label="blocks 4×1")
axes.plot(density, speedups[:, 0], marker="o", label="unstructured")
axes.set(xscale="log", yscale="log", xlim=(0.57, 0.0175), ylim=(0.6, 60))
axes.set_xticks(density, [f"{s:.0%}" for s in sparsities])
axes.minorticks_off()
axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
axes.set(xlabel="sparsity (fraction of zeros)", ylabel="times faster than tf.matmul")
axes.annotate("dense wins", (0.55, 0.7), color="#555555")
axes.legend(loc="upper left")
plt.show()

# %% tags=["remove-cell"]
at_ninety = speedups[list(sparsities).index(0.9)]
for name, value in zip("u4", at_ninety, strict=True):
    glue(f"speed_{name}", f"{value:.1f}", display=False)
    glue(f"efficiency_{name}", f"{value * 0.1:.2f}", display=False)
assert at_ninety[1] > 2 and at_ninety[0] > 1.3  # prose: both beat tf.matmul by far
assert (
    0.2 * speedups[list(sparsities).index(0.8), 1] > 0.25
)  # prose: a good part of 1/d
assert np.all(speedups[-1] > speedups[0])  # it grows with sparsity
efficiency = speedups * density[:, None]
assert np.all(efficiency[-1] < efficiency.max(axis=0))  # prose: farther from ideal
assert np.all(
    np.median(efficiency, axis=0) < 1.5
)  # alt text: along and below, but for noise
assert np.prod(speedups[:, 1] / speedups[:, 0]) > 1  # alt text: blocks are nearer

# %% [markdown]
# At 90 % zeros, scattered weights run {glue:text}`speed_u` times as fast as `tf.matmul`, an efficiency of
# {glue:text}`efficiency_u`; blocks {glue:text}`speed_4` times, {glue:text}`efficiency_4`. The more zeros, the farther from ideal: packing
# the inputs and writing the outputs takes the same time however few weights are left.
#
# What do other sparse products do? All get the same matrix, and the sparse peers the transposed activations that they want, for free:

# %%
transposed = scipy.sparse.csr_matrix(w.T)
coo, dense, inputs = tf.sparse.from_dense(w.T), tf.constant(w), tf.constant(x)
times = race(
    {
        "accel_tf": lambda x: at.sparse_matmul(x, matrix),
        "tf.matmul": lambda x: tf.matmul(x, dense),
    },
    inputs,
)
product = {"tf.sparse": lambda x: tf.sparse.sparse_dense_matmul(coo, x)}
times |= race(product, tf.transpose(inputs), length=1)
x_by_input = np.ascontiguousarray(x.T)
product = {"SciPy, one thread": lambda x: transposed @ x}
times["SciPy, one thread"] = at.measure_latency(
    product, x_by_input, warmup=2, max_seconds=0.4, verbose=0
)["SciPy, one thread"].median
at.report.Table(
    ["2048 × 2048, 90 % zeros, batch of 128", "µs", "ratio"],
    [[n, f"{1e6 * t:.0f}", f"{t / times['accel_tf']:.1f}"] for n, t in times.items()],
)

# %% tags=["remove-cell"]
slower = times["tf.sparse"] / times["accel_tf"]
glue("slower", f"{slower:.0f}", display=False)
assert slower > 3  # prose: many times faster than tf.sparse
assert times["tf.sparse"] > times["tf.matmul"]  # prose: it loses to dense

# %% [markdown]
# `tf.sparse` keeps COO, and at 90 % zeros it still loses to the dense product: the reason why so many have concluded that pruning makes
# nothing faster. The op is {glue:text}`slower` times as fast as that.
#
# ### A single sample: count bytes
#
# With a batch of 1, each weight is read, used once, and thrown away. Memory decides then, not arithmetic: by the roofline of
# [](measure.py), {eq}`eq-roofline`, the time is at least bytes over bandwidth. A dense weight is 4 bytes. What is a sparse one? A
# float32 and its 16-bit column make 6, and the bound is $4/(6d)$. {py:meth}`~accel_tf.sparse.SparseMatrix.quantize` makes
# the weights int8, with a scale for each output. A block shares one column among its weights, in a 16×1 block among sixteen:

# %%
ones, fours, sixteens = (random_kernel(2048, 0.9, block) for block in (1, 4, 16))
single = {
    "unstructured": at.SparseMatrix.from_dense(ones, format="unstructured"),
    "4x1": at.SparseMatrix.from_dense(fours, format="4x1"),
    "16x1": at.SparseMatrix.from_dense(sixteens, format="16x1"),
}
single |= {f"{name}, int8": matrix.quantize() for name, matrix in single.items()}


def product_with(matrix):
    return lambda x: at.sparse_matmul(x, matrix)


large = tf.constant(ones)
times = race(
    {"dense": lambda x: tf.matmul(x, large)}
    | {name: product_with(matrix) for name, matrix in single.items()},
    tf.random.normal((1, 2048)),
)
size = {name: matrix.nbytes / matrix.nnz for name, matrix in single.items()}
at.report.Table(
    ["2048 × 2048, 90 % zeros, batch 1", "bytes per weight", "bound", "times faster"],
    [
        [n, f"{b:.2f}", f"{4 / b * 10:.1f}", f"{times['dense'] / times[n]:.1f}"]
        for n, b in size.items()
    ],
)

# %% tags=["remove-cell"]
assert 6 < size["unstructured"] < 6.6 and 4.5 < size["4x1"] < 4.9
assert 3 < size["unstructured, int8"] < 3.6 and size["16x1, int8"] < 1.4  # prose
rounded = at.sparse_matmul(x, matrix.quantize())
error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
glue("int8_error", f"{100 * error:.1f}", display=False)
assert error < 0.02  # prose
assert times["16x1, int8"] < times["unstructured"]  # prose: blocks beat scattered
assert times["16x1, int8"] < 0.8 * times["dense"]
assert times["dense"] / times["16x1, int8"] < 25  # prose: far behind the bound

# %% [markdown]
# The fewest bytes are those of int8 in 16×1 blocks, a bit more than one for each weight, and blocks beat scattered weights here, too. (The little
# over 6, 3 and so on is the plan: which rows are in which slice.) But the smaller the weights, the farther behind its bound is the product: they
# now lie in a cache near the core, where bytes come fast and instructions count again. The bound is for models that do not fit one.
# For the matrix of the previous sections, int8 weights change the output by {glue:text}`int8_error` %.
#
# ## What makes it an op
#
# ### Threads that change nothing
#
# A row belongs to one thread, which sums it up in a fixed order. So nothing is added across threads, and the result has the same bits for
# any number of them. Let another process, which has one thread, compute what this one does:

# %%
np.savez(folder / "data.npz", w=w, x=x)
PROGRAM = """
import numpy as np, tensorflow as tf, accel_tf as at
tf.config.threading.set_intra_op_parallelism_threads(1)
data = np.load("data.npz")
matrix = at.SparseMatrix.from_dense(data["w"], format="unstructured")
np.save("one_thread.npy", at.sparse_matmul(data["x"], matrix))
"""
command = [sys.executable, "-c", PROGRAM]
subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
y = at.sparse_matmul(x, matrix)
print("the same bits:", np.array_equal(y, np.load(folder / "one_thread.npy")))

# %% tags=["remove-cell"]
assert np.array_equal(y, np.load(folder / "one_thread.npy"))  # prose: the same bits

# %% [markdown]
# ### Gradients over the same slices
#
# With $g = \partial L/\partial y$, the chain rule on {eq}`eq-spmm` gives
#
# $$
# \frac{\partial L}{\partial x_{bk}} = \sum_{p:\,k_p = k} v_p \, g_{b,\,n_p},
# \qquad
# \frac{\partial L}{\partial v_p} = \sum_b g_{b,\,n_p} \, x_{b,\,k_p}.
# $$ (eq-spmm-gradients)
#
# The first is the product with the transposed matrix; the second a *sampled* dense–dense product {footcite}`gale2020sparse`,
# $g^\top x$ where the pattern has a non-zero. Neither needs an index of its own: for the first, a thread takes a *tile* instead of a
# chunk of rows, and adds up the gradients of its inputs, which stay in the L1 cache. So no transposed matrix is ever stored, and a
# tape just works:


# %%
def gradients(product, *sources):
    with tf.GradientTape() as tape:
        tape.watch(sources)
        loss = tf.reduce_sum(product(*sources) ** 2)
    return tape.gradient(loss, sources)


dx, dvalues = gradients(
    lambda x, v: at.sparse_matmul(x, matrix.with_values(v)), inputs, matrix.values
)
dense_dx, dw = gradients(tf.matmul, inputs, dense)
rows, columns = np.nonzero(w.T)
dvalues_of_dense = dw.numpy()[columns, rows]
print("inputs agree:", np.allclose(dx, dense_dx, rtol=1e-3, atol=1e-3))
print("weights agree:", np.allclose(dvalues, dvalues_of_dense, rtol=1e-3, atol=1e-3))

# %% tags=["remove-cell"]
assert np.allclose(dx, dense_dx, rtol=1e-3, atol=1e-3)
assert np.allclose(dvalues, dw.numpy()[columns, rows], rtol=1e-3, atol=1e-3)
assert dvalues.shape == (matrix.nnz,)

# %% [markdown]
# ### What TensorFlow and XLA see
#
# A registration tells TensorFlow the inputs, the attributes and the shapes, so that a wrong product is refused while a graph is being
# *built*, and Keras knows the shape of the next layer:
#
# ```{literalinclude} ../custom_ops/tensorflow/ops.cc
# :language: cpp
# :start-at: REGISTER_OP("AccelTfSparseMatMul")
# :end-before: .Doc(
# ```
#
# An index out of range would read someone else's memory, so every plan and column is checked, on every call.
# For {term}`XLA` a second registration lowers the op to a *custom call*. XLA fuses what is around it, and calls our kernels for the
# product:


# %%
@tf.function(jit_compile=True)
def under_xla(x):
    return at.sparse_matmul(x, matrix)


hlo = under_xla.experimental_get_compiler_ir(inputs)(stage="hlo")
(line,) = [line for line in hlo.splitlines() if "custom-call(" in line]
print(*line.split(", metadata")[0].strip().split("(", 1), sep="(\n    ")
print("the same bits:", np.array_equal(under_xla(inputs), y))

# %% tags=["remove-cell"]
assert np.array_equal(under_xla(inputs), y)  # prose: the same bits
assert 'custom_call_target="AccelTfSparseMatMul"' in line

# %% [markdown]
# The three tensors after the activations are the plan, the 16-bit columns and the values; the bias and the scales are
# empty here. The result has the same bits again.
#
# ## When it does not help
#
# **A few zeros.** Below about half, the gain is small at best, and a matrix without zeros gains nothing: its columns are so much extra work.
# **Small layers.** A call has its price, zeros or not, and in a small layer that is nearly all there is:

# %%
small_layers = {size: speedup(0.9, size) for size in (32, 128, 1024)}
no_zeros = speedup(0.0)
table = [
    [f"{n} × {n}, 90 %", *(f"{x:.2f}" for x in g)] for n, g in small_layers.items()
]
table.append(["1024 × 1024, no zeros", *(f"{x:.2f}" for x in no_zeros)])
at.report.Table(["times faster than tf.matmul", "unstructured", "4x1"], table)

# %% tags=["remove-cell"]
# Speed-ups vary by half on a busy machine, so each is compared with one that is several times as large.
assert np.all(no_zeros < 0.6 * small_layers[1024])  # prose: gains nothing
assert small_layers[32][1] < small_layers[1024][1]  # prose: small layers gain less

# %% [markdown]
# **What is not a product with weights.** In a network whose time goes into convolutions that stay dense, or into moving data, the best
# sparse layer changes little. How {py:func}`~accel_tf.sparse.sparsify` weighs all this, layer by layer, is the subject of [](sparse_networks.py). And
# the op runs on the CPU only.
#
# :::{important}
# **Rule of thumb.** Below 50 % zeros, stay dense. From there on, measure; from 80 %, expect about half of $1/d$ in layers of a
# million weights, more of it with blocks, less in small layers.
# :::
#
# ## Use it in your project
#
# For a whole model, prune and call `sparsify`; for a layer of your own, the op is a function like any other:
#
# ```python
# import accel_tf as at
#
# fast = at.sparsify(model, batch_size=64)       # a new model; at.report_of(fast) says what changed
#
# matrix = at.SparseMatrix.from_dense(kernel)    # takes the format expected to be the fastest
# y = at.sparse_matmul(x, matrix, bias=bias, activation="relu")
# tiny = matrix.quantize()                       # int8, for single samples
# at.sparse.tune()                               # measures what the kernels cost on this machine
# ```
#
# {py:class}`~accel_tf.sparse.SparseDense` is the layer around it: the pattern is fixed, the values train. Pruning itself, and what it costs in
# accuracy, is the subject of [](pruning.py). The functions are described in the {py:mod}`API <accel_tf.sparse>`; the kernels are
# in `custom_ops/kernels`, use nothing of TensorFlow, and `make bench` measures them on many more shapes.
#
# ## Takeaways
#
# - Skipping zeros is easy; doing it at full speed means counting loads. The batch inside makes vectors, tiles keep
#   them in the L1 cache, and blocks load once for four multiply-adds.
# - For a batch the bound is $1/d$. For one sample it is in bytes, and int8 weights in blocks take the fewest.
# - One format serves the product and both gradients, under XLA too, with the same bits for any number of threads.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-sparse-1
# From which sparsity on is an unstructured int8 matrix smaller than a dense one in float32? In int8? And one in 16×1 blocks, in int8?
# Leave the plan out.
# :::
#
# :::{solution} ex-sparse-1
# :class: dropdown
# A weight takes $1 + 2 = 3$ bytes, less than the 4 of float32 even with no zeros at all. Against int8, $3d < 1$, so from two thirds
# on. In 16×1 blocks it takes $1 + 2/16$ bytes, and $1.125\,d < 1$ from 11 % zeros on.
# :::
#
# :::{exercise}
# :label: ex-sparse-2
# Write the gradient with respect to the values, the right half of {eq}`eq-spmm-gradients`, in NumPy without a loop over
# the batch and without the dense $g^\top x$. Check it against `dvalues` above.
# :::
#
# :::{solution-start} ex-sparse-2
# :class: dropdown
# :::


# %%
def sampled(g, x, pointers, columns):
    d = np.empty(len(columns), np.float32)
    for n in range(len(pointers) - 1):
        row = slice(pointers[n], pointers[n + 1])
        d[row] = g[:, n] @ x[:, columns[row]]
    return d


mine = sampled(2 * (x @ w), x, csr[0], csr[1])
np.allclose(mine, dvalues, rtol=1e-3, atol=1e-3)

# %% tags=["remove-cell"]
assert np.allclose(mine, dvalues, rtol=1e-3, atol=1e-3)

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-sparse-3
# Does the sorting pay? For `w` and tiles of 256 columns, compute the share of padding with rows in their order, and with rows sorted by
# their number of non-zeros in the tile.
# :::
#
# :::{solution-start} ex-sparse-3
# :class: dropdown
# :::


# %%
def padding(lengths):
    """The share of padding where four rows at a time, of each tile, go in step."""
    steps = lengths.reshape(len(lengths), -1, 4).max(axis=2)
    return 1 - lengths.sum() / (4 * steps.sum())


lengths = np.count_nonzero(w.reshape(8, 256, 2048), axis=1)  # (tile, row)
unsorted, ordered = padding(lengths), padding(np.sort(lengths, axis=1))
print(f"{unsorted:.1%} in their order, {ordered:.1%} sorted")

# %% tags=["remove-cell"]
assert unsorted > 0.1 and ordered < 0.03

# %% [markdown]
# :::{solution-end}
# :::
#
# ## References
#
# ```{footbibliography}
# ```
