"""Migrate and rollback beside live traffic: no write fails, and none waits for long."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from academy import LICENSE, PATIENCE, PROGRESS, levels, set_level, wait_until
from catalog import foreign_keys, snapshot
from level_sync.setup import install
from live_traffic import live_traffic, other_sessions, start
from two_sessions import AT_ONCE, seconds


def test_no_write_fails_or_waits_long_while_migrate_and_rollback_run(empty_database, adopted):
    with live_traffic(empty_database) as traffic:
        install.migrate(empty_database.dsn)
        install.migrate(empty_database.dsn)
        install.rollback(empty_database.dsn)
        install.migrate(empty_database.dsn)
    assert traffic.errors == []
    assert not traffic.was_held_up()
    assert levels(adopted, 1) in [(n, n) for n in range(1, 9)]
    assert len(adopted.execute("select from pg_trigger where not tgisinternal").fetchall()) > 8


def test_killed_at_any_moment_beside_writers_it_ends_whole_and_no_write_fails(request, empty_database, adopted):
    install.migrate(empty_database.dsn)
    whole = snapshot(adopted, with_oids=False)
    install.rollback(empty_database.dsn)
    moments = random.Random(11)  # noqa: S311
    with live_traffic(empty_database) as traffic:
        for _ in range(40 if request.config.getoption("proof") else 3):
            process = start(empty_database, "migrate")
            wait_until(lambda: other_sessions(adopted) > 3)
            time.sleep(moments.uniform(0, 1))  # the moment of the accident, not a wait for anything
            process.send_signal(signal.SIGKILL)
            process.communicate()
            install.migrate(empty_database.dsn)
            assert snapshot(adopted, with_oids=False) == whole
            install.rollback(empty_database.dsn)
        install.migrate(empty_database.dsn)
    assert traffic.errors == []
    assert not traffic.was_held_up()
    assert snapshot(adopted, with_oids=False) == whole


def test_migrate_waits_in_short_tries_for_a_long_transaction_and_finishes_after_it(empty_database, adopted):
    holder = empty_database.connect(autocommit=False)
    set_level(holder, PROGRESS, 3, 5)
    set_level(holder, LICENSE, 4, 5)
    failures: list[BaseException] = []

    def migrate() -> None:
        try:
            install.migrate(empty_database.dsn)
        except BaseException as error:
            failures.append(error)

    migration = threading.Thread(target=migrate)
    migration.start()
    waiting = "select count(*) from pg_locks where not granted and database = %s"
    here = adopted.execute("select oid from pg_database where datname = current_database()").fetchone()
    wait_until(lambda: adopted.execute(waiting, here).fetchone() != (0,))
    for table in (PROGRESS, LICENSE):  # another writer, queued behind migrate's try
        assert seconds(set_level, adopted, table, 9, 6) < AT_ONCE
    assert migration.is_alive()
    holder.commit()
    migration.join(PATIENCE)
    assert not migration.is_alive()
    assert failures == []
    set_level(adopted, PROGRESS, 3, 6)
    assert levels(adopted, 3) == (6, 6)


def test_migrate_gives_up_with_a_clear_message_and_nothing_half_done(empty_database, adopted, monkeypatch):
    monkeypatch.setattr(install, "LOCK_TRIES", 2)
    monkeypatch.setattr(install, "LOCK_TIMEOUT", "50ms")
    before = foreign_keys(adopted, PROGRESS), foreign_keys(adopted, LICENSE)
    holder = empty_database.connect(autocommit=False)
    set_level(holder, LICENSE, 3, 5)
    with pytest.raises(
        install.MigrateError, match=r"live transactions held the tables through 2 tries.*nothing is half"
    ):
        install.migrate(empty_database.dsn)
    assert (foreign_keys(adopted, PROGRESS), foreign_keys(adopted, LICENSE)) == before
    holder.rollback()
    install.migrate(empty_database.dsn)
    set_level(adopted, LICENSE, 3, 6)
    assert levels(adopted, 3) == (6, 6)
