"""Malformed calls of the ops under AddressSanitizer: an error each that says why, and no report."""

import re
import sys

import pytest

from .conftest import ROOT, run, succeed


@pytest.mark.parametrize("script, calls", [("fuzz_op.py", 16_000), ("fuzz_gustavson.py", 5_000)])
def test_malformed_calls(address_sanitized_op, script, calls):
    library = address_sanitized_op / "_accel_tf_ops.so"
    assert b"__asan_report_load" in library.read_bytes(), "the op is not instrumented"
    preload = [
        succeed("g++", f"-print-file-name={name}").strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    result = run(
        sys.executable, ROOT / "custom_ops" / "tests" / script,
        address_sanitized_op, calls, 20260101,
        # Python and TensorFlow keep memory until they exit; that is no leak of the op's.
        env={"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert "AddressSanitizer" not in result.stderr, result.stderr[-5000:]
    assert result.returncode == 0, result.stderr[-5000:]
    refused, valid = re.search(
        r"(\d+) malformed calls refused, (\d+) valid ones right", result.stdout
    ).groups()
    assert int(refused) >= calls and int(valid) > calls / 50
    if script == "fuzz_op.py":  # and a quarter as many of nonsense that may pass
        accepted, _ = re.search(r"nonsense: (\d+) accepted, (\d+) refused", result.stdout).groups()
        assert int(accepted) > calls / 20
