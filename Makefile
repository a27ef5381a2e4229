# `make demo` and `make test` need Python 3.11 or newer, make and a package index: they create .venv themselves.
# On a machine with a GPU, install the torch build you want first: make demo TORCH="torch".
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.installed
	$(BIN)/slidescan demo -o demo

test: $(VENV)/.installed-test check
	$(BIN)/pytest -q

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python pipelines/benchmark.py

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit('slidescan needs Python 3.11 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)

# torch first: a range would take the newest build, which on Linux brings gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
