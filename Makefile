# `make quickstart` and `make test` are for everybody; each makes .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CONFIG ?= quickstart
DELTA := io.delta:delta-spark_4.0_2.13:4.2.0
HADOOP_AWS := org.apache.hadoop:hadoop-aws:3.4.1
# The classes of Spark and Delta as a JVM holds them, made once by `setup`: each Spark start then takes ten CPU seconds
# less. A JVM that it does not fit starts without it.
CLASSES := $(CURDIR)/.venv/spark.jsa
QUIET := -Xlog:cds=off -Xlog:cds+dynamic=off
export SPARK_SUBMIT_OPTS += -XX:SharedArchiveFile=$(CLASSES) $(QUIET)

# One worker takes the launches, the other one Spark's tests: see tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: quickstart test test-slow setup browser lint dist bench clean

quickstart: setup
	$(BIN)/gpl simulate --config $(CONFIG)
	$(BIN)/gpl run --config $(CONFIG)
	$(BIN)/gpl judge --config $(CONFIG)
	$(BIN)/gpl summary --config $(CONFIG)

test: setup
	$(PYTEST) -m "not slow"

# What `make test` leaves out. Tools that cannot be installed here have their tests skipped.
test-slow: setup .venv-moto .venv-moto/jars .venv-airflow .venv-notebooks browser
	$(PYTEST) -m slow

setup: .venv/ready

# Made again when a version or the package's metadata changes.
.venv/ready: constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) gpl_core/graph/prerequisites.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -c constraints.txt uv
	@echo "installing into .venv (downloads about 4 GB, mostly torch; 7 GB on disk) …"
	@# Compiled once here: where bytecode may not be written later, every start of torch and transformers compiles them again.
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[spark,gpu,dev]'
	@echo "resolving Delta's jars …"
	@PYSPARK_PYTHON=$(CURDIR)/$(BIN)/python SPARK_SUBMIT_OPTS="-XX:ArchiveClassesAtExit=$(CLASSES) $(QUIET)" $(BIN)/spark-submit --master 'local[1]' --packages $(DELTA) spark_jobs/check_delta.py 2>.venv/jars.log \
		|| { cat .venv/jars.log >&2; echo "Delta's jars could not be resolved from Maven Central" >&2; exit 2; }
	@touch $@

# Servers and libraries whose requirements the tested set does not allow.
.venv-moto .venv-airflow .venv-notebooks: .venv-%: tests/requirements/%.txt | setup
	@rm -rf $@
	@$(BIN)/uv venv --quiet --python $(BIN)/python $@ && $(BIN)/uv pip install --quiet --python $@ -r $< && touch $@ \
		|| { rm -rf $@; echo "$* cannot be installed: the tests that need it are skipped" >&2; }

# What Spark needs for s3a:// (560 MB, the AWS bundle), beside Delta's jars.
.venv-moto/jars: | .venv-moto
	@{ PYSPARK_PYTHON=$(CURDIR)/$(BIN)/python $(BIN)/spark-submit --packages $(DELTA),$(HADOOP_AWS) --conf spark.jars.ivy=$(CURDIR)/$(@D)/ivy \
			--class org.apache.hadoop.util.VersionInfo spark-internal >$(@D)/jars.log 2>&1 \
		&& mkdir -p $@ && cd $(@D)/ivy/jars && mv io.delta_* *hadoop-aws* *awssdk* *wildfly* $(CURDIR)/$@; } \
		|| echo "$(HADOOP_AWS) cannot be resolved ($(@D)/jars.log): the graph on s3a:// is not tested" >&2
	@rm -rf $(@D)/ivy

browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
		|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >.venv/browser.log 2>&1 \
		|| echo "Chromium is not here and apt-get cannot install it (.venv/browser.log): the tests that need it are skipped" >&2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel for pip, and the zip for spark-submit --py-files (executors cannot import from a wheel).
dist: setup
	rm -rf dist build
	git describe --always --dirty --exclude='*' >gpl_core/commit.txt 2>/dev/null || rm -f gpl_core/commit.txt
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m zipfile -c dist/gpl.zip gpl_core/ spark_jobs/
	@rm -f gpl_core/commit.txt

bench: setup
	@set -e; for b in tests/bench/bench_*.py; do $(BIN)/python -m tests.bench.$$(basename $$b .py) --quick; done

clean:
	rm -rf .venv .venv-moto .venv-airflow .venv-notebooks build dist lakehouse/quickstart *.egg-info
