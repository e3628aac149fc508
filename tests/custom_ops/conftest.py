"""Builds variants of the compiled op and of its kernel tests, each once, under build/."""

import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command to its end, with the tools of this environment first on the path."""
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **kwargs.pop("env", {})}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, **kwargs
    )


def succeed(*command, **kwargs) -> str:
    """Runs a command that must exit with 0; returns what it printed."""
    result = run(*command, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@contextlib.contextmanager
def only_one(name: str):
    """Makes the workers of pytest-xdist build in the folder build/`name` one after the other."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield ROOT / "build" / name


def cmake(name: str, **options) -> Path:
    """Configures and builds custom_ops with the given cache entries; returns the build folder."""
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    with only_one(name) as folder:
        succeed(
            "cmake", "-S", ROOT / "custom_ops", "-B", folder, "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", *definitions,
        )  # fmt: skip
        succeed("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="session")
def kernel_tests():
    """A function from a set of sanitizers to the folder in which the kernel tests are built."""

    def build(sanitizers: str) -> Path:
        return cmake(
            "tests-" + (sanitizers.replace(",", "-") or "plain"),
            ACCEL_TF_OP="OFF",
            ACCEL_TF_TESTS="ON",
            ACCEL_TF_SANITIZE=sanitizers,
        )

    return build


@pytest.fixture(scope="session")
def address_sanitized_op() -> Path:
    """The folder of an op that runs under AddressSanitizer."""
    return cmake("op-address", ACCEL_TF_SANITIZE="address", ACCEL_TF_XLA="OFF")
