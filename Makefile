# Two commands do everything: `make up` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= engine,demo,dev
STAMP := $(VENV)/.installed
# Every package, with its hashes. A GPU has another torch. Empty: the newest of everything.
PINS ?= $(if $(findstring gpu,$(EXTRAS)),constraints-gpu.txt,constraints.txt)
comma := ,
PYTHONS := 3.11 3.12 3.13 3.14
GENERATE := $(BIN)/python -m tandem_operator.crds --output crds \
	--chart charts/tandem/templates/crds --docs docs/api.md

PYTEST := $(BIN)/python -m pytest
UNIT_TESTS := $(PYTEST) -m "not gpu and not cluster" -n 2 --dist loadfile
# uv asks the index that pip is configured with. Pods run under another user, so they must be able
# to read all of it.
UV := umask 022 && $(BIN)/python .ci/uv.py
COMPILE := pip compile pyproject.toml --quiet --universal --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --group install \
	--extra engine --extra demo --extra dev --extra nixl --extra mooncake

# How many worlds `make model` plays.
WORLDS ?= 1000
SEED ?=

# docker, podman or buildah.
BUILDER ?= docker
IMAGE_PREFIX ?= ghcr.io/tandem-inference
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE_TAG ?= $(VERSION)
# For example --build-arg ENGINE_EXTRAS=engine,gpu,nixl; docs/images.md has them all.
IMAGE_ARGS ?=
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)

.PHONY: up down install check check-generated test test-unit coverage test-newest test-gpu e2e model gen pins images bench clean

$(STAMP): pyproject.toml $(PINS)
	@echo "==> installing into $(VENV) (extras: $(EXTRAS))"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tandem needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@umask 022 && { test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); }
	@umask 022 && { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null; }
	@umask 022 && $(if $(PINS),sed -n '/^uv==/$(comma)/[^\]$$/p' $(PINS),echo uv) | $(BIN)/python -m pip install --quiet --upgrade --requirement /dev/stdin
	@$(UV) pip install --python $(BIN)/python $(if $(PINS),--constraint $(PINS) --build-constraint $(PINS),--upgrade) -e '.[$(EXTRAS)]'
	@$(if $(findstring dev,$(EXTRAS)),sh .ci/system-libraries.sh $(BIN)/python)
	@touch $(STAMP)

install: $(STAMP) ## install into .venv

up: $(STAMP) ## cluster, operator, real model, an answer
	@$(BIN)/tandem up

down: ## remove the cluster and everything that `up` started
	@test ! -x $(BIN)/tandem || $(BIN)/tandem down

check: $(STAMP) ## lint, types, layers, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory check-generated

check-generated: $(STAMP)
	$(GENERATE) --check

pins: $(STAMP) ## constraints*.txt from pyproject.toml; UPGRADE=1 takes the newest of everything
	$(UV) $(COMPILE) $(if $(UPGRADE),--upgrade) --python-version $(firstword $(PYTHONS)) --output-file constraints.txt
	$(UV) $(COMPILE) $(if $(UPGRADE),--upgrade) --extra gpu --python-version $(firstword $(PYTHONS)) --output-file constraints-gpu.txt
	@for version in $(PYTHONS); do \
		$(UV) $(COMPILE) --python-version $$version --constraint constraints.txt >/dev/null && \
		$(UV) $(COMPILE) --python-version $$version --extra gpu --constraint constraints-gpu.txt >/dev/null || exit 1; \
		echo "the pins hold for Python $$version"; done

gen: $(STAMP) ## CRDs, the chart's copies of them and docs/api.md from the models
	$(GENERATE)

test-unit: $(STAMP) ## unit and integration tests
	$(UNIT_TESTS)

coverage: $(STAMP) ## which lines the unit and integration tests reach; takes half as long again
	$(UNIT_TESTS) --cov --cov-report=term:skip-covered

test-newest: ## unit and integration tests with the newest of every package, in an environment of their own
	rm -f .venv-newest/.installed
	@$(MAKE) --no-print-directory test-unit VENV=.venv-newest PINS=

test: test-unit ## unit, integration and end-to-end tests
	@# Cold, the Go build takes minutes: it must not count against a test's time limit.
	$(BIN)/tandem cluster build
	@# Two clusters: most of a test's time is waiting for what a cluster does by the clock.
	$(PYTEST) -m cluster -n 2 --dist loadfile --reruns 1 --durations=15

test-gpu: $(STAMP) ## tests that need an NVIDIA GPU; install with EXTRAS=engine,gpu,demo,dev
	$(PYTEST) -m gpu kernels engine

e2e: $(STAMP) ## the end-to-end tests alone
	$(BIN)/tandem cluster build
	$(PYTEST) -m cluster e2e/tests

model: $(STAMP) ## the hand-off's protocol in worlds that no test has seen; WORLDS=1000 SEED=a random one
	$(BIN)/python -m tandem_engine.handoff.tests.protocol.play $(WORLDS) $(SEED)

images: image-operator image-router image-engine ## the three images, with BUILDER (docker, podman or buildah)

image-%:
	BUILDAH_LAYERS=true $(BUILDER) build --target $* $(IMAGE_ARGS) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
		--tag $(IMAGE_PREFIX)/tandem-$*:$(IMAGE_TAG) .

bench: $(STAMP) ## figures of this machine: hand-off, router, engine against transformers
	$(BIN)/tandem bench handoff
	$(BIN)/tandem bench router
	$(BIN)/tandem bench against-transformers

clean:
	rm -rf $(VENV) .venv-newest build dist
