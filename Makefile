# `make demo` and `make test` do everything from a fresh clone: Python 3.11 or later, make and a
# package index are all they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-cloud torture check gpu-check bench gpu-bench format clean

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
	SKY_PYTHON=$(abspath $(SKY_VENV))/bin/python $(BIN)/python -m pytest tests/cloud tests/render/test_cloud.py

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
# plans say of memory, of the host's too, and of speed against what is measured, ten minutes, written
# to docs/benchmarks/.
gpu-check: setup
	$(BIN)/python -m pytest --override-ini addopts="-ra --import-mode=importlib" tests/gpu
	$(BIN)/python benchmarks/offload_on_gpu.py --seconds 120
	$(BIN)/python benchmarks/memory_on_gpu.py --seconds 420

# Beside what a person would run instead: trainings, scoring, predicting, scaling and start-up, on a
# quiet machine; pages go to docs/benchmarks/. The peers want versions of small packages that we do
# not, so they get an environment of their own that sees ours. BENCH_DATA=FOLDER has real texts,
# ag_news/ and imdb/; NANOGPT=FOLDER a copy of nanoGPT, which nobody can install.
BENCH_VENV ?= build/bench-venv
BENCH_BIN := $(BENCH_VENV)/bin
BENCH_DATA ?=
NANOGPT ?=
PEERS := trl==1.16.0 litgpt==0.5.13 lm_eval==0.4.13 lightning==2.6.6 lightning-utilities==0.15.3 \
	torchmetrics==1.9.0 jsonargparse==4.53.0 docstring-parser==0.18.0 typeshed-client==2.14.0 \
	importlib_resources==7.1.0
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
bench: setup
	[ -x $(BENCH_BIN)/python ] || $(PYTHON) -m venv $(BENCH_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(BENCH_BIN)/python $(PURELIB))/ours.pth"
	$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PEERS)
	$(BENCH_BIN)/python benchmarks/training_peers.py $(if $(BENCH_DATA),--data $(BENCH_DATA)) \
		$(if $(NANOGPT),--nanogpt $(NANOGPT))
	OMP_NUM_THREADS=1 $(BENCH_BIN)/python benchmarks/scoring_peers.py \
		$(if $(BENCH_DATA),--data $(BENCH_DATA))
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/prediction.py \
		$(if $(BENCH_DATA),--data $(BENCH_DATA))
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/start_up.py

# Scores beside a naive loop's on a GPU, our training beside Trainer's and nanoGPT's, and where a
# step's time goes: ten minutes, written to docs/benchmarks/. NANOGPT is a folder with a copy of
# nanoGPT; without it that is left out.
gpu-bench: setup
	$(BIN)/python benchmarks/scoring_on_gpu.py --seconds 60; scores=$$?; \
		$(BIN)/python benchmarks/gpu_bench.py --seconds 440 \
			$(if $(NANOGPT),--nanogpt $(NANOGPT)) && exit $$scores

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
