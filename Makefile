# make demo   a 135M chat model: SFT, then DPO, merged, checked and shown talking
# make test   linters, types and the whole suite, in .venv
# make faults 200 runs killed, damaged or out of space, and resumed; the table goes into docs/reliability.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run on one thread each, so a worker for each core; every one takes some 2 GB.
WORKERS ?= 2
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types check faults clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: only the pinned version finds a local CPU build where there is one.
$(VENV)/.runtime: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) -e '.[gguf]'
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(INSTALL) -e '.[test]'
	touch $@

demo: $(VENV)/.runtime
	@echo "A 135M chat model learns to answer in three short lines (SFT), then to close with a question (DPO)."
	@echo "Every plan says how long it takes: six minutes on two cores with AVX2, less on faster ones."
	$(BIN)/alignkit fetch smollm2-135m-instruct
	$(BIN)/alignkit sft quickstart/sft.yaml --overwrite
	$(BIN)/alignkit dpo quickstart/dpo.yaml --overwrite
	$(BIN)/alignkit generate runs/quickstart-dpo --against runs/quickstart-sft \
		--file data_templates/sft/prompts.txt --max-new-tokens 100

# Compiled modules are kept: each worker and each command that a test starts would compile them again.
test check: export PYTHONDONTWRITEBYTECODE =
test: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

check: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not real_model and not slow"

# SEED draws other faults, COUNT more or fewer of them.
SEED ?= 1
COUNT ?= 200
faults: $(VENV)/.test
	$(BIN)/python -m tests.faults --count $(COUNT) --seed $(SEED) --write

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
