# make demo   the story, on an embedded PostgreSQL that stays up for a look around; make stop removes it
#             with SERVER=system on the machine's own PostgreSQL, where pg_cron is seen to run the job
# make test   everything the tests need, then the tests
# make proof  the same with long versions, on PostgreSQL 16 as well, as root also as an ordinary user, and then the
#             mutations: an hour and a quarter on 2 cores. A part of it: make proof PROOF=tests/test_crashes.py,
#             make ordinary-user, or make mutations MUTATIONS='--count 60 --seed 1'
# make bench  level_sync against what people would use instead
#             make bench BENCH='--server embedded --only one,hot' for a part; --help says what else

PYTHON ?= python3
SERVER ?= embedded
VENV   := .venv
BIN    := $(VENV)/bin
# Long tests that measure, or that take the whole machine.
ALONE  := $(addprefix tests/test_,bulk.py hammer.py hot_pairs.py large_reconcile.py metrics.py)

.PHONY: demo psql stop test proof ordinary-user mutations bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@if [ "$(SERVER)" = system ]; then tests/install_server_packages; fi
	@$(BIN)/level-sync demo --server $(SERVER)

psql: $(VENV)/.demo
	@$(BIN)/level-sync demo --psql

stop:
	@if [ -x $(BIN)/level-sync ]; then $(BIN)/level-sync demo --stop; else echo "No demo is running."; fi

test: $(VENV)/.test
	@tests/install_server_packages
	@tests/unpack_prometheus $(VENV)/prometheus
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest
	$(BIN)/pytest --embedded-version=16 -k embedded tests/test_write_carries_the_level.py tests/test_reconcile.py

proof: $(VENV)/.test
	@tests/install_server_packages
	@tests/unpack_prometheus $(VENV)/prometheus
ifdef PROOF
	$(BIN)/pytest --proof --numprocesses=0 --verbose $(PROOF)
else
	$(BIN)/pytest --proof --numprocesses=2 --verbose $(ALONE:%=--ignore=%)
	$(BIN)/pytest --proof --numprocesses=0 --verbose $(ALONE)
	$(BIN)/pytest --embedded-version=16 -k embedded
	@if [ "$$(id -u)" = 0 ]; then tests/as_ordinary_user $(VENV); fi
	$(BIN)/python tests/mutations.py $(MUTATIONS)
endif

ordinary-user: $(VENV)/.test
	@tests/as_ordinary_user $(VENV)

mutations: $(VENV)/.test
	@tests/install_server_packages
	$(BIN)/python tests/mutations.py $(MUTATIONS)

bench: $(VENV)/.bench
	@tests/install_server_packages
	$(BIN)/python tests/bench/bench.py $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "level_sync needs Python 3.10 or newer; say which with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group test
	@touch $@

$(VENV)/.bench: $(VENV)/.demo pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group bench
	@touch $@
