"""Migrate and rollback, killed at any moment or started twice: run again, they end whole."""

from __future__ import annotations

import random
import signal
import time

import psycopg
import pytest
import yoyo

import internals
from academy import LICENSE, PATIENCE, add_pair, levels, set_level, wait_until
from catalog import application_rows, snapshot
from level_sync.database import shipped
from level_sync.setup import install
from live_traffic import other_sessions, start
from orm_tables import ORM_TABLES
from tree import MIGRATIONS

# Nothing but the pair and its level: each migrate has to add and build the rest.
BARE_TABLES = """
create table specialization_progress (
  student_id bigint not null, specialization_id text not null, current_level integer not null);
create table user_licenses (
  user_id bigint not null, specialization_type text not null, current_level integer not null);
"""


def test_two_migrates_at_the_same_moment_leave_one_whole_system(empty_database, db):
    both = [start(empty_database, "migrate") for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 0 or "another migrate or rollback is at work" in output, output
    assert 0 in [process.returncode for process in both]
    assert snapshot(empty_database.connect(), with_oids=False) == snapshot(db, with_oids=False)


def test_a_second_migrate_gives_up_with_a_clear_message_while_the_first_is_at_work(database, monkeypatch):
    holder = database.connect()
    holder.execute("select pg_advisory_lock(hashtext('level_sync migrate'))")
    lock = install.LevelSyncBackend.lock
    monkeypatch.setattr(install.LevelSyncBackend, "lock", lambda backend, timeout=0.1: lock(backend, timeout))
    with pytest.raises(install.MigrateError, match="another migrate or rollback is at work in this database; wait"):
        install.migrate(database.dsn)


@pytest.mark.parametrize("command", ["migrate", "rollback"])
def test_killed_at_any_moment_it_can_be_run_again_and_ends_whole(request, empty_database, db, command):
    victim_db = empty_database.connect()
    victim_db.execute(ORM_TABLES)
    untouched = snapshot(victim_db, with_oids=False), application_rows(victim_db)
    install.migrate(empty_database.dsn)
    whole = snapshot(victim_db, with_oids=False)
    started = time.monotonic()
    install.rollback(empty_database.dsn)
    wholly_removed = snapshot(victim_db, with_oids=False)
    if command == "migrate":
        started = time.monotonic()
        install.migrate(empty_database.dsn)
    full_run = time.monotonic() - started
    moments = random.Random(7)  # noqa: S311
    for _ in range(30 if request.config.getoption("proof") else 4):
        (install.rollback if command == "migrate" else install.migrate)(empty_database.dsn)
        process = start(empty_database, command, *(["--yes"] if command == "rollback" else []))
        wait_until(lambda: other_sessions(victim_db) > 0)
        time.sleep(moments.uniform(0, full_run))  # the moment of the accident, not a wait for anything
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (install.migrate if command == "migrate" else install.rollback)(empty_database.dsn)
        assert snapshot(victim_db, with_oids=False) == (whole if command == "migrate" else wholly_removed)
        assert application_rows(victim_db) == untouched[1]
    install.rollback(empty_database.dsn)
    levels_table = "specialization_levels"  # migrate's own, in this database
    for kind, rows in snapshot(victim_db, with_oids=False).items():
        assert [row for row in rows if levels_table not in str(row)] == untouched[0][kind]


def test_rollback_killed_before_a_step_was_marked_undone_does_it_again(empty_database, adopted):
    untouched = application_rows(adopted)
    install.migrate(empty_database.dsn)
    steps = MIGRATIONS[MIGRATIONS.index(internals.TABLES_OF_OURS) :]
    for step in reversed(steps):
        undo = shipped("migrations") / f"{step}.rollback.sql"
        if undo.exists():
            adopted.execute(undo.read_bytes())
        if step != steps[0]:
            adopted.execute(f"delete from {internals.APPLIED_MIGRATIONS} where migration_id = %s", [step])
    install.rollback(empty_database.dsn)
    assert adopted.execute("select to_regnamespace('level_sync')").fetchone() == (None,)
    assert application_rows(adopted) == untouched


@pytest.mark.parametrize("undone", range(1, len(MIGRATIONS)))
def test_migrate_goes_on_where_a_rollback_was_killed(empty_database, undone):
    """On tables that lack columns, keys and constraints, after any number of steps of the rollback."""
    with psycopg.connect(empty_database.dsn, autocommit=True) as db:
        db.execute(BARE_TABLES)
    install.migrate(empty_database.dsn)
    with install._locked_backend(empty_database.dsn) as backend:
        install.queries.remove_triggers(backend.connection)
        for migration in backend.to_rollback(yoyo.read_migrations(str(shipped("migrations"))))[:undone]:
            backend.rollback_one(migration)
    install.migrate(empty_database.dsn)
    with psycopg.connect(empty_database.dsn, autocommit=True) as db:
        add_pair(db, 1, level=3)
        set_level(db, LICENSE, 1, 5)
        assert levels(db, 1) == (5, 5)
