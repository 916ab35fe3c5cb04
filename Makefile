# Every target sets itself up: the first one you call installs Acorn into .venv, with plain pip.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
QUICKSTART := runs/quickstart
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -rs
PIP := -m pip install -q --disable-pip-version-check
OLDEST := .venv/oldest
CLIENTS := .venv-clients
LLAMA := llama-cpp-python==0.3.36
# What a version of transformers can break: the model, its saved directory, generate, Trainer, PEFT and the conversions.
VERSION_TESTS := $(addprefix tests/test_,$(addsuffix .py,modeling model_abilities continuous_batching hub_copy generate cli pretrain \
	resume trainer_overheads signals finetune finetune_bases adapters merge convert formats_gpt2 \
	windows strategies serve))
# `make newest TORCH=torch==2.13.0` keeps torch as it is
TORCH := torch

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-clients conformance test-versions newest lock style format

help:  ## show this list
	@echo "Acorn: plant a text, grow a GPT."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  make %-13s %s\n", $$1, $$2 }'
	@echo
	@echo "Type next:  make quickstart"

install: $(INSTALLED)  ## install Acorn into .venv
	@echo "Installed. Type next:  $(BIN)/acorn --help"

quickstart: $(INSTALLED)  ## train a small GPT on this machine, from nothing to samples
	@if [ -e $(QUICKSTART) ]; then \
		echo "$(QUICKSTART) is already there. Type next, to"; \
		echo "  draw text from it         $(BIN)/acorn generate $(QUICKSTART)"; \
		echo "  measure it                $(BIN)/acorn evaluate $(QUICKSTART)"; \
		echo "  go on, if it was stopped  $(BIN)/acorn resume $(QUICKSTART)"; \
		echo "  grow it anew              rm -r $(QUICKSTART) && make quickstart"; \
	else $(BIN)/acorn pretrain quickstart; fi

test: $(INSTALLED)  ## run the tests: tiny, offline, on the CPU
	$(PYTEST)

test-slow: $(INSTALLED) $(CLIENTS)/.llama  ## run the tests that take longer
	-@$(BIN)/python -m tests.transformers_tests
	ACORN_CONFORMANCE=some $(PYTEST) -m 'slow and not clients'
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -q -rs -m 'slow and clients'

test-clients: $(INSTALLED) $(CLIENTS)/.installed  ## run the tests of what takes an Acorn model: TRL, lm-eval, gradio, onnxruntime ...
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -q -n 2 -rs -m 'clients and not slow'

conformance: $(INSTALLED)  ## run transformers' own tests of models over every variant: an hour
	$(BIN)/python -m tests.transformers_tests
	ACORN_CONFORMANCE=all $(PYTEST) -m slow tests/test_conformance.py

test-versions: $(INSTALLED) $(OLDEST)/.installed  ## run the tests that depend on transformers with the oldest versions
	PYTHONPATH=$(OLDEST) $(PYTEST) $(VERSION_TESTS)
	ACORN_VERSIONS=$(OLDEST) $(PYTEST) tests/test_versions.py

newest:  ## run the tests with what the registry has today, beyond the lock: what breaks is printed
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python $(PIP) $(TORCH) $$($(PYTHON) tests/requirements.py)
	.venv-newest/bin/python $(PIP) --no-deps -e .
	.venv-newest/bin/python -m pip list --format=freeze | diff -i constraints.txt - | grep '^[<>]' || true
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n 2 --tb=line

lock:  ## write constraints.txt anew, from the newest versions that pyproject.toml admits
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(PIP) torch==$(shell sed -n 's/^torch==//p' constraints.txt) -e '.[dev]'
	{ sed -n '/^#/p' constraints.txt; .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		| sed 's/+cpu$$//'; } > constraints.tmp && mv constraints.tmp constraints.txt
	rm -r .venv-lock

style: $(INSTALLED)  ## check lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## mend lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp makes a changed pyproject.toml or lock install again, and everything else a no-op.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Acorn needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing):" \
		"name another, e.g. 'make install PYTHON=python3.12'." >&2; exit 1; }
	@echo "Installing Acorn into .venv (a few minutes the first time) ..."
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) -c constraints.txt setuptools
	@$(BIN)/python $(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# An environment on top of .venv: it sees what is installed there, and adds the clients.
$(CLIENTS)/.installed: tests/clients.txt $(INSTALLED)
	@echo "Installing the clients of tests/clients.txt into $(CLIENTS) (a minute or two) ..."
	@rm -rf $(CLIENTS)
	@$(PYTHON) -m venv $(CLIENTS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/acorn.pth
	@$(CLIENTS)/bin/python $(PIP) -c constraints.txt -r tests/clients.txt
	@touch $@

# llama.cpp for Python, which the registry has as source alone: eight minutes of one core, and a C++ compiler.
$(CLIENTS)/.llama: $(CLIENTS)/.installed
	@echo "Compiling $(LLAMA) into $(CLIENTS) (some minutes) ..."
	@$(CLIENTS)/bin/python $(PIP) --no-deps $(LLAMA)
	@touch $@

# Beside the environment, in a folder that PYTHONPATH puts before it.
$(OLDEST)/.installed: tests/oldest.txt $(INSTALLED)
	@rm -rf $(OLDEST)
	@$(BIN)/python $(PIP) --no-deps --target $(OLDEST) -r tests/oldest.txt
	@touch $@
