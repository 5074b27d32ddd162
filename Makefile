# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it needs.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint coverage reference benchmarks clean

demo: $(VENV)/installed
	$(BIN)/usae-probe demo --out runs/demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the tests as above, and which lines they run
coverage: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term:skip-covered

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# pages of the public names, from their docstrings
REFERENCE ?= runs/reference
PUBLIC := usae_probe $(addprefix usae_probe.,adapter config buffer hooks images probes probes.cam probes.scan usae \
	usae.kernels report pipeline errors) usae_adapters

reference: $(VENV)/installed-dev
	$(BIN)/pdoc --docformat google --output-directory $(REFERENCE) $(PUBLIC)

# recipes.py is left out: it takes hours, and the folder of a harvest
benchmarks: $(VENV)/installed-dev
	for file in $(filter-out %/recipes.py,$(wildcard tests/benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch and torchvision together, from the registry: releases that do not fit each other break timm.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
