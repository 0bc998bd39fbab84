"""A transaction that carries a set at its commit and deletes or moves rows besides: deletions are still judged."""

from __future__ import annotations

import psycopg
import pytest

import internals
from academy import (
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    add_pairs,
    bypass,
    configure,
    delete,
    drop_user_trigger,
    insert,
    levels,
    queued,
    set_level,
    user_trigger,
)

PAIRS = 40
ON_DELETE = pytest.mark.parametrize("on_delete", ["restrict", "propagate", "recreate"])


@pytest.fixture
def bulk(db):
    """Every level change is carried in the set of its transaction."""
    configure(db, inline_limit=0)
    add_pairs(db, PAIRS)
    return db


def move(db, table: str, user: int, new_user: int) -> None:
    key = KEY[table][0]
    db.execute(f"update {table} set {key} = %s where {key} = %s", [new_user, user])


@BOTH
@ON_DELETE
def test_deleting_the_side_that_should_follow_is_judged(bulk, table, on_delete):
    configure(bulk, on_delete=on_delete)

    def write() -> None:
        with bulk.transaction():
            bulk.execute(f"update {table} set current_level = 4")
            delete(bulk, OTHER[table], PAIRS)

    if on_delete == "restrict":
        with pytest.raises(psycopg.errors.RestrictViolation, match="cannot go alone"):
            write()
        assert levels(bulk, PAIRS) == (3, 3)
    else:
        write()
        assert levels(bulk, PAIRS) == ((None, None) if on_delete == "propagate" else (4, 4))
        assert levels(bulk, 1) == (4, 4)
    assert queued(bulk) == []


@BOTH
@ON_DELETE
@pytest.mark.parametrize("on_error", ["queue", "raise"])
def test_deleting_the_side_that_was_written_is_judged_and_queues_nothing(bulk, table, on_delete, on_error):
    configure(bulk, on_delete=on_delete, on_error=on_error)

    def write() -> None:
        with bulk.transaction():
            set_level(bulk, table, 2, 6)
            delete(bulk, table, 2)

    if on_delete == "restrict":
        with pytest.raises(psycopg.errors.RestrictViolation, match="cannot go alone"):
            write()
    else:
        write()
        assert levels(bulk, 2) == ((None, None) if on_delete == "propagate" else (3, 3))
    assert queued(bulk) == []


@BOTH
@pytest.mark.parametrize("on_error", ["queue", "raise"])
def test_deleting_both_sides_after_a_level_is_no_failure(bulk, table, on_error):
    configure(bulk, on_error=on_error)
    with bulk.transaction():
        set_level(bulk, table, 2, 6)
        delete(bulk, table, 2)
        delete(bulk, OTHER[table], 2)
    assert levels(bulk, 2) == (None, None)
    assert queued(bulk) == []


@BOTH
def test_a_row_deleted_and_made_again_is_an_insert(bulk, table):
    with bulk.transaction():
        set_level(bulk, table, 2, 6)
        delete(bulk, OTHER[table], 2)
        insert(bulk, OTHER[table], 2, 2)
    assert levels(bulk, 2) == (6, 6)
    assert queued(bulk) == []


@BOTH
def test_moving_one_side_alone_is_refused(bulk, table):
    bulk.execute("insert into users (id) values (99)")

    def write() -> None:
        with bulk.transaction():
            bulk.execute(f"update {table} set current_level = 4")
            move(bulk, OTHER[table], PAIRS, 99)

    with pytest.raises(psycopg.errors.RestrictViolation, match="cannot go alone"):
        write()
    assert levels(bulk, PAIRS) == (3, 3)
    assert levels(bulk, 99) == (None, None)


@BOTH
def test_moving_both_sides_takes_the_level_along(bulk, table):
    bulk.execute("insert into users (id) values (99)")
    with bulk.transaction():
        bulk.execute(f"update {table} set current_level = 4")
        move(bulk, OTHER[table], PAIRS, 99)
        move(bulk, table, PAIRS, 99)
    assert levels(bulk, PAIRS) == (None, None)
    assert levels(bulk, 99) == (4, 4)
    assert queued(bulk) == []


@BOTH
def test_one_held_row_arms_a_set_that_leaves_deletions_alone(database, db, table):
    add_pairs(db, 3)
    holder = database.connect(autocommit=False)
    holder.execute(f"select from {OTHER[table]} where {KEY[OTHER[table]][0]} = 1 for update")

    def write() -> None:
        with db.transaction():
            set_level(db, table, 1, 5)
            set_level(db, table, 3, 5)
            delete(db, OTHER[table], 3)

    with pytest.raises(psycopg.errors.RestrictViolation, match="cannot go alone"):
        write()
    holder.rollback()
    assert levels(db, 3) == (3, 3)


@BOTH
def test_a_row_without_a_pair_is_deleted_and_moved_as_ever(bulk, table):
    """On adopted tables the key may be NULL."""
    user, specialization = KEY[table]
    bulk.execute(f"alter table {table} drop constraint {table}_pkey")
    bulk.execute(f"alter table {table} alter column {user} drop not null, alter column {specialization} drop not null")
    with bypass(bulk):
        bulk.execute(
            f"insert into {table} ({user}, {specialization}, current_level) values (1, null, 1), (null, null, 1)"
        )
    bulk.execute("insert into specializations (id) values ('CHESS')")
    with bulk.transaction():
        set_level(bulk, table, 2, 6)
        bulk.execute(f"delete from {table} where {user} is null")
        bulk.execute(f"update {table} set {specialization} = 'CHESS' where {specialization} is null")
    assert levels(bulk, 2) == (6, 6)
    assert levels(bulk, 1, "CHESS") == (1, 1)


@BOTH
def test_a_commit_that_cannot_be_armed_for_an_old_snapshot_fails_the_write(bulk, table):
    """Only that error reaches the writer: the transaction is to be tried again as a whole."""
    bulk.execute("insert into users (id) values (1000)")
    user_trigger(bulk, f"before insert on {internals.PENDING_COMMITS}", "raise sqlstate '40001'")
    with pytest.raises(psycopg.errors.SerializationFailure):
        set_level(bulk, table, 1, 5)
    with pytest.raises(psycopg.errors.SerializationFailure):
        move(bulk, table, 1, 1000)
    drop_user_trigger(bulk)
    assert levels(bulk, 1) == (3, 3)
    assert queued(bulk) == []


def test_nothing_pending_is_left_by_any_of_it(bulk):
    configure(bulk, on_delete="propagate")
    with bulk.transaction():
        bulk.execute(f"update {PROGRESS} set current_level = 4")
        delete(bulk, LICENSE, 1)
        delete(bulk, PROGRESS, 2)
        delete(bulk, PROGRESS, 3)
        delete(bulk, LICENSE, 3)
    assert bulk.execute(f"select count(*) from {internals.PENDING_PAIRS}").fetchone() == (0,)
    assert [levels(bulk, user) for user in (1, 2, 3)] == [(None, None)] * 3
