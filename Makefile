# make train: from nothing to R1-Zero. make test: ruff, then the tests. make results: every run, table and picture of
# the README's phenomena. All make .venv first.

PYTHON ?= python3

train: .venv/ready
	.venv/bin/python train.py $(ARGS)

test: .venv/ready-to-test
	.venv/bin/ruff check .
	.venv/bin/pytest --numprocesses 2 --dist loadfile

results: .venv/ready-to-test
	.venv/bin/python experiments/study.py $(ARGS)

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-to-test: .venv/ready tests/requirements.txt
	.venv/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

.PHONY: train test results
