# Every target first brings .venv up to date: minutes the first time, less than a second when nothing changed.
# PYTHON=... chooses the interpreter, TETHER_DEVICE=cpu|cuda the list (otherwise: cuda where a GPU answers, else cpu).

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds test recipes simulate lint check fmt clean

PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := .venv/bin

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: ## build or update .venv
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	        exec $$python tools/setup_env.py; \
	    fi; \
	done; \
	echo 'set-up: needs Python 3.11, 3.12 or 3.13; looked for: $(PYTHONS). Install one, or name it: make PYTHON=/path/to/python3.12' >&2; \
	exit 1

demo: setup ## a tiny model learns sums by asynchronous RL while you watch, about 6 minutes on 2 cores (SEED=1: another run)
	@$(BIN)/python launch/cluster.py --recipe demo $(if $(SEED),--run.seed $(SEED)) $(ARGS)

demo-seeds: setup ## the demo under three seeds, with its promises checked
	@$(BIN)/python bench/demo.py $(ARGS)

test: setup ## all tests (ARGS="-k codec -x": some of them)
	@$(BIN)/python -m pytest $(ARGS)

recipes: setup ## two steps of every recipe on this CPU, with a tiny model and real vLLM (ARGS="-k xml": some of them)
	@$(BIN)/python -m pytest tests/test_recipes.py --recipe-engine vllm $(ARGS)

simulate: setup ## 20,000 simulated clusters on all cores, minutes (FIRST=seed: from there on; ARGS="--count 1": that one)
	@$(BIN)/python -m tests.simulation.simulate $(if $(FIRST),--first $(FIRST)) $(ARGS)

lint: setup ## format, lint and types, without changing anything
	@$(BIN)/ruff format --check --output-format concise .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint test ## what CI runs: format, lint, types, tests

fmt: setup ## format and repair what can be repaired
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

clean: ## remove .venv and all caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
