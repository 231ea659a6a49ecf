# llmosd: the verbs of the project. `make` lists them.
#
# A verb that runs something makes .venv first and installs what it needs from the package registries; a second run
# finds it there. Nothing outside this directory is touched.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash

# The first Python of at least 3.11, or what `make PYTHON=…` says.
IS_RECENT := import sys; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3 python3.11 python3.12 python3.13 python3.14
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(IS_RECENT)' 2>/dev/null && echo "$$p" && break; done)

# systemd-python is compiled against libsystemd: installed where its headers are.
SYSTEMD := $(shell pkg-config --exists libsystemd 2>/dev/null && echo ,systemd)

BIN := .venv/bin
HAVE_DEV := .venv/installed-dev$(SYSTEMD)
# All that the demo needs is in the developer's set too.
HAVE_DEMO := $(or $(wildcard $(HAVE_DEV)),.venv/installed-demo)

# What `make test ARGS='-k name -x'` and the other verbs pass on.
ARGS ?=
DEMO := examples/demo.sh
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" examples/run.sh
BENCH := $(BIN)/python -m bench
PROTO := proto/llmos/v1/control.proto

.PHONY: help demo test test-vm test-long run bench style types proto docs clean

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r verb text; do \
		printf '%-17s %s\n' "$$verb" "$$text"; done

demo: $(HAVE_DEMO)  ## a real model, from a cold start to a killed worker that comes back
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(DEMO) $(ARGS)

test: $(HAVE_DEV)  ## every test, the real model's too: at most 10 minutes on two cores
	@$(BIN)/pytest $(ARGS)

test-vm: $(HAVE_DEV)  ## the service on a booted Debian 12, emulated: 4 minutes, and 2 more the first time
	@$(BIN)/python tests/vm/image.py
	@$(BIN)/pytest tests/vm $(ARGS)

test-long: $(HAVE_DEV)  ## the daemon killed at every failpoint, chaos, more seeds, the booted machine: half an hour
	@$(BIN)/pytest tests/long -n 4 --dist worksteal $(ARGS)
	@LLMOS_SIM_SEEDS=60 $(BIN)/pytest tests/simulation $(ARGS)
	@$(MAKE) test-vm ARGS='$(ARGS)'

run: $(HAVE_DEMO)  ## a daemon in the foreground with that model, for exploring
	@$(RUN) $(ARGS)

bench: $(HAVE_DEV)  ## measure: ratios against libzmq's proxy, a bare engine, circus and supervisord
	@$(BENCH) $(ARGS)

style: $(HAVE_DEV)  ## ruff: formatting and lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(HAVE_DEV)  ## mypy --strict, and who may import whom
	@$(BIN)/mypy
	@$(BIN)/lint-imports

proto: $(HAVE_DEV)  ## write the gRPC stubs again, from proto/
	@$(BIN)/python -m grpc_tools.protoc -I proto --python_out=client --pyi_out=client --grpc_python_out=client $(PROTO)

docs: $(HAVE_DEV)  ## write the generated documents again, from the declarations in the code
	@$(BIN)/python docs/generate.py
	@$(BIN)/python -m llmos.cli.reference > docs/cli.md

clean:  ## remove what make made: .venv, the demo's files, caches
	rm -rf .venv .demo .vm .bench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(IS_RECENT)'; then \
		echo >&2 'llmosd needs Python 3.11 or later, and none was found: install it, or name it: make PYTHON=/path/python3'; \
		exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo >&2 'This Python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv'; \
		exit 1; fi
	@echo "==> making .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv .venv

.venv/installed-%: $(BIN)/pip pyproject.toml
	@echo '==> installing llmosd[$*] into .venv: a few minutes the first time'
	@$(BIN)/pip install --editable '.[$*]'
	@rm -f .venv/installed-*
	@touch $@
	@echo '==> installed'
