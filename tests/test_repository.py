"""Rules of the repository: the tree's shape, the style of each language, the pins in step."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def _files(*patterns):
    return [path for pattern in patterns for path in ROOT.glob(pattern)]


def test_each_chapter_has_its_three_files():
    """`book/X.py` teaches, `accel_tf/X` implements, `tests/accel_tf/test_X*.py` proves."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {Path(c["file"]).name for part in toc["parts"] for c in part["chapters"]}
    for chapter in (ROOT / "book").glob("*.py"):
        assert chapter.stem in listed, f"{chapter.name} is not in _toc.yml"
        text = chapter.read_text()
        named = re.search(r"\*\*Module\*\* \{py:mod\}`accel_tf\.(\w+)`", text)
        assert named, f"{chapter.name} does not name the module it teaches"
        module = named[1]
        implements = [ROOT / f"accel_tf/{module}.py", ROOT / f"accel_tf/{module}/__init__.py"]
        assert any(p.exists() for p in implements), f"accel_tf/{module} does not exist"
        tests = list((ROOT / "tests/accel_tf").glob(f"test_{module}*.py"))
        assert tests, f"no tests/accel_tf/test_{module}*.py"


def test_each_chapter_asserts_its_claims(subtests):
    for chapter in (ROOT / "book").glob("*.py"):
        with subtests.test(chapter.name):
            assert re.search(r"^assert ", chapter.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_python_style(command):
    run = subprocess.run(
        [BIN / "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_cpp_style():
    sources = _files("custom_ops/**/*.cc", "custom_ops/**/*.h")
    assert sources
    run = subprocess.run(
        [BIN / "clang-format", "--dry-run", "--Werror", *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_keras_3_only():
    """Importing TFMOT flips `tf.keras` to the legacy package, so the library never writes it."""
    for path in _files("accel_tf/**/*.py", "book/*.py"):
        if "interop" not in path.parts:
            assert not re.search(r"^[^#]*\btf\.keras\.", path.read_text(), re.MULTILINE), path


def test_environment_yml_is_in_step_with_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if str(d).startswith("python=")).split(
        "="
    )[1]
    marker = {"python_version": python, "python_full_version": f"{python}.9"}

    def here(requirements):
        """Those requirements that this Python and this platform install."""
        parsed = map(Requirement, requirements)
        return [r for r in parsed if r.marker is None or r.marker.evaluate(marker)]

    lines = (ROOT / "requirements.lock").read_text().splitlines()
    lock = {
        _name(r.name): str(r.specifier)
        for r in here(line for line in lines if line and not line.startswith(("#", " ")))
    }
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    pins = {_name(r.name): str(r.specifier) for r in here(pip[1:])}
    assert pins == {name: lock[name] for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert set(pins) == {_name(r.name) for r in here(direct)} - {"accel-tf"}


def test_keras_is_a_release_with_all_fixes_of_its_file_format():
    """Of the releases so far, only 3.12.4 and 3.15.1 have all security fixes for model files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (keras,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "keras")
    for version in ("3.12.4", "3.15.1", "3.16.0"):
        assert keras.specifier.contains(version)
    for version in ("3.11.3", "3.12.3", "3.13.0", "3.13.2", "3.14.0", "3.14.1", "3.15.0"):
        assert not keras.specifier.contains(version)
    pins = re.findall(r"^keras==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pins and all(map(keras.specifier.contains, pins))


def test_continuous_integration_runs_the_readmes_command():
    commands = [
        line
        for line in (ROOT / ".ci/run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["make test"]
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_readmes_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^float .*\n^int8 ", run.stdout, re.MULTILINE), run.stdout


def test_api_page_lists_every_module():
    import accel_tf

    page = (ROOT / "book/api.md").read_text()
    for module in [*set(accel_tf._MODULES) - {"interop"}, "interop.tfmot"]:
        assert f".. automodule:: accel_tf.{module}\n" in page


def test_make_says_what_is_missing(tmp_path):
    for arguments, message in (
        (["PYTHON="], "Python 3.10 to 3.13 is needed: apt-get install"),
        (["CXX=/no/such/compiler"], "A C++17 compiler is needed: apt-get install g++"),
    ):
        run = subprocess.run(
            ["make", "tools", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode != 0
        assert message in run.stdout


def _name(name):
    return name.lower().replace("_", "-")
