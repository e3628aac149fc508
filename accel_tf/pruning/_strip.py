"""The verb `strip_pruning`: weights that `prune` or `train_sparse` holds are free again."""

import keras
import numpy as np

from accel_tf.layers import require_model
from accel_tf.pruning._constraint import MaskConstraint
from accel_tf.pruning._selection import UNSELECTED, weights_of
from accel_tf.report import Entry, Report, attach


def strip_pruning(model: keras.Model, *, include=None, exclude=None) -> Report:
    """Ends the pruning of `model` in place: its zeros stay until training moves them.

    Saving, exporting, converting and serving need no such call, as a pruned model is a plain Keras
    model. Call it to train all weights again, for example the last steps after pruning and regrowing
    (dense-sparse-dense), or to leave some layers out from now on. A constraint that a weight had
    before `prune` is in force again. With a common sparsity, scope `"global"`, the weights that are
    still pruned keep it.

    A `tf.function` of your own that contains the training step has to be made after the call, as it
    records the constraints it finds.

    Args:
        model: A model that `prune` or `train_sparse` was applied to, or one that has it as a part.
        include: Free only these layers, and those below them: a layer, a layer class, a name or path
            with wildcards (`"block_*"`), a function `(path, layer) -> bool`, or a sequence of those.
        exclude: Leave these layers pruned, and those below them; written as `include`.

    Returns:
        A `Report`: which weights are free and how many of their elements are zero, and which layers
        stay as they are.

    Raises:
        ValueError: The model is not built, a selector matches no layer, or none of the selected
            weights is pruned.

    Example:

    >>> import accel_tf as at
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, name="head")])
    >>> report = at.prune(model, at.ConstantSparsity(0.75))
    >>> print(at.strip_pruning(model))
    strip_pruning: 1 layer changed, 0 left alone
    layer  changed  note
    -----  -------  ------------------------------------
    head   yes      kernel (8, 10): 60 of 80 zero, as is
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((4, 8)), np.ones((4, 10)), verbose=0)
    >>> at.sparsity(model).total
    0.0

    Reference: Han et al., "DSD: dense-sparse-dense training for deep neural networks" (2017);
    https://arxiv.org/abs/1607.04381. The name is TFMOT's.
    """

    def release(v):
        v.constraint.masks.remove(v)
        v.constraint = v.constraint.inner
        zeros = v.shape.num_elements() - np.count_nonzero(keras.ops.convert_to_numpy(v))
        return f"{zeros} of {v.shape.num_elements()} zero"

    return free(
        model,
        "strip_pruning",
        include,
        exclude,
        lambda v: isinstance(v.constraint, MaskConstraint),
        release,
        "pruned",
        "A model that was loaded from a file holds zeros, and nothing keeps them",
    )


def free(model, verb, include, exclude, is_held, release, state, hint) -> Report:
    """Frees weights of what a verb holds them to, for the verbs that end it.

    Args:
        model: The model, which must be built.
        verb: The name of the verb that ends it.
        include, exclude: As for `weights_of`.
        is_held: Tells of a variable whether it is held.
        release: Frees a variable; returns what it holds now, in words.
        state: What a weight is that is held, such as `"pruned"`.
        hint: Why there may be none, for the message.

    Raises:
        ValueError: The model is not built, or none of the weights is held.
    """
    require_model(model, verb)
    freed: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    for path, _, v, reason in weights_of(model, include, exclude):
        held = is_held(v)
        if held and reason not in UNSELECTED:
            freed.setdefault(path, []).append(f"{v.name} {tuple(v.shape)}: {release(v)}, as is")
        elif held or path not in left:
            left[path] = f"still {state}: {reason}" if held else f"not {state}"
    report = Report(
        verb,
        tuple(Entry(path, "; ".join(notes)) for path, notes in freed.items()),
        tuple(Entry(path, reason) for path, reason in left.items() if path not in freed),
    )
    if not freed:
        raise ValueError(
            f"No weight of model {model.name!r} is {state} that could be freed. {hint}:\n{report}"
        )
    if model.compiled:
        model.train_function = None  # traced with these constraints; `fit` makes it anew
    attach(model, report)
    return report
