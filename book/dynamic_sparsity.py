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
# # Dynamic sparsity: sparse from the first step
#
# **Train a network that never has more than one weight in twenty, let it find out which ones it needs, and know what that is worth.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 12 minutes to read, under a minute to run · **You need** Keras, a little NumPy, [](pruning.py) · **Module** {py:mod}`accel_tf.pruning`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

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
# - **train** a Keras model at constant {term}`sparsity`, with connections that move: SET and RigL;
# - **distribute** a budget of weights among layers of different size;
# - **decide** between {term}`dynamic sparse training` and pruning, by measurement.
#
# ## Intuition: move the weights you have
#
# Pruning starts with a dense network and takes weights away. So all of it has to fit, and to be trained, before it gets small. Why not start small? Draw 5 % of
# the connections, keep that {term}`mask`, train. It works poorly: we have to guess which connections will matter before the network has seen any data.
#
# *{term}`Dynamic sparse training`* corrects the guess on the way. Every $\Delta T$ steps it drops the active weights of smallest magnitude, and
# grows as many elsewhere. The number of weights never changes; where they are does. The two classic methods differ in where they grow:
#
# - **SET** grows at random {footcite}`mocanu2018scalable`. Useless connections stay small and go at the next turn; useful ones stay. That is evolution.
# - **RigL** grows where the loss would fall fastest: at the inactive weights whose gradient is largest {footcite}`evci2020rigging`. A weight
#   that is zero has a gradient all the same. It says what the weight *would* do.
#
# RigL also calms down. Of the active weights it replaces at step $t$ the fraction
#
# $$
# f(t) = \frac{\alpha}{2} \left(1 + \cos \frac{\pi t}{T_\text{end}}\right), \qquad t = \Delta T, 2 \Delta T, \ldots < T_\text{end},
# $$ (eq-rigl)
#
# which falls from $\alpha$ to nothing. After $T_\text{end}$ the mask rests, and the newest weights get time to learn.
#
# Let us watch. The data are MNIST-1D {footcite}`greydanus2024mnist1d`: {glue:text}`samples` noisy curves of 40 points, each a digit. The network is a
# perceptron with {glue:text}`weights` weights in its kernels, of which we allow it {glue:text}`active`.

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.mnist1d()
x_train, x_test = x_train[..., 0], x_test[..., 0]
SPARSITY, EPOCHS, BATCH = 0.95, 20, 100
EPOCH = len(x_train) // BATCH  # optimizer steps
STEPS = EPOCHS * EPOCH


def new_mlp():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((40,)),
            layers.Dense(256, activation="relu", name="hidden1"),
            layers.Dense(256, activation="relu", name="hidden2"),
            layers.Dense(10, name="logits"),
        ]
    )


# %%
class Watch(keras.callbacks.Callback):
    """Remembers which weights of the first kernel are active after each epoch."""

    def on_train_begin(self, logs=None):
        self.masks = [self.model.layers[0].kernel.numpy() != 0]

    def on_epoch_end(self, epoch, logs=None):
        self.masks.append(self.model.layers[0].kernel.numpy() != 0)


def train(model, epochs=EPOCHS):
    if not model.compiled:
        rate = keras.optimizers.schedules.CosineDecay(1e-2, STEPS)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss, steps_per_execution=EPOCH)
    watch = Watch()
    model.fit(x_train, y_train, BATCH, epochs, verbose=0, callbacks=[watch])
    return watch.masks


def accuracy(model):
    """Per cent of the test curves that the model gets right."""
    return 100 * float(np.mean(np.argmax(model(x_test), axis=-1) == y_test))


# %%
budget = {"sparsity": SPARSITY, "end_step": STEPS * 3 // 4, "frequency": EPOCH}
METHODS = {"SET": at.SET(**budget), "RigL": at.RigL(**budget)}
results = {name: [] for name in METHODS}
masks = {}
for name, method in METHODS.items():
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model = new_mlp()
        at.train_sparse(model, method)
        masks[name] = train(model)
        results[name].append(accuracy(model))

# %% mystnb={"image": {"alt": "Two panels, SET and RigL. Each row is a connection, drawn as a line in the epochs in which it is active. Many lines begin at the left edge and end early, some run through; new ones begin later. With RigL fewer begin towards the end; right of a dashed line at epoch 15 nothing changes."}, "figure": {"caption": "Lives of 120 connections of the first layer, while the network trains: each row is one, drawn where it is active. At any time as many are active as at any other. Behind the dashed line the mask rests.", "name": "fig-rotation"}} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True)
for ax, name in zip(axes, METHODS, strict=True):
    lives = np.array(masks[name]).reshape(EPOCHS + 1, -1).T
    lives = lives[lives.any(axis=1)]
    lives = lives[np.random.default_rng(0).permutation(len(lives))[:120]]
    first, age = lives.argmax(axis=1), lives.sum(axis=1)
    for row, life in enumerate(lives[np.lexsort((age, first))]):
        at_work = np.flatnonzero(life)
        for run in np.split(at_work, np.flatnonzero(np.diff(at_work) > 1) + 1):
            color = "#0072B2" if life[0] else "#D55E00"
            ax.plot([run[0] - 0.35, run[-1] + 0.35], [row, row], color=color, lw=1.6)
    ax.axvline(EPOCHS * 3 / 4, color="#777777", lw=1, ls="--")
    ax.set(xlabel="epoch", title=name, xlim=(-0.7, EPOCHS + 0.7), ylim=(-2, 121))
    ax.grid(False)
axes[0].set_ylabel("connection")
axes[0].text(0.2, 112, "in orange: grown while training", color="#D55E00", fontsize=9)
plt.show()

# %% tags=["remove-cell"]
sizes = [int(np.prod(w.shape)) for w in model.weights if len(w.shape) > 1]
glue("samples", f"{len(x_train):,}", display=False)
glue("weights", f"{sum(sizes):,}", display=False)
glue("active", f"{round(sum(sizes) * (1 - SPARSITY)):,}", display=False)
survived, tried = {}, {}
for name in METHODS:
    assert len({int(m.sum()) for m in masks[name]}) == 1  # the number never changes
    n = masks[name][0].sum()
    survived[name] = float(100 * (masks[name][0] & masks[name][-1]).sum() / n)
    tried[name] = float(np.any(masks[name], axis=0).sum() / n)
    glue(f"survived_{name}", survived[name], display=False)
    glue(f"tried_{name}", tried[name], display=False)
assert survived["SET"] < survived["RigL"] < 90
assert tried["SET"] > tried["RigL"] > 1.3
assert at.sparsity(model).total == 1 - round(sum(sizes) * (1 - SPARSITY)) / sum(sizes)

# %% [markdown]
# The network rewires itself. Of RigL's first connections in this layer {glue:text}`survived_RigL:.0f` % are left at the end, of SET's, which does not calm down,
# {glue:text}`survived_SET:.0f` %. Along the way RigL has tried {glue:text}`tried_RigL:.1f` times as many connections as it may hold at once, and SET {glue:text}`tried_SET:.1f` times.
#
# ## From scratch
#
# One rewiring in NumPy. The gradient `g` is the dense one, which Keras computes for every weight, zero or not:


# %%
def rewire(w, mask, g, fraction):
    """Drops the smallest of the active weights, grows where |g| is largest."""
    moved = round(fraction * mask.sum())
    magnitude = np.where(mask, np.abs(w), np.inf).ravel()
    attraction = np.where(mask, -np.inf, np.abs(g)).ravel()
    new = mask.copy().ravel()
    new[np.argsort(magnitude)[:moved]] = False  # drop
    new[np.argsort(-attraction)[:moved]] = True  # grow
    return new.reshape(w.shape)


# %% [markdown]
# For SET, put random numbers in place of `np.abs(g)`.
#
# How many weights should each layer get? The same sparsity everywhere starves small layers. The Erdős–Rényi rule, named after
# random graphs, gives a kernel with $n$ inputs and $m$ outputs a {term}`density` proportional to
#
# $$
# \frac{n + m}{n \, m},
# $$ (eq-erdos-renyi)
#
# so that each unit, be the layer large or small, gets about the same number of connections {footcite}`mocanu2018scalable`. For convolutions, RigL's authors
# add the width and height of the kernel to the sum and to the product.
#
# ## With `accel_tf`
#
# You have seen it: one call before `fit`. The report tells how the weights were distributed:

# %%
model = new_mlp()
at.train_sparse(model, at.RigL(SPARSITY, end_step=600, frequency=40, fraction=0.3))

# %% tags=["remove-cell"]
keras.utils.set_random_seed(0)
model, optimizer = new_mlp(), keras.optimizers.Adam()
check = at.RigL(SPARSITY, end_step=8, frequency=4)
at.train_sparse(model, check, optimizer=optimizer)
kernel = model.layers[0].kernel
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
for _ in range(4):
    mask = kernel.numpy() != 0
    with tf.GradientTape() as tape:
        value = loss(y_train[:BATCH], model(x_train[:BATCH]))
    gradients = tape.gradient(value, model.trainable_variables)
    before = kernel.numpy()
    optimizer.apply(gradients, model.trainable_variables)
now = kernel.numpy() != 0
g = gradients[0].numpy()
# Magnitudes are compared after the step, which for the dropped ones is not seen: compare what grows.
mine = rewire(before, mask, g, check.fraction_at(4))
grown, mine_grown = now & ~mask, mine & ~mask
np.testing.assert_array_equal(grown, mine_grown)
assert now.sum() == mask.sum() == mine.sum()
density = dict(zip(*map(at.sparsity(model).column, ("layer", "sparsity")), strict=True))
assert density["logits"] < density["hidden1"] < density["hidden2"]

# %% [markdown]
# The small last layer stays densest. By default kernels share by `"erdos_renyi_kernel"`; `distribution="uniform"` treats all alike.
#
# There is a riddle in this. {py:func}`~accel_tf.pruning.train_sparse` is a weight constraint, as pruning is: Keras calls it after the optimizer's step, with the new weight, and
# *without the gradient*. How does RigL know it? An inactive weight is zero before the step, and `accel_tf` keeps the optimizer's memory of it at zero, too. What one
# step leaves there is therefore made of this gradient alone: the weight itself for plain SGD, the momentum for Adam. So RigL needs no hook in the training
# loop, and works in `fit`, in your own loop, under {term}`XLA` and on several {term}`replicas <replica>`. A newly grown weight has no history that could mislead it.
#
# ## Measure: against pruning, at equal steps
#
# First a prediction. All networks below end with the same number of weights and get the same number of steps. *Static* keeps its first, random mask. *One-shot* trains
# dense for half of the steps, keeps the largest 5 % over all layers, and trains on. Static should lose to methods that correct
# their mask. One-shot knows more than a random draw, but removes 95 % at a blow:


# %%
def static(model):
    at.prune(model, at.OneShot(SPARSITY), scope="erdos_renyi_kernel")
    train(model)


def one_shot(model):
    train(model, EPOCHS // 2)
    at.prune(model, at.ConstantSparsity(SPARSITY, end_step=0), scope="global")
    train(model, EPOCHS // 2)


def gradual(model):
    end = STEPS * 3 // 4
    at.prune(model, at.PolynomialDecay(SPARSITY, end, frequency=EPOCH), scope="global")
    train(model)


for peer in (one_shot, static, gradual, train):
    results[peer.__name__] = []
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model = new_mlp()
        peer(model)
        results[peer.__name__].append(accuracy(model))
        assert peer is train or abs(at.sparsity(model).total - SPARSITY) < 1e-4

# %% mystnb={"image": {"alt": "Dots and bars of test accuracy: one-shot and static lowest, SET and RigL clearly above, gradual pruning above those, the dense network on top."}, "figure": {"caption": "Test accuracy after the same number of steps: three seeds each, and their mean. All but the dense network end with 5 % of the weights; the three in green have never had more.", "name": "fig-equal-steps"}} tags=["hide-input"]
names = {
    "one_shot": "pruned in one shot",
    "static": "static mask",
    "SET": "SET",
    "RigL": "RigL",
    "gradual": "pruned gradually",
    "train": "dense",
}
figure, axes = plt.subplots(figsize=(7.2, 3.0))
for row, name in enumerate(names):
    color = "#009E73" if name in ("static", "SET", "RigL") else "#0072B2"
    mean = np.mean(results[name])
    axes.barh(row, mean, color=color, alpha=0.35, height=0.62)
    axes.plot(results[name], [row] * 3, "o", color=color, ms=5)
    axes.text(
        max(results[name]) + 1.5, row, f"{mean:.1f} %", va="center", color="#333333"
    )
axes.set_yticks(range(len(names)), names.values())
axes.set(xlabel="accuracy [%]", xlim=(0, 82))
axes.grid(axis="y", visible=False)
plt.show()

# %% tags=["remove-cell"]
mean = {name: float(np.mean(r)) for name, r in results.items()}
for name, value in mean.items():
    glue(f"mean_{name}", value, display=False)
assert min(mean["SET"], mean["RigL"]) > mean["one_shot"] + 1
assert min(mean["SET"], mean["RigL"]) > mean["static"] + 1
assert abs(mean["SET"] - mean["RigL"]) < 5
assert mean["train"] > mean["RigL"] + 2
assert mean["gradual"] > mean["RigL"]

# %% [markdown]
# SET reaches {glue:text}`mean_SET:.1f` % and RigL {glue:text}`mean_RigL:.1f` %, against {glue:text}`mean_static:.1f` % with the mask that never moves and
# {glue:text}`mean_one_shot:.1f` % for pruning in one shot. Moving the weights pays. Between random growth and growth by gradient we see no difference that
# three seeds could prove; at the scale of ImageNet, RigL is ahead {footcite}`evci2020rigging`.
#
# ## When it does not help
#
# **When you can afford the dense network.** Look at the two upper bars. Gradual pruning, which holds all weights for most of the training, gets
# {glue:text}`mean_gradual:.1f` %, and the dense network {glue:text}`mean_train:.1f` %. The dense network is a better place to search than a sparse one. Dynamic sparse
# training is for when it does not fit, or when the steps are cheap and you can take more of them: RigL's authors close the gap by training longer.
#
# **It does not train faster here.** The zeros sit in dense kernels, and RigL asks for the dense gradient. Training takes as long as before, and the
# optimizer holds as many numbers. What is saved is in the file and in inference, once [](sparse_matmul.py) skips the zeros:

# %%
sparse, dense = new_mlp(), new_mlp()
at.train_sparse(sparse, METHODS["RigL"])
table = at.compare(
    {"dense": dense, "RigL": sparse}, x_test, latency_batch=256, rounds=20, verbose=0
)
table

# %% tags=["remove-cell"]
assert table["dense"].flops == table["RigL"].flops
assert (
    at.benchmark.file_size(sparse).gzipped < at.benchmark.file_size(dense).gzipped / 3
)

# %% [markdown]
# **When it moves too often, or to the very end.** A new weight starts at zero. If the next drop comes before it has grown, it goes again, whatever it could have become;
# and what is grown in the last step stays untrained. Leave a quarter of the steps after `end_step`.
#
# ## Use it in your project
#
# ```python
# import accel_tf as at
#
# model = ...                             # a fresh, built Keras 3 model
# steps = 50 * steps_per_epoch
# method = at.RigL(sparsity=0.9, end_step=steps * 3 // 4, frequency=100)
# print(at.train_sparse(model, method))
#
# model.compile(...)                      # before or after
# model.fit(x, y, epochs=50)              # exactly 90 % zeros after each step
#
# model.save("sparse.keras")              # a plain Keras file
# fast = at.sparsify(model)               # skips the zeros, where that is faster
# ```
#
# To go on after loading, call {py:func}`~accel_tf.pruning.train_sparse` again with `initial_step=int(model.optimizer.iterations)`: the zeros are the mask. The methods are
# {py:class}`~accel_tf.pruning.RigL` and {py:class}`~accel_tf.pruning.SET`; [](pruning.py) shows their rival.
#
# ## Takeaways
#
# - A sparse network can be trained from scratch, if its connections may move: drop the smallest, grow at random or by gradient.
# - At equal steps it beats one-shot pruning and a static mask; gradual pruning beats it, at the price of a dense network.
# - The budget is constant at every step, but nothing is faster until a kernel skips the zeros.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-dynamic-1
# How many weights does RigL replace in all, as a multiple of the number that is active, if it rewires $k$ times at equal distances before $T_\text{end}$?
# Use {eq}`eq-rigl`, then check with `fraction_at`.
# :::
#
# :::{solution-start} ex-dynamic-1
# :class: dropdown
# :::
#
# The cosines of $\pi i / (k+1)$, $i = 1 \ldots k$, cancel in pairs, so the fractions add up to $k \alpha / 2$:

# %%
sum(at.RigL(0.9, end_step=1000).fraction_at(step) for step in range(100, 1000, 100))

# %% tags=["remove-cell"]
total = sum(at.RigL(0.9, end_step=1000).fraction_at(t) for t in range(100, 1000, 100))
assert abs(total - 9 * 0.3 / 2) < 1e-6

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-dynamic-2
# By {eq}`eq-erdos-renyi`, how many connections does each *output* of a layer with $n$ inputs get, up to a common factor? Which layers would be asked for a density above 1?
# :::
#
# :::{solution} ex-dynamic-2
# :class: dropdown
# Density times inputs: $n \cdot (n + m)/(n m) = 1 + n/m$. A layer that narrows gets more connections per output than one that widens. The densest are the smallest:
# with a factor $\varepsilon$, the density exceeds 1 where $\varepsilon\,(1/n + 1/m) > 1$. Such a layer stays dense, and the others get what it cannot take.
# :::
#
# ## References
#
# ```{footbibliography}
# ```
