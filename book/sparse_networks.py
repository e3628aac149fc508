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
# # Sparse networks, from end to end
#
# **Prune a network and run it faster than XLA runs the dense one; then let the same product carry twenty labels through a graph to
# 1,777 digits that have none.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 15 minutes to read, under a minute to run · **You need** [](pruning.py), [](sparse_matmul.py) · **Module** {py:mod}`accel_tf.sparse`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import matplotlib.pyplot as plt
import matplotlib_inline.backend_inline
import numpy as np
import scipy.sparse
import sklearn.neighbors
import sklearn.svm
import tensorflow as tf
from myst_nb import glue

import accel_tf as at

plt.style.use("accel_tf.book")
matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
keras.utils.set_random_seed(0)

# %% [markdown]
# ## You will learn to
#
# - **take** a network from `prune` to a measured gain, and read in the report which layers gain and why;
# - **multiply** two sparse matrices, and raise one to a power with few products;
# - **choose** between the power of a matrix and a walk along it, by counting operations first.
#
# ## Intuition: where the brackets go
#
# A network is a chain of products. The activations in between fix the order: from the input to the output, one layer after the
# other. If each layer is sparse, so is all the work.
#
# Take the activations away and let all layers share one matrix, and you have a walk on a graph: $A_{ij}$ is the weight of the edge
# from node $i$ to node $j$, and $x A^k$ is what $x$ becomes after $k$ hops. Now the order is free. From left to right, each hop
# costs one product with a sparse matrix of $\mathrm{nnz}(A)$ non-zeros; or we form the power first:
#
# $$
# \underbrace{(\cdots((x A) A) \cdots) A}_{k \,\cdot\, \mathrm{nnz}(A) \text{ multiply-adds per row of } x}
# \;=\;
# \underbrace{x \,(A A \cdots A)}_{\text{forming } A^k,\text{ then } \mathrm{nnz}(A^k)}
# $$ (eq-brackets)
#
# Both give the same numbers. They do not take the same time, because a power does not stay sparse: after $k$ hops you are nearly
# everywhere. Remember this picture; it decides every choice below.

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.digits()
images = np.concatenate([x_train, x_test]).reshape(-1, 64)
labels = np.concatenate([y_train, y_test])

neighbours = sklearn.neighbors.kneighbors_graph(images, 5)
edges = neighbours.maximum(neighbours.T)  # an edge has no direction
degree = np.asarray(edges.sum(axis=1)).ravel()
scaling = scipy.sparse.diags(1 / np.sqrt(degree))
graph = (scaling @ edges @ scaling).astype(np.float32).tocsr()
A = at.SparseMatrix(graph.indptr, graph.indices, graph.data, graph.shape)
A

# %% [markdown]
# This is a graph of 1,797 real handwritten digits. Each is linked to the five that look most alike, and edges are scaled by the
# square roots of the degrees, $A = D^{-1/2} W D^{-1/2}$, so that powers neither grow nor vanish. As $A$ is symmetric, its CSR rows
# serve as they are.

# %% mystnb={"image": {"alt": "Four square plots of the non-zeros of the graph's adjacency matrix to the powers 1, 2, 4 and 8, nodes sorted by digit. The first shows ten faint blocks along the diagonal; the blocks fill, then the space between them, until the last is nearly half full."}, "figure": {"caption": "The non-zeros of powers of one graph, its nodes sorted by digit. Ten clusters show at first. Eight hops later, nearly half of all pairs are connected: a sparse matrix has a dense power.", "name": "fig-fill"}} tags=["hide-input"]
order = np.argsort(labels, kind="stable")
figure, panels = plt.subplots(1, 4, figsize=(7.2, 2.1))
fill = {}
for k, axes in zip((1, 2, 4, 8), panels, strict=True):
    power = at.matrix_power(A, k)
    fill[k] = power.density
    dense = power.to_dense().numpy()[order][:, order] != 0
    # Blocks of 13 × 13 nodes, shaded by their share of non-zeros.
    size = len(order) // 13 * 13
    blocks = dense[:size, :size].reshape(size // 13, 13, -1, 13).mean(axis=(1, 3))
    axes.imshow(np.sqrt(blocks), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=f"$A^{k}$" if k > 1 else "$A$", xticks=[], yticks=[])
    axes.set_xlabel(f"{power.density:.1%}")
    axes.grid(False)
plt.show()

# %% tags=["remove-cell"]
assert len(labels) == 1797 and abs(graph - graph.T).max() < 1e-6
assert fill[1] < 0.005 < 0.05 < fill[4] < 0.11 and 0.4 < fill[8] < 0.5  # prose, caption
glue("fill4", f"{fill[4]:.0%}", display=False)
glue("fill8", f"{fill[8]:.0%}", display=False)
glue("nnz", f"{A.nnz:,}", display=False)

# %% [markdown]
# ## A network, from end to end
#
# We train a wide perceptron on the same digits, and prune its three kernels to 90 % on the way, as in [](pruning.py):

# %%
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        keras.layers.Dense(1024, activation="relu", name="wide"),
        keras.layers.Dense(1024, activation="relu", name="deep"),
        keras.layers.Dense(10, name="head"),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=["accuracy"])
model.fit(x_train, y_train, batch_size=64, epochs=4, verbose=0)
before = model.evaluate(x_test, y_test, verbose=0)[1]

at.prune(model, at.PolynomialDecay(0.9, end_step=60, frequency=20))
model.fit(x_train, y_train, batch_size=64, epochs=6, verbose=0)
after = model.evaluate(x_test, y_test, verbose=0)[1]

# %% [markdown]
# The accuracy was {glue:text}`before` before and is {glue:text}`after` now. So far nothing is faster: Keras multiplies by each of
# the zeros. {py:func}`accel_tf.sparse.sparsify` makes a copy that does not:

# %%
fast = at.sparsify(model, batch_size=64)
at.report_of(fast)

# %% tags=["remove-cell"]
notes = {e.layer: e.note for e in at.report_of(fast).done}
assert set(notes) >= {"deep"}
assert np.allclose(model(x_test), fast(x_test), rtol=1e-3, atol=1e-3)
assert (
    after > before - 0.05 and after > 0.9
)  # prose: the accuracies are close, and high
glue("before", f"{before:.1%}".replace("%", " %"), display=False)
glue("after", f"{after:.1%}".replace("%", " %"), display=False)

# %% [markdown]
# The report says for each layer what became of it, in which format its weights are packed, and how much faster a model of the
# kernels' costs expects it to be ({py:func}`accel_tf.sparse.tune` measures these costs on your machine). A layer for which no gain is
# expected stays dense, and the report says that, too.
#
# ### Measure
#
# The bound of [](sparse_matmul.py) is $1/d = 10$ for a layer that does nothing but multiply. A network also adds biases, applies activations
# and moves data between its layers, so expect less. The fair opponent is the dense model at its best, plain or compiled by XLA. Besides the
# perceptron we take a block of the first Transformer {footcite}`vaswani2017attention`, 512 wide, on 128 tokens, with 90 % of its
# weights pruned but not trained: time does not depend on which weights are left.


# %%
def transformer_block(width=512, hidden=2048, heads=8, tokens=128):
    inputs = keras.Input((tokens, width))
    x = keras.layers.LayerNormalization()(inputs)
    attention = keras.layers.MultiHeadAttention(heads, width // heads)
    x = inputs + attention(x, x)
    y = keras.layers.LayerNormalization()(x)
    y = keras.layers.Dense(hidden, activation="gelu", name="up")(y)
    return keras.Model(inputs, x + keras.layers.Dense(width, name="down")(y))


block = transformer_block()
at.prune(block, at.ConstantSparsity(0.9))
fast_block = at.sparsify(block, batch_size=1)


def race(dense, sparse, x):
    candidates = {
        "dense": dense,
        "dense, XLA": tf.function(dense, jit_compile=True),
        "sparse": sparse,
    }
    return at.measure_latency(candidates, x, max_seconds=1.0, verbose=0)


# %%
batch = tf.constant(x_test[:64])
tokens = tf.random.normal((1, 128, 512))
races = {
    "perceptron, 64 digits": race(model, fast, batch),
    "transformer block, 128 tokens": race(block, fast_block, tokens),
}


def gain(times):
    dense, compiled, sparse = (t.median for t in times.values())
    return min(dense, compiled) / sparse


at.report.Table(
    ["90 % zeros", "dense", "dense, XLA", "sparse", "times faster"],
    [[n, *(str(t) for t in r.values()), f"{gain(r):.1f}"] for n, r in races.items()],
)

# %% tags=["remove-cell"]
gains = [gain(r) for r in races.values()]
for name, value in zip(("mlp", "block"), gains, strict=True):
    glue(f"gain_{name}", f"{value:.1f}", display=False)
assert at.sparse.isa() != "tensorflow"  # the compiled op runs
assert min(gains) > 1.15, gains  # prose: faster than the faster of the two
assert np.abs(block(tokens) - fast_block(tokens)).max() < 1e-3  # prose: the same output
assert len(at.report_of(fast_block).done) == 6  # prose: four of attention, two dense

# %% [markdown]
# Against the faster of the two, the perceptron gains a factor of {glue:text}`gain_mlp`, and the block {glue:text}`gain_block`. In
# the block six kernels became sparse, four of them inside the attention layer; what remains dense, softmax, products of queries with keys
# and normalization, has no weights that could be pruned. It limits the gain ({term}`Amdahl's law`). The outputs agree up to rounding.
#
# ### When it does not help
#
# The choice was made by prediction, so let us ask it about networks where sparsity should not pay: one tenth of
# the weights pruned instead of nine; and layers so small that calling them is most of the work.


# %%
def predicted(width, sparsity, batch_size=64):
    small = keras.Sequential([keras.Input((width,)), keras.layers.Dense(width)])
    at.prune(small, at.ConstantSparsity(sparsity))
    report = at.report_of(at.sparsify(small, batch_size=batch_size))
    (entry,) = report.done + report.skipped
    says = entry.note.replace(": ", ", ").split(", ")[-1]
    return "sparse" if report.done else "dense", says


cases = [(1024, 0.9), (1024, 0.1), (16, 0.9), (16, 0.1)]
answers = {case: predicted(*case) for case in cases}
at.report.Table(
    ["layer", "zeros", "stays or becomes", "the report says"],
    [[f"{w} × {w}", f"{s:.0%}", *answers[w, s]] for w, s in cases],
)

# %% tags=["remove-cell"]
assert answers[1024, 0.9][0] == "sparse"
assert answers[1024, 0.1][0] == answers[16, 0.1][0] == "dense"

# %% [markdown]
# With few zeros left out, the layer stays dense: a sparse weight costs more than a dense one. In tiny layers there is next to nothing to
# win either way. You can overrule the prediction with `min_sparsity=0.5`, say, but measure afterwards.
#
# ## The same product on a graph
#
# Now suppose that of the 1,797 digits only twenty have a label, two of each kind. A classifier that sees these twenty alone:


# %%
def draw_labels(rng, per_class=2):
    return np.concatenate(
        [rng.choice(np.flatnonzero(labels == c), per_class, False) for c in range(10)]
    )


draws = [draw_labels(np.random.default_rng(seed)) for seed in range(10)]
unlabelled = [np.setdiff1d(np.arange(1797), known) for known in draws]


def alone(known, rest):
    classifier = sklearn.svm.SVC(C=10).fit(images[known], labels[known])
    return classifier.score(images[rest], labels[rest])


baseline = [alone(*pair) for pair in zip(draws, unlabelled, strict=True)]
print(f"{np.mean(baseline):.1%} of the others are right, over 10 draws of the labels")

# %% [markdown]
# It ignores the 1,777 images that it could look at. The graph does not: like should be linked to like. So let the labels flow along the
# edges {footcite}`zhou2004learning`. For each class, a row of $x$ holds a one at each labelled example; after $k$ hops, a node takes the class whose
# row is largest there. All ten draws go through the graph at once, as {py:func}`accel_tf.sparse.propagate` takes any leading dimensions:

# %%
x = np.zeros((10, 10, 1797), np.float32)  # draw, class, node
for draw, known in enumerate(draws):
    x[draw, labels[known], known] = 1


def accuracy(x):
    guess = np.argmax(x, axis=1)
    return [
        np.mean((g == labels)[rest]) for g, rest in zip(guess, unlabelled, strict=True)
    ]


hops = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
scores = {k: accuracy(at.propagate(A, x, k)) for k in hops}

# %% mystnb={"image": {"alt": "Accuracy against the number of hops, on a logarithmic axis from 1 to 1024. The curve starts near 17 percent, crosses the dashed line of a classifier trained on the twenty labels, near 77 percent, at about four hops, stays above 90 percent from 8 to 64 hops, and falls below 50 percent at 1024."}, "figure": {"caption": "Twenty labels and a graph: the share of the other 1,777 digits that are classified correctly, mean and range of ten draws of the labels, against a classifier that sees the labels alone.", "name": "fig-hops"}} tags=["hide-input"]
mean = np.array([np.mean(scores[k]) for k in hops])
low, high = (np.array([f(scores[k]) for k in hops]) for f in (np.min, np.max))
figure, axes = plt.subplots()
axes.axhline(np.mean(baseline), linestyle="--", color="#555555")
axes.annotate("the 20 labels alone", (10, np.mean(baseline) - 0.06), color="#555555")
axes.fill_between(hops, low, high, alpha=0.2, linewidth=0)
axes.plot(hops, mean, marker="o", label="labels carried through the graph")
axes.set_xscale("log", base=2)
axes.set_xticks(hops, [str(k) for k in hops])
axes.set(xlabel="hops $k$", ylabel="accuracy", ylim=(0, 1))
axes.yaxis.set_major_formatter("{x:.0%}")
axes.annotate("too few:\nnot arrived", (2.4, 0.3), color="#555555")
axes.annotate("too many:\neverywhere alike", (90, 0.3), color="#555555")
axes.legend(loc="lower center")
plt.show()

# %% tags=["remove-cell"]
best = hops[int(np.argmax(mean))]
gap = np.array(scores[16]) - np.array(baseline)
assert gap.mean() > 0.08 and best in (16, 32)  # prose
assert mean[hops.index(1)] < 0.3 and mean[hops.index(1024)] < 0.6  # prose: both ends
assert min(mean[hops.index(8) : hops.index(64) + 1]) > 0.87  # alt text
assert 0.72 < np.mean(baseline) < 0.82
glue("best", best, display=False)
glue("top", f"{mean.max():.1%}".replace("%", " %"), display=False)
glue("alone", f"{np.mean(baseline):.0%}".replace("%", " %"), display=False)
glue("far", f"{mean[-1]:.0%}".replace("%", " %"), display=False)

# %% [markdown]
# With {glue:text}`best` hops, {glue:text}`top` are right instead of {glue:text}`alone`, from the same twenty labels. Fewer hops do not reach
# every digit. And many make all alike: $A^k$ tends to a matrix of rank one, in which no node remembers where it came from, and at
# 1,024 hops {glue:text}`far` are left. This {term}`over-smoothing` is also why graph networks are seldom deep {footcite}`li2018deeper`.
#
# ## From scratch: sparse times sparse, and fast powers
#
# How do we multiply two sparse matrices without looking at a zero? Gustavson's answer {footcite}`gustavson1978two` goes row by row:
# row $i$ of $AB$ is a sum of the rows of $B$ that row $i$ of $A$ names,
#
# $$
# (AB)_{i,:} \;=\; \sum_{k \,:\, A_{ik} \neq 0} A_{ik}\, B_{k,:}
# $$ (eq-gustavson)
#
# and a row is a dictionary from columns to sums:


# %%
def multiply(a, b):
    """The product of matrices given as one dictionary {column: value} for each row."""
    product = []
    for row in a:
        sums = {}
        for k, a_ik in row.items():
            for j, b_kj in b[k].items():
                sums[j] = sums.get(j, 0) + a_ik * b_kj
        product.append(sums)
    return product


# %% [markdown]
# A power does not need $k - 1$ of these. By {term}`repeated squaring`, we read the binary digits of $k$ from the left: each further digit squares what we have, and a 1
# multiplies by $A$ once more {footcite}`knuth1997seminumerical`. That is at most $2 \log_2 k$ products:


# %%
def power_of(a, k):
    power, products = a, 0
    for digit in bin(k)[3:]:  # after "0b1"
        power, products = multiply(power, power), products + 1
        if digit == "1":
            power, products = multiply(power, a), products + 1
    return power, products


step = 1 / 2
ring = [{(i - 1) % 99: step, (i + 1) % 99: step} for i in range(99)]
_, products = power_of(ring, 1000)
print(f"{products} products instead of 999")

# %% [markdown]
# ## With `accel_tf`
#
# `A @ B` is {eq}`eq-gustavson` as a compiled op, {py:func}`accel_tf.sparse.matrix_power` the fast power. Its result is a
# {py:class}`~accel_tf.sparse.SparseMatrix` whether or not it is still sparse: above a density of 10 % the work is done by dense products, as they are faster
# from there on.

# %%
A2 = A @ A
A5 = at.matrix_power(A, 5)
A2, A5

# %% tags=["remove-cell"]
rows = [dict(zip(r.indices, r.data, strict=True)) for r in graph]


def to_array(rows):
    full = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        full[i, list(row)] = list(row.values())
    return full


assert np.allclose(to_array(multiply(rows, rows)), A2.to_dense(), atol=1e-5)
assert np.allclose((graph @ graph).toarray(), A2.to_dense(), atol=1e-5)
assert np.allclose(x[0] @ A5.to_dense(), at.propagate(A, x[0], 5), atol=1e-5)
assert A2.nnz == (graph @ graph).nnz
circle = at.SparseMatrix.from_dense(to_array(ring))
assert np.allclose(
    at.matrix_power(circle, 1000).to_dense(),
    to_array(power_of(ring, 1000)[0]),
    atol=1e-5,
)
assert products == 14

# %% [markdown]
# ## Measure: form the power, or walk?
#
# **The count first.** By {eq}`eq-brackets`, 16 hops of ten rows take $16 \cdot 10 \cdot \mathrm{nnz}(A)$, or {glue:text}`walk_count` million
# multiply-adds. Forming $A^{16}$ passes through $A^8$, which is {glue:text}`fill8` full ({numref}`fig-fill`), and one dense product of
# that size takes $1797^3$, or 5.8 *billion*. So the walk should win, by far. When does the power pay? If it is used for many rows, and if
# the hops are so many that $k \cdot \mathrm{nnz}(A)$ exceeds the $n^2$ of a full matrix: 1,000 rows and 1,000 hops on the ring of 99
# nodes, for example.
#
# {py:func}`~accel_tf.sparse.propagate` weighs this by the costs of the kernels before it starts, and squares only as often as it pays:


# %%
def walk(x, matrix, k):
    for _ in range(k):
        x = at.sparse_matmul(x, matrix)
    return x


def three_ways(x, matrix, k):
    ways = {
        "walk": lambda x: walk(x, matrix, k),
        "power": lambda x: at.sparse_matmul(x, at.matrix_power(matrix, k)),
        "propagate": lambda x: at.propagate(matrix, x, k),
    }
    return at.measure_latency(ways, x, rounds=3, warmup=1, verbose=0)


circle = at.SparseMatrix.from_dense(to_array(ring))
thousand = np.eye(99, dtype=np.float32)[np.arange(1000) % 99]
ways = {
    "digits, 10 rows, 16 hops": three_ways(tf.constant(x[0]), A, 16),
    "ring, 1,000 rows, 1,000 hops": three_ways(tf.constant(thousand), circle, 1000),
}
at.report.Table(
    ["", "walk", "form the power", "propagate"],
    [[name, *(str(t) for t in times.values())] for name, times in ways.items()],
)

# %% tags=["remove-cell"]
few, many = ({n: t.median for n, t in times.items()} for times in ways.values())
glue("walk_count", f"{16 * 10 * A.nnz / 1e6:.0f}", display=False)
glue("walk_gain", f"{few['power'] / few['walk']:.0f}", display=False)
glue("power_gain", f"{many['walk'] / many['power']:.0f}", display=False)
assert few["power"] > 3 * few["walk"]  # prose: by far
assert many["walk"] > many["power"]  # prose: the power pays
assert few["propagate"] < few["power"]  # prose: it takes the better way
assert many["propagate"] < many["walk"]
assert np.allclose(
    walk(thousand, circle, 50), at.propagate(circle, thousand, 50), atol=1e-5
)

# %% [markdown]
# On the digits the walk is {glue:text}`walk_gain` times as fast; on the ring, the power is, {glue:text}`power_gain` times. `propagate` takes the better
# way both times, or one in between: a few squarings, then a walk with larger steps.
#
# As a peer for the product of two sparse matrices we take SciPy's, which runs on one thread; and a dense one, for which it does not matter how
# full the factors are:


# %%
def square(k):
    sparse = at.matrix_power(A, k)
    dense = sparse.to_dense()
    peer = scipy.sparse.csr_matrix(dense.numpy())
    products = {
        "accel_tf": lambda _: sparse @ sparse,
        "SciPy": lambda _: peer @ peer,
        "tf.matmul": lambda _: tf.matmul(dense, dense),
    }
    return at.measure_latency(
        products, None, rounds=5, warmup=1, max_seconds=1, verbose=0
    )


names = {1: "A · A", 2: "A² · A²", 4: "A⁴ · A⁴"}
squares = {k: square(k) for k in names}
at.report.Table(
    ["", "full", *squares[1]],
    [[n, f"{fill[k]:.1%}", *map(str, squares[k].values())] for k, n in names.items()],
)

# %% tags=["remove-cell"]
medians = {k: {n: t.median for n, t in times.items()} for k, times in squares.items()}
ratio = {k: m["tf.matmul"] / m["accel_tf"] for k, m in medians.items()}
assert ratio[1] > 3  # prose: far faster than dense
assert ratio[1] > ratio[4]  # prose: the advantage shrinks
peer = {k: m["SciPy"] / m["accel_tf"] for k, m in medians.items()}
assert peer[4] > peer[1]  # prose: it gains on SciPy

# %% [markdown]
# While the factors are nearly empty, zeros skipped are time saved. Where 8 % are left, the dense product has caught up with much of it; a
# little above, it is faster, and `matrix_power` changes over. SciPy's product neither checks its input nor sorts its output, which makes it hard to
# beat where there is little to do. The fuller the factors, the more the compiled op gains on it: it marks up to 64 neighbouring columns at once.
#
# ## Use it in your project
#
# ```python
# import accel_tf as at
#
# at.prune(model, at.PolynomialDecay(final_sparsity=0.9, end_step=1000))
# model.fit(x, y, epochs=5)
# fast = at.sparsify(model, batch_size=64)   # the batch that you will serve
# print(at.report_of(fast))                  # what became sparse, and why
#
# csr = adjacency.T.tocsr()                  # a row for each target
# A = at.SparseMatrix(csr.indptr, csr.indices, csr.data, adjacency.shape)
# scores = at.propagate(A, x, k=16)          # x: [..., nodes]; differentiable
# two_hops = A @ A
# far = at.matrix_power(A, 1000)             # a SparseMatrix, full or not
# ```
#
# A {py:class}`~accel_tf.sparse.SparseMatrix` is stored by output: for a graph that is not symmetric, give it the CSR form of the
# transpose, in which a row lists the edges that *enter* a node.
#
# ## Takeaways
#
# - Pruning makes a network faster once zeros are skipped: `sparsify`, then compare with the dense model at its best.
# - What has no prunable weights sets the limit, and `sparsify` leaves dense what would not gain; the report says so.
# - A walk of $k$ hops costs $k \cdot \mathrm{nnz}$; powers fill up. Form one only for many rows and many hops.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-networks-1
# The six sparse kernels took 90 % of the transformer block's time when dense, and are now five times as fast. How many times as fast is the block?
# And if they took no time at all?
# :::
#
# :::{solution} ex-networks-1
# :class: dropdown
# $1 / (0.1 + 0.9/5) \approx 3.6$, and at most $1/0.1 = 10$.
# :::
#
# :::{exercise}
# :label: ex-networks-2
# Over-smoothing can be cured by going home: after each hop, mix in the start, $x_{t+1} = \alpha\, x_t A + (1 - \alpha)\, x_0$. Do that 200 times
# with $\alpha = 0.95$. What is the accuracy?
# :::
#
# :::{solution-start} ex-networks-2
# :class: dropdown
# :::

# %%
mixed = tf.constant(x)
for _ in range(200):
    mixed = 0.95 * at.propagate(A, mixed, 1) + 0.05 * x
print(f"{np.mean(accuracy(mixed)):.1%}, and it stays there")

# %% tags=["remove-cell"]
assert np.mean(accuracy(mixed)) > 0.9

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-networks-3
# How many products does `power_of` need for $k = 64$, for $k = 63$ and for $k = 1000$?
# :::
#
# :::{solution} ex-networks-3
# :class: dropdown
# One squaring for each binary digit after the first, one product for each 1 among these: 64 is `1000000`, 6 products; 63 is `111111`,
# $5 + 5 = 10$; 1000 is `1111101000`, $9 + 5 = 14$.
# :::
#
# ## References
#
# ```{footbibliography}
# ```
