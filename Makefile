# Two commands are enough: `make demo` and `make test`. `make` alone lists all.
# Everything lives in .venv (and .tools, if uv had to be brought); no environment has to be active.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# The caller's own environment must not decide which one is used here.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
export UV_PROJECT_ENVIRONMENT := .venv

BIN := .venv/bin
FIND_UV := UV="$$(scripts/find_uv.sh)"; export UV;
RUN_TESTS := $(FIND_UV) $(BIN)/python scripts/run_tests.py

.PHONY: help sync demo up down test test-all test-unit test-contract test-property \
	test-integration test-page test-rig observed fuzz audit faults soak bench bench-lock tls-cost seeded-bugs lint types format \
	docs lock clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

sync: ## Install the locked environment into .venv
	@scripts/prepare.sh

demo: sync ## Start M1, W1 and C1 on this machine, run the demo through C1, leave them up
	@$(BIN)/hcna up --wait 300
	@$(BIN)/hcna demo
	@echo
	@echo "It is still up. The commands are in $(BIN) (eval \"\$$($(BIN)/hcna env)\"); make down stops it."

up: sync ## Start M1, W1 and C1 on this machine, or find them running
	@$(BIN)/hcna up --wait 300

down: ## Stop what make demo or make up started
	@if [[ -x $(BIN)/hcna ]]; then $(BIN)/hcna down; \
	else echo "there is no .venv here, so nothing was started from this folder"; fi

test: sync ## Run the whole suite, each part within its time budget
	@scripts/system_packages.sh
	@$(RUN_TESTS)

test-all: sync ## The same with ten times as many steps of the state machine, and every drill
	@scripts/system_packages.sh
	@$(RUN_TESTS) --all

test-unit: sync ## Unit tests, and branch coverage of the core
	@$(RUN_TESTS) unit

test-contract: sync ## One exam for every task store
	@$(RUN_TESTS) contract

test-property: sync ## Hypothesis against the state machine
	@$(RUN_TESTS) property

test-integration: sync ## Tests and notebooks against a real cluster
	@scripts/system_packages.sh
	@$(RUN_TESTS) integration

test-page: sync ## The page at /ui in Chromium; screenshots to build/page
	@scripts/system_packages.sh
	@$(RUN_TESTS) page

test-rig: sync ## Joining, failing and coming back on separate hosts inside this machine, in full (root)
	@scripts/system_packages.sh
	@$(RUN_TESTS) --all rig

observed: sync ## Two hosts under Prometheus, Alertmanager and a collector of traces, for minutes (root)
	@scripts/system_packages.sh
	@$(BIN)/python -m pytest -q tests/rig/test_observed.py $(ARGS)

fuzz: sync ## Schemathesis against the OpenAPI that C1 serves, 500 requests an operation and caller
	@$(RUN_TESTS) --all fuzz

audit: sync ## Known vulnerabilities of the locked packages (asks the Python package index; see scripts/)
	@$(FIND_UV) $(BIN)/python scripts/audit_packages.py $(ARGS)

faults: sync ## The fault programme (hours; resumes where it stopped), its table to docs/RELIABILITY.md
	@scripts/system_packages.sh
	@$(BIN)/python -m tests.faults $(ARGS)

soak: sync ## One hour of load with a fault every two minutes
	@scripts/system_packages.sh
	@$(BIN)/python -m tests.faults --part soak $(ARGS)

# The peers have an environment of their own: what they need must not decide what we install.
PEERS := build/bench/peers
bench: sync ## Measure beside Celery, Procrastinate, Dask and the floors; writes docs/PERFORMANCE.md
	@scripts/system_packages.sh benchmarks
	@$(FIND_UV) [[ -x $(PEERS)/bin/python ]] || "$$UV" venv --quiet --python 3.11 $(PEERS); \
		VIRTUAL_ENV=$(PEERS) "$$UV" pip sync --quiet benchmarks/peers/requirements.txt
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: long-queue simulate shares follow
shares: sync ## Which process a task's CPU time goes to, under load
	@$(BIN)/python -m benchmarks.shares

follow: sync ## 200 clients follow events for a minute while the moderator restarts; one does not read
	@HCNA_TEST_FOLLOWERS=200 HCNA_TEST_FOLLOWED_TASKS=1200 $(BIN)/python -m pytest -q \
		tests/integration/test_events_live.py $(ARGS)

long-queue: sync ## A million tasks in the plain moderator and store, beside an empty one (ARGS="--store postgres")
	@$(BIN)/python -m benchmarks.long_queue $(ARGS)

simulate: sync ## A thousand workers in virtual time around the real moderator (ARGS="--measure")
	@$(BIN)/python -m benchmarks.simulation $(ARGS)

bench-lock: ## Resolve the peers anew into benchmarks/peers/requirements.txt
	@$(FIND_UV) "$$UV" pip compile --quiet --upgrade --python-version 3.11 --no-header \
		-o benchmarks/peers/requirements.txt benchmarks/peers/requirements.in

.PHONY: newcomer captures
newcomer: sync ## A newcomer's first minutes on two hosts, each line with its clock (root, some minutes)
	@scripts/system_packages.sh
	@$(BIN)/python -m tests.rig.newcomer

captures: sync ## Draw the documentation's pictures of terminals anew, from three hosts at work (root, some minutes)
	@scripts/system_packages.sh captures
	@$(BIN)/python -m tests.rig.captures

seeded-bugs: sync ## Break the product on purpose, twenty ways, and see which tests notice
	@scripts/system_packages.sh
	@$(BIN)/python -m tests.seeded_bugs $(ARGS)

tls-cost: sync ## What TLS between Ray's processes costs here (some minutes)
	@$(BIN)/python scripts/tls_cost.py

lint: sync ## Ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: sync ## mypy strict, and the import contracts
	@$(BIN)/mypy hcna_ray scripts benchmarks
	@$(BIN)/lint-imports

format: sync ## Let Ruff sort imports and format
	@$(BIN)/ruff check --fix-only --select I .
	@$(BIN)/ruff format .

docs: sync ## Write the generated pages of docs/ anew
	@$(BIN)/python scripts/generate_reference.py
	@$(BIN)/python scripts/generate_llms.py
	@$(BIN)/python scripts/build_dashboards.py

lock: ## Resolve the dependencies anew into uv.lock
	@$(FIND_UV) "$$UV" lock --upgrade

clean: ## Remove caches and reports; .venv, .tools and your data stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	@find hcna_ray tests scripts notebooks -name __pycache__ -prune -exec rm -rf {} +
	@echo "caches and reports are gone; .venv and .tools may be deleted by hand (make down first)"
