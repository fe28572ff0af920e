# `make` lists the targets. A target that needs the virtual environment .venv makes it first.
PYTHON ?= python3
BIN := .venv/bin/
PIP := $(BIN)pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo example test test-fast lint bench ci upgrade

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/run: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

demo: .venv/run ## one job of each type through a real worker, with no server and no key
	$(BIN)python worker.py demo

example: .venv/run ## an API with a page in front of the worker, with no server and no key
	$(PIP) -r examples/api/requirements.txt
	$(BIN)python -m examples.api

test: .venv/dev ## all tests, on real servers that come out of Python packages
	$(BIN)pytest

# Three processes: these tests don't wait, so more of them would only spend more on their start.
test-fast: .venv/dev ## the tests that need no server and take under ten seconds
	$(BIN)pytest -n 3 -m "not servers and not slow"

lint: .venv/dev ## style and types
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

bench: .venv/dev ## how fast and how small, compared with bare Celery
	$(BIN)python -m bench

ci: ## the gate: everything, from scratch
	.ci/run

upgrade: ## renew constraints.txt with the newest versions that requirements.txt allows
	.ci/upgrade
