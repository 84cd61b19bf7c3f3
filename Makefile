.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test gpu-test gpu-acceptance plugins docs docs-serve lint format clean

# Any of these can be given on the command line, e.g. make test WORKERS=8.
PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= export,cpu,rtx,hf,dev
# More options for pip, e.g. the index of a torch build without CUDA.
PIP_ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CXX_FILES := $(wildcard $(foreach kind,h hpp c cpp inl,$(foreach depth,* */* */*/* */*/*/*,plugins/$(depth).$(kind))))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## create .venv with everything in it

demo: $(INSTALLED) ## export the demo model, build engines, check them, score a play
	@$(BIN)/fwl-export demo

# One thread per worker: the workers share the cores, and sums keep one order.
test: $(INSTALLED) ## run the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(PYTEST_ARGS)

gpu-test: $(INSTALLED) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

gpu-acceptance: $(INSTALLED) ## on an NVIDIA machine: build, check, bench, test; writes one report
	$(BIN)/python -m tools.gpu_acceptance -o gpu-acceptance.json

# The folder is where fwl_export/plugins.py looks.
plugins: $(INSTALLED) ## build the compiled libraries into the package; needs CMake and a compiler
	cmake -S plugins -B build/plugins -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_LIBDIR=plugins_lib \
	  -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/plugins --parallel
	cmake --install build/plugins --prefix fwl_export --component runtime

docs: $(INSTALLED) ## build the documentation site into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(INSTALLED) ## show the documentation on this machine, and build it anew on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --livereload

lint: $(INSTALLED) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED) ## format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean: ## remove what builds, tests and the demo left behind; .venv stays
	rm -rf build dist demo-bundle .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find fwl_export tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"constraints.txt pins releases for Python 3.11 or newer; this is {v[0]}.{v[1]}. " \
	  "Choose another: make PYTHON=python3.11")'
	@echo "Installing fwl-export[$(EXTRAS)] into $(VENV): about 400 MB to download and 1.6 GB on"
	@echo "disk, more where pip takes a torch build with CUDA. Usually 1 to 3 minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  $(PIP_ARGS) -e ".[$(EXTRAS)]"
	@touch $@
