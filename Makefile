# Two commands matter: `make demo` and `make test`. Both set everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
POLYTOWER_HOME ?= .polytower
export POLYTOWER_HOME

# pytest on as many processes as there are cores
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile

.PHONY: help install demo test test-fast test-faults accept check format docs dev serve clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED) ## create .venv and install everything, pinned by constraints.txt

demo: $(INSTALLED) ## the main job on MovieLens-100k (IMAGES=DIR adds posters, JSON=1 ends with one JSON line)
	$(BIN)/polytower demo $(if $(IMAGES),--images "$(IMAGES)") $(if $(JSON),--json)

test: check ## lint, types, import rules, then the tests on a real Postgres
	$(PYTEST)

test-fast: $(INSTALLED) ## the tests that need no database and no heavy import
	$(PYTEST) -m "not database and not slow"

accept: $(INSTALLED) ## the whole product path, as a user has it (DATA=DIR [IMAGES=DIR] for your own data, PRESET=NAME, JSON=1)
	$(BIN)/python -m tests.acceptance $(if $(DATA),--data "$(DATA)") $(if $(IMAGES),--images "$(IMAGES)") \
	  $(if $(PRESET),--preset "$(PRESET)") $(if $(JSON),--json)

check: $(INSTALLED) ## lint, types and import rules only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-faults: $(INSTALLED) ## kill -9 at random moments over the whole flow (ROUNDS=10, SEED=N draws the same moments again)
	$(BIN)/python -m tests.faults --rounds $(or $(ROUNDS),10) $(if $(SEED),--seed $(SEED))

docs: $(INSTALLED) ## the documentation as a site in build/site; broken links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dev: $(INSTALLED) ## Dagster's user interface on the platform's assets
	$(BIN)/polytower dagster dev

serve: $(INSTALLED) ## the HTTP API
	$(BIN)/polytower serve

bench-%: $(INSTALLED)
	$(BIN)/python -m benchmarks.$*

clean: ## stop the embedded Postgres and delete all local state
	-$(BIN)/polytower db stop
	rm -rf $(POLYTOWER_HOME)
