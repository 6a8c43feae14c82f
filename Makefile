# make train: from nothing to R1-Zero. make test: ruff, then the tests. make test-all: the long ones too.
# make check-docs: the pages against the code, their recipes applied and run. make results: every run,
# table and picture of the README's phenomena. All make .venv first.

PYTHON ?= python3
PYTEST = .venv/bin/pytest --numprocesses 2 --dist loadfile

train: .venv/ready
	.venv/bin/python train.py $(ARGS)

test: .venv/ready-to-test
	.venv/bin/ruff check .
	$(PYTEST) -m "not slow and not docs"

test-all: .venv/ready-to-test
	.venv/bin/ruff check .
	$(PYTEST)

check-docs: .venv/ready-to-test
	$(PYTEST) -m docs

results: .venv/ready-to-test
	.venv/bin/python -m experiments.study.study $(ARGS)

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-to-test: .venv/ready tests/requirements.txt
	.venv/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

.PHONY: train test test-all check-docs results
