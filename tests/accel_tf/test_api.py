"""The package as a whole: what it exports, that importing it is cheap, that its examples run."""

import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import accel_tf

ROOT = pathlib.Path(accel_tf.__file__).parent
MODULES = sorted(
    ".".join(("accel_tf", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


@pytest.mark.parametrize("name", accel_tf.__all__)
def test_every_public_name_resolves(name):
    assert getattr(accel_tf, name) is not None
    assert name in dir(accel_tf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'accel_tf' has no attribute 'prun'"):
        accel_tf.prun  # noqa: B018


@pytest.mark.parametrize("module", [m for m in MODULES if not m.split(".")[-1].startswith("_")])
def test_public_modules_export_documented_names(module):
    home = importlib.import_module(module)
    assert home.__doc__, f"{module} does not say what it is for"
    if home is accel_tf:
        return
    for name in getattr(home, "__all__", ()):
        value = getattr(home, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize(
    "name", [name for names in accel_tf._NAMES.values() for name in names], ids=str
)
def test_public_functions_and_classes_show_an_example(name):
    assert ">>>" in (getattr(accel_tf, name).__doc__ or ""), f"{name} has no runnable example"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    if module.startswith("accel_tf.interop"):
        # TFMOT switches tf.keras to the legacy package for the whole process: not for this one.
        script = f"import doctest, {module} as m, sys; sys.exit(doctest.testmod(m).failed)"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return
    home = importlib.import_module(module)
    # What every reader of the API has imported.
    extra = {"at": accel_tf, "keras": keras, "np": np, "tf": tf}
    result = doctest.testmod(home, extraglobs=extra, report=True)
    assert result.failed == 0, "see the captured output"


def test_importing_the_package_imports_nothing_beyond_keras():
    script = (
        "import sys, tensorflow, keras; before = set(sys.modules); import accel_tf;"
        # TensorFlow makes a module of the loaded op, whose name is a hash.
        "new = {n.partition('.')[0] for n in set(sys.modules) - before if len(n) != 40};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'accel_tf'}))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_importing_the_package_is_enough_to_load_its_layers(tmp_path):
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    x = np.ones((2, 4), "float32")
    accel_tf.calibrate(dense, x, verbose=0).save(tmp_path / "quantized.keras")
    accel_tf.sparsify(dense, min_sparsity=0).save(tmp_path / "sparse.keras")
    script = (
        "import accel_tf, keras; print([type(keras.models.load_model(f).layers[-1]).__name__"
        " for f in ('quantized.keras', 'sparse.keras')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.strip() == "['QuantizedWeights', 'SparseDense']"
