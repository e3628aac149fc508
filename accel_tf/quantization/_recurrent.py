"""Recurrent layers: their steps as integer kernels, with ranges observed after the loop.

A replica of a strategy may not exchange ranges within a loop, so the loop runs on the ranges as they
are, and then all steps at once are computed again from the states that it went through, to be seen.
"""

import keras
import tensorflow as tf

from accel_tf.quantization._fake import (
    applying,
    becomes_integers,
    evaluated,
    frozen,
    is_observing,
    passes,
)
from accel_tf.quantization._grids import (
    hand_on,
    note_grid,
    note_steps,
    note_sums,
    steps_of,
    unequal,
)
from accel_tf.quantization._integers import difference, product, total
from accel_tf.quantization._kernels import unflatten
from accel_tf.quantization._layers import QuantizedLayer

_L = keras.layers


@keras.saving.register_keras_serializable(package="accel_tf")
class QuantizedRecurrent(QuantizedLayer):
    """Runs an LSTM, GRU or SimpleRNN on the integer grid.

    The product of all inputs with the kernel is one. In a LiteRT file the time steps are a loop of
    integers; in any other file they follow one another, so their number must be known there.

    Args:
        layer: The recurrent layer.
        scheme, quantize_inputs, output, activation, kwargs: As for `QuantizedLayer`.
    """

    rounds_weights = True

    def inside(self):
        return {"input_product": None, **_STEPS[type(self.layer)].grids}

    def compute(self, inputs, training, mask):
        layer, on_grid = self.layer, self.on_grid(training)
        x = inputs
        if training and layer.cell.dropout:  # One choice for all steps, as in Keras.
            x = tf.nn.dropout(x, layer.cell.dropout, noise_shape=(tf.shape(x)[0], 1, x.shape[2]))
        step = _STEPS[type(layer)](self, hand_on(inputs, x), training)
        product = on_grid("input_product", step.input_product(hand_on(inputs, x)))
        if layer.go_backwards:
            product, mask = _last_first(product), mask if mask is None else _last_first(mask)
        if frozen():
            y = (self._looped if becomes_integers() else self._unrolled)(step, product, mask)
        else:
            y = self._observed(step, product, mask, training)
        if mask is not None and layer.return_sequences and layer.zero_output_for_mask:
            y = self.on_grid(False)("state", tf.where(mask[..., None], y, self._nothing("state")))
        return self._on_its_grid("state", y)

    def _observed(self, step, product, mask, training):
        """Returns the output of a loop, and lets the ranges of all its time steps be observed."""
        with applying():
            states = self._loop(step, product, mask, self.on_grid(False))
        if is_observing(training):
            start = [tf.zeros_like(s[:, :1]) for s in states]
            before = [tf.concat([a, s[:, :-1]], 1) for a, s in zip(start, states, strict=True)]
            product, *before = (tf.stop_gradient(t) for t in (product, *before))
            step(self.on_grid(training), product, before)
        return states[0] if self.layer.return_sequences else states[0][:, -1]

    def _loop(self, step, product, mask, on_grid):
        """Returns the states after each step, (batch, steps, units) each."""
        steps = product.shape[1]
        length = tf.shape(product)[1] if steps is None else steps
        product = tf.transpose(product, (1, 0, 2))
        mask = None if mask is None else tf.transpose(mask)[..., None]
        records = [
            tf.TensorArray(product.dtype, length, element_shape=(None, self.layer.units))
            for _ in step.states
        ]

        def noted(x, states):
            """Returns what a step computes with, with the grids noted, which a loop does not hand on."""
            names = ("input_product", *step.states)
            x, *states = (
                self._on_its_grid(name, t) for name, t in zip(names, (x, *states), strict=False)
            )
            return x, states

        def body(t, states, records):
            new = step(on_grid, *noted(product[t], states))
            if mask is not None:
                new = [tf.where(mask[t], a, b) for a, b in zip(new, states, strict=True)]
            return t + 1, new, [r.write(t, s) for r, s in zip(records, new, strict=True)]

        first = step(on_grid, noted(product[0], ())[0], None)
        if mask is not None:
            first = [tf.where(mask[0], s, tf.zeros_like(s)) for s in first]
        records = [r.write(0, s) for r, s in zip(records, first, strict=True)]
        *_, records = tf.while_loop(
            lambda t, *_: t < length, body, (1, first, records), maximum_iterations=length
        )
        return [tf.transpose(r.stack(), (1, 0, 2)) for r in records]

    def _looped(self, step, product, mask):
        """Returns the output of a loop whose variables are tensors on a grid, for a file."""
        on_grid, length = self.on_grid(False), product.shape[1] or tf.shape(product)[1]

        def same(states):
            # Nothing is left to round; it tells the converter that the grid is the same.
            return [on_grid(name, s) for name, s in zip(step.states, states, strict=True)]

        def after(new, old, t):
            if mask is None:
                return new
            keep = tf.gather(mask, t, axis=1)[:, None]
            return same([tf.where(keep, a, b) for a, b in zip(new, old, strict=True)])

        def body(t, states, outputs):
            states = same(states)
            states = after(step(on_grid, tf.gather(product, t, axis=1), states), states, t)
            last, past = states[0][:, None], on_grid(step.states[0], outputs)
            if every:  # The oldest goes, as no list that grows converts.
                last = tf.concat([past[:, 1:], last], 1)
            return t + 1, states, last

        every, nothing = self.layer.return_sequences, [self._nothing(name) for name in step.states]
        states = after(step(on_grid, product[:, 0], None), nothing, 0)
        first = states[0][:, None]
        if product.shape[1] == 1:
            return first if every else states[0]
        # Apart from the state, as LiteRT cannot return a variable of a loop that nothing reads.
        outputs = tf.tile(first, (1, length - 1, 1)) if every else first
        *_, outputs = tf.while_loop(lambda t, *_: t < length, body, (1, states, outputs))
        outputs = on_grid(step.states[0], outputs)
        return tf.concat([first, outputs], 1) if every else outputs[:, 0]

    def _unrolled(self, step, product, mask):
        if product.shape[1] is None:
            raise ValueError(
                f"Layer {self.name!r} ({type(self.layer).__name__}) takes sequences of any length, "
                "and a file without a loop needs to know the number of time steps. Give the model's "
                "input a length: keras.Input((100, 8))."
            )
        on_grid, states, outputs = self.on_grid(False), None, []
        products = tf.unstack(product, axis=1)
        masks = [None] * len(products) if mask is None else tf.unstack(mask, axis=1)
        for x, keep in zip(products, masks, strict=True):
            new = step(on_grid, x, states)
            if keep is not None:
                old = states or [self._nothing(name) for name in step.states]
                chosen = [tf.where(keep[:, None], a, b) for a, b in zip(new, old, strict=True)]
                # Nothing is left to round; it tells the converter that the grid is the same.
                new = [on_grid(name, s) for name, s in zip(step.states, chosen, strict=True)]
            states = new
            outputs.append(states[0])
        return tf.stack(outputs, axis=1) if self.layer.return_sequences else outputs[-1]

    def _on_its_grid(self, name, x):
        quantizer = self.grids[name]
        return x if quantizer is None or passes() else note_grid(x, quantizer.current_grid)

    def _nothing(self, name):
        """Returns a state of zeros, once it is rounded to the grid `name`."""
        if self.grids[name] is None or not frozen():
            return tf.zeros((1, self.layer.units), self.compute_dtype)
        # The converter shares equal constants, and then takes them to be on one grid. These differ.
        return tf.fill((1, self.layer.units), 1e-3 * self.grids[name].scale)


def _last_first(x):
    """Returns a tensor (batch, steps, …) with its time steps in reverse order."""
    return x[:, ::-1] if becomes_integers() else tf.reverse(x, [1])


class _Step:
    """One step: new states, the output first, from the product of the input and the old states.

    Called with `states=None` for the first step, when they are zeros and some products vanish.
    """

    states = ("state",)  # the grids that they are on
    grids: dict[str, str | None] = {}

    def __init__(self, wrapper, x, training):
        cell = wrapper.layer.cell
        biases = [0.0, 0.0]
        if cell.use_bias:
            with evaluated():
                after = getattr(cell, "reset_after", False)
                found = tf.unstack(cell.bias.value) if after else [cell.bias.value]
                biases[: len(found)] = [unequal(bias) if frozen() else bias for bias in found]
        self._wrapper, self._training, self._biased = wrapper, training, cell.use_bias
        self._kernels = [
            (variable, wrapper.rounded(variable), bias)
            for variable, bias in zip((cell.kernel, cell.recurrent_kernel), biases, strict=True)
        ]

    def input_product(self, x):
        """Returns the product of all inputs, (batch, steps, features), and the kernel."""
        return self._product(x, *self._kernels[0])

    def product(self, h):
        """The product of a state, (batch, units) or (batch, steps, units), and the kernel."""
        return self._product(h, *self._kernels[1])

    def _product(self, x, variable, kernel, bias):
        inputs, made = kernel.shape
        flat = x if len(x.shape) == 2 else tf.reshape(x, (-1, inputs))
        y = flat @ tf.cast(kernel, x.dtype)
        sums = self._wrapper.sums(x, variable, kernel, (-1,), self._training)
        if sums is not None and self._biased:
            with evaluated():
                sums, bias = sums.with_bias(tf.cast(bias, tf.float32))
        y = y + tf.cast(bias, y.dtype)
        if sums is not None:
            note_sums(y, sums)
        if len(x.shape) == 2:
            return y
        z = unflatten(y, x, 2, (made,))
        steps = steps_of(y)
        return note_steps(z, lambda to: tf.reshape(steps(to), tf.shape(z))) if steps else z


class _LSTM(_Step):
    states = ("state", "cell")
    grids = {
        **dict.fromkeys(("recurrent_product", "gates", "kept", "added", "cell", "state")),
        **dict.fromkeys(("input_gate", "forget_gate", "output_gate"), "sigmoid"),
        **dict.fromkeys(("candidate", "cell_activation"), "tanh"),
    }

    def __call__(self, on_grid, x, states):
        units = x.shape[-1] // 4
        if states is None:  # Nothing to add, and no use for the forget gate.
            i, g, o = (x[..., n * units : (n + 1) * units] for n in (0, 2, 3))
        else:
            x = on_grid("gates", total(x, on_grid("recurrent_product", self.product(states[0]))))
            i, f, g, o = tf.split(x, 4, axis=-1)
        added = product(on_grid("input_gate", tf.sigmoid(i)), on_grid("candidate", tf.tanh(g)))
        if states is None:
            c = on_grid("cell", added)
        else:
            kept = on_grid("kept", product(on_grid("forget_gate", tf.sigmoid(f)), states[1]))
            c = on_grid("cell", total(kept, on_grid("added", added)))
        gate = on_grid("output_gate", tf.sigmoid(o))
        return [on_grid("state", product(gate, on_grid("cell_activation", tf.tanh(c)))), c]


class _GRU(_Step):
    grids = {
        **dict.fromkeys(
            ("recurrent_product", "gates", "reset", "sum", "difference", "kept", "state")
        ),
        **dict.fromkeys(("update_gate", "reset_gate"), "sigmoid"),
        "candidate": "tanh",
    }

    def __call__(self, on_grid, x, states):
        units = x.shape[-1] // 3
        h = tf.zeros((1, units), x.dtype) if states is None else states[0]
        recurrent = on_grid("recurrent_product", self.product(h))
        xg, xh = (hand_on(x, part) for part in tf.split(x, (2 * units, units), axis=-1))
        hg, hh = (
            hand_on(recurrent, part) for part in tf.split(recurrent, (2 * units, units), axis=-1)
        )
        z, r = tf.split(on_grid("gates", total(xg, hg)), 2, axis=-1)
        z, r = on_grid("update_gate", tf.sigmoid(z)), on_grid("reset_gate", tf.sigmoid(r))
        candidate = tf.tanh(on_grid("sum", total(xh, on_grid("reset", product(r, hh)))))
        candidate = on_grid("candidate", candidate)
        # z·h + (1 − z)·candidate, with one product less.
        apart = on_grid("difference", difference(h, candidate))
        return [on_grid("state", total(candidate, on_grid("kept", product(z, apart))))]


class _SimpleRNN(_Step):
    grids = {"recurrent_product": None, "sum": None, "state": "tanh"}

    def __call__(self, on_grid, x, states):
        if states is not None:
            x = on_grid("sum", total(x, on_grid("recurrent_product", self.product(states[0]))))
        return [on_grid("state", tf.tanh(x))]


_STEPS = {_L.LSTM: _LSTM, _L.GRU: _GRU, _L.SimpleRNN: _SimpleRNN}


def obstacle(layer) -> str | None:
    """Returns what keeps a recurrent layer from being quantized, `None` if nothing does."""
    if layer.activation is not keras.activations.tanh or (
        getattr(layer, "recurrent_activation", keras.activations.sigmoid)
        is not keras.activations.sigmoid
    ):
        return "its activations are not tanh and sigmoid"
    if layer.return_state or layer.stateful:
        return "it returns or keeps its state"
    if layer.recurrent_dropout:
        return "it drops states (recurrent_dropout)"
    if not getattr(layer, "reset_after", True):
        return "its reset gate comes before the product (reset_after=False)"
    return None
