# Two commands do everything: `make up` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= engine,demo,dev
STAMP := $(VENV)/.installed
GENERATE := $(BIN)/python -m tandem_operator.crds --output crds \
	--chart charts/tandem/templates/crds --docs docs/api.md

PYTEST := $(BIN)/python -m pytest

.PHONY: up down install check check-generated test test-gpu e2e gen bench clean

$(STAMP): pyproject.toml
	@echo "==> installing into $(VENV) (extras: $(EXTRAS))"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tandem needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	@$(BIN)/python -m pip install --quiet --upgrade uv
	@$(BIN)/uv pip install --python $(BIN)/python -e '.[$(EXTRAS)]'
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

gen: $(STAMP) ## CRDs, the chart's copies of them and docs/api.md from the models
	$(GENERATE)

test: $(STAMP) ## unit, integration and end-to-end tests
	$(PYTEST) -m "not gpu and not cluster" -n 2 --dist loadfile --cov --cov-report=term:skip-covered
	@# Cold, the Go build takes minutes: it must not count against a test's time limit.
	$(BIN)/tandem cluster build
	$(PYTEST) -m cluster --reruns 1 --durations=15

test-gpu: $(STAMP) ## tests that need an NVIDIA GPU; install with EXTRAS=engine,gpu,demo,dev
	$(PYTEST) -m gpu kernels engine

e2e: $(STAMP) ## the end-to-end tests alone
	$(BIN)/tandem cluster build
	$(PYTEST) -m cluster e2e/tests

bench: $(STAMP) ## figures of this machine: hand-off, router, engine against transformers
	$(BIN)/tandem bench handoff
	$(BIN)/tandem bench router
	$(BIN)/tandem bench against-transformers

clean:
	rm -rf $(VENV) build dist
