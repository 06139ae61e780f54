# Everything runs in .venv, which the first target makes. PYTHON picks the interpreter, VENV the folder.
PYTHON ?= python3
VENV ?= .venv
LIBTPU ?= .libtpu
BIN = $(VENV)/bin
# A module is compiled to bytecode when it is first imported: most never are.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
# Compiled programs are kept between runs of the tests and of the tour.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2

.PHONY: help tour test slow parity frameworks chips check bench tables docs clean
help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(VENV)/.made: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@
$(VENV)/.test: $(VENV)/.made
	$(PIP) -e '.[test]'
	touch $@
$(VENV)/.torch: $(VENV)/.test
	$(PIP) '$(TORCH)'
	$(PIP) -e '.[torch]'
	test "$$(uname)" != Linux || $(PIP) '$(TRITON)'
	touch $@
# libtpu lies beside the environment: wherever jax finds it, it looks for a TPU.
$(LIBTPU)/.made: $(VENV)/.test
	$(PIP) --no-deps --target $(LIBTPU) "$$($(BIN)/python -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"
	touch $@
$(VENV)/.docs: $(VENV)/.made
	$(PIP) -e '.[docs]'
	touch $@

tour: $(VENV)/.made   ## the stack, bottom to top, on this machine; ends in tour-report.html
	$(BIN)/jaxinfra tour

test: $(VENV)/.test   ## the tests, on eight emulated CPU devices
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not live and not network and not chips' $(ARGS)

slow: $(VENV)/.test   ## the tests that take longer: whole grids, training to a bound, kills
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'slow and not live and not network and not chips and not frameworks' $(ARGS)

parity: $(VENV)/.torch   ## the tests that compare with PyTorch and transformers, compile Triton, and use real weights
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'live or network' $(ARGS)

frameworks: $(VENV)/.test   ## the tests that install other agent frameworks, Inspect and BFCL in environments of their own
	$(BIN)/python -m pytest -n 2 --dist worksteal -m frameworks tests/agent $(ARGS)

# ARGS='-m chips' adds the slow ones: every kernel's whole grid, more of the planner's peaks.
# A program for a chip that is not here cannot be read back from the cache of compiled programs.
chips: $(LIBTPU)/.made   ## compiles TPU kernels and training steps for v5e, v5p and v6e that are not here (libtpu, 700 MB)
	PYTHONPATH=$(LIBTPU) JAX_ENABLE_COMPILATION_CACHE=false $(BIN)/python -m pytest -n 2 -m 'chips and not slow' tests/pallas_kernels tests/parallel $(ARGS)

check: $(VENV)/.test  ## format, lint, types, layers, tables
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.tables --check

bench: $(VENV)/.torch ## the benchmarks that this machine can run, into benchmarks/results
	$(BIN)/python -m benchmarks.decode_vs_transformers

tables: $(VENV)/.made ## the tables of README.md and docs, from benchmarks/results
	$(BIN)/python -m benchmarks.tables

docs: $(VENV)/.docs   ## the documentation, into docs/_build/html
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

clean:           ## removes the environment, caches and what was built
	rm -rf $(VENV) $(LIBTPU) .cache .pytest_cache .ruff_cache .hypothesis docs/_build tour-report.html
