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
# # Pruning: most weights can go
#
# **Set nine weights in ten to zero, keep the accuracy, and know exactly what that buys you and what it does not.**
#
# :::{admonition} Before you start
# :class: tip
# **Time** 12 minutes to read, under a minute to run · **You need** Keras, a little NumPy · **Module** {py:mod}`accel_tf.pruning`
# :::

# %% tags=["hide-input", "remove-output"]
import os

# Before TensorFlow is imported: its start-up notes are not for readers.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import gzip
import json
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
# - **prune** a Keras model to an exact {term}`sparsity`, at once or along a schedule, and train it while it is sparse;
# - **choose** a scope, a schedule and a criterion, and ask the layers how much they can spare;
# - **predict** the compressed size of a pruned model, and say why its speed does not change.
#
# ## Intuition: small weights, small effect
#
# A weight multiplies its input. If it is close to zero, so is its contribution, and leaving it out changes the output little.
# *{term}`Magnitude pruning`* takes this literally: sort the weights by $|w|$, set the smallest to zero, and train on, so that the
# others make up for the loss {footcite}`han2015learning`. A *{term}`mask`* of ones and zeros remembers which ones are gone.
#
# To remove many weights at once is a shock. Zhu and Gupta {footcite}`zhu2017prune` therefore raise the sparsity $s$ step by step,
# quickly at first, while there is much to spare, then ever more slowly:
#
# $$
# s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3, \qquad t_0 \le t \le t_1
# $$ (eq-schedule)
#
# Let us look at both halves of the idea. Here is a small CNN for real images of handwritten digits, {glue:text}`images` of them:

# %%
(x_train, y_train), (x_test, y_test) = at.datasets.digits()
EPOCHS, BATCH = 6, 64
STEPS = EPOCHS * -(-len(x_train) // BATCH)


def new_cnn():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dense(10, name="logits"),
        ]
    )


# %%
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train(model, epochs=EPOCHS):
    model.compile(keras.optimizers.Adam(2e-3), LOSS)
    model.fit(x_train, y_train, batch_size=BATCH, epochs=epochs, verbose=0)
    return model


def accuracy(model):
    """Per cent of the test images that the model gets right."""
    return 100 * float(np.mean(np.argmax(model(x_test), axis=-1) == y_test))


def copy(model):
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    return new


dense = train(new_cnn(), epochs=10)
print(
    f"{dense.count_params():,} weights, {accuracy(dense):.1f} % of the test images right"
)

# %% mystnb={"image": {"alt": "Left: histogram of a trained layer's weights, a bell around zero, whose inner 80 per cent is coloured as pruned. Right: sparsity over training steps, a curve that rises steeply, then flattens at 0.9, with a staircase of updates under it."}, "figure": {"caption": "Left: the weights of a trained layer; the grey ones are the smallest 80 %. Right: the schedule of equation {eq}`eq-schedule` to 90 %; the mask is updated every 100 steps and holds in between.", "name": "fig-magnitudes"}} tags=["hide-input"]
weights = dense.get_layer("hidden").kernel.numpy().ravel()
cut = np.quantile(np.abs(weights), 0.8)
bins = cut * np.linspace(-3, 3, 61)
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
left.hist(weights[np.abs(weights) > cut], bins, color="#0072B2", label="kept")
left.hist(weights[np.abs(weights) <= cut], bins, color="#bbbbbb", label="pruned")
left.set(xlabel="weight", ylabel="number of weights", title="Which")
left.legend()

schedule = at.PolynomialDecay(final_sparsity=0.9, end_step=1000)
steps = np.arange(0, 1301)
held = [schedule.sparsity_at(schedule.latest_update(int(t))) for t in steps[::10]]
right.plot(steps, schedule.sparsity_at(steps), color="#D55E00", label="equation")
right.step(steps[::10], held, color="#333333", lw=1.2, where="post", label="applied")
right.set(xlabel="optimizer step", ylabel="sparsity", ylim=(0, 1), title="When")
right.legend(loc="lower right")
plt.show()

# %% tags=["remove-cell"]
assert accuracy(dense) > 93
assert schedule.sparsity_at(500) > 0.75  # most of the way after half of the steps
glue("images", f"{len(x_train) + len(x_test):,}", display=False)
glue("early", 100 * schedule.sparsity_at(500) / 0.9, display=False)

# %% [markdown]
# Most weights huddle around zero. And the schedule is in a hurry: half-way through it has done {glue:text}`early:.0f` % of its work,
# which leaves the second half to recover.
#
# ## From scratch
#
# Both halves in NumPy. One detail matters: we keep the $k$ largest weights *by rank*. The tempting `abs(w) >= threshold` keeps too many as
# soon as several weights are equal, and in a network that has been pruned before, lots of weights are equal: zero.


# %%
def magnitude_mask(w, sparsity):
    """True for the weights to keep: exactly round(n · (1 - sparsity)) of them."""
    keep = round(w.size * (1 - sparsity))
    order = np.argsort(-np.abs(w).ravel(), kind="stable")
    mask = np.zeros(w.size, bool)
    mask[order[:keep]] = True
    return mask.reshape(w.shape)


def polynomial_decay(step, final, begin, end, initial=0.0):
    progress = np.clip((step - begin) / (end - begin), 0, 1)
    return final + (initial - final) * (1 - progress) ** 3


w = dense.get_layer("hidden").kernel.numpy()
mine = np.where(magnitude_mask(w, 0.8), w, 0)
print(f"{np.mean(mine == 0):.4f} of the weights are zero")

# %% [markdown]
# While a network trains, the mask has to be applied after *every* optimizer step, because the step moves the zeros. That is the part
# that is easy to get wrong: apply it before the step, and what you save to disk is not sparse.
#
# ## With `accel_tf`
#
# Keras has the right hook: after each step the optimizer applies every variable's *constraint*. {py:func}`~accel_tf.pruning.prune` puts
# one on the kernels. There is no wrapper around your layers, and nothing to strip off afterwards:

# %%
pruned = copy(dense)
report = at.prune(pruned, at.ConstantSparsity(0.8))
at.sparsity(pruned)

# %% tags=["remove-cell"]
np.testing.assert_array_equal(pruned.get_layer("hidden").kernel.numpy(), mine)
for step in (0, 123, 500, 2000):
    expected = polynomial_decay(step, 0.9, begin=0, end=1000)
    assert abs(schedule.sparsity_at(step) - expected) < 1e-6
tied = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
tied.layers[0].kernel.assign(np.ones((4, 5)))
at.prune(tied, at.ConstantSparsity(0.5))
assert at.sparsity(tied).total == 0.5
one_shot_80 = accuracy(pruned)
assert one_shot_80 < accuracy(dense) - 5
glue("one_shot_80", one_shot_80, display=False)

# %% [markdown]
# Exactly as from scratch, and at once, because `ConstantSparsity` begins at step 0. The accuracy is now {glue:text}`one_shot_80:.1f` %: we have
# pruned, but not trained on. A schedule and a `fit` do both:

# %%
pruned = copy(dense)
at.prune(
    pruned,
    at.PolynomialDecay(0.8, end_step=STEPS * 2 // 3, frequency=STEPS // 6),
    scope="global",
)
train(pruned)
print(f"sparsity {at.sparsity(pruned).total:.3f}, accuracy {accuracy(pruned):.1f} %")

# %% tags=["remove-cell"]
assert abs(at.sparsity(pruned).total - 0.8) < 1e-4
for name in ("conv1", "hidden"):
    size = dense.get_layer(name).kernel.numpy().size
    glue(name, f"{size:,}", display=False)
    glue(f"{name}_kept", f"{round(0.05 * size):,}", display=False)
assert accuracy(pruned) > accuracy(dense) - 3

# %% [markdown]
# What about `scope="global"`? It is the subject of the experiment.
#
# ## Measure: how far can we go?
#
# First a prediction. With `scope="layer"`, the default, each kernel loses the same fraction. Our `conv1` has only {glue:text}`conv1` weights and
# `hidden` has {glue:text}`hidden`: at 95 % they keep {glue:text}`conv1_kept` and {glue:text}`hidden_kept`. All information has to squeeze through those {glue:text}`conv1_kept`. With
# `scope="global"`, all weights are sorted together, and a layer with larger weights keeps more of them. So global should win, and the more so the
# sparser the model. We train three networks from different seeds, to see the spread:

# %%
LEVELS, TRAINED = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), (0.9, 0.95, 0.98)
results = {"layer": [], "global": [], "trained": []}
networks = [dense]
for seed in (1, 2):
    keras.utils.set_random_seed(seed)
    networks.append(train(new_cnn(), epochs=10))


def gradual(sparsity):
    return at.PolynomialDecay(sparsity, end_step=STEPS * 2 // 3, frequency=STEPS // 6)


for network in networks:
    for scope in ("layer", "global"):
        models = [copy(network) for _ in LEVELS]
        for model, level in zip(models, LEVELS, strict=True):
            at.prune(model, at.ConstantSparsity(level), scope=scope)
        results[scope].append([accuracy(model) for model in models])

# %%
sparse_models = {}
for network in networks:
    for level in TRAINED:
        model = copy(network)
        at.prune(model, gradual(level), scope="global")
        sparse_models[level] = train(model)
        results["trained"].append(accuracy(model))
results = {name: np.reshape(r, (len(networks), -1)) for name, r in results.items()}

# %% mystnb={"image": {"alt": "Accuracy against sparsity. Pruned layer by layer without training, accuracy collapses beyond 50 per cent. Pruned globally it holds until about 90 per cent. Pruned globally and trained on it stays near the dense accuracy up to 95 per cent and drops at 98."}, "figure": {"caption": "Accuracy on the test images against sparsity: mean of three networks, the bands from the worst to the best. Training under the mask moves the cliff to the right; it does not remove it.", "name": "fig-cliff"}} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7.2, 3.9))
reference = np.mean([accuracy(network) for network in networks])
axes.axhline(reference, color="#333333", lw=1, ls="--")
axes.text(-0.05, reference + 1.5, "dense", ha="left", color="#333333")
curves = [
    ("trained", TRAINED, "#009E73", "o", "all layers together, trained on"),
    ("global", LEVELS, "#0072B2", "s", "all layers together"),
    ("layer", LEVELS, "#D55E00", "^", "each layer alike"),
]
for name, levels, color, marker, label in curves:
    x = np.log2(1 / (1 - np.array(levels)))
    runs = results[name]
    axes.fill_between(
        x, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.2, lw=0
    )
    axes.plot(x, runs.mean(axis=0), marker=marker, color=color, label=label)
ticks = np.array([0, *LEVELS])
axes.set_xticks(np.log2(1 / (1 - ticks)), [f"{100 * t:.0f}" for t in ticks])
axes.set(
    xlabel="sparsity [%], spaced by the weights that remain", ylabel="accuracy [%]"
)
axes.set(xlim=(-0.1, 5.8), ylim=(0, 104))
axes.legend(loc="lower left")
plt.show()

# %% tags=["remove-cell"]
mean = {
    name: dict(
        zip(TRAINED if name == "trained" else LEVELS, runs.mean(axis=0), strict=True)
    )
    for name, runs in results.items()
}
assert mean["global"][0.8] > mean["layer"][0.8] + 15  # global wins, without training
assert mean["trained"][0.9] > reference - 3  # ninety per cent for free
assert mean["trained"][0.95] > mean["global"][0.95] + 10  # training recovers
assert mean["trained"][0.98] < reference - 3  # but there is a cliff
glue("reference", float(reference), display=False)
for name, level in [
    ("layer", 0.8),
    ("global", 0.8),
    ("global", 0.95),
    *zip(["trained"] * 3, TRAINED, strict=True),
]:
    glue(f"{name}_{100 * level:.0f}", float(mean[name][level]), display=False)

# %% [markdown]
# The prediction holds: at 80 % sparsity without training, the mean accuracy is {glue:text}`global_80:.0f` % with the global scope and {glue:text}`layer_80:.0f` %
# layer by layer. With training, 90 % of the weights go for next to nothing: {glue:text}`trained_90:.1f` % against {glue:text}`reference:.1f` % for the dense networks.
# At 95 %, {glue:text}`global_95:.0f` % become {glue:text}`trained_95:.0f` %. At 98 % even training does not help enough ({glue:text}`trained_98:.0f` %). Every
# network has its cliff; you have to look for it.
#
# ### What the bytes do
#
# In memory and in the `.keras` file a zero takes its four bytes like any other number. Compression finds the zeros. How well can it do?
# With a {term}`density` $d = 1 - s$, a weight needs one bit of information at most to say whether it is zero, on average the entropy
# $H(d)$ {footcite}`shannon1948mathematical`, and 32 bits if it is not:
#
# $$
# \begin{aligned}
# \text{bits per weight} &\approx 32\,d + H(d), \\
# H(d) &= -d \log_2 d - (1-d) \log_2 (1-d)
# \end{aligned}
# $$ (eq-bits)
#
# At 90 % these are {glue:text}`bits:.1f` bits instead of 32. Let us compare that with what gzip makes of the kernels:


# %%
def entropy(d):
    return -d * np.log2(d) - (1 - d) * np.log2(1 - d)


rows = []
for level in TRAINED:
    model = sparse_models[level]
    kernels = b"".join(w.numpy().tobytes() for w in model.weights if len(w.shape) > 1)
    predicted = len(kernels) / 32 * (32 * (1 - level) + entropy(1 - level))
    size = at.benchmark.file_size(model)
    rows.append((level, len(kernels), predicted, len(gzip.compress(kernels)), *size))
columns = (
    "sparsity",
    "kernels [B]",
    "predicted [B]",
    "gzip [B]",
    ".keras [B]",
    ".keras gzipped [B]",
)
at.report.Table(columns, [(row[0], *map(round, row[1:])) for row in rows])

# %% tags=["remove-cell"]
plain, zipped = at.benchmark.file_size(dense)
for _, _, predicted, compressed, on_disk, on_disk_zipped in rows:
    assert 0.9 < compressed / predicted < 1.5
    assert abs(on_disk / plain - 1) < 0.02
    assert on_disk_zipped < zipped / 3
glue("bits", float(32 * 0.1 + entropy(0.1)), display=False)
glue("gzip_ratio", float(zipped / rows[0][-1]), display=False)
glue("over", float(100 * (max(row[3] / row[2] for row in rows) - 1)), display=False)

# %% [markdown]
# gzip comes within {glue:text}`over:.0f` % of the prediction. The file itself stays as large as the dense one, to the percent; gzipped, the model of 90 % sparsity is {glue:text}`gzip_ratio:.1f` times
# smaller than the dense model gzipped. So compress what you ship or download.
#
# ### A peer: TFMOT
#
# TensorFlow's Model Optimization Toolkit (TFMOT) has pruned Keras models for years. It works on the legacy package tf_keras, so we convert
# our network, and give it the same schedule. Its scope is the layer:

# %%
from accel_tf.interop.tfmot import from_tf_keras, to_tf_keras, to_tfmot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the old packages
    import tensorflow_model_optimization as tfmot
    import tf_keras

    peer = tfmot.sparsity.keras.prune_low_magnitude(
        to_tf_keras(dense), to_tfmot(gradual(0.8))
    )
    peer.compile(
        tf_keras.optimizers.Adam(2e-3),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    callbacks = [tfmot.sparsity.keras.UpdatePruningStep()]
    peer.fit(x_train, y_train, BATCH, EPOCHS, verbose=0, callbacks=callbacks)
    peer = from_tf_keras(tfmot.sparsity.keras.strip_pruning(peer))

ours = copy(dense)
at.prune(ours, gradual(0.8))
train(ours)
at.report.Table(
    ("library", "sparsity", "accuracy [%]"),
    [
        (n, at.sparsity(m).total, accuracy(m))
        for n, m in [("TFMOT", peer), ("accel_tf", ours)]
    ],
)

# %% tags=["remove-cell"]
assert abs(at.sparsity(peer).total - at.sparsity(ours).total) < 1e-3
assert abs(accuracy(peer) - accuracy(ours)) < 8

# %% [markdown]
# Same schedule, same sparsity, and as good a network; our tests compare schedules and masks with TFMOT's one by one. The differences are in what
# surrounds them: Keras 3, no wrappers, an exact sparsity after every step, and a global scope.
#
# ## When it does not help
#
# **It is not faster.** You can read that pruning accelerates models. Look:

# %%
comparison = at.compare(
    {"dense": dense, "90 % zeros": sparse_models[0.9]},
    x_test,
    y_test,
    latency_batch=256,
    verbose=0,
)
comparison

# %% tags=["remove-cell"]
assert (
    comparison["dense"].latency.median < 2.5 * comparison["90 % zeros"].latency.median
)
assert comparison["dense"].flops == comparison["90 % zeros"].flops

# %% [markdown]
# The same operations, the same time: a dense kernel multiplies by zero as diligently as by anything else. Zeros become time only when
# a kernel *skips* them, and for single, scattered weights that takes a sparse format and a high sparsity. That is the subject of
# [](sparse_matmul.py), and `at.sparsify(model)` does it for you.
#
# **The schedule is not magic.** We said that removing many weights at once is a shock. Is gradual pruning better, then, than pruning at once and
# training for just as many steps?

# %%
at_once = []
for network in networks[:2]:
    model = copy(network)
    at.prune(model, at.ConstantSparsity(0.95, end_step=0), scope="global")
    at_once.append(accuracy(train(model)))
print(f"at once: {np.mean(at_once):.1f} %, gradually: {mean['trained'][0.95]:.1f} %")

# %% tags=["remove-cell"]
assert abs(np.mean(at_once) - mean["trained"][0.95]) < 5

# %% [markdown]
# On this problem it makes next to no difference: the network recovers from the shock in a few epochs. What mattered was to train under the mask, and
# the scope. For large networks and long training, schedules pay {footcite}`zhu2017prune,gale2019state`; but measure before you believe it, in your case too.
#
# ## Other schedules, other criteria
#
# A schedule says *when*, a criterion says *which*. Both are arguments of {py:func}`~accel_tf.pruning.prune`, and any function of the step is a schedule, too:

# %% mystnb={"image": {"alt": "Sparsity over training steps for five schedules that all end at 0.9 by step 1000. One-shot jumps at step 500; polynomial decay rises fastest; exponential and cosine follow, the cosine in the shape of an S; cyclical falls back to 0.6 in each of three cycles and rises again."}, "figure": {"caption": "Five ways to 90 %. Where the cyclical one falls back, weights return, and others may go in their place.", "name": "fig-schedules"}} tags=["hide-input"]
schedules = {
    "OneShot": at.OneShot(0.9, begin_step=500),
    "PolynomialDecay": at.PolynomialDecay(0.9, end_step=1000, frequency=10),
    "ExponentialDecay": at.ExponentialDecay(0.9, end_step=1000, frequency=10),
    "CosineDecay": at.CosineDecay(0.9, end_step=1000, frequency=10),
    "Cyclical": at.Cyclical(
        0.9, end_step=1000, cycles=3, initial_sparsity=0.6, frequency=10
    ),
}
colors = ("#333333", "#D55E00", "#009E73", "#0072B2", "#CC79A7")
figure, axes = plt.subplots(figsize=(7.2, 3.1))
at_steps = np.arange(0, 1201, 5)
for (name, one), color in zip(schedules.items(), colors, strict=True):
    due = np.array([one.latest_update(int(t)) for t in at_steps])
    held = np.where(due < 0, 0, one.sparsity_at(np.maximum(due, 0)))
    axes.step(at_steps, held, color=color, lw=1.4, where="post", label=name)
axes.set(xlabel="optimizer step", ylabel="sparsity", ylim=(0, 1))
axes.legend(loc="lower right")
plt.show()

# %% tags=["remove-cell"]
for one in schedules.values():
    assert abs(one.sparsity_at(one.reached_at) - 0.9) < 1e-6 and one.reached_at <= 1000
half_way = {name: one.sparsity_at(300) for name, one in schedules.items()}
smooth = ("PolynomialDecay", "ExponentialDecay", "CosineDecay")
assert max(smooth, key=half_way.get) == "PolynomialDecay"  # alt text: rises fastest

# %% [markdown]
# The magnitude looks at the weight alone. {py:class}`~accel_tf.pruning.Taylor` estimates from samples how much the loss $L$ would change without the weight, as
# $|w \, \partial L / \partial w|$ {footcite}`molchanov2019importance,lee2019snip`. {py:class}`~accel_tf.pruning.Movement` adds up what training moves away from zero, and drops what it
# moves towards zero {footcite}`sanh2020movement`. Both know more. Do they choose better, at 95 % with the global scope?

# %%
criteria = {"Taylor": at.Taylor(x_train[:512], y_train[:512], LOSS)}
criteria["Movement"] = at.Movement()
by_criterion = {"Magnitude": results["trained"][:2, 1]}
for name, criterion in criteria.items():
    models = [copy(network) for network in networks[:2]]
    for model in models:
        at.prune(model, gradual(0.95), criterion=criterion, scope="global")
        train(model)
    by_criterion[name] = np.array([accuracy(model) for model in models])
at.report.Table(
    ("criterion", "network 1 [%]", "network 2 [%]"),
    [(name, *r) for name, r in by_criterion.items()],
)

# %% tags=["remove-cell"]
assert all(
    r.mean() < by_criterion["Magnitude"].mean() - 1
    for name, r in by_criterion.items()
    if name != "Magnitude"
)  # prose: magnitude wins

# %% [markdown]
# Not here. Our network is trained to the end, so the gradients that Taylor sees are close to zero, and those of a few hard samples; and training on the same images
# moves weights little. Both have their place elsewhere: Taylor, called SNIP then, before any training, when magnitudes are only their initial noise; movement when a
# pretrained network learns *another* task. The plain magnitude is the one to beat {footcite}`gale2019state`.
#
# ## Which layers? Ask them
#
# Small layers suffer first. How much, {py:func}`~accel_tf.pruning.sensitivity` measures: it prunes one layer alone, without training, evaluates,
# and gives the weights back {footcite}`han2015learning,li2017filters`. From the drops it proposes a sparsity for each layer: as many zeros
# as a budget allows, here five points of accuracy for all layers together, if drops add up. (They do while they are small.)

# %%
dense.compile("adam", LOSS, metrics=["accuracy"])
found = at.sensitivity(dense, (x_train, y_train), budget=0.05, verbose=0)
found

# %% mystnb={"image": {"alt": "Drop of accuracy against the sparsity of one layer alone, a line for each of four layers, and a dashed line for the budget of 0.05. The line of the last layer, logits, rises first; that of the largest layer, hidden, last."}, "figure": {"caption": "Each layer pruned alone. Dots: what is proposed. Lines that leave the picture lose far more than the budget.", "name": "fig-sensitivity"}} tags=["hide-input"]
found.plot()
plt.show()

# %%
chosen, alike = copy(dense), copy(dense)
found.prune(chosen)
at.prune(alike, at.ConstantSparsity(found.total))
print(f"{found.total:.2f} of all weights are zero in both, without training on:")
print(f"as proposed {accuracy(chosen):.1f} %, each layer alike {accuracy(alike):.1f} %")

# %% tags=["remove-cell"]
assert found.drops["logits"][0.9] > found.drops["hidden"][0.9]
assert found.predicted_drop <= 0.05
assert abs(at.sparsity(chosen).total - found.total) < 1e-3
assert found.total > 0.3
assert accuracy(chosen) > accuracy(alike) + 15
assert accuracy(chosen) > accuracy(dense) - 20

# %% [markdown]
# Same number of zeros, another network. The model may lose more than the budget, since drops of several layers do more than add up, and so the
# proposal is where to begin: `found.prune(model, lambda s: at.PolynomialDecay(s, end_step=1000))` prunes gradually, and training recovers more.
#
# ## L1: small is not zero
#
# A penalty $\lambda \lVert w \rVert_1$ in the loss is said to make weights zero. Its minimum has zeros; gradient steps miss them, because the gradient
# of $|w|$ is $\pm 1$ up to zero, so that a weight jumps over it and back. The *proximal* step {footcite}`parikh2014proximal` does what the gradient cannot:
# it moves each weight towards zero by learning rate $\eta$ times $\lambda$, and stops *at* zero:
#
# $$
# w \leftarrow \operatorname{sign}(w) \, \max(|w| - \eta \lambda,\, 0)
# $$ (eq-soft-threshold)
#
# {py:class}`~accel_tf.pruning.SoftThreshold` takes this step after each step of the optimizer. The same penalty, both ways, with plain SGD:

# %%
STRENGTH = 5e-3
penalized, proximal = copy(dense), copy(dense)
for layer in penalized.layers:
    if hasattr(layer, "kernel"):
        layer.kernel_regularizer = keras.regularizers.L1(STRENGTH)
        layer.kernel.regularizer = layer.kernel_regularizer
soft = at.SoftThreshold(STRENGTH)
at.prune(proximal, at.ConstantSparsity(0.0), criterion=soft)
for name, model in {"gradient": penalized, "proximal": proximal}.items():
    model.compile(keras.optimizers.SGD(0.05), LOSS)
    model.fit(x_train, y_train, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    print(f"{name}: {at.sparsity(model).total:.2f} zeros, {accuracy(model):.1f} %")

# %% tags=["remove-cell"]
assert len(penalized.losses) == 4  # the penalty is there
assert at.sparsity(penalized).total < 0.01
assert at.sparsity(proximal).total > 0.05

# %% [markdown]
# Not one weight in a hundred is exactly zero by the gradient. Still, $\lambda$ says how strong the pull is, not how many zeros you get; with a schedule instead of
# `ConstantSparsity(0.0)` you get at least its sparsity.
#
# ## Does it work on your architecture?
#
# One member of each family of `keras.applications`, pruned to 50 % and trained for a few steps, here and with TFMOT
# (computed by `benchmarks/pruning_families.py`):

# %% tags=["hide-input"]
with open("_data/pruning_families.json") as file:
    rows = json.load(file)["rows"]
families = [row for row in rows if "kernels" in row["ours"]]  # the others Keras 3 lacks
at.report.Table(
    ("family", "model", "kernels", "exactly sparse", "TFMOT"),
    [
        (
            row["family"],
            row["member"],
            row["ours"]["kernels"],
            row["ours"]["exact"],
            "refuses" if "refusal" in row["tfmot"] else "prunes",
        )
        for row in families
    ],
)

# %% tags=["remove-cell"]
assert len(families) >= 15
assert all(row["ours"]["exact"] == row["ours"]["kernels"] > 0 for row in families)

# %% [markdown]
# ## Use it in your project
#
# ```python
# import accel_tf as at
#
# model = ...                             # any built Keras 3 model, trained already
# steps = 20 * steps_per_epoch
# schedule = at.PolynomialDecay(final_sparsity=0.9, end_step=steps * 2 // 3)
# print(at.prune(model, schedule, scope="global", exclude="stem*"))
#
# model.compile(...)                      # before or after prune; lower the learning rate
# model.fit(x, y, epochs=20)              # exact after each step; XLA, float16, replicas
#
# print(at.sparsity(model))
# model.save("sparse.keras")              # a plain Keras file
# fast = at.sparsify(model)               # skips the zeros, where that is faster
# ```
#
# The schedule counts steps from the call of {py:func}`~accel_tf.pruning.prune`. In a training loop of your own, pass `optimizer=`; to go on after loading a
# checkpoint, pass `initial_step=`. By default the kernels of dense, convolutional and recurrent layers are pruned; biases, normalization, depthwise
# kernels and embeddings are not, and the report says so. {py:class}`~accel_tf.pruning.SparsityLog` is a callback that logs the sparsity of each layer, for
# TensorBoard, too; {py:func}`~accel_tf.pruning.strip_pruning` lets the weights go again.
#
# ## Takeaways
#
# - Sort by magnitude, over all layers, and train on under the mask: 90 % of the weights of our network go for next to nothing.
# - Each network has a cliff; plot accuracy against sparsity for yours, with more than one seed.
# - Zeros make *compressed* files smaller, by about $32/(32d + H(d))$. They make nothing faster until a kernel skips them.
#
# ## Exercises
#
# :::{exercise}
# :label: ex-pruning-1
# A schedule runs from step 0 to step 1000 with the exponent 3. At which step has it done half of its work? Solve {eq}`eq-schedule` by hand, then check it with
# {py:class}`~accel_tf.pruning.PolynomialDecay`.
# :::
#
# :::{solution-start} ex-pruning-1
# :class: dropdown
# :::
#
# Half of the work is left when $(1 - t/1000)^3 = 1/2$, so $t = 1000\,(1 - 2^{-1/3}) \approx 206$, whatever the final sparsity is:

# %%
at.PolynomialDecay(0.9, end_step=1000).sparsity_at(206) / 0.9

# %% tags=["remove-cell"]
assert abs(at.PolynomialDecay(0.9, end_step=1000).sparsity_at(206) / 0.9 - 0.5) < 2e-3

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-pruning-2
# How many weights did each layer keep when all layers were pruned together to 95 %? Which layer lost most, and why?
# :::
#
# :::{solution-start} ex-pruning-2
# :class: dropdown
# :::
#
# The largest layer has the smallest weights (their initial spread falls with the number of inputs), so it loses most; `conv1` keeps most of its own:

# %%
at.sparsity(sparse_models[0.95])

# %% tags=["remove-cell"]
layerwise = dict(
    zip(
        *map(at.sparsity(sparse_models[0.95]).column, ("layer", "sparsity")),
        strict=True,
    )
)
assert layerwise["hidden"] == max(layerwise.values()) and layerwise["conv1"] < 0.7

# %% [markdown]
# :::{solution-end}
# :::
#
# :::{exercise}
# :label: ex-pruning-3
# `prune` can be called more than once: a later call replaces the schedule of the layers that it selects. Prune `hidden` to 95 % and all other layers to 50 %.
# :::
#
# :::{solution-start} ex-pruning-3
# :class: dropdown
# :::

# %%
model = copy(dense)
at.prune(model, at.ConstantSparsity(0.5), exclude="hidden")
at.prune(model, at.ConstantSparsity(0.95), include="hidden")
print(f"{accuracy(model):.1f} %")
at.sparsity(model)

# %% tags=["remove-cell"]
layerwise = dict(
    zip(*map(at.sparsity(model).column, ("layer", "sparsity")), strict=True)
)
assert layerwise["conv1"] == 0.5 and abs(layerwise["hidden"] - 0.95) < 1e-4

# %% [markdown]
# :::{solution-end}
# :::
#
# ## References
#
# ```{footbibliography}
# ```
