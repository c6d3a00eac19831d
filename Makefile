# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later

# All commands but the last set up what they need on a fresh machine, in a virtual environment of their own:
#   make demo    simulate a patch, deblend it under pipetask, draw it
#   make test    check style and types, and run every test that needs no LSST stack
#   make test-slow    run the tests that take long: patches through bps, runs killed at every stage
#   make dist    build wheels and source distributions in dist/, and check them
#   make dist-demo    install these wheels into an environment of its own, and run the demonstration from there
#   make bench   measure speed, memory and accuracy; AGAINST=DIRECTORY compares with another checkout
#   make docs    build the documentation, build/docs/index.html
# The last runs in an LSST stack that has been set up, or that sourcing STACK_ENV sets up:
#   make stack-test    run the tests that need it

PYTHON ?= python3.12
VENV ?= .venv
DEMO ?= demo

# Many small arrays: threads of one process would only get in each other's way.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow dist dist-demo bench docs stack-test clean

demo: $(VENV)/.runtime
	$(VENV)/bin/vaedeblend demo --overwrite $(DEMO)

test: $(VENV)/.test
	$(VENV)/bin/ruff check python packages tests config benchmarks
	$(VENV)/bin/towncrier build --draft --version next > /dev/null
	$(VENV)/bin/mypy --python-executable $(VENV)/bin/python
	$(VENV)/bin/python -m pytest -n 2 -m "not stack and not slow"

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 -m "slow and not stack"

PAPER = packages/meas_vaedeblend_paper

dist: $(VENV)/.test
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
	$(VENV)/bin/python -m build --outdir dist $(PAPER)
	$(VENV)/bin/twine check --strict dist/*

# Outside of the clone, so that nothing of it can be found by chance.
dist-demo: dist
	rm -rf $(VENV)-dist
	$(PYTHON) -m venv $(VENV)-dist
	unset PYTHONPATH && $(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check \
	    "$$(echo $(CURDIR)/dist/meas_vaedeblend-*.whl)[cpu,evaluate]" dist/meas_vaedeblend_paper-*.whl
	tmp=$$(mktemp -d) && cd $$tmp && unset PYTHONPATH MEAS_VAEDEBLEND_DIR \
	    && $(abspath $(VENV))-dist/bin/vaedeblend info | grep -x 'lsst_ugrizy\|arcelin2020_transfer' \
	    && $(abspath $(VENV))-dist/bin/vaedeblend path bps/deblend.yaml \
	    && $(abspath $(VENV))-dist/bin/vaedeblend demo --galaxies 40 --cells 2 2 demo && rm -rf $$tmp

BENCH = $(VENV)/bin/python benchmarks/bench.py
VERSUS = $(if $(AGAINST),--against $(AGAINST))

bench: $(VENV)/.runtime
	$(BENCH) demo $(VERSUS)
	$(BENCH) scaling --most 2000 $(VERSUS) $(if $(AGAINST),--against-most 1000)
	$(BENCH) crowded --sizes 10,30,100,300 $(VERSUS) $(if $(AGAINST),--against-most 100)
	$(BENCH) accuracy --fields 4 $(VERSUS)

docs: $(VENV)/.docs
	# Pages of names that are gone would stay, and fail.
	rm -rf doc/api
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html doc build/docs

STACK_ENV ?= /dev/null

stack-test:
	. $(STACK_ENV) && PYTHONPATH=$(CURDIR)/python:$$PYTHONPATH python -m pytest -m stack tests/stack

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,evaluate]'
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -e packages/meas_vaedeblend_paper
	touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-dist $(DEMO) build dist doc/api
