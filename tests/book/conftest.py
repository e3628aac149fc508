"""The built book as a fixture: chapters executed once, pages built once, whoever asks first."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load_build():
    spec = importlib.util.spec_from_file_location("book_build", ROOT / "book/_ext/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def book_build():
    """The module `book/_ext/build.py`."""
    return _load_build()


@pytest.fixture(scope="session")
def html(book_build) -> Path:
    """The folder of the built pages."""
    book_build.execute_all(book_build.chapters())
    return book_build.build().parent


def pytest_generate_tests(metafunc):
    if "chapter" in metafunc.fixturenames:
        metafunc.parametrize("chapter", _load_build().chapters())
