"""Copies what a layer holds besides its configuration: weights, statistics, tables, random seeds."""

import tempfile

import keras

from accel_tf.layers._walk import walk

# The name that Keras gives to the state of any random generator, also of its global one.
_SEED = "seed_generator_state"


def copy_state(old: keras.Layer, new: keras.Layer, path: str) -> None:
    """Gives `new` the state of `old`, a layer of the same configuration, by the way of a `.keras` file.

    That is what Keras saves and loads a layer with: `save_own_variables` and `load_own_variables`,
    which also finalize an adapted `Normalization` and merge a LoRA update, and `save_assets` and
    `load_assets`, which carry the tables of lookup layers. What a file lacks, see `unsaved`, is copied as
    well. The layers inside of `old` are treated alike.

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
        if target is not new:
            target.name = source.name  # Keras numbers names that a constructor does not give.
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
    for state, other in zip(unsaved(source), unsaved(target), strict=True):
        other.assign(_array(state))


def _array(value):
    return keras.ops.convert_to_numpy(value) if isinstance(value, keras.Variable) else value


def unsaved(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the variables of a layer that Keras saves in no file.

    These are the states of its own random generators, and what a recurrent layer with `stateful=True`
    keeps from one batch to the next.
    """
    generators = [x for x in vars(layer).values() if isinstance(x, keras.random.SeedGenerator)]
    states = keras.tree.flatten(layer.states) if isinstance(layer, keras.layers.RNN) else []
    return [generator.state for generator in generators] + [v for v in states if v is not None]


class Changes(keras.StatelessScope):
    """A scope that leaves all variables as they are, and notes which of them a call would change.

    Attributes:
        variables: These variables, each once.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._noted: dict[int, keras.Variable] = {}

    @property
    def variables(self) -> list[keras.Variable]:
        return list(self._noted.values())

    def add_update(self, update):
        super().add_update(update)
        self._noted[id(update[0])] = update[0]

    def of_state(self, model: keras.Model) -> dict[str, keras.Variable]:
        """Returns what is changed besides the states of random generators, by the path of the layer.

        Args:
            model: The model that was called in inference. If a layer changes several of its variables,
                the result has one of them.
        """
        owners = {
            id(v): path for path, layer in walk(model) for v in (*layer.variables, *unsaved(layer))
        }
        # Seeds and metrics are variables of a layer, but not among its weights.
        others = {id(v) for v in model.variables} - {id(v) for v in model.weights}
        return {
            owners.get(id(v), model.name): v
            for v in self.variables
            if id(v) not in others and v.name != _SEED
        }


def _not_alike(path, layer, why) -> ValueError:
    return ValueError(
        f"The state of layer {path!r} ({type(layer).__name__}) cannot be copied to a layer made of its "
        f"configuration: {why}. Its get_config has to return all that its constructor takes, and its "
        "build has to create all of its weights."
    )
