"""The kernels by themselves: their C++ tests, plain and under the sanitizers; their independence."""

import re
from pathlib import Path

import pytest

from .conftest import ROOT, succeed

KERNELS = ROOT / "custom_ops" / "kernels"


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_kernels(kernel_tests, sanitizers):
    output = succeed("ctest", "--test-dir", kernel_tests(sanitizers), "--verbose")
    assert "100% tests passed" in output and "0 failures" in output
    assert "testing scalar" in output  # each instruction set of the host is named


def test_kernels_are_free_of_tensorflow():
    files = sorted(KERNELS.iterdir())
    assert len(files) > 5
    for file in files:
        for include in re.findall(r'#include\s*[<"]([^>"]+)', file.read_text()):
            assert include.startswith("kernels/") or "/" not in include, f"{file.name}: {include}"


def test_every_instruction_set_is_listed_once_and_has_a_file():
    listed = re.findall(r"^ACCEL_TF_ISA\((\w+),", (KERNELS / "isas.inc").read_text(), re.M)
    files = [path.stem.removeprefix("isa_") for path in KERNELS.glob("isa_*.cc")]
    assert sorted(listed) == sorted(files)


def test_instruction_sets_share_no_function(kernel_tests):
    """The linker keeps one of several equal functions: it might be one that the host cannot run."""
    objects = sorted(kernel_tests("").rglob("isa_*.o"))
    assert objects
    for compiled in objects:
        symbols = succeed("nm", "-C", "--defined-only", compiled)
        assert "kernels_" in symbols
        assert not re.findall(r"^\S* [WVu] .*", symbols, re.M), compiled.name


def test_sources_are_formatted():
    sources = [p for p in (ROOT / "custom_ops").rglob("*") if p.suffix in {".cc", ".h"}]
    assert len(sources) > 8
    succeed("clang-format", "--dry-run", "--Werror", *map(Path, sources))
