# `make` lists the targets. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,docs,dgl,flower,ogb,vision

# Processes that run the tests side by side, one thread each; 0: in this process.
TEST_WORKERS ?= 2

export OMP_NUM_THREADS ?= 2
# Every start of Python would compile torch and its companions anew.
unexport PYTHONDONTWRITEBYTECODE
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-all lint format docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv with everything that the other targets need

# The stamp is the last thing written: without it an unfinished .venv is built anew. Bytecode is
# left to the first import; compiling all of torch and its companions would take most of a minute.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is missing or older than 3.11; name another with 'make PYTHON=...'" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "error: $(PYTHON) cannot create environments; install its venv package (Debian: python3-venv)" >&2; \
		exit 1; }
	@echo "Installing gist[$(EXTRAS)] into $(VENV): a minute or two, mostly for torch"
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	@$(BIN)/python -m pip install -qq --no-compile -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## Train subnets of 1 to 8 on handwritten digits, compare them, write a report
	$(BIN)/gist compare digits --full --subnets 1,2,4,8 --out runs/demo
	$(BIN)/gist report runs/demo

test: $(STAMP) ## Run the tests, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadgroup -m "not slow"

test-all: $(STAMP) ## Run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadgroup

lint: $(STAMP) ## Check style, formatting and types
	@failed=0; for check in "ruff check ." "ruff format --check ." mypy; do \
		echo "$$check"; $(BIN)/$$check || failed=1; done; exit $$failed

format: $(STAMP) ## Format the code and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Build the documentation; tutorials are executed
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "Documentation: docs/_build/html/index.html"

clean: ## Remove everything that was made here, .venv and runs/ excepted
	rm -rf build dist docs/_build docs/generated docs/jupyter_execute .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
