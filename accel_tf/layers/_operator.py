"""An operator between layers, such as `x + 1`, as a layer that can be replaced and saved."""

import keras


@keras.saving.register_keras_serializable(package="accel_tf")
class Operator(keras.layers.Layer):
    """An operator between layers, such as `x + 1`, as a layer of its tensors.

    Args:
        operation: The operator, of a node in a functional model's graph.
        args, kwargs: What it was called with, where `Operator.slot(i)` stands for tensor i.
        **options: As for any Keras layer.
    """

    def __init__(self, operation, args=(), kwargs=None, **options):
        options.setdefault("name", operation.name)
        super().__init__(**options)
        self.operation, self.args, self.kwargs = operation, args, kwargs or {}

    @classmethod
    def of(cls, operation: keras.Operation) -> "Operator":
        """Returns the layer for an operator that is called once in a graph."""
        arguments, count = operation._inbound_nodes[0].arguments, iter(range(99))

        def stand_in(x):
            return cls.slot(next(count)) if isinstance(x, keras.KerasTensor) else x

        args, kwargs = keras.tree.map_structure(stand_in, (arguments.args, arguments.kwargs))
        return cls(operation, args, kwargs)

    @staticmethod
    def slot(i: int) -> str:
        """Returns what stands for tensor `i` in the arguments."""
        return f"<tensor {i}>"

    def run(self, inputs, on_constant=lambda x: x):
        """Returns the operator's result, with `on_constant` applied to each constant argument."""
        args, kwargs = self._filled(dict(enumerate(keras.tree.flatten(inputs))), on_constant)
        return self.operation(*args, **kwargs)

    def arguments(self, inputs) -> list:
        """Returns what the operator is called with: tensors and constants, in order."""
        args, kwargs = self._filled(dict(enumerate(keras.tree.flatten(inputs))))
        return [*args, *kwargs.values()]

    def _filled(self, tensors, on_constant=lambda x: x):
        slots = {self.slot(i): x for i, x in tensors.items()}

        def fill(x):
            return slots[x] if isinstance(x, str) and x in slots else on_constant(x)

        return keras.tree.map_structure(fill, (self.args, self.kwargs))

    def call(self, inputs):
        return self.run(inputs)

    def compute_output_spec(self, inputs):
        args, kwargs = self._filled(dict(enumerate(keras.tree.flatten(inputs))))
        return self.operation.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        one = isinstance(input_shape, tuple) and not isinstance(input_shape[0], tuple | list)
        shapes = [input_shape] if one else input_shape
        tensors = [keras.KerasTensor(shape, self.compute_dtype) for shape in shapes]
        return self.compute_output_spec(tensors).shape

    def get_config(self):
        save = keras.saving.serialize_keras_object
        own = {
            "operation": save(self.operation),
            "args": save(self.args),
            "kwargs": save(self.kwargs),
        }
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        load = keras.saving.deserialize_keras_object
        own = {key: load(config[key]) for key in ("operation", "args", "kwargs")}
        return cls(**{**config, **own})
