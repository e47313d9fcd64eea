# Every target works from a fresh clone with Python >= 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
ARGS ?=
# Processes of `make test`; each takes neighbouring files, which share programs, and at the end of what another has left.
# XLA compiles most of the small programs of the tests on one thread.
# JOBS=0: in one process (for --pdb).
JOBS ?= 2
# Versions of what the pinned packages need in turn. `make setup CONSTRAINTS=` lets pip choose them.
CONSTRAINTS ?= -c constraints.txt

.PHONY: help setup search pipeline test test-slow mutate lint doctest bench bench-full bench-gpu check-accelerators
.PHONY: docs notebooks package paper clean

help:
	@echo "make setup | search [ARGS='--seed 1'] | pipeline | test | test-slow | mutate [ARGS=kernel] | lint | doctest"
	@echo "     bench | bench-full | bench-gpu | check-accelerators | docs | notebooks | package"
	@echo "     paper SCALE=smoke|cpu|paper | clean"

setup: $(STAMP)

# The stamp is newer than the pins once they are installed: nothing is done again until one of them changes.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "prdarts_jax needs Python >= 3.11; choose one: make setup PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

search: $(STAMP)
	$(BIN)/prdarts search --preset digits $(ARGS)

# Three searches, the choice of a cell by images held out, two full trainings and their test: under ten minutes on two cores.
pipeline: $(STAMP)
	$(BIN)/prdarts pipeline --preset digits $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow $(ARGS)

# Whether the quick tests notice slips: a hundred, one after the other (ARGS: parts of their names, or --list).
mutate: $(STAMP)
	$(BIN)/python tests/mutate.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

doctest: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --doctest-modules prdarts_jax experiments $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks --scale smoke $(ARGS)

# Hours on a quiet machine; the rows replace those in benchmarks/results, and docs/performance.md is written from them.
bench-full: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python -m benchmarks --scale full --out benchmarks/results $(ARGS)

# Under nine minutes, unattended, on a machine with a GPU that jax sees; PYTHON_GPU is its Python with jax, flax, optax,
# chex and orbax-checkpoint (tqdm for the piece of a search, torch for the peer). Nothing is installed. What is compared
# first are lowerings of the mixed cell: ARGS="--lowering A,B".
PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu:
	$(PYTHON_GPU) -m benchmarks.bench_gpu --out benchmarks/results $(ARGS)

# Programs compiled for a GPU and a TPU that are not here, in an environment of its own: compilers are some 400 MB to fetch.
ACCELERATORS := .venv-accelerators
PLUGINS ?= cuda tpu
check-accelerators: $(PLUGINS:%=$(ACCELERATORS)/.%)
	$(ACCELERATORS)/bin/python -m benchmarks.check_accelerators $(ARGS)

$(ACCELERATORS)/.installed: benchmarks/accelerators/requirements.txt constraints.txt
	test -x $(ACCELERATORS)/bin/python || $(PYTHON) -m venv $(ACCELERATORS)
	$(ACCELERATORS)/bin/python -m pip install --quiet --disable-pip-version-check -r $< $(CONSTRAINTS)
	touch $@

$(ACCELERATORS)/.%: benchmarks/accelerators/%.txt $(ACCELERATORS)/.installed
	$(ACCELERATORS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt $(CONSTRAINTS)
	touch $(DOCS_STAMP)

# The site, in site/: strictly, and nothing is fetched. `.venv/bin/mkdocs serve` shows it while one writes.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)
	$(BIN)/python -m website.check site
	$(BIN)/python -m pytest -q --doctest-modules website

# The notebooks with the settings of a trial (ARGS=--full: with their own, and keep what they show).
notebooks: $(DOCS_STAMP)
	$(BIN)/python -m examples.run $(ARGS)

# sdist and wheel in dist/, installed into an environment of their own, and a search from there.
package: $(DOCS_STAMP)
	.ci/package $(BIN)/python

# The claims of the paper: measures what experiments/results lacks, then writes docs/results.md and its pictures.
SCALE ?= smoke
paper: $(STAMP)
	$(BIN)/python -m experiments.paper --scale $(SCALE) $(ARGS)

clean:
	rm -rf .venv .venv-accelerators build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
