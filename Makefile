# What contributors and the CI run. From a bare checkout each target needs only make and Python 3.11 or newer.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Ray would otherwise package this directory into every worker whenever an outer `uv run` starts a driver.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0

# Tests start hundreds of processes: without stored bytecode each would compile all that it imports again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: help env demo test lint format lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Draw a long-tailed photo set, build it, train on it; about three minutes
	$(BIN)/evenshard demo

test: $(STAMP) ## Run the tests; PYTEST_ARGS='tests/test_x.py -k y' chooses some
	$(BIN)/python -m pytest --durations=10 --durations-min=1 $(PYTEST_ARGS)

lint: $(STAMP) ## Check format, lint rules, types and the import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

env: $(STAMP) ## Create or refresh .venv from requirements.lock (demo, test and lint do it by themselves)
	@echo "$$($(BIN)/python --version) in $(VENV), $$(du -sh $(VENV) | cut -f1)"

COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
    --custom-compile-command 'make lock'

lock: $(BIN)/uv ## Resolve the dependencies anew within what the locks allow; LOCK_ARGS=--upgrade renews all
	$(COMPILE) --extra all --extra dev $(LOCK_ARGS) pyproject.toml -o requirements.lock
	$(COMPILE) --extra build --extra s3 --constraint requirements.lock pyproject.toml -o deploy/requirements-build.lock
	$(COMPILE) --extra train --extra s3 --constraint requirements.lock pyproject.toml -o deploy/requirements-train.lock
	sed -n 's/^requires = \["\(.*\)"\]$$/\1/p' pyproject.toml | $(COMPILE) - -o deploy/requirements-wheel.lock

clean: ## Remove caches and .venv
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# Candidates are run, not only looked for: a version manager's shim can be on the PATH and still refuse to start.
$(BIN)/uv:
	@set -e; chosen=; \
	for python in python3.11 python3.12 python3.13 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then chosen=$$python; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	    echo "evenshard needs Python 3.11 or newer; found $$(python3 --version 2>&1 || echo none). Install it and run make again." >&2; \
	    exit 1; \
	fi; \
	echo "Creating $(VENV) with $$($$chosen --version)"; \
	$$chosen -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'

# Every dependency is checked against the hash in the lock; the project itself is linked, so edits need no reinstall.
$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	@echo "Installing what requirements.lock names (about 6 GB, most of it torch with CUDA; the second time takes a second)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@
