# make setup   make .venv with everything, as constraints.txt pins it
# make demo    train baselines and PS-KD, translation and detection; print a table, write pictures
# make test    run the tests
# make test-fast  run the core and bad input without the slow files: before each commit
# make bench   run the benchmarks of a CPU, in three minutes (benchmarks/README.md has what they claim)
# make lint    run ruff and mypy
# make coverage  run the tests (some 15 minutes) and list the lines that none of them ran
#
# Each makes .venv first if it is not there or constraints.txt has changed.

# The first of these that runs and is a version that fairseq-fixed is made for.
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
LOG := .venv/setup.log

# A ready Detectron2 wheel (it is not on PyPI) for this Python; without one detection runs on torchvision.
PSKD_WHEELS ?= $(HOME)/.cache/pskd/wheels
TAG = $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])' 2>/dev/null)
DETECTRON2 = $(lastword $(sort $(wildcard $(PSKD_WHEELS)/detectron2-*-$(TAG)-*.whl)))

# Models this small train faster on one thread, and two of them side by side.
export OMP_NUM_THREADS ?= 1

TESTS := pytest -n 2 --dist loadfile --no-loadscope-reorder  # in pyproject's order

SLOW := criterion_compiled doctor surroundings triton wheel

.PHONY: bench demo test test-fast coverage lint setup
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m demo

test: setup
	$(BIN)/python -m $(TESTS)

test-fast: setup
	$(BIN)/python -m $(TESTS) tests/core tests/bad_input $(SLOW:%=--ignore=tests/core/test_%.py)

# A limit that is missed does not stop the others.
BENCH := $(BIN)/python benchmarks
bench: setup
	-$(BENCH)/loss.py --threads 1 2 --rounds 5 --shapes 128x100 256x1000 4096x6000 --without-compile
	-$(BENCH)/linear_loss.py --rounds 5
	-$(BENCH)/classification_step.py --model preact_resnet10_tiny --batch-size 32 --rounds 9 --steps 1
	-$(BENCH)/classification_throughput.py --cpu-time --rounds 10 --steps 4
	-$(BENCH)/detection_step.py
	-$(BENCH)/translation_step.py
	-$(BENCH)/prediction_memory.py --rows 1000000

coverage: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed

# The loss is compiled here: a library of other sources would read the call by other places.
.venv/installed: constraints.txt pyproject.toml setup.py pskd/kernels/native_rows.cpp $(DETECTRON2)
	@$(or $(PYTHON),false) -c '$(FITS)' || { echo "set-up: expected Python 3.11 or 3.12, got" \
		"$(or $(PYTHON),neither); name one with make PYTHON=..." >&2; exit 1; }
	@echo "[set-up 1/5] environment .venv ($$($(PYTHON) --version)), log file $(LOG)"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip setuptools wheel >$(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@echo "[set-up 2/5] torch, torchvision and numpy from PyPI (on Linux the CUDA build, about 3 GB)"
	@$(PIP) torch torchvision numpy cython >>$(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@echo "[set-up 3/5] fairseq-fixed, compiled against that torch (about 3 minutes)"
	@CFLAGS="-g0 -O1" $(PIP) --no-build-isolation fairseq-fixed >>$(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@echo "[set-up 4/5] pskd and what its demo and tests need"
	@$(PIP) --no-build-isolation --editable '.[demo,test]' >>$(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@$(if $(DETECTRON2),echo "[set-up 5/5] Detectron2 from $(DETECTRON2)",echo "[set-up 5/5] no \
		Detectron2 wheel in $(PSKD_WHEELS): detection runs on torchvision" \
		"(https://detectron2.readthedocs.io/tutorials/install.html)")
	@$(if $(DETECTRON2),$(PIP) $(DETECTRON2) >>$(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; })
	@touch $@
