# `make demo` and `make test` are all that a fresh machine needs (python3, pip, git, make): each makes its own
# environment. The others are for those who change the code; see CONTRIBUTING.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_BIN := .venv-proto/bin
IMAGE := build/contract.binpb
RELEASED_IMAGE := proto/released.binpb

.PHONY: help demo test test-lowest check format proto proto-check proto-release serve bench wheel clean

help: ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv-demo/ready ## Run the federation on real data and draw a chart
	.venv-demo/bin/python -m fmi_demo

test: $(VENV)/ready ## Run all tests
	$(BIN)/python -m pytest

test-lowest: .venv-lowest/ready ## Run all tests with the lowest versions that we declare
	.venv-lowest/bin/python -m pytest

check: $(VENV)/ready .venv-proto/ready ## Check format, lint, types, imports, contract, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory proto-check

format: $(VENV)/ready .venv-proto/ready ## Format the code and the contract
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/buf format --write proto --path proto/fmi

proto: .venv-proto/ready ## Generate the code of the contract
	$(PROTO_BIN)/python tools/generate_proto.py

proto-check: $(VENV)/ready .venv-proto/ready ## Check the contract and its generated code
	$(BIN)/buf format --diff --exit-code proto --path proto/fmi
	$(PROTO_BIN)/python tools/generate_proto.py --image $(IMAGE)
	$(BIN)/buf lint $(IMAGE) --config buf.yaml --path fmi
	$(BIN)/buf breaking $(IMAGE) --config buf.yaml --against $(RELEASED_IMAGE) --path fmi
	$(PROTO_BIN)/python tools/generate_proto.py --check

proto-release: $(VENV)/ready .venv-proto/ready ## Keep the contract as the one that later changes are compared with
	$(PROTO_BIN)/python tools/generate_proto.py --image $(IMAGE)
	$(BIN)/buf build $(IMAGE) --exclude-source-info --output $(RELEASED_IMAGE)

serve: $(VENV)/ready ## Run a development server on 127.0.0.1:50061
	$(BIN)/fmi-server serve --data-dir fmi-data

bench: $(VENV)/ready ## Measure the hot paths beside bare references, in one run
	$(BIN)/python benchmarks/emit.py

wheel: $(VENV)/ready ## Build the wheel and the source distribution
	$(BIN)/python -m build

clean: ## Remove environments and what was built
	rm -rf $(VENV) .venv-proto .venv-demo .venv-lowest build dist demo-output .mypy_cache .ruff_cache .pytest_cache

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --editable '.[demo]'
	@touch $@

.venv-lowest/ready: pyproject.toml requirements/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint requirements/lowest.txt --editable '.[dev]'
	@touch $@

.venv-proto/ready: requirements/proto.txt
	$(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/python -m pip install --quiet --requirement requirements/proto.txt
	@touch $@
