# make demo and make test each do everything on a fresh machine with Python 3.11 and a C++ compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# Of every op the cases that say most; the training speed alone takes a minute.
QUICK := "test_attention.py::test_attention[n=50-64]" "test_attention.py::test_attention[Beauty's lengths-64]" \
	"test_losses.py::test_losses[V=10k]" "test_sampler.py::test_sampler[1910000-3200]" test_optim.py::test_against_torch \
	test_training.py::test_speed

.PHONY: demo test lint gate bench bench-quick bench-peers docs clean

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

bench-quick: .venv/installed
	cd benchmarks && CAFE_RESULTS=../build/bench-quick OMP_NUM_THREADS=1 ../$(BIN)/python -m pytest -c ../pyproject.toml $(QUICK)

bench-peers: .venv/installed
	$(BIN)/python -m benchmarks.peers.end_to_end
	$(BIN)/python -m benchmarks.peers.env recbole benchmarks.peers.sampler
	$(BIN)/python -m benchmarks.peers.env fbgemm benchmarks.peers.optimizers
	$(BIN)/python -m benchmarks.peers.env --threads 2 search benchmarks.peers.search
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv build demo site *.egg-info cafe_kernels/*.so
