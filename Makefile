# make demo   the story, on an embedded PostgreSQL that stays up for a look around; make stop removes it
#             with SERVER=system on the machine's own PostgreSQL, where pg_cron is seen to run the job
# make test   everything the tests need, then the tests, a part on each of PostgreSQL 15 to 18: seven minutes on 2 cores
# make quick  lint, types and the tests that matter most, on PostgreSQL 18: less than a minute
# make proof  everything on every server, with long versions, as root also as an ordinary user, and then the mutations:
#             some hours on 2 cores. A part of it: make proof PROOF=tests/proof/test_crashes_lose_no_write.py,
#             make ordinary-user, or make mutations MUTATIONS='--count 60 --seed 1'
# make mirror the second direction of sql/ from the first: after each change of that file
# make bench  level_sync against what people would use instead
#             make bench BENCH='--server embedded --only one,hot' for a part; --help says what else

PYTHON ?= python3
SERVER ?= embedded
VENV   := .venv
BIN    := $(VENV)/bin
SUPPORT := tests/support
# Long tests that measure, or that take the whole machine.
ALONE  := $(addprefix tests/,commit/test_bulk_is_carried_as_a_set.py monitor/test_metrics_say_what_is.py \
            proof/test_a_large_reconcile_beside_writers.py proof/test_faults_fail_no_write.py \
            proof/test_hot_pairs_fail_no_write.py)
# What says soonest that something is broken.
QUICK  := $(addprefix tests/,rules commit/test_deletions_beside_a_set_are_judged.py \
            drain/test_the_drain_reads_the_live_rows.py drain/test_many_pairs_are_done_at_once.py \
            reconcile/test_every_desync_is_repaired.py reconcile/test_plans_are_applied_as_recorded.py \
            writes/test_a_failed_sync_fails_no_write.py writes/test_level_ups_are_carried.py \
            writes/test_one_side_goes_only_with_the_other.py writes/test_write_carries_the_level.py)

.PHONY: demo psql stop test quick proof ordinary-user mutations mirror bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@if [ "$(SERVER)" = system ]; then $(SUPPORT)/install_server_packages; fi
	@$(BIN)/level-sync demo --server $(SERVER)

psql: $(VENV)/.demo
	@$(BIN)/level-sync demo --psql

stop:
	@if [ -x $(BIN)/level-sync ]; then $(BIN)/level-sync demo --stop; else echo "No demo is running."; fi

test: $(VENV)/.test
	@$(SUPPORT)/install_server_packages
	@$(SUPPORT)/unpack_prometheus $(VENV)/prometheus
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

quick: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --servers=18 $(QUICK)

proof: $(VENV)/.test
	@$(SUPPORT)/install_server_packages
	@$(SUPPORT)/unpack_prometheus $(VENV)/prometheus
ifdef PROOF
	$(BIN)/pytest --proof --numprocesses=0 --verbose $(PROOF)
else
	$(BIN)/pytest --proof --numprocesses=2 --verbose $(ALONE:%=--ignore=%)
	$(BIN)/pytest --proof --numprocesses=0 --verbose $(ALONE)
	@if [ "$$(id -u)" = 0 ]; then $(SUPPORT)/as_ordinary_user $(VENV); fi
	PYTHONPATH=$(SUPPORT) $(BIN)/python tests/proof/mutations.py $(MUTATIONS)
endif

ordinary-user: $(VENV)/.test
	@$(SUPPORT)/as_ordinary_user $(VENV)

mutations: $(VENV)/.test
	@$(SUPPORT)/install_server_packages
	PYTHONPATH=$(SUPPORT) $(BIN)/python tests/proof/mutations.py $(MUTATIONS)

mirror:
	$(PYTHON) $(SUPPORT)/render_mirror.py

bench: $(VENV)/.bench
	@$(SUPPORT)/install_server_packages
	PYTHONPATH=$(SUPPORT) $(BIN)/python tests/bench/bench.py $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "level_sync needs Python 3.11 or newer; say which with make PYTHON=..."; exit 1; }
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
