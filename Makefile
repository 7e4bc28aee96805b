# make demo and make test each do everything on a fresh machine with Python 3.11 and a C++ compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# make table2 DATA=data/amazon RUNS=runs/amazon; what it costs and how DATA is made: docs/data.md
RUNS ?= runs/table2
MODELS ?= sasrec poprec cafe
PRESET ?= paper
TRAIN ?=

.PHONY: demo test lint gate bench table2 clean

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

table2: .venv/installed
	@test -f "$(DATA)/meta.json" || { echo 'make table2 DATA=<folder that cafe prepare wrote>'; exit 1; }
	for model in $(MODELS); do \
	  run="$(RUNS)/$$model-$(PRESET)"; \
	  if [ -f "$$run/config.json" ]; then $(BIN)/cafe train --resume --data "$(DATA)" --out "$$run" || exit 1; \
	  else $(BIN)/cafe train --data "$(DATA)" --model $$model --preset $(PRESET) --out "$$run" $(TRAIN) || exit 1; fi; \
	done
	$(BIN)/cafe compare $(MODELS:%="$(RUNS)/%-$(PRESET)") --protocol aligned --protocol full --protocol authors \
	  --plot "$(RUNS)/table2.png"

clean:
	rm -rf .venv build demo *.egg-info cafe_kernels/*.so
