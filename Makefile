# Everything from a fresh clone: `make demo` grows a model, `make test` runs the tests.
# Each target sets up .venv first; with an environment of your own, run what stands below directly.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/accelerate launch --cpu training_examples/grow.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv output
