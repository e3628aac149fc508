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
# # Export
#
# **Hand your network to the runtime that ships it, in the number format that you chose, and prove that the file says what the model said.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 12 minutes to read, under a minute to run · **You need** Keras; {doc}`quantization_aware` helps ·
# **Module** {py:mod}`accel_tf.export`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import pathlib
import tempfile

import keras
import matplotlib.pyplot as plt
import matplotlib_inline.backend_inline
import numpy as np
import onnxruntime
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from myst_nb import glue

import accel_tf as at

plt.style.use("accel_tf.book")
matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
keras.utils.set_random_seed(0)
folder = pathlib.Path(tempfile.mkdtemp())

# Delegates compute several layers at once and keep nothing of what is in between.
plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES

# %% [markdown]
# ## You will learn to
#
# - **write** one model as a SavedModel, a LiteRT file and an ONNX file, in full, half, 8-bit and 4-bit numbers;
# - **verify** a file in the runtime that will run it, and **find** the first layer that is wrong;
# - **read** what stayed in float, and why.
#
# ## Intuition: a translation, and a proof-reader
#
# An export is a translation. Your model is Python code and variables; what ships is a list of operators and constants,
# executed by a program that has never heard of Keras. A translator may fold a normalization into a kernel, fuse a
# ReLU, swap the axes, round the weights. Each is legitimate, and each has been got wrong by some version of some converter.
# That training and serving compute the same is one of the standard tests of a production system
# {footcite}`breck2017ml`, and the one most often left out.
#
# How alike two tensors are is measured by the {term}`SQNR`, the ratio of signal to noise in decibels:
#
# $$
# \mathrm{SQNR} = 10 \log_{10} \frac{\sum y^2}{\sum (y - \hat y)^2}
# $$ (eq-sqnr-file)
#
# Twenty decibels are an error of a tenth of the signal, 40 of a hundredth. Each bit more of an
# ideal quantizer halves the error, which is worth $20 \log_{10} 2 \approx 6$ dB {footcite}`lin2016fixed`. The
# output alone tells *that* a file is wrong. Looked at layer by layer, as in {numref}`fig-fault`, the ratio tells *where*: it is high
# down to the fault and never recovers.

# %% tags=["hide-input"]
(x_train, y_train), (x_test, y_test) = at.datasets.digits()


def block(filters, name):
    return [
        keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name),
        keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm"),
        keras.layers.ReLU(name=f"{name}_relu"),
    ]


cnn = keras.Sequential(
    [
        keras.Input((8, 8, 1), name="image"),
        *block(32, "stem"),
        keras.layers.MaxPooling2D(name="pool"),
        *block(64, "body"),
        *block(64, "deep"),
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(128, activation="relu", name="hidden"),
        keras.layers.Dense(10, name="head"),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
cnn.compile("adam", loss, metrics=["accuracy"])
_ = cnn.fit(x_train, y_train, batch_size=64, epochs=6, verbose=0)

# %% tags=["remove-cell"]
int8 = at.calibrate(cnn, x_train[:256], verbose=0)
at.export.litert(int8, folder / "right.tflite")
interpreter = Interpreter(
    str(folder / "right.tflite"), experimental_op_resolver_type=plain
)
interpreter.allocate_tensors()
weights = next(
    interpreter.get_tensor(d["index"])
    for d in interpreter.get_tensor_details()
    if tuple(d["shape"]) == (64, 3, 3, 64)
)
content = (folder / "right.tflite").read_bytes()
assert content.count(weights.tobytes()) == 1
content = content.replace(weights.tobytes(), (-weights).tobytes())
_ = (folder / "wrong.tflite").write_bytes(content)
right = at.export.verify(int8, folder / "right.tflite", x_test)
wrong = at.export.verify(int8, folder / "wrong.tflite", x_test)
assert right.ok and right.first_deviation is None and right.sqnr > 25
assert not wrong.ok and wrong.first_deviation == "deep"

# %% mystnb={"image": {"alt": "Line plot of the ratio of signal to noise in decibels against the layers of a network, from its input to its output. The line of the right file stays above thirty decibels throughout. That of the wrong file follows it for the first layers, drops below zero at the layer called deep and stays under ten from there on."}, "figure": {"caption": "Two 8-bit files of one network, layer by layer, against the Keras model. In one of them, the signs of the weights of the layer *deep* are turned. Layers that the runtime computes inside the next one's kernel are left out.", "name": "fig-fault"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.6, 3.2))
inside = {"stem", "body", "deep", "stem_norm", "body_norm", "deep_norm"}
shown = [m.layer for m in right.layers if m.layer not in inside]
for found, style in ((right, "o-"), (wrong, "s--")):
    ratios = {m.layer: np.clip(m.sqnr, -10, 80) for m in found.layers}
    label = found.path.stem + " file"
    axes.plot(shown, [ratios[layer] for layer in shown], style, label=label)
axes.axhline(right.threshold, color="0.5", linestyle=":", linewidth=1)
axes.set(ylabel="SQNR [dB]", xlabel="layer, from input to output")
axes.tick_params(axis="x", rotation=25)
axes.set_title("The fault shows where it begins")
axes.legend()
plt.show()

# %% [markdown]
# ## From scratch
#
# LiteRT will show all of its tensors if it is asked to keep them. Keras will show those of all layers. So the proof-reader is a search: for
# each layer, the tensor of the same shape that is most like it. Names do not matter, so it works for
# files from anybody's converter:


# %%
def sqnr(y, z):
    return 10 * np.log10(np.sum(y**2) / max(np.sum((y - z) ** 2), 1e-30))


def tensors_of(path, x):
    runtime = Interpreter(
        str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=plain,
    )
    index = runtime.get_input_details()[0]["index"]
    runtime.resize_tensor_input(index, x.shape)
    runtime.allocate_tensors()
    runtime.set_tensor(index, x)
    runtime.invoke()
    return [runtime.get_tensor(d["index"]) for d in runtime.get_tensor_details()]


# %%
at.export.litert(cnn, folder / "float.tflite")
x = x_test[:8]
tensors = tensors_of(folder / "float.tflite", x)
watched = keras.Model(cnn.inputs[0], [layer.output for layer in cnn.layers])
scratch = {}
for layer, y in zip(cnn.layers, watched(x), strict=True):
    same = [t for t in tensors if t.shape == y.shape]
    scratch[layer.name] = max((sqnr(y, t) for t in same), default=np.nan)
print({name: int(value) for name, value in scratch.items()})

# %% tags=["remove-cell"]
theirs = {m.layer: m for m in at.export.verify(cnn, folder / "float.tflite", x).layers}
for name, value in scratch.items():
    if theirs[name].note:  # inside a kernel: no likeness worth the name
        assert value < 20
    else:
        assert value > 80 and theirs[name].sqnr > 80
assert {"stem", "stem_norm"} <= {n for n, v in scratch.items() if v < 20}

# %% [markdown]
# Above 100 dB two float programs are as equal as they get. But `stem` and `stem_norm` look dreadful, and nothing is wrong with them:
# the converter fused convolution, normalization and ReLU into one kernel, so the file holds no tensor for the
# first two. A good proof-reader must tell a fused layer from a faulty one. The next kernel's output decides: if
# that agrees, everything inside it was right.
#
# ## With `accel_tf`
#
# One verb for each kind of file, and one that checks them all:

# %%
saved = at.export.saved_model(cnn, folder / "saved")  # TensorFlow and its server
onnx = at.export.onnx(cnn, folder / "float.onnx")  # onnxruntime and many others
lite = at.export.litert(cnn, folder / "float.tflite")  # phones, browsers, boards

for path in (saved, onnx, lite.path):
    print(at.export.verify(cnn, path, x_test).table.title)

# %% tags=["remove-cell"]
for path in (saved, onnx, lite.path):
    assert at.export.verify(cnn, path, x_test).sqnr > 80

# %% [markdown]
# Each file was run by its own runtime. A SavedModel is TensorFlow's: the graph, ready for TensorFlow Serving
# {footcite}`olston2017serving`. [ONNX](https://onnx.ai) is the exchange format that most vendors' runtimes read. LiteRT, once called
# TensorFlow Lite, is made for small devices {footcite}`david2021micro`. None of the three needs Keras, `accel_tf`, or Python.
#
# For LiteRT and ONNX the number format follows from the *model*. Whatever scheme
# {py:func}`accel_tf.quantization.calibrate` or {py:func}`accel_tf.quantization.quantize_aware` gave it, the file will have:

# %%
schemes = {
    "float16 weights": at.Float16(),
    "int8 weights": at.Int8Weights(),
    "int4 weights": at.Int4Weights(group_size=None),
    "int16 activations": at.Int16x8(),
    "int8": at.Int8(),
}
few = x_train[:256]
quantized, files = {}, {"float": folder / "float.tflite"}
for name, scheme in schemes.items():
    quantized[name] = at.calibrate(cnn, few, scheme, verbose=0)
    files[name] = folder / f"{name}.tflite"
    data = few if name == "int16 activations" else None  # its ranges are LiteRT's
    at.export.litert(quantized[name], files[name], data=data)

at.export.verify(quantized["int8"], files["int8"], x_test)

# %% tags=["remove-cell"]
for name, model in quantized.items():
    checked = at.export.verify(model, files[name], x_test)
    assert checked.ok and checked.agreement > 0.97, (name, checked)
shown_int8 = at.export.verify(quantized["int8"], files["int8"], x_test)
assert np.isinf(shown_int8.sqnr) and shown_int8.largest_difference == 0

# %% [markdown]
# The table compares the file with the *fake-quantized* model, which rounds just where the file does, and the very same sums: its outputs are
# those of the file, to the last bit. What eight bits cost is the difference to the float model, and it can be measured in Keras. The
# layers above are not as equal, for LiteRT shows them only when it runs its plain kernels, which round twice; the file is run by faster ones, which round once.
#
# ## Measure
#
# Predictions first. Weights of 16, 8 and 4 bits make a file at most 2, 4 and 8 times smaller. From eight bits to four the
# ratio to the float model should fall by about $4 \times 6 = 24$ dB. And 4-bit weights need not
# be faster than 8-bit ones: the processor has no 4-bit product.
#
# The peer is TensorFlow's own converter with its default optimization, which also rounds weights to 8 bits, but by itself:

# %% tags=["remove-output"]
converter = tf.lite.TFLiteConverter.from_keras_model(cnn)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
files["TensorFlow's default"] = folder / "peer.tflite"
_ = files["TensorFlow's default"].write_bytes(converter.convert())

session = onnxruntime.InferenceSession(onnx)
server = tf.saved_model.load(str(saved)).signatures["serving_default"]
programs = {
    **files,
    "float, ONNX": lambda x: session.run(None, {"image": x})[0],
    "float, SavedModel": lambda x: server(image=tf.constant(x))["head"].numpy(),
}

# %%
reference = cnn.predict(x_test, verbose=0)
times = at.measure_latency(programs, x_test[:64], rounds=60, verbose=0)
size, ratio, accuracy = {}, {}, {}
for name, path in files.items():
    y = at.export.run_litert(path, x_test)
    size[name] = path.stat().st_size
    ratio[name] = sqnr(reference, y)
    accuracy[name] = (y.argmax(1) == y_test).mean()

at.report.Table(
    ("LiteRT file", "size [kB]", "SQNR [dB]", "accuracy [%]", "batch of 64"),
    [
        (
            name,
            f"{size[name] / 1e3:.0f}",
            f"{ratio[name]:.0f}",
            f"{100 * accuracy[name]:.1f}",
            str(times[name]),
        )
        for name in files
    ],
    note=f"{at.benchmark.host()}; SQNR against the float model",
)

# %% tags=["remove-cell"]
times_smaller = {name: size["float"] / size[name] for name in size}
glue("half", f"{times_smaller['float16 weights']:.1f}", display=False)
glue("eight", f"{times_smaller['int8 weights']:.1f}", display=False)
glue("four", f"{times_smaller['int4 weights']:.1f}", display=False)
y8, y4 = (
    quantized[n].predict(x_test, verbose=0) for n in ("int8 weights", "int4 weights")
)
lost = sqnr(reference, y8) - sqnr(reference, y4)
glue("lost", f"{lost:.0f}", display=False)
slow = times["int4 weights"].median / times["int8 weights"].median
glue("slow", f"{slow:.0f}", display=False)
glue("onnx_time", str(times["float, ONNX"]), display=False)
glue("saved_time", str(times["float, SavedModel"]), display=False)
glue("float_time", str(times["float"]), display=False)
assert 1.7 < times_smaller["float16 weights"] <= 2
assert 3.2 < times_smaller["int8 weights"] <= 4.1
assert 5.0 < times_smaller["int4 weights"] <= 8.1
assert 16 < lost < 32
assert max(accuracy.values()) - min(accuracy.values()) < 0.04
assert ratio["float"] > 80 and ratio["int16 activations"] > ratio["int8"]
assert ratio["float16 weights"] > ratio["int8 weights"] > ratio["int4 weights"]
assert ratio["int16 activations"] > ratio["int8 weights"] - 6
assert slow > 2 and times["int16 activations"].median > times["int8"].median

# %% [markdown]
# The files are {glue:text}`half`, {glue:text}`eight` and {glue:text}`four` times smaller; what is missing to 2, 4 and 8 are the graph and the
# scales. Halving the bits of the weights cost {glue:text}`lost` dB in the model. Whether the decibels matter is for the accuracy to say,
# and here they hardly do. The time is another matter: LiteRT has fast 8-bit kernels, but convolutions with 4-bit weights or 16-bit activations run
# on its plain ones, and the 4-bit file takes {glue:text}`slow` times as long as the 8-bit one. (Dense layers with 4-bit weights do have a fast kernel.)
#
# As a float program, the same network takes {glue:text}`float_time` in LiteRT, {glue:text}`onnx_time` in onnxruntime and {glue:text}`saved_time` in
# TensorFlow. Measure on the machine that you ship to: the order changes from one to the next.
#
# ## When it does not help
#
# **Not every operator has an integer kernel.** LiteRT normalizes layers in float only. The file is then an archipelago: islands of
# float, with conversions at their shores. {py:func}`accel_tf.export.litert` accepts an island if the layer is known to need it, names it, and
# refuses any other:

# %%
tokens = keras.Input((16,), dtype="int32", name="tokens")
embedded = keras.layers.Embedding(100, 32, name="embedding")(tokens)
attended = keras.layers.MultiHeadAttention(2, 16, name="attention")(embedded, embedded)
summed = keras.layers.Add(name="residual")([embedded, attended])
normed = keras.layers.LayerNormalization(name="norm")(summed)
pooled = keras.layers.GlobalAveragePooling1D(name="pool")(normed)
encoder = keras.Model(tokens, keras.layers.Dense(2, name="head")(pooled))
sentences = np.random.default_rng(0).integers(0, 100, (64, 16))

ready = at.calibrate(encoder, sentences, verbose=0)
text = at.export.litert(ready, folder / "encoder.tflite")
text.in_float

# %% tags=["remove-cell"]
glue("share", f"{100 * text.int8_fraction:.0f}", display=False)
why = {row[2] for row in text.in_float.rows if "QUANTIZE" not in row[1]}
assert why == {"LiteRT has no int8 kernel for layer normalization"}
assert 0.5 < text.int8_fraction < 1

# %% [markdown]
# The rest, {glue:text}`share` % of the operators, is int8, attention included.
#
# **Zeros are not free to skip.** A pruned network is smaller when *compressed*, and no faster by itself. LiteRT has
# sparse kernels, for zeros in blocks of 4 or 16 inputs of one output. Ask for them where there are none, and you
# get an error, not a slow file:

# %%
import textwrap

try:
    at.export.litert(cnn, folder / "sparse.tflite", sparse=True)
except ValueError as error:
    print(textwrap.fill(str(error), 80))


# %%
def wide(kept):
    """Four layers of 1,024 × 1,024, of which a tenth of the weights is not zero."""
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((1024,))])
    for _ in range(4):
        model.add(keras.layers.Dense(1024, use_bias=False))
        kernel = rng.normal(size=(1024, 1024)) * kept(rng)
        model.layers[-1].kernel.assign(kernel)
    return model


scattered = wide(lambda rng: rng.random((1024, 1024)) < 0.1)
blocks = wide(lambda rng: np.repeat(rng.random((256, 1024)) < 0.1, 4, axis=0))
paths = {name: folder / f"{name}.tflite" for name in ("scattered", "blocks")}
at.export.litert(scattered, paths["scattered"])
at.export.litert(blocks, paths["blocks"], sparse=True)
one = np.random.default_rng(1).normal(size=(1, 1024)).astype("float32")
runners = {
    name: at.export.LiteRTRunner(path, threads=1) for name, path in paths.items()
}
sparse_times = at.measure_latency(runners, one, verbose=0)
for name, latency in sparse_times.items():
    print(f"{name:10} {latency}, {paths[name].stat().st_size / 1e6:.1f} MB")

# %% tags=["remove-cell"]
gain = sparse_times["scattered"].median / sparse_times["blocks"].median
glue("gain", f"{gain:.1f}", display=False)
assert gain > 1.1
assert paths["blocks"].stat().st_size < 0.5 * paths["scattered"].stat().st_size
assert at.export.verify(blocks, paths["blocks"], np.repeat(one, 4, 0)).sqnr > 80

# %% [markdown]
# Both networks have 90 % zeros. In blocks of four they make the file {glue:text}`gain` times as fast for a single sample and thread; scattered,
# they gain nothing. See {doc}`structured_sparsity` for how to train blocks, and {doc}`sparse_matmul` for a kernel that takes zeros as they come.
#
# **A right class is no proof.** The arg-max forgives much. So compare tensors, not only accuracy, and do so on inputs
# like those in production: on noise or zeros, a wrong range stays unseen.
#
# ## Use it in your project
#
# ```python
# import keras
# import accel_tf as at
#
# model = at.calibrate(keras.models.load_model("mine.keras"), x_train[:512])
#
# print(at.export.litert(model, "mine.tflite"))   # operators, data types, what stayed in float
# at.export.onnx(model, "mine.onnx")              # the same rounding, by QuantizeLinear pairs
# at.export.saved_model(model, "mine")            # for TensorFlow Serving
#
# checked = at.export.verify(model, "mine.tflite", x_val)
# print(checked)
# assert checked.ok, checked.first_deviation      # in the tests of your project, for each release
# ```
#
# And once it is deployed, keep some inputs and outputs of the Keras model beside the file. A device that runs them at start
# and compares has checked its own driver, its own delegate and its own download.
#
# API: {py:func}`accel_tf.export.litert`, {py:func}`accel_tf.export.onnx`, {py:func}`accel_tf.export.saved_model`,
# {py:func}`accel_tf.export.verify`, {py:func}`accel_tf.export.inspect_litert`.
#
# ## Takeaways
#
# - An export is a translation: check it in the runtime that will run it, tensor by tensor, in decibels.
# - The scheme of the model decides on the numbers in the file; each bit is worth about 6 dB and an eighth of a byte.
# - What stays in float, and which layer deviates first, has a name. Look at it before you look at the accuracy.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-export-1
# In `right.tflite`, turn the signs of the weights of `head` only. Which layer does `verify` name, and what is the accuracy of the file?
# Its weights are the only int8 tensor of shape (10, 128).
# :::
#
# ```{solution-start} ex-export-1
# :class: dropdown
# ```

# %%
reader = Interpreter(str(files["int8"]), experimental_op_resolver_type=plain)
reader.allocate_tensors()
head = next(d for d in reader.get_tensor_details() if tuple(d["shape"]) == (10, 128))
old = reader.get_tensor(head["index"])
broken = folder / "broken.tflite"
content = files["int8"].read_bytes().replace(old.tobytes(), (-old).tobytes())
broken.write_bytes(content)
found = at.export.verify(quantized["int8"], broken, x_test)
wrong_classes = at.export.run_litert(broken, x_test).argmax(1)
print(found.first_deviation, f"{(wrong_classes == y_test).mean():.1%}")

# %% tags=["remove-cell"]
assert found.first_deviation == "head" and (wrong_classes == y_test).mean() < 0.3

# %% [markdown]
# Everything before the last layer agrees, so `head` is named; and the least likely class is now the winner.
#
# ```{solution-end}
# ```
#
# :::{exercise}
# :label: ex-export-2
# Every batch size costs a runtime some planning, and some accelerators want to know it beforehand. Export `cnn` with `batch_size=1` and
# give `run_litert` three images, then 360. Why does it work, and what is lost?
# :::
#
# :::{solution} ex-export-2
# :class: dropdown
# {py:func}`accel_tf.export.run_litert` cuts the batch into runs of one image, of which any number is a multiple. What is lost is throughput:
# every run pays for the call, and the kernels cannot share a row of weights among images. With `batch_size=2`, three images
# are an error that says so.
# :::
#
# ## References
#
# ```{footbibliography}
# ```
