# `make search` runs the main job, `make test` the default test suite. Each sets up what it needs.
# Needs Python >= 3.11, make and git.

PYTHON ?= python3
STUDY ?= studies/digits-nfe2.yaml
# More than the cores of a small machine: many tests wait for processes, servers and leases.
TEST_JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SPREAD := --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: search test test-service test-all gpu-check lint docs lock clean

search: $(VENV)/.installed
	$(BIN)/bdense-search launch $(STUDY)

# The longest files come first: tests/conftest.py lists them.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" $(SPREAD) tests

# Slow tests: the service on real processes (kills and stops, given arms confirmed and promoted, 200 trials under faults, a
# cluster of another version, two hosts, docker compose), too little memory, 10,000 trials, compiled networks.
test-service: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(SPREAD) tests

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# What a GPU makes of the settings for it, both sides of each line; meant for ten minutes; writes benchmarks/results/.
gpu-check: $(VENV)/.installed-dev
	@$(BIN)/python -m benchmarks.gpu_check --write

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site, in build/site; a link that leads nowhere is an error (but not under --quiet).
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "bdense needs Python 3.11 or newer; set PYTHON, as in: make search PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	    { echo "the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing (about 6.7 GB with the default build of torch; a few minutes)"
	$(PIP) --editable '.[search]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[search,dev]'
	@touch $@

# The packages of the images with their hashes, for Linux and Python 3.11, any processor. Run it after a change of constraints.txt,
# which must list every package, or of what the images install.
LOCK := $(BIN)/uv pip compile --quiet --no-config --no-annotate --custom-compile-command "make lock" --generate-hashes \
    --python-version 3.11 --python-platform linux --constraint constraints.txt --output-file
lock: $(VENV)/.installed
	$(PIP) uv
	$(LOCK) docker/service.lock docker/service-requirements.txt
	$(LOCK) docker/engine.lock pyproject.toml --extra search --extra diffusers --extra lora
	echo 'ray[default]' | $(LOCK) docker/kuberay.lock -

# Removes what `make` made; studies and their students in runs/ stay.
clean:
	rm -rf $(VENV)
