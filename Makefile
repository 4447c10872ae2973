# Two commands for newcomers: `make run` and `make test`.  Both set up what they need.

PYTHON ?= python3
VENV := .venv
FUZZ_SECONDS ?= 3600
# Many tests wait for processes of their own: half as many again as there are cores.
TEST_WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() * 3 + 1) // 2)')
READY := $(VENV)/.ready

.PHONY: run test faults fuzz mutants lint demo bench lock clean help

help:
	@echo "make run    start Coatcheck with an example API and print commands to paste"
	@echo "make test   run all tests"
	@echo "make faults  break processes, databases and clocks for an hour or so; FAULTS_ONLY=F7"
	@echo "make fuzz   an hour of made-up requests and tokens; FUZZ_SECONDS=600 for less"
	@echo "make mutants  change the verifier's checks one by one: does a test notice?"
	@echo "make lint   ruff, format check and mypy"
	@echo "make demo   the whole story as a transcript, with real clients"
	@echo "make bench  cost per token and per verification, as ratios"
	@echo "make lock   pin the dependencies again (needs uv)"

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Coatcheck needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 …"; exit 1; }
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV); once, and a minute or so …"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes -r requirements.lock
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation -e .
	@touch $@

run: $(READY)
	@$(VENV)/bin/python examples/quickstart.py

# Tests start hundreds of processes: what the first one compiles, the others need not.
test: $(READY)
	env -u PYTHONDONTWRITEBYTECODE \
	  $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal

faults: $(READY)
	$(VENV)/bin/python -m tests.faults

fuzz: $(READY)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(VENV)/bin/python -m pytest --show-capture=no tests/fuzz

mutants: $(READY)
	PYTHONPATH=tests nice -n 10 $(VENV)/bin/python -m mutation

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

demo: $(READY)
	@$(VENV)/bin/python examples/demo.py

bench: $(READY)
	@$(VENV)/bin/python -m bench

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
