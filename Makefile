# The two commands of the README: `make demo` and `make test`. Both need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV_TEST := .venv-test
VENV_DEMO := .venv

.PHONY: help test demo bench scale crash fuzz soak flips lint clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

test: ## a fresh venv, install, lint, types, tests
	rm -rf $(VENV_TEST)
	$(PYTHON) -m venv $(VENV_TEST)
	$(VENV_TEST)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir '.[test]'
	$(MAKE) lint BIN=$(VENV_TEST)/bin
	$(VENV_TEST)/bin/pytest

lint: BIN ?= .venv-test/bin
lint: ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: ## install, then scan two dozen synthetic files to demo/out.csv
	test -x $(VENV_DEMO)/bin/cxrbatch || ($(PYTHON) -m venv $(VENV_DEMO) && \
	  $(VENV_DEMO)/bin/pip install --quiet --disable-pip-version-check .)
	$(VENV_DEMO)/bin/cxrbatch samples demo/incoming
	@# Exit 3 is what we want here: the samples hold broken files, and each of them becomes a row.
	$(VENV_DEMO)/bin/cxrbatch --db sqlite:///demo/cxrbatch.db scan demo/incoming --csv demo/out.csv; test $$? -eq 3
	@echo "The rows are in demo/out.csv; what the columns mean is in docs/reference/columns.md"

bench: BIN ?= .venv-bench/bin
bench: ## how fast is a scan, beside the scripts that people write? BENCH="--quick" takes a minute or two
	test -x $(BIN)/python || ($(PYTHON) -m venv .venv-bench && \
	  .venv-bench/bin/pip install --quiet --disable-pip-version-check '.[bench]')
	PYTHONPATH=$(CURDIR) $(BIN)/python -m bench $(BENCH)

scale: BIN ?= .venv-test/bin
scale: ## a million known files: second scan, queries, exports (half an hour, 8 GB in /tmp; SCALE="--files 100000" is less)
	PYTHONPATH=$(CURDIR) $(BIN)/python bench/scale.py $(SCALE)

crash: ## every kill -9 test, the whole
	CXRBATCH_CRASH_N=500 $(VENV_TEST)/bin/pytest -m crash --timeout 7200

fuzz: ## 20,000 mutated and hostile files
	CXRBATCH_FUZZ_N=20000 $(VENV_TEST)/bin/pytest -m fuzz --timeout 7200

soak: ## long and large runs
	CXRBATCH_SOAK_N=100000 $(VENV_TEST)/bin/pytest -m soak --timeout 14400

flips: ## what cheap decode changes, on ../shared (about ten minutes)
	$(VENV_TEST)/bin/python -m bench.flips

clean: ## forget the virtual environments and the demo
	rm -rf $(VENV_TEST) $(VENV_DEMO) demo
