"""The benchmark of the sparse product runs, checks every peer, and writes what it promises."""

import json
import sys

from .conftest import ROOT, succeed


def test_sparse_benchmark(tmp_path):
    script = ROOT / "benchmarks" / "sparse_matmul.py"
    output = succeed(sys.executable, script, "--quick", "--output", tmp_path / "times.json")
    assert "GFLOP/s" in output and "of roofline" in output
    result = json.loads((tmp_path / "times.json").read_text())
    assert {"host", "isa", "roofline", "records"} == result.keys()
    assert len(result["records"]) == 4
    for record in result["records"]:
        assert record["seconds"].keys() == {
            "accel_tf", "tf.matmul", "tf.sparse", "CSRSparseMatrix", "SciPy"
        }  # fmt: skip
        assert all(len(times) >= 5 for times in record["seconds"].values())
