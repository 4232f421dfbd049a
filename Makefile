# Everything here sets itself up: `make demo` and `make test` work on a clean clone with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU_VENV ?= .venv-tpu
TPU_STAMP := $(TPU_VENV)/.installed
EXTRAS_VENV ?= .venv-extras
EXTRAS_STAMP := $(EXTRAS_VENV)/.installed
JAX := $(shell sed -n 's/^jax==//p' requirements.txt)
# What times or weighs something wherever it runs; tpu_compile needs the environment of test-tpu, two compare with PyTorch.
AGAINST_TORCH := benchmarks/encode.py benchmarks/train_step.py
BENCHMARKS := $(filter-out %/timing.py %/tpu_compile.py $(AGAINST_TORCH),$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help env demo test test-demo test-extras test-tpu test-slurm bench bench-torch clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make .venv with every pinned package and the `conan` command

$(STAMP): MORE :=
$(TPU_STAMP): MORE := "jax[tpu]==$(JAX)"
$(EXTRAS_STAMP): MORE := -r tests/extras/requirements.txt
$(STAMP) $(TPU_STAMP) $(EXTRAS_STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "conan_jax needs Python >= 3.11, found " + sys.version.split()[0] + "; name another one with PYTHON=...")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt $(MORE)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -e .
	@touch $@

demo: $(STAMP)  ## train an embedder from scratch on your packages' documentation, then search it
	$(BIN)/conan demo

test: $(STAMP)  ## the test suite, save what has a target of its own
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/slurm --ignore tests/extras

test-demo: $(STAMP) $(EXTRAS_STAMP)  ## the demo from nothing, twice: its figures must reach their bars and repeat, its export hold in PyTorch
	$(BIN)/python tests/demo_acceptance.py $(EXTRAS_VENV)/bin/python

$(EXTRAS_STAMP): tests/extras/requirements.txt
test-extras: $(EXTRAS_STAMP)  ## exports held to PyTorch, sentence-transformers and mteb; manifests and scripts to their published checkers
	$(EXTRAS_VENV)/bin/python -m pytest -rs -n 2 --dist loadfile tests/extras tests/launch

test-tpu: $(TPU_STAMP)  ## kernels, preflights and full-size steps compiled for TPU pods, without a TPU (1.3 GB of libtpu)
	$(TPU_VENV)/bin/python -m pytest -rs tests/tpu
	$(TPU_VENV)/bin/python benchmarks/tpu_compile.py --check

test-slurm: $(STAMP)  ## a rendered job on a real SLURM, on loopback: preempted, requeued, completed
	$(BIN)/python -m pytest -rs tests/slurm

bench: $(STAMP)  ## all benchmarks, as JSON lines
	@for file in $(BENCHMARKS); do $(BIN)/python $$file --json || exit 1; done

bench-torch: $(EXTRAS_STAMP)  ## encoding and training against PyTorch and sentence-transformers, as JSON lines
	@for file in $(AGAINST_TORCH); do $(EXTRAS_VENV)/bin/python $$file --json || exit 1; done

clean:  ## remove the environments and every run
	rm -rf $(VENV) $(TPU_VENV) $(EXTRAS_VENV) runs build *.egg-info
