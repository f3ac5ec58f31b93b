PYTHON := .venv/bin/python

.PHONY: setup check test test-full bench clean

setup:
	@scripts/setup.sh

$(PYTHON):
	@echo "no .venv yet: run 'make setup' first" >&2; exit 1

check: $(PYTHON)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy engine/mosear export/mosear_export benchmarks

test: $(PYTHON)
	$(PYTHON) -m pytest -m "not full"

test-full: $(PYTHON)
	$(PYTHON) -m pytest

bench: $(PYTHON)
	$(PYTHON) export/build_engine.py --recipe export/recipes/cpu-fp32.toml
	$(PYTHON) export/build_engine.py --recipe export/recipes/cpu-int8.toml
	$(PYTHON) benchmarks/latency.py

clean:
	rm -rf build
