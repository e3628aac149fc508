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
# **Write a compiled TensorFlow op that skips the zeros of a pruned layer, and know beforehand how much time that saves.**
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
import tempfile

import keras
import matplotlib.pyplot as plt
import matplotlib_inline.backend_inline
import numpy as np
import tensorflow as tf
from myst_nb import glue

import accel_tf as at

plt.style.use("accel_tf.book")
matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
keras.utils.set_random_seed(0)

# %% [markdown]
# ## You will learn to
#
# - **store** a sparse matrix as CSR and multiply by it, in NumPy, in ten lines of C++, and in a real TensorFlow op;
# - **predict** the best speed-up that a sparsity allows, from its operations and its bytes;
# - **decide** when a pruned layer should stay dense.
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
# with $r$ the row pointers, $k$ the columns and $v$ the values: $2 \cdot \mathrm{nnz}$ floating-point operations for each sample,
# instead of $2KN$ for a kernel of $K$ inputs and $N$ outputs. If nothing else cost time, a layer of
# {term}`density` $d = \mathrm{nnz}/KN$ would be $1/d$ times as fast as the dense one. Something else does cost time, and in two
# very different ways. Let us build it and see.
#
# ## From scratch
#
# In NumPy, {eq}`eq-spmm` is a loop over the rows. To multiply a whole batch at once, we hold the activations with one row for
# each *input*; the columns then pick rows of it:


# %%
def to_csr(w):
    """Row pointers, columns, values of (inputs, outputs); a row per output."""
    rows, columns = np.nonzero(w.T)
    pointers = np.searchsorted(rows, np.arange(w.shape[1] + 1))
    return pointers, columns.astype(np.int32), w.T[rows, columns]


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
def random_kernel(inputs, outputs, sparsity):
    w = np.random.normal(size=(inputs, outputs)).astype(np.float32)
    return w * (np.random.random(w.shape) >= sparsity)


w = random_kernel(2048, 2048, sparsity=0.9)
x = np.random.normal(size=(64, 2048)).astype(np.float32)
csr = to_csr(w)
error = csr_matmul(x, *csr) - x @ w
print(f"largest difference: {np.abs(error).max():.1e}")

# %% [markdown]
# It does, up to rounding. The same loop in C++ is ten lines. We compile it here and call it with `ctypes`, to have something
# to compare with:

# %%
NAIVE = r"""
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
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "naive.cc").write_text(NAIVE)
compiler = ["g++", "-O3", "-shared", "-fPIC", "naive.cc", "-o", "naive.so"]
subprocess.run(compiler, cwd=folder, check=True)
naive_library = ctypes.CDLL(str(folder / "naive.so"))


# %%
def naive(x, pointers, columns, values):
    y = np.empty((len(x), len(pointers) - 1), np.float32)
    arrays = (x, pointers, columns, values, y)
    arrays = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    sizes = [ctypes.c_int64(size) for size in (*x.shape, y.shape[1])]
    naive_library.multiply(*sizes, *arrays)
    return y


csr = (csr[0].astype(np.int64), *csr[1:])
error = naive(x, *csr) - x @ w
print(f"largest difference: {np.abs(error).max():.1e}")

# %% [markdown]
# ## With `accel_tf`
#
# {py:class}`~accel_tf.sparse.SparseMatrix` holds the three arrays, and {py:func}`~accel_tf.sparse.sparse_matmul` is the op:

# %%
matrix = at.SparseMatrix.from_dense(w)
y = at.sparse_matmul(x, matrix)
matrix

# %% tags=["remove-cell"]
exact = x.astype(np.float64) @ w
magnitude = np.abs(x).astype(np.float64) @ np.abs(w)
for result in (y.numpy(), naive(x, *csr), csr_matmul(x, *csr)):
    assert (
        np.max(np.abs(result - exact) / magnitude) < 1e-5
    )  # prose: "the same up to rounding"
assert all(
    np.array_equal(a, b)
    for a, b in zip(
        csr, (matrix.row_pointers, matrix.columns, matrix.values), strict=True
    )
)

# %% [markdown]
# All of them agree with the product in double precision, up to rounding. They differ in time (median and
# interquartile range):

# %%
ladder = at.benchmark.measure_latency(
    {
        "NumPy loop": lambda x: csr_matmul(x, *csr),
        "ten lines of C++": lambda x: naive(x, *csr),
        "accel_tf": lambda x: at.sparse_matmul(x, matrix),
    },
    x,
    rounds=15,
    warmup=1,
    max_seconds=2,
    verbose=0,
)
at.report.Table(
    ["2048 × 2048, 90 % zeros", "batch of 64"],
    [[name, str(time)] for name, time in ladder.items()],
)

# %% tags=["remove-cell"]
gain = ladder["ten lines of C++"].median / ladder["accel_tf"].median
glue("gain", f"{gain:.0f}", display=False)
glue("isa", at.sparse.isa(), display=False)
assert at.sparse.isa() != "tensorflow"  # the compiled op runs
assert gain > 1.5  # prose: three changes make it times faster than the naive loop

# %% [markdown]
# The op is {glue:text}`gain` times faster than our C++ loop. Three things changed.
#
# **Vectors.** A core adds and multiplies 4, 8 or 16 floats in one instruction ({term}`SIMD`), if they lie side by side. In our
# loop they do not: `x[columns[p]]` jumps. The op first packs 32 samples so that the same input of all 32 lies side by side. Each
# non-zero then costs one broadcast and a few multiply-adds on whole vectors, with no jump in between:
#
# ```{literalinclude} ../custom_ops/kernels/generic.h
# :language: cpp
# :start-after: "// [sparse-row]"
# :end-before: "// [/sparse-row]"
# ```
#
# `Vec` is a set of instructions. This template is compiled once for each, plain C++ and AVX2 with {term}`FMA`, and the best that the
# processor can run is chosen when the op is first used: here {glue:text}`isa`.
#
# **Independent sums.** A multiply-add takes about four cycles, and two can start in every cycle. A single sum waits for itself;
# the eight of `even` and `odd` do not.
#
# **Threads.** Blocks of rows go to TensorFlow's own thread pool. A row belongs to one thread, so nothing is added up across
# threads, and the result has the same bits for any number of them.
#
# ### The op that TensorFlow sees
#
# Around the kernel stands a registration, which tells TensorFlow the inputs, the attributes and the shapes. Shapes matter: with them, a
# wrong product is refused while a graph is being *built*, and Keras knows the shape of the next layer.
#
# ```{literalinclude} ../custom_ops/tensorflow/ops.cc
# :language: cpp
# :start-at: REGISTER_OP("AccelTfSparseMatMul")
# :end-before: .Doc(
# ```
#
# An index out of range would read someone else's memory. So the op checks every pointer and column, on every call, and names the first
# that is wrong:

# %%
from accel_tf.sparse import _op

try:
    pointers = tf.constant([0, 2], tf.int64)
    _op.multiply(tf.ones([1, 3]), pointers, [0, 93], [1.0, 1.0], in_features=3)
except tf.errors.InvalidArgumentError as error:
    message = error.message.split("}} ")[-1].split(" [Op:")[0]
print(message)

# %% tags=["remove-cell"]
assert "columns[1] = 93, expected a value in [0, 3)" in message

# %% [markdown]
# Training needs two gradients. With $g = \partial L/\partial y$, the chain rule on {eq}`eq-spmm` gives
#
# $$
# \frac{\partial L}{\partial x_{bk}} = \sum_{p:\,k_p = k} v_p \, g_{b,\,n_p},
# \qquad
# \frac{\partial L}{\partial v_p} = \sum_b g_{b,\,n_p} \, x_{b,\,k_p}.
# $$ (eq-spmm-gradients)
#
# The first is the product with the transposed matrix. The second is an entry of the dense product $g^\top x$, but only where
# the pattern has a non-zero: a *sampled* dense–dense product {footcite}`gale2020sparse`. Both are ops of their own; neither ever forms the dense
# gradient. In Python they are tied to the first with `tf.RegisterGradient`, and then a tape just works:

# %%
inputs, values = tf.constant(x), matrix.values
with tf.GradientTape() as tape:
    tape.watch([inputs, values])
    y = at.sparse_matmul(inputs, matrix.with_values(values))
    loss = tf.reduce_mean(y**2)
dx, dvalues = tape.gradient(loss, [inputs, values])
dx.shape, dvalues.shape

# %% tags=["remove-cell"]
g = 2 * exact / exact.size
assert np.allclose(dx, g @ w.T.astype(np.float64), atol=1e-5)
assert np.allclose(dvalues, (x.T.astype(np.float64) @ g).T[w.T != 0], atol=1e-5)
assert dvalues.shape == (matrix.nnz,)

# %% [markdown]
# ## Measure
#
# **The bound first.** By the roofline of [](measure.py), {eq}`eq-roofline`, $F$ operations on $Q$ bytes take at least
# $\max(F/\pi,\, Q/\beta)$ on a machine of $\pi$ FLOP/s and $\beta$ bytes/s. There are two regimes:
#
# - *Large batch.* The weights are read once and used for many samples, so operations decide. The dense product does $2KN$ of
#   them for each sample, ours $2dKN$. The speed-up is **at most $1/d$**.
# - *Batch 1.* Each weight is read and used once, so bytes decide. A dense weight is 4 bytes; a sparse one is 8, a float32
#   value and an int32 column. The speed-up is **at most $1/(2d)$**, and below 50 % sparsity the sparse matrix is even the larger one.
#
# Both bounds hold against a dense product at its own bound, and both say *at most*: a sparse kernel does not reach the peak. It
# loads an input for each multiply-add, where a dense kernel keeps blocks of both factors in registers. The {term}`break-even`
# sparsity is where the two effects balance. We sweep the sparsity and look:


# %%
def speedup(sparsity, batch, size=2048):
    x = tf.random.normal((batch, size))
    w = random_kernel(size, size, sparsity)
    sparse, dense = at.SparseMatrix.from_dense(w), tf.constant(w)
    times = at.benchmark.measure_latency(
        {
            "dense": lambda x: tf.matmul(x, dense),
            "sparse": lambda x: at.sparse_matmul(x, sparse),
        },
        x,
        max_seconds=0.7,
        verbose=0,
    )
    return times["dense"].median / times["sparse"].median


sparsities = np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
speedups = {
    batch: np.array([speedup(s, batch) for s in sparsities]) for batch in (1, 64)
}

# %% mystnb={"image": {"alt": "Speed-up over the dense product against sparsity on logarithmic axes. The measured curves for batch 1 and batch 64 rise with sparsity, run below the dashed line of the ideal, one over density, and cross the horizontal break-even line where sparse begins to pay."}, "figure": {"caption": "How many times faster than `tf.matmul` the sparse product is, 2048 × 2048, on the machine that built this page. In the shaded half the dense product wins. Dashed and dotted: the bounds, $1/d$ and, for batch 1, $1/(2d)$.", "name": "fig-sparse-speedup"}} tags=["hide-input"]
density = 1 - sparsities
figure, axes = plt.subplots()
axes.axhspan(0.05, 1, color="#eeeeee", zorder=0)
axes.axhline(1, color="#555555", linewidth=1)
axes.plot(
    density, 1 / density, "--", color="#555555", linewidth=1.2, label="ideal $1/d$"
)
axes.plot(
    density, 1 / (2 * density), ":", color="#555555", linewidth=1.2, label="$1/(2d)$"
)
for (batch, values_), marker in zip(speedups.items(), "os", strict=True):
    axes.plot(density, values_, marker=marker, label=f"batch {batch}")
axes.set(xscale="log", yscale="log", xlim=(1.15, 0.016), ylim=(0.1, 60))
axes.set_xticks(density, [f"{s:.0%}" for s in sparsities])
axes.minorticks_off()
axes.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
axes.set(xlabel="sparsity (fraction of zeros)", ylabel="times faster than dense")
axes.annotate("dense wins", (1.05, 0.13), color="#555555")
axes.legend(loc="upper left")
plt.show()


# %% tags=["remove-cell"]
def break_even(values):
    """Where the curve crosses 1, interpolated in log density."""
    return 1 - np.exp(np.interp(0, np.log(values), np.log(density)))


at_ninety = {
    batch: values[list(sparsities).index(0.9)] for batch, values in speedups.items()
}
for batch in speedups:
    glue(f"speedup{batch}", f"{at_ninety[batch]:.1f}", display=False)
    glue(
        f"even{batch}",
        f"{100 * break_even(np.maximum.accumulate(speedups[batch])):.0f}",
        display=False,
    )
glue("efficiency", f"{at_ninety[64] * 0.1:.2f}", display=False)
assert speedups[64][-1] > 1  # prose: far above break-even, sparse wins
assert 0.1 < at_ninety[64] * 0.1 < 1  # prose: below the ideal, yet a good part of it
assert speedups[64][0] < 1 and speedups[1][0] < 1  # prose: without zeros dense wins
assert (
    speedups[64][-1] > speedups[64][0] and speedups[1][-1] > speedups[1][0]
)  # it grows with sparsity

# %% [markdown]
# At 90 % zeros and batch 64 the layer is {glue:text}`speedup64` times as fast, an *efficiency* (speed-up times density) of
# {glue:text}`efficiency` where 1 would be ideal. For one sample it is {glue:text}`speedup1` times. On this machine, the curves cross the break-even line near
# {glue:text}`even64` % for batch 64 and {glue:text}`even1` % for batch 1. Your processor will put them elsewhere; the shape stays.
#
# TensorFlow has a sparse product too, `tf.sparse.sparse_dense_matmul`. Here is the comparison at 90 % zeros (median and
# interquartile range):

# %%
coo, x_by_input = tf.sparse.from_dense(w.T), tf.constant(x.T)
peers = at.benchmark.measure_latency(
    {
        "accel_tf": lambda _: at.sparse_matmul(inputs, matrix),
        "tf.matmul": lambda _: tf.matmul(inputs, w),
        "tf.sparse": lambda _: tf.sparse.sparse_dense_matmul(coo, x_by_input),
    },
    None,
    rounds=15,
    warmup=1,
    max_seconds=2,
    verbose=0,
)
ours = peers["accel_tf"].median
at.report.Table(
    ["2048 × 2048, 90 % zeros", "batch of 64", "ratio"],
    [[name, str(t), f"{t.median / ours:.1f}"] for name, t in peers.items()],
)

# %% tags=["remove-cell"]
slower = peers["tf.sparse"].median / ours
glue("slower", f"{slower:.0f}", display=False)
assert slower > 1.5  # prose: faster than tf.sparse
assert peers["tf.sparse"].median > peers["tf.matmul"].median  # prose: it loses to dense

# %% [markdown]
# `tf.sparse` keeps COO, runs this product on one thread, and at 90 % zeros it still loses to the dense product: the reason why so many have
# concluded that pruning makes nothing faster. The op is {glue:text}`slower` times faster than that. `make bench` adds TensorFlow's
# CSRSparseMatrix and SciPy, and batches up to 512.
#
# :::{important}
# **Rule of thumb.** Sparse pays from about 80 % zeros, in layers of some hundred thousand weights or more. Below that, dense
# wins. Expect a quarter to a half of the bound, and measure.
# :::
#
# ## When it does not help
#
# **A few zeros.** The left half of {numref}`fig-sparse-speedup`: without zeros the sparse product is *slower*.
#
# **Small layers.** Calling any op from Python costs some ten microseconds, zeros or not. In a small layer that is all there is:

# %%
table = []
for size in (64, 256, 1024, 2048):
    gain = speedup(0.9, batch=64, size=size)
    table.append([f"{size} × {size}", size * size // 10, f"{gain:.2f}"])
at.report.Table(["90 % zeros", "weights left", "times faster"], table)

# %% tags=["remove-cell"]
gains = [float(row[2]) for row in table]
assert gains[0] < gains[-1]  # prose: a small layer gains less than a large one

# %% [markdown]
# **A compiler that does not know it.** XLA cannot look inside the op. Keras notices (`supports_jit` is false in the layer)
# and falls back; a bare `tf.function(jit_compile=True)` refuses it. And it runs on the CPU only.
#
# ## Use it in your project
#
# {py:func}`accel_tf.sparse.sparsify` does it for a whole model: `Dense` layers and 1 × 1 convolutions with enough zeros become
# {py:class}`~accel_tf.sparse.SparseDense`, the others stay, and a report says which and why.

# %%
model = keras.Sequential(
    [
        keras.Input((784,)),
        keras.layers.Dense(2048, activation="relu", name="wide"),
        keras.layers.Dense(2048, activation="relu", name="deep"),
        keras.layers.Dense(10, name="head"),
    ]
)
for name in ("wide", "deep"):  # in earnest, train with at.prune
    kernel = model.get_layer(name).kernel
    kernel.assign(random_kernel(*kernel.shape, sparsity=0.9) / 16)

fast = at.sparsify(model)
at.report_of(fast)

# %%
batch = np.random.random((64, 784)).astype(np.float32)
models = {"dense": model, "sparse": fast}
times = at.benchmark.measure_latency(models, batch, max_seconds=1, verbose=0)
at.report.Table(["model", "batch of 64"], [[n, str(t)] for n, t in times.items()])

# %% tags=["remove-cell"]
assert np.allclose(model(batch), fast(batch), rtol=1e-3, atol=1e-3)
assert [e.layer for e in at.report_of(fast).done] == ["wide", "deep"]
assert fast.get_layer("deep").matrix.nnz < 0.11 * 2048**2

# %% [markdown]
# The model trains on (only the values move, the pattern is fixed), and saves as `.keras` like any other. To copy:
#
# ```python
# import accel_tf as at
#
# at.prune(model, at.PolynomialDecay(final_sparsity=0.9, end_step=1000))
# model.compile("adam", "sparse_categorical_crossentropy")
# model.fit(x, y, epochs=5)
#
# fast = at.sparsify(model)        # a new model; at.report_of(fast) says what changed
# fast.save("fast.keras")          # loads wherever accel_tf is imported
# ```
#
# Pruning itself, and what it costs in accuracy, is the subject of [](pruning.py). The functions are described in the
# {py:mod}`API <accel_tf.sparse>`; the kernels are in `custom_ops/kernels`, and use nothing of TensorFlow.
#
# ## Takeaways
#
# - A dense product does not skip zeros. CSR does, with one pointer for each output and 8 bytes for each weight left.
# - The speed-up is at most $1/d$, or $1/(2d)$ at batch 1; vectors across the batch, independent sums and threads get a good part of it.
# - Below the break-even sparsity, and in small layers, keep the layer dense.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-sparse-1
# Many layers have fewer than 65,536 inputs, so a column fits in 16 bits. What is the bound on the speed-up at batch 1 then, and
# from which sparsity on is the matrix smaller than the dense one?
# :::
#
# :::{solution} ex-sparse-1
# :class: dropdown
# A weight takes 4 + 2 = 6 bytes instead of 8, against 4 for a dense one. The bound is $4/(6d) = 2/(3d)$: at $d = 0.1$ that is
# 6.7 instead of 5. The matrix is smaller when $6d < 4$, so from one third zeros on, instead of one half.
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


mine = sampled(2 * (x @ w) / (64 * 2048), x, csr[0], csr[1])
np.allclose(mine, dvalues, atol=1e-6)

# %% tags=["remove-cell"]
assert np.allclose(mine, dvalues, atol=1e-6)

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-sparse-3
# Force the plain C++ kernels by setting the environment variable `ACCEL_TF_ISA=scalar` before TensorFlow starts, and run the sweep
# again. How much of the speed-up was due to the vectors?
# :::
#
# :::{solution} ex-sparse-3
# :class: dropdown
# `ACCEL_TF_ISA=scalar make lab`, then run this page. Without AVX2 the compiler falls back to what every x86-64 processor has, and the
# curve of batch 64 drops by a factor of several: it crosses the break-even line only at a far higher sparsity, if at all.
# `at.sparse.available_isas()` lists what your processor can run.
# :::
#
# ## References
#
# ```{footbibliography}
# ```
