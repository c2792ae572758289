# SPDX-License-Identifier: MIT
# Everything a developer does, one word each; `make` alone lists them.
#
#   PYTHON=python3        the interpreter to start from; if it has PyTorch, that one is used and none is installed
#   TORCH=torch==2.13.0   what to install otherwise, as pip reads it
#   CAMKERNELS_CUDA=      1, 0 or auto, see setup.py; 1 by default where nvcc is found
#   ARGS=                 further arguments for pytest or the benchmarks
#   WORKERS=2             processes that run the tests, each a file at a time
#
# Set-up is kept in $(VENV) and repeated only when pyproject.toml changes or PYTHON names another interpreter. The package
# is installed there as a link to python/ (pip's editable mode): tests, subprocesses and tools all import the working
# tree, with no PYTHONPATH, and pip knows its version. Libraries are built in place on every call: setup.py sees within
# half a second that nothing changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check install
DEMO ?= $(VENV_PYTHON) -m camkernels fit image bench/data/photo.jpg --out demo \
	--model hash-cam --steps 600 --compare
BENCH ?= $(VENV_PYTHON) -m bench.run
WORKERS ?= 2
PYTEST := $(VENV_PYTHON) -m pytest --timeout=600 -n $(WORKERS) --dist loadfile --no-loadscope-reorder
LINT_TOOLS := $(shell sed -n 's/^dev = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
PYTHON_FILES := $(wildcard python tests bench setup.py)
CXX_FILES := $(shell find $(wildcard csrc tests/sim) -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
export CAMKERNELS_CUDA ?= $(if $(shell command -v nvcc)$(wildcard $(CUDA_HOME)/bin/nvcc),1,auto)

# Beside other work, threads that wait by spinning take the time of those they wait for: 40 steps of the demo on two cores,
# one of them busy, take 11.0 s so and 0.6 s where they sleep. Measurements have the machine to themselves.
demo test check: export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test check build bench gpu lint format clean distclean
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

demo: build ## fit a photograph: what the package is for
	$(DEMO)

test: build ## every test
	$(PYTEST) $(ARGS)

check: build ## the tests that matter while writing code, two minutes
	$(PYTEST) -q -m "not slow" $(ARGS)

build: $(VENV)/.packages ## the libraries, in place
	@$(VENV_PYTHON) setup.py -q build_ext --inplace

bench: build ## measure on this machine
	$(BENCH) $(ARGS)

# No set-up: a machine with a GPU may have no network. The environment is used where it is, else $(PYTHON) as it is.
gpu: ## on a machine with a GPU: build, test, check and measure there, nine minutes; ARGS=--dry-run on any machine
	@PYTHONPATH=python$${PYTHONPATH:+:$$PYTHONPATH} \
		$(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(PYTHON)) -m bench.gpu $(ARGS)

lint: $(VENV)/.lint ## style of Python and C++
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES))

format: $(VENV)/.lint ## rewrite files in that style
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES) || true
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES))

clean: ## remove what was built
	rm -rf build dist python/*.egg-info python/camkernels/*.so python/camkernels/build.json .pytest_cache .ruff_cache
	find $(wildcard python tests bench) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV)

# ---- set-up: the environment, PyTorch, the test requirements, the lint tools ------------------------------------------

# An interpreter named by the user that is not the one the environment was made with: start again.
ifneq ($(filter command environment,$(origin PYTHON)),)
ifneq ($(file < $(VENV)/.made),$(PYTHON))
OTHER_PYTHON := other-python
.PHONY: other-python
endif
endif

# PyTorch 2.11 or later in $(PYTHON) is made visible with a path file, not with --system-site-packages, which would miss
# it where $(PYTHON) is itself a virtual environment. Installing goes to $(VENV) only.
$(VENV)/.made: $(OTHER_PYTHON)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed" if sys.version_info < (3, 10) else 0)'
	echo "== creating $(VENV) with $(PYTHON)"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 || {
		rm -rf $(VENV) # Debian's python3 without python3-venv has no ensurepip
		$(PYTHON) -m venv --without-pip $(VENV)
		$(PYTHON) -m pip --python $(VENV_PYTHON) install pip
	} || { echo "== no pip for $(VENV): install it (Debian: apt install python3-venv)"; exit 1; }
	if found=$$($(PYTHON) -c 'import torch; v = torch.__version__; \
			print(v); exit(tuple(map(int, v.split(".")[:2])) < (2, 11))' 2> /dev/null); then
		echo "== using PyTorch $$found of $(PYTHON)"
		$(VENV_PYTHON) -m pip uninstall -qqy setuptools # before Python 3.12 venv adds an old one, hiding the inherited
		$(PYTHON) -c 'import sys; \
			[print(f"import site; site.addsitedir({p!r})") for p in sys.path if p.endswith("-packages")]' \
			> "$$($(VENV_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/inherited.pth"
	fi
	printf '%s' '$(PYTHON)' > $@

$(VENV)/.torch: $(VENV)/.made
	@$(VENV_PYTHON) -c 'import torch' 2> /dev/null || {
		echo "== installing $(TORCH): 190 MB to download if the package index serves the CPU build," \
			"otherwise 530 MB and NVIDIA's libraries, about 5 GB on disk"
		$(PIP) $(TORCH)
	}
	touch $@

# The constraints keep torch as it is, whatever other packages ask for, and Triton too where torch brought it.
$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	@echo "== installing the test requirements"
	$(VENV_PYTHON) -c 'from importlib import metadata, util; print("torch==" + metadata.version("torch")); \
		print("triton==" + (metadata.version("triton") if util.find_spec("triton") else "3.6.0"))' \
		> $(VENV)/constraints.txt
	$(PIP) -q 'setuptools>=77'
	CAMKERNELS_NO_EXT=1 $(PIP) -q --no-build-isolation -c $(VENV)/constraints.txt -e '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.made pyproject.toml
	@echo "== installing $(LINT_TOOLS)"
	$(PIP) -q --ignore-installed $(LINT_TOOLS) # inherited ones have their programs elsewhere
	touch $@
