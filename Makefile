# `make quickstart` and `make test` are all a newcomer needs.
VENV ?= .venv
PYTHON ?= python3
# The original OpenMMLab stack wants an older Python.
VENV_OPENMMLAB ?= .venv-openmmlab
PYTHON_OPENMMLAB ?= python3.10

BIN := $(VENV)/bin
READY := $(VENV)/.spvit_mm-ready
READY_OPENMMLAB := $(VENV_OPENMMLAB)/.spvit_mm-ready

.PHONY: help install quickstart demo-segmentation demo-tokenlabel bench test test-slow test-robust lint docs test-openmmlab smoke-openmmlab

help:
	@echo 'make quickstart       train, evaluate and look inside an SP-ViT on handwritten digits'
	@echo 'make demo-segmentation  UPerNet on scenes of handwritten digits: mIoU and pictures'
	@echo 'make demo-tokenlabel  token labeling on the digits: top-1 with and without, 3 seeds'
	@echo 'make bench            speed and memory, the short version'
	@echo 'make test             the test suite (under 10 minutes on 2 cores)'
	@echo 'make test-slow        the tests that take longer'
	@echo 'make test-robust      trainings that are killed, resumed and run out of disk'
	@echo 'make lint             ruff'
	@echo 'make docs             these pages and the API as a site: docs/_build/html'
	@echo 'make test-openmmlab   the test suite under the original OpenMMLab stack'
	@echo 'make smoke-openmmlab  import, build and run under the original OpenMMLab stack'

install: $(READY)

# Made anew only when the requirements change.
$(READY): requirements/readme.txt requirements/dev.txt requirements/deploy.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'spvit_mm needs Python 3.10 or newer: make PYTHON=python3.11 ...' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/readme.txt -r requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

quickstart: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" bash tools/quickstart.sh

demo-segmentation: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" bash tools/demo_segmentation.sh

demo-tokenlabel: $(READY)
	$(BIN)/python benchmarks/digits_token_labeling.py

bench: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/bench.txt
	$(BIN)/python benchmarks/speed.py --short

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m 'slow and not robust'

test-robust: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m robust tests/test_robust

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/docs.txt
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

$(READY_OPENMMLAB): requirements/openmmlab.txt setup.cfg pyproject.toml
	test -x $(VENV_OPENMMLAB)/bin/python || $(PYTHON_OPENMMLAB) -m venv $(VENV_OPENMMLAB)
	$(VENV_OPENMMLAB)/bin/python -m pip install -q --disable-pip-version-check -r requirements/openmmlab.txt
	$(VENV_OPENMMLAB)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

test-openmmlab: $(READY_OPENMMLAB)
	PYTHONPATH=$(abspath tests/openmmlab) $(VENV_OPENMMLAB)/bin/python -m pytest -q -n 2 -m 'not slow'

smoke-openmmlab: $(READY_OPENMMLAB)
	$(VENV_OPENMMLAB)/bin/python tests/smoke_openmmlab.py
