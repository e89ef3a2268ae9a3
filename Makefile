# make run: environment, then every notebook on the default profile, then the table of claims.
# make test: environment, then pytest, and nbval over the notebooks.
# make bench: our fast paths beside what people would use instead (benchmarks/RESULTS.md); after make run, and with nothing else running.
PYTHON ?= python3
PROFILE ?= tiny
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: run test lab env bench clean
run: env
	$(BIN)/python -m personas run --profile $(PROFILE) $(RUN_FLAGS)

test: env .venv/extras .venv/sae-lens
	$(BIN)/pytest
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 --timeout=7200 notebooks

bench: env
	$(BIN)/python benchmarks/bench.py $(BENCH_FLAGS)

lab: env
	$(BIN)/jupyter lab notebooks

env: .venv/installed
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

# What only some profiles need, for their tests.
.venv/extras: constraints.txt pyproject.toml | .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[cluster,four-bit]"
	touch $@

# SAELens 6 needs another TransformerLens than the project: it lies apart, for tests/test_sae_lens.py alone.
.venv/sae-lens: tests/sae-lens.txt | .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --upgrade --target $@ -r tests/sae-lens.txt
	touch $@

clean:
	rm -rf .venv runs
