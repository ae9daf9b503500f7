# `make demo` and `make test` do everything from a fresh clone: Python 3.11 or later, make and a
# package index are all they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-cloud torture check gpu-check format clean

setup: $(INSTALLED)

# torch first: its exact pin takes a CPU build where there is one, and nothing later replaces it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "accel-gpt2 needs Python 3.11 or later, and $(PYTHON) is %d.%d: type make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/accel-gpt2 demo

# Format, lint, types, import rules and generated files, then every test.
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

# The real SkyPilot reads every task, in an environment of its own: it and huggingface_hub need
# different versions of click. 98 packages, half a gigabyte; nothing is rented.
SKY_VENV ?= build/sky-venv
test-cloud: setup
	[ -x $(SKY_VENV)/bin/sky ] || $(PYTHON) -m venv $(SKY_VENV)
	$(SKY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check skypilot==0.14.1
	SKY_PYTHON=$(abspath $(SKY_VENV))/bin/python $(BIN)/python -m pytest tests/cloud tests/render/test_cloud.py --torture

# Hundreds of kills and signals and thousands of malformed inputs, half an hour; the counts go to
# docs/benchmarks/. TORTURE_SEED=1 draws other moments.
TORTURE_SEED ?= 0
torture: setup
	$(BIN)/python -m pytest tests/breaking tests/fuzz --numprocesses 2 --dist loadscope \
		--torture --torture-seed $(TORTURE_SEED) \
		--torture-report docs/benchmarks/$$(date +%F)-torture.md

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# What only a GPU can show: precision, memory that really runs out, resume on the card; then what
# plans say of memory and speed against what is measured, ten minutes, written to docs/benchmarks/.
gpu-check: setup
	$(BIN)/python -m pytest --override-ini addopts="-ra --import-mode=importlib" tests/gpu
	$(BIN)/python benchmarks/memory_on_gpu.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
