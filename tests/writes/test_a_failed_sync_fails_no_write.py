"""What the other side refuses never fails the write: the pair is queued."""

from __future__ import annotations

import psycopg
import pytest

from academy import (
    BOTH,
    BULK,
    OTHER,
    SIDE,
    add_pair,
    break_target,
    configure,
    drain,
    drop_user_trigger,
    insert,
    level,
    levels,
    queued,
    set_level,
    user_trigger,
)


@BOTH
@BULK
def test_write_survives_a_trigger_that_raises_and_the_drain_mends_it(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    assert level(db, table, 1) == 5
    assert level(db, OTHER[table], 1) == 3
    assert queued(db) == [(1, "PLAYER", SIDE[table], "level_changed", "P0001")]
    assert db.execute("select message, attempts, dead_at from level_sync.sync_queue").fetchone() == (
        "closed for stocktaking",
        0,
        None,
    )
    drop_user_trigger(db)
    drain(db)
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
@BULK
@pytest.mark.parametrize(
    ("body", "sqlstate"),
    [
        ("assert false, 'an assertion'", "P0004"),
        ("perform 1 / 0", "22012"),
        ("raise sqlstate '57P05'", "57P05"),
        ("raise sqlstate '40P01'", "40P01"),
        ("return null", None),
        ("new.current_level := 1", None),
    ],
    ids=["assert", "division", "odd_state", "deadlock", "dropped", "changed"],
)
def test_whatever_goes_wrong_on_the_target_is_queued(db, table, inline_limit, body, sqlstate):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    break_target(db, table, body)
    set_level(db, table, 1, 5)
    assert level(db, table, 1) in (5, 1)  # a target that changes the level writes: that is carried back, or queued
    if levels(db, 1) == (1, 1):
        return
    assert [entry[:4] for entry in queued(db)] == [(1, "PLAYER", SIDE[table], "level_changed")]
    if sqlstate is not None:
        assert queued(db)[0][4] == sqlstate
    drop_user_trigger(db)
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
@BULK
@pytest.mark.parametrize("body", ["return null", "new.current_level := 1"], ids=["dropped", "changed"])
def test_a_row_that_is_made_at_another_level_or_not_at_all_is_queued(db, users, table, inline_limit, body):
    configure(db, inline_limit=inline_limit)
    users(2)
    user_trigger(db, f"before insert on {OTHER[table]}", body)
    with db.transaction():
        insert(db, table, 1, 5)
        insert(db, table, 2, 5)
    assert [entry[:4] for entry in queued(db)] == [(pair, "PLAYER", SIDE[table], "created") for pair in (1, 2)]
    drop_user_trigger(db)
    drain(db)
    assert [levels(db, pair) for pair in (1, 2)] == [(5, 5), (5, 5)]


@BOTH
@BULK
def test_check_on_the_target_that_the_sync_breaks(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    db.execute(f"alter table {OTHER[table]} add constraint below_six check (current_level < 6)")
    set_level(db, table, 1, 7)
    assert queued(db) == [(1, "PLAYER", SIDE[table], "level_changed", "23514")]
    assert "below_six" in db.execute("select message from level_sync.sync_queue").fetchone()[0]
    db.execute(f"alter table {OTHER[table]} drop constraint below_six")
    drain(db)
    assert levels(db, 1) == (7, 7)


@BOTH
@BULK
def test_not_null_column_without_default_that_a_created_row_lacks(db, users, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    users(1)
    db.execute(f"alter table {OTHER[table]} add column campus text not null")
    insert(db, table, 1, 4)
    assert queued(db) == [(1, "PLAYER", SIDE[table], "created", "23502")]
    assert '"campus"' in db.execute("select message from level_sync.sync_queue").fetchone()[0]
    db.execute(f"alter table {OTHER[table]} alter column campus set default 'Budapest'")
    drain(db)
    assert levels(db, 1) == (4, 4)


@BOTH
@BULK
def test_on_error_raise_gives_the_error_to_the_writer(db, table, inline_limit):
    configure(db, inline_limit=inline_limit, on_error="raise")
    add_pair(db, 1, level=3)
    break_target(db, table)
    with pytest.raises(psycopg.errors.RaiseException, match="closed for stocktaking"):
        set_level(db, table, 1, 5)
    assert levels(db, 1) == (3, 3)


@BOTH
@BULK
@pytest.mark.parametrize("state", ["57014", "40001"])
def test_cancel_and_serialization_failure_reach_the_writer(db, table, inline_limit, state):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    break_target(db, table, f"raise sqlstate '{state}'")
    with pytest.raises(psycopg.Error) as caught:
        set_level(db, table, 1, 5)
    assert caught.value.sqlstate == state
    assert levels(db, 1) == (3, 3)
