"""Compares quantized networks with those of other tools: accuracy, size of the file, latency.

    .venv/bin/python benchmarks/quantization_peers.py            # three seeds
    .venv/bin/python benchmarks/quantization_peers.py --quick    # the digits, with one seed

A convolutional network for the digits, one for MNIST-1D, and a transformer for text. All tools start
from the same trained float network; those that calibrate get the same 512 inputs, those that train the
same two epochs, as does the float network once more. TFMOT gets the network with its weights in tf_keras, in a process of its own. Accuracy
is that of the LiteRT file; of Keras' own modes, which have none, that of the model. One thread.
"""

import contextlib
import functools
import io
import tempfile
import warnings
from pathlib import Path

import _common as common
import keras
import numpy as np
import tensorflow as tf
from _families import reason, worker
from _tasks import TASKS
from ai_edge_quantizer import quantizer as aeq
from ai_edge_quantizer import recipe

import accel_tf as at
from accel_tf._litert import quiet
from accel_tf.report import Table

SAMPLES, BATCH = 512, 64  # to calibrate with, and to time
FLOAT, TUNED, KERAS = "float", "float, trained on", "Keras, float"
FORMATS = {
    "Float16": at.Float16(),
    "Int16x8, PTQ": at.Int16x8(),
    "Int8Weights, PTQ": at.Int8Weights(),
    "Int4Weights, PTQ": at.Int4Weights(),
    "Int8, PTQ": at.Int8(),
    "Int8, QAT": at.Int8(),
    "Int4Weights, QAT": at.Int4Weights(),
}


def converter_of(model, samples):
    """Returns LiteRT's converter, set to 8 bits, with integers at both ends where they are floats."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for x in samples)
    if samples.dtype == np.float32:
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter


def by_litert(model, samples, path) -> None:
    with quiet():
        path.write_bytes(converter_of(model, samples).convert())


def by_ai_edge_quantizer(model, samples, path) -> None:
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
        tool = aeq.Quantizer(bytearray(content), recipe.static_wi8_ai8())
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(content)
            (key,) = (detail["key"] for detail in at.export.LiteRTRunner(file.name).inputs)
        # It averages the extremes of the batches; those of single inputs would clip too much.
        batches = [{key: samples[i : i + 32]} for i in range(0, len(samples), 32)]
        found = tool.calibrate({"serving_default": batches})
        path.write_bytes(tool.quantize(found, enable_progress_report=False).quantized_model)


def by_tfmot(name, weights, data, seed) -> bytes | str:
    """Fine-tunes with TFMOT, in a process of its own; returns the file, or why there is none."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    task = TASKS[name]
    tf_keras.utils.set_random_seed(seed)
    model = task.build(tf_keras)
    quantize = tfmot.quantization.keras.quantize_model
    try:
        quantize(model)
    except Exception as error:  # whatever it is, it is the answer
        return reason(error)
    own = [layer for layer in model.layers if layer.get_weights()]
    for layer, values in zip(own, weights, strict=True):
        layer.set_weights(values)
    quantized = quantize(model)
    task.fit(tf_keras, quantized, data, tuning=True)
    converter = converter_of(quantized, data[0][:1])
    converter.representative_dataset = None  # the ranges are those of the training
    return converter.convert()


def by_keras(model, mode, folder):
    """Returns the model in a mode of Keras' own, and its file."""
    path = folder / f"keras_{mode}.keras"
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    if mode != "float":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each layer that stays in float
            copy.quantize(mode)
    copy.save(path)
    return copy, path


def write(name, seed, train, folder) -> tuple[dict, dict, dict]:
    """Trains a network and quantizes it with each tool.

    Returns:
        Files by name, Keras models by name with their files, and the reasons of those that refuse.
    """
    task, samples = TASKS[name], train[0][:SAMPLES]
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model = task.build(keras)
    task.fit(keras, model, train)
    files, refused = {FLOAT: folder / "float.tflite"}, {}
    at.export.litert(model, files[FLOAT])
    tuned = keras.models.clone_model(model)
    tuned.set_weights(model.get_weights())
    task.fit(keras, tuned, train, tuning=True)
    files[TUNED] = folder / "tuned.tflite"
    at.export.litert(tuned, files[TUNED])
    for label, scheme in FORMATS.items():
        if label.endswith("QAT"):
            quantized = at.quantize_aware(model, scheme)
            task.fit(keras, quantized, train, tuning=True)
        else:
            quantized = at.calibrate(model, samples, scheme, verbose=0)
        files[label] = folder / f"{label}.tflite"
        observes = scheme.activation_bits == 16  # LiteRT's converter, by itself
        at.export.litert(quantized, files[label], data=samples if observes else None)

    for label, tool in (
        ("LiteRT, PTQ", by_litert),
        ("ai-edge-quantizer, PTQ", by_ai_edge_quantizer),
    ):
        path = folder / f"{label}.tflite"
        try:
            tool(model, samples, path)
            at.export.run_litert(path, samples[:1])
            files[label] = path
        except Exception as error:  # whatever it is, it is the answer
            refused[label] = reason(error)
    weights = [layer.get_weights() for layer in model.layers if layer.get_weights()]
    with worker() as process:
        content = process.submit(by_tfmot, name, weights, train, seed).result()
    if isinstance(content, str):
        refused["TFMOT, QAT"] = content
    else:
        files["TFMOT, QAT"] = folder / "tfmot.tflite"
        files["TFMOT, QAT"].write_bytes(content)

    models = {KERAS: by_keras(model, "float", folder)}
    for mode in ("int8", "int4"):
        models[f"Keras quantize, {mode}"] = by_keras(model, mode, folder)
    return files, models, refused


def measure(name, seed, data, rounds) -> dict[str, dict]:
    """Returns accuracy in %, bytes, and the seconds of a batch in each round, by name."""
    train, (x, y) = data
    with tempfile.TemporaryDirectory() as folder:
        files, models, refused = write(name, seed, train, Path(folder))
        logits, calls, sizes = {}, {}, {}
        for label, path in files.items():
            run = at.export.LiteRTRunner(path)
            logits[label], sizes[label] = run(x), path.stat().st_size
            calls[label] = run.prepare(x[:BATCH])
        for label, (model, path) in models.items():
            logits[label] = np.asarray(model(x))
            function = tf.function(model, autograph=False)
            calls[label] = functools.partial(function, tf.constant(x[:BATCH]))
            sizes[label] = path.stat().st_size
        seconds = common.turns(calls, seconds=60, rounds=rounds)
    outcomes: dict[str, dict] = {label: {"refused": why} for label, why in refused.items()}
    exact = logits[FLOAT]
    for label, found in logits.items():
        noise = np.mean((found - exact) ** 2)
        outcomes[label] = {
            "accuracy": 100 * float(np.mean(found.argmax(-1) == y)),
            "decibels": float(10 * np.log10(np.mean(exact**2) / max(noise, 1e-12))),
            "bytes": sizes[label],
            "seconds": seconds[label],
        }
    return outcomes


def table(name: str, seeds: list[dict]) -> Table:
    rows, exact = [], np.mean([s[FLOAT]["accuracy"] for s in seeds])
    for label, first in seeds[0].items():
        if "refused" in first:
            continue
        base = KERAS if label.startswith("Keras") else FLOAT
        accuracy, decibels, size = (
            np.mean([s[label][key] for s in seeds]) for key in ("accuracy", "decibels", "bytes")
        )
        ratios = [
            common.median(s[label]["seconds"]) / common.median(s[base]["seconds"]) for s in seeds
        ]
        trained = "QAT" in label or label in (FLOAT, TUNED, KERAS)
        rows.append(
            [
                f"accel_tf, {label}" if label in FORMATS else label,
                f"{accuracy:.2f} %",
                f"{accuracy - exact:+.2f}",
                "–" if trained else f"{decibels:.1f} dB",
                f"{size / 1e3:.1f} kB",
                f"{size / np.mean([s[base]['bytes'] for s in seeds]):.2f}",
                f"{np.median(ratios):.2f}",
            ]
        )
    notes = [
        f"{label}: refused; {first['refused']}"
        for label, first in seeds[0].items()
        if "refused" in first
    ]
    return Table(
        ["", "accuracy", "vs float", "SQNR", "file", "of float", "time vs float"],
        rows,
        title=f"{name}: mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}, batches of {BATCH}",
        note="\n".join(notes),
    )


def main() -> None:
    options = common.options(__doc__, "quantization_peers", threads=1)
    seeds, rounds = (1, 5) if options.quick else (3, 15)
    host, _ = common.head(options.threads)
    records = {}
    for name in list(TASKS)[: 1 if options.quick else None]:
        data = TASKS[name].load()
        records[name] = [measure(name, seed, data, rounds) for seed in range(seeds)]
        print(table(name, records[name]), end="\n\n", flush=True)
    common.save({**host, "samples": SAMPLES, "batch": BATCH, "records": records}, options.output)


if __name__ == "__main__":
    main()
