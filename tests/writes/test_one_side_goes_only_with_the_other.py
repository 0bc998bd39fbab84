"""One side goes only together with the other: deletes, key changes and TRUNCATE, judged at commit."""

from __future__ import annotations

import psycopg
import pytest

from academy import (
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    SIDE,
    add_pair,
    add_pairs,
    configure,
    delete,
    drain,
    drop_user_trigger,
    events,
    insert,
    level,
    levels,
    queued,
    user_trigger,
)

RESTRICT = psycopg.errors.RestrictViolation


def move(db, table: str, user: int, *, to_user: int | None = None, to: str | None = None, to_level: int | None = None):
    user_column, specialization_column = KEY[table]
    db.execute(
        f"update {table} set {user_column} = coalesce(%s, {user_column}),"
        f" {specialization_column} = coalesce(%s, {specialization_column}),"
        f" current_level = coalesce(%s, current_level) where {user_column} = %s",
        [to_user, to, to_level, user],
    )


@BOTH
def test_delete_of_one_side_is_refused_at_commit_with_a_hint(db, table):
    add_pair(db, 1, level=3)
    with pytest.raises(RESTRICT) as caught:
        delete(db, table, 1)
    assert caught.value.sqlstate == "23001"
    assert "user 1 in PLAYER cannot go alone" in caught.value.diag.message_primary
    assert "(level 3) is still there" in caught.value.diag.message_primary
    assert caught.value.diag.message_hint == (
        "Delete or move both rows in one transaction, or set level_sync.settings.on_delete to propagate or recreate."
    )
    assert levels(db, 1) == (3, 3)


@BOTH
def test_delete_is_judged_at_commit_and_not_before(db, table):
    add_pair(db, 1, level=3)
    db.execute("begin")
    delete(db, table, 1)
    assert level(db, table, 1) is None
    with pytest.raises(RESTRICT):
        db.execute("commit")
    assert levels(db, 1) == (3, 3)


@BOTH
def test_set_constraints_immediate_brings_the_judgement_forward(db, table):
    add_pair(db, 1, level=3)
    db.execute("begin")
    delete(db, table, 1)
    with pytest.raises(RESTRICT):
        db.execute("set constraints all immediate")
    db.execute("rollback")


@BOTH
@pytest.mark.parametrize("rows", [1, 200])
def test_both_sides_go_in_one_transaction_in_either_order(db, users, table, rows):
    add_pairs(db, rows)
    with db.transaction():
        db.execute(f"delete from {table}")
        db.execute(f"delete from {OTHER[table]}")
    assert db.execute("select count(*) from specialization_progress").fetchone() == (0,)
    assert db.execute("select count(*) from user_licenses").fetchone() == (0,)


def test_both_sides_and_the_user_go_in_one_statement(db):
    add_pair(db, 1, level=3)
    with db.transaction():
        db.execute("""
            with progress as (delete from specialization_progress where student_id = 1),
                 license as (delete from user_licenses where user_id = 1)
            select 1
        """)
        db.execute("delete from users where id = 1")
    assert levels(db, 1) == (None, None)


def test_user_with_a_row_cannot_go(db):
    add_pair(db, 1, level=3)
    with pytest.raises(psycopg.errors.IntegrityError) as caught:
        db.execute("delete from users where id = 1")
    assert caught.value.sqlstate in ("23001", "23503")  # 23001 from PostgreSQL 18 on
    assert levels(db, 1) == (3, 3)


@BOTH
@pytest.mark.parametrize("again_at", [3, 5])
def test_row_deleted_and_inserted_again_is_an_insert(db, table, again_at):
    add_pair(db, 1, level=4)
    with db.transaction():
        delete(db, table, 1)
        insert(db, table, 1, again_at)
    assert levels(db, 1) == (max(4, again_at),) * 2


@BOTH
@pytest.mark.parametrize("rows", [1, 200])
def test_propagate_deletes_the_other_side_too(db, users, table, rows):
    configure(db, on_delete="propagate")
    add_pairs(db, rows)
    db.execute(f"delete from {table}")
    assert levels(db, 1) == (None, None)
    assert db.execute(f"select count(*) from {OTHER[table]}").fetchone() == (0,)
    direction = f"{SIDE[table]}_to_{SIDE[OTHER[table]]}"
    assert events(db, rows)[-1] == (direction, "deleted", 3, None, "trigger")


@BOTH
@pytest.mark.parametrize("rows", [1, 200])
def test_recreate_brings_the_deleted_side_back(db, users, table, rows):
    configure(db, on_delete="recreate")
    add_pairs(db, rows)
    db.execute(f"delete from {table}")
    assert levels(db, 1) == (3, 3)
    assert db.execute(f"select count(*) from {table}").fetchone() == (rows,)
    direction = f"{SIDE[OTHER[table]]}_to_{SIDE[table]}"
    assert events(db, rows)[-1] == (direction, "created", None, 3, "trigger")


@BOTH
def test_delete_rolled_back_to_a_savepoint_is_forgotten(db, table):
    add_pair(db, 1, level=3)
    db.execute("begin")
    db.execute("savepoint before_delete")
    delete(db, table, 1)
    db.execute("rollback to savepoint before_delete")
    db.execute("commit")
    assert levels(db, 1) == (3, 3)


@BOTH
def test_move_of_one_side_alone_is_refused(db, users, table):
    users(2)
    insert(db, table, 1, 3)
    with pytest.raises(RESTRICT, match="user 1 in PLAYER cannot go alone"):
        move(db, table, 1, to_user=2)
    with pytest.raises(RESTRICT, match="user 1 in PLAYER cannot go alone"):
        move(db, table, 1, to="COACH")
    assert levels(db, 1) == (3, 3)


@BOTH
def test_both_sides_move_in_one_transaction_in_either_order(db, users, table):
    users(2)
    insert(db, PROGRESS, 1, 3)
    for where, specialization in (({"to_user": 2}, "PLAYER"), ({"to": "COACH"}, "COACH")):
        mover = 1 if "to_user" in where else 2
        with db.transaction():
            move(db, table, mover, **where)
            move(db, OTHER[table], mover, **where)
        assert levels(db, 2, specialization) == (3, 3)
    assert levels(db, 1) == (None, None)


@BOTH
def test_levels_that_wait_for_the_commit_beside_a_move_are_carried(db, users, table):
    users(5)
    add_pairs(db, 4, level=3)
    configure(db, inline_limit=0)
    with db.transaction():
        for side in (table, OTHER[table]):
            move(db, side, 1, to_user=5)
        db.execute(f"update {table} set current_level = 5 where {KEY[table][0]} between 2 and 4")
    assert [levels(db, user) for user in range(1, 6)] == [(None, None), (5, 5), (5, 5), (5, 5), (3, 3)]


@BOTH
def test_move_that_changes_the_level_too_meets_at_the_higher_level(db, users, table):
    users(2)
    insert(db, PROGRESS, 1, 3)
    with db.transaction():
        move(db, table, 1, to_user=2, to_level=6)
        move(db, OTHER[table], 1, to_user=2)
    assert levels(db, 2) == (6, 6)
    with db.transaction():
        move(db, table, 2, to_user=1, to_level=2)
        move(db, OTHER[table], 2, to_user=1)
    assert levels(db, 1) == (6, 6)


def test_two_pairs_swap_their_places(db, users):
    users(3)
    insert(db, PROGRESS, 1, 3)
    insert(db, PROGRESS, 2, 6)
    with db.transaction():
        for table in (PROGRESS, LICENSE):
            for user, to_user in ((1, 3), (2, 1), (3, 2)):
                move(db, table, user, to_user=to_user)
    assert levels(db, 1) == (6, 6)
    assert levels(db, 2) == (3, 3)


@BOTH
@pytest.mark.parametrize("on_delete", ["propagate", "recreate"])
def test_move_of_one_side_is_a_delete_and_an_insert(db, users, table, on_delete):
    configure(db, on_delete=on_delete)
    users(2)
    insert(db, table, 1, 3)
    move(db, table, 1, to_user=2)
    assert levels(db, 1) == ((None, None) if on_delete == "propagate" else (3, 3))
    assert levels(db, 2) == (3, 3)


@BOTH
def test_a_moved_pair_that_cannot_be_carried_is_queued_with_the_side_that_moved(db, users, table):
    users(2)
    configure(db, on_delete="propagate")
    insert(db, table, 1, 3)
    user_trigger(db, f"before insert on {OTHER[table]}", "raise exception 'closed for stocktaking'")
    move(db, table, 1, to_user=2)
    assert [(user, side) for user, _, side, *_ in queued(db)] == [(2, SIDE[table])]
    drop_user_trigger(db)
    drain(db)
    assert (levels(db, 1), levels(db, 2)) == ((None, None), (3, 3))


@BOTH
def test_truncate_of_one_table_is_refused(db, table):
    add_pair(db, 1, level=3)
    with pytest.raises(RESTRICT, match=f"{table} cannot be truncated alone") as caught:
        db.execute(f"truncate {table}")
    assert caught.value.diag.message_hint == "Truncate both tables in one statement."
    assert levels(db, 1) == (3, 3)


@BOTH
def test_truncate_is_fine_where_both_are_empty_afterwards(db, table):
    db.execute(f"truncate {table}")
    add_pair(db, 1, level=3)
    db.execute(f"truncate {table}, {OTHER[table]}")
    assert levels(db, 1) == (None, None)
