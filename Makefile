# Two commands on a fresh clone do all set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-for-development
OUTPUT ?= runs
RECIPE ?= quickstart
MODEL ?= $(OUTPUT)/$(RECIPE)/model
# of make export: merged, llava, onnx, torch_export or gguf
FORMAT ?= merged
# of make docker: cpu or cuda, and the name of the image and its tag
VARIANT ?= cpu
IMAGE ?= eyespot
TAG ?= $(VARIANT)
# another transformers than the pinned one: make test TRANSFORMERS='==5.18.*'
TRANSFORMERS ?=
export CONSTRAINTS := $(if $(TRANSFORMERS),.constraints.txt,constraints.txt)
export TOKENIZERS_PARALLELISM := false
# glibc keeps freed buffers instead of asking the kernel for the same pages again at every step
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 17179869184

# of the 26,000 modules that are installed, those that are imported are compiled, once
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help install demo test pytest lint format scratch clean plan serve export pipeline build publish docker docker-push \
  download space

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(DEV) ## Create the virtual environment and install everything

# what the environment was made with: other constraints install anew
$(VENV)/.constraints: $(CONSTRAINTS) FORCE
	@mkdir -p $(VENV)
	@cmp --silent $< $@ || cp $< $@

# torch comes first, at the pinned version, so that no later requirement pulls another build of it
$(STAMP): pyproject.toml $(VENV)/.constraints
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[quickstart,train]"
	touch $(STAMP)

$(DEV): $(STAMP)
	$(PIP) --editable ".[dev]"
	touch $(DEV)

# an extra of pyproject.toml beside what is there
$(VENV)/.with-%: $(STAMP)
	$(PIP) --editable ".[$*]"
	touch $@

# the pins of what another transformers may need otherwise are left out
.constraints.txt: constraints.txt FORCE
	sed -e 's/^transformers==.*/transformers$(TRANSFORMERS)/' -e '/^tokenizers==/d' -e '/^huggingface_hub==/d' $< > $@.new
	cmp --silent $@.new $@ && rm $@.new || mv $@.new $@

FORCE:

demo: $(STAMP) ## Train the quickstart on two CPU cores, evaluate it, write model, report.json and report.html
	$(BIN)/eyespot train recipe=quickstart output_dir=$(OUTPUT) --fresh

scratch: $(STAMP) ## The same task with own ViT and own GPT from random weights
	$(BIN)/eyespot train recipe=scratch_tiny output_dir=$(OUTPUT) --fresh

# mypy takes one core for a minute: the tests begin meanwhile; it checks against the pinned transformers alone, because
# annotations differ between versions
test: $(DEV) ## Lint, type-check and test with coverage, on all cores (no network)
	@$(MAKE) --no-print-directory --jobs=2 $(if $(TRANSFORMERS),,lint) pytest

pytest: $(DEV) ## The tests alone
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=term --cov-fail-under=90

lint: $(DEV) ## ruff and mypy; hadolint and schemas for the files of Docker and GitHub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml compose.cuda.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(DEV) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plan: $(STAMP) $(if $(findstring scenes,$(RECIPE)),$(VENV)/.with-scenes) ## Predict parameters, memory, time and cost of RECIPE
	$(BIN)/eyespot plan recipe=$(RECIPE)

serve: $(VENV)/.with-serve ## Serve MODEL: the page and OpenAI's API on port 8000
	$(BIN)/eyespot serve $(MODEL)

export: $(STAMP) $(addprefix $(VENV)/.with-,$(filter onnx gguf,$(FORMAT))) ## Write MODEL as FORMAT for other programs, and compare it with ours
	$(BIN)/eyespot export $(MODEL) $(FORMAT) --out $(OUTPUT)/export/$(FORMAT)

pipeline: $(VENV)/.with-pipeline ## Prepare, train, evaluate and export what params.yaml says (DVC)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc repro

build: $(VENV)/.with-release ## Wheel and source archive in dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

publish: $(VENV)/.with-release ## Send dist to the package index
	$(BIN)/twine upload dist/*

docker: ## Build the image of VARIANT (cpu, cuda)
	docker build --build-arg VARIANT=$(VARIANT) --tag $(IMAGE):$(TAG) .

docker-push: docker ## Build the image and send it to the registry that IMAGE names
	docker push $(IMAGE):$(TAG)

# names from others reach the shell as variables, never as parts of a command
download space: export MODEL := $(MODEL)

download: $(STAMP) ## Fetch the model REPO from the Hugging Face Hub to MODEL
	$(BIN)/eyespot download "$$REPO" --out "$$MODEL"

space: $(VENV)/.with-serve ## Check that MODEL looks at pictures and show its Space REPO; SEND=1 sends it
	set -f; $(BIN)/eyespot push "$$MODEL" "$$REPO" $$QUESTIONS --space $(if $(SEND),--yes)

clean: ## Remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist
