# make help says what there is.  Every target that runs Python makes ./.venv first (once).

VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
TESTS ?= tests
PYTEST_FLAGS ?= -n 2
BENCH_FLAGS ?= --large-gb 16 --write docs/benchmarks.md

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-megatron lint format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  options: PYTHON=python3.12  PIP_FLAGS='--extra-index-url URL'  TESTS=tests/x.py  PYTEST_FLAGS='-n 2 -k name'"

venv: ## ./.venv with the whole pinned set, the project installed in it (nothing to do: 20 ms)
	@PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" .ci/venv $(VENV) all

demo: venv ## 8 ranks become 4, 1, 6 and 8 again; a Llama trains on 2 workers, predicts on 1, goes on on 4
	$(PYTHON_BIN) -m transform_ckpt.demo
	$(PYTHON_BIN) -m transform_ckpt.demo_auto

test: venv ## all tests, with the reasons of skips
	$(PYTHON_BIN) -m pytest -ra $(PYTEST_FLAGS) $(TESTS)

test-megatron: venv ## conversions of what megatron-core 0.6 to 0.13 write, taken back by them (fetched with pip; minutes)
	$(PYTHON_BIN) -m pytest -ra $(PYTEST_FLAGS) -m megatron_old tests/megatron_real

lint: venv ## ruff, mypy, import-linter
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	$(VENV)/bin/lint-imports

format: venv ## let ruff format and fix what it can
	$(PYTHON_BIN) -m ruff check --fix .
	$(PYTHON_BIN) -m ruff format .

bench: venv ## speed and memory against cp and MindSpore, into docs/benchmarks.md (needs 40 GB of disk; BENCH_FLAGS=--quick does not)
	$(PYTHON_BIN) -m benchmarks.bench $(BENCH_FLAGS)

clean: ## remove outputs and caches (not ./.venv: rm -rf .venv does that)
	rm -rf build dist bench-output demo-output output ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +
