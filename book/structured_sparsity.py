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
# # Structured sparsity: zeros that hardware can use
#
# **Prune blocks, grids and whole channels, see what each costs in accuracy and gives back in time, and choose by that price.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 15 minutes to read, under a minute to run · **You need** Keras, a little NumPy, [](pruning.py) · **Module** {py:mod}`accel_tf.pruning`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import math
import warnings

import keras
import matplotlib.pyplot as plt
import matplotlib_inline.backend_inline
import numpy as np
from myst_nb import glue

import accel_tf as at

plt.style.use("accel_tf.book")
matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
keras.utils.set_random_seed(0)

# %% [markdown]
# ## You will learn to
#
# - **prune** in blocks, in N:M grids and by channels, with masks that you can compute yourself;
# - **remove** channels from a network with normalizations and residual sums, so that what is left is smaller and dense;
# - **choose** a pattern by what it costs in accuracy and what your hardware gives back for it.
#
# ## Intuition: every choice has to be stored
#
# [](pruning.py) lets each weight live or die on its own. That is the best a network can ask for, and the worst for hardware: it has to look up where
# each weight belongs. *Structure* makes the zeros predictable. Below are five masks of the same {glue:text}`rows` × {glue:text}`rows` weights,
# all with three zeros in four:

# %% mystnb={"image": {"alt": "Five square grids of the same 32 by 32 kernel with a quarter of the cells coloured. Unstructured: cells scattered at random. 3:4: one cell in every four of a column. Blocks 4×1: short horizontal bars of four cells. Blocks 16×1: long bars of sixteen cells. Channels: eight full columns."}, "figure": {"caption": "One kernel, inputs downwards and outputs to the right, with 75 % zeros in five patterns; the darker, the larger the weight. Below: the freedom of choice by {eq}`eq-freedom`, in bits per weight.", "name": "fig-masks"}} tags=["hide-input"]
SHOWN = {
    "unstructured": at.Unstructured(),
    "3:4": at.NM(3, 4),
    "blocks 4×1": at.Block((1, 4)),
    "blocks 16×1": at.Block((1, 16)),
    "channels": at.Channels(),
}


def entropy(d):
    return -d * math.log2(d) - (1 - d) * math.log2(1 - d)


freedom = dict.fromkeys(SHOWN, entropy(0.25))
freedom["3:4"] = math.log2(math.comb(4, 1)) / 4
freedom["blocks 4×1"] /= 4
freedom["blocks 16×1"] /= 16
freedom["channels"] /= 32

kernel = np.random.normal(size=(32, 32)).astype("float32")
masks = {}
figure, panels = plt.subplots(1, 5, figsize=(7.2, 1.95))
for (name, pattern), axes in zip(SHOWN.items(), panels, strict=True):
    layer = keras.layers.Dense(32, use_bias=False)
    model = keras.Sequential([keras.Input((32,)), layer])
    layer.kernel.assign(kernel)
    at.prune(model, at.ConstantSparsity(0.75), pattern=pattern)
    masks[name] = layer.kernel.numpy() != 0
    shade = np.where(masks[name], 0.45 + 0.25 * np.abs(kernel), 0.03)
    axes.pcolormesh(shade, cmap="Blues", vmin=0, vmax=1.1, edgecolors="w", lw=0.3)
    axes.set(aspect="equal", xticks=[], yticks=[], ylim=(32, 0))
    axes.set_title(name, fontsize=9.5, loc="center")
    axes.set_xlabel(f"{freedom[name]:.3f} bits", fontsize=9.5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
plt.show()

# %% tags=["remove-cell"]
assert all(mask.mean() == 0.25 for mask in masks.values())
order = ["unstructured", "3:4", "blocks 4×1", "blocks 16×1", "channels"]
assert sorted(freedom, key=freedom.get, reverse=True) == order  # prose: falls
assert masks["channels"].all(axis=0).sum() == 8  # alt text
glue("rows", 32, display=False)
glue("free_2_4", math.log2(6) / 4, display=False)

# %% [markdown]
# How much choice is left? Count the masks that a pattern allows, and take the logarithm. Per weight, at {term}`density` $d$ and with the
# entropy $H(d)$ of {eq}`eq-bits`, that makes
#
# $$
# \underbrace{H(d)}_{\text{unstructured}} \;\ge\;
# \underbrace{\tfrac{1}{m} \log_2 \tbinom{m}{n}}_{n \text{ of } m \text{ zero}}, \qquad
# \underbrace{\tfrac{1}{b} H(d)}_{\text{blocks of } b}, \qquad
# \underbrace{\tfrac{1}{K} H(d)}_{\text{channels of } K \text{ weights}} .
# $$ (eq-freedom)
#
# Read it twice. These bits are what training may *choose*, so fewer of them should cost accuracy {footcite}`mao2017regularity`. They are also what hardware
# has to *read* to know where the weights are, so fewer should save time. **Structure is a trade of choice for speed.** At the one end a
# channel needs no index at all: it is removed, and what remains is a smaller dense network.
#
# Three families have names. *{term}`Block sparsity`*, here 4×1 and 16×1: neighbouring outputs share an input {footcite}`narang2017block`.
# *{term}`N:M sparsity`*: in every $m$ neighbouring inputs of an output, $n$ are zero. The famous one is 2:4, which NVIDIA's sparse tensor cores
# multiply at up to twice the dense rate {footcite}`mishra2021accelerating`. And *{term}`channel pruning`*: whole filters go {footcite}`li2017filters`.
#
# ## From scratch
#
# Blocks are magnitude pruning of their means. N:M is a sort within each group. A channel is a block as tall as the kernel:


# %%
def block_mask(w, sparsity, height, width):
    """Keeps the blocks whose mean magnitude is largest."""
    rows, columns = w.shape[0] // height, w.shape[1] // width
    blocks = np.abs(w).reshape(rows, height, columns, width).mean(axis=(1, 3))
    keep = round(blocks.size * (1 - sparsity))
    mask = np.zeros(blocks.size, bool)
    mask[np.argsort(-blocks.ravel(), kind="stable")[:keep]] = True
    mask = mask.reshape(blocks.shape)
    return np.repeat(np.repeat(mask, height, axis=0), width, axis=1)


def n_of_m_mask(w, n, m):
    """Drops the n smallest of every m neighbouring inputs."""
    groups = np.abs(w).reshape(-1, m, w.shape[1])
    ranks = np.argsort(np.argsort(groups, axis=1), axis=1)
    return (ranks >= n).reshape(w.shape)


# %% [markdown]
# ## With `accel_tf`
#
# It is {py:func}`~accel_tf.pruning.prune` with another `pattern`. Our network is a perceptron on MNIST-1D {footcite}`greydanus2024mnist1d`, noisy
# curves of 40 points that show digits. Its first and last layer are small and stay dense:

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.mnist1d()
x_train, x_test = x_train[..., 0], x_test[..., 0]
BATCH = 100
EPOCH = len(x_train) // BATCH  # optimizer steps


def new_mlp(width=256):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((40,)),
            layers.Dense(width, activation="relu", name="stem"),
            layers.Dense(width, activation="relu", name="hidden1"),
            layers.Dense(width, activation="relu", name="hidden2"),
            layers.Dense(10, name="logits"),
        ]
    )


# %%
def train(model, epochs=10, rate=1e-2):
    rate = keras.optimizers.schedules.CosineDecay(rate, epochs * EPOCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, steps_per_execution=EPOCH)
    model.fit(x_train, y_train, BATCH, epochs, verbose=0)
    return model


def accuracy(model):
    """Per cent of the test curves that the model gets right."""
    return 100 * float(np.mean(np.argmax(model(x_test), axis=-1) == y_test))


def copy(model):
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    return new


networks = [train(new_mlp())]
pruned = copy(networks[0])
blocks = at.Block((1, 4))  # inputs by outputs
at.prune(pruned, at.ConstantSparsity(0.75), pattern=blocks, exclude=["stem", "logits"])

# %% [markdown]
# ### A peer: TFMOT
#
# TensorFlow's Model Optimization Toolkit knows blocks and N:M, too, on the legacy package tf_keras. It has no function for a mask, so we let it
# train for one step at a learning rate of zero, and look at what is left of the kernel:

# %%
w = networks[0].get_layer("hidden1").kernel.numpy()


def tfmot_mask(**pattern):
    import tensorflow_model_optimization as tfmot
    import tf_keras

    from accel_tf.interop.tfmot import to_tfmot

    schedule = to_tfmot(at.ConstantSparsity(0.5, frequency=1))
    dense = tf_keras.layers.Dense(256, use_bias=False, input_shape=(256,))
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(dense, schedule, **pattern)
    model = tf_keras.Sequential([wrapped])
    dense.kernel.assign(w)
    model.compile(tf_keras.optimizers.SGD(0.0), "mse")
    step = tfmot.sparsity.keras.UpdatePruningStep()
    model.fit(w, w, batch_size=256, verbose=0, callbacks=[step])
    return dense.kernel.numpy() != 0


# %%
def our_mask(pattern):
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256)])
    model.layers[0].kernel.assign(w)
    at.prune(model, at.ConstantSparsity(0.5), pattern=pattern)
    return model.layers[0].kernel.numpy() != 0


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the old packages
    theirs = [tfmot_mask(block_size=(1, 4)), tfmot_mask(sparsity_m_by_n=(2, 4))]

ours = [our_mask(at.Block((1, 4))), our_mask(at.NM(2, 4))]
scratch = [block_mask(w, 0.5, 1, 4), n_of_m_mask(w, 2, 4)]
rows = zip(("blocks 4×1", "2:4"), theirs, ours, scratch, strict=True)
at.report.Table(
    ("pattern", "TFMOT = accel_tf", "scratch = accel_tf"),
    [(name, np.array_equal(t, o), np.array_equal(s, o)) for name, t, o, s in rows],
)

# %% tags=["remove-cell"]
for t, o, s in zip(theirs, ours, scratch, strict=True):
    np.testing.assert_array_equal(t, o)
    np.testing.assert_array_equal(s, o)
    assert o.mean() == 0.5
assert np.array_equal(block_mask(kernel, 0.75, 1, 16), masks["blocks 16×1"])
assert np.array_equal(n_of_m_mask(kernel, 3, 4), masks["3:4"])

# %% [markdown]
# Three ways, the same masks. What TFMOT does not have is the last family.
#
# ## Channels, really removed
#
# A convolution, a normalization, a convolution. Filter $i$ of the first makes channel $i$, which has its own scale, shift, mean and
# variance, and which the second convolution reads with the slice `kernel[:, :, i]`. All of these go together, in one line of indexing:


# %%
def two_convolutions(filters):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(filters, 3, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(8, 3, padding="same", name="conv2"),
        ]
    )


def without_channels(model, keep):
    w1, *normalization, w2, b2 = model.get_weights()
    small = two_convolutions(len(keep))
    normalization = [v[keep] for v in normalization]
    small.set_weights([w1[..., keep], *normalization, w2[:, :, keep], b2])
    return small


# %%
model = two_convolutions(16)
at.mask_channels(model, 0.5)  # to zero, in place: half of conv1's channels
keep = np.flatnonzero(np.any(model.layers[0].kernel.numpy() != 0, axis=(0, 1, 2)))
images = np.random.normal(size=(4, 8, 8, 1)).astype("float32")
masked, mine = model(images), without_channels(model, keep)(images)
theirs = at.remove_channels(model)  # those that are zero, found by themselves
print(f"largest difference: {np.abs(masked - mine).max():.0e}")

# %% tags=["remove-cell"]
assert len(keep) == 8
np.testing.assert_allclose(mine, masked, rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(theirs(images), masked, rtol=1e-4, atol=1e-5)
assert theirs.count_params() == two_convolutions(8).count_params()
assert np.abs(masked).max() > 0.01

# %% [markdown]
# The small network computes what the masked one does. In real networks channels also meet, and then they *depend* on one
# another {footcite}`fang2023depgraph`. With $\mathcal{K}(x)$ for the set of channels of $x$ that are kept:
#
# $$
# \begin{aligned}
# z = x + y &: \quad \mathcal{K}(z) = \mathcal{K}(x) = \mathcal{K}(y) \\
# z = \mathrm{depthwise}(x) &: \quad \mathcal{K}(z) = \mathcal{K}(x) \\
# z = [x, y] &: \quad \mathcal{K}(z) = \mathcal{K}(x) \cup \left(n_x + \mathcal{K}(y)\right)
# \end{aligned}
# $$ (eq-depend)
#
# A residual network adds its stream in every block, so the channels of the stream live or die together, through the whole network.
# {py:func}`~accel_tf.pruning.remove_channels` follows all of this:


# %%
def residual_network(width=64, blocks=2):
    layers = keras.layers

    def convolution(x):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(inputs))
    for _ in range(blocks):
        y = layers.ReLU()(convolution(x))
        x = layers.ReLU()(layers.Add()([x, convolution(y)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


residual = residual_network()
half = at.remove_channels(residual, 0.5)
images = np.random.normal(size=(8, 32, 32, 3)).astype("float32")
models = {"residual": residual, "half of the channels": half}
table = at.compare(models, images, latency_batch=8, rounds=15, verbose=0)
table

# %% tags=["remove-cell"]
whole, small = table["residual"], table["half of the channels"]
assert 3.5 < whole.parameters / small.parameters < 4.1  # prose: about a quarter
assert 3.5 < whole.flops / small.flops < 4.1
assert whole.latency.median > 1.3 * small.latency.median  # prose: faster
at.mask_channels(residual, 0.5)
np.testing.assert_allclose(half(images), residual(images), rtol=1e-3, atol=1e-4)
glue("flops_ratio", whole.flops / small.flops, display=False)
glue("half_speed", table.speedup("half of the channels"), display=False)

# %% [markdown]
# Half of the channels leave about a *quarter* of the weights and FLOPs, because inputs and outputs of each kernel are halved. It is
# a plain Keras model, {glue:text}`half_speed:.1f` times as fast with no special kernel, on any hardware. To compare channels with other patterns at equal
# numbers of weights, we shall thus keep $\sqrt{d}$ of them.
#
# ## Measure: what does each pattern cost?
#
# First a prediction. Every mask of 16×1 blocks is one of 4×1 blocks, too, and every one of those is an unstructured mask. So accuracy should fall in this
# order. Where channels and N:M come in is open; they restrict in other ways.
#
# We push hard, to one weight in sixteen. Three networks are pruned at once in each pattern and trained on for four epochs:

# %%
PATTERNS = {
    "unstructured": at.Unstructured(),
    "15:16": at.NM(15, 16),
    "blocks 4×1": at.Block((1, 4)),
    "blocks 16×1": at.Block((1, 16)),
}
SPARSITY, ON = 15 / 16, 4  # epochs to train on
KEPT = math.sqrt(1 - SPARSITY)  # of the channels


def pruned_by(network, pattern, sparsity=SPARSITY):
    model = copy(network)
    schedule = at.ConstantSparsity(sparsity)
    at.prune(model, schedule, pattern=pattern, exclude=["stem", "logits"])
    return train(model, ON, 3e-3)


for seed in (1, 2):
    keras.utils.set_random_seed(seed)
    networks.append(train(new_mlp()))

# %%
results = {"dense": [accuracy(train(copy(n), ON, 3e-3)) for n in networks]}
for name, pattern in PATTERNS.items():
    results[name] = [accuracy(pruned_by(n, pattern)) for n in networks]
narrow = [at.remove_channels(n, 1 - KEPT) for n in networks]
results["channels"] = [accuracy(train(n, ON, 3e-3)) for n in narrow]

# %% [markdown]
# And the time? It does not depend on which weights are left, but kernels this small are no work for a processor. So we time a wide network of
# the same kind. Its hidden layer is called several times, so that the call from Python hardly counts:


# %%
def wide(width=1536, calls=6):
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")
    inputs = keras.Input((40,))
    x = keras.layers.Dense(width, activation="relu", name="stem")(inputs)
    for _ in range(calls):
        x = hidden(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x))


dense = wide()
wide_models = {}
for name, pattern in PATTERNS.items():
    wide_models[name] = copy(dense)
    schedule = at.ConstantSparsity(SPARSITY)
    at.prune(wide_models[name], schedule, pattern=pattern, include="hidden")
channels = at.remove_channels(dense, 1 - KEPT)


# %%
def race(batch):
    """How many times as fast as the dense network each is."""
    models = {n: at.sparsify(m, batch_size=batch) for n, m in wide_models.items()}
    models |= {"dense": dense, "channels": channels}
    x = np.random.normal(size=(batch, 40)).astype("float32")
    times = at.measure_latency(models, x, warmup=3, max_seconds=0.4, verbose=0)
    return {name: times["dense"].median / t.median for name, t in times.items()}


gains = {batch: race(batch) for batch in (1, 64)}
at.report.Table(
    ("15/16 zeros", "accuracy [%]", "× at batch 1", "× at batch 64"),
    [
        (name, f"{np.mean(r):.1f}", *(f"{gains[b][name]:.1f}" for b in (1, 64)))
        for name, r in results.items()
    ],
)

# %% mystnb={"image": {"alt": "Two panels, batch 1 and batch 64: accuracy against how many times faster than dense each pattern runs. Dense is at the left. Unstructured is the most accurate of the pruned ones, 16×1 blocks the least. Channels are far to the right."}, "figure": {"caption": "The trade. Accuracy of networks with one hidden weight in sixteen, mean and range of three, against the speed of a wide network with the same pattern, on the machine that built this page. Up and to the right is better.", "name": "fig-trade"}} tags=["hide-input"]
colors = dict(
    zip(
        results,
        ["#333333", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#E69F00"],
        strict=True,
    )
)
marks = dict(zip(results, "oosD^v", strict=True))
figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.5), sharey=True)
for axes, (batch, gain) in zip(panels, gains.items(), strict=True):
    for name, values in results.items():
        middle = np.mean(values)
        spread = [[middle - min(values)], [max(values) - middle]]
        axes.errorbar(
            gain[name],
            middle,
            yerr=spread,
            fmt=marks[name],
            color=colors[name],
            ms=8,
            lw=1.4,
            capsize=3,
            label=name,
        )
    axes.set(xscale="log", title=f"batch {batch}", xlabel="times as fast as dense")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlim(0.8, max(20, 1.2 * max(gain.values())))
panels[0].set_ylabel("accuracy [%]")
figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
    fontsize=9, handletextpad=0.1, columnspacing=1.2,
)  # fmt: skip
plt.show()

# %% tags=["remove-cell"]
mean = {name: float(np.mean(r)) for name, r in results.items()}
assert mean["unstructured"] > mean["blocks 16×1"] + 1.5  # prose: the order, its ends
assert mean["blocks 4×1"] > mean["blocks 16×1"] + 1
assert mean["unstructured"] > mean["blocks 4×1"] - 1.5
assert mean["unstructured"] > mean["channels"] - 0.5  # alt text
assert mean["channels"] > mean["blocks 16×1"]  # prose: less choice, yet better
assert mean["dense"] > mean["blocks 16×1"] + 3
assert min(g for n, g in gains[64].items() if n != "dense") > 2  # prose: all gain
assert min(g for n, g in gains[1].items() if n != "dense") > 1.3
assert all(
    g["channels"] > 1.5 and g["channels"] > 0.8 * g["unstructured"]
    for g in gains.values()
)
assert 0.4 < gains[64]["15:16"] / gains[64]["unstructured"] < 2.5  # prose: alike
for name, value in mean.items():
    key = name.replace(" ", "_").replace("×", "x").replace(":", "of")
    glue(f"mean_{key}", value, display=False)
for batch, gain in gains.items():
    for name in ("unstructured", "channels", "blocks 16×1"):
        glue(f"x{batch}_{name.split()[-1][:2]}", gain[name], display=False)

# %% [markdown]
# Unstructured, 4×1, 16×1: the accuracy goes {glue:text}`mean_unstructured:.1f`, {glue:text}`mean_blocks_4x1:.1f`, {glue:text}`mean_blocks_16x1:.1f` %; the dense networks, trained as
# long, have {glue:text}`mean_dense:.1f` %. For a single sample, the speed goes from {glue:text}`x1_un:.1f` times that of dense with scattered zeros to
# {glue:text}`x1_16:.1f` with 16×1 blocks and {glue:text}`x1_ch:.1f` with channels. That is the trade.
#
# Now the surprise: channels, which have next to no choice, are *better* than 16×1 blocks ({glue:text}`mean_channels:.1f` %). Bits of choice do not decide alone; it matters
# what they are spent on. A block pattern that scatters its few blocks leaves every unit a handful of inputs. Removing channels leaves fewer units, but each sees
# all that are left, and a wide network has units to spare. N:M is the opposite: each unit keeps exactly its share, needed or not. It comes to
# {glue:text}`mean_15of16:.1f` %.
#
# So: measure on your network. {eq}`eq-freedom` orders what is nested, and only that.
#
# ## When it does not help
#
# **N:M, without the hardware for it.** To a kernel that does not know the grid, a 2:4 mask is just so many scattered zeros. In the race above, 15:16 ran in
# the unstructured format. And at 2:4 half of the weights are left, where scattered zeros gain little. Ask `sparsify` about a single sample:


# %%
def prediction(pattern):
    layer = keras.layers.Dense(1024, name="layer")
    small = keras.Sequential([keras.Input((1024,)), layer])
    at.prune(small, at.ConstantSparsity(0.5), pattern=pattern)
    report = at.report_of(at.sparsify(small, batch_size=1))
    (entry,) = report.done + report.skipped
    return "sparse" if report.done else "dense", entry.note.split(" zeros")[-1][2:]


patterns = {"unstructured": at.Unstructured(), "2:4": at.NM(2, 4)}
patterns |= {"blocks 4×1": at.Block((1, 4)), "blocks 16×1": at.Block((1, 16))}
predictions = {name: prediction(pattern) for name, pattern in patterns.items()}
at.report.Table(
    ("half of 1024 × 1024 zero", "stays or becomes", "the report says"),
    [(name, *p) for name, p in predictions.items()],
)

# %% tags=["remove-cell"]
assert predictions["2:4"] == predictions["unstructured"]
assert predictions["2:4"][0] == "dense" and predictions["blocks 16×1"][0] == "sparse"
notes = {e.layer: e.note for e in at.report_of(at.sparsify(wide_models["15:16"])).done}
assert "unstructured" in notes["hidden"]  # prose: ran in the unstructured format

# %% [markdown]
# The same answer for both: stay dense. Prune 2:4 for a GPU that has sparse tensor cores, with a library that uses them; Keras does not.
#
# **Channels, when you can train anew.** Removing channels ends in a plain narrow network. Did we need the wide one? Liu and
# others {footcite}`liu2019rethinking` trained such networks from random weights, and found them as good. Let us see, first with as many epochs as the pruned one has had in all, then, since
# its steps cost a fraction, with three times as many:

# %%
width = narrow[0].get_layer("hidden1").units
for epochs in (14, 42):
    results[epochs] = []
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        results[epochs].append(accuracy(train(new_mlp(width), epochs)))
names = {14: "from scratch, 14 epochs", 42: "from scratch, 42 epochs"}
names = {"channels": "wide, channels removed, 10 + 4 epochs", **names}
at.report.Table(
    (f"{width} units wide", "accuracy [%]"),
    [(name, f"{np.mean(results[key]):.1f}") for key, name in names.items()],
)

# %% tags=["remove-cell"]
assert width == 64 and narrow[0].count_params() == new_mlp(64).count_params()
scratch_short, scratch_long = np.mean(results[14]), np.mean(results[42])
assert scratch_long > scratch_short + 0.5  # prose: longer is better
assert scratch_long > mean["channels"] - 2  # prose: as good, within what seeds can tell
assert mean["channels"] > scratch_short - 1  # prose: no worse at equal epochs
glue("scratch_short", float(scratch_short), display=False)
glue("scratch_long", float(scratch_long), display=False)
glue("width", width, display=False)

# %% [markdown]
# At equal epochs the pruned network has {glue:text}`mean_channels:.1f` % and the one from scratch {glue:text}`scratch_short:.1f` %. With the longer training, which is fair by arithmetic, it is
# {glue:text}`scratch_long:.1f` %, with no wide network ever trained. What channel pruning then gives you is the *width*, and a start if a good wide network
# exists already. Always train the small one from scratch, too, before you believe in the pruned one.
#
# **Large blocks in small layers.** A layer of ten outputs has no 16×1 block, and a block of the first layer takes one input from sixteen units at
# once. Exclude such layers, as we did; they hold few of the weights anyway.
#
# :::{important}
# **Rule of thumb.** On CPUs: channels first, as far as accuracy allows; then 4×1 blocks. Scattered zeros where each tenth of a per cent counts
# and the sparsity is high. 2:4 for GPUs with sparse tensor cores only.
# :::
#
# ## Use it in your project
#
# ```python
# import accel_tf as at
#
# # Blocks: still a model of the same shape, faster by a sparse kernel
# schedule = at.PolynomialDecay(final_sparsity=0.9, end_step=1000)
# at.prune(model, schedule, pattern=at.Block((1, 4)), exclude=["stem*", "head"])
# model.fit(x, y, epochs=20)
# fast = at.sparsify(model, batch_size=1)
#
# # Channels: a smaller dense model, faster everywhere
# small = at.remove_channels(model, 0.5, multiple_of=8)
# print(at.report_of(small))              # what went, and what could not
# small.compile(...)
# small.fit(x, y, epochs=5)
# ```
#
# The patterns are {py:class}`~accel_tf.pruning.Unstructured`, {py:class}`~accel_tf.pruning.Block`, {py:class}`~accel_tf.pruning.NM` and
# {py:class}`~accel_tf.pruning.Channels`; what the kernels do with them is the subject of [](sparse_matmul.py).
#
# ## Takeaways
#
# - Structure gives up choice, which costs accuracy, for zeros that need fewer indices, which saves time.
# - A pattern pays only where a kernel knows it: 4×1 and 16×1 on the CPU, 2:4 on sparse tensor cores, channels everywhere.
# - Channels that are added depend on one another. What is left after removing them is a small dense network: compare it with one trained from scratch.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-structured-1
# 2:4 and 8:16 have the same sparsity. How many bits of choice per weight does {eq}`eq-freedom` give each, and what is the limit for a large $m$?
# :::
#
# :::{solution-start} ex-structured-1
# :class: dropdown
# :::
#
# The larger the group, the freer the choice. The limit is $H(1/2) = 1$, the unstructured mask:

# %%
[round(math.log2(math.comb(m, m // 2)) / m, 3) for m in (4, 16, 64, 1024)]

# %% tags=["remove-cell"]
bits = [math.log2(math.comb(m, m // 2)) / m for m in (4, 16, 64, 1024)]
assert bits == sorted(bits) and 0.99 < bits[-1] < 1 and abs(bits[0] - 0.646) < 1e-3

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-structured-2
# Remove 30 % of the channels of `residual`, but such that a multiple of 16 remains. Which width does each layer get? Why is it the same for all?
# :::
#
# :::{solution-start} ex-structured-2
# :class: dropdown
# :::
#
# At least 44.8 of 64 must remain, and the next multiple of 16 is 48. The layers that share the stream must agree by {eq}`eq-depend`;
# those inside a block get there because `amount` is a fraction, and all are equally wide.

# %%
model = at.remove_channels(residual, 0.3, multiple_of=16)
[layer.filters for layer in model.layers if hasattr(layer, "filters")]

# %% tags=["remove-cell"]
widths = [layer.filters for layer in model.layers if hasattr(layer, "filters")]
assert widths == [48] * 5

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-structured-3
# At half of the weights, how much accuracy do 16×1 blocks cost? Use `pruned_by` on one of the networks.
# :::
#
# :::{solution-start} ex-structured-3
# :class: dropdown
# :::
#
# Next to nothing: with so many weights to spare, any pattern will do. Structure costs where the sparsity hurts.

# %%
halved = accuracy(pruned_by(networks[0], at.Block((1, 16)), sparsity=0.5))
print(f"{halved:.1f} %, dense {results['dense'][0]:.1f} %")

# %% tags=["remove-cell"]
assert abs(halved - results["dense"][0]) < 4

# %% [markdown]
# :::{solution-end}
# :::
#
# ## References
#
# ```{footbibliography}
# ```
