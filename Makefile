# Every command below starts from nothing: it makes .venv and installs what it needs on the first
# call, and again when the requirements change.

PYTHON ?= python3
# Test processes: one a core, at most eight.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	if [ "$$n" -gt 8 ]; then echo 8; else echo "$$n"; fi)
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
REQUIREMENTS := requirements.txt setup.cfg pyproject.toml
INSTALL := $(PY) -m pip install --quiet --no-compile --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format notebooks docs clean
.NOTPARALLEL:

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(RUN)  ## meta-train on glyphs in a few minutes; prints the accuracies, writes a learning curve
	$(PY) -m experiments.demo

test: $(DEV)  ## run the tests, except the slow ones
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

slow: $(DEV)  ## run the slow tests (set IMAML_DATA_DIR for those on the real data)
	$(PY) -m pytest -q -m slow $(PYTEST_ARGS)

lint: $(DEV)  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(DEV)  ## format the code and mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(DEV)  ## make every notebook from its source, run it and store its outputs
	$(VENV)/bin/jupytext --quiet --update --to ipynb notebooks/*.py
	$(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb

docs: $(DOCS)  ## build the documentation into docs/_build; warnings are errors
	$(PY) -m sphinx -q -W --keep-going docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean:  ## remove caches and build outputs (.venv, data and runs stay)
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "imaml_jax needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo 'not there')." >&2; \
	  echo "Name another one: make PYTHON=python3.12 <command>" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
	  echo "Debian and Ubuntu keep them in a package of their own: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(RUN): $(REQUIREMENTS) | $(PY)
	@echo "Installing imaml_jax into $(VENV) (a minute or two)"
	@$(INSTALL) -e .
	@touch $@

$(DEV): $(REQUIREMENTS) | $(PY)
	@echo "Installing imaml_jax and its test tools into $(VENV) (a minute or two)"
	@$(INSTALL) -e '.[dev]'
	@touch $(RUN) $@

$(DOCS): $(REQUIREMENTS) | $(PY)
	@echo "Installing imaml_jax and Sphinx into $(VENV) (a minute or two)"
	@$(INSTALL) -e '.[docs]'
	@touch $(RUN) $@
