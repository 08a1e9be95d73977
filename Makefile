# `make demo` and `make test` set up all they need in .venv; once that is done, they go straight to work.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PAGE := runs/demo/report.html

.PHONY: demo test lint setup clean

demo: $(READY)
	$(BIN)/compress run recipes/demo.yaml
	@echo "Outputs are in runs/demo, each a folder that transformers loads: small-bits-4 is the 4-bit model, merged the merge."
	@echo "The page that shows size against quality: $(PAGE). Check any of them again: $(BIN)/compress verify runs/demo/merged"

# Two files at a time, as two cores take them: no test measures wall time, and every process of tests has its own folders.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

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
	rm -rf $(VENV) runs
