# The two commands that matter:  make demo   and   make test
# Works with GNU make 3.81 and later; `make demo PYTHON=python3.12` picks the interpreter.  On Linux, the tests' torch
# comes without its CUDA libraries with `make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"`.

# The first interpreter that is new enough; python3 itself when none is, so that the check below can say so.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; exit; fi; \
	done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR := runs/demo
JOBS := 1
PIP_FLAGS :=
# Three workers on two cores: some tests wait for servers and processes.
PYTEST_FLAGS := -n 3 --dist worksteal

# The TPU compiler lies apart from the environment: beside JAX it would make every command look for a TPU first.
TPU_COMPILER = $(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) --no-deps --target $(VENV)/libtpu 'libtpu>=0.0.52'

# A first try that was interrupted may have left an environment without pip.
ENSURE_PIP := @$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help try demo reproduce install test coverage test-fast test-default-flags lint docs bench clean

help:  ## this list
	@echo "make TARGET   (variables: PYTHON=$(PYTHON) WORKDIR=$(WORKDIR) JOBS=$(JOBS) PIP_FLAGS= PYTEST_FLAGS=\"$(PYTEST_FLAGS)\")"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

try: $(VENV)/.installed-serve  ## install what it takes, then serve the small model that comes along, and open its page
	$(BIN)/python -m ivr_jax.serve --checkpoint=micro --open

demo: $(VENV)/.installed  ## install, then train, evaluate and report the micro model; again: resumes
	$(BIN)/python -m ivr_jax.demo --workdir=$(WORKDIR)

reproduce: $(VENV)/.installed  ## the paper's ablation in miniature, hours on a CPU (JOBS=2: two arms at a time); again: resumes
	$(BIN)/python -m ivr_jax.reproduce --config=micro_reproduce --workdir=runs/reproduce --jobs=$(JOBS)

install: $(VENV)/.installed  ## only make the environment

# mypy takes one core for a minute: it runs beside the tests, and both decide.
test: $(VENV)/.installed-test  ## install, lint, run the tests
	$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy & types=$$!; $(BIN)/python -m pytest $(PYTEST_FLAGS); tests=$$?; \
		wait $$types || { echo "mypy found errors: make lint lists them" >&2; exit 1; }; exit $$tests

coverage: $(VENV)/.installed-test  ## the tests with coverage: half as long again
	$(BIN)/python -m pytest $(PYTEST_FLAGS) --cov --cov-report=term

test-fast: $(VENV)/.installed-test  ## tests of pure functions and formats, without models and processes
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-default-flags: $(VENV)/.installed-test  ## the numerics again as XLA compiles them by default
	XLA_FLAGS= $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/models tests/sampling tests/training tests/rewards

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-test  ## the documentation site in site/, strict
	$(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.installed-test  ## ratios against PyTorch, stored with commit and machine; says what became slower
	$(BIN)/python benchmarks/regressions.py

clean:  ## remove the environment, caches and build files; runs/ stays
	rm -rf $(VENV) .cache build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov

# An environment is made once, and installed into again when setup.py changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1)." >&2; \
		echo "       Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.12)," >&2; \
		echo "       then say: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make environments. Debian, Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) and installing into it; the first time this takes some minutes"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-serve: setup.py $(VENV)/bin/python
	$(ENSURE_PIP)
	$(BIN)/python launch/install.py $(PIP_FLAGS) -e '.[serve]'
	@touch $@

$(VENV)/.installed: setup.py $(VENV)/bin/python
	$(ENSURE_PIP)
	$(BIN)/python launch/install.py $(PIP_FLAGS) -e '.[all]'
	@touch $(VENV)/.installed-serve $@

$(VENV)/.installed-test: setup.py $(VENV)/bin/python
	$(ENSURE_PIP)
	@echo "$(BIN)/python launch/install.py -e '.[test]'"; $(TPU_COMPILER) >/dev/null 2>&1 & compiler=$$!; \
		$(BIN)/python launch/install.py $(PIP_FLAGS) -e '.[test]'; failed=$$?; \
		wait $$compiler || echo "no TPU compiler for this machine: its tests will be skipped"; exit $$failed
	@touch $(VENV)/.installed-serve $(VENV)/.installed $@
