# `make demo` and `make test` need Python 3.11 or newer, make and a package index: they create .venv themselves.
# TORCH says which build of torch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) \* 3 / 2)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench gpu clean

demo: $(VENV)/.installed
	$(BIN)/slidescan demo -o demo

# Processes side by side with one thread each: two that train with all cores take several times as long as in turn. Half as
# many again as cores, for a quarter of their time they wait for processes of their own.
test: $(VENV)/.installed-test check
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --maxprocesses 8 --dist worksteal

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python pipelines/benchmark.py

# All that needs a GPU, in ten minutes after the installation; the report is runs/gpu/report.md.
gpu: $(VENV)/.installed-test
	$(BIN)/python pipelines/gpu.py -o runs/gpu

$(VENV)/bin/pip:
	$(PYTHON) -c "import sys; sys.exit('slidescan needs Python 3.11 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and pinned, so that a later release changes nothing unseen. PyPI's build for Linux brings CUDA; a CPU build
# is smaller: make demo TORCH="torch==2.13.0 --index-url URL" with the CPU index that pytorch.org names.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
