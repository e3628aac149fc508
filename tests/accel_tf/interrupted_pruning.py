"""A pruned training that can be killed and started again; the tests of the lifecycle run it.

    python interrupted_pruning.py FOLDER SAVE_FREQ STOP_AT [pause]

It trains to the optimizer's step STOP_AT and backs up to FOLDER/backup on the way. With "pause", it
writes the file FOLDER/paused at step 13 and waits there to be killed. At the end it writes what it has
reached to FOLDER/end.npz.
"""

import os
import pathlib
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np

import accel_tf as at

folder, save_freq = pathlib.Path(sys.argv[1]), sys.argv[2]
stop_at, pauses = int(sys.argv[3]), "pause" in sys.argv[4:]


class Steps(keras.callbacks.Callback):
    """Notes the masks after each step; waits to be killed, or ends the training, at one."""

    def __init__(self):
        super().__init__()
        self.masks = {}

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        constraints = [v.constraint for v in self.model.trainable_variables]
        held = [c.masks.masks.values() for c in constraints if c is not None]
        self.masks[f"mask_{step}"] = np.concatenate([m.numpy().ravel() for m in next(iter(held))])
        if step == 13 and pauses:
            (folder / "paused").touch()
            time.sleep(600)
        if step == stop_at:
            self.model.stop_training = True


keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((12,)),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Reshape((4, 4)),
        keras.layers.LSTM(4),
        keras.layers.Dense(3),
    ]
)
model.compile(keras.optimizers.Adam(0.1), "mse")
schedule = at.PolynomialDecay(0.8, end_step=24, frequency=4)
at.prune(model, schedule, scope="global")
rng = np.random.default_rng(0)
x, y = rng.normal(size=(8, 12)), rng.normal(size=(8, 3))
backup = keras.callbacks.BackupAndRestore(
    folder / "backup", save_freq=save_freq if save_freq == "epoch" else int(save_freq)
)
steps = Steps()
# Every batch is the whole data set in one order: each step is the same wherever an epoch begins.
model.fit(
    np.tile(x, (5, 1)), np.tile(y, (5, 1)),
    batch_size=8, epochs=stop_at, shuffle=False, verbose=0, callbacks=[backup, steps],
)  # fmt: skip

state = [*model.weights, *model.optimizer.variables]
arrays = {f"value_{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(state)} | steps.masks
np.savez(folder / "part.npz", **arrays)
(folder / "part.npz").rename(folder / "end.npz")  # whole, or not there
