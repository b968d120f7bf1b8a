# Tools run from .venv, which `make setup` creates with the interpreter PYTHON.
PYTHON ?= python3
# The figures in DESIGN.md were measured with this version; pyproject.toml has the supported range.
TORCH = torch==2.13.0

BIN = .venv/bin
comma := ,
PIP = $(BIN)/python -m pip --disable-pip-version-check -qq
SETUP_STAMP = .venv/.setup-stamp
BUILD_STAMP = build/.native-stamp
NATIVE_SOURCES = CMakeLists.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# If there is a C++ compiler, the native build must succeed. Without one, the eager backend is used.
NATIVE_ENV = FUSED_ATTN_REQUIRE_NATIVE=$(if $(shell command -v $(CXX)),1,0)
# Keep the root of the checkout off sys.path: as in an install, `import kernels` must not find ours.
TEST_ENV = PYTHONSAFEPATH=1

.DEFAULT_GOAL := help
.PHONY: help setup build demo test aot gpu-check test-triton-oldest test-matrix test-tiles test-fuzz test-kill test-asan test-tsan lint lint-python lint-native \
        lint-bans format wheel bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(SETUP_STAMP) ## create .venv and install the package into it, editable, with all extras

$(SETUP_STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo 'make setup needs Python 3.11 or later with venv and pip (python3-venv)'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing $(TORCH) into .venv'
	@$(PIP) install '$(TORCH)'
	@echo 'building fused_attn and installing it into .venv, editable, with all extras'
	@$(NATIVE_ENV) $(PIP) install --constraint constraints.txt --editable '.[seq2seq,bench,test,dev]'
	@mkdir -p build && touch $(BUILD_STAMP) $@

build: $(BUILD_STAMP) ## rebuild the native module if csrc/ changed

$(BUILD_STAMP): $(NATIVE_SOURCES) | $(SETUP_STAMP)
	@echo 'building the native module'
	@$(NATIVE_ENV) $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Trains for about two minutes on two cores; the full recipe is `fused-attn train g2p`.
DEMO = runs/demo

demo: setup build ## train the pronunciation model, show what it learned, compare with eager attention
	@rm -rf $(DEMO)
	$(BIN)/fused-attn train g2p --output $(DEMO) --hidden 128 --epochs 4 --lr 3e-3
	$(BIN)/fused-attn evaluate $(DEMO) --limit 2000 --samples 10
	$(BIN)/fused-attn predict $(DEMO) attention pronunciation --alignments $(DEMO)/alignment.png
	@echo 'alignments written to $(DEMO)/alignment.png'
	$(BIN)/python -m benchmarks quick

test: setup build ## run the tests
	$(TEST_ENV) $(BIN)/pytest -n 2

# Creates its own environments. MATRIX takes combinations and options: MATRIX='3.12/2.14.1 --strict'.
test-matrix: ## run the tests on other versions of torch and Python
	@$(PYTHON) tests/matrix.py $(MATRIX)

# Without a GPU the kernels run in Triton's interpreter, which is slow; `make test` runs only some.
test-tiles: setup build ## run every tile variant of the Triton kernels
	TILES=all $(TEST_ENV) $(BIN)/pytest -n 2 tests/test_backends_tiles.py

test-fuzz: setup build ## run the fuzz tests on many more calls and files, with new random draws
	HYPOTHESIS_PROFILE=long $(TEST_ENV) $(BIN)/pytest -n 2 tests/test_fuzz.py \
	  tests/test_seq2seq_damage.py

# Options: make test-kill KILL='--kills 500 --seed 1'.
test-kill: setup build ## kill training at random, fill its disk, damage its files: is anything lost?
	PYTHONPATH=tests $(TEST_ENV) $(BIN)/python tests/kill.py $(KILL)

ASAN_SITE = build/asan/site
ASAN_PRELOAD = $(foreach lib,asan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))
# Tests that call the native module, except those of peak memory: the sanitizer delays frees.
ASAN_TESTS = $(wildcard tests/test_backends*.py) tests/test_fuzz.py tests/test_threads.py \
             $(wildcard tests/test_decoder_*.py) tests/test_native_tensors.py \
             tests/test_ragged_memory.py tests/test_scores.py tests/test_shapes_of_nothing.py

# $(call configure,directory,sanitizers,flags)
configure = $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS_DEBUG=$(3) -DFUSED_ATTN_SANITIZE=$(2) \
  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
  -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir) >$(1).log || { cat $(1).log; exit 1; }

# Installed into its own directory, which goes ahead of .venv on the path. The interpreter of Triton
# 3.6 cannot run loops with NumPy 2.4.
OLDEST = triton==3.6.0
OLDEST_SITE = build/$(subst ==,-,$(OLDEST))

$(OLDEST_SITE): | setup
	$(PIP) install --no-deps --target $@ '$(OLDEST)' 'numpy<2.4'

test-triton-oldest: setup build $(OLDEST_SITE) ## run the Triton tests with the oldest version supported
	PYTHONPATH=$(OLDEST_SITE) $(TEST_ENV) $(BIN)/pytest -n 2 -k triton $(wildcard tests/test_backends*.py) \
	  tests/test_scores.py tests/test_triton_aot.py

AOT = benchmarks/results/aot

aot: setup build ## compile every GPU kernel ahead of time and check the compiled code
	$(BIN)/python -m benchmarks aot --output $(AOT)
	$(TEST_ENV) $(BIN)/pytest tests/test_cuda_build.py

# The package is copied next to the instrumented module, so that the normal build stays in place.
# libstdc++ is preloaded too: otherwise AddressSanitizer cannot intercept the exceptions of a module
# that is loaded late. Leak detection is off because Python leaks on purpose at exit. --capture=sys
# lets sanitizer reports through to the terminal.
test-asan: setup ## run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(call configure,build/asan,address$(comma)undefined,-O1)
	@$(BIN)/cmake --build build/asan
	@rm -rf $(ASAN_SITE) && mkdir -p $(ASAN_SITE)
	@cp -r fused_attn $(ASAN_SITE)/ && cp -r kernels $(ASAN_SITE)/fused_attn/
	@rm -f $(ASAN_SITE)/fused_attn/_C.*.so
	@$(BIN)/cmake --install build/asan --prefix $(ASAN_SITE) >>build/asan.log
	$(TEST_ENV) PYTHONPATH=$(ASAN_SITE) LD_PRELOAD='$(ASAN_PRELOAD)' \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/pytest --capture=sys -k 'not never_holds and not leave_nothing_behind and not triton' \
	    $(ASAN_TESTS)

# ThreadSanitizer fails under strong address-space randomisation; setarch -R turns it off if allowed.
test-tsan: setup ## run the threaded part of the native module under ThreadSanitizer
	@$(call configure,build/tsan,thread,-O1)
	@$(BIN)/cmake --build build/tsan --target threads_test
	$(shell setarch -R true 2>/dev/null && echo setarch -R) build/tsan/threads_test

lint: lint-python lint-native lint-bans ## check style, types, C++ formatting and banned constructs

lint-python: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-native: setup
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# $(call ban,extended regular expression,where,why)
ban = @! grep -rnE --exclude-dir=__pycache__ -e '$(1)' $(2) || { echo 'banned: $(3)'; exit 1; }

lint-bans:
	$(call ban,tl\.make_block_ptr,kernels,deprecated in Triton; use pointers or tensor descriptors)
	$(call ban,^ *(import|from) +torch,kernels,kernels/ imports triton and nothing else)
	$(call ban,# *include *[<"](torch|ATen|c10)/,csrc,csrc/ knows no framework)
	$(call ban,-march=native,CMakeLists.txt setup.py csrc,wheels run on other machines)

format: setup ## format the sources as `make lint` expects
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: setup ## build the sdist, and the wheel from it, into dist/
	FUSED_ATTN_REQUIRE_NATIVE=1 $(BIN)/python -m build --outdir dist

# Uses PYTHON as it is: no virtual environment, no downloads.
gpu-check: ## on a machine with a GPU: build, test and measure in 8 minutes
	@$(PYTHON) benchmarks/gpu_check.py $(if $(STAGES),--stages $(STAGES)) $(if $(OUT),--output $(OUT))

bench: setup build ## run the short benchmark suite and report regressions from this machine's baseline
	$(BIN)/python -m benchmarks quick --check

clean: ## remove build outputs, but not .venv
	rm -rf build dist fused_attn.egg-info fused_attn/_C.*.so fused_attn/_native_build_error.txt
