# Every target sets up what it needs: `make demo` and `make test` work on a machine that has only python3 (>= 3.11).
# The second time they start at once: set-up runs again only when pyproject.toml or constraints.txt changed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo
SEED ?= 0
SIZE ?= default
WORKERS ?= 2
PYTEST_ARGS ?=
DATA ?= ../shared/data
KEEP ?= networks
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c \
	'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 22

.PHONY: demo
demo: $(VENV)/.core ## Simulate an archive, map it, and write a report into OUT=demo
	@start=$$SECONDS; "$(BIN)/slidecube" demo --out "$(OUT)" --seed "$(SEED)"; \
	echo "the demonstration took $$((SECONDS - start)) s, without the set-up"

# in the order of their folders: what takes longest is begun first
XDIST = -n "$(WORKERS)" --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(VENV)/.dev ## Run the tests; PYTEST_ARGS="-k grid" picks some
	@"$(BIN)/pytest" $(XDIST) $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(VENV)/.dev ## Run the slow tests, too
	@"$(BIN)/pytest" $(XDIST) -m "" $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/.bench ## Measure memory against the plan's prediction, and speed beside the peers
	@for script in tests/benchmarks/*.py; do echo "== $$script"; PATH="$(abspath $(BIN)):$$PATH" "$(BIN)/python" "$$script"; done

.PHONY: simulation-report
simulation-report: $(VENV)/.dev ## Score the detectors on simulated archives of five seeds: docs/simulation-report.md
	@"$(BIN)/python" -m slidecube.pipeline.simulate docs/simulation-report.md

.PHONY: ablation
ablation: $(VENV)/.dev ## Score features, and preprocessing step by step, on simulated archives; SEEDS="0 1", SIZE=small
	@"$(BIN)/python" -m slidecube.pipeline.simulate.ablation docs/ablation.md $(SEEDS)
	@"$(BIN)/python" -m slidecube.pipeline.simulate.steps docs/preprocessing.md --size "$(SIZE)" $(SEEDS)

.PHONY: networks
networks: $(VENV)/.dev ## Train, choose and judge networks on simulated worlds, kept in KEEP=networks: docs/networks.md
	@"$(BIN)/python" -m slidecube.pipeline.simulate.networks docs/networks.md --out "$(KEEP)" \
		--ship models/shipped --workers "$(WORKERS)"

.PHONY: real-data
real-data: $(VENV)/.dev ## Make docs/real-data.md, its numbers and pictures from DATA, the folder of real fixtures
	@"$(BIN)/python" docs/real_data "$(DATA)"

.PHONY: check
check: $(VENV)/.dev ## Check style, types and the import rule
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"
	@"$(BIN)/lint-imports" --no-logo

.PHONY: image-test
image-test: ## Build deploy/Dockerfile on a stand-in base and run the image; wants root on Debian or Ubuntu, 30 GB
	@deploy/image-test

.PHONY: format
format: $(VENV)/.dev ## Format the code
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

.PHONY: setup
setup: $(VENV)/.dev ## Set up everything for work on slidecube

.PHONY: constraints
constraints: $(VENV)/.dev ## Compile constraints.txt anew, over all extras
	@"$(BIN)/uv" pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
		--no-header --no-annotate --output-file constraints.txt > /dev/null

.PHONY: clean
clean: ## Remove the environment and what the tools left
	@rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/bin/uv: constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "slidecube needs Python 3.11 or newer, not '$(PYTHON)': make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@start=$$SECONDS; "$(PYTHON)" -m venv "$(VENV)"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv; \
	touch "$@"; echo "set-up: environment made with $$("$(BIN)/python" --version) in $$((SECONDS - start)) s"

# $(1) stamp, $(2) extras
define install
$(VENV)/.$(1): pyproject.toml constraints.txt $(VENV)/bin/uv
	@start=$$$$SECONDS; quiet=; [ -t 2 ] || quiet=--quiet; echo "set-up: downloading and installing packages"; \
	"$(BIN)/uv" pip install $$$$quiet --python "$(BIN)/python" --constraint constraints.txt --editable ".$(2)"; \
	touch "$$@"; echo "set-up: packages downloaded and installed in $$$$((SECONDS - start)) s"
endef
$(eval $(call install,core,))
$(eval $(call install,dev,[dev]))
comma := ,
$(eval $(call install,bench,[dev$(comma)bench]))
