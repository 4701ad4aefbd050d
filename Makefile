# The commands that the README names. Each installs what it needs first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RECIPE ?= alfworld-tiny

export DAGSTER_HOME := $(CURDIR)/dagster_home

.PHONY: setup official-engine demo test test-slow lint gpu-check ui render screenshots

setup: $(READY)

# As many stages at once as there are GPUs: dagster.yaml can set only the default limit of a pool.
# torch comes first and by itself: whichever build the machine's index offers (CPU or CUDA) is then kept.
$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/dagster instance concurrency set gpu $$($(BIN)/python -c 'import torch; print(max(1, torch.cuda.device_count()))')
	touch $(READY)

# ALFWorld's own engine, which the tests compare ours with; needs gcc, g++ and make, and takes minutes.
official-engine: setup
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,alfworld]'

demo: setup
	$(BIN)/dmr run $(RECIPE)

test: setup lint
	$(BIN)/python -m pytest -m 'not slow'

test-slow: setup
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,slow]'
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dmr_pipeline
	$(BIN)/lint-imports

# What this machine's GPU does with the pipeline, as JSON in build/; without a GPU: make gpu-check FLAGS=--tiny
gpu-check: setup
	$(BIN)/dmr bench gpu $(FLAGS)

# Dagster's daemon, and its web server for this machine alone; Ctrl-C ends both.
ui: setup
	@$(BIN)/dagster-daemon run -w workspace.yaml & trap "kill $$!" EXIT; \
	$(BIN)/python -m dmr_pipeline.webserver -w workspace.yaml -h 127.0.0.1 -p 3000

render: setup
	$(BIN)/dmr render

# Pictures of Dagster's UI for the README, of what `make demo` has made; needs Chromium.
screenshots: setup
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,slow]'
	$(BIN)/python docs/screenshots.py $(RECIPE)
