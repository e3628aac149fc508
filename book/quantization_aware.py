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
# # Quantization-aware training
#
# **Train a network on the very grid of integers that it will run on, and ship an 8-bit file that gives the same answers.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 14 minutes to read, under a minute to run · **You need** Keras, gradients; {doc}`measure` helps ·
# **Module** {py:mod}`accel_tf.quantization`
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
# - **write** fake quantization, forward and backward, in a dozen lines;
# - **turn** a Keras model into an integer LiteRT file, with training (QAT) or without (PTQ), and check that it is one;
# - **decide** which of the two you need: at eight bits, at four, at two.
#
# ## Intuition: a ruler for every tensor
#
# An 8-bit processor knows 256 numbers. To put a tensor of reals on them, lay a ruler along its values: a step length $s$, the
# {term}`scale`, and an integer $z$, the {term}`zero point`, that stands for zero {footcite}`jacob2018quantization`:
#
# $$
# q = \operatorname{round}\!\left(\frac{x}{s}\right) + z, \qquad x \approx s\,(q - z)
# $$ (eq-quantize)
#
# Rounding to the nearest mark moves a value by half a step at most; what lies beyond the ruler's ends is clipped. So
# the whole art is in choosing the ruler. A longer one clips less but has coarser steps, and one large weight
# makes the steps coarse for all that share its ruler. That is why each output channel of a kernel gets its own.

# %% mystnb={"image": {"alt": "Two panels. Left: a staircase with eight steps follows the diagonal from minus one to one and a half and is flat beyond; below it the error zigzags between plus and minus half a step and grows at both ends. Right: the nine weights of each of sixteen filters as dots, with the fifteen marks of each filter's own grid; some grids are clearly longer than others."}, "figure": {"caption": "Left: 3-bit quantization and its error. Inside the range the error stays within half a step, outside it grows without bound. Right: the 3 × 3 filters of a trained network, their batch normalization folded in, each with the 15 marks of a 4-bit ruler of its own. One ruler for all would have the steps of the longest.", "name": "fig-rulers"}} tags=["hide-input"]
(x_train, y_train), (x_test, y_test) = at.datasets.digits()


def block(filters):
    return [
        keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
        keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.ReLU(),
        keras.layers.MaxPooling2D(),
    ]


cnn = keras.Sequential(
    [
        keras.Input((8, 8, 1), name="image"),
        *block(16),
        *block(32),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
cnn.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
cnn.fit(x_train, y_train, batch_size=64, epochs=10, verbose=0)

figure, panels = plt.subplot_mosaic(
    [["stairs", "rulers"], ["error", "rulers"]],
    figsize=(8.4, 4.2),
    width_ratios=(1, 1.25),
    height_ratios=(2.2, 1),
)
x = np.linspace(-1.6, 2.1, 2001, dtype="float32")
y = tf.quantization.fake_quant_with_min_max_vars(x, -1.0, 1.5, num_bits=3).numpy()
panels["stairs"].plot(x, x, color="0.6", linewidth=1)
panels["stairs"].plot(x, y)
panels["stairs"].set(ylabel="$s\\,(q - z)$", xticklabels=[])
panels["stairs"].set_title("Eight marks")
panels["error"].plot(x, y - x, color="C1", linewidth=1.3)
panels["error"].set(xlabel="real value $x$", ylabel="error")

norm = cnn.layers[1]
factor = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
kernel = (cnn.layers[0].kernel.numpy() * factor).reshape(9, 16)
for place, channel in enumerate(np.argsort(np.abs(kernel).max(axis=0))):
    limit = np.abs(kernel[:, channel]).max()
    marks = np.linspace(-limit, limit, 15)
    panels["rulers"].plot([place] * 15, marks, "_", color="0.7", markersize=9)
    panels["rulers"].plot(
        [place] * 9, kernel[:, channel], "o", color="C0", markersize=3
    )
panels["rulers"].set(
    xlabel="output channel, by range", ylabel="weight", xticks=[0, 5, 10, 15]
)
panels["rulers"].set_title("A ruler per channel")
panels["rulers"].grid(visible=False)
plt.show()

# %% tags=["remove-cell"]
limits = np.abs(kernel).max(axis=0)
glue("range_ratio", f"{limits.max() / limits.min():.1f}", display=False)
assert limits.max() > 1.2 * limits.min()
step = 2.5 / 7
inside = (x > -1.0 + step) & (x < 1.5 - step)
assert np.abs(y - x)[inside].max() < 0.51 * step < np.abs(y - x).max()

# %% [markdown]
# In {numref}`fig-rulers`, the longest ruler is {glue:text}`range_ratio` times as long as the shortest.
#
# ### A staircase has no slope
#
# To train through rounding we need its gradient, and the gradient of a staircase is zero nearly everywhere. The
# {term}`straight-through estimator` {footcite}`bengio2013estimating` pretends, in the backward pass only, that the staircase is the
# diagonal that it follows: the gradient passes unchanged within the range, and is zero where values are clipped.
#
# ## From scratch
#
# *Fake* quantization rounds to the grid but keeps the values as floats, so that ordinary layers can compute with them:


# %%
def fake_quantize(x, low, high, bits=8):
    """Rounds x to 2**bits marks between low and high, which include 0."""
    steps = 2**bits - 1
    scale = (high - low) / steps
    zero_point = np.round(-low / scale)  # whole, so that 0 is a mark: padding is exact
    clipped = tf.clip_by_value(x, -zero_point * scale, (steps - zero_point) * scale)
    q = tf.round(clipped / scale) + zero_point
    rounded = (q - zero_point) * scale
    # Straight through: forward the rounded value, backward the gradient of `clipped`.
    return clipped + tf.stop_gradient(rounded - clipped)


x = tf.Variable(np.random.default_rng(0).normal(size=1000).astype("float32"))
with tf.GradientTape(persistent=True) as tape:
    ours = fake_quantize(x, -1.0, 1.5)
    theirs = tf.quantization.fake_quant_with_min_max_vars(x, -1.0, 1.5)
print("largest difference:", float(tf.reduce_max(abs(ours - theirs))))

# %% tags=["remove-cell"]
np.testing.assert_allclose(ours, theirs, atol=1e-6)
slope_ours, slope_theirs = tape.gradient(ours, x), tape.gradient(theirs, x)
assert (slope_ours.numpy() == slope_theirs.numpy()).mean() > 0.99
assert 0 < float(tf.reduce_mean(slope_ours)) < 1
quantizer = at.quantization.FakeQuantize()
quantizer(np.array([-1.0, 1.5], "float32"), training=True)  # it observes the range
np.testing.assert_allclose(quantizer(x), ours, atol=1e-6)

# %% [markdown]
# That is TensorFlow's own operation to the last digits, and {py:class}`accel_tf.quantization.FakeQuantize`, which in addition
# *observes* the range: a moving average of each batch's minimum and maximum.
#
# The second ingredient is knowing **where** to round. An integer kernel multiplies 8-bit numbers, adds up the
# products in 32 bits, and rounds once, at its end. In LiteRT a convolution, the batch normalization behind it and the ReLU
# are *one* kernel. Rounding in between would simulate a machine that does not exist.
#
# ## With `accel_tf`
#
# Two verbs make the same kind of model. {py:func}`accel_tf.quantization.calibrate` only looks at some data to set the rulers: this is
# post-training quantization (PTQ). {py:func}`accel_tf.quantization.quantize_aware` leaves them to be observed in
# `fit`, while the weights adapt: quantization-aware training (QAT).

# %%
ptq = at.calibrate(cnn, x_train[:256], verbose=0)

qat = at.quantize_aware(cnn)
qat.compile(
    keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy", metrics=["accuracy"]
)
qat.fit(x_train, y_train, batch_size=64, epochs=2, verbose=0)

at.report_of(qat)

# %% [markdown]
# The report says where rounding happens. A `conv2d` has its weights on the grid, and leaves rounding its output to the
# `re_lu` with which it shares a kernel. Batch normalization is folded into the kernel: it multiplies each channel
# by a number, and so each channel's ruler, which leaves the integers alone. Pooling picks among integers and needs nothing.
#
# Now the file. {py:func}`accel_tf.export.litert` converts, reads the result back, and raises an error if any operator stayed in float:

# %%
import pathlib
import tempfile

folder = pathlib.Path(tempfile.mkdtemp())
at.export.litert(ptq, folder / "ptq.tflite")
at.export.litert(qat, folder / "qat.tflite")

# %% [markdown]
# Integers from the first byte to the last. And are they the *same* integers that we trained with?

# %%
simulated = qat.predict(x_test, verbose=0)
integer = at.export.run_litert(folder / "qat.tflite", x_test)
identical = (simulated == integer).mean()
agreement = (simulated.argmax(1) == integer.argmax(1)).mean()
print(f"identical outputs: {identical:.1%}, same class: {agreement:.1%}")

# %% tags=["remove-cell"]
assert identical == agreement == 1.0
for name in ("ptq.tflite", "qat.tflite"):
    assert at.inspect_litert(folder / name).int8_fraction == 1.0

# %% [markdown]
# All ten probabilities of all the test images are equal, to the last bit. That takes care. A float comes close to the sum of an integer kernel, but
# one sum in some hundred thousand is so nearly halfway between two marks that close is not enough, and the layers behind it magnify a wrong mark as much as any rounding. So in
# inference each layer counts in integers what the runtime counts, in the same order. What you measured in Keras is what you ship.
#
# ## Measure
#
# Three predictions first. The weights shrink fourfold, but a file also holds the graph, so a small model gains
# less. Eight bits are many: accuracy should hardly move. And speed depends on whether the processor has
# instructions for 8-bit products.
#
# Besides our two files, there are a float file and a peer: LiteRT's own post-training quantization,
# which wants a *representative data set* to set the rulers with.

# %% tags=["remove-output"]
at.export.litert(cnn, folder / "float.tflite")

converter = tf.lite.TFLiteConverter.from_keras_model(cnn)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([x_train[i : i + 1]] for i in range(256))
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
converter.inference_input_type = converter.inference_output_type = tf.int8
_ = (folder / "peer.tflite").write_bytes(converter.convert())

# %%
names = {"float": "float", "LiteRT PTQ": "peer", "our PTQ": "ptq", "our QAT": "qat"}
files = {name: folder / f"{stem}.tflite" for name, stem in names.items()}
times = at.measure_latency(files, x_test[:64], verbose=0)
accuracy, size = {}, {}
for name, path in files.items():
    accuracy[name] = (at.export.run_litert(path, x_test).argmax(1) == y_test).mean()
    size[name] = os.path.getsize(path)

at.report.Table(
    ("file", "accuracy [%]", "size [kB]", "batch of 64"),
    [
        (
            name,
            f"{100 * accuracy[name]:.1f}",
            f"{size[name] / 1e3:.1f}",
            str(times[name]),
        )
        for name in files
    ],
    note=f"{at.benchmark.host()}; median ± interquartile range",
)

# %% tags=["remove-cell"]
glue("size_ratio", f"{size['float'] / size['our QAT']:.1f}", display=False)
glue(
    "speed_ratio",
    f"{times['float'].median / times['our QAT'].median:.1f}",
    display=False,
)
glue("weights", f"{cnn.count_params():,}", display=False)
points = 100 * (max(accuracy.values()) - min(accuracy.values()))
glue("points", f"{points:.1f}", display=False)
assert 2 < size["float"] / size["our QAT"] < 4.2
assert max(accuracy.values()) - min(accuracy.values()) < 0.03
assert min(times["our QAT"].median, times["our PTQ"].median) < 3 * times["float"].median
assert 0.5 < size["our PTQ"] / size["LiteRT PTQ"] < 2

# %% [markdown]
# The file is {glue:text}`size_ratio` times smaller (with only {glue:text}`weights` parameters, the graph weighs in), and on this machine
# {glue:text}`speed_ratio` times as fast as the float file on the same runtime. All four lie within {glue:text}`points`
# points of accuracy, which on 360 images is a handful. So our PTQ is on a par with LiteRT's, which is what one hopes for. What it
# adds is that the model is still a Keras model: you can evaluate it, save it as `.keras`, fine-tune it.
#
# ## When it does not help
#
# **At eight bits, training is rarely needed.** The table shows it: PTQ already gave what there is. Training pays when the
# ruler gets coarse. A scheme is a small class, so let us make coarser ones and compare both ways:


# %%
def scheme(bits):
    return type(f"W{bits}", (at.Int8,), {"weight_bits": bits})()


def score(model):
    return float((model.predict(x_test, verbose=0).argmax(1) == y_test).mean())


widths, without, trained = (8, 4, 3, 2), [], []
for bits in widths:
    few = x_train[:256]
    # Two bits are expected to fail; verify=False leaves out the warning.
    without.append(score(at.calibrate(cnn, few, scheme(bits), verbose=0, verify=False)))
    model = at.quantize_aware(cnn, scheme(bits))
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    model.fit(x_train, y_train, batch_size=64, epochs=3, verbose=0)
    trained.append(score(model))

# %% mystnb={"image": {"alt": "Line plot of test accuracy against the bits per weight. Both lines are level at eight and four bits; below, the line without training falls steeply while the line with training bends down only slightly at two bits."}, "figure": {"caption": "Accuracy against the width of the weights (activations stay at 8 bits). Training wins back most of what coarse rulers cost, and has nothing to win at 8 bits.", "name": "fig-bits"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.2, 3.2))
axes.plot(widths, 100 * np.array(without), "o-", label="calibrated (PTQ)")
axes.plot(widths, 100 * np.array(trained), "s-", label="trained (QAT)")
axes.axhline(100 * score(cnn), color="0.5", linestyle=":", label="float")
axes.set(xlabel="bits per weight", ylabel="test accuracy [%]", xticks=widths)
axes.invert_xaxis()
axes.set_title("Training pays where the ruler is coarse")
axes.legend(loc="lower left")
plt.show()

# %% tags=["remove-cell"]
glue("ptq2", f"{100 * without[-1]:.0f}", display=False)
glue("qat2", f"{100 * trained[-1]:.0f}", display=False)
assert abs(trained[0] - without[0]) < 0.03
assert without[-1] < without[0] - 0.15
assert trained[-1] > without[-1] + 0.1
assert trained[1] > score(cnn) - 0.04

# %% [markdown]
# With weights of two bits, which leaves −1, 0 and 1 times the channel's scale, calibration alone falls to {glue:text}`ptq2` %, and three epochs of
# training bring it back to {glue:text}`qat2` %. Mind that LiteRT's convolutions have no 4- or 2-bit kernels here:
# {py:func}`accel_tf.export.litert` refuses such a model instead of writing an 8-bit file under its name.
#
# ### Rulers that learn
#
# So far the ends of a ruler were observed. They can be trained as well. Learned step size quantization, LSQ {footcite}`esser2020learned`,
# differentiates equation {eq}`eq-quantize` by the step, straight through the rounding:
#
# $$
# \frac{\partial}{\partial s}\, s\operatorname{round}\!\left(\frac{x}{s}\right) \approx \operatorname{round}\!\left(\frac{x}{s}\right) - \frac{x}{s}
# $$ (eq-lsq)
#
# within the range, and the end itself beyond it. The loss then weighs clipping against coarseness: quantization has become differentiable in all of its
# parts. An *observer* decides which way ranges are found, and each scheme takes one:


# %%
class FourBits(at.Int8):
    weight_bits = 4
    activation_bits = 4


observers = {
    "observed": at.quantization.MovingAverage(),
    "learned": at.quantization.Learned(),
}
four_bits = {}
for name, observer in observers.items():
    keras.utils.set_random_seed(0)
    model = at.quantize_aware(cnn, FourBits(observer))
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    model.fit(x_train, y_train, batch_size=64, epochs=3, verbose=0)
    four_bits[name] = score(model)
    print(f"weights and activations of 4 bits, ranges {name}: {four_bits[name]:.1%}")

# %% tags=["remove-cell"]
inputs = tf.constant([0.3, -0.8, 1.4])
step = tf.Variable(0.5)
with tf.GradientTape() as tape:
    scaled = inputs / step
    y = step * (scaled + tf.stop_gradient(tf.round(scaled) - scaled))
np.testing.assert_allclose(
    tape.gradient(y, step), tf.reduce_sum(tf.round(scaled) - scaled), rtol=1e-5
)
assert four_bits["learned"] > four_bits["observed"] - 0.02
assert min(four_bits.values()) > score(cnn) - 0.06

# %% [markdown]
# On this model that is a matter of a few images; with coarser rulers there is more to decide, and more to gain or lose.
#
# ### What it costs
#
# **In Keras it is slower, not faster.** Fake quantization adds work; only the exported file has the integers:

# %%
batch = x_test[:64]
inside_keras = at.measure_latency(
    {"float": cnn, "fake-quantized": qat}, batch, verbose=0
)
for name, latency in inside_keras.items():
    print(f"{name:15} {latency}")

# %% tags=["remove-cell"]
slower = inside_keras["fake-quantized"].median / inside_keras["float"].median
glue("slower", f"{slower:.1f}", display=False)
assert slower > 0.95

# %% [markdown]
# On this page, {glue:text}`slower` times the time of the float model. And **not every computation has an integer form**. A layer of your own is taken
# apart into the layers, weights and operators in its `call`; if LiteRT computes one of these only in float, you get an error that names it, and the way out:


# %%
import textwrap


class Median(keras.layers.Layer):
    def call(self, x):
        return keras.ops.sort(x, axis=1)[:, x.shape[1] // 2]


sequence = keras.Input((9, 8))
own = keras.layers.LSTM(4, return_sequences=True, name="memory")(sequence)
own = keras.Model(sequence, keras.layers.Dense(2)(Median(name="median")(own)))
try:
    at.quantize_aware(own)
except ValueError as error:
    print(textwrap.fill(str(error), 80))

# %% [markdown]
# The LSTM is none of the trouble: its steps become integer kernels, too.
#
# ## On models that nobody here wrote
#
# Of each family in `keras.applications` the smallest member, trained for a few steps on the digits: `quantize_aware`, one step, a `.keras` file
# and back, a LiteRT file. The table tells how many operators compute in float; the signal-to-noise ratio of the quantized model to the
# float one, which is what 8 bits cost; and that of the file to the quantized model. TFMOT is the peer, on tf_keras:

# %% tags=["hide-input"]
import json

with open("_data/quantization_families.json") as file:
    rows = json.load(file)["rows"]
rows = [row for row in rows if "absent" not in row["ours"]]


def decibels(value):
    return f"{value:.1f}" if value < 200 else "exact"


families = [row for row in rows if "operators" in row["ours"]]
at.report.Table(
    ("model", "operators", "in float", "8 bits [dB]", "file [dB]", "TFMOT, in float"),
    [
        (
            row["member"],
            row["ours"]["operators"],
            sum(row["ours"]["float"].values()),
            decibels(row["ours"]["sqnr_float"]),
            decibels(row["ours"]["sqnr"]),
            sum(row["tfmot"].get("float", {}).values())
            if "operators" in row["tfmot"]
            else "refuses",
        )
        for row in families
    ],
    note="Computed by benchmarks/quantization_families.py.",
)

# %% tags=["remove-cell"]
assert families == rows and len(families) >= 15
whys = {why for row in families for why in row["ours"]["why"]}
assert whys <= {
    "LiteRT has no int8 kernel for layer normalization",
    "between integers and floats",
}
exact = [row for row in families if decibels(row["ours"]["sqnr"]) == "exact"]
assert exact == [row for row in families if not row["ours"]["float"]]
(islands,) = (row for row in families if row["ours"]["float"])
fragile = min(families, key=lambda row: row["ours"]["sqnr_float"])
assert islands["ours"]["sqnr"] > 40 and 10 > fragile["ours"]["sqnr_float"]
peer = sum("operators" in row["tfmot"] for row in families)
assert peer < len(families)
glue("families", len(families), display=False)
glue("exact", len(exact), display=False)
glue("islands", f"{islands['ours']['sqnr']:.0f}", display=False)
glue("fragile", fragile["member"], display=False)
glue("fragile_db", f"{fragile['ours']['sqnr_float']:.0f}", display=False)
glue("peer", peer, display=False)

# %% [markdown]
# All {glue:text}`families` families arrive; with TFMOT, {glue:text}`peer` do. Of {glue:text}`exact` the file computes the very numbers of the model, to the last bit. What
# computes in float are the layer normalizations of ConvNeXt, for which LiteRT has no integer kernel, and the report of the export says so; as floats are added up in
# another order there, {glue:text}`islands` dB are left.
#
# That a file is the model does not make the model good. 8 bits leave {glue:text}`fragile_db` dB of {glue:text}`fragile`, which after so few steps magnifies any small difference.
# {py:func}`accel_tf.quantization.quantization_error` tells which layers to spare, and {py:class}`accel_tf.quantization.Mixed` spares them.

# %% [markdown]
# ## Use it in your project
#
# ```python
# import keras
# import accel_tf as at
#
# model = keras.models.load_model("mine.keras")
#
# quantized = at.calibrate(model, x_train[:512])  # 1. try without training
# print(at.report_of(quantized))
# quantized.compile(metrics=["accuracy"])
# quantized.evaluate(x_val, y_val)
#
# quantized = at.quantize_aware(model)            # 2. only if that lost accuracy:
# quantized.compile(keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")
# quantized.fit(x_train, y_train, epochs=2)       #    fine-tune, at a small rate
#
# print(at.export.litert(quantized, "mine.tflite"))
# quantized.save("quantized.keras")               # to load it: import accel_tf
# ```
#
# API: {py:func}`accel_tf.quantization.calibrate`, {py:func}`accel_tf.quantization.quantize_aware`,
# {py:class}`accel_tf.quantization.Int8`, {py:func}`accel_tf.export.litert`, {py:func}`accel_tf.export.inspect_litert`.
#
# ## Takeaways
#
# - Quantization lays a ruler along each tensor. Weights get one for each channel, activations one that was observed on data.
# - Fake quantization must round exactly where the integer kernels do; then the Keras model *is* the file.
# - Calibrate first. Train when calibration loses accuracy, which is to say below eight bits or on delicate models.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-quantization-aware-1
# Multiply one output channel of `cnn.layers[0].kernel` by 50, and the batch normalization behind it will undo it: its statistics of
# that channel grow as much, and the network computes the same. What does 8-bit rounding with *one* ruler for the whole kernel do to the other 15 channels, and with
# one per channel? Use {py:func}`accel_tf.quantization.fake_quantize_weights` with `axes=()` and `axes=(-1,)`.
# :::
#
# ```{solution-start} ex-quantization-aware-1
# :class: dropdown
# ```

# %%
outlier = cnn.layers[0].kernel.numpy().copy()
outlier[..., 0] *= 50
for axes in ((), (-1,)):
    rounded = at.quantization.fake_quantize_weights(outlier, 8, axes).numpy()
    error = np.abs(rounded - outlier)[..., 1:].mean() / np.abs(outlier)[..., 1:].mean()
    print(f"scales along {axes}: relative error of the other channels {error:.1%}")

# %% tags=["remove-cell"]
one = at.quantization.fake_quantize_weights(outlier, 8, ()).numpy()
assert (
    np.abs(one - outlier)[..., 1:].mean()
    > 10 * np.abs(rounded - outlier)[..., 1:].mean()
)

# %% [markdown]
# One channel dictates the step of all. Per channel, it only dictates its own. Batch normalization produces such kernels
# all the time, as its factors are folded into them.
#
# ```{solution-end}
# ```
#
# :::{exercise}
# :label: ex-quantization-aware-2
# The products of 8-bit integers are added up in a signed 32-bit register. How many products of a weight in [−127, 127] and an
# activation that, less its zero point, is in [−255, 255] can be added before it may overflow?
# :::
#
# :::{solution} ex-quantization-aware-2
# :class: dropdown
# $\lfloor (2^{31} - 1) / (127 \cdot 255) \rfloor = 66\,311$. A 3 × 3 convolution would need more than 7,367 input channels to get
# there. So 32 bits are enough for the layers one meets, and the only rounding is at the end.
# :::
#
# :::{exercise}
# :label: ex-quantization-aware-3
# Calibrate `cnn` on data that is not representative, such as images ten times too dark, and measure the accuracy. Which rulers
# are wrong, and what would fine-tuning do about it?
# :::
#
# ```{solution-start} ex-quantization-aware-3
# :class: dropdown
# ```

# %%
dark = at.calibrate(cnn, x_train[:256] / 10, verbose=0)
print(f"calibrated on dark images: {score(dark):.1%}, on real ones: {score(ptq):.1%}")

# %% tags=["remove-cell"]
assert score(dark) < score(ptq) - 0.2
assert (2**31 - 1) // (127 * 255) == 66311 and 66311 // 9 == 7367

# %% [markdown]
# Every activation's ruler ends far too early, from the input on, and what lies beyond is clipped. Fine-tuning on real images
# moves the rulers: the moving average follows the batches. That it is slow to do so is one more reason to calibrate on real data.
#
# ```{solution-end}
# ```
#
# ## References
#
# ```{footbibliography}
# ```
