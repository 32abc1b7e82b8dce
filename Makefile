# The whole project by name. PYTHON picks the interpreter (3.11 or later) that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo train test lint types wheel clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(VENV)/demo.stamp ## answer questions with the shipped checkpoint, unpruned and pruned; pictures in demo/
	$(BIN)/catp-jax demo --out demo

MINIS := mini-llama-vision mini-blip2-opt mini-blip2-t5
MINIS += scenes-llama-vision scenes-llama-vision-guide scenes-blip2-opt scenes-blip2-t5

train: $(MINIS:%=runs/%) ## train the mini checkpoints anew, into runs/; each under an hour, resumes

runs/mini-llama-vision: | $(VENV)/demo.stamp
	$(BIN)/python -m catp_jax.training.mini_llama_vision --out $@ --work runs/work

runs/mini-blip2-%: | $(VENV)/demo.stamp
	$(BIN)/python -m catp_jax.training.mini_blip2 --kind $* --out $@ --work runs/blip2-work

runs/scenes-llama-vision: | $(VENV)/demo.stamp
	$(BIN)/python -m catp_jax.training.scenes_llama_vision --out $@ --work runs/scenes-work

runs/scenes-llama-vision-guide: | $(VENV)/demo.stamp
	$(BIN)/python -m catp_jax.training.scenes_llama_vision --out $@ --work runs/guide-work --size guide

runs/scenes-blip2-%: | $(VENV)/demo.stamp
	$(BIN)/python -m catp_jax.training.scenes_blip2 --kind $* --out $@ --work runs/scenes-blip2-work

# Both kinds share their first stages; one after the other, also with make -j.
runs/mini-blip2-t5: | runs/mini-blip2-opt
runs/scenes-blip2-t5: | runs/scenes-blip2-opt

test: $(VENV)/test.stamp $(VENV)/gpu-compiler.stamp ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(VENV)/dev.stamp ## build dist/*.whl
	rm -rf dist
	$(BIN)/python -m build --wheel

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist demo .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says which extra is in .venv, so that a second call installs nothing. Always editable:
# one .venv serves every target, and none of them may run an old copy of the code.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# JAX's compiler for NVIDIA GPUs, of jax's own version: two wheels, no driver. Apart from the other
# packages, where JAX would look for a GPU at every start; tests/conftest.py finds it here.
$(VENV)/gpu-compiler.stamp: $(VENV)/test.stamp
	@version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/gpu-compiler "jax-cuda13-pjrt==$$version" "jax-cuda13-plugin==$$version" \
	  2>$(VENV)/gpu-compiler.log; then touch $@; \
	else echo "JAX's compiler for GPUs is not to be had here: tests that need it are skipped."; fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("PYTHON=$(PYTHON) is too old: catp-jax needs 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
