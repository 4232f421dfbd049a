# Everything here sets itself up: `make demo` and `make test` work on a clean clone with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-demo bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make .venv with every pinned package and the `conan` command

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "conan_jax needs Python >= 3.11, found " + sys.version.split()[0] + "; name another one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -e .
	@touch $(STAMP)

demo: $(STAMP)  ## train an embedder from scratch on your packages' documentation, then search it
	$(BIN)/conan demo

test: $(STAMP)  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-demo: $(STAMP)  ## the demo from nothing, twice: its figures must reach their bars and repeat
	$(BIN)/python tests/demo_acceptance.py

bench: $(STAMP)  ## all benchmarks, as JSON lines
	@for file in benchmarks/*.py; do $(BIN)/python $$file --json || exit 1; done

clean:  ## remove the environment and every run
	rm -rf $(VENV) runs build *.egg-info
