"""What the library's tests share: two logical devices, a clean Keras before each test, a trained CNN.

Imported before any test module, so TensorFlow is configured here, while it may still be.
"""

import os
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # before TensorFlow is imported

import hypothesis
import keras
import pytest
import tensorflow as tf

import accel_tf as at
from accel_tf.sparse import _choice

# How long a generated case takes says nothing on a busy machine; times belong to benchmarks/.
hypothesis.settings.register_profile("accel_tf", deadline=None)
hypothesis.settings.load_profile("accel_tf")

# MirroredStrategy needs two devices; the rest of the tests run on the first and take no notice.
_cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    tf.config.threading.set_intra_op_parallelism_threads(share)
    tf.config.threading.set_inter_op_parallelism_threads(share)


@pytest.fixture(autouse=True)
def clean_keras():
    """Gives each test Keras as after a fresh import: names, seeds, data type, execution mode."""
    keras.backend.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")
    keras.utils.set_random_seed(0)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="session")
def digits():
    """`(x_train, y_train), (x_test, y_test)` of `accel_tf.datasets.digits`."""
    return at.datasets.digits()


@pytest.fixture(scope="session")
def trained_cnn(digits, tmp_path_factory):
    """A factory: each call returns a fresh, compiled copy of a CNN trained on the digits.

    It returns logits and is right on about 98 % of the test images. It is trained once for all
    workers of pytest-xdist: the first that comes holds the lock, the others wait for its file.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one level up is shared by the workers
    path, lock = folder / "digits_cnn.keras", folder / "digits_cnn.lock"
    while not path.exists():
        try:
            lock.mkdir()
        except FileExistsError:
            time.sleep(0.1)
            continue
        try:
            if not path.exists():
                _train(digits, folder / "digits_cnn.part.keras").rename(path)
        finally:
            lock.rmdir()  # also after a failure, so that the next worker tries, and says why

    def fresh() -> keras.Model:
        model = keras.models.load_model(path, compile=False)
        _compile(model)
        return model

    return fresh


def _train(digits, path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ],
        name="digits_cnn",
    )
    _compile(model)
    model.fit(*digits[0], batch_size=64, epochs=10, verbose=0)
    model.save(path)
    return path


def _compile(model):
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


@pytest.fixture(autouse=True)
def costs_of_this_test():
    """`tune`, which some tests and examples call, changes the choices of the whole process."""
    before = at.sparse.costs()
    yield
    _choice.use(before)
