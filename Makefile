# Everything a newcomer or a CI machine does with the repository. Start with `make demo`.
#
# Set-up happens in a virtual environment of its own, .venv, and once: stamp files inside it remember
# what is installed, and the extension is rebuilt when its sources change. Needed from the machine:
# Python 3.10 or newer with venv, a C++17 compiler, and a package index (or wheels) for pip.

PYTHON ?= python3
VENV ?= .venv
# Any torch >= 2.6 will do: make TORCH=torch==2.6.0, or TORCH='--upgrade torch' for the newest. The last one
# that was asked for stays. Its words go to pip as they are: TORCH='torch>=2.6,<2.8' needs no quotes within
# (they are dropped).
override TORCH := $(or $(strip $(TORCH)),$(shell cat $(VENV)/.torch 2>/dev/null),torch==2.13.0)
override TORCH := $(strip $(subst ',,$(subst ",,$(TORCH))))
# Passed on: make demo ARGS=--quick, make test ARGS="-k bsmm -x", make bench ARGS=--quick
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'benchmarks/*.cpp')
# kernel-bench alone; in the extension's own folder, without the flags, its kernels are there already.
BENCH_BUILD ?= build/kernel-bench
BENCH_FLAGS ?= -DTETRIS_BUILD_EXTENSION=OFF
CPP_BUILD := build/cpp-test
CPP_FLAGS := -DTETRIS_BUILD_TESTS=ON -DTETRIS_BUILD_EXTENSION=OFF

.DEFAULT_GOAL := help
.PHONY: help demo test wheel bench bench-conv build docs lint format cpp-test kernel-bench gpu-check clean

help: ## Show this list
	@echo 'usage: make TARGET [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) JOBS=$(JOBS)'

# With a model named in ARGS, that one alone; else the convolutional one in short behind the other.
demo: $(VENV)/.with-demo ## Prune a network here and see what it gains (ARGS=--quick, "--model cnn")
	$(BIN)/tetris demo $(ARGS)
	$(if $(findstring --model,$(ARGS)),,$(BIN)/tetris demo --model cnn --quick)

test: $(VENV)/.with-test ## Run the Python tests (ARGS="-k name": some of them)
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.with-bench ## Compare with the dense libraries on this machine (ARGS=--quick)
	$(BIN)/python -m benchmarks.gemm $(ARGS)

bench-conv: $(VENV)/.with-bench ## The same for convolutions and networks (ARGS="--quick --models")
	$(BIN)/python -m benchmarks.conv $(ARGS)

build: $(VENV)/.built ## Build the extension into the virtual environment

wheel: $(VENV)/.built ## Build a wheel in dist, for this Python and this torch: installs without a compiler
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	@ls dist/tetris-*.whl

docs: $(VENV)/.with-docs ## Build the documentation into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.with-lint ## Check style and types of everything tracked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/pyright

format: $(VENV)/.with-lint ## Rewrite everything tracked in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

cpp-test: $(VENV)/.torch ## Run the C++ tests under sanitizers (needs googletest)
	cmake -G Ninja -S . -B $(CPP_BUILD) $(CPP_FLAGS) -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS=-O1 -DTETRIS_SANITIZE=address,undefined
	cmake --build $(CPP_BUILD)
	ctest --test-dir $(CPP_BUILD) --output-on-failure -j $(JOBS)

kernel-bench: $(VENV)/.torch ## Time the kernels alone (needs google-benchmark; ARGS="512x1024x4096 4x1 90")
	cmake -G Ninja -S . -B $(BENCH_BUILD) -DTETRIS_BUILD_BENCHMARKS=ON $(BENCH_FLAGS)
	cmake --build $(BENCH_BUILD) --target kernel_bench
	$(BENCH_BUILD)/benchmarks/cpp/kernel_bench $(if $(ARGS),$(ARGS),512x1024x4096 1x1 90 4x1 90 16x16 90)

gpu-check: ## On a machine with a GPU: build, test, measure with PYTHON's own torch, under ten minutes
	$(PYTHON) tools/gpu_check.py $(ARGS)

clean: ## Remove what was built; the virtual environment stays
	rm -rf build dist python/*.egg-info python/tetris/_C*.so python/tetris/_C*.torch $(VENV)/.built $(VENV)/.with-*

# torch is not a build requirement that pip could fetch by itself: the extension must be built
# against the very torch that will load it. The stamp holds the TORCH that was installed; another one is
# installed, and all that was built is built again. No stamp while pip may have changed torch.
ifneq ($(TORCH),$(shell cat $(VENV)/.torch 2>/dev/null))
.PHONY: $(VENV)/.torch
endif
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed: make PYTHON=/path/to/python3'; exit 1; }
	@command -v c++ >/dev/null || { echo 'A C++17 compiler is needed (Debian: apt install g++)'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@rm -f $@
	$(BIN)/python -m pip install --quiet $(foreach word,$(TORCH),'$(word)') numpy 'setuptools>=77' wheel \
	  'pybind11>=2.12' 'cmake>=3.22' ninja
	@echo '$(TORCH)' >$@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# What an extra names, from the package as installed: pip install -e '.[extra]' would build it again.
$(VENV)/.with-%: $(VENV)/.built
	@$(BIN)/python -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("tetris") \
	  if ";" not in r or r.endswith("extra == \"$*\"")), sep="\n")' >$(VENV)/.needs-$*
	$(BIN)/python -m pip install --quiet -r $(VENV)/.needs-$*
	touch $@
