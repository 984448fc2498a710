# Everything a fresh machine needs: `make demo` and `make test` each make the virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench bench-training lint types check clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed  # asks for torch
	touch $@

demo: $(INSTALLED)  ## Train a pair on real facts and show that it beats each model alone (about 2 minutes).
	$(BIN)/collm demo --out demo-out

test: $(INSTALLED)  ## The whole test suite.
	$(BIN)/python -m pytest --numprocesses 2

bench: $(INSTALLED)  ## Decoding speed, as JSON and as the tables of docs/performance.md (about half an hour).
	$(BIN)/python -m benchmarks.decode --dtype float32 --out benchmarks/results/cpu-float32.json
	$(BIN)/python -m benchmarks.decode --dtype bfloat16 --out benchmarks/results/cpu-bfloat16.json
	$(BIN)/python -m benchmarks.table docs/performance.md benchmarks/results/cpu-float32.json benchmarks/results/cpu-bfloat16.json

bench-training: $(INSTALLED)  ## Cost of training and scoring, as JSON and as the tables of docs/training.md (about 15 minutes).
	$(BIN)/python -m benchmarks.training --out benchmarks/results/cpu-training.json
	$(BIN)/python -m benchmarks.table docs/training.md benchmarks/results/cpu-training.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) demo-out
