# make quickstart: real data to an evaluated model; make pipeline: a market with known truth to what each policy earns there; make test:
# every test that needs no GPU. Each prepares .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

.PHONY: quickstart pipeline test lint clean

quickstart: $(VENV)/.quickstart
	PATH="$(BIN):$$PATH" bash launch/quickstart.sh

pipeline: $(VENV)/.quickstart
	PATH="$(BIN):$$PATH" bash launch/pipeline.sh

test: $(VENV)/.test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 WANDB_MODE=disabled $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .

# torch first: with it in place nothing else draws in another build of it.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("gpr-dist needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	touch $@

$(VENV)/.quickstart: $(VENV)/.torch setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[quickstart]"
	touch $@

$(VENV)/.test: $(VENV)/.torch setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[quickstart,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
