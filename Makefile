# Every target sets itself up: the first one you call installs Acorn into .venv, with plain pip.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
QUICKSTART := runs/quickstart
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow style format

help:  ## show this list
	@echo "Acorn: plant a text, grow a GPT."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  make %-11s %s\n", $$1, $$2 }'
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

test-slow: $(INSTALLED)  ## run the tests that take longer
	$(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: there are none

style: $(INSTALLED)  ## check lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## mend lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp makes a changed pyproject.toml install again, and everything else a no-op.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Acorn needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing):" \
		"name another, e.g. 'make install PYTHON=python3.12'." >&2; exit 1; }
	@echo "Installing Acorn into .venv (a few minutes the first time) ..."
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@
