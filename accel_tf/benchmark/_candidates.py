"""What can be measured: Keras models, files of several runtimes, and any callable, by name."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras

from accel_tf.benchmark import _runners

_PATHS = ".tflite and .onnx files, .keras files and SavedModel folders"


def is_path(candidate) -> bool:
    return isinstance(candidate, (str, os.PathLike))


def named(candidates, verb: str) -> dict[str, Any]:
    """Returns the candidates by name: by the keys of a dictionary, or by their own names.

    Args:
        candidates: A dictionary, a list or tuple of candidates, or one candidate.
        verb: The public function that was called, for the message.

    Raises:
        ValueError: `candidates` is none of these.
    """
    if isinstance(candidates, Mapping):
        return dict(candidates)
    if not isinstance(candidates, (list, tuple)):
        if not (is_path(candidates) or callable(candidates)):
            raise ValueError(
                f"{verb} takes a dictionary of names and models, a list of models, or one model. "
                f"Received: {type(candidates).__name__}. Write {verb}({{'name': model}}, x)."
            )
        candidates = [candidates]
    found = {}
    for candidate in candidates:
        found[_unique(_own_name(candidate), found)] = candidate
    return found


def open_candidate(name: str, candidate):
    """Returns what runs `candidate`, one of the classes of `_runners`.

    Raises:
        ValueError: `candidate` is nothing that can be run, or its file cannot be loaded.
        ImportError: The runtime of the file is not installed.
    """
    if is_path(candidate):
        return _open_path(name, pathlib.Path(candidate))
    if isinstance(candidate, keras.Model):
        return _runners.KerasRunner(candidate)
    if callable(candidate):
        return _runners.FunctionRunner(candidate)
    raise ValueError(
        f"Candidate {name!r} must be a Keras model, a callable or the path of a file; the paths "
        f"that are run are those of {_PATHS}. Received: {type(candidate).__name__}"
    )


def _open_path(name, path):
    if path.is_dir():
        return _runners.SavedModelRunner(path)
    kinds = {
        ".tflite": _runners.LiteRTFileRunner,
        ".onnx": _runners.ONNXRunner,
        ".keras": lambda path: _runners.KerasRunner(_load(name, path)),
    }
    if path.suffix not in kinds and (path.suffix or path.exists()):
        raise ValueError(
            f"Candidate {name!r} is the path {str(path)!r}; only {_PATHS} are run from a path. "
            "Load others first: keras.models.load_model(path)."
        )
    if not path.is_file():
        raise ValueError(f"Candidate {name!r}: there is no file {str(path)!r}, and no such folder.")
    return kinds[path.suffix](path)


def _load(name, path) -> keras.Model:
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever the construction of a layer raises.
        # Keras may print the whole configuration, before its reason and once more after it.
        reason = str(error).rpartition("Exception encountered: ")[2][:300]
        raise ValueError(
            f"Candidate {name!r}: Keras cannot load {str(path)!r}. If it has layers of your own, "
            "import the module that registers them; or load it and pass the model itself: "
            f"keras.models.load_model({str(path)!r}, custom_objects=…). Keras says: {reason}"
        ) from error


def _own_name(candidate) -> str:
    if is_path(candidate):
        return pathlib.Path(candidate).name
    name = getattr(candidate, "name", None) or getattr(candidate, "__name__", None)
    return name if isinstance(name, str) else type(candidate).__name__


def _unique(name: str, taken) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name} ({number})"
    return unique
