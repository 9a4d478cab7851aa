# Every target sets up what it needs. Needed beforehand: Python 3.11 or newer, pip and make.
#
#   make demo       a drawing controls an image, with images and timings
#   make ui         the web page, on http://127.0.0.1:7860/ui
#   make test       the tests that every change has to pass
#   make test-slow  the tests that take minutes
#   make lint       style, types and the import order of the rooms
#   make nano       nano with its controls, figures and images; NANO=--dry-run: the plan (recipes/nano/README.md)
#   make clean      remove the environment and everything that tools left behind

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process for each core (tests/conftest.py says how many at most), each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := demo
.PHONY: demo ui test test-slow lint nano clean

demo: $(VENV)/.installed
	$(BIN)/controlkit demo

ui: $(VENV)/.installed-ui
	$(BIN)/controlkit ui

test: $(VENV)/.installed-dev
	$(PYTEST)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

nano: $(VENV)/.installed-dev
	$(BIN)/python recipes/nano/make.py $(NANO)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +

# The package is installed in place, so these run again only when the dependencies change.
$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[metrics]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-ui: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[ui]'
	touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@
