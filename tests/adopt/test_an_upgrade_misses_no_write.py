"""What another version of level_sync has installed or left half done: migrate and the next run make it whole."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg

import internals
from academy import BOTH, add_pairs, bypass, call, configure, drain, last_run, levels, queued, set_level, wait_until
from level_sync.setup import install
from level_sync.verify import verify


def test_run_whose_first_batches_an_older_version_made_is_counted_whole(db):
    """They left what they had repaired in the plan and told nothing meanwhile."""
    configure(db, batch_size=7)
    add_pairs(db, 60)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    run_id = internals.start_and_plan_run(db, last_user=100)
    with bypass(db):
        db.execute("update user_licenses set current_level = 5, max_achieved_level = 5 where user_id <= 40")
    db.execute("update level_sync.sync_plan set outcome = 'repaired' where user_id <= 40")
    internals.finish_run(db, run_id, next_user=41, batch_size=7)
    run = last_run(db)
    assert (run["status"], run["issues_found"], run["synced_count"]) == ("success", 60, 60)
    assert run["results"]["outcomes"] == {"repaired": 60}


def test_a_function_of_an_older_version_is_gone_after_migrate(database, db):
    older = internals.FUNCTION_OF_AN_OLDER_VERSION
    db.execute(f"create function {older}(integer) returns integer language sql as 'select 1'")
    install.migrate(database.dsn)
    assert db.execute("select to_regproc(%s)", [older]).fetchone() == (None,)
    assert {check.name: check.ok for check in verify(database.dsn)}["shipped_functions"] is True


def lock_both(db: psycopg.Connection[Any]) -> None:
    """Both tables at once, in short tries, so that no writer that has one and wants the other meets a deadlock."""
    while True:
        try:
            with db.transaction():
                db.execute("set local lock_timeout = '50ms'")
                db.execute("lock table specialization_progress, user_licenses in access exclusive mode")
                return
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.01)


@BOTH
def test_an_upgrade_leaves_no_moment_without_triggers(database, db, table):
    """The writer looks after each commit whether its write was carried."""
    add_pairs(db, 2)
    was_carried: list[bool] = []
    ends = threading.Event()

    def write() -> None:
        connection = database.connect(autocommit=False)
        while not ends.is_set():
            new = 1 + len(was_carried) % 8
            set_level(connection, table, 1, new)
            connection.commit()
            # While a table is locked the pair may be queued, as for any lock.
            was_carried.append(levels(connection, 1) == (new, new) or queued(connection) != [])
            connection.commit()
            time.sleep(0.002)  # think time

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for version in range(6):
            # An older version: other bodies, another WHEN.
            with db.transaction():
                lock_both(db)
                for on_table, name in internals.LEVEL_CHANGED.items():
                    function = internals.CARRY[on_table]
                    body = call(db, "select pg_get_functiondef(%s::regproc)", function)
                    db.execute(body.replace("begin\n", f"begin  -- version {version}\n", 1))
                    db.execute(f"drop trigger {name} on {on_table}")
                    db.execute(
                        f"create trigger {name} after update on {on_table} for each row"
                        f" when (old.current_level <> new.current_level) execute function {function}()"
                    )
            written = len(was_carried)
            install.migrate(database.dsn)
            wait_until(lambda written=written: len(was_carried) > written + 20)
    finally:
        ends.set()
        writer.join()
    assert all(was_carried)
    drain(db)
    checks = {check.name: check.ok for check in verify(database.dsn)}
    assert checks["triggers"] is checks["functions"] is checks["shipped_functions"] is True
