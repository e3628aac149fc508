"""Prunes every family of keras.applications, with accel_tf on Keras 3 and with TFMOT on tf_keras.

    .venv/bin/python benchmarks/pruning_families.py            # some five minutes
    .venv/bin/python benchmarks/pruning_families.py --quick    # three families
    .venv/bin/python benchmarks/pruning_families.py --book     # also into book/_data

Of each family the smallest member, with no weights from elsewhere: prune half of each kernel, train
one step, count the zeros. A kernel of n weights has to have n − round(n / 2) of them, exactly. Nothing
is timed, so both sides run at once, in processes of their own: TFMOT makes tf.keras another package.
"""

import importlib.metadata
from pathlib import Path

import _common as common
import keras
import numpy as np
from _families import BATCH, CLASSES, QUICK, SHAPE, batch, compare, families, reason

import accel_tf as at
from accel_tf.report import Table

SPARSITY = 0.5
BOOK = Path(__file__).parent.parent / "book" / "_data" / "pruning_families.json"


def result(kernels: list[tuple[int, int]], loss: float) -> dict:
    """Judges the numbers of weights and of zeros of the pruned kernels, after a step of training."""
    kept = [max(int(np.round(n * (1 - SPARSITY))), 1) for n, _ in kernels]
    exact = sum(zeros == n - k for (n, zeros), k in zip(kernels, kept, strict=True))
    if not np.isfinite(loss):
        raise ArithmeticError(f"The loss is {loss} after a step.")
    return {"kernels": len(kernels), "exact": int(exact)}


def ours(member: str) -> dict:
    """Prunes with accel_tf, trains a step, and counts."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, member)(weights=None, input_shape=SHAPE, classes=CLASSES)
    model.compile("adam", "sparse_categorical_crossentropy")
    at.prune(model, at.ConstantSparsity(SPARSITY))
    loss = model.train_on_batch(*batch())
    table = at.sparsity(model)
    counts = zip(table.column("weights")[:-1], table.column("zeros")[:-1], strict=True)
    return result(list(counts), loss)  # the last row is the total


def theirs(member: str) -> dict:
    """Prunes with TFMOT, trains a step, and counts; or returns why TFMOT refuses."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    model = getattr(tf_keras.applications, member)(weights=None, input_shape=SHAPE, classes=CLASSES)
    sparsity = tfmot.sparsity.keras
    schedule = sparsity.ConstantSparsity(SPARSITY, begin_step=0, frequency=1)
    try:
        model = sparsity.prune_low_magnitude(model, schedule)
        model.compile("adam", "sparse_categorical_crossentropy")
        callbacks = [sparsity.UpdatePruningStep()]
        history = model.fit(*batch(), batch_size=BATCH, verbose=0, callbacks=callbacks)
    except Exception as error:  # whatever it is, it is the answer
        return {"refusal": reason(error)}
    wrapped = [v for m in model.submodules for v in getattr(m, "pruning_vars", ())]
    weights = {id(weight): weight.numpy() for weight, _, _ in wrapped}
    counts = [(w.size, w.size - np.count_nonzero(w)) for w in weights.values()]
    return result(counts, history.history["loss"][0])


def describe(outcome: dict) -> str:
    """Says in a word or two what became of a model."""
    if "refusal" in outcome:
        return "refused"
    if "absent" in outcome:
        return outcome["absent"]
    n, exact = outcome["kernels"], outcome["exact"]
    return f"{n} kernels, {'all' if exact == n else exact} exact" if n else "no kernel"


def table(rows: list[dict]) -> Table:
    return Table(
        ["family", "smallest member", "accel_tf on Keras 3", "TFMOT on tf_keras", "TFMOT says"],
        [
            [
                *(row["family"], row["member"], describe(row["ours"]), describe(row["tfmot"])),
                row["tfmot"].get("refusal", ""),
            ]
            for row in rows
        ],
        title=f"prune to {SPARSITY:.0%}, then a step of training, {SHAPE[0]} × {SHAPE[1]} pixels",
        note=summary(rows),
    )


def summary(rows: list[dict]) -> str:
    here = [row for row in rows if "absent" not in row["ours"]]
    exact = sum(row["ours"]["exact"] == row["ours"]["kernels"] > 0 for row in here)
    there = [row for row in rows if "absent" not in row["tfmot"]]
    pruned = sum(bool(row["tfmot"].get("kernels")) for row in there)
    return (
        f"accel_tf: {exact} of the {len(here)} families of Keras 3, each kernel exact. "
        f"TFMOT: {pruned} of the {len(there)} of tf_keras.\n"
        "Where TFMOT is not exact, it keeps more weights: all that are equal to the smallest that stays."
    )


def main() -> None:
    import tf_keras

    options = common.options(
        __doc__, "pruning_families", book=f"also write {BOOK.name} for the book"
    )
    host = at.benchmark.host()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("tensorflow-model-optimization", "tf_keras")
    }
    print(f"{host}, {', '.join(' '.join(item) for item in versions.items())}\n", flush=True)
    here, there = families(keras.applications), families(tf_keras.applications)
    names = QUICK if options.quick else sorted({**here, **there})
    rows = []
    for row in compare(names, ours, here, theirs, there):
        rows.append(row)
        print(row["family"], describe(row["ours"]), describe(row["tfmot"]), sep=": ", flush=True)
    print(f"\n{table(rows)}\n")
    found = {
        "host": str(host),
        "versions": {**host.versions, **versions},
        "sparsity": SPARSITY,
        "shape": SHAPE,
        "rows": rows,
    }
    common.save(found, options.output)
    if options.book:
        common.save(found, BOOK)


if __name__ == "__main__":
    main()
