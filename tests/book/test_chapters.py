"""Each chapter of the table of contents, executed end to end: its assertions are its tests."""

import shutil
import subprocess
import sys

import pytest

# The notebook client leaves an event loop open in the thread that ran it; it holds no kernel.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*BaseEventLoop:pytest.PytestUnraisableExceptionWarning"
)

HEADER = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
"""


def test_chapter_executes(chapter, book_build):
    seconds, _ = book_build.execute(chapter)
    assert seconds > 0


@pytest.fixture
def small_book(tmp_path, book_build):
    """A repository with one chapter, to break at will."""
    (tmp_path / "book/_ext").mkdir(parents=True)
    shutil.copy(book_build.__file__, tmp_path / "book/_ext")
    for source in ("accel_tf", "custom_ops"):
        (tmp_path / source).mkdir()
        (tmp_path / source / "code.py").write_text("x = 1\n")
    (tmp_path / "requirements.lock").write_text("numpy==2\n")
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/one\nparts:\n- chapters:\n  - file: book/one\n"
    )

    def write(code):
        (tmp_path / "book/one.py").write_text(f"{HEADER}\n# %%\n{code}\n")
        return tmp_path

    return write


def test_broken_assertion_fails_and_names_the_chapter(small_book, book_build):
    root = small_book("claim = 0.4\nassert claim > 0.5, f'claimed more than {claim}'")
    with pytest.raises(book_build.ChapterError, match=r"book/one\.py(.|\n)*claimed more than 0\.4"):
        book_build.execute("one", root)
    # A failure is not cached.
    with pytest.raises(book_build.ChapterError):
        book_build.execute("one", root)


def test_the_command_fails_and_names_the_chapter(small_book):
    root = small_book("assert False")
    run = subprocess.run(
        [sys.executable, root / "book/_ext/build.py"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "book/one.py failed (log: " in run.stderr


def test_warning_in_a_cell_fails(small_book, book_build):
    root = small_book("import warnings\nwarnings.warn('careful')")
    with pytest.raises(book_build.ChapterError, match="stderr(.|\n)*careful"):
        book_build.execute("one", root)


@pytest.mark.parametrize("changed", ["accel_tf/code.py", "custom_ops/code.py", "requirements.lock"])
def test_outputs_are_reused_until_the_library_changes(changed, small_book, book_build):
    root = small_book("print('hello')")
    assert book_build.execute("one", root)[1] is False
    assert book_build.execute("one", root)[1] is True
    (root / "_build/.doctrees").mkdir()
    (root / changed).write_text("x = 2\n")
    assert book_build.execute("one", root)[1] is False
    assert not (root / "_build/.doctrees").exists(), "the page with the old outputs would stay"
