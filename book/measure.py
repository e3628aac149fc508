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
# # Measure before you accelerate
#
# **Find out where a model's time and memory go, in numbers you can trust, before you change anything.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 14 minutes to read, under a minute to run · **You need** Keras, a little linear algebra ·
# **Module** {py:mod}`accel_tf.benchmark`
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
# - **time** a model so that somebody else gets the same number;
# - **count** its operations and bytes by hand, and place it under the roofline of your machine;
# - **tell** what a complexity $O(\cdot)$ says about run time, and what it does not.
#
# ## Intuition: two limits
#
# A processor does two things at once: it calculates, and it fetches numbers to calculate with. A layer that needs $F$
# floating-point operations (FLOPs) and moves $Q$ bytes cannot finish before both are done:
#
# $$
# t \;\ge\; \max\left(\frac{F}{\pi},\; \frac{Q}{\beta}\right)
# $$ (eq-roofline)
#
# where $\pi$ is the machine's peak in FLOP/s and $\beta$ its memory bandwidth in bytes/s. This is the *roofline model*
# {footcite}`williams2009roofline`. What decides which limit bites is the {term}`arithmetic intensity` $I = F/Q$: how many operations
# a layer does with each byte it fetches. Below the *ridge* $\pi/\beta$, a faster calculator is of no use; above it,
# faster memory is of none.
#
# We can measure both limits. The peak is what a large matrix product reaches; the bandwidth, what adding two long
# arrays reaches:

# %%
limits = at.benchmark.roofline()
print(limits)
at.benchmark.host()

# %% tags=["remove-cell"]
glue("peak", f"{limits.peak / 1e9:.0f}", display=False)
glue("bandwidth", f"{limits.bandwidth / 1e9:.0f}", display=False)
glue("ridge", f"{limits.ridge:.1f}", display=False)
assert limits.ridge > 0.1

# %% [markdown]
# So this page was made by a machine of {glue:text}`peak` GFLOP/s and {glue:text}`bandwidth` GB/s. Its ridge lies at
# {glue:text}`ridge` FLOP/byte: a program that does less with each byte is waiting for memory.
#
# Let us put real layers under that roof. One `Dense` layer with a 4096 × 4096 kernel takes batches of 1 to 256; two
# convolutions take 16 images; and a small network for handwritten digits, our baseline in this book, takes a batch
# of 1 and one of 256.

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.digits()


def conv(filters):
    return [
        keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
        keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.ReLU(),
        keras.layers.MaxPooling2D(),
    ]


# %%
cnn = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        *conv(16),
        *conv(32),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
cnn.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
cnn.fit(x_train, y_train, batch_size=64, epochs=10, verbose=0)
baseline_accuracy = cnn.evaluate(x_test, y_test, verbose=0)[1]

# %% tags=["remove-cell"]
glue("accuracy", f"{100 * baseline_accuracy:.1f}", display=False)
assert baseline_accuracy > 0.95

# %% [markdown]
# The baseline classifies {glue:text}`accuracy` % of the test images correctly. Now each workload gets its two
# coordinates: the FLOPs per byte that it needs, and the FLOPs per second that it reaches.


# %%
def point(model, x):
    """Arithmetic intensity in FLOP/byte, and attained FLOP/s."""
    flops = at.benchmark.flops(model, x)
    numbers = (
        x.size + model.count_params() + np.prod(model.compute_output_shape(x.shape))
    )
    times = at.measure_latency({"": model}, x, rounds=12, warmup=2, verbose=0)
    seconds = times[""].median
    return flops / (4 * numbers), flops / seconds  # four bytes each


def alone(shape, layer):
    return keras.Sequential([keras.Input(shape), layer])


def batch(n, *shape):
    return np.random.default_rng(0).normal(size=(n, *shape)).astype("float32")


# %%
dense = alone((4096,), keras.layers.Dense(4096, use_bias=False))
points = {
    f"Dense, batch {n}": point(dense, batch(n, 4096)) for n in (1, 4, 16, 64, 256)
}
for name, layer in (
    ("Conv 3×3", keras.layers.Conv2D),
    ("Depthwise 3×3", keras.layers.DepthwiseConv2D),
):
    size = (64, 3) if layer is keras.layers.Conv2D else (3,)
    points[name] = point(
        alone((32, 32, 64), layer(*size, padding="same")), batch(16, 32, 32, 64)
    )
points |= {f"digits CNN, batch {n}": point(cnn, batch(n, 8, 8, 1)) for n in (1, 256)}

# %% mystnb={"image": {"alt": "Log-log plot. A roof rises with slope one and becomes flat at the ridge. A dense layer climbs along the slanted roof from batch 1 to the flat part at batch 256; the digits CNN at batch 1 lies far below the roof."}, "figure": {"caption": "The roofline of the machine that built this page, and what real layers reach under it. The same Dense layer climbs from the slanted roof (memory) to the flat one (arithmetic) as its batch grows. The small CNN at batch 1 touches neither: its time goes to overhead.", "name": "fig-roofline"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.2, 4.4))
intensity = np.geomspace(0.2, 400, 200)
axes.loglog(
    intensity, limits.attainable(intensity) / 1e9, color="black", label="roofline"
)
axes.axvline(limits.ridge, color="0.6", linestyle=":", linewidth=1)
markers = {"Dense": "o-", "digits CNN": "^-", "Conv 3×3": "s", "Depthwise 3×3": "D"}
labels = {"Dense": " 4096², batch 1…256", "digits CNN": ", batch 1 and 256"}
for kind, marker in markers.items():
    xy = np.array([p for name, p in points.items() if name.startswith(kind)])
    axes.loglog(
        xy[:, 0], xy[:, 1] / 1e9, marker, linewidth=1, label=kind + labels.get(kind, "")
    )
for name, offset in (("Dense, batch 1", (8, -12)), ("digits CNN, batch 1", (8, -4))):
    xy = points[name][0], points[name][1] / 1e9
    axes.annotate(name, xy, offset, textcoords="offset points", fontsize=9)
axes.text(
    0.9 * limits.ridge, axes.get_ylim()[0] * 1.4, "ridge", color="0.4", ha="right"
)
axes.set(xlabel="arithmetic intensity [FLOP/byte]", ylabel="attained [GFLOP/s]")
axes.set_title("What real layers reach under the roof")
axes.legend(loc="lower right", fontsize=9)
plt.show()

# %% tags=["remove-cell"]
rate = {name: p[1] for name, p in points.items()}
glue(
    "dense_gain",
    f"{rate['Dense, batch 256'] / rate['Dense, batch 1']:.0f}",
    display=False,
)
cnn_share = rate["digits CNN, batch 1"] / limits.attainable(
    points["digits CNN, batch 1"][0]
)
glue("cnn_share", f"{100 * cnn_share:.1f}", display=False)
glue(
    "cnn_gain",
    f"{rate['digits CNN, batch 256'] / rate['digits CNN, batch 1']:.0f}",
    display=False,
)
assert rate["Dense, batch 256"] > 2 * rate["Dense, batch 1"]
assert cnn_share < 0.25
assert rate["digits CNN, batch 256"] > 3 * rate["digits CNN, batch 1"]
assert all(r < 3 * limits.attainable(i) for i, r in points.values())

# %% [markdown]
# Three different diseases, and each needs another medicine:
#
# - **Memory-bound** (`Dense` at batch 1): every weight is fetched to be used once. Smaller weights help: quantization,
#   pruning with a sparse kernel. So does a larger batch, which reached {glue:text}`dense_gain` times the FLOP/s.
# - **Compute-bound** (convolutions, large batches): fewer or cheaper operations help.
# - **Overhead-bound** (the CNN at batch 1, {glue:text}`cnn_share` % of what the roof allows): the time goes to starting
#   operations, not to doing them. Batching made it {glue:text}`cnn_gain` times as efficient; an interpreter with less
#   ceremony, such as LiteRT, helps too. Removing FLOPs does not.
#
# ## From scratch: a stopwatch that does not lie
#
# The obvious way to time a model is wrong in three ways. Here it is:

# %%
import time

forward = tf.function(lambda x: cnn(x, training=False))
image = tf.constant(x_test[:1])

start = time.time()
forward(image)
first = time.time() - start

seconds = []
for _ in range(200):
    start = time.perf_counter()
    forward(image).numpy()
    seconds.append(time.perf_counter() - start)

# %% tags=["remove-cell"]
glue("first", f"{first * 1e3:.0f}", display=False)
glue("steady", f"{np.median(seconds) * 1e3:.2f}", display=False)
glue("first_ratio", f"{first / np.median(seconds):.0f}", display=False)
glue("slowest", f"{max(seconds) / np.median(seconds):.1f}", display=False)
assert first > 5 * np.median(seconds)
assert np.mean(seconds) >= 0.9 * np.median(seconds)

# %% [markdown]
# 1. **The first call is not like the others.** It took {glue:text}`first` ms, {glue:text}`first_ratio` times the
#    {glue:text}`steady` ms of a later one, because TensorFlow traced and optimised the graph. Warm up, then measure.
# 2. **One number is no measurement.** The slowest of the 200 calls took {glue:text}`slowest` times the median: some other
#    program ran, a page was fetched. Such a tail pulls a mean away; the median and the interquartile range stay
#    {footcite}`hoefler2015benchmarking`. And wait for the result (`.numpy()`): on a GPU, a call returns before it has finished.
# 3. **Conditions drift.** Processors heat up and slow down; neighbours come and go. What is measured second is then
#    measured on another machine.
#
# The third is the nastiest, for it invents speed-ups. We cannot overheat your processor on purpose, so here is a
# stand-in: a function that gets slower with every call. We time two candidates that are *the same* function:


# %%
def throttling(step=4e-6):
    calls = iter(range(1_000_000))
    return lambda: time.sleep(0.0005 + step * next(calls))


def stopwatch(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# %%
a = b = throttling()
one_after_the_other = {
    "a": [stopwatch(a) for _ in range(150)],
    "b": [stopwatch(b) for _ in range(150)],
}

a = b = throttling()
interleaved = {"a": [], "b": []}
for _ in range(150):
    interleaved["a"].append(stopwatch(a))
    interleaved["b"].append(stopwatch(b))


# %% tags=["remove-cell"]
def ratio(times):
    return np.median(times["b"]) / np.median(times["a"])


glue("sequential_ratio", f"{ratio(one_after_the_other):.2f}", display=False)
glue("interleaved_ratio", f"{ratio(interleaved):.2f}", display=False)
assert ratio(one_after_the_other) > 1.25
assert abs(ratio(interleaved) - 1) < 0.15

# %% [markdown]
# Measured one after the other, `b` seems {glue:text}`sequential_ratio` times as slow as `a`, which is itself. Taking turns, it
# is {glue:text}`interleaved_ratio` times as slow: the drift hits both alike. All the comparisons in this book take turns.
#
# ## With `accel_tf`
#
# {py:func}`accel_tf.benchmark.measure_latency` does all of it, for models, `.tflite` files and plain functions:

# %%
candidates = {"cnn": cnn, "my tf.function": lambda x: forward(x)}
times = at.measure_latency(candidates, image)
print(times["cnn"], "|", times["my tf.function"])

# %% tags=["remove-cell"]
assert 0.2 < times["cnn"].median / np.median(seconds) < 5  # both stopwatches agree
assert 0.2 < times["my tf.function"].median / times["cnn"].median < 5

# %% [markdown]
# ### Counting operations
#
# A multiply–add is two FLOPs, and nearly all of a network is multiply–adds. A `Dense` layer does one for each weight and
# sample. A convolution does one for each weight *and each output position*, which is why it has few weights and
# many FLOPs. So we can count our CNN from its kernels alone:

# %%
flops_by_hand, rows = 0, []
for layer in cnn.layers:
    if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
        kernel = layer.kernel.shape
        positions = np.prod(layer.output.shape[1:-1])  # 1 for Dense
        flops = int(2 * np.prod(kernel) * positions)
        flops_by_hand += flops
        weights = int(np.prod(kernel))
        rows.append((layer.name, str(kernel), f"{weights:,}", f"{flops:,}"))

at.report.Table(("layer", "kernel", "weights", "FLOPs"), rows)

# %% tags=["remove-cell"]
assert flops_by_hand == at.benchmark.flops(cnn)
conv_flops, dense_flops = (
    sum(int(r[3].replace(",", "")) for r in rows if r[0].startswith(kind))
    for kind in ("conv", "dense")
)
conv_weights, dense_weights = (
    sum(int(r[2].replace(",", "")) for r in rows if r[0].startswith(kind))
    for kind in ("conv", "dense")
)
glue("conv_flops", f"{100 * conv_flops / flops_by_hand:.0f}", display=False)
glue(
    "dense_weights",
    f"{100 * dense_weights / (conv_weights + dense_weights):.0f}",
    display=False,
)
assert conv_flops > dense_flops and dense_weights > conv_weights

# %% [markdown]
# {py:func}`accel_tf.benchmark.flops` gives the same number, and does so for any model, since it walks the traced graph. Look at the
# two columns: the convolutions do {glue:text}`conv_flops` % of the work, the dense layers hold
# {glue:text}`dense_weights` % of the weights. *Smaller* and *faster* are different goals, often in different layers.
#
# ### Asking the profiler
#
# When you do not know which layer is slow, let TensorFlow tell you. Its profiler records every operation; TensorBoard
# draws the trace, and a few lines sum it up:

# %%
import collections
import glob
import tempfile

from tensorflow.tsl.profiler.protobuf import xplane_pb2

folder = tempfile.mkdtemp()
images = tf.constant(x_train[:256])
forward(images)  # warm-up: this shape is new
with tf.profiler.experimental.Profile(folder):
    for _ in range(20):
        forward(images).numpy()

# %%
path = glob.glob(folder + "/**/*.xplane.pb", recursive=True)[0]
trace = xplane_pb2.XSpace.FromString(open(path, "rb").read())
cpu = next(plane for plane in trace.planes if "host:CPU" in plane.name)
busy = collections.Counter()
for line in cpu.lines:
    for event in line.events:
        label = cpu.event_metadata[event.metadata_id].name
        name, _, kind = label.partition(":")
        if "/" in name:  # an operation of the model: "path/in/graph:Kind"
            busy[kind.strip("_")] += event.duration_ps / 1e9 / 20

at.report.Table(("operation", "ms per call"), busy.most_common(5))

# %% tags=["remove-cell"]
ranked = [kind for kind, _ in busy.most_common()]
assert any("Conv2D" in kind for kind in ranked[:3])

# %% [markdown]
# The convolutions are near the top, as their FLOPs said. What the FLOPs did not say is how much time goes to
# operations with no multiply–adds at all, such as pooling.
#
# ## Measure: one table for every question
#
# {py:func}`accel_tf.benchmark.compare` puts quality and cost side by side. Two peers challenge our CNN: a
# perceptron with one hidden layer, and a CNN whose second convolution is *separable* (a depthwise filter for each channel, then a
# 1 × 1 convolution {footcite}`chollet2017xception`). Before you look: the perceptron has the fewest FLOPs. Will it be fastest? And the
# smallest?

# %%
mlp = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
separable = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        *conv(16),
        keras.layers.SeparableConv2D(32, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)

# %%
for model in (mlp, separable):
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x_train, y_train, batch_size=64, epochs=10, verbose=0)

models = {"cnn": cnn, "separable": separable, "mlp": mlp}
table = at.compare(models, x_test, y_test, verbose=0)
table

# %% tags=["remove-cell"]
flop_ratio = table["cnn"].flops / table["mlp"].flops
glue("mlp_flops", f"{flop_ratio:.0f}", display=False)
glue("mlp_speed", f"{table.speedup('mlp'):.1f}", display=False)
glue(
    "mlp_points",
    f"{100 * (table['cnn'].score - table['mlp'].score):.1f}",
    display=False,
)
assert table["cnn"].score > table["mlp"].score
assert table["mlp"].flops < table["separable"].flops < table["cnn"].flops
assert flop_ratio > 2 * table.speedup("mlp")

# %% [markdown]
# The perceptron needs {glue:text}`mlp_flops` times fewer FLOPs, and is {glue:text}`mlp_speed` times as fast, no more: at batch 1,
# calling TensorFlow costs more than the mathematics. It also loses {glue:text}`mlp_points` points of accuracy. The baseline to
# beat, for the rest of the book, is the first row.
#
# ## When counting does not help
#
# **FLOPs are not time.** Replace a 3 × 3 convolution of 64 channels by a separable one, on images large enough that the
# work dwarfs the overhead:

# %%
shape = (32, 32, 64)
pair = {
    "full": alone(shape, keras.layers.Conv2D(64, 3, padding="same")),
    "separable": alone(shape, keras.layers.SeparableConv2D(64, 3, padding="same")),
}
images = batch(16, *shape)
honest = at.compare(pair, images, latency_batch=16, rounds=25, verbose=0)
honest

# %% tags=["remove-cell"]
fewer = honest["full"].flops / honest["separable"].flops
glue("fewer", f"{fewer:.1f}", display=False)
glue("faster", f"{honest.speedup('separable'):.1f}", display=False)
assert fewer > 7 and honest.speedup("separable") < fewer
assert points["Depthwise 3×3"][0] < points["Conv 3×3"][0] / 8

# %% [markdown]
# {glue:text}`fewer` times fewer operations made it {glue:text}`faster` times as fast. {numref}`fig-roofline` says why: a
# depthwise convolution has a low arithmetic intensity, so it waits for memory while the full convolution calculates.
#
# **Complexity is not time either.** One reads that the cost of a network is "$C = O(a^b)$". That is not a
# statement about networks: it leaves open what $a$ and $b$ are, and the exponential that it suggests is nowhere to be seen. A
# forward pass of $L$ dense layers of width $w$ on $B$ samples costs exactly
#
# $$
# C = 2\,B\,L\,w^2 \ \text{FLOPs} \;=\; O(B\,L\,w^2),
# $$ (eq-complexity)
#
# linear in the samples and the depth, quadratic in the width. Now you may ask what the $O$ hides: the factor in front, and
# everything of lower order. It says how the cost *grows* once it is large, and a batch of 1 is not large:

# %%
widths = [32, 64, 128, 256, 512, 1024, 2048]
layers = {w: alone((w,), keras.layers.Dense(w)) for w in widths}
growth = {}
for w in widths:
    times = at.measure_latency({"": layers[w]}, batch(64, w), rounds=30, verbose=0)
    growth[w] = times[""].median

# %% mystnb={"image": {"alt": "Log-log plot of the latency of a dense layer against its width: flat for small widths, then approaching the quadratic line."}, "figure": {"caption": "The cost of a dense layer is quadratic in its width, its latency only at last. On the left, overhead decides; the complexity describes the right.", "name": "fig-complexity"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.2, 3.2))
axes.loglog(widths, [1e3 * growth[w] for w in widths], "o-", label="measured, batch 64")
axes.loglog(
    widths,
    [2e3 * 64 * w**2 / limits.peak for w in widths],
    "--",
    color="0.4",
    label=r"$2Bw^2/\pi$",
)
axes.set(xlabel="width $w$ [units]", ylabel="latency [ms]", title="O(w²), eventually")
axes.set_xticks(widths, widths)
axes.minorticks_off()
axes.legend()
plt.show()

# %% tags=["remove-cell"]
small, large = growth[128] / growth[32], growth[2048] / growth[512]
glue("small_growth", f"{small:.1f}", display=False)
glue("large_growth", f"{large:.1f}", display=False)
assert small < 5 and large > 2 * small
assert at.benchmark.flops(layers[128]) == 16 * at.benchmark.flops(layers[32])

# %% [markdown]
# Four times the width always makes 16 times the FLOPs. It multiplied the latency by {glue:text}`small_growth` from 32 to 128
# units, and by {glue:text}`large_growth` from 512 to 2048.
#
# ## Use it in your project
#
# ```python
# import accel_tf as at
#
# models = {"before": model, "after": smaller, "int8": "model.tflite"}
# table = at.compare(models, x_test, y_test)
# print(table)                            # or the last line of a notebook cell
# table["after"].latency.percentile(99)   # exact numbers, in seconds
# table.speedup("after")
#
# limits = at.benchmark.roofline()        # FLOP/s and bytes/s of this machine
# limits.attainable(at.benchmark.flops(model, x) / bytes_moved)
# print(at.benchmark.host())              # belongs beside every number you publish
# ```
#
# See {py:func}`accel_tf.benchmark.compare`, {py:func}`accel_tf.benchmark.measure_latency`,
# {py:func}`accel_tf.benchmark.roofline`.
#
# ## Takeaways
#
# - Warm up, take turns, wait for results; report the median, the spread and the machine.
# - Ask which limit bites (arithmetic, memory or overhead) before choosing a technique. An intensity above the ridge
#   ({glue:text}`ridge` FLOP/byte here) means arithmetic.
# - FLOPs, bytes and $O(\cdot)$ predict what is possible. Only a clock tells what happened.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-measure-1
# How many FLOPs has `Conv2D(32, 5, strides=2, padding="same")` on an image of 28 × 28 × 3? Work it out, then check.
# :::
#
# :::{solution-start} ex-measure-1
# :class: dropdown
# :::
#
# There are 14 × 14 output positions, 32 filters, and 5 · 5 · 3 multiply–adds for each:

# %%
by_hand = 2 * (14 * 14) * 32 * (5 * 5 * 3)
counted = at.benchmark.flops(
    alone((28, 28, 3), keras.layers.Conv2D(32, 5, strides=2, padding="same"))
)
print(by_hand, counted)

# %% [markdown]
# :::{solution-end}
# :::

# %% tags=["remove-cell"]
assert by_hand == counted

# %% [markdown]
# :::{exercise}
# :label: ex-measure-2
# From which batch size on is a large square `Dense` layer compute-bound on this machine? Use {eq}`eq-roofline`, and neglect the
# inputs and outputs against the kernel.
# :::
#
# :::{solution-start} ex-measure-2
# :class: dropdown
# :::
#
# With width $w$ and batch $B$: $F = 2Bw^2$ and $Q \approx 4w^2$ bytes, so the intensity is $B/2$ FLOP/byte. It crosses the ridge at
# $B = 2\pi/\beta$:

# %%
print(f"from a batch of about {np.ceil(2 * limits.ridge):.0f} on")

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-measure-3
# Your service promises an answer within 20 ms to 99 of 100 users. Which number of `measure_latency` do you watch, and why is
# the median not enough?
# :::
#
# :::{solution} ex-measure-3
# :class: dropdown
# `times["cnn"].percentile(99)`. Half of the users wait longer than the median, and nothing in it says how much longer. Take many
# rounds (at least a thousand): only one in a hundred of them tells about the tail.
# :::
#
# ## References
#
# ```{footbibliography}
# ```
