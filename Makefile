# make demo   fine-tune MiniLM on TREC-6 with NormAL and show what the pruning saved
# make test   the whole suite        (both create .venv first, if there is none)
# make help   the rest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTENSION_SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*' 2>/dev/null)
export HF_HUB_OFFLINE := 1

# make asan: a sanitized adaptlora of its own, which the tests find instead of the checkout's. The sanitizers come before
# Python, with libstdc++ so that ASan sees exceptions. Leaks are not looked for: Python leaves many. pytest must not swallow
# what a dying process says: UBSan's words, which go to stderr alone, and ASan's, which a test's subprocess puts into a file.
ASAN := build/asan
ASAN_TESTS = $(wildcard tests/test_cpu_*.py tests/test_direct*.py tests/test_lora_*.py tests/test_rank_*.py tests/test_jacobi_svd.py tests/test_cholesky_qr.py)
ASAN_ENV = LD_PRELOAD="$(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))" \
	ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/$(ASAN)/report UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(ASAN)/lib PYTEST_ADDOPTS="-o pythonpath=tests --capture=sys"

.PHONY: help venv test asan demo demo-short demo-e2e examples data data-e2e data-forgetting data-cifar10 bench bench-quick gpu gpu-check traffic op-behaviour docs lint clean

help:
	@echo "make demo        MiniLM + TREC-6 with NormAL: accuracy, ranks, sizes, step times, plots (under 5 minutes)"
	@echo "make demo-e2e    SmolLM2-135M + E2E: perplexity and BLEU before and after (11 minutes)"
	@echo "make examples    the scripts of examples/ on random weights (a minute)"
	@echo "make test        the whole test suite"
	@echo "make asan        the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, gcc; 10 minutes)"
	@echo "make lint        ruff"
	@echo "make bench       every benchmark, ratios printed and written to bench/results/, the layer's sweep drawn"
	@echo "make bench-quick  the same with small sizes: whether it runs, not how fast"
	@echo "make gpu-check   compile every Triton and CUDA kernel in every shipped configuration for sm_80, sm_90, sm_100; needs no GPU (20 minutes)"
	@echo "make traffic     bytes and FLOPs that the Triton kernels ask for, counted in the interpreter (15 minutes)"
	@echo "make op-behaviour  every op under torch.library.opcheck and torch.compile, on the C++ kernels and on Triton's in the interpreter"
	@echo "make docs        the documentation with plots from bench/results/, into build/site/index.html"
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

data-forgetting: venv
	$(BIN)/python -m adaptlora.finetune.fetch forgetting

data-e2e: venv
	$(BIN)/python -m adaptlora.finetune.fetch e2e

data-cifar10: venv
	$(BIN)/python -m adaptlora.finetune.fetch cifar10

demo: data
	$(BIN)/adaptlora finetune --preset trec --output runs/trec

demo-short: data
	$(BIN)/adaptlora finetune --preset trec --short --output runs/trec-short

demo-e2e: data-e2e
	$(BIN)/adaptlora finetune --preset e2e --output runs/e2e

examples: venv
	$(BIN)/python examples/nlu_encoder.py --tiny --steps 24
	$(BIN)/python examples/causal_lm_4bit.py --tiny --steps 30 --lr 1e-2
	$(BIN)/python examples/vit.py --tiny --steps 40

# Workers of one thread each: two threads that share a core with other work wait for each other. Tests of what threads do set their own number.
# A worker without work takes some from the other; tests/conftest.py has the slow tests first, so that none is left alone at the end.
TEST_WORKERS ?= 2

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

asan: $(VENV)/.requirements
	rm -rf $(ASAN)/lib $(ASAN)/report.*
	mkdir -p $(ASAN)
	ADAPTLORA_SANITIZE=1 CXX=$(CXX) $(BIN)/python setup.py -q egg_info --egg-base $(ASAN) \
		build --build-base $(ASAN) --build-lib $(ASAN)/lib > $(ASAN)/build.log 2>&1 || { cat $(ASAN)/build.log; exit 1; }
	env $(ASAN_ENV) $(BIN)/python -c "import sys, pytest; from adaptlora import _C; \
		'/$(ASAN)/' in _C.__file__ or sys.exit('make asan: not the sanitized build: ' + _C.__file__); \
		sys.exit(pytest.main(sys.argv[1:]))" -k "not reference" $(ASAN_TESTS); \
		status=$$?; ! cat $(ASAN)/report.* 2>/dev/null && exit $$status

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: data data-e2e
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

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

gpu: venv
	$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('make gpu: needs a CUDA GPU and a torch that was built for it')"
	$(BIN)/python -m pytest -m gpu
	$(MAKE) bench gpu-check

clean:
	rm -rf build dist *.egg-info adaptlora/*.so
