# `make` alone lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: help setup demo test check bench fmt proto clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt requirements-data.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Connito needs Python 3.11 or newer; python3 is $$(python3 -V)" >&2; exit 2; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(PY) || python3 -m venv $(VENV)
	@scripts/install-torch $(PY)
	@$(PIP) install --quiet -c constraints.txt -e '.[model,data,demo,console,oidc,tracing,dev]'
	@$(PIP) install --quiet --no-deps -r requirements-data.txt
	@touch $@

setup: $(READY) ## install everything into .venv

demo: $(READY) ## adapt a real model to a real domain on this machine, end to end
	@$(VENV)/bin/connito up --domain medical --cycles 3 --miners 3 --validators 3

check: $(READY) ## the fast loop: lint, types, architecture, contract, unit tests
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./scripts/check

test: $(READY) ## every check that CI runs
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./scripts/test

bench: $(READY) ## quick runs of the benchmarks; `python -m bench.<name>` is a full one, `bench.demo` the demo
	@$(PIP) install --quiet --no-deps -c constraints.txt peft torchao
	@for name in overhead selection cost engine memory forgetting decentralised schedules routing_modes residency document_pools \
	  validator_throughput attacks copies racing trust composition compounding lifecycle calibration search \
	  console reading merge_pass; do \
	  $(PY) -m bench.$$name --quick || exit 1; done

fmt: $(READY) ## format the code
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

proto: $(READY) ## regenerate the code under shared/connito/v1
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./scripts/generate-proto

clean: ## remove what running leaves behind (not .venv)
	@rm -rf .connito out .mypy_cache .ruff_cache .pytest_cache
