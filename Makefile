# One environment for all: .venv, made on the first call and kept.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Where no NVIDIA driver is found, torch's CPU build from its own index: the plain one brings gigabytes of CUDA libraries.
CPU_INDEX := https://download.pytorch.org/whl/cpu

# One worker a file, so that what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu'

.PHONY: quickstart test check bench install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null \
		|| { ! command -v nvidia-smi >/dev/null \
			&& $(BIN)/python -m pip install --quiet --retries 0 --index-url $(CPU_INDEX) $(TORCH) 2>/dev/null; } \
		|| $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart.py

test: install
	$(PYTEST)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

bench: install
	$(BIN)/python -m pip install --quiet --editable '.[real-model]'
	$(BIN)/python -m hclm_rl.testbed.smollm2 --out models/smollm2-135m
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python -W ignore eval/overhead.py
