# One virtual environment, two stamps: `make demo` needs only the package and its [eval] extra (150 MB less to download);
# everything else installs every extra except [vision]. A stamp's name is a checksum of what was installed from: while it
# is there no target calls pip, so that all of them work offline.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test check lint types fast bench browser docs clean

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
EXTRAS := export,openvino,eval,dist,report,dev
INPUTS := $(shell { sed '/^\[tool\./q' pyproject.toml; cat constraints.txt; } | cksum | cut -d ' ' -f 1)
CORE := .venv/.core-$(INPUTS)
ALL := .venv/.all-$(INPUTS)

# Tests run in JOBS processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

define make_venv
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("zsq: expected Python 3.11 or newer, got %d.%d. Use: make PYTHON=python3.11" % sys.version_info[:2])'
	@rm -f .venv/.core-* .venv/.all-*
	$(PYTHON) -m venv .venv
endef

help:             ## show this list
	@sed -n 's/^\([a-z]*\): .*## /  make \1	/p' $(MAKEFILE_LIST)

setup: $(ALL) .venv/.browser  ## create .venv with every extra except [vision]

$(CORE):
	$(make_venv)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[eval]"
	@touch $(CORE)

$(ALL):
	$(make_venv)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(CORE) $(ALL)

# Tests of the report's page want Chromium. Tried once, where apt may be used; without it they are skipped by name.
.venv/.browser: | $(ALL)
	@sh scripts/browser.sh
	@touch $@

browser:          ## try again to install Chromium for the tests of the report's page
	@sh scripts/browser.sh

demo: $(CORE)     ## quantize the digits network to 4 bits without data, and score it (build/demo)
	@rm -rf build/demo
	@# images of 8x8 pixels: a second thread gains nothing, and on a busy machine costs much
	OMP_NUM_THREADS=1 $(BIN)/zsq quantize digits --bits 4 --budget quick --eval digits --run build/demo

test: $(ALL) .venv/.browser  ## the whole test suite
	$(PYTEST)

check: lint types fast  ## lint, types and fast tests

lint: $(ALL)
	$(BIN)/ruff check .

types: $(ALL)
	$(BIN)/mypy

fast: $(ALL)
	$(PYTEST) -m "not slow"

bench: $(ALL)     ## the measurements behind the README's table, into bench/results (hours)
	for matrix in bench/*.toml; do \
	  $(BIN)/zsq bench $$matrix --jobs $(JOBS) --output bench/results/$$(basename $$matrix .toml).json || exit 1; \
	done
	for what in files speed bound; do \
	  $(BIN)/python bench/export.py $$what --runs runs/bench --output bench/results/export.json || exit 1; \
	done

docs: $(ALL)      ## write docs/fidelity.md from the recipes' docstrings
	$(BIN)/python scripts/render_fidelity.py

clean:            ## remove caches and build/ (keeps .venv and runs/)
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
