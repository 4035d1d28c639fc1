# Two commands for everybody: `make quickstart` and `make test`. Both make .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CONFIG ?= quickstart
DELTA := io.delta:delta-spark_4.0_2.13:4.2.0
# The classes of Spark and Delta as a JVM holds them, made once by `setup`: each Spark start then takes ten CPU seconds
# less. A JVM that it does not fit starts without it.
CLASSES := $(CURDIR)/.venv/spark.jsa
QUIET := -Xlog:cds=off -Xlog:cds+dynamic=off
export SPARK_SUBMIT_OPTS += -XX:SharedArchiveFile=$(CLASSES) $(QUIET)

.PHONY: quickstart test setup lint dist bench clean

quickstart: setup
	$(BIN)/gpl simulate --config $(CONFIG)
	$(BIN)/gpl run --config $(CONFIG)
	$(BIN)/gpl judge --config $(CONFIG)
	$(BIN)/gpl summary --config $(CONFIG)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

setup: .venv/ready

# Made again when a version or the package's metadata changes.
.venv/ready: constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) gpl_core/graph/prerequisites.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt uv
	@echo "installing into .venv (about 5 GB, mostly torch) …"
	@# Compiled once here: where bytecode may not be written later, every start of torch and transformers compiles them anew.
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[spark,gpu,dev]'
	@echo "resolving Delta's jars …"
	@PYSPARK_PYTHON=$(CURDIR)/$(BIN)/python SPARK_SUBMIT_OPTS="-XX:ArchiveClassesAtExit=$(CLASSES) $(QUIET)" $(BIN)/spark-submit --master 'local[1]' --packages $(DELTA) spark_jobs/check_delta.py 2>.venv/jars.log \
		|| { cat .venv/jars.log >&2; echo "Delta's jars could not be resolved from Maven Central" >&2; exit 2; }
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel for pip, and the zip for spark-submit --py-files (executors cannot import from a wheel).
dist: setup
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m zipfile -c dist/gpl.zip gpl_core/ schemas/ spark_jobs/

bench: setup
	@set -e; for b in tests/bench/bench_*.py; do $(BIN)/python -m tests.bench.$$(basename $$b .py) --quick; done

clean:
	rm -rf .venv build dist lakehouse *.egg-info
