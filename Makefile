# make train: the main job on this machine. make test: all tests. make test-quick: those that take two minutes
# together. make lint: the linters. Each sets up .venv first, once. make gpu-check: what one GPU proves in ten
# minutes (docs/gpu.md); it takes PYTHON as it is where that has torch and there is no .venv.
#
# PYTHON=python3.12   another interpreter (3.11 or newer)
# TORCH_INDEX=URL     where torch comes from: PyTorch's "Get Started" page lists one for CPU and one per CUDA
# ARGS="..."          overrides for train.py, or options of benchmarks/gpu.py

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TORCH_INDEX ?=
ARGS ?=

.PHONY: train test test-quick lint gpu-check setup clean
.DEFAULT_GOAL := train

train: setup
	@$(VENV)/bin/python train.py $(ARGS)

# Two at a time, each on one thread; then, alone, those that start workers of their own and look at the clock.
ALONE := $(addprefix tests/launch/test_, faults.py launch.py workers_stragglers.py slurm.py sweep_launchers.py) \
	tests/distributed/test_watchdog.py

# Where a process of xdist dies it starts another by default, and then waits for ever for the tests of a group.
PAIR := -n 2 --dist loadgroup --max-worker-restart=0

test: setup
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PAIR) $(ALONE:%=--ignore=%)
	@$(VENV)/bin/python -m pytest $(ALONE)

# For use while working: no worker pool, no processes of their own, nothing that takes seconds (tests/conftest.py).
test-quick: setup
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PAIR) -m "not slow"

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache

gpu-check:
	@if [ ! -e $(STAMP) ] && $(PYTHON) -c 'import torch' 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) -s --no-print-directory setup && python=$(VENV)/bin/python; fi; \
	$$python -m benchmarks.gpu $(ARGS)

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; dsv3 needs Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; dsv3 needs 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV), see README.md for the download's size"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
