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
# # Quantization
#
# **Turn a trained network into 16, 8 or 4-bit numbers in one line, and know where the error comes from.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 12 minutes to read, under a minute to run · **You need** Keras; {doc}`measure` helps ·
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
# - **compare** half-precision floats with fixed-point integers: where each has its digits;
# - **choose** the range of a tensor from data, by hand and with an {term}`observer`;
# - **convert** a model to float16, to 8-bit integers and to 4-bit weights, and **find** the layer that suffers.
#
# ## Intuition: digits where the numbers are
#
# A floating-point number keeps a fixed number of *significant* digits, so its neighbours are far apart where it is large.
# Half precision (`float16`) has 11 significant bits and ends at 65,504; `bfloat16` has 8 and ends where `float32` does. A
# *fixed-point* number is an integer times a constant step, the {term}`scale` $s$: its neighbours are equally far apart everywhere. Shifted
# by a {term}`zero point` $z$, so that a range need not be symmetric, that is $x \approx s\,(q - z)$
# {footcite}`jacob2018quantization`.

# %% mystnb={"image": {"alt": "Log-log plot of the distance between neighbouring numbers against magnitude. Lines of float16 and bfloat16 rise in stairs with the magnitude, bfloat16 eight times as high; that of 8-bit integers is level at one 32nd and ends at four."}, "figure": {"caption": "The distance from a number to the next. Floats trade it for range; 8-bit integers have the same step everywhere, and nothing beyond the end of their range.", "name": "fig-formats"}} tags=["hide-input"]
magnitudes = np.geomspace(2**-6, 2**6, 2000)
exponent = np.floor(np.log2(magnitudes))
figure, axes = plt.subplots(figsize=(7.2, 3.2))
axes.loglog(magnitudes, 2.0 ** (exponent - 7), label="bfloat16", base=2)
axes.loglog(magnitudes, 2.0 ** (exponent - 10), label="float16", base=2)
inside = magnitudes <= 4
axes.loglog(
    magnitudes[inside], np.full(inside.sum(), 1 / 32), label="int8, s = 1/32", base=2
)
axes.set(xlabel="magnitude", ylabel="distance to the next number")
axes.set_title("Floats: relative precision. Integers: absolute precision")
axes.legend()
plt.show()

# %% tags=["remove-cell"]
assert np.finfo(np.float16).eps == 2.0**-10
assert float(tf.bfloat16.as_numpy_dtype(1) + tf.bfloat16.as_numpy_dtype(2**-7)) > 1
assert np.isinf(tf.cast(70000.0, tf.float16).numpy())

# %% [markdown]
# Rounding to a step $s$ moves each value by something between $-s/2$ and $s/2$. If that is uniform, the error has the power
# $s^2/12$; with $b$ bits for a range of width $R$ the step is about $R/2^b$, so the {term}`SQNR` of a tensor of power $P$ is
#
# $$
# \mathrm{SQNR} = 10 \log_{10} \frac{P}{s^2/12} \approx 6.02\,b + 10 \log_{10} \frac{12\,P}{R^2} \quad \text{(dB)}
# $$ (eq-sqnr)
#
# Each bit buys six decibels. So does halving the range $R$, and that is free, except for what is then clipped.
#
# ## From scratch: the best range
#
# Take the outputs of a layer: mostly small, with a tail. Clip them at $t$, round to 16 marks, and try every $t$:


# %%
def rounded(x, low, high, bits):
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)  # whole, so that 0 is a mark
    q = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
    return (q - zero) * step


x = np.random.default_rng(0).laplace(size=20_000).astype("float32")
ends = np.linspace(0.5, np.abs(x).max(), 200)
errors = [np.mean((rounded(x, -t, t, 4) - x) ** 2) for t in ends]
best = ends[np.argmin(errors)]
print(f"clip at {best:.2f}, though the largest magnitude is {ends[-1]:.2f}")

# %% [markdown]
# An {term}`observer` does that while batches pass. It keeps a histogram, so that it need not keep the values:

# %%
quantize = at.quantization.FakeQuantize(bits=4, observer=at.quantization.MSE())
_ = quantize(x, training=True)
print(f"found from 4,096 bins: {quantize.range[1]:.2f}")

# %% mystnb={"image": {"alt": "Curve of the mean squared error against the clipping point: it falls steeply, has a minimum at about two fifths of the largest magnitude, and rises slowly; a dashed vertical line of the observer meets the minimum."}, "figure": {"caption": "The error of 4-bit rounding against the clipping point. On the left clipping dominates, on the right rounding; the observer's choice is dashed.", "name": "fig-clipping"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.2, 2.9))
axes.plot(ends, errors)
axes.axvline(quantize.range[1], color="C1", ls="--", label="MSE observer")
axes.set(xlabel="clipping point $t$", ylabel="mean squared error", yscale="log")
axes.legend()
plt.show()

# %% tags=["remove-cell"]
found = np.mean((rounded(x, *quantize.range, 4) - x) ** 2)
assert found <= 1.05 * min(errors)
assert errors[-1] > 1.5 * min(errors) and best < 0.7 * ends[-1]
glue("gain", f"{10 * np.log10(errors[-1] / found):.1f}", display=False)

# %% [markdown]
# Compared with keeping every value inside, that is worth {glue:text}`gain` dB here, more than a bit could be. The observers differ
# in what they minimize:
#
# | Observer | Range | For |
# |---|---|---|
# | `MinMax` | all values ever seen | 8 bits, data without outliers; the default of `calibrate` |
# | `MovingAverage` | average of each batch's extremes | training, as the model changes |
# | `Percentile(p)` | leaves out a share at each end {footcite}`wu2020integer` | outliers whose share is known |
# | `MSE` | least squared error {footcite}`banner2019post` | tails, at few bits |
# | `Entropy` | distribution closest after rounding | 8 bits, as in TensorRT |
# | `Learned` | follows the loss by gradient | {doc}`quantization_aware` |
#
# ## With `accel_tf`
#
# Train a network, then quantize it after training. Integer activations need some data for their ranges, which is {term}`calibration`:
# the float network runs on them, and each layer's values are observed. Formats that touch only the weights need none:

# %% tags=["remove-output"]
(x_train, y_train), (x_test, y_test) = at.datasets.digits()


def block(filters):
    return [
        keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
        keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.ReLU(),
        keras.layers.MaxPooling2D(),
    ]


head = [keras.layers.Flatten(), keras.layers.Dense(128, activation="relu")]
cnn = keras.Sequential(
    [keras.Input((8, 8, 1)), *block(16), *block(32), *head, keras.layers.Dense(10)]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
cnn.compile("adam", loss, metrics=["accuracy"])
cnn.fit(x_train, y_train, batch_size=64, epochs=10, verbose=0)

# %%
seen = x_train[:256]
models = {
    "float32": cnn,
    "float16 weights": at.quantize_aware(cnn, at.Float16()),
    "int8": at.calibrate(cnn, seen, verbose=0),
    "int8 weights": at.quantize_aware(cnn, at.Int8Weights()),
    "int4 weights": at.quantize_aware(cnn, at.Int4Weights(group_size=32)),
}

# %% [markdown]
# All of these are Keras models that compute in float *on the grid*: `predict` and `evaluate` show what the format costs, before any
# file is written. {py:func}`accel_tf.export.litert` then writes the file.
#
# ## Measure
#
# By {eq}`eq-sqnr` we expect some 24 dB between 8 and 4 bits, less what the groups of `Int4Weights` win: each 32 consecutive
# weights have a scale of their own. The peer is LiteRT's own post-training quantization on the same 256 images.

# %% tags=["remove-output"]
import pathlib
import tempfile

folder = pathlib.Path(tempfile.mkdtemp())
converter = tf.lite.TFLiteConverter.from_keras_model(cnn)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([image[None]] for image in seen)
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
converter.inference_input_type = converter.inference_output_type = tf.int8
_ = (folder / "peer.tflite").write_bytes(converter.convert())

# %%
reference = cnn.predict(x_test, verbose=0)


def decibels(outputs):
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - outputs) ** 2))


outputs = {name: model.predict(x_test, verbose=0) for name, model in models.items()}
outputs["LiteRT PTQ"] = at.export.run_litert(folder / "peer.tflite", x_test)
accuracy = {name: (y.argmax(1) == y_test).mean() for name, y in outputs.items()}
sqnr = {name: decibels(y) for name, y in outputs.items() if name != "float32"}
rows = [(n, f"{100 * accuracy[n]:.1f}", f"{sqnr.get(n, np.inf):.1f}") for n in outputs]
at.report.Table(("format", "accuracy [%]", "SQNR of the logits [dB]"), rows)

# %% tags=["remove-cell"]
glue("int8_db", f"{sqnr['int8']:.0f}", display=False)
glue("peer_db", f"{sqnr['LiteRT PTQ']:.0f}", display=False)
glue("between", f"{sqnr['int8 weights'] - sqnr['int4 weights']:.0f}", display=False)
assert sqnr["float16 weights"] > sqnr["int8 weights"] > sqnr["int4 weights"] + 12
assert sqnr["int8"] > 25 and sqnr["int8"] > sqnr["LiteRT PTQ"] - 1
assert min(accuracy.values()) > accuracy["float32"] - 0.02

# %% [markdown]
# Between 8 and 4 bits lie {glue:text}`between` dB. Our `int8` model ({glue:text}`int8_db` dB) and LiteRT's file ({glue:text}`peer_db` dB)
# are on a par, as they should be on clean data. Now let eight images of the 256 have one hot pixel each, twenty times too bright:

# %%
broken = seen.copy()
broken[::32, 3, 4] = 20.0
Q = at.quantization
robust = {}
for observer in (Q.MinMax(), Q.MSE(), Q.Percentile(99.9)):
    model = at.calibrate(cnn, broken, at.Int8(observer=observer), verbose=0)
    robust[repr(observer)] = decibels(model.predict(x_test, verbose=0))
at.report.Table(("observer", "SQNR [dB]"), [(n, f"{v:.1f}") for n, v in robust.items()])

# %% tags=["remove-cell"]
minmax, mse, percentile = robust.values()
glue("robust_minmax", f"{minmax:.0f}", display=False)
glue("robust_percentile", f"{percentile:.0f}", display=False)
assert minmax < sqnr["int8"] - 8
assert percentile > minmax + 2 and abs(mse - minmax) < 2 and mse < percentile

# %% [markdown]
# `MinMax` stretches its ranges for eight pixels and is left with {glue:text}`robust_minmax` dB. `MSE` does hardly better: at 8 bits, clipping a
# pixel of 20 costs more *squared* error than coarse steps for all others; it trims tails and takes broken values for real. A
# `Percentile` throws them out and keeps {glue:text}`robust_percentile` dB. Clean data beat any observer.
#
# ### Which layer is it?
#
# {py:func}`accel_tf.quantization.quantization_error` runs the model with one layer rounded at a time:

# %%
error = at.quantization.quantization_error(
    models["int4 weights"], x_test[:100], target=sqnr["int4 weights"] + 2, verbose=0
)
error

# %% [markdown]
# Its suggestion is a list for `exclude`: the layers to leave in float, the costliest first, until the target is reached.

# %%
mixed = at.quantize_aware(cnn, at.Int4Weights(32), exclude=error.suggestion)
print("in float:", error.suggestion)
print(f"SQNR: {error.total:.1f} → {decibels(mixed.predict(x_test, verbose=0)):.1f} dB")

# %% tags=["remove-cell"]
assert error.suggestion and error.reached > error.total
assert decibels(mixed.predict(x_test, verbose=0)) > error.total + 1

# %% [markdown]
# ## When it does not help
#
# **Clipping is not always good.** A layer's largest values may be the ones that decide. Leave out one percent at each end, and the
# logits pay:

# %%
tight = at.calibrate(cnn, seen, at.Int8(at.quantization.Percentile(99.0)), verbose=0)
tight_db = decibels(tight.predict(x_test, verbose=0))
print(f"Percentile(99.0): {tight_db:.1f} dB, MinMax: {sqnr['int8']:.1f} dB")

# %% tags=["remove-cell"]
assert tight_db < sqnr["int8"] - 5

# %% [markdown]
# **Half precision overflows.** `float16` is as good as exact here, but an activation above 65,504 becomes infinite, and `calibrate` says in which layer.
# **Weights alone make a file smaller, not every model faster**: {doc}`measure` it. And below 8 bits, training wins back more than any
# choice of range: {doc}`quantization_aware`.
#
# ## Use it in your project
#
# ```python
# import keras
# import accel_tf as at
#
# model = keras.models.load_model("mine.keras")
#
# quantized = at.calibrate(model, x_train[:512])         # a few hundred inputs, no labels
# error = at.quantization.quantization_error(quantized, x_val[:100], target=25)
# print(error)                                           # or error.plot()
# quantized = at.calibrate(model, x_train[:512], exclude=error.suggestion)
#
# # Layers in float must be allowed:
# at.export.litert(quantized, "mine.tflite", allow_float=bool(error.suggestion))
# ```
#
# API: {py:func}`accel_tf.quantization.calibrate`, {py:class}`accel_tf.quantization.Int8`,
# {py:class}`accel_tf.quantization.Int4Weights`, {py:class}`accel_tf.quantization.Float16`,
# {py:func}`accel_tf.quantization.quantization_error`.
#
# ## Takeaways
#
# - Floats keep relative precision, integers absolute precision: a range has to be chosen for them.
# - A bit is worth 6 dB, and so is half the range; clipping a tail can pay for itself.
# - Calibrate on clean data, look at the SQNR, and leave the worst layers in float if you must.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-quantization-1
# Uniform values in $[-1, 1]$ have the power 1/3. What does {eq}`eq-sqnr` predict for 8 bits, and what do you measure with `rounded`?
# :::
#
# ```{solution-start} ex-quantization-1
# :class: dropdown
# ```

# %%
uniform = np.random.default_rng(1).uniform(-1, 1, 100_000)
noise = np.mean((rounded(uniform, -1, 1, 8) - uniform) ** 2)
print(f"predicted {6.02 * 8:.1f} dB, measured {10 * np.log10(1 / 3 / noise):.1f} dB")

# %% tags=["remove-cell"]
assert abs(10 * np.log10(1 / 3 / noise) - 6.02 * 8) < 0.3

# %% [markdown]
# With $12 P/R^2 = 12/3/4 = 1$, the second term is 0: 48.2 dB.
#
# ```{solution-end}
# ```
#
# :::{exercise}
# :label: ex-quantization-2
# Round the kernel of the hidden `Dense` layer to 4 bits with one scale per output channel, with groups of 32 and of 8 inputs, by
# {py:func}`accel_tf.quantization.fake_quantize_weights`. What do smaller groups cost?
# :::
#
# ```{solution-start} ex-quantization-2
# :class: dropdown
# ```

# %%
kernel, ratios = cnn.layers[-2].kernel.numpy(), {}
for size in (None, 32, 8):
    grid = at.quantization.fake_quantize_weights(kernel, 4, group_size=size).numpy()
    ratios[size] = 10 * np.log10(np.sum(kernel**2) / np.sum((kernel - grid) ** 2))
    print(f"groups of {size}: {ratios[size]:.1f} dB")

# %% tags=["remove-cell"]
assert ratios[8] > ratios[32] + 1 > ratios[None] + 1

# %% [markdown]
# Smaller groups round more finely. Each needs a scale of its own: 32 bits for 8 weights of 4 bits double the size.
#
# ```{solution-end}
# ```
#
# ## References
#
# ```{footbibliography}
# ```
