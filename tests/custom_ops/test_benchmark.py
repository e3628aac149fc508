"""The benchmarks run, check every candidate, and write what they promise."""

import json
import platform
import sys

import pytest

from .conftest import ROOT, succeed


@pytest.fixture
def quick(tmp_path):
    """A function that runs a benchmark's first look; returns what it printed and its results."""

    def run(name):
        path = tmp_path / f"{name}.json"
        script = ROOT / "benchmarks" / f"{name}.py"
        output = succeed(sys.executable, script, "--quick", "--output", path)
        result = json.loads(path.read_text())
        assert {"host", "isa", "threads", "roofline"} <= result.keys()
        return output, result

    return run


def test_sparse_product(quick):
    output, result = quick("sparse_matmul")
    for heading in ("vs tf.matmul", "efficiency", "GFLOP/s", "GB/s", "of roofline"):
        assert heading in output
    assert "one call from Python" in output
    (records,) = result["records"].values()
    assert len(records) == 4
    names = {"accel_tf", "accel_tf 4x1", "tf.matmul", "tf.sparse", "SciPy"}
    names |= {"CSR eager", "CSR in graph"}
    if platform.machine() == "x86_64":
        names.add("MKL")
    one_sample = {"accel_tf 16x1", "accel_tf int8", "accel_tf int8 16x1"}
    for record in records:
        candidates = record["candidates"]
        assert candidates.keys() == names | (one_sample if record["batch"] == 1 else set())
        for name, entry in candidates.items():
            assert len(entry["seconds"]) >= 5
            assert entry["density"] == pytest.approx(1 - record["sparsity"], rel=0.05), name
            if name in ("accel_tf", "tf.matmul"):
                assert entry["products"] == 8


def test_litert(quick):
    output, result = quick("sparse_litert")
    assert result["threads"] == 1
    assert "vs the best of LiteRT" in output
    assert result["records"]["0.9"].keys() == {
        "tf.matmul",
        *("LiteRT dense", "LiteRT 1x4", "LiteRT 1x16"),
        *("accel_tf unstructured", "accel_tf 4x1", "accel_tf 16x1"),
        *("a call of LiteRT", "a call of TensorFlow"),
    }


def test_networks(quick):
    _, result = quick("sparse_networks")
    assert [(r["pattern"], r["batch"]) for r in result["inference"]] == [
        ("unstructured", 32),
        ("unstructured", 128),
    ]
    assert [r["pattern"] for r in result["training"]] == ["unstructured"]
    for record in (*result["inference"], *result["training"]):
        assert record["layers"] == 4
        assert record["difference"] < 1e-4
        assert {"Keras plain", "accel_tf plain"} <= record["seconds"].keys()
