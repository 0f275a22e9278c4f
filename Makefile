# Each target makes its own .venv when it is missing (Python 3.11 or 3.12; the first time takes a few minutes).
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help sweep test lint
.DELETE_ON_ERROR:

help: ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

sweep: $(VENV)/.runtime ## search CFG scale x preference scale on the built-in world (ARGS="trials=4" overrides settings)
	@echo "==> psd sweep sweeps/cfg_scale.yaml $(ARGS)"
	@$(BIN)/psd sweep sweeps/cfg_scale.yaml $(ARGS)

test: $(VENV)/.test ## run the default tier of the tests (ARGS="-m cluster" for another)
	@echo "==> pytest $(ARGS)"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test ## ruff, mypy --strict, import contracts
	@echo "==> ruff check"
	@$(BIN)/ruff check
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import contracts"
	@$(BIN)/lint-imports --no-logo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	    { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) -V); try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing psd-sweeps and what it needs into $(VENV)"
	@$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing psd-sweeps, what it needs and the test tools into $(VENV)"
	@$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $(VENV)/.runtime $@
