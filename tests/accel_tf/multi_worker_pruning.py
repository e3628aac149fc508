"""One worker of a training on several that prunes, in a custom loop; `test_distribute` starts two.

    python multi_worker_pruning.py FOLDER

`TF_CONFIG` tells who the workers are; without it, this is one process that trains on whole batches.
It writes the weights to FOLDER/INDEX.npz, or FOLDER/alone.npz.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import accel_tf as at

cluster = json.loads(os.environ.get("TF_CONFIG", "{}"))
if cluster:  # before anything else of TensorFlow runs
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    strategy = tf.distribute.get_strategy()

BATCH, STEPS = 16, 12
rng = np.random.default_rng(0)
X = rng.normal(size=(BATCH * STEPS, 8)).astype("float32")
Y = rng.normal(size=(BATCH * STEPS, 4)).astype("float32")


def batches(context):
    """This worker's share of each batch."""
    n, i = context.num_input_pipelines, context.input_pipeline_id
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shard(n, i)
    return data.batch(BATCH // context.num_replicas_in_sync)


keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(4)]
    )
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.trainable_variables)
    schedule = at.PolynomialDecay(0.75, end_step=10, frequency=2)
    at.prune(model, schedule, optimizer=optimizer, scope="global")


@tf.function
def step(batch):
    def on_replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / BATCH  # of the global batch
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)  # sums over the replicas

    strategy.run(on_replica, batch)


for batch in strategy.distribute_datasets_from_function(batches):
    step(batch)
np.savez(
    Path(sys.argv[1]) / f"{cluster['task']['index'] if cluster else 'alone'}.npz",
    *model.get_weights(),
)
