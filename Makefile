# `make demo` and `make test` are all that a fresh machine needs (python3, pip, git, make): each makes its own
# environment. The others are for those who change the code; see CONTRIBUTING.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_BIN := .venv-proto/bin
IMAGE := build/contract.binpb
RELEASED_IMAGE := proto/released.binpb
ENGINE ?= docker
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
FMI_TORTURE_MINUTES ?= 60
FMI_SOAK_MINUTES ?= 30
FMI_CLUSTER_ROUNDS ?= 100
FMI_FUZZ_INPUTS ?= 150000
FMI_SEARCHES ?= 10

.PHONY: help demo demo-cluster test test-lowest search torture torture-cluster torture-versions soak fuzz check check-deploy image format proto proto-check proto-release serve bench bench-aggregation bench-cluster bench-confidence bench-jetstream bench-peers bench-privacy bench-quotas bench-scaling bench-start bench-warm-start privacy-error bench-abuse wheel clean

help: ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: .venv-demo/ready ## Run the federation on real data and draw a chart
	.venv-demo/bin/python -m fmi_demo

demo-cluster: .venv-demo/cluster ## The same through three brokers and three servers, of which one of each is killed
	.venv-demo/bin/python -m fmi_demo --cluster --output demo-cluster-output

test: $(VENV)/ready ## Run all tests
	$(BIN)/python -m pytest

test-lowest: .venv-lowest/ready ## Run all tests with the lowest versions that we declare
	.venv-lowest/bin/python -m pytest

search: $(VENV)/ready ## Try other examples of every property, FMI_SEARCHES times
	for _ in $$(seq $(FMI_SEARCHES)); do $(BIN)/python -m pytest -m hypothesis --hypothesis-profile search || exit 1; done

torture: $(VENV)/ready ## Kill a server under load again and again, for FMI_TORTURE_MINUTES
	$(BIN)/python tests/robustness/torture.py --minutes $(FMI_TORTURE_MINUTES)

torture-cluster: $(VENV)/ready ## Kill, freeze and cut off servers and brokers of a cluster under load, 100 times
	$(BIN)/python tests/robustness/cluster_torture.py --rounds $(FMI_CLUSTER_ROUNDS)

torture-versions: $(VENV)/ready ## Upgrade and downgrade servers of a cluster under load; FMI_OLDER is a checkout of the older version
	$(BIN)/python tests/robustness/cluster_versions.py --older $(FMI_OLDER)

soak: $(VENV)/ready ## Watch a server under a steady load, for FMI_SOAK_MINUTES, and draw it
	$(BIN)/python -m benchmarks.soak --minutes $(FMI_SOAK_MINUTES)

fuzz: .venv-fuzz/ready ## Fuzz all that takes bytes from others, FMI_FUZZ_INPUTS inputs for each of eight targets
	.venv-fuzz/bin/python tests/fuzz/fuzz.py --inputs $(FMI_FUZZ_INPUTS)

check: $(VENV)/ready .venv-proto/ready ## Check format, lint, types, imports, contract, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory proto-check

check-deploy: .venv-deploy/ready ## Check the container file, compose, the chart and the unit with what reads them
	.venv-deploy/bin/python -m pytest tests/packaging/test_deployment.py tests/packaging/test_chart.py

image: ## Build the container image with docker, or ENGINE=podman
	$(ENGINE) build --file Containerfile --tag fmi-server:$(VERSION) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD) $(IMAGE_FLAGS) .

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

bench-abuse: $(VENV)/ready ## Attack a server from the network, and see what an honest site feels of it
	$(BIN)/python -m benchmarks.abuse

bench: $(VENV)/ready ## Measure the hot paths beside bare references, in one run
	$(BIN)/python benchmarks/emit.py

bench-aggregation: $(VENV)/ready ## Measure the aggregation core beside numpy and scipy, in one run
	$(BIN)/python -m benchmarks.aggregation

bench-peers: .venv-bench-peers/ready ## The same beside Flower; and ByzFL, where it is installed
	.venv-bench-peers/bin/python -m benchmarks.aggregation

bench-cluster: $(VENV)/ready ## Measure one, two and three servers on one store, and failover
	$(BIN)/python -m benchmarks.cluster

bench-confidence: $(VENV)/ready ## Simulate what a stated confidence holds, and draw it
	$(BIN)/python benchmarks/confidence.py

bench-jetstream: $(VENV)/ready ## Measure the store at NATS JetStream brokers beside bare publishing, in one run
	$(BIN)/python -m benchmarks.jetstream

bench-privacy: $(VENV)/ready ## Attack the private mechanism, and broken ones
	$(BIN)/python -m benchmarks.privacy

privacy-error: $(VENV)/ready ## Simulate the error of private releases by sites and signals, and draw it
	$(BIN)/python -m benchmarks.privacy.error --plot build/privacy-error.png
	$(BIN)/python -m benchmarks.privacy.clipping

bench-quotas: $(VENV)/ready ## Measure what a site feels of another one that sends ten times its quota
	$(BIN)/python -m benchmarks.quotas

bench-scaling: $(VENV)/ready ## Measure what grows with what, plan with it, simulate levels; writes docs/scaling.md
	$(BIN)/python -m benchmarks.scaling all

bench-start: $(VENV)/ready ## Measure how long a server with many packets takes to be ready
	$(BIN)/python -m benchmarks.start

bench-warm-start: .venv-bench/ready ## Measure what a warm start is worth on real tables, with lying sites
	.venv-bench/bin/python -m benchmarks.warm_start

wheel: $(VENV)/ready ## Build the wheel and the source distribution
	$(BIN)/python -m build

clean: ## Remove environments and what was built
	rm -rf $(VENV) .venv-proto .venv-demo .venv-bench .venv-bench-peers .venv-deploy .venv-fuzz .venv-lowest build dist demo-output demo-cluster-output .mypy_cache .ruff_cache .pytest_cache

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --editable '.[demo]'
	@touch $@

.venv-demo/cluster: .venv-demo/ready
	.venv-demo/bin/python -m pip install --quiet --editable '.[demo-cluster]'
	@touch $@

.venv-bench/ready: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --editable '.[bench]'
	@touch $@

.venv-bench-peers/ready: requirements/bench-peers.txt
	$(PYTHON) -m venv .venv-bench-peers
	.venv-bench-peers/bin/python -m pip install --quiet --requirement requirements/bench-peers.txt
	@touch $@

.venv-deploy/ready: pyproject.toml requirements/deploy.txt
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --requirement requirements/deploy.txt --editable '.[nats]'
	@touch $@

.venv-fuzz/ready: pyproject.toml requirements/fuzz.txt
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet --requirement requirements/fuzz.txt --editable '.[server]'
	@touch $@

.venv-lowest/ready: pyproject.toml requirements/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint requirements/lowest.txt --editable '.[dev]'
	@touch $@

.venv-proto/ready: requirements/proto.txt
	$(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/python -m pip install --quiet --requirement requirements/proto.txt
	@touch $@
