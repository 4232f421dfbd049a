# Each target installs what it needs: `make demo` and `make test` work on a clean clone with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU_VENV ?= .venv-tpu
TPU_STAMP := $(TPU_VENV)/.installed
EXTRAS_VENV ?= .venv-extras
EXTRAS_STAMP := $(EXTRAS_VENV)/.installed
JAX := $(shell sed -n 's/^jax==//p' requirements.txt)
# Benchmarks of time or memory that run anywhere. tpu_compile needs the environment of test-tpu; two compare with PyTorch.
AGAINST_TORCH := benchmarks/encode.py benchmarks/train_step.py
BENCHMARKS := $(filter-out %/timing.py %/tpu_compile.py $(AGAINST_TORCH),$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help env shell demo test test-demo test-extras test-tpu test-slurm bench bench-torch clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## install .venv: pinned packages and the `conan` command (a few minutes, 1.1 GB)

shell: $(STAMP)  ## open a shell in which `conan` and `python` are those of .venv
	@echo "conan and python are now those of $(VENV); leave with exit"
	@PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath $(VENV))" exec $${SHELL:-/bin/sh}

$(STAMP): MORE :=
$(STAMP): SIZE := 1.1 GB
$(TPU_STAMP): MORE := "jax[tpu]==$(JAX)"
$(TPU_STAMP): SIZE := 2.4 GB
$(EXTRAS_STAMP): MORE := -r tests/extras/requirements.txt
$(EXTRAS_STAMP): SIZE := 2.3 GB
$(STAMP) $(TPU_STAMP) $(EXTRAS_STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "conan_jax needs Python >= 3.11, found " + sys.version.split()[0] + "; name another one with PYTHON=...")'
	@echo "Installing into $(@D): two to six minutes, $(SIZE) on disk. pip lists the packages and prints little while it unpacks them."
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --progress-bar off --disable-pip-version-check --no-compile -r requirements.txt $(MORE)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --config-settings editable_mode=compat -e .
	@touch $@
	@echo "Installed. Type $(@D)/bin/conan, or activate the environment: . $(@D)/bin/activate"

demo: $(STAMP)  ## train an embedder from scratch on your packages' documentation (six minutes after the installation, 0.5 GB)
	$(BIN)/conan demo

test: $(STAMP)  ## the test suite, without the tests that have their own target
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/slurm --ignore tests/extras

test-demo: $(STAMP) $(EXTRAS_STAMP)  ## the demo twice: metrics above their limits and equal in both runs, export equal in PyTorch
	$(BIN)/python tests/demo_acceptance.py $(EXTRAS_VENV)/bin/python

$(EXTRAS_STAMP): tests/extras/requirements.txt
test-extras: $(EXTRAS_STAMP)  ## compare exports with PyTorch, sentence-transformers and mteb; check manifests and scripts
	$(EXTRAS_VENV)/bin/python -m pytest -rs -n 2 --dist loadfile tests/extras tests/launch

test-tpu: $(TPU_STAMP)  ## compile kernels and full-size steps for TPU pods, without a TPU (1.3 GB of libtpu)
	$(TPU_VENV)/bin/python -m pytest -rs tests/tpu
	$(TPU_VENV)/bin/python benchmarks/tpu_compile.py --check

test-slurm: $(STAMP)  ## run a rendered job on a local one-node SLURM: preempted, requeued, completed
	$(BIN)/python -m pytest -rs tests/slurm

bench: $(STAMP)  ## all benchmarks without PyTorch, as JSON lines
	@for file in $(BENCHMARKS); do $(BIN)/python $$file --json || exit 1; done

bench-torch: $(EXTRAS_STAMP)  ## benchmarks against PyTorch and sentence-transformers, as JSON lines
	@for file in $(AGAINST_TORCH); do $(EXTRAS_VENV)/bin/python $$file --json || exit 1; done

clean:  ## remove the environments and all runs
	rm -rf $(VENV) $(TPU_VENV) $(EXTRAS_VENV) runs build *.egg-info
