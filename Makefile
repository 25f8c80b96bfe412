# Two commands matter: `make quickstart` and `make test`. Both make .venv by themselves.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv ext ext-cuda gpu-check quickstart reason speak draw demo test miniature dali wandb mutants stress stress-serve lmms-eval lint types layers docs checks clean

# The first Python >= 3.12 that really runs (a pyenv shim may exist and refuse).
PYTHON := $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
FAST ?= 0
OVERWRITE ?= 0
PORT ?= 8000
TRIALS ?= 100
CLIENTS ?= 200
MINUTES ?= 5
CONTROLS ?= 0
SEEDS ?= 1
MODULES ?= data ops models training checkpoint
SEED ?= 0
COUNT ?= 40
OUT ?= runs/gpu_check
RUN ?= runs/quickstart
LMMS := .venv-lmms
KERNELS := megatron_omni/ops/_kernels.so
CSRC := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed $(KERNELS) ## make .venv and install the package with its test tools

# torch first: the build of csrc then uses this one instead of fetching its own (setup.py).
$(VENV)/.installed: pyproject.toml setup.py
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.12 or 3.13 found. Install one (Debian: apt-get install python3.12 python3.12-venv, or pyenv install 3.12) and run make again."; exit 1; }
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt-get install python3.12-venv)."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$($(BIN)/python -c 'import tomllib; print(*[d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")])')"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' 2>&1 | { grep -v '^WARNING: Location' || true; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["judge-voice"])') 2>&1 | { grep -v '^WARNING: Location' || true; }
	@touch $@

ext: venv ## compile what changed in csrc (CPU side)

$(KERNELS): $(CSRC) | $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace

ext-cuda: venv ## compile the CUDA side of csrc (needs nvcc, no GPU) and check what is in it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cuda-build"])') 2>&1 | { grep -v '^WARNING: Location' || true; }
	OMNI_BUILD_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python tools/check_cuda_objects.py

gpu-check: venv ## what a GPU says of all this, in 8 minutes, into the new folder OUT=DIR (docs/gpu.md)
	$(BIN)/python tools/gpu_check.py --out "$(OUT)"

quickstart: venv ## compose a small real corpus, train the tiny recipe, score it, show what it made (FAST=1: a few minutes; OVERWRITE=1)
	$(BIN)/python -m examples.quickstart.run $(if $(filter 1,$(FAST)),--fast) $(if $(filter 1,$(OVERWRITE)),--overwrite)

reason: venv ## teach the quickstart's model to think: cold start, GSPO, pairs, DPO, GSPO (FAST=1: two minutes; CONTROLS=1; SEEDS=3; OVERWRITE=1)
	$(BIN)/python -m examples.reason.run $(if $(filter 1,$(FAST)),--fast) $(if $(filter 1,$(OVERWRITE)),--overwrite) $(if $(filter 1,$(CONTROLS)),--controls) --seeds $(SEEDS)

speak: venv ## teach a tiny speech generator the quickstart's voices, and listen to it (FAST=1: two minutes; CONTROLS=1; OVERWRITE=1)
	$(BIN)/python -m examples.speak.run $(if $(filter 1,$(FAST)),--fast) $(if $(filter 1,$(OVERWRITE)),--overwrite) $(if $(filter 1,$(CONTROLS)),--controls)

draw: venv ## teach the quickstart's model to draw: pictures, edits, repairs, thoughts first (FAST=1: two minutes; CONTROLS=1; OVERWRITE=1)
	$(BIN)/python -m examples.draw.run $(if $(filter 1,$(FAST)),--fast) $(if $(filter 1,$(OVERWRITE)),--overwrite) $(if $(filter 1,$(CONTROLS)),--controls)

demo: venv ## serve the quickstart's model with a page to talk to it (trains it first where it is not there; PORT=8000)
	$(BIN)/python -m examples.serve.demo --port $(PORT)

# Whole files go to a worker, so that fixtures are made once; those that take longest begin (tests/conftest.py). Three
# processes for two cores: a quarter of the time tests wait, for time-outs, SLURM, servers and each other's ranks.
test: venv ## run the tests, JOBS=3 processes side by side (CPU, gloo)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not miniature" -n $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder --durations 10

miniature: venv ## every full recipe and layout with its own flags and small sizes on 2 to 4 ranks, 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.recipes

dali: venv ## install the DALI decoder (700 MB); `make test` then runs its tests on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dali"])') 2>&1 | { grep -v '^WARNING: Location' || true; }

wandb: venv ## install Weights & Biases (log.wandb_project); `make test` then runs its test, offline
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["wandb"])')

mutants: venv ## change MODULES in COUNT=40 small ways and list what no test sees, by hand (SEED=0); tools/mutants.py
	$(BIN)/python tools/mutants.py $(MODULES) --seed $(SEED) --count $(COUNT) --jobs $(or $(JOBS),2)

stress: venv ## random faults on small runs, random requests and both shapes of SLURM job, by hand (TRIALS=100); docs/reliability.md has results
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.stress.faults --trials $(TRIALS)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.stress.answers
	OMNI_STRESS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm tests/unit/test_flipped_bits.py

stress-serve: venv ## 200 clients of a server for five minutes, by hand (CLIENTS=200 MINUTES=5)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.stress.clients --clients $(CLIENTS) --minutes $(MINUTES)

# An environment of its own (6.4 GB): lmms-eval wants an older PyAV. filelock 4 has no `filelock._api`, which it imports.
lmms-eval: venv ## local tasks in the real lmms-eval against a server of RUN=runs/quickstart, by hand; docs/evaluation.md
	@[ -d "$(RUN)/data/eval" ] || { echo "error: $(RUN) has no held-out sets; make quickstart makes runs/quickstart"; exit 1; }
	[ -x $(LMMS)/bin/python ] || "$(PYTHON)" -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check uv 2>&1 | { grep -v '^WARNING: Location' || true; }
	$(LMMS)/bin/uv pip install --quiet --python $(LMMS)/bin/python lmms-eval==0.7.3 "filelock<4"
	$(LMMS)/bin/uv pip install --quiet --python $(LMMS)/bin/python --no-deps --reinstall ./examples/lmms_eval_plugin
	rm -rf runs/lmms_eval
	OMP_NUM_THREADS=1 $(BIN)/python -m megatron_omni.cli.evaluate "$(RUN)" --out runs/lmms_eval/evaluate --metric exact_match \
		--limit 10 --max-new-tokens 32 --tasks $(foreach set,image sound speech text video,"$(RUN)/data/eval/$(set).held_out.jsonl")
	OMP_NUM_THREADS=1 $(LMMS)/bin/python examples/lmms_eval_plugin/local_tasks.py --checkpoint "$(RUN)" --python $(BIN)/python \
		--data "$(RUN)/data/eval" --out runs/lmms_eval --against runs/lmms_eval/evaluate

lint: venv ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv ## mypy
	$(BIN)/mypy

layers: venv ## import-linter: the layers of docs/architecture.md
	$(BIN)/lint-imports

docs: venv ## regenerate docs/config.md from the dataclasses
	$(BIN)/python tools/config_docs.py --write

checks: lint types layers ## everything but the tests

clean: ## remove the environment and build products, keep runs/
	rm -rf $(VENV) $(LMMS) build *.egg-info megatron_omni/ops/*.so .mypy_cache .ruff_cache .pytest_cache
