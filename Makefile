# The two commands of the README: `make demo` and `make test`. Both need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV_TEST := .venv-test
VENV_DEMO := .venv

.PHONY: help test demo bench scale crash fuzz soak flips lint clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

test: ## a fresh venv, install, lint, types, tests
	rm -rf $(VENV_TEST)
	$(MAKE) $(VENV_TEST)/bin/pytest
	$(MAKE) lint BIN=$(VENV_TEST)/bin
	$(VENV_TEST)/bin/pytest -n 2 --dist loadfile

$(VENV_TEST)/bin/pytest: # what `make test` left is used again by the long runs; where nothing is, it is made
	$(PYTHON) -m venv $(VENV_TEST)
	$(VENV_TEST)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir '.[test]'

lint: BIN ?= .venv-test/bin
lint: ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: ## install, then scan 27 synthetic files to demo/out.csv
	@test -x $(VENV_DEMO)/bin/cxrbatch || echo "Installing into $(VENV_DEMO), PyTorch too: some minutes, up to 6 GB."
	test -x $(VENV_DEMO)/bin/cxrbatch || ($(PYTHON) -m venv $(VENV_DEMO) && \
	  $(VENV_DEMO)/bin/pip install --quiet --disable-pip-version-check '.[review]')
	$(VENV_DEMO)/bin/cxrbatch samples demo/incoming
	@# Exit 3 is what we want here: the samples hold broken files, and each of them becomes a row.
	$(VENV_DEMO)/bin/cxrbatch --db sqlite:///demo/cxrbatch.db scan demo/incoming --csv demo/out.csv; test $$? -eq 3
	@echo "The rows are in demo/out.csv; docs/reference/columns.md says what the columns mean."
	@echo "To review them in a browser: $(VENV_DEMO)/bin/cxrbatch --db sqlite:///demo/cxrbatch.db review"

bench: BIN ?= .venv-bench/bin
bench: ## how fast is a scan, beside the scripts that people write? BENCH="--quick" takes a minute or two
	test -x $(BIN)/python || ($(PYTHON) -m venv .venv-bench && \
	  .venv-bench/bin/pip install --quiet --disable-pip-version-check '.[bench]')
	PYTHONPATH=$(CURDIR) $(BIN)/python -m bench $(BENCH)

scale: $(VENV_TEST)/bin/pytest ## a million known files: second scan, queries, exports, pages of the review, its images in a browser (some ten minutes, 3 GB in /tmp; SCALE="--files 100000" is less)
	PYTHONPATH=$(CURDIR) $(VENV_TEST)/bin/python bench/scale.py $(SCALE)
	PYTHONPATH=$(CURDIR) $(VENV_TEST)/bin/python -m bench.reviewing $(SCALE)
	PYTHONPATH=$(CURDIR) $(VENV_TEST)/bin/python -m bench.browsing

# PYTHONPATH: the code as it is here, not as it was when the environment was made. -s: each run says what it counted.
crash: $(VENV_TEST)/bin/pytest ## every kill -9 and every fault, the whole (hours)
	PYTHONPATH=$(CURDIR) CXRBATCH_CRASH_N=500 $(VENV_TEST)/bin/pytest -m crash -s --timeout 14400

fuzz: $(VENV_TEST)/bin/pytest ## 20,000 mutated and hostile files
	PYTHONPATH=$(CURDIR) CXRBATCH_FUZZ_N=20000 $(VENV_TEST)/bin/pytest -m fuzz -s --timeout 14400

soak: $(VENV_TEST)/bin/pytest ## long and large runs
	PYTHONPATH=$(CURDIR) CXRBATCH_SOAK_N=100000 $(VENV_TEST)/bin/pytest -m soak -s --timeout 28800

flips: $(VENV_TEST)/bin/pytest ## what cheap decode changes, on ../shared (half an hour or more)
	PYTHONPATH=$(CURDIR) $(VENV_TEST)/bin/python -m bench.flips

clean: ## forget the virtual environments, the demo and the images of the bench
	rm -rf $(VENV_TEST) $(VENV_DEMO) .venv-bench demo bench/inputs bench/results
