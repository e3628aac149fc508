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
# # Pipelines: pruned, clustered and quantized in one model
#
# **Compress a network three ways at once, so that no step undoes another, down to a file of a twentieth of the bytes.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 12 minutes to read, under a minute to run · **You need** Keras, [](pruning.py), [](quantization_aware.py) · **Module** {py:mod}`accel_tf.clustering`, with {py:mod}`accel_tf.quantization`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import gzip
import pathlib
import tempfile
import warnings

import keras
import matplotlib.pyplot as plt
import matplotlib_inline.backend_inline
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from myst_nb import glue

import accel_tf as at

plt.style.use("accel_tf.book")
matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
keras.utils.set_random_seed(0)

# %% [markdown]
# ## You will learn to
#
# - **predict** how many bits a weight costs once it is pruned, clustered and quantized;
# - **chain** the three on a Keras model, and **prove** by the bytes of the file that each survived the next;
# - **choose** the order, and know which savings need a decompressor to be real.
#
# ## Intuition: three kinds of waste
#
# The weights of a trained network waste bits in three ways. Most of them hardly matter: *pruning* sets those to zero. The others differ
# in digits that mean nothing: *{term}`clustering`* lets the weights of a kernel share a few values. And 32 bits are more
# than a value deserves: *quantization* rounds it to eight. A fourth step costs nothing: `gzip`, which a download or an app store applies
# anyway, turns the regularity of the first two into bytes. Han et al. called the sequence *deep compression* {footcite}`han2016deep`.
#
# How far can it go? If a fraction $d$ of the weights is not zero, and these share $K - 1$ values besides zero, no code
# needs more for a weight, on average, than the {footcite}`shannon1948mathematical` entropy allows:
#
# $$
# H \le \underbrace{-d \log_2 d - (1 - d) \log_2 (1 - d)}_{\text{where the zeros are}} + \underbrace{d\, \log_2 (K - 1)}_{\text{which value}}
# \quad \text{bits.}
# $$ (eq-pipeline-bits)
#
# With one weight in ten left and $K = 16$ these are {glue:text}`bound` bits instead of 32: a factor of {glue:text}`bound_ratio` for the weights, if
# nothing goes wrong between the steps. Much can:
#
# - **Training on** moves weights. A zero that gets a gradient is no longer zero; weights that were equal drift apart.
# - **Rounding** per channel, which is what makes 8 bits accurate, gives each channel a step of its own. A value that
#   all channels share becomes as many integers as there are steps. The batch normalization that is folded into a kernel gives each channel yet another one.
#
# ## From scratch
#
# Both are easily mended. After each step of training, zeros return to zero, and each cluster takes the mean of its weights; and
# a clustered kernel is rounded with *one* step for all of its channels.


# %%
def step(w, gradient, rate):
    """A step of gradient descent that keeps zeros and clusters."""
    moved = np.where(w == 0, 0, w - rate * gradient)
    for value in np.unique(w[w != 0]):
        moved[w == value] = moved[w == value].mean()
    return moved


def integers(w, axis=None):
    """Rounds to 8 bits: with one scale, or with one for each channel if axis=0."""
    scale = np.abs(w).max(axis=axis, keepdims=True) / 127
    return np.round(w / scale).astype("int8")


# %% tags=["remove-cell"]
density, values = 0.1, 16
entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
bound = entropy + density * np.log2(values - 1)
glue("bound", f"{bound:.2f}", display=False)
glue("bound_ratio", f"{32 / bound:.0f}", display=False)
assert 30 < 32 / bound < 40

# %%
dense = keras.layers.Dense(64, kernel_initializer="random_normal")
layer = keras.Sequential([keras.Input((64,)), dense])
optimizer = keras.optimizers.SGD(0.1)
at.prune(layer, at.OneShot(0.8), optimizer=optimizer)
at.cluster(layer, 16)
kernel = dense.kernel
before, gradient = kernel.numpy(), np.random.default_rng(0).normal(size=(64, 64))
ours = step(before, gradient, rate=0.1)
optimizer.apply([gradient.astype("float32")], [kernel])

print("values after a step:", np.unique(ours).size)
print("integers with a scale per channel:", np.unique(integers(ours, axis=0)).size)
print("integers with one scale:", np.unique(integers(ours)).size)

# %% tags=["remove-cell"]
np.testing.assert_allclose(kernel.numpy(), ours, atol=1e-6)
assert np.unique(ours).size == 16 and np.mean(ours == 0) > 0.79
assert np.unique(integers(ours)).size <= 16
assert np.unique(integers(ours, axis=0)).size > 32
wrapped = at.quantize_aware(layer).layers[-1]
rounded = wrapped.rounded(wrapped.layer.kernel).numpy()
np.testing.assert_allclose(
    rounded * 127 / np.abs(rounded).max(), integers(kernel.numpy()), atol=1e-3
)

# %% [markdown]
# The library took the same step: what {py:func}`accel_tf.pruning.prune` and {py:func}`accel_tf.clustering.cluster` leave on a weight is a constraint that
# Keras applies after each update. And {py:func}`accel_tf.quantization.quantize_aware` looks for zeros and clusters in the
# weights it is given, holds them, and rounds them as `integers` does with one scale.
#
# ## With `accel_tf`
#
# The model is a small convolutional network for the digits. Each technique is one line, followed by a few epochs of training:

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.digits()
folder = pathlib.Path(tempfile.mkdtemp())


def block(filters):
    return [
        keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
        keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.ReLU(),
    ]


model = keras.Sequential(
    [
        keras.Input((8, 8, 1), name="image"),
        *block(32),
        *block(64),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(100, activation="relu"),
        keras.layers.Dense(10),
    ],
    name="digits",
)


# %%
def train(model, epochs, rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, steps_per_execution=23)
    model.fit(x_train, y_train, batch_size=64, epochs=epochs, verbose=0)


stages = {}


def keep(name, model):
    """Writes the model as a LiteRT file, and remembers what its largest kernel is like."""
    path = folder / f"{name}.tflite"
    at.export.litert(model, path)
    kernel = max((v.numpy() for v in model.trainable_variables), key=np.size)
    stages[name] = path, kernel


# %%
train(model, epochs=6, rate=2e-3)
keep("dense", model)

at.prune(model, at.PolynomialDecay(0.9, end_step=220, frequency=10))
train(model, epochs=14, rate=2e-3)
keep("pruned", model)
pruned = keras.models.clone_model(model)  # for the peer, below
pruned.set_weights(model.get_weights())

at.cluster(model, 16)
train(model, epochs=2, rate=1e-3)
keep("clustered", model)
at.export.saved_model(model, folder / "saved")  # for LiteRT's own tools, below

quantized = at.quantize_aware(model)
train(quantized, epochs=2, rate=5e-4)
keep("quantized", quantized)

at.report_of(quantized)

# %% [markdown]
# The report says what was found and is being kept. Nothing else told it: `model` could have come from a `.keras` file, where no
# constraints are stored. The same model is called PCQAT elsewhere, for *pruning and cluster preserving quantization-aware training*.


# %% mystnb={"image": {"alt": "Two panels with four rows each: dense, pruned, clustered, quantized. Left, the weights of the hidden layer as vertical marks: a dense band, then a band with a gap around zero, then sixteen marks, then sixteen marks again. Right, bars of the zipped file sizes, falling from several hundred kilobytes to about twenty."}, "figure": {"caption": "Left: the values of the hidden layer after each step; darker means more weights. The gap around zero is what pruning took; 16 values are left by clustering, zero among them, and stay 16 in the quantized model. Right: the size of the LiteRT file in an archive, with the accuracy on the test images.", "name": "fig-pipeline"}} tags=["hide-input"]
def accuracy(path):
    """Per cent of the test images that a LiteRT file gets right."""
    outputs = at.export.run_litert(path, x_test)
    return 100 * float(np.mean(outputs.argmax(axis=1) == y_test))


def zipped(path):
    return len(gzip.compress(path.read_bytes(), 9))


right = {name: accuracy(path) for name, (path, _) in stages.items()}
sizes = {name: zipped(path) for name, (path, _) in stages.items()}
figure, (left, bars) = plt.subplots(1, 2, figsize=(8.4, 3.2), width_ratios=(1.5, 1))
for row, (_, kernel) in enumerate(stages.values()):
    marks, counts = np.unique(np.round(kernel, 3), return_counts=True)
    shade = np.clip(0.15 + counts / 150, 0, 1)
    for mark, alpha in zip(marks, shade, strict=True):
        left.plot([mark] * 2, [row - 0.35, row + 0.35], color="C0", alpha=alpha, lw=1.2)
left.set(xlabel="weight", yticks=range(4), yticklabels=stages, xlim=(-0.35, 0.35))
left.set_title("What the weights are")
bars.barh(range(4), [sizes[name] / 1e3 for name in stages], color="C1")
for row, name in enumerate(stages):
    text = f"{sizes[name] / 1e3:.0f} kB, {right[name]:.1f} %"
    inside = sizes[name] > 0.5 * max(sizes.values())
    x, color = (20, "white") if inside else (sizes[name] / 1e3 + 8, "black")
    bars.text(x, row, text, va="center", fontsize=9, color=color)
bars.set(xlabel="zipped file [kB]", yticks=[])
bars.set_title("What they cost")
for ax in (left, bars):
    ax.invert_yaxis()
    ax.grid(visible=False)
plt.show()

# %% [markdown]
# ## Measure
#
# Is {numref}`fig-pipeline` what was shipped? A Keras model can say what it likes; the phone gets the file. So we read the integers out of its
# bytes. The peer is TensorFlow's Model Optimization Toolkit (TFMOT), whose *collaborative optimization* has a scheme for this purpose. It gets
# our pruned network, as a tf_keras model, then as many epochs of clustering and of quantization-aware training.

# %%
from accel_tf.interop.tfmot import to_tf_keras

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the old packages
    import tensorflow_model_optimization as tfmot
    import tf_keras
    from tensorflow_model_optimization.python.core.clustering.keras.experimental import (
        cluster as experimental,
    )


def train_peer(model, rate):
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(rate), loss)
    model.fit(x_train, y_train, batch_size=64, epochs=2, verbose=0)


# %% tags=["remove-output"]
tf.get_logger().setLevel("ERROR")
start = tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS
peer = experimental.cluster_weights(
    to_tf_keras(pruned), 16, start, preserve_sparsity=True
)
train_peer(peer, 1e-3)
peer = tfmot.clustering.keras.strip_clustering(peer)
scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme(
    preserve_sparsity=True
)
annotated = tfmot.quantization.keras.quantize_annotate_model(peer)
peer = tfmot.quantization.keras.quantize_apply(annotated, scheme)
train_peer(peer, 5e-4)

converter = tf.lite.TFLiteConverter.from_keras_model(peer)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _ = (folder / "TFMOT.tflite").write_bytes(converter.convert())


# %%
def kernels_in(path):
    """Yields the 8-bit kernels that are stored in a LiteRT file, largest first."""
    content = schema.Model.GetRootAs(path.read_bytes(), 0)
    file = schema.ModelT.InitFromObj(content)
    for tensor in file.subgraphs[0].tensors:
        data = file.buffers[tensor.buffer].data
        if tensor.type == schema.TensorType.INT8 and data is not None and len(data):
            yield np.asarray(data, np.uint8).view(np.int8).reshape(tensor.shape)


files = {"accel_tf": stages["quantized"][0], "TFMOT": folder / "TFMOT.tflite"}
rows = []
for name, path in files.items():
    kernels = sorted(kernels_in(path), key=np.size)
    zeros = np.mean(np.concatenate([q.ravel() for q in kernels]) == 0)
    distinct = ", ".join(str(np.unique(q).size) for q in kernels)
    rows.append((name, f"{100 * zeros:.1f}", distinct, accuracy(path), zipped(path)))
at.report.Table(
    ("file", "zeros [%]", "values of each kernel", "accuracy [%]", "zipped [bytes]"),
    rows,
)

# %% tags=["remove-cell"]
dense_path = stages["dense"][0]
raw = dense_path.stat().st_size
glue("kilobytes", f"{raw / 1e3:.0f}", display=False)
glue("shipped", f"{sizes['quantized'] / 1e3:.0f}", display=False)
glue("ratio", f"{raw / sizes['quantized']:.0f}", display=False)
glue("zipped_ratio", f"{sizes['dense'] / sizes['quantized']:.0f}", display=False)
glue("parameters", f"{model.count_params():,}", display=False)
our_kernels = list(kernels_in(files["accel_tf"]))
weights = sum(q.size for q in our_kernels)
in_weights = sum(len(gzip.compress(q.tobytes(), 9)) for q in our_kernels)
glue("bits", f"{8 * in_weights / weights:.2f}", display=False)
lost = right["dense"] - right["quantized"]
glue("lost", f"{abs(lost):.1f}", display=False)
glue("lost_word", "less" if lost > 0 else "more", display=False)
peers = sorted(kernels_in(files["TFMOT"]), key=np.size)
glue("peer_values", str(max(np.unique(q).size for q in peers)), display=False)
assert len(our_kernels) == 4 and all(np.unique(q).size <= 16 for q in our_kernels)
assert all(np.mean(q == 0) > 0.89 for q in our_kernels)
assert raw / sizes["quantized"] > 20
assert lost < 2
assert max(np.unique(q).size for q in peers) > 32
assert all(np.mean(q == 0) > 0.89 for q in peers)
assert abs(rows[0][3] - rows[1][3]) < 5
assert 0.8 < rows[0][4] / rows[1][4] < 1.25
assert 32 / bound > raw / sizes["quantized"]

# %% [markdown]
# The float file had {glue:text}`kilobytes` kB for {glue:text}`parameters` parameters. What is left, zipped, is {glue:text}`shipped` kB: **a factor of
# {glue:text}`ratio`**, or {glue:text}`zipped_ratio` if the float file is zipped, too. It gets {glue:text}`lost` points {glue:text}`lost_word` of the test images right than
# the dense one. Equation {eq}`eq-pipeline-bits` allowed for {glue:text}`bound` bits for a weight; `gzip`, which is no ideal coder, takes {glue:text}`bits`. The rest
# is scales, biases and the graph.
#
# TFMOT keeps the zeros as well, and lands at a similar size. Its clusters are kept in the Keras model, but in the file a convolution has up to
# {glue:text}`peer_values` values: they were multiplied by the channels' scales. That costs little here, where the convolutions are small
# beside the hidden layer. It matters to a runtime that stores 4-bit indices, and where convolutions are most of the model.
#
# ### The order
#
# Each step should come after those that it preserves. *Prune first*: pruning takes the smallest weights, and in a clustered kernel those are whole
# clusters. Turned around, few of the sixteen values survive, whatever they were worth:

# %%
turned = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256)])
at.cluster(turned, 16)
at.prune(turned, at.OneShot(0.9))
left_over = np.unique(turned.layers[0].kernel.numpy()).size
print(f"clustered, then pruned: {left_over} values are left")

# %% tags=["remove-cell"]
assert left_over < 8

# %% [markdown]
# *Quantize last*: pruning and clustering need the differences between weights that rounding wipes out, and most of the
# training is done by then, without the cost of fake quantization.
#
# ## When it does not help
#
# **When a step does not know of those before.** The clustered network, quantized by LiteRT's own post-training tool, keeps its zeros, for
# zero is a mark on every ruler. Its clusters it does not keep:

# %% tags=["remove-output"]
converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "saved"))
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([x_train[i : i + 1]] for i in range(100))
_ = (folder / "unaware.tflite").write_bytes(converter.convert())

# %%
unaware = [np.unique(q).size for q in kernels_in(folder / "unaware.tflite")]
print("values of each kernel:", *sorted(unaware, reverse=True))

# %% tags=["remove-cell"]
extra = zipped(folder / "unaware.tflite") / sizes["quantized"] - 1
glue("extra", f"{100 * extra:.0f}", display=False)
assert max(unaware) > 32 and extra > 0.02

# %% [markdown]
# Zipped, that file is {glue:text}`extra` % larger. Its accuracy need not be worse: it has more values to choose from.
#
# **Where nobody decompresses.** On disk, in memory and on its way to the processor each weight of our file is a byte, zero or not. Only eight of the
# 32 bits are saved there, and no time beyond that of any 8-bit model:

# %%
plain = at.calibrate(pruned, x_train[:256], verbose=0)
for variable in plain.trainable_variables:  # dense again, of the same shapes
    if len(variable.shape) > 1:
        variable.assign(np.random.default_rng(0).normal(0, 0.1, variable.shape))
at.export.litert(plain, folder / "plain.tflite")
both = {"dense": folder / "plain.tflite", "ours": stages["quantized"][0]}
times = at.measure_latency(both, x_test[:64], verbose=0)
for name, path in both.items():
    size = path.stat().st_size / 1e3
    print(f"int8, {name:5}  {size:.0f} kB on disk, {times[name]} for a batch of 64")

# %% tags=["remove-cell"]
on_disk = [path.stat().st_size for path in both.values()]
assert 0.9 < on_disk[1] / on_disk[0] < 1.1
assert 0.3 < times["ours"].median / times["dense"].median < 3

# %% [markdown]
# To run faster, zeros need a kernel that skips them ([](sparse_networks.py)), or whole channels that can be removed
# ([](structured_sparsity.py)).
#
# **On small models.** The graph, the scales and the biases do not shrink. With a tenth of the weights they would be half of the file.
#
# ## Use it in your project
#
# ```python
# import keras
# import accel_tf as at
#
# model = keras.models.load_model("mine.keras")
#
# at.prune(model, at.PolynomialDecay(0.9, end_step=5000))
# model.compile("adam", "sparse_categorical_crossentropy")
# model.fit(x, y, epochs=10)              # until some epochs after the last step of the schedule
#
# at.cluster(model, 16)
# model.fit(x, y, epochs=2)
#
# quantized = at.quantize_aware(model)    # or at.calibrate(model, x[:512]), without training
# print(at.report_of(quantized))          # "90% zeros and 16 clusters kept"
# quantized.compile(keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")
# quantized.fit(x, y, epochs=2)
#
# at.export.litert(quantized, "mine.tflite")
# ```
#
# Leave out what you do not need: each pair works as well. To let go of what is kept, there are {py:func}`accel_tf.pruning.strip_pruning` and
# {py:func}`accel_tf.clustering.strip_clustering`, for the quantized model, too.
#
# API: {py:func}`accel_tf.pruning.prune`, {py:func}`accel_tf.clustering.cluster`,
# {py:func}`accel_tf.quantization.quantize_aware`, {py:func}`accel_tf.export.litert`.
#
# ## Takeaways
#
# - Zeros, few values and few bits add up, to less than a bit for a weight, if each step preserves what the ones before have made.
# - Prune, cluster, quantize: in this order, with a few epochs of training after each. Then look into the file.
# - The saving beyond a factor of four is one of transport: it is there as long as the file is compressed.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-pipelines-1
# By {eq}`eq-pipeline-bits`, which is the cheaper: 80 % zeros with 8 values, or 90 % zeros with 256? What is each technique's share of the bits in the first?
# :::
#
# :::{solution-start} ex-pipelines-1
# :class: dropdown
# :::
#
# The bits say where the zeros are, and which value each of the others has:


# %%
def bits(sparsity, values):
    d = 1 - sparsity
    where = -d * np.log2(d) - (1 - d) * np.log2(1 - d)
    return where, d * np.log2(values - 1)


for sparsity, values in ((0.8, 8), (0.9, 256)):
    where, which = bits(sparsity, values)
    print(f"{sparsity:.0%} zeros, {values} values: {where:.2f} + {which:.2f} bits")

# %% tags=["remove-cell"]
assert sum(bits(0.8, 8)) > sum(bits(0.9, 256)) > bits(0.8, 8)[0]

# %% [markdown]
# They are nearly equal. In the first, more than half goes into the places, on which clustering has no influence.
#
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-pipelines-2
# A batch normalization behind a clustered convolution has a factor $\gamma < 0$ in some channels. What becomes of the integers if it is folded into the kernel? What could a library do?
# :::
#
# :::{solution} ex-pipelines-2
# :class: dropdown
# A scale is positive, so the sign goes to the integers: these channels hold the negated values, and the kernel has up to twice as many.
# {py:func}`accel_tf.quantization.quantize_aware` does not fold such a normalization, but lets it be a kernel of its own, and holds factors that are positive above zero during training.
# :::
#
# ## References
#
# ```{footbibliography}
# ```
