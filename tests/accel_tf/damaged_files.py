"""Damages LiteRT files in many ways and puts each through every verb that takes a path.

Run as a script it is the child process, which may crash or hang; `outcomes` starts it, as often as needed.
"""

import os
import pathlib
import random
import resource
import select
import subprocess
import sys

import flatbuffers
import keras
import numpy as np

import accel_tf as at
from accel_tf.export import LiteRTRunner, run_litert, verify

L = keras.layers
KINDS = ("float", "int8", "loop", "embedding", "mixed", "dictionary")
VERBS = ("inspect", "run", "open", "compare", "verify")
_MEMORY = 24 * 2**30


def originals(folder: pathlib.Path) -> None:
    """Writes a small model of each kind as `<kind>.keras` and `<kind>.tflite`."""
    keras.utils.set_random_seed(0)
    for kind in KINDS:
        model, options = _build(kind)
        model.save(folder / f"{kind}.keras")
        at.export.litert(model, folder / f"{kind}.tflite", **options)


def samples(kind) -> np.ndarray | dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if kind == "embedding":
        return rng.integers(0, 20, (4, 6)).astype("int32")
    if kind == "dictionary":
        return {n: rng.normal(size=(4, 6)).astype("float32") for n in ("a", "b")}
    shape = {"loop": (1, 5, 3), "mixed": (4, 64)}.get(kind, (4, 8, 8, 3))
    return rng.normal(size=shape).astype("float32")


def _build(kind):
    if kind == "loop":
        layers = [keras.Input((5, 3)), L.LSTM(4), L.Dense(2)]
        return keras.Sequential(layers), {"batch_size": 1}
    if kind == "embedding":
        ids = keras.Input((6,), dtype="int32")
        h = L.Embedding(20, 8)(ids)
        h = L.LayerNormalization()(h + L.MultiHeadAttention(2, 4)(h, h))
        return keras.Model(ids, L.Dense(3)(L.GlobalAveragePooling1D()(h))), {}
    if kind == "mixed":
        layers = [L.Dense(48, "relu", name="a"), L.Dense(8, name="b"), L.Dense(5, "tanh", name="c")]
        model = keras.Sequential([keras.Input((64,)), *layers])
        schemes = at.Mixed({"a": at.Int4Weights(32), "b": at.Int8Weights()}, default=at.Int8())
        return at.calibrate(model, samples(kind), schemes, verbose=0), {}
    if kind == "dictionary":
        a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
        h = L.Concatenate()([L.Dense(4)(a), b])
        outputs = {"probability": L.Dense(3, "softmax")(h), "value": L.Dense(1)(h)}
        return keras.Model({"a": a, "b": b}, outputs), {}
    image = keras.Input((8, 8, 3))
    x = L.BatchNormalization()(L.Conv2D(8, 3, strides=2, padding="same")(image))
    y = L.Add()([L.ReLU()(x), L.DepthwiseConv2D(3, padding="same", dilation_rate=1)(x)])
    y = L.Concatenate()([L.MaxPooling2D(2)(y), L.AveragePooling2D(2)(L.ZeroPadding2D(0)(y))])
    y = L.Permute((2, 1, 3))(L.Conv2DTranspose(4, 2, strides=2)(y))
    model = keras.Model(image, L.Dense(5, "softmax")(L.Flatten()(y)))
    return (at.calibrate(model, samples(kind), verbose=0) if kind == "int8" else model), {}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns a file with one to three faults, most of them in a field of one of its tables."""
    how = rng.random()
    if how < 0.1:
        return content[: rng.randrange(8, len(content))]
    if how < 0.3:
        return _with_wrong_bytes(bytearray(content), rng)
    for _ in range(100):
        try:
            result = _with_wrong_fields(content, rng)
        except Exception:  # A number that the format cannot hold: another one is tried.
            continue
        if result != content:
            return result
    return content[:-4]


def _with_wrong_bytes(content, rng):
    for _ in range(rng.choice((1, 1, 4, 20))):
        place = rng.randrange(8, len(content) - 4) & ~3
        if rng.random() < 0.5:
            content[place + rng.randrange(4)] ^= 1 << rng.randrange(8)
        else:
            content[place : place + 4] = rng.choice((-1, 0, 1, 2**31 - 1, 4096)).to_bytes(
                4, "little", signed=True
            )
    return bytes(content)


def _with_wrong_fields(content, rng):
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    for _ in range(rng.choice((1, 1, 2, 3))):
        fields = {}
        for table in _tables(model):
            for field in vars(table):
                fields.setdefault((type(table), field), []).append(table)
        key = rng.choice(sorted(fields, key=str))  # A rare field as often as a frequent one.
        table = rng.choice(fields[key])
        setattr(table, key[1], _wrong(getattr(table, key[1]), rng))
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tables(value):
    if hasattr(value, "Pack"):
        yield value
        value = list(vars(value).values())
    if isinstance(value, list):
        for part in value:
            yield from _tables(part)


def _wrong(value, rng):
    if isinstance(value, (bool, int, np.integer)):
        near = [int(value) + d for d in (-1, 1)]
        return rng.choice([-1, 0, 1, 2, 127, 255, 2**31 - 1, -(2**31), rng.randrange(300), *near])
    if isinstance(value, (float, np.floating)):
        return rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e-38, 1e38])
    if isinstance(value, (bytes, str)):
        return rng.choice([None, b"", b"x", value[:-1]])
    if isinstance(value, np.ndarray):
        return _wrong_array(value, rng)
    if isinstance(value, list):
        value, i = list(value), rng.randrange(max(len(value), 1))
        change = rng.choice(("drop", "repeat", "swap", "none"))
        if change == "none" or not value:
            return None
        if change == "drop":
            del value[i]
        elif change == "repeat":
            value.insert(i, value[-1])
        else:
            value[i], value[0] = value[0], value[i]
        return value
    return None


def _wrong_array(value, rng):
    change = rng.choice(("edit", "edit", "edit", "none", "shorter", "longer", "empty"))
    value = value.copy()
    if change == "none" or (change == "edit" and not len(value)):
        return None
    if change == "edit":
        place = rng.randrange(len(value))
        value[place] = _wrong(value[place].item(), rng)
    return {"shorter": value[:-1], "longer": np.append(value, value[-1:]), "empty": value[:0]}.get(
        change, value
    )


def outcomes(folder: pathlib.Path, numbers, seconds=60.0) -> dict[tuple[int, str], str]:
    """Returns what each verb made of each damaged file: `"result"`, `"refused"`, or the fault."""
    found, todo = {}, [(i, verb) for i in numbers for verb in VERBS]
    while todo:
        reader, writer = os.pipe()
        start, stop = todo[0][0], todo[-1][0] + 1
        skipped = VERBS.index(todo[0][1])
        command = [sys.executable, __file__, str(folder), *map(str, (writer, start, skipped, stop))]
        child = subprocess.Popen(
            command, pass_fds=[writer], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(writer)
        with open(reader, "rb", buffering=0) as lines:
            limit = 120.0  # The first answer waits for the imports.
            while todo:
                ready, _, _ = select.select([lines], [], [], limit)
                line = _line(lines) if ready else b""
                if not line:
                    break
                found[todo.pop(0)], limit = line.decode(), seconds
        if todo:
            child.kill()
            code = child.wait()
            found[todo.pop(0)] = "hang" if not ready else f"crash: signal {-code}"
        child.wait()
    return found


def _line(lines):
    text = b""
    while (byte := lines.read(1)) not in (b"", b"\n"):
        text += byte
    return text


def content_of(folder, number) -> tuple[str, bytes]:
    """Returns the kind and the content of a damaged file by its number."""
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    return kind, damaged((folder / f"{kind}.tflite").read_bytes(), rng)


def _outcome(act, path) -> str:
    try:
        act()
        return "result"
    except ValueError as error:
        return "refused" if path.name in str(error) else f"no path: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _main(folder, writer, start, skipped, stop):
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    models = {kind: keras.models.load_model(folder / f"{kind}.keras") for kind in KINDS}
    for number in range(start, stop):
        kind, content = content_of(folder, number)
        path = folder / f"damaged{number}.tflite"
        path.write_bytes(content)
        acts = _acts(path, models[kind], samples(kind))
        for verb in VERBS[skipped:]:
            text = _outcome(acts[verb], path).replace("\n", " ")[:300]
            os.write(writer, text.encode() + b"\n")
        skipped = 0
        path.unlink()


def _acts(path, model, x) -> dict:
    y = np.zeros(len(next(iter(x.values())) if isinstance(x, dict) else x))
    options = {"metric": lambda y, outputs: 0.0, "rounds": 1, "verbose": 0}
    return {
        "inspect": lambda: at.inspect_litert(path),
        "run": lambda: run_litert(path, x),
        "open": lambda: LiteRTRunner(path)(x),
        "compare": lambda: at.compare({"m": path}, x, y, **options),
        "verify": lambda: verify(model, path, x),
    }


if __name__ == "__main__":
    _main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
