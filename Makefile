# Everything runs in .venv, made from requirements.lock on first use.  `make help` lists the targets.
# To use an environment of your own (conda, say): make VENV=$CONDA_PREFIX book

VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
PACKAGES := $(VENV)/.accel-packages
INSTALLED := $(VENV)/.accel-installed
OP_SOURCES := $(shell find custom_ops -type f -not -path '*/tests/*')
# An editable installation has a list of the modules, made when it is installed.
MODULES := $(wildcard accel_tf/*/__init__.py)
export JUPYTER_PREFER_ENV_PATH = 1
export TF_CPP_MIN_LOG_LEVEL ?= 3
# The compiled op is built for this machine's users alone; pip's own notices are not theirs to mend.
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help book test test-full lab bench format lock clean tools browser

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(INSTALLED)  ## set up, execute the chapters, build _build/html/index.html
	@$(BIN)/python book/_ext/build.py

test: $(INSTALLED) browser  ## set up, run every test: library, op, chapters, pages in a browser
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-full: $(INSTALLED) browser  ## as test, and the long forms of tests too, which take hours
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "full or not full"

lab: $(INSTALLED)  ## open the chapters as notebooks in JupyterLab
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"python": "Jupytext Notebook"}}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	@$(BIN)/jupyter lab --notebook-dir=book $(if $(filter 0,$(shell id -u)),--allow-root)

bench: $(INSTALLED)  ## run the comparisons with peers; writes benchmarks/results
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

format: $(INSTALLED)  ## format and lint Python and C++ in place
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@find custom_ops -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format -i

lock:  ## resolve the pinned packages anew into requirements.lock (needs uv)
	@uv pip compile --quiet --universal --python-version 3.10 --no-annotate --all-extras \
		--constraint constraints.txt pyproject.toml -o requirements.lock

clean:  ## remove the environment and everything built
	rm -rf .venv _build build dist

tools:
	@test -n "$(PYTHON)" || { echo "Python 3.10 to 3.13 is needed: apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is needed: apt-get install python3-venv"; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || { echo "A C++17 compiler is needed: apt-get install g++"; exit 1; }

browser:
	@for b in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$b >/dev/null && exit 0; done; \
	install="apt-get update && apt-get install --yes chromium"; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium for the tests of the built pages" && sh -c "$$install" >/dev/null; \
	else echo "A Chromium browser is needed for the tests of the built pages: sudo sh -c '$$install'"; exit 1; fi

$(PACKAGES): requirements.lock
	@$(MAKE) --no-print-directory tools
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (4 GB, some minutes on the first run)"
	@$(BIN)/python -m pip install --quiet --requirement requirements.lock
	@touch $@

$(INSTALLED): $(PACKAGES) pyproject.toml $(OP_SOURCES) $(MODULES)
	@$(MAKE) --no-print-directory tools
	@echo "Compiling the op and installing accel_tf"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
