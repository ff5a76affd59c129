# Everything runs in .venv, which the first command that needs it prepares. `make help` lists the commands.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
# Of the tests of engines those that compare tokens, count pages or find sizes; `OVERLAY_TESTS=tests/engine` runs all.
OVERLAY_TESTS ?= tests/unit/host tests/unit/execution tests/unit/scheduling \
	$(patsubst %,tests/engine/test_%.py,auto doctor full_cache hugging_face isolation small_pool)
# A file whose tests share an engine stays with one worker.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help venv model demo test test-overlay test-fast monitoring image type lint format bench clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: ## prepare .venv with vLLM's CPU build and this package (done by all commands below)
	@$(PYTHON) scripts/install_cpu.py

model: venv ## prepare the demo's and the tests' model in .cache/models
	@$(BIN)/python -m rkv_vllm.demo.model

demo: venv ## serve a small model on this CPU and stream four answers with different KV budgets
	@$(BIN)/rkv-vllm demo

test: venv model ## run the whole test suite; TESTS=tests/server picks a part
	$(PYTEST) --durations=25 $(TESTS)

test-overlay: venv model ## the tests of engines and of the scheduler on the Python of a vLLM without a CPU build
	folder=$$($(BIN)/python scripts/install_overlay.py) && \
	PYTHONPATH=$$folder $(PYTEST) $(OVERLAY_TESTS)

test-fast: venv ## the tests that start no engine, server or browser and need no model
	$(PYTEST) -m "not engine and not browser" $(TESTS)

monitoring: venv model ## prove dashboards and alert rules against a served model and Debian's Prometheus
	@folder=$$($(BIN)/python scripts/install_prometheus.py) && \
	$(BIN)/python scripts/check_monitoring.py --prometheus "$$folder"

image: ## build the CPU image without a container engine and ask it something; as root, on Debian
	@$(PYTHON) scripts/check_image.py

type: venv ## mypy
	$(BIN)/python scripts/check_types.py --cache-dir .cache/mypy

lint: type ## ruff check, ruff format --check, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## let ruff sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: venv ## time a compaction on this CPU, GPU or not (.venv has a CPU torch; for GPUs: benchmarks/README.md)
	@$(BIN)/python benchmarks/compaction_cpu.py

clean: ## remove .venv and everything that was made
	rm -rf .venv .cache build dist *.egg-info
