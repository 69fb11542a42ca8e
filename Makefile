# `make help` lists the targets. Everything runs in .venv, which is made on demand.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help install quickstart test test-full lint format bench clean

help:                ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

install: $(STAMP)    ## make .venv and install the package with its test tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (set PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

quickstart: $(STAMP) ## the whole story on this machine: memory levels, 48 samples, training, report
	$(BIN)/sftcore quickstart

lint: $(STAMP)       ## ruff, formatting, types of the pure core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint           ## lint, then all tests but the slow ones
	$(PYTEST) -m "not slow and not slurm and not gpu"

test-full: lint      ## everything that this machine can run
	$(PYTEST) -m "not slurm and not gpu"
	$(BIN)/pytest -m "slurm and not gpu" -rs

format: $(STAMP)     ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)      ## packing speed and quality on drawn lengths; benchmarks/LOG.md names the others
	$(BIN)/python -m benchmarks.packing

clean:               ## remove caches, keep .venv and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
