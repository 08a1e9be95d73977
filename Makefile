# `make demo` and `make test` set up all they need in .venv; once that is done, they go straight to work.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := examples/tiny-llama
RESULT := out/tiny-llama-gptq-w4
TEXT := weightworks/stream/builtin/verification.txt

.PHONY: demo test lint setup clean

# The first 1,024 tokens of the text are English prose and code; this small model knows nothing of the rest.
demo: $(READY)
	$(BIN)/compress quantize $(MODEL) --bits 4 --seq-len 256 --output-dir $(RESULT) --overwrite
	$(BIN)/compress evaluate $(MODEL) $(RESULT) --perplexity $(TEXT) --seq-len 256 --max-tokens 1024
	@echo "The quantized model is in $(RESULT): README.md there is its model card, provenance.json its record."
	@echo "Size, time and perplexity before and after stand above. Check it again: $(BIN)/compress verify $(RESULT)"

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(READY)

# torch goes first and alone: plain pip takes a CPU wheel where one is at hand, whereas a torch that comes along as
# somebody's dependency may bring gigabytes of CUDA packages with it. What is already installed is then left alone.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out
