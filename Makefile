# `make demo` and `make test` are all the set-up there is: each makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check thorough mutations oldest gpu docs format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; say make PYTHON=python3.12 ..."'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/superlora-tn demo

# Whole files of tests side by side; each test runs on one thread.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile

test: .venv/installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

thorough: .venv/installed
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest $(SIDE_BY_SIDE)

mutations: .venv/installed
	$(BIN)/python tests/mutations.py

# The oldest versions that pyproject.toml allows, in an environment of their own; PyPI's torch of that age brings CUDA.
oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	# Today's pyparsing warns of what the oldest matplotlib calls.
	.venv-oldest/bin/python -m pytest -p no:cacheprovider -W ignore::DeprecationWarning

# The tests and benchmarks of a CUDA device, about ten minutes; benchmarks/gpu.sh does the same without network.
gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py --device cuda

docs: .venv/installed
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-gpu site .mypy_cache .pytest_cache .ruff_cache .hypothesis
