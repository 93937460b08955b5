# `make test` and `make demo` need Python 3.11 and pip, nothing else: they make .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A machine without an NVIDIA GPU takes the CPU build, which pip finds where its index or find-links offers one.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
# The environment with the oldest transformers that pyproject.toml allows, that release, and the tests of processes that
# are killed, start one another or lack a library: they ask nothing more of transformers than others, and take a third
# of the time.
LOWEST ?= .venv/lowest
OLDEST := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
PROCESSES := crash torchrun processes doctor serve_ray
# `make demo ROWS=200 TEST=100` is over in a minute; the scores of so few rows say little.
ROWS ?= 2000
TEST ?= 1000

.PHONY: demo test test-lowest sweep sweep-part lint types check format clean

.venv/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.base
	INLAY_DEMO_ROWS=$(ROWS) INLAY_DEMO_TEST=$(TEST) $(BIN)/python demo/run.py

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

$(LOWEST)/.dev: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet $(TORCH)
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[dev]' transformers==$(OLDEST)
	touch $@

test-lowest: $(LOWEST)/.dev
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 $(PROCESSES:%=--ignore=tests/test_%.py)

# Every model type that transformers registers; what .sweep/ holds already is not done again.
sweep: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sweep --write docs/architectures.md

# A twentieth, chosen by the commit; it fails where something is worse than the page says.
sweep-part: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sweep --part HEAD/20 --seconds 50 --cells .sweep/part.jsonl --again --against docs/architectures.md

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

clean:
	rm -rf .venv
