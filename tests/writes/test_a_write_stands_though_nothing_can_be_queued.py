"""A write whose sync can be neither done nor queued stands all the same, and its client is warned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from academy import BOTH, OTHER, SIDE, add_pair, add_pairs, drain, levels, set_level
from internals import PENDING
from two_sessions import AT_ONCE, desyncs, hold, make_other_side_fail, seconds, session, warnings_of


def lock_tables(database: Any, tables: list[str]) -> Callable[[], None]:
    holder = session(database)
    for table in tables:
        holder.execute(f"lock table level_sync.{table} in access exclusive mode")
    return holder.rollback


def rename_tables(database: Any, tables: list[str]) -> Callable[[], None]:
    renamer = session(database, autocommit=True)
    for table in tables:
        renamer.execute(f"alter table level_sync.{table} rename to {table}_gone")

    def restore() -> None:
        for table in tables:
            renamer.execute(f"alter table level_sync.{table}_gone rename to {table}")

    return restore


UNWRITABLE = pytest.mark.parametrize("take_away", [lock_tables, rename_tables], ids=["locked", "renamed"])


@BOTH
@UNWRITABLE
def test_write_stands_with_a_warning_when_a_refused_sync_cannot_be_queued(database, db, table, take_away):
    add_pair(db, 1, level=3)
    make_other_side_fail(db, table)
    restore = take_away(database, ["sync_queue"])
    writer = session(database, autocommit=True)
    warnings = warnings_of(writer)
    assert seconds(set_level, writer, table, 1, 7) < AT_ONCE
    restore()
    assert len(warnings) == 1
    assert "user 1 in PLAYER" in warnings[0]
    assert 7 in levels(db, 1)
    assert desyncs(db) == [(1, "level_mismatch")]
    set_level(db, table, 1, 3)


@BOTH
@UNWRITABLE
def test_write_stands_with_a_warning_when_a_held_pair_cannot_be_queued(database, db, table, take_away):
    add_pair(db, 1, level=3)
    holder = hold(database, OTHER[table])
    restore = take_away(database, ["sync_queue"])
    writer = session(database, autocommit=True)
    warnings = warnings_of(writer)
    assert seconds(set_level, writer, table, 1, 7) < AT_ONCE
    restore()
    holder.rollback()
    assert len(warnings) == 1
    assert "user 1 in PLAYER" in warnings[0]
    assert desyncs(db) == [(1, "level_mismatch")]
    set_level(db, table, 1, 5)
    assert levels(db, 1) == (5, 5)


@BOTH
@UNWRITABLE
@pytest.mark.parametrize(
    ("targets", "tables"),
    [
        ("free", [PENDING, "sync_queue"]),
        ("failing", [PENDING, "sync_queue"]),
        ("failing", [PENDING]),
        ("failing", ["sync_queue"]),
    ],
    ids=["free-both", "failing-both", "failing-pending", "failing-queue"],
)
def test_bulk_write_stands_whatever_cannot_be_queued(database, db, table, take_away, tables, targets):
    add_pairs(db, 500, level=1)
    if targets == "failing":
        make_other_side_fail(db, table)
    restore = take_away(database, tables)
    writer = session(database, autocommit=True)
    warnings = warnings_of(writer)
    writer.execute(f"update {table} set current_level = 7")
    restore()
    assert db.execute(f"select count(*) from {table} where current_level = 7").fetchone() == (500,)
    assert len(warnings) < 40
    found = db.execute(
        "select user_id from level_sync.desync_issues union select user_id from level_sync.sync_queue"
    ).fetchall()
    carried = db.execute(f"select count(*) from {OTHER[table]} where current_level = 7").fetchone()[0]
    assert len(found) + carried == 500
    # A person mends what no queue could remember.
    db.execute(f"alter table {OTHER[table]} drop constraint if exists no_level_above_6")
    drain(db)
    direction = f"{SIDE[table]}_to_{SIDE[OTHER[table]]}"
    db.execute("select level_sync.sync_user(user_id, %s) from level_sync.desync_issues", [direction])
