# `make demo` and `make test` set up .venv where it is missing; a second call finds it and does not install again.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=
export PATH := $(abspath $(BIN)):$(PATH)
export MPLBACKEND ?= agg

.PHONY: demo test pytest notebooks outputs sync check setup clean
demo: $(READY)
	$(BIN)/python -m fastai_bn.demo $(ARGS)

test: pytest notebooks check

pytest: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

notebooks: $(READY)
	$(BIN)/nbdev-test --n-workers 2

outputs: $(READY)       # run the notebooks and store their outputs
	$(BIN)/python tools/outputs.py

sync: $(READY)          # notebooks -> modules, README.md; notebooks cleaned
	$(BIN)/python tools/sync.py

check: $(READY)         # the same, but only says whether anything would change
	$(BIN)/python tools/sync.py --check

setup: $(READY)
$(READY): settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing fastai_bn and its development tools into $(VENV) (a few minutes, several GB with torch) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf _proc build dist *.egg-info
