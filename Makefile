# Everything from a fresh clone: `make demo` grows a model, `make test` runs all tests, `make test-fast` leaves out the slow ones,
# `make docs` builds the site.
# More arguments: make demo ARGS="--overwrite_output_dir --seed 1"; make test-fast ARGS=tests/models.
# Each target sets up .venv first. With an environment of your own, run the commands below directly.

PYTHON ?= python3
BIN := .venv/bin
# By default, accelerate trains with one thread on a CPU.
LAUNCH := accelerate launch --num_processes 1 --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
# Without a GPU, some CPUs train faster in bfloat16 than in float32, 1.3 to 1.7 times.
PRECISION := $(shell ! command -v nvidia-smi > /dev/null && grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo --mixed_precision bf16 --attention_backend _native_math)

# One thread per process: the models of the tests are tiny. A file stays in one process, where its fixtures are built once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo app test test-fast test-app app-screenshot lint docs clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/installed-app: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[cli,app]"
	touch $@

.venv/installed-browser: .venv/installed-dev .venv/installed-app
	$(BIN)/pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python -m tests.app.browser || apt-get install --yes chromium || { echo "Install Chromium or Chrome, then try again." >&2; exit 1; }
	touch $@

demo: .venv/installed
	$(BIN)/$(LAUNCH) training_examples/grow.py $(PRECISION) $(ARGS)

# The model of `make demo` in a browser
app: output/grown-64/model_index.json .venv/installed-app
	$(BIN)/greedy-grow app output/grown-64 $(ARGS)

output/grown-64/model_index.json:
	@echo 'There is no model in output/grown-64 yet: run "make demo" first, which trains one.' >&2; exit 1

test: .venv/installed-dev
	$(PYTEST) $(ARGS)

test-fast: .venv/installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

# The app in a real browser. `make test` runs these tests, too, once gradio, playwright and a browser are there.
test-app: .venv/installed-browser
	$(PYTEST) tests/app $(ARGS)

# The picture in the documents: make app-screenshot MODEL=output/grown-64
app-screenshot: .venv/installed-browser
	$(BIN)/python -m tests.app.screenshot $(MODEL) assets/app.png

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in output-docs/. MkDocs 2, of which Material warns, is not allowed by its pins.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv output
