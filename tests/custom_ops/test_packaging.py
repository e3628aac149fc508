"""The installed package: the wheel in another environment, the wrong TensorFlow, no op, the import."""

import json
import sys
import sysconfig
import zipfile

import pytest

from .conftest import ROOT, only_one, run, succeed

pytestmark = pytest.mark.xdist_group("wheel")  # built once, by one worker

PRODUCT = """
import numpy as np, accel_tf as at
w = np.zeros((40, 30), "float32"); w[::7, ::3] = 2
y = at.sparse_matmul(np.ones((5, 40), "float32"), at.SparseMatrix.from_dense(w))
assert np.array_equal(y, np.ones((5, 40)) @ w)
print(at.sparse.isa(), at.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without isolation, so that it is quick and needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    with only_one("wheel"):
        succeed(
            sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation",
            "--no-cache-dir", "-w", folder,
        )  # fmt: skip
    (wheel,) = folder.glob("accel_tf-*.whl")
    return wheel


@pytest.fixture
def environment(wheel, tmp_path):
    """Another virtual environment with the wheel in it, which sees TensorFlow but not this package."""
    succeed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A .pth file names TensorFlow's folder; .pth files in there, the editable install's, are not read.
    (site / "tensorflow.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "env" / "bin" / "python", site


def test_wheel_holds_the_package_the_library_and_its_record(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "accel_tf/__init__.py",
        "accel_tf/book.mplstyle",
        "accel_tf/sparse/_accel_tf_ops.so",
        "accel_tf/sparse/_accel_tf_xla.so",
        "accel_tf/sparse/_accel_tf_ops.json",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "book", "custom_ops"))]


def test_wheel_runs_from_any_folder(environment):
    python, site = environment
    isa, file = succeed(python, "-c", PRODUCT, cwd="/").split()
    assert isa != "tensorflow" and file.startswith(str(site))
    # In the repository, Python imports the sources that lie there; they find the wheel's library.
    isa, file = succeed(python, "-c", PRODUCT, cwd=ROOT).split()
    assert isa != "tensorflow" and file.startswith(str(ROOT / "accel_tf"))


def test_editable_install_runs_from_any_folder(tmp_path):
    isa, file = succeed(sys.executable, "-c", PRODUCT, cwd=tmp_path).split()
    assert isa != "tensorflow" and file.startswith(str(ROOT))


def test_another_tensorflow_is_refused_with_the_way_out(environment):
    python, site = environment
    record = site / "accel_tf" / "sparse" / "_accel_tf_ops.json"
    built = json.loads(record.read_text())
    record.write_text(json.dumps({**built, "tensorflow": "2.7.1"}))
    # The techniques that need no op still work; so it is the use of the op that fails.
    used = PRODUCT.replace("y =", "at.pruning, at.quantization; print(1); y =")
    result = run(python, "-c", used, cwd="/")
    assert result.returncode != 0 and result.stdout == "1\n"
    error = result.stderr
    assert "OpVersionError: The compiled op of accel_tf was built for TensorFlow 2.7.1" in error
    assert f"but TensorFlow {built['tensorflow']} is running" in error
    assert "pip install --no-build-isolation" in error


def test_without_the_op_tensorflow_computes_the_same_and_says_so_once(environment, tmp_path):
    python, site = environment
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import accel_tf as at
    import numpy as np, tensorflow as tf, keras
    rng = np.random.default_rng(0)
    for batch, size in zip([(), (0,), (3,), (2, 0), (2, 5)], [1, 0, 3, 0, 10]):
        for k, n in [(6, 4), (0, 4), (6, 0)]:
            w = rng.normal(size=(k, n)).astype("float32") * (rng.random((k, n)) < 0.4)
            x = tf.constant(rng.normal(size=(*batch, k)).astype("float32"))
            m = at.SparseMatrix.from_dense(w)
            values = m.values
            with tf.GradientTape() as tape:
                tape.watch([x, values])
                y = at.sparse_matmul(x, m.with_values(values))
                loss = tf.reduce_sum(y * y)
            dx, dv = tape.gradient(loss, [x, values])
            full = np.einsum("...k,kn->...n", x, w)
            assert y.shape == full.shape
            np.testing.assert_allclose(y, full, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(dx, 2 * full @ w.T, rtol=1e-5, atol=1e-5)
            dense = 2 * np.einsum("bk,bn->kn", *(a.reshape(size, a.shape[-1]) for a in (x.numpy(), full)))
            np.testing.assert_allclose(dv, dense.T[w.T != 0], rtol=1e-5, atol=1e-5)
    layer = at.SparseDense(4, sparsity=0.5)
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 6)), np.ones((8, 4)), verbose=0)
assert at.sparse.isa() == "tensorflow"
print(sum("found no compiled op" in str(w.message) for w in caught))
"""
    empty = {"ACCEL_TF_OP_DIR": str(tmp_path)}
    assert succeed(python, "-c", code, cwd="/", env=empty).split() == ["1"]


def test_import_costs_little():
    code = """
import time, tensorflow, keras
start = time.perf_counter()
import accel_tf
print(time.perf_counter() - start)
"""

    assert min(float(succeed(sys.executable, "-c", code)) for _ in range(2)) < 0.2
