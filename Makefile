# make run    sets everything up and runs the main job on its embedded default
# make reward sets everything up and learns reward models that choose the best of N samples
# make serve  sets everything up and serves Best-of-N at http://127.0.0.1:8000, with models that it trains once (runs/serve)
# make reproduce-quick  tests the papers' claims on models trained from scratch: 2 seeds, the core arms; make reproduce is all of it
# make test   sets everything up and passes the tests; make test-slow runs those that take many minutes
# make lint   ruff and mypy over the whole tree, hadolint and shellcheck over deploy/
# make lock   resolves pyproject.toml to requirements/{cpu,gpu}.txt
# DEVICE=gpu or DEVICE=cpu chooses the locked set; by default a GPU is taken where an NVIDIA driver answers.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
CONFIG ?= jobs/configs/quickstart.yaml
# Laid over the config where there is a GPU.
OVERLAY ?= $(if $(filter gpu,$(DEVICE)),--config jobs/configs/one_gpu.yaml)
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/$(DEVICE).txt
READY := $(VENV)/ready-$(DEVICE)
# The first Python that runs and is 3.11 or 3.12 (a shim of a version manager may exist and not run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
# Where the CPU build of torch comes from: a folder or page that PIP_FIND_LINKS names, else PyTorch's own index.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",--torch-backend cpu)
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(if $(filter cpu,$(DEVICE)),$(TORCH_SOURCE))
COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--extra dev --extra eval --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.PHONY: run reward serve reproduce reproduce-quick test test-slow lint format lock setup clean

run: setup
	$(BIN)/python jobs/gsil_iterative.py --config $(CONFIG) $(OVERLAY) $(ARGS)

reward: setup
	$(BIN)/python jobs/irl_reward.py --config jobs/configs/irl_arithmetic.yaml $(OVERLAY) $(ARGS)

serve: setup
	$(BIN)/python jobs/irl_reward.py --config jobs/configs/irl_arithmetic.yaml --config jobs/configs/irl_serve.yaml $(OVERLAY)
	$(BIN)/python jobs/serve_bon.py --config jobs/configs/serve_smollm2.yaml \
		$(if $(filter gpu,$(DEVICE)),--config jobs/configs/serve_one_gpu.yaml) $(ARGS)

reproduce: setup
	$(BIN)/python jobs/reproduce.py $(ARGS)

reproduce-quick: setup
	$(BIN)/python jobs/reproduce.py --config jobs/configs/reproduce_quick.yaml $(ARGS)

test: setup
	$(BIN)/python -m pytest tests -m "not slow" $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest tests -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/shellcheck deploy/slurm.sh .ci/run

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; name one with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

# torch and the build tools first: DeepSpeed is built from source and looks at them.
$(READY): $(LOCK) pyproject.toml | $(BIN)/uv
	@$(if $(filter-out $(READY),$(wildcard $(VENV)/ready-*)),echo "$(VENV) is set up for another device: a new one"; \
		$(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install --quiet uv)
	@echo "installing $(LOCK) into $(VENV)"
	$(INSTALL) $$(grep -E '^(torch|setuptools|wheel|ninja|numpy|packaging|psutil|py-cpuinfo|pydantic)==' $(LOCK))
	$(INSTALL) --no-build-isolation-package deepspeed -r $(LOCK)
	$(INSTALL) --no-deps -e .
	@rm -f $(VENV)/ready-*
	@touch $@

lock: | $(BIN)/uv
	$(COMPILE) --extra cpu $(TORCH_SOURCE) -o requirements/cpu.txt
	$(COMPILE) --extra gpu -o requirements/gpu.txt
	@! grep -nE '(file|https?)://|^ *-' requirements/cpu.txt requirements/gpu.txt || { echo "error: a lock file names a place"; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
