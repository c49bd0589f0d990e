# Two commands on a fresh machine (Python 3.11, git, make): `make demo` and `make test`. Both can be repeated.
# Everything is installed into .venv; PYTHON chooses the interpreter that makes it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-quick test test-unit test-ray soak check format lint types layers doctest examples docs clean architectures quantised fuzz

help:  ## show what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"lightning_pfl needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}. Say which: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: an open range may bring several GB of CUDA packages with it
$(VENV)/.torch: constraints.txt $(BIN)/python
	$(PIP) install --quiet $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## install the package and its tools into .venv

demo: install  ## the main job: two language model families learn from each other on real images (15 minutes)
	$(BIN)/lightning-pfl demo

demo-quick: install  ## the same code on tiny models, nothing downloaded (90 seconds)
	$(BIN)/lightning-pfl demo --quick

test: test-unit test-ray  ## all tests

test-unit: install
	$(BIN)/python -m pytest -m 'not ray and not assets' -n 2 --dist loadfile

soak: install  ## 1,000 rounds x 50 clients with random faults, and a driver killed at every instant (an hour)
	$(BIN)/python -m benchmarks.soak
	rm -rf build/killed && $(BIN)/python -m tests.federation.killed build/killed/local 0 turn $$(seq 1 120)
	$(BIN)/python -m tests.federation.killed --places cluster build/killed/cluster 0 turn $$(seq 1 4 120)
	$(BIN)/python -m tests.federation.killed --places ray build/killed/ray 0 turn -2000 -4000 -6000 -8000 -10000

test-ray: install
	$(BIN)/python -m pytest -m 'ray and not assets'

fuzz: install  ## 10,000 broken inputs of each kind, new ones every time (an hour)
	LIGHTNING_PFL_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz --timeout 0

check: lint types layers doctest examples architectures quantised docs  ## everything else that CI checks

format: install  ## write the code as ruff wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

doctest: install
	$(BIN)/python -m pytest --doctest-modules lightning_pfl -p no:cacheprovider

architectures: install  ## the table of model families, made anew and compared with the documentation's
	$(BIN)/python -m benchmarks.architectures --check docs/reference/architectures.md

quantised: install  ## adapters around bitsandbytes' layers, which is not among the tools that .venv gets
	$(PIP) install --quiet --no-deps --constraint constraints.txt --target build/quantised --upgrade bitsandbytes
	PYTHONPATH=build/quantised $(BIN)/python -c 'import bitsandbytes'
	PYTHONPATH=build/quantised $(BIN)/python -m pytest tests/adapters/test_quantised.py

examples: install
	$(BIN)/python -m pytest examples

docs: install  ## build the documentation into build/site
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
