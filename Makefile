# make run    set up and run an experiment (coco)       make test   set up and run the tests
# make check  lint and types                            make clean  remove what was set up (not outputs/)
# make mutants FILES="search/pareto.py …"               mutation testing: which changes no test notices
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
EXPERIMENT ?= coco

.PHONY: run test lint types check mutants clean

run: $(VENV)/installed$(if $(filter nuscenes,$(EXPERIMENT)),-nuscenes)
	$(BIN)/python pipelines/run.py +experiment=$(EXPERIMENT) $(ARGS)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

check: lint types

mutants: $(VENV)/installed-mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(FILES) $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info .mutants .mypy_cache .ruff_cache .pytest_cache

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e .
	touch $@

$(VENV)/installed-nuscenes: $(VENV)/created pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e '.[nuscenes]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/created pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-mutants: $(VENV)/created pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev,mutants]'
	touch $@ $(VENV)/installed $(VENV)/installed-dev
