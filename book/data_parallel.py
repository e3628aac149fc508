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
# # Data parallelism: one model, several devices
#
# **Train on all devices of a machine at once, and get the weights that one device would have given.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 12 minutes to read, under a minute to run · **You need** Keras, gradient descent ·
# **Module** {py:mod}`accel_tf.distribute`
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
tf.get_logger().setLevel("ERROR")  # TensorFlow would note each reduction

# %% [markdown]
# ## You will learn to
#
# - **prove**, with your own split of a batch, that averaging the replicas' gradients changes nothing;
# - **train** on several devices with three lines, and check that the weights are those of one device;
# - **predict** how much faster it can be, and how far the learning rate may grow with the batch.
#
# ## Intuition: a mean of means
#
# Data parallelism copies the model to $N$ devices. Each of these {term}`replicas <replica>` gets its share of the batch and computes
# a gradient $g_i$; then all exchange their gradients, so that each holds the mean, and take the same step:
#
# $$
# g \;=\; \frac{1}{N} \sum_{i=1}^{N} g_i
# $$ (eq-mean-gradient)
#
# If the shares have equal size, this is the gradient of the whole batch, exactly: the loss of a batch is a mean, and a mean of
# means over equal shares is the mean. The replicas start equal, step equally, and so stay equal. Nothing is
# approximated; that sets this *synchronous* scheme apart from all the others.
#
# The price is the exchange, called {term}`all-reduce`. Done in a ring, where each device passes pieces on to its neighbour, each
# device sends and receives
#
# $$
# \text{bytes per step} \;=\; 2\,\frac{N-1}{N}\,\cdot\,\text{bytes of the gradient}
# $$ (eq-all-reduce)
#
# which hardly grows with $N$, and no algorithm can do with less {footcite}`patarasuk2009bandwidth`. If a replica calculates for
# $t_c$ seconds and the links carry $\beta$ bytes/s, then $N$ replicas do $N \cdot E$ times the work of one, where the efficiency is at
# least $E = t_c / (t_c + \text{bytes}/\beta)$. The better the calculation hides the exchange, the closer to 1.


# %%
def efficiency(replicas, gradient_bytes, bandwidth, compute_seconds):
    exchanged = 2 * (replicas - 1) / replicas * gradient_bytes
    return compute_seconds / (compute_seconds + exchanged / bandwidth)


# %% mystnb={"image": {"alt": "Left: a batch is split over two replicas; their gradients are averaged by an all-reduce, and both take the same step. Right: efficiency against the number of replicas, falling fast and then staying level, at three heights for three bandwidths."}, "figure": {"caption": "Left: one synchronous step. Right: the efficiency that the two equations promise for a ResNet-50 (25.6 million weights, 100 ms per step), without overlap of calculation and exchange. It falls at once and then hardly: a ring's cost does not grow with the number of devices.", "name": "fig-data-parallel"}} tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.6), width_ratios=(1, 1.1))
blue, orange = "#cfe5f3", "#fbdcc6"
boxes = [
    (0.5, 3, "global batch", "white"),
    (0.5, 1, "all-reduce:\n$g = (g_0 + g_1) / 2$", orange),
]
boxes += [(i, 2, f"replica {i}: $g_{i}$", blue) for i in (0, 1)]
boxes += [(i, 0, "step along $g$", blue) for i in (0, 1)]
for x, y, text, color in boxes:
    frame = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "0.4"}
    left.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame, zorder=3)
for i in (0, 1):
    for start, end in (((0.5, 3), (i, 2)), ((i, 2), (0.5, 1)), ((0.5, 1), (i, 0))):
        arrow = {"arrowstyle": "->", "color": "0.4", "shrinkA": 20, "shrinkB": 20}
        left.annotate("", end, start, arrowprops=arrow)
left.set(xlim=(-0.5, 1.5), ylim=(-0.5, 3.5), title="One step")
left.axis("off")
replicas = np.arange(1, 17)
for name, link in {
    "NVLink, 300 GB/s": 300e9,
    "PCIe, 25 GB/s": 25e9,
    "10 Gbit/s": 1.25e9,
}.items():
    gain = efficiency(replicas, 4 * 25.6e6, link, 0.1)
    right.plot(replicas, gain, "o-", markersize=4, label=name)
right.set_xticks([1, 2, 4, 8, 16])
right.set(
    xlabel="replicas $N$",
    ylabel="efficiency $E$",
    title="What it can gain",
    ylim=(0, 1.05),
)
right.legend(fontsize=9)
plt.show()

# %% tags=["remove-cell"]
slow, fast = (efficiency(8, 4 * 25.6e6, b, 0.1) for b in (1.25e9, 300e9))
glue("slow", f"{100 * slow:.0f}", display=False)
glue("fast", f"{100 * fast:.0f}", display=False)
assert fast > 0.98 and slow < 0.5
assert efficiency(2, 4 * 25.6e6, 1.25e9, 0.001) < 0.05

# %% [markdown]
# On eight replicas, the same model is {glue:text}`fast` % efficient over NVLink, and {glue:text}`slow` % over 10 Gbit/s Ethernet.
#
# ## From scratch
#
# We need devices. This page was made without a GPU, so we split the CPU into two *logical* devices. It has to be the first thing that
# TensorFlow does, since it fixes its devices when it starts.

# %%
strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
print([device.name for device in tf.config.list_logical_devices("CPU")])

# %% [markdown]
# A step of data parallelism by hand: split the batch, take a gradient for each share, average. Then the same with the
# batch as a whole.

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.digits()
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_model(*normalization):
    keras.utils.set_random_seed(1)
    hidden = [keras.layers.Dense(64), *normalization, keras.layers.ReLU()]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            *hidden,
            keras.layers.Dense(10),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return model


def gradient(model, x, y):
    with tf.GradientTape() as tape:
        value = loss(y, model(x, training=True))
    return tape.gradient(value, model.trainable_variables)


# %%
model = make_model()
x, y = x_train[:64], y_train[:64]
shares = [gradient(model, x[i::2], y[i::2]) for i in range(2)]  # each device its share
mean = [sum(g) / 2 for g in zip(*shares, strict=True)]  # the all-reduce
whole = gradient(model, x, y)
difference = max(np.abs(a - b).max() for a, b in zip(mean, whole, strict=True))
print(f"largest difference: {difference:.1e}")

# %% tags=["remove-cell"]
assert difference < 1e-6
assert max(np.abs(a - b).max() for a, b in zip(shares[0], whole, strict=True)) > 1e-3

# %% [markdown]
# What is left is rounding. (The shares' own gradients differ from each other by much more: it is the mean that agrees.)
#
# ## With `accel_tf`
#
# Keras does the splitting, the exchange and the stepping, once a model is built and compiled in the scope of a
# strategy. We train twice: on one device, and on two with the same {term}`global batch`.


# %%
def train(model, data):
    model.fit(data, epochs=3, shuffle=False, verbose=0)
    return model


samples = tf.data.Dataset.from_tensor_slices((x_train, y_train))
one = train(make_model(), samples.batch(64))

with strategy.scope():
    two = make_model()
two = train(two, at.distribute.even_batches(samples, 64))


# %% tags=["remove-cell"]
def distance(a, b):
    return max(
        np.abs(u - v).max()
        for u, v in zip(a.get_weights(), b.get_weights(), strict=True)
    )


assert distance(one, make_model()) > 0.05  # it has learned something
assert distance(one, two) < 1e-5
glue("distance", f"{distance(one, two):.0e}", display=False)
glue("remainder", len(x_train) % 64, display=False)

# %% [markdown]
# After three epochs, the largest difference between any two weights is {glue:text}`distance`: rounding again.
#
# One line deserves a second look: {py:func}`accel_tf.distribute.even_batches`. Our training set is no multiple of 64; the last batch has
# {glue:text}`remainder` samples, an odd number. Keras averages over each replica's share and then over the replicas, so
# in an uneven split, a sample of the smaller share counts more. {eq}`eq-mean-gradient` asks for equal shares, and `even_batches` provides
# them: it fills the batch with repeated samples of weight 0, and weighs the real ones up. This is what it is worth:

# %%
with strategy.scope():
    uneven = make_model()
uneven = train(uneven, samples.batch(64))

# %% tags=["remove-cell"]
assert distance(one, uneven) > 20 * distance(one, two)
glue("uneven", f"{distance(one, uneven):.0e}", display=False)

# %% [markdown]
# Without it, the weights are {glue:text}`uneven` apart. That is no disaster for the accuracy; it is one when you are looking for a bug by comparing
# runs. With fewer samples in the last batch than replicas, training would stop with an error.
#
# ## Measure
#
# Is it faster? Predict first: {eq}`eq-all-reduce` has nothing to say here, since our two devices share the cores of one processor. There is
# no second calculator, only a second set of books to keep. The best that we can hope for is a draw.


# %%
def step_function(model):
    """One training step on a global batch of 256, as a plain function to time."""
    data = tf.data.Dataset.from_tensors((x_train[:256], y_train[:256])).cache().repeat()
    model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)
    batches = iter(
        strategy.experimental_distribute_dataset(data) if model is two else data
    )
    return lambda _: model.train_function(batches)


times = at.measure_latency(
    {"one device": step_function(one), "two logical devices": step_function(two)},
    None,
    rounds=40,
    verbose=0,
)
for name, time in times.items():
    print(f"{name:<20} {time}")

# %% tags=["remove-cell"]
slowdown = times["two logical devices"].median / times["one device"].median
glue("slowdown", f"{slowdown:.1f}", display=False)
glue(
    "efficiency", f"{100 / (2 * slowdown):.0f}", display=False
)  # half the time would be 100 %
assert efficiency(2, 4 * 25.6e6, 25e9, 0.1) > 0.9
assert slowdown > 1

# %% [markdown]
# It is no draw: two logical devices take {glue:text}`slowdown` times as long for the same step. On one processor, TensorFlow already
# used every core for one replica, and now it also copies, synchronises and reduces. The efficiency is {glue:text}`efficiency` %, where
# {numref}`fig-data-parallel` promises more than 90 % to two real devices with a real link. **Logical devices are for learning, testing and
# debugging**: a script that is right on two of them is right on eight GPUs. Speed comes with hardware.
#
# ### How far may the learning rate grow?
#
# With more devices one wants a larger global batch, else each replica starves. A batch $k$ times as large makes $k$ times fewer
# steps in an epoch, so each step should go further. The **linear rule** multiplies the learning rate by $k$ as well
# {footcite}`goyal2017large`: $k$ small steps along nearly the same gradient make one large one. The more careful **square-root rule**
# multiplies it by $\sqrt{k}$, which keeps the variance of a step {footcite}`krizhevsky2014weird`.

# %%
batch, rate = at.distribute.scale_batch(
    strategy, per_replica_batch=16, learning_rate=0.05
)
print(batch, rate)

# %% [markdown]
# Both are promises about a *small* step. Let us see where they break: the same 8 epochs, with batches from 16 to 1024, for each
# rule, and for none.

# %%
student, start = make_model(), make_model().get_weights()
optimizer = keras.optimizers.SGD(0.05)
optimizer.build(student.trainable_variables)
spec = tf.TensorSpec([None, 8, 8, 1]), tf.TensorSpec([None], tf.int32)


@tf.function(input_signature=spec)  # traced once, for batches of any size
def step(x, y):
    optimizer.apply(gradient(student, x, y))


# %%
def accuracy_after(batch, rate, epochs=8):
    student.set_weights(start)
    optimizer.learning_rate = rate
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(x_train))
        for i in range(0, len(order), batch):
            step(x_train[order[i : i + batch]], y_train[order[i : i + batch]])
    return np.mean(student(x_test).numpy().argmax(-1) == y_test)


factors = [1, 2, 4, 8, 16, 32, 64]
powers = {"constant": 0, "square root": 0.5, "linear": 1}
accuracies = {
    rule: [accuracy_after(16 * k, 0.05 * k**power) for k in factors]
    for rule, power in powers.items()
}

# %% mystnb={"image": {"alt": "Test accuracy against the factor of the batch for three rules. With a constant learning rate it falls steadily; with the square root more slowly; the linear rule stays level up to a point and then collapses."}, "figure": {"caption": "Test accuracy after the same number of epochs, as the batch grows k-fold. A constant rate learns too little in too few steps. The linear rule makes up for it, until its steps become unstable.", "name": "fig-scaling-rules"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.2, 3.2))
for (rule, values), marker in zip(accuracies.items(), "sDo", strict=True):
    axes.plot(
        factors, 100 * np.array(values), marker=marker, label=f"{rule} learning rate"
    )
axes.set_xscale("log", base=2)
axes.set_xticks(factors, [f"{k}\n({16 * k})" for k in factors])
axes.set(
    xlabel="factor $k$ (global batch in samples)",
    ylabel="test accuracy [%]",
    title="Scaling rules",
)
axes.legend(loc="lower left")
plt.show()

# %% tags=["remove-cell"]
linear = dict(zip(factors, accuracies["linear"], strict=True))
constant = dict(zip(factors, accuracies["constant"], strict=True))
glue("base", f"{100 * linear[1]:.1f}", display=False)
glue("linear8", f"{100 * linear[8]:.1f}", display=False)
glue("constant8", f"{100 * constant[8]:.1f}", display=False)
glue("sqrt64", f"{100 * accuracies['square root'][-1]:.1f}", display=False)
assert accuracies["square root"][-1] > linear[64] + 0.2
glue("linear64", f"{100 * linear[64]:.1f}", display=False)
assert linear[8] > constant[8] + 0.05 and linear[8] > linear[1] - 0.08
assert linear[64] < linear[8] - 0.3

# %% [markdown]
# At $k = 8$ the linear rule still reaches {glue:text}`linear8` %, against {glue:text}`base` % with the small batch and
# {glue:text}`constant8` % with a constant rate. At $k = 64$ its rate of 3.2 is too much: {glue:text}`linear64` %. A {term}`warm-up` of some
# epochs moves that point further out, as the gradient changes fastest at the start; nothing removes it. The square-root
# rule bends instead of breaking: it keeps {glue:text}`sqrt64` %.
#
# ## When it does not help
#
# **Batch normalization sees less.** A `BatchNormalization` layer {footcite}`ioffe2015batch` normalises by the mean and variance of *its
# replica's share*, so the promise of equal weights is off:

# %%
with strategy.scope():
    local = make_model(keras.layers.BatchNormalization())
    synced = make_model(keras.layers.BatchNormalization(synchronized=True))
even = samples.take(1408).batch(64)  # 22 full batches
local, synced = train(local, even), train(synced, even)
local_one = train(make_model(keras.layers.BatchNormalization()), even)
print(
    f"per replica: {distance(local_one, local):.0e}, synchronized: {distance(local_one, synced):.0e}"
)

# %% tags=["remove-cell"]
assert distance(local_one, local) > 100 * distance(local_one, synced)
assert distance(local_one, synced) < 1e-3

# %% [markdown]
# `synchronized=True` computes the statistics over the global batch and restores the equality, at the price of one more exchange per layer. The fewer samples a replica
# gets, the noisier its statistics, and the more that is worth.
#
# **Small models do not scale.** The exchange costs the same however short the calculation is: at $t_c$ of a millisecond, {numref}`fig-data-parallel`
# would have its 10 Gbit/s line near zero. **Models that do not fit** on one device are not helped at all: each replica holds all
# the weights.
#
# ## Use it in your project
#
# ```python
# import accel_tf as at
#
# strategy = at.mirrored_strategy()  # first; all GPUs, else two logical CPU devices
# batch, rate = at.distribute.scale_batch(strategy, 32, learning_rate=0.05)
#
# with strategy.scope():
#     model = make_model()
#     optimizer = keras.optimizers.SGD(rate, momentum=0.9)
#     model.compile(optimizer, loss, weighted_metrics=["accuracy"])
#
# batches = at.distribute.even_batches(samples.shuffle(10_000), batch)
# model.fit(batches, epochs=10)
# ```
#
# See {py:func}`accel_tf.distribute.mirrored_strategy`, {py:func}`accel_tf.distribute.scale_batch`,
# {py:func}`accel_tf.distribute.even_batches`.
#
# ## Takeaways
#
# - The mean of the replicas' gradients is the gradient of the batch, if the shares are equal: the same weights, up to rounding.
# - The exchange moves about twice the gradient's bytes, on any number of devices. Compare it with $t_c$ before you buy any.
# - Scale the learning rate with the batch, linearly, with warm-up, and look for the point where it breaks.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-data-parallel-1
# A model has 340 million float32 weights (BERT-large), and a step takes 0.25 s on one device. Eight devices are linked at 25 GB/s. What is the
# efficiency without overlap? And with gradients exchanged in float16?
# :::
#
# :::{solution-start} ex-data-parallel-1
# :class: dropdown
# :::

# %%
for name, width in {"float32": 4, "float16": 2}.items():
    print(f"{name}: {efficiency(8, width * 340e6, 25e9, 0.25):.2f}")

# %% [markdown]
# Halving the bytes halves the exchange, not the loss of efficiency: $E = 1 / (1 + \text{exchange}/t_c)$.
#
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-data-parallel-2
# Split the batch of 64 into shares of 48 and 16 and average as before. How must the shares be weighted to get the gradient of the whole
# batch?
# :::
#
# :::{solution-start} ex-data-parallel-2
# :class: dropdown
# :::
#
# By their sizes, $g = \sum_i \frac{n_i}{n} g_i$:

# %%
shares = gradient(model, x[:48], y[:48]), gradient(model, x[48:], y[48:])
for weights in ((1 / 2, 1 / 2), (48 / 64, 16 / 64)):
    mean = [weights[0] * a + weights[1] * b for a, b in zip(*shares, strict=True)]
    error = max(np.abs(a - b).max() for a, b in zip(mean, whole, strict=True))
    print(weights, f"{error:.0e}")

# %% [markdown]
# :::{solution-end}
# :::

# %% tags=["remove-cell"]
assert error < 1e-6

# %% [markdown]
# :::{exercise}
# :label: ex-data-parallel-3
# Replica 1 is a slower GPU than replica 0. What happens to the time of a step, and what could you change?
# :::
#
# :::{solution} ex-data-parallel-3
# :class: dropdown
# The all-reduce waits for the slowest, so every step takes as long as the slow device needs for its share. Give it a smaller share, weighted as in
# the exercise before; or leave it out, if it is less than half as fast as the other (with two devices).
# :::
#
# ## References
#
# ```{footbibliography}
# ```
