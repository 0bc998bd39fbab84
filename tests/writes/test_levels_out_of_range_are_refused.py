"""A level outside 1..max_levels, or NULL, is refused on either side, in words that name pair, level and limit."""

from __future__ import annotations

import psycopg
import pytest

from academy import BOTH, BULK, KEY, PROGRESS, SIDE, add_pair, configure, insert, levels, set_level

ON_ERROR = pytest.mark.parametrize("on_error", ["queue", "raise"])
OUT_OF_RANGE = pytest.mark.parametrize("wrong", [0, -1, 9, 2147483647])


@pytest.fixture
def old_checks_gone(db):
    """Adopted tables often have no CHECK and no NOT NULL of their own: then ours must do."""
    db.execute("alter table specialization_progress drop constraint current_level_is_at_least_1")
    db.execute("alter table user_licenses drop constraint current_level_is_at_least_1")
    db.execute("alter table user_licenses drop constraint max_achieved_level_covers_current_level")
    for table in KEY:
        db.execute(f"alter table {table} alter column current_level drop not null")


@BOTH
@BULK
@ON_ERROR
@OUT_OF_RANGE
@pytest.mark.usefixtures("old_checks_gone")
def test_level_out_of_range_is_refused_and_nothing_is_queued(db, users, table, inline_limit, on_error, wrong):
    configure(db, inline_limit=inline_limit, on_error=on_error)
    users(2)
    insert(db, table, 1, 3)
    for write in (set_level, insert):
        with pytest.raises(psycopg.errors.CheckViolation) as caught:
            write(db, table, 1 if write is set_level else 2, wrong)
        user = 1 if write is set_level else 2
        assert caught.value.diag.message_primary == (
            f"level {wrong} of user {user} in PLAYER is out of range: allowed is 1 to 8"
        )
        assert "max_levels" in caught.value.diag.message_hint
    assert levels(db, 1) == (3, 3)
    assert levels(db, 2) == (None, None)


@BOTH
@BULK
@ON_ERROR
@pytest.mark.usefixtures("old_checks_gone")
def test_null_is_refused_as_a_level(db, table, inline_limit, on_error):
    configure(db, inline_limit=inline_limit, on_error=on_error)
    add_pair(db, 1, level=3)
    with pytest.raises(psycopg.errors.NotNullViolation) as caught:
        set_level(db, table, 1, None)
    assert caught.value.diag.message_primary == f"the {SIDE[table]} level of user 1 in PLAYER is NULL"
    assert caught.value.diag.message_hint == "Set current_level to a number from 1 to 8."
    assert levels(db, 1) == (3, 3)


@BOTH
@BULK
def test_each_specialization_has_its_own_limit(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, "INTERNSHIP", level=3)
    with pytest.raises(psycopg.errors.CheckViolation, match=r"level 4 of user 1 in INTERNSHIP .* 1 to 3"):
        set_level(db, table, 1, 4, "INTERNSHIP")


@BOTH
@BULK
def test_without_max_levels_there_is_no_upper_limit(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    db.execute("update specializations set max_levels = null where id = 'PLAYER'")
    add_pair(db, 1, level=3)
    set_level(db, table, 1, 5000)
    assert levels(db, 1) == (5000, 5000)
    with pytest.raises(psycopg.errors.CheckViolation):
        set_level(db, table, 1, 0)


@BOTH
@pytest.mark.parametrize("rows", [10, 100], ids=["inline", "bulk"])
@pytest.mark.parametrize("write", ["copy", "insert", "update", "merge"])
def test_one_wrong_level_refuses_the_whole_statement(db, users, table, rows, write):
    users(rows)
    user_column, specialization_column = KEY[table]
    wrong = f"case n when {rows} then 9 else 4 end"
    if write in ("update", "merge"):
        db.execute(
            f"insert into {table} ({user_column}, {specialization_column}, current_level)"
            f" select n, 'PLAYER', 3 from generate_series(1, {rows}) as n"
        )
    before = db.execute("select * from level_sync.sync_events order by event_id").fetchall()
    source = f"select n, 'PLAYER' as specialization, {wrong} as level from generate_series(1, {rows}) as n"
    columns = f"{user_column}, {specialization_column}, current_level"
    statement = {
        "insert": f"insert into {table} ({columns}) {source}",
        "update": f"update {table} set current_level = source.level from ({source}) as source where {user_column} = n",
        "merge": f"merge into {table} as target using ({source}) as source on target.{user_column} = source.n"
        " when matched then update set current_level = source.level",
        "copy": f"copy {table} ({columns}) from program $$seq 1 {rows} | sed 's/$/\\tPLAYER\\t4/; {rows}s/4$/9/'$$",
    }[write]
    with pytest.raises(psycopg.errors.CheckViolation, match=f"level 9 of user {rows} in PLAYER"):
        db.execute(statement)
    assert db.execute("select * from level_sync.sync_events order by event_id").fetchall() == before
    assert db.execute(f"select count(*) from {table} where current_level <> 3").fetchone() == (0,)


def test_pair_that_moves_takes_no_wrong_level_along(db, users):
    """INTERNSHIP ends at 3: a row at level 5 cannot come there."""
    users(1)
    insert(db, PROGRESS, 1, 5)
    db.execute("begin")
    db.execute("update specialization_progress set specialization_id = 'INTERNSHIP'")
    db.execute("update user_licenses set specialization_type = 'INTERNSHIP'")
    with pytest.raises(psycopg.errors.CheckViolation, match=r"level 5 of user 1 in INTERNSHIP .* 1 to 3"):
        db.execute("commit")
    assert levels(db, 1) == (5, 5)


@BOTH
@pytest.mark.usefixtures("old_checks_gone")
def test_pair_that_moves_without_a_level_is_refused_with_the_side_that_moved(db, users, table):
    users(2)
    configure(db, on_delete="propagate")
    insert(db, table, 1, 3)
    with pytest.raises(psycopg.errors.NotNullViolation, match=f"the {SIDE[table]} level of user 2 in PLAYER is NULL"):
        db.execute(f"update {table} set {KEY[table][0]} = 2, current_level = null")
    assert levels(db, 1) == (3, 3)


@BOTH
@BULK
def test_refused_level_leaves_the_transaction_usable_from_a_savepoint_on(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    add_pair(db, 2, level=3)
    with db.transaction():
        set_level(db, table, 1, 4)
        with pytest.raises(psycopg.errors.CheckViolation), db.transaction():
            set_level(db, table, 2, 9)
        set_level(db, table, 2, 5)
    assert levels(db, 1) == (4, 4)
    assert levels(db, 2) == (5, 5)


@BOTH
@BULK
@pytest.mark.usefixtures("old_checks_gone")
def test_old_level_out_of_range_does_not_hinder_other_columns_nor_its_own_correction(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    db.execute("set session_replication_role = replica")
    for side in KEY:
        set_level(db, side, 1, 12)
    db.execute("reset session_replication_role")
    db.execute("update specialization_progress set total_xp = 5")
    set_level(db, table, 1, 8)
    assert levels(db, 1) == (8, 8)
