# Needs make and Python 3.11 or newer with venv; everything else is installed into .venv by pip.
# On a machine without a GPU pip still takes torch's CUDA build from the default index. For the small CPU build, pass its
# index or a wheel folder: make demo PIP_ARGS="--extra-index-url …" or PIP_ARGS="--find-links …".
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
PIP_ARGS ?=
MODEL ?=
# Another, such as "buildah bud --format docker", or "docker buildx build --push" with a registry's IMAGE_PREFIX.
IMAGE_BUILDER ?= docker build
IMAGE_PREFIX ?= fewstep-
IMAGE_TAG ?= latest
IMAGE_ARGS ?=
GPU_TUNING ?= --channels-last --compile --tf32 --cudnn-benchmark
VENV := .venv
BIN := $(VENV)/bin
FEWSTEP := $(BIN)/fewstep
IMG2DATASET := .venv-img2dataset
export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install install-dev img2dataset demo test test-long manifests lint types contracts format teacher serve gpu-check images constraints clean

help: ## Show what make can do
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Only pip needs the interpreter to be checked: whoever gets past this line has a working .venv.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "fewstep: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fewstep: $$($(PYTHON) --version 2>&1) is too old; Python 3.11 or newer is needed. Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "fewstep: $$($(PYTHON) --version) comes without venv. On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install --progress-bar off $(PIP_ARGS) -c constraints.txt -e '.[demo]'
	@touch $@

# dev holds everything that demo holds.
$(VENV)/.installed-dev: $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install --progress-bar off $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

install: $(VENV)/.installed-demo ## Make .venv with all that the demo needs

install-dev: $(VENV)/.installed-dev ## The same, and what the tests need

# img2dataset needs older libraries than fewstep has, so it runs in an environment of its own.
$(IMG2DATASET)/.installed: docker/prepare/requirements.txt docker/prepare/constraints.txt | $(BIN)/pip
	$(PYTHON) -m venv $(IMG2DATASET)
	$(IMG2DATASET)/bin/pip install --progress-bar off $(PIP_ARGS) -c docker/prepare/constraints.txt -r docker/prepare/requirements.txt
	@touch $@

img2dataset: $(IMG2DATASET)/.installed ## Make .venv-img2dataset, with what downloads pictures that metadata name

demo: install ## Run the main job from end to end on this machine (at most 15 minutes on 2 cores)
	$(FEWSTEP) demo

# Processes of one thread each; more of them than cores, as tests also wait for servers and for programs that begin.
TEST_PROCESSES ?= 3

test: install-dev ## Run every check, and the tests that need no GPU and take no minutes
	@$(MAKE) --no-print-directory -j2 --output-sync lint types contracts img2dataset
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not gpu and not long"

test-long: install-dev ## Run the tests that take minutes: whole proofs, and further ways to die
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

lint: install-dev ## Check style and format (ruff)
	$(BIN)/ruff check src tests workflows
	$(BIN)/ruff format --check src tests workflows

types: install-dev ## Check types (mypy)
	$(BIN)/mypy

contracts: install-dev ## Check which room uses which (import-linter)
	$(BIN)/lint-imports

format: install-dev ## Put the code into the house format
	$(BIN)/ruff check --fix src tests workflows
	$(BIN)/ruff format src tests workflows

teacher: install ## Train an emoji teacher like the shipped one, from its recipe
	$(FEWSTEP) run workflows/recipes/emoji-teacher.yaml

serve: install ## Serve over HTTP: make serve MODEL=models:/NAME@champion; without MODEL the demo's, or a shipped student
	$(FEWSTEP) serve $(MODEL)

gpu-check: install-dev ## Run the GPU tests and the benchmarks on one GPU, and write the table in docs/benchmarks.md
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "fewstep: torch sees no CUDA device, so make gpu-check has nothing to check. Run it on a machine with a GPU and torch's CUDA build." >&2; exit 2; }
	$(BIN)/python -m pytest -m gpu tests/gpu
	@mkdir -p runs/gpu-check
	$(FEWSTEP) bench train --shape sd15 --json > runs/gpu-check/train.json
	$(FEWSTEP) bench train --shape sd15 $(GPU_TUNING) --json > runs/gpu-check/train-tuned.json
	$(FEWSTEP) bench train --shape sd15 --variants checkpoint,channels_last+compile --json > runs/gpu-check/train-variants.json
	$(FEWSTEP) bench sample --shape sd15 --json > runs/gpu-check/sample.json
	$(FEWSTEP) bench sample --shape sd15 $(GPU_TUNING) --json > runs/gpu-check/sample-tuned.json
	$(FEWSTEP) bench sample --shape sd15 --batch-size 1 --json > runs/gpu-check/sample-one.json
	$(FEWSTEP) bench table runs/gpu-check/{train,train-tuned,train-variants,sample,sample-tuned,sample-one}.json --into docs/benchmarks.md

images: image-training image-serving image-prepare image-mlflow ## Build the images fewstep-training, -serving, -prepare and -mlflow (PIP_ARGS for torch's CPU build)

image-%: docker/%/Dockerfile
	$(IMAGE_BUILDER) -f $< -t $(IMAGE_PREFIX)$*:$(IMAGE_TAG) --build-arg PIP_ARGS="$(PIP_ARGS)" \
	  --build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --match= 2>/dev/null)" $(IMAGE_ARGS) .

constraints: install-dev ## Write constraints.txt from what .venv holds
	{ echo "# The set of versions that the tests ran with, on Python 3.11. Made by: make constraints"; \
	  $(BIN)/pip freeze --all --exclude fewstep --exclude pip --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
	touch $(VENV)/.installed-demo $(VENV)/.installed-dev

manifests: install-dev ## Write the workflows and RayJobs anew from workflows/rayjob.yaml.in and workflows/generate.py
	$(BIN)/python workflows/generate.py

clean: ## Take out both environments, caches, runs and the local store
	rm -rf $(VENV) $(IMG2DATASET) .fewstep runs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
