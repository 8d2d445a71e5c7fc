# Everything from a fresh clone: `make demo` grows a model, `make test` runs all tests, `make test-fast` leaves out the slow ones,
# `make docs` builds the site, and `make dist` what is released.
# More arguments: make demo ARGS="--overwrite_output_dir --seed 1"; make test-fast ARGS=tests/models.
# Each target sets up .venv first. With an environment of your own, run the commands below directly.
# Another Python, in an environment of its own: make test-fast PYTHON=python3.13 VENV=.venv-3.13.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# By default, accelerate trains with one thread on a CPU.
LAUNCH := accelerate launch --num_processes 1 --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
# Without a GPU, some CPUs train faster in bfloat16 than in float32, 1.3 to 1.7 times.
PRECISION := $(shell ! command -v nvidia-smi > /dev/null && grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo --mixed_precision bf16 --attention_backend _native_math)

# One thread per process: the models of the tests are tiny. A file stays in one process, where its fixtures are built once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo app test test-fast test-lowest test-app app-screenshot lint docs docs-version dist audit clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/installed-app: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[cli,app]"
	touch $@

$(VENV)/installed-release: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[release]"
	touch $@

$(VENV)/installed-browser: $(VENV)/installed-dev $(VENV)/installed-app
	$(BIN)/pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python -m tests.app.browser || apt-get install --yes chromium || { echo "Install Chromium or Chrome, then try again." >&2; exit 1; }
	touch $@

demo: $(VENV)/installed
	$(BIN)/$(LAUNCH) training_examples/grow.py $(PRECISION) $(ARGS)

# The model of `make demo` in a browser
app: output/grown-64/model_index.json $(VENV)/installed-app
	$(BIN)/greedy-grow app output/grown-64 $(ARGS)

output/grown-64/model_index.json:
	@echo 'There is no model in output/grown-64 yet: run "make demo" first, which trains one.' >&2; exit 1

test: $(VENV)/installed-dev
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

# The lowest versions that pyproject.toml allows, in an environment of their own. They may warn of each other.
test-lowest: BIN := .venv-lowest/bin
test-lowest: .venv-lowest/installed
	$(PYTEST) -m "not slow" -W default::DeprecationWarning -W default::FutureWarning $(ARGS)

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[app,test]"
	touch $@

# The app in a real browser. `make test` runs these tests, too, once gradio, playwright and a browser are there.
test-app: $(VENV)/installed-browser
	$(PYTEST) tests/app $(ARGS)

# The picture in the documents: make app-screenshot MODEL=output/grown-64
app-screenshot: $(VENV)/installed-browser
	$(BIN)/python -m tests.app.screenshot $(MODEL) assets/app.png

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in output-docs/. MkDocs 2, of which Material warns, is not allowed by its pins.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The site of one version beside those of others, as a commit on the branch gh-pages: make docs-version VERSION=1.2 ALIAS=latest.
# ARGS=--push publishes it. Readers choose the version at the top of each page, and begin with the one of the last alias.
docs-version: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mike deploy --allow-empty --update-aliases $(ARGS) $(VERSION) $(ALIAS)
	$(if $(ALIAS),$(BIN)/mike set-default $(ARGS) $(ALIAS))

# The sdist and the wheel, in dist/: what they hold, their metadata, and the wheel in an environment of its own. In the workflow
# of releases, TAG=v1.2.3 must be the version. The first build makes the wheel from the sdist, the second from this folder.
dist: $(VENV)/installed-release
	rm -rf dist build *.egg-info
	$(BIN)/python -m build
	$(BIN)/python -m build --wheel --outdir build/tree
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tests.release.check_dist dist build/tree $(TAG)
	tests/release/try_wheel.sh dist/*.whl

# Known vulnerabilities of the pinned versions
audit: $(VENV)/installed-release
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

clean:
	rm -rf .venv .venv-* build dist output
