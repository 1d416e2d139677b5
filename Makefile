# Every target sets up what it needs; a second call only checks time stamps.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
STAMP := $(VENV)/.installed
SOURCES := eda adapters server
CHECKED := $(SOURCES) tests recipes benchmarks

.PHONY: install serve test fuzz lint format bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $(STAMP)

serve: install
	$(VENV)/bin/eda serve $(ARGS)

lint: install
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix $(CHECKED)
	$(VENV)/bin/ruff format $(CHECKED)

test: lint
	$(PY) -m pytest $(ARGS)

# A few minutes of random request bodies and files; EXAMPLES of each kind.
EXAMPLES ?= 1000
fuzz: install
	EDA_FUZZ_EXAMPLES=$(EXAMPLES) $(PY) -m pytest tests/fuzz --timeout 1800 $(ARGS)

bench: install
	$(PY) -m benchmarks.compare $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
