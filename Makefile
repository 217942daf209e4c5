# `make demo` and `make test` do all of their own set-up in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= --quiet --disable-pip-version-check
DEMO_DIR ?= outputs/demo

.PHONY: demo test test-all test-slow lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## The main job: float base, float control and annealed QAT, in minutes on a CPU
	$(BIN)/lightning-qat compare recipe=tiny_lm 'methods=[rtn,awq,gptq,qat_annealed]' hydra.run.dir=$(DEMO_DIR)

test: lint  ## Everything that CI runs
	$(BIN)/python -m pytest -n 2

test-all: lint  ## The same, and the tests that take minutes
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

test-slow: $(VENV)/.dev  ## Tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell lightning_qat conf recipes tests README.md CHANGELOG.md

clean:
	rm -rf $(VENV) outputs
