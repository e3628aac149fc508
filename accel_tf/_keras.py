"""Some private names of Keras, each behind a function with a name of ours.

A name is looked up when its function is called, so that a release of Keras that renames one breaks
what needs it, with a message that says so, and never `import accel_tf`. The classes of operators are
still imported where they are used.
"""

import importlib

import keras


def shared_object(key: str):
    """Returns the object that `record_shared_object` noted while a model is loaded, or `None`.

    Args:
        key: The identity of the object in the file that is being loaded.
    """
    return _private("keras.src.saving.serialization_lib", "get_shared_object")(key)


def record_shared_object(key: str, value) -> None:
    """Notes an object for `shared_object` until the model is loaded; outside of that, does nothing."""
    _private("keras.src.saving.serialization_lib", "record_object_after_deserialization")(
        value, key
    )


def lambda_output_shape(layer: keras.layers.Lambda):
    """Returns the argument `output_shape` that a Lambda layer was made with."""
    return getattr(layer, "_output_shape", None)


def constructor_arguments(layer: keras.Layer) -> dict | None:
    """Returns what a layer was constructed with, defaults included, or `None`.

    Keras notes it if all of it is of plain types, such as numbers and strings.
    """
    noted = getattr(layer, "_auto_config", None)
    return dict(noted.config) if noted is not None else None


def operation_of(tensor) -> keras.Operation:
    """Returns the layer or operator whose call in a graph returned a symbolic tensor."""
    return tensor._keras_history.operation


def mask_of(x):
    """Returns the mask that Keras has noted on a tensor, symbolic or not, or `None`."""
    return _private("keras.src.backend", "get_keras_mask")(x)


def set_mask(x, mask) -> None:
    """Notes a mask on a tensor, where Keras looks for it."""
    _private("keras.src.backend", "set_keras_mask")(x, mask)


def _private(module: str, name: str):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"accel_tf needs {module}.{name}, which Keras has from version 3.12 on, below 4; found "
            f"Keras {keras.__version__}. Install another version of Keras, or a newer accel_tf."
        ) from error
