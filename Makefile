# make grid      set up and run the comparison grid    make test      set up and pass the tests
# make install   set up only                           make test-slow the tests that take minutes
# make ui        browse the runs in MLflow             make test-gpu  the tests that need a GPU (after make install)
# make lint      check style, types, imports, words    make format    format and fix what can be fixed
# Variables: PYTHON (3.11+), TORCH=cpu|cuda (default: cuda when an NVIDIA GPU is visible),
#            TORCH_INDEX=URL (wheel index for torch alone), ARGS (passed to the flow)
PYTHON ?= python3
TORCH ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
TORCH_VERSION := 2.13.0
TORCH_INDEX ?=
TRITON_VERSION := 3.9.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(TORCH)

.PHONY: grid test test-slow test-gpu triton lint format install ui clean-venv help

grid: install
	$(BIN)/python flows/compare_grid.py run $(ARGS)

test: install
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: install triton
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

test-gpu:
	$(BIN)/python -m pytest -m gpu --timeout 1200 $(ARGS)

# to interpret and compile the kernels without a GPU (1 GB); the CUDA build of torch brings its own
triton: install
	@$(BIN)/python -c 'import triton' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --no-deps triton==$(TRITON_VERSION) \
	  || echo "note: there is no triton for this machine; the tests of its kernels are skipped."

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/codespell

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: install
	$(BIN)/python -m steps.tracking ui

install: $(STAMP)

$(STAMP): requirements.lock requirements-embedded.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, %s is %d.%d. Set PYTHON=/path/to/python3.11." % (sys.executable, *v))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	@$(BIN)/python -c 'import torch; want = "$(TORCH)"; got = "cuda" if torch.version.cuda else "cpu"; want != got and print("note: wanted the %s build of torch, the index served the %s build. README, section Install, says how to choose." % (want, got))'
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-embedded.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

clean-venv:
	rm -rf $(VENV)
