"""Data parallelism on one machine: the same model on several devices, each on its share of a batch.

Three steps make a training script data parallel: build and compile the model in the strategy's
scope, let the global batch grow with the number of replicas, and keep the last batch even::

    strategy = mirrored_strategy()
    batch, rate = scale_batch(strategy, per_replica_batch=32, learning_rate=0.01)
    with strategy.scope():
        model = make_model()
        model.compile(keras.optimizers.SGD(rate), loss)
    model.fit(even_batches(samples.shuffle(10_000), batch), epochs=10)

The weights are then those of one device that trains on the global batch, up to rounding: the
gradient of a mean is the mean of the replicas' gradients. **BatchNormalization is the exception**:
each replica normalises by the mean and variance of its own share, and keeps moving statistics of its
own shares; a file holds those of the first replica.
`keras.layers.BatchNormalization(synchronized=True)` computes the mean and variance over the global
batch, for one more all-reduce per layer.

On several machines, `fit` of Keras 3 fails under `tf.distribute.MultiWorkerMirroredStrategy` (keras
issue 20585), while a custom training loop works, also for a model that `prune` holds. All workers
then have the same weights, those of one process that trains on the global batch, up to rounding::

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # first; the workers are in TF_CONFIG
    with strategy.scope():
        model = make_model()
        optimizer = keras.optimizers.Adam(1e-3)
        optimizer.build(model.trainable_variables)
        at.prune(model, at.PolynomialDecay(0.9, end_step=1000), optimizer=optimizer)

    def on_replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(loss_of_each_sample(y, model(x, training=True))) / global_batch
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums them over the workers

    @tf.function
    def step(batch):
        strategy.run(on_replica, batch)

    for batch in strategy.distribute_datasets_from_function(batches_of_this_worker):
        step(batch)

Logical CPU devices share the cores of one processor: they are there to learn, to test and to debug,
not to train faster. XLA does not know them: leave `jit_compile` off when replicas are on CPU devices.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


def mirrored_strategy(devices: int | Sequence[str] | None = None) -> tf.distribute.MirroredStrategy:
    """Makes a strategy that trains one replica of a model on each device of this machine.

    Call it before anything else of TensorFlow runs when it has to split the CPU: the number of
    logical devices is fixed once TensorFlow is initialised.

    Args:
        devices: Which devices hold a replica.
            `None`: every GPU; without a GPU, all logical CPU devices, at least two.
            An `int`: that many GPUs; without a GPU, that many logical CPU devices.
            A list of names such as `["GPU:0", "GPU:1"]` or `["CPU:0", "CPU:1"]`.

    Returns:
        A `tf.distribute.MirroredStrategy`; `num_replicas_in_sync` is the number of devices. Asked
        again for the same devices, it is the same object.

    Raises:
        ValueError: `devices` is below 1, empty, has a name twice or names a device that is not
            there, or more GPUs are asked for than there are.
        RuntimeError: TensorFlow is initialised already, with too few logical CPU devices.

    Example:

    >>> strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
    >>> strategy.num_replicas_in_sync
    2
    """
    names = _device_names(devices)
    cpus = [name for name in names if name.startswith("CPU")]
    if cpus:
        _require_logical_cpus(1 + max(int(name.split(":")[1]) for name in cpus))
    there = [f"{d.device_type}:{d.name.split(':')[-1]}" for d in tf.config.list_logical_devices()]
    if missing := [name for name in names if name not in there]:
        raise ValueError(
            f"mirrored_strategy found no device {', '.join(missing)}. There are {', '.join(there)}."
        )
    return _strategy(tuple(names))


@functools.cache
def _strategy(names: tuple[str, ...]) -> tf.distribute.MirroredStrategy:
    """One strategy for each set of devices.

    TensorFlow numbers the exchanges between devices anew in each strategy, and confuses those of
    two strategies on the same devices ("Collective instance 100 expected type …").
    """
    # NCCL is for GPUs; named here, TensorFlow does not warn that it falls back to this.
    on_cpu = any(name.startswith("CPU") for name in names)
    cross_device_ops = tf.distribute.ReductionToOneDevice() if on_cpu else None
    return tf.distribute.MirroredStrategy(names, cross_device_ops=cross_device_ops)


class ScaledBatch(NamedTuple):
    """The global batch of all replicas together, and the learning rate that goes with it."""

    global_batch: int
    learning_rate: float


def scale_batch(
    strategy: tf.distribute.Strategy,
    per_replica_batch: int,
    learning_rate: float,
    rule: str = "linear",
) -> ScaledBatch:
    """Scales a batch and its learning rate, tuned on one device, to all replicas of a strategy.

    With N replicas the global batch is N·b. The linear rule makes the learning rate N·η: one step
    then covers about the distance of N small ones. It holds while the gradient hardly changes
    within those N steps: use a warm-up of a few epochs
    (`keras.optimizers.schedules.CosineDecay(..., warmup_steps=...)`), and expect it to break once
    N·η nears the largest rate at which training is stable. The square-root rule, √N·η, keeps the
    variance of the step, and is the usual choice for adaptive optimizers.

    Args:
        strategy: A strategy; its `num_replicas_in_sync` is N.
        per_replica_batch: The batch size b on one device, in samples.
        learning_rate: The learning rate η tuned for that batch.
        rule: `"linear"` or `"sqrt"`.

    Returns:
        A `ScaledBatch`, a named tuple `(global_batch, learning_rate)`. Pass `global_batch` to `fit`
        or to `tf.data.Dataset.batch`: Keras splits it among the replicas.

    Raises:
        ValueError: The rule is unknown, or a number is not positive.

    Reference:
        Goyal et al. (2017), Accurate, large minibatch SGD, arXiv:1706.02677, section 2.1 (linear,
        with warm-up). Krizhevsky (2014), One weird trick for parallelizing convolutional neural
        networks, arXiv:1404.5997, section 5 (square root).

    Example:

    >>> strategy = at.mirrored_strategy(["CPU:0", "CPU:1"])
    >>> at.distribute.scale_batch(strategy, per_replica_batch=32, learning_rate=0.1)
    ScaledBatch(global_batch=64, learning_rate=0.2)
    """
    factors = {"linear": 1.0, "sqrt": 0.5}
    if rule not in factors:
        raise ValueError(f'rule must be "linear" or "sqrt". Received: rule={rule!r}')
    if per_replica_batch < 1 or learning_rate <= 0:
        raise ValueError(
            "per_replica_batch must be at least 1 and learning_rate above 0. Received: "
            f"per_replica_batch={per_replica_batch}, learning_rate={learning_rate}"
        )
    replicas = strategy.num_replicas_in_sync
    return ScaledBatch(replicas * per_replica_batch, learning_rate * replicas ** factors[rule])


def even_batches(samples: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """Batches samples so that each batch has `batch_size` rows and the gradient stays exact.

    Keras averages the loss over each replica's share, then over the replicas. When the last batch
    splits unevenly (5 samples as 4 + 1), the one sample counts as much as the four; with fewer
    samples than replicas, training fails. Here a short batch is filled up by repeating its samples,
    which get weight 0, while the n real ones get weight `batch_size / n`: the weighted mean is the
    mean over the real samples, on any number of replicas.

    Args:
        samples: An unbatched dataset of `(x, y)` or `(x, y, sample_weight)`; nested inputs are
            fine. Shuffle it before.
        batch_size: The global batch size, a multiple of the number of replicas.

    Returns:
        A dataset of `(x, y, sample_weight)` batches for `fit`, with float32 weights of shape
        `(batch_size,)`. It is exact for losses with the reduction `"sum_over_batch_size"`, the
        default of Keras. Name metrics as `weighted_metrics`, so that they ignore repeated samples.

    Raises:
        ValueError: `batch_size` is below 1, or an element is not a pair or a triple.

    Example:

    >>> samples = tf.data.Dataset.from_tensor_slices(([[1.0], [2.0], [3.0]], [0, 1, 1]))
    >>> for x, y, weight in at.distribute.even_batches(samples, 2):
    ...     print(x.numpy().ravel(), y.numpy(), weight.numpy())
    [1. 2.] [0 1] [1. 1.]
    [3. 3.] [1 1] [2. 0.]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1. Received: batch_size={batch_size}")
    spec = samples.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise ValueError(
            "even_batches expects an unbatched dataset of (x, y) or (x, y, sample_weight). "
            f"Received elements of {spec}"
        )

    def fill(*batch):
        count = tf.shape(tf.nest.flatten(batch)[0])[0]
        rows = tf.range(batch_size)
        batch = tf.nest.map_structure(lambda t: tf.gather(t, rows % count), batch)
        weight = tf.cast(tf.where(rows < count, batch_size / count, 0), tf.float32)
        if len(batch) == 3:
            weight *= tf.cast(batch[2], tf.float32)
        return batch[0], batch[1], weight

    return samples.batch(batch_size).map(fill, num_parallel_calls=tf.data.AUTOTUNE)


def _device_names(devices) -> list[str]:
    """Turns the argument of `mirrored_strategy` into names such as `"CPU:0"`."""
    gpus = len(tf.config.list_physical_devices("GPU"))
    if devices is None:
        kind, count = ("GPU", gpus) if gpus else ("CPU", max(2, _configured_cpus()))
        return [f"{kind}:{i}" for i in range(count)]
    if isinstance(devices, int):
        if devices < 1:
            raise ValueError(f"devices must be at least 1. Received: devices={devices}")
        if 0 < gpus < devices:
            raise ValueError(
                f"mirrored_strategy was asked for {devices} devices, and this machine has {gpus} "
                "GPU(s). Name logical CPU devices to try it without more GPUs: "
                'mirrored_strategy(["CPU:0", "CPU:1"]).'
            )
        return [f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(devices)]
    if isinstance(devices, str):
        devices = [devices]
    names = [re.sub(r"^/?(device:)?", "", name, flags=re.IGNORECASE).upper() for name in devices]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Name at least one device, and each once. Received: {devices!r}")
    if bad := [name for name in names if not re.fullmatch(r"(CPU|GPU|TPU):\d+", name)]:
        raise ValueError(
            f"Names look like 'GPU:0' or 'CPU:1'. Received: {', '.join(bad)} in {devices!r}"
        )
    return names


def _configured_cpus() -> int:
    """The number of logical CPU devices that TensorFlow has, or will have."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    return len(tf.config.get_logical_device_configuration(cpu) or [None])


def _require_logical_cpus(count: int) -> None:
    if _configured_cpus() >= count:
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{count} logical CPU devices were asked for, but TensorFlow is initialised already, "
            f"with {_configured_cpus()}: some operation, model or list of devices came before. "
            "Restart the process (or the notebook's kernel) and call mirrored_strategy first; or "
            f"use what there is: mirrored_strategy({_configured_cpus()})."
        ) from error
