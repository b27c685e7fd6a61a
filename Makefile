# Two commands on a machine with Python, pip and make: `make demo` and `make test`.
#
# PYTHON       the interpreter that makes the virtual environment (3.11 or newer)
# VENV         where that environment goes
# TORCH_INDEX  package index for PyTorch alone. On Linux the default index serves CUDA builds of several gigabytes;
#              TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the CPU wheels instead.
# PYTEST_ARGS  more options for pytest, e.g. PYTEST_ARGS="-k c_export"

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/planish demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[tvm,mcu]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
