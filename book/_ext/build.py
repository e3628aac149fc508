"""Execute the chapters, once per state of the library, and build the book.

    python book/_ext/build.py                   # execute what changed, then build _build/html
    python book/_ext/build.py --execute pruning  # execute one chapter only

The outputs lie in the cache that Jupyter Book reads, so the tests and the build share them. That
cache keys on a chapter's code cells alone; this module empties it when the library, the compiled op
or the pinned packages change, which would otherwise leave old numbers in the book.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[2]
# What a chapter's outputs depend on besides its own cells.
SOURCES = ("accel_tf", "custom_ops", "requirements.lock")
TIMEOUT = 600  # seconds for one cell


class ChapterError(Exception):
    """A chapter did not run through; the message names the chapter and the cell."""


def chapters(root: Path = ROOT) -> list[str]:
    """Returns the names of the executable chapters, in the order of `_toc.yml`."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    return [Path(f).name for f in files if (root / f"{f}.py").exists()]


def sources_hash(root: Path = ROOT) -> str:
    """Returns a hash of everything that can change the outputs of all chapters."""
    digest = hashlib.sha256(platform.python_version().encode())
    for source in SOURCES:
        top = root / source
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(
                    str(file.relative_to(root)).encode() + b"\0" + file.read_bytes()
                )
    return digest.hexdigest()


def fresh_cache(root: Path = ROOT):
    """Returns the execution cache, emptied, with the pages built from it, if it is out of date."""
    build = root / "_build"
    key = build / "sources.sha256"
    with _lock(build, "cache"):
        current = sources_hash(root)
        if not key.exists() or key.read_text() != current:
            for stale in (".jupyter_cache", ".doctrees"):
                shutil.rmtree(build / stale, ignore_errors=True)
            key.write_text(current)
        cache = get_cache(build / ".jupyter_cache")
        _ = cache.db  # creates the tables while we hold the lock
        return cache


def execute(name: str, root: Path = ROOT) -> tuple[float, bool]:
    """Executes one chapter, unless its outputs are in the cache already.

    Args:
        name: The chapter's file name without `.py`.
        root: The root of the repository.

    Returns:
        `(seconds, cached)`: the time that its execution took, and whether that was earlier.

    Raises:
        ChapterError: A cell raised or timed out, or wrote to stderr where readers would see it.
    """
    path = root / "book" / f"{name}.py"
    notebook = jupytext.read(path, fmt="py:percent")
    cache = fresh_cache(root)
    with _lock(root / "_build", f"chapter-{name}"):
        try:
            record = cache.match_cache_notebook(notebook)
            return record.data["execution_seconds"], True
        except KeyError:
            pass
        start = time.perf_counter()
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            # Time stamps in the cells' metadata would be hashed, and never matched, by the cache.
            record_timing=False,
            # Else each kernel warns that its sockets, which listen on loopback only, are not encrypted.
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(path.parent)}},
        )
        # What libraries write past Python, as TensorFlow does when it starts, is not for the console.
        log = root / "_build" / f"{name}.log"
        try:
            with open(log, "w") as stderr:
                client.execute(stderr=stderr)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise ChapterError(
                f"Chapter book/{name}.py failed (log: {log}):\n{error}"
            ) from None
        _check_outputs(notebook, name)
        seconds = time.perf_counter() - start
        with _lock(root / "_build", "cache"):
            cache.cache_notebook_bundle(
                CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds}),
                check_validity=False,
                overwrite=True,
            )
        # Sphinx goes by the source's time stamp and would keep the page with the old outputs.
        shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)
        return seconds, False


def execute_all(names: list[str], root: Path = ROOT, jobs: int = 1) -> None:
    """Executes chapters side by side, printing a line for each; raises after the last has ended."""
    errors = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(execute, name, root): name for name in names}
        for done in concurrent.futures.as_completed(futures):
            name = futures[done]
            try:
                seconds, cached = done.result()
                print(
                    f"  {name:<24}{seconds:6.1f} s{'  (unchanged)' if cached else ''}",
                    flush=True,
                )
            except ChapterError as error:
                print(f"  {name:<24}FAILED", flush=True)
                errors.append(str(error))
    if errors:
        raise ChapterError("\n\n".join(errors))


def build(root: Path = ROOT) -> Path:
    """Builds the HTML book, warnings being errors, and returns the path of its first page."""
    with _lock(root / "_build", "html"):
        jupyter_book = Path(sys.executable).with_name("jupyter-book")
        command = [jupyter_book, "build", "-W", "--keep-going", "."]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if result.returncode:
            # A page once read is not read, and so not warned about, again.
            shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)
            problems = [
                line
                for line in result.stderr.splitlines()
                if not line.startswith(
                    ("I0000", "WARNING: All log messages before absl")
                )
            ]
            raise ChapterError("jupyter-book failed:\n" + "\n".join(problems[-60:]))
    return root / "_build" / "html" / "index.html"


def _check_outputs(notebook, name: str) -> None:
    hidden = {"remove-cell", "remove-output"}
    for i, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        for output in cell.get("outputs", ()):
            shown = not hidden & set(cell.metadata.get("tags", ()))
            if shown and output.get("name") == "stderr":
                raise ChapterError(
                    f"Chapter book/{name}.py: code cell {i} writes to stderr, where readers would "
                    f"see it:\n{cell.source}\n--\n{output['text'][:2000]}"
                )


@contextlib.contextmanager
def _lock(build: Path, name: str):
    """Serialises the processes (test workers, builds) that share `_build`."""
    folder = build / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "chapters", nargs="*", help="names of chapters; all of them by default"
    )
    parser.add_argument(
        "--execute", action="store_true", help="execute only, build no pages"
    )
    # Chapters measure times, which a neighbour on the same cores would spoil.
    parser.add_argument(
        "--jobs", type=int, default=1, help="chapters side by side (default: 1)"
    )
    args = parser.parse_args()
    unknown = set(args.chapters) - set(chapters())
    if unknown:
        parser.error(
            f"no such chapter: {', '.join(unknown)}; there are {', '.join(chapters())}"
        )
    # Inherited by the kernels.
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", PYDEVD_DISABLE_FILE_VALIDATION="1")
    try:
        print("Executing the chapters")
        execute_all(args.chapters or chapters(), jobs=args.jobs)
        if not args.execute:
            print("Building the pages")
            print(f"The book is at file://{build()}")
    except ChapterError as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
