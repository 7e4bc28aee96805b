# make demo and make test each do everything on a fresh machine with Python 3.11 and a C++ compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# Of every op the cases that say most; the training speed alone takes a minute.
QUICK := "test_attention.py::test_attention[n=50-64]" "test_attention.py::test_attention[Beauty's lengths-64]" \
	"test_losses.py::test_losses[V=10k]" "test_sampler.py::test_sampler[1910000-3200]" test_optim.py::test_against_torch \
	test_training.py::test_speed

.PHONY: demo test lint gate bench bench-quick bench-peers docs sanitize fuzz tsan soak coverage clean

.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,distributed-cpu]"
	$(BIN)/pip install -q -c constraints.txt --no-deps torchrec  # it asks for fbgemm-gpu, which is for CUDA
	touch $@

demo: .venv/installed
	$(BIN)/python -m cafe.demo

# A file's tests stay in one process, since they share what they train.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

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

# CAFE_RESULTS=build/before make bench-quick, and again after a change: see benchmarks/README.md.
bench-quick: CAFE_RESULTS ?= build/bench-quick
bench-quick: .venv/installed
	cd benchmarks && CAFE_RESULTS=$(abspath $(CAFE_RESULTS)) OMP_NUM_THREADS=1 ../$(BIN)/python -m pytest -c ../pyproject.toml $(QUICK)

bench-peers: .venv/installed
	$(BIN)/python -m benchmarks.peers.end_to_end
	$(BIN)/python -m benchmarks.peers.env recbole benchmarks.peers.sampler
	$(BIN)/python -m benchmarks.peers.env fbgemm benchmarks.peers.optimizers
	$(BIN)/python -m benchmarks.peers.env --threads 2 search benchmarks.peers.search
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.report

# The extension under AddressSanitizer and UBSan, or under ThreadSanitizer, in folders of its own. The coverage is for libFuzzer.
build/%/coverage.o: tests/fuzz_coverage.cpp
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O2 -fPIC -c $< -o $@

build/%.o: .venv/installed $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -pthread -Wno-psabi $(SANITIZE_$(notdir $(@D))) \
		`$(BIN)/python -m pybind11 --includes` -c csrc/$(*F).cpp -o $@

build/%/_C.so:
	$(CXX) -shared -pthread $(SANITIZE_$*) $^ -o $@

SANITIZE_asan := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fsanitize-coverage=trace-pc
SANITIZE_tsan := -fsanitize=thread
OBJECTS := $(patsubst csrc/%.cpp,%.o,$(wildcard csrc/*.cpp))
build/asan/_C.so: $(addprefix build/asan/,$(OBJECTS)) build/asan/coverage.o
build/tsan/_C.so: $(addprefix build/tsan/,$(OBJECTS))
PRELOAD = OMP_NUM_THREADS=1 CAFE_EXTENSION=$(CURDIR)/build/$(1)/_C.so \
	LD_PRELOAD="$(foreach lib,lib$(1) libstdc++,$(shell $(CXX) -print-file-name=$(lib).so))"
SECONDS := 60

# SECONDS of CPU time for each target; with atheris installed guided by libFuzzer.
sanitize: build/asan/_C.so
	$(call PRELOAD,asan) ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m tests.fuzz sampler attention losses optim topk --seconds $(SECONDS)

fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz tables raw checkpoint sharded run evaluation experiment --seconds $(SECONDS)

tsan: build/tsan/_C.so
	$(call PRELOAD,tsan) TSAN_OPTIONS="suppressions=tests/tsan.supp halt_on_error=1" setarch -R $(BIN)/python -m tests.races --seconds $(SECONDS)

soak: .venv/installed
	$(BIN)/python -m tests.soak --minutes 60

# Lines of both packages that the tests run, in Triton's interpreter too, which is a process of its own.
coverage: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov=cafe --cov=cafe_kernels --cov-report=term-missing:skip-covered --cov-fail-under=90

clean:
	rm -rf .venv build demo site *.egg-info cafe_kernels/*.so
