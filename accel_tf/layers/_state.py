"""Copies what a layer holds besides its configuration: weights, statistics, tables, random seeds."""

import tempfile

import keras

from accel_tf.layers._walk import walk


def copy_state(old: keras.Layer, new: keras.Layer, path: str) -> None:
    """Gives `new` the state of `old`, a layer of the same configuration, by the way of a `.keras` file.

    That is what Keras saves and loads a layer with: `save_own_variables` and `load_own_variables`,
    which also finalize an adapted `Normalization` and merge a LoRA update, and `save_assets` and
    `load_assets`, which carry the tables of lookup layers. The states of random seeds, which a file
    lacks, are copied as well. The layers inside of `old` are treated alike.

    Args:
        old: The layer, built.
        new: The other layer; it is built here if its first call has not done so.
        path: The path of `old`, for the message.

    Raises:
        ValueError: `new` does not have the variables or the layers of `old`.
    """
    if old.built and not new.built:
        new.build_from_config(old.get_build_config())
    sources = [(path, old), *((f"{path}/{below}", layer) for below, layer in walk(old))]
    targets = [new, *(layer for _, layer in walk(new))]
    if len(sources) != len(targets):
        raise _not_alike(
            path, old, f"it has {len(sources) - 1} layers in it, its copy {len(targets) - 1}"
        )
    for (where, source), target in zip(sources, targets, strict=True):
        if source is target:
            continue
        try:
            _copy_own(source, target)
        except Exception as error:
            raise _not_alike(
                where, source, f"{type(error).__name__}: {str(error).strip()}"
            ) from error


def _copy_own(source, target):
    """Copies what a layer itself holds, without the layers in it."""
    store = {}
    source.save_own_variables(store)
    # As arrays, since a variable may live on the devices of a distribution strategy.
    arrays = {name: _array(value) for name, value in store.items()}
    target.load_own_variables(arrays)
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            target.load_assets(folder)
    for seed, other in zip(_seeds(source), _seeds(target), strict=True):
        other.assign(_array(seed))


def _array(value):
    return keras.ops.convert_to_numpy(value) if isinstance(value, keras.Variable) else value


def _seeds(layer) -> list:
    """Returns the states of a layer's own random generators."""
    generators = [x for x in vars(layer).values() if isinstance(x, keras.random.SeedGenerator)]
    return [generator.state for generator in generators]


def _not_alike(path, layer, why) -> ValueError:
    return ValueError(
        f"The state of layer {path!r} ({type(layer).__name__}) cannot be copied to a layer made of its "
        f"configuration: {why}. Its get_config has to return all that its constructor takes, and its "
        "build has to create all of its weights."
    )
