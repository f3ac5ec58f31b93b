# `make setup` once; then check, test, demo, bench. Every recipe runs in .venv.
PYTHON ?= python3.11
RECIPE ?= export/recipes/cpu-fp32.toml
CLIP ?= build/demo.mp4
BIN := .venv/bin
.DEFAULT_GOAL := help

.PHONY: help setup check test test-full test-gpu quantise demo demo-local bench bench-served kernel-tables clean

help:
	@echo "make setup | check | test | test-full | test-gpu | quantise DATA=DIR | demo | demo-local | bench | bench-served | clean"

setup:
	@scripts/setup.sh $(PYTHON)

$(BIN)/python:
	@echo "There is no .venv yet: run \`make setup\` first." >&2; exit 1

check: | $(BIN)/python
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict engine/mosear export/mosear_export benchmarks

# The parts first, so that two workers do not fetch them at once. Files go to workers whole: their fixtures are dear.
test: | $(BIN)/python
	$(BIN)/mosear fetch-demo
	$(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile

test-full: | $(BIN)/python
	$(BIN)/mosear fetch-demo
	$(BIN)/python -m pytest

# What needs a GPU and TensorRT's library: builds with our plugins and runs them.
test-gpu: | $(BIN)/python
	$(BIN)/python -m pytest -m tensorrt

# The decoder quantised by NVIDIA's Model Optimizer, in an environment of its own, calibrated on the clips of DATA.
quantise: | $(BIN)/python
	@test -n "$(DATA)" || { echo "make quantise DATA=DIR, a folder with voices/ and faces/" >&2; exit 1; }
	scripts/setup_quantise.sh $(PYTHON)
	$(BIN)/python export/build_engine.py
	$(BIN)/python export/quantise_onnx.py --data $(DATA)

# Fetch the demo parts, build the engine, assemble the repository, serve it, ask about a clip over gRPC, stop.
demo: setup
	$(BIN)/mosear fetch-demo
	$(BIN)/python export/build_engine.py --recipe $(RECIPE)
	$(BIN)/mosear repo
	$(BIN)/mosear demo --clip $(CLIP)

# The same in one process, without a server.
demo-local: | $(BIN)/python
	$(BIN)/mosear fetch-demo
	$(BIN)/python export/build_engine.py --recipe $(RECIPE)
	$(BIN)/mosear ask $(CLIP) --local --task conflict

bench: | $(BIN)/python
	$(BIN)/python export/build_engine.py
	$(BIN)/python export/build_engine.py --recipe export/recipes/cpu-int8.toml
	$(BIN)/python benchmarks/latency.py

# The committed tables of the kernels, after a change to one: resources, computed costs, mutants.
kernel-tables: | $(BIN)/python
	$(BIN)/python benchmarks/kernels.py --resources
	$(BIN)/python benchmarks/kernels.py --no-time
	$(BIN)/python tests/kernels/mutants.py

# Through a server, about 25 minutes. Beside `mosear serve`: python benchmarks/latency.py --url 127.0.0.1:8001
bench-served: | $(BIN)/python
	$(BIN)/python export/build_engine.py
	$(BIN)/mosear repo
	$(BIN)/python benchmarks/throughput.py --serve
	$(BIN)/python benchmarks/perf_analyzer.py --serve

# What was built; the environment and the fetched parts stay.
clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find engine export tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
