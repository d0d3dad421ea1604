# make demo   fine-tune MiniLM on TREC-6 with NormAL and show what the pruning saved
# make test   the whole suite        (both create .venv first, if there is none)
# make help   the rest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTENSION_SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)
export HF_HUB_OFFLINE := 1

.PHONY: help venv test demo demo-short demo-e2e data data-e2e bench bench-quick gpu gpu-check traffic op-behaviour lint clean

help:
	@echo "make demo        MiniLM + TREC-6 with NormAL: accuracy, ranks, sizes, step times, plots (under 5 minutes)"
	@echo "make demo-e2e    SmolLM2-135M + E2E: perplexity and BLEU before and after (11 minutes)"
	@echo "make test        the whole test suite"
	@echo "make lint        ruff"
	@echo "make bench       every benchmark, ratios printed and written to bench/results/"
	@echo "make gpu-check   compile every Triton kernel in every shipped configuration for sm_80, sm_90, sm_100; needs no GPU (20 minutes)"
	@echo "make traffic     bytes and FLOPs that the Triton kernels ask for, counted in the interpreter (15 minutes)"
	@echo "make op-behaviour  every op under torch.library.opcheck and torch.compile, on the C++ kernels and on Triton's in the interpreter"
	@echo "make gpu         with a GPU: the Triton tests, the benchmarks, the compile check"
	@echo "make data        the demo's model and data, once, into .data/"
	@echo "make venv        the environment alone;  PYTHON=... chooses the interpreter"

$(VENV)/.requirements: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(INSTALLED): $(VENV)/.requirements pyproject.toml $(EXTENSION_SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

venv: $(INSTALLED)

data: venv
	$(BIN)/python -m adaptlora.finetune.fetch trec

data-e2e: venv
	$(BIN)/python -m adaptlora.finetune.fetch e2e

demo: data
	$(BIN)/adaptlora finetune --preset trec --output runs/trec

demo-short: data
	$(BIN)/adaptlora finetune --preset trec --short --output runs/trec-short

demo-e2e: data-e2e
	$(BIN)/adaptlora finetune --preset e2e --output runs/e2e

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: data
	$(BIN)/python -m pytest bench -o python_files='bench_*.py' --benchmark-only -s

bench-quick: data
	$(BIN)/python -m pytest bench -o python_files='bench_*.py' --benchmark-only --quick -s

gpu-check: venv
	PYTHONPATH=tests $(BIN)/python bench/gpu_check.py

traffic: venv
	TRITON_INTERPRET=1 PYTHONPATH=tests $(BIN)/python bench/kernel_traffic.py

op-behaviour: venv
	PYTHONPATH=tests $(BIN)/python bench/op_behaviour.py
	TRITON_INTERPRET=1 PYTHONPATH=tests $(BIN)/python bench/op_behaviour.py --backend triton

gpu: venv
	$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('make gpu: needs a CUDA GPU and a torch that was built for it')"
	$(BIN)/python -m pytest -m gpu
	$(MAKE) bench gpu-check

clean:
	rm -rf build dist *.egg-info adaptlora/*.so
