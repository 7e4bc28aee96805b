# make demo and make test each do everything on a fresh machine with Python 3.11 and a C++ compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test lint gate bench docs clean

.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/python -m cafe.demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gate: .venv/installed
	$(BIN)/python -m cafe_kernels.compile

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks -q

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build demo site *.egg-info cafe_kernels/*.so
