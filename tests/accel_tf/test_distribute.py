"""accel_tf.distribute: which devices, and that replicas train to the weights of one device."""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from accel_tf import distribute


@pytest.fixture(scope="module")
def strategy():
    return distribute.mirrored_strategy(2)


@pytest.mark.parametrize(
    "devices",
    [None, 2, ["CPU:0", "CPU:1"], ["/cpu:1", "/device:CPU:0"], ("cpu:0", "CPU:1")],
)
def test_two_logical_devices(devices):
    strategy = distribute.mirrored_strategy(devices)
    assert strategy.num_replicas_in_sync == 2
    assert len(set(strategy.extended.worker_devices)) == 2


@pytest.mark.parametrize("devices", [1, "CPU:1", ["CPU:1"]])
def test_one_device(devices):
    assert distribute.mirrored_strategy(devices).num_replicas_in_sync == 1


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "at least 1. Received: devices=0"),
        (-2, "at least 1. Received: devices=-2"),
        ([], "at least one device"),
        (["CPU:0", "cpu:0"], "each once"),
        (["CPU"], r"Names look like 'GPU:0' or 'CPU:1'. Received: CPU"),
        (["FPGA:0"], "Names look like"),
        (["GPU:7"], r"no device GPU:7. There are CPU:0, CPU:1"),
    ],
)
def test_wrong_devices_are_named(devices, message):
    with pytest.raises(ValueError, match=message):
        distribute.mirrored_strategy(devices)


def test_too_late_for_more_devices_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"5 logical .* already, with 2.*mirrored_strategy\(2\)"):
        distribute.mirrored_strategy(5)


def test_more_gpus_than_there_are(monkeypatch):
    real = tf.config.list_physical_devices
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: ["one"] if kind == "GPU" else real(kind)
    )
    with pytest.raises(ValueError, match=r"2 devices, and this machine has 1 GPU"):
        distribute.mirrored_strategy(2)


def test_a_fresh_process_makes_its_devices_itself():
    script = (
        "import keras; keras.utils.set_random_seed(0); import accel_tf as at;"
        "print(at.mirrored_strategy(3).num_replicas_in_sync)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.stdout.strip() == "3"
    assert "nccl" not in run.stderr  # TensorFlow's warning that it falls back


def test_scale_batch(strategy):
    assert distribute.scale_batch(strategy, 32, 0.1) == (64, 0.2)
    batch, rate = distribute.scale_batch(strategy, 8, 0.1, rule="sqrt")
    assert batch == 16 and rate == pytest.approx(0.1 * 2**0.5)
    assert distribute.scale_batch(tf.distribute.get_strategy(), 8, 0.1) == (8, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 0.1, "cubic"), "rule='cubic'"),
        ((0, 0.1), "per_replica_batch=0"),
        ((4, 0.0), "learning_rate=0.0"),
    ],
)
def test_scale_batch_rejects(strategy, arguments, message):
    with pytest.raises(ValueError, match=message):
        distribute.scale_batch(strategy, *arguments)


# Training to the same weights -----------------------------------------------------------------


def make_model(optimizer, **compile_options):
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **compile_options)
    return model


def largest_difference(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.mark.parametrize("optimizer", [sgd, lambda: keras.optimizers.Adam(0.001, epsilon=1e-3)])
def test_two_devices_train_to_the_weights_of_one(strategy, digits, optimizer):
    (x, y), _ = digits
    x, y = x[:256], y[:256]
    one = make_model(optimizer())
    one.fit(x, y, batch_size=64, epochs=3, shuffle=False, verbose=0)
    with strategy.scope():
        two = make_model(optimizer())
    start = [w.copy() for w in two.get_weights()]
    two.fit(x, y, batch_size=64, epochs=3, shuffle=False, verbose=0)
    assert max(np.abs(a - b).max() for a, b in zip(start, two.get_weights(), strict=True)) > 1e-2
    assert largest_difference(one, two) < 1e-5


@pytest.mark.parametrize("count", [69, 65, 3, 1])  # last batches of 5, 1, 3 and 1 samples
def test_even_batches_train_to_the_weights_of_one_device(strategy, digits, count):
    (x, y), _ = digits
    x, y = x[:count], y[:count]
    one = make_model(sgd())
    one.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    with strategy.scope():
        two = make_model(sgd())
    batches = distribute.even_batches(tf.data.Dataset.from_tensor_slices((x, y)), 16)
    two.fit(batches, epochs=2, shuffle=False, verbose=0)
    assert largest_difference(one, two) < 1e-5


def test_an_uneven_last_batch_differs_without_even_batches(strategy, digits):
    """The reason for `even_batches`; once Keras weighs replicas by their share, it can go."""
    (x, y), _ = digits
    one = make_model(sgd())
    one.fit(x[:69], y[:69], batch_size=16, epochs=2, shuffle=False, verbose=0)
    with strategy.scope():
        two = make_model(sgd())
    two.fit(x[:69], y[:69], batch_size=16, epochs=2, shuffle=False, verbose=0)
    assert largest_difference(one, two) > 1e-4


def test_several_steps_per_execution(strategy, digits):
    (x, y), _ = digits
    one = make_model(sgd())
    one.fit(x[:128], y[:128], batch_size=32, shuffle=False, verbose=0)
    with strategy.scope():
        two = make_model(sgd(), steps_per_execution=2)
    two.fit(x[:128], y[:128], batch_size=32, shuffle=False, verbose=0)
    assert largest_difference(one, two) < 1e-5


def test_batch_normalization_needs_synchronized(strategy, digits):
    (x, y), _ = digits

    def make(synchronized):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(synchronized=synchronized, momentum=0.5),
                keras.layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        return model

    def train(model):
        model.fit(x[:64], y[:64], batch_size=16, epochs=2, shuffle=False, verbose=0)
        return model

    one = train(make(False))
    with strategy.scope():
        local, synchronized = make(False), make(True)
    assert largest_difference(one, train(local)) > 1e-3
    assert largest_difference(one, train(synchronized)) < 1e-5


def start_worker(script, folder, ports, index):
    workers = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    config = json.dumps({"cluster": workers, "task": {"type": "worker", "index": index}})
    env = {**os.environ, "TF_CONFIG": config}
    return subprocess.Popen([sys.executable, script, folder], env=env, stderr=subprocess.PIPE)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def test_two_workers_prune_alike_in_a_custom_loop(tmp_path, monkeypatch):
    """Two processes over gRPC, where `fit` of Keras 3 fails; and this one, on whole batches."""
    script = str(Path(__file__).with_name("multi_worker_pruning.py"))
    ports = free_ports(2)
    processes = [start_worker(script, tmp_path, ports, index) for index in range(2)]
    try:
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path)])
        runpy.run_path(script)
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
    first, second, alone = (dict(np.load(tmp_path / f"{n}.npz")) for n in ("0", "1", "alone"))
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, second[name])
        np.testing.assert_allclose(weight, alone[name], atol=1e-5)
    kernels = np.concatenate([w.ravel() for w in first.values() if w.ndim == 2])
    assert np.mean(kernels == 0) == 0.75


def test_moving_statistics_are_those_of_each_replica(strategy):
    with strategy.scope():
        normalization = keras.layers.BatchNormalization(momentum=0.0)
        model = keras.Sequential([keras.Input((1,)), normalization])
        model.compile("sgd", "mse")
    x = np.array([[0.0], [0.0], [10.0], [10.0]])
    model.fit(x, np.zeros((4, 1)), batch_size=4, shuffle=False, verbose=0)
    means = strategy.experimental_local_results(normalization.moving_mean.value)
    assert [float(mean[0]) for mean in means] == [0.0, 10.0]
    assert model.get_weights()[2] == [0.0]  # what a file holds


# even_batches by itself -----------------------------------------------------------------------


def test_even_batches_pads_with_weightless_repeats():
    samples = tf.data.Dataset.range(10).map(lambda i: ({"a": i, "b": [i, i]}, 2 * i))
    batches = list(distribute.even_batches(samples, 4))
    assert [float(tf.reduce_sum(weight)) for _, _, weight in batches] == [4, 4, 4]
    x, y, weight = batches[-1]
    np.testing.assert_array_equal(weight, [2, 2, 0, 0])
    np.testing.assert_array_equal(y, [16, 18, 16, 18])
    np.testing.assert_array_equal(x["b"], [[8, 8], [9, 9], [8, 8], [9, 9]])


def test_even_batches_keeps_sample_weights():
    samples = tf.data.Dataset.from_tensor_slices(([1.0, 2.0, 3.0], [0, 1, 1], [1.0, 1.0, 0.5]))
    *_, (_, _, weight) = distribute.even_batches(samples, 2)
    np.testing.assert_array_equal(weight, [1.0, 0.0])


def test_even_batches_has_static_shapes():
    samples = tf.data.Dataset.from_tensor_slices((np.zeros((5, 3)), np.zeros(5)))
    assert [s.shape[0] for s in distribute.even_batches(samples, 4).element_spec] == [4, 4, 4]


@pytest.mark.parametrize(
    ("elements", "batch_size", "message"),
    [(([1.0], [0]), 0, "batch_size=0"), ([1.0], 2, r"expects an unbatched dataset of \(x, y\)")],
)
def test_even_batches_rejects(elements, batch_size, message):
    with pytest.raises(ValueError, match=message):
        distribute.even_batches(tf.data.Dataset.from_tensor_slices(elements), batch_size)
