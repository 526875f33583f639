# The two commands are `make sweep` and `make test`; `make help` lists the rest.
# ARGS go to the command:  make sweep ARGS="--trials 4"    make test ARGS="-m 'not slow'"

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install sweep test test-all lint moto clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':|  ## ' '{printf "  make %-9s%s\n", $$1, $$NF}'
	@echo
	@echo '  ARGS="..." hands options on: make sweep ARGS="--help", make test ARGS="-m '"'not slow'"'"'
	@echo '  PYTHON=python3.12 picks the interpreter that .venv is made with.'

install: $(STAMP)  ## Make .venv and install the tested versions (once; again when they change)

sweep: $(STAMP)  ## Search the model's settings on the built-in data and record the trials in MLflow
	$(BIN)/python experiments/sweep.py $(ARGS)

# Files side by side, those that take longest first, as tests/conftest.py sorts them: three at a time
# on two cores, since many a test waits.
TEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder -n 3

test: $(STAMP)  ## Run the tests, without what takes long beside quicker tests of the same
	$(TEST) $(ARGS)

test-all: $(STAMP)  ## Run all tests but the drills, as continuous integration does
	$(TEST) --long $(ARGS)

lint: $(STAMP)  ## Check style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

moto:  ## Make .venv-moto, an S3 server for the tests that store objects; without it they are skipped
	"$(PYTHON)" -m venv .venv-moto
	.venv-moto/bin/python -m pip install --quiet 'moto[server]>=5.2.5'

clean:  ## Remove .venv and the caches; runs/ stays
	rm -rf $(VENV) .venv-moto build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last, so that a broken installation is never taken for a finished one.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo 'make: no "$(PYTHON)" here. Install Python 3.11 or newer, or name one: make install PYTHON=/path/to/python3' >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: this project needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." >&2; \
	  echo 'make: name a newer one: make install PYTHON=python3.12' >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; \
	  exit 1; }
	@echo "Installing into $(VENV): about 2 GB, some minutes the first time"
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip  # a recent one resolves in half the time
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
