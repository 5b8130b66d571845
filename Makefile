# Each target sets up .venv where it is missing; a second call finds it and does not install again.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := $(VENV)/.docs
PEERS  := $(VENV)/.peers
PAGE   ?=
ARGS   ?=
export PATH := $(abspath $(BIN)):$(PATH)
export MPLBACKEND ?= agg

.PHONY: demo test quick pytest notebooks outputs sync check bench docs docs-serve test-docs setup clean
demo: $(READY)
	@$(BIN)/python -m fastai_bn.demo $(ARGS)

test: pytest notebooks check

quick: $(READY)         # for daily work: the tests that take no time, in under a minute
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

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

bench: $(PEERS)         # PAGE=accumulate: one page; ARGS="--full --hep2 FOLDER --nuclei FOLDER"; then the pages are drawn anew
	$(BIN)/python -W ignore tools/bench $(PAGE) $(ARGS)
	PYTHONPATH=tools $(BIN)/python -W ignore -m bench.front
	$(BIN)/python tools/outputs.py nbs/benchmarks

docs: $(DOCS)           # the site, into _docs/ (needs npm, for KaTeX)
	$(BIN)/python tools/docs.py

docs-serve: $(DOCS)     # the same, and a server on http://localhost:8000
	$(BIN)/python tools/docs.py serve

test-docs: docs         # every page in Chromium: CHROMIUM=path, or the one on the PATH
	$(BIN)/python -m pytest -n 2 tests/browser.py $(ARGS)

setup: $(READY)
$(READY): settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing fastai_bn and its development tools into $(VENV) (a few minutes, several GB with torch) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

$(PEERS): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	touch $@

$(DOCS): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[doc]'
	touch $@

clean:
	rm -rf _proc _docs _docs_src build dist *.egg-info
