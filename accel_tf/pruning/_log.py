"""The callback `SparsityLog`: how sparse the model is while it trains, and whether it will be."""

import sys
import warnings

import keras
import tensorflow as tf

from accel_tf.pruning._constraint import MaskConstraint, Masks
from accel_tf.pruning._sparsity import sparsity
from accel_tf.pruning._start import ends_early, prunes_nothing

_SCALAR = tf.compat.v1.SummaryMetadata(
    plugin_data={"plugin_name": "scalars"}, data_class="DATA_CLASS_SCALAR"
)


class SparsityLog(keras.callbacks.Callback):
    """Logs the sparsity of the model and of each layer, and tells when training is too short to prune.

    At the end of each epoch, the logs get `sparsity`, of all kernels together, and
    `sparsity/<layer path>` for each layer. So they are in the history that `fit` returns, and in
    what `CSVLogger`, `TensorBoard` and `ModelCheckpoint` see, wherever in the list of callbacks it
    stands: it moves to the front. The progress bar shows that of all.

    When `fit` starts, it compares the schedules of `prune` with the steps to come. Where they prune
    nothing, that is an error; where training ends before the schedule does, a warning, once: calls of
    `fit` may follow. Without this callback, both are warnings, at the first `fit` after `compile`.

    Args:
        log_dir: A directory for TensorBoard; the callback `keras.callbacks.TensorBoard` is not needed
            then. It has the same values, by epoch.

    Raises:
        ValueError: When training starts: it ends before a schedule's next update that prunes
            anything, and the schedule has not reached its highest sparsity.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> model.compile("sgd", "mse")
    >>> report = at.prune(model, at.PolynomialDecay(0.75, end_step=4, frequency=2))
    >>> x, y = np.ones((64, 8)), np.ones((64, 4))
    >>> fitted = model.fit(x, y, epochs=3, verbose=0, callbacks=[at.SparsityLog()])
    >>> fitted.history["sparsity"], fitted.history["sparsity/head"]
    ([0.65625, 0.75, 0.75], [0.65625, 0.75, 0.75])
    """

    def __init__(self, log_dir=None):
        super().__init__()
        self._log_dir, self._writer = log_dir, None
        self._checked = self._warned = False

    def set_model(self, model):
        super().set_model(model)
        # Keras calls callbacks in their order, each adds to the logs for those after it, and none is
        # told of the others. The list is known where this is called from; elsewhere, as in loops
        # that call callbacks themselves, their order stays.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            caller.callbacks.remove(self)
            caller.callbacks.insert(0, self)
            for callback in caller.callbacks:
                if isinstance(callback, keras.callbacks.ProgbarLogger):
                    _hide_layers(callback)

    def on_train_begin(self, logs=None):
        self._checked = False

    def on_epoch_begin(self, epoch, logs=None):
        # Here, not in `on_train_begin`: only now the first epoch is known, and weights and steps of
        # a run that goes on are back.
        steps = (self.params or {}).get("steps")
        if not self._checked and steps is not None:
            self._check((self.params["epochs"] - epoch) * steps)
        self._checked = True

    def on_epoch_end(self, epoch, logs=None):
        values = _sparsities(self.model)
        if logs is not None:
            logs.update(values)
        if self._log_dir is None:
            return
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self._log_dir))
        with self._writer.as_default(step=epoch):
            for name, value in values.items():
                # `tf.summary.scalar` is this, but needs the package tensorboard, which reads it.
                tf.summary.write(name, tf.constant(value, tf.float32), metadata=_SCALAR)
        self._writer.flush()

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        unfinished = [masks for masks in _pruned(self.model) if masks.unfinished]
        if unfinished and (self.params or {}).get("steps") is None:  # none at the beginning
            step = unfinished[0].step_after(0)
            self._warn(ends_early(unfinished[0].schedule, step, step))

    def _check(self, batches: int):
        for masks in _pruned(self.model):
            if masks.training_start is not None:
                masks.training_start.batches()  # asked here, so that the masks do not warn, too
            now, end = masks.step_after(0), masks.step_after(batches)
            if text := prunes_nothing(masks.schedule, now, end):
                raise ValueError(text)
            self._warn(ends_early(masks.schedule, now, end))

    def _warn(self, text: str):
        if text and not self._warned:
            self._warned = True
            warnings.warn(text, stacklevel=2)


def _sparsities(model) -> dict[str, float]:
    """The sparsity of all kernels, and of each layer's together."""
    table, layers = sparsity(model), {}
    for layer, _, _, size, zeros, _ in table.rows[:-1]:
        before = layers.get(layer, (0, 0))
        layers[layer] = (before[0] + size, before[1] + zeros)
    values = {f"sparsity/{layer}": zeros / size for layer, (size, zeros) in layers.items()}
    return {"sparsity": table.total} | values


def _pruned(model) -> list[Masks]:
    """What decides about the pruned weights of a model, each once."""
    constraints = [v.constraint for v in model.trainable_weights]
    masks = [c.masks for c in constraints if isinstance(c, MaskConstraint)]
    return list({id(m): m for m in masks if isinstance(m, Masks)}.values())


def _hide_layers(bar: keras.callbacks.ProgbarLogger):
    """Keeps the sparsities of single layers out of a progress bar: a deep model has dozens."""
    show = type(bar).on_epoch_end

    def on_epoch_end(epoch, logs=None):
        few = {k: v for k, v in (logs or {}).items() if not k.startswith("sparsity/")}
        show(bar, epoch, few)

    bar.on_epoch_end = on_epoch_end
