# Two commands on a fresh clone do all set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-for-development
OUTPUT ?= runs
export TOKENIZERS_PARALLELISM := false
# glibc keeps freed buffers instead of asking the kernel for the same pages again at every step
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 17179869184

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format scratch clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(DEV) ## Create the virtual environment and install everything

# torch comes first, at the pinned version, so that no later requirement pulls another build of it
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,train]"
	touch $(STAMP)

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(DEV)

demo: $(STAMP) ## Train the quickstart on two CPU cores, evaluate it, write model, report.json and report.html
	$(BIN)/eyespot train recipe=quickstart output_dir=$(OUTPUT) --fresh

scratch: $(STAMP) ## The same task with own ViT and own GPT from random weights
	$(BIN)/eyespot train recipe=scratch_tiny output_dir=$(OUTPUT) --fresh

test: $(DEV) lint ## Lint, type-check and test with coverage, on all cores (no network)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term --cov-fail-under=90

lint: $(DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist
