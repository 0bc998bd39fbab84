"""A level written on one side arrives on the other side, whatever kind of write it was."""

from __future__ import annotations

import pytest

import internals
from academy import (
    BOTH,
    BULK,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    SIDE,
    add_pair,
    configure,
    events,
    insert,
    level,
    levels,
    set_level,
    user_trigger,
    wait_until,
)
from servers import VERSIONS

TOUCHED = {PROGRESS: "last_activity", LICENSE: "last_advanced_at"}

pytestmark = pytest.mark.servers(*VERSIONS)


@BOTH
@BULK
def test_update_of_one_side_arrives_on_the_other(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    set_level(db, table, 1, 5)
    assert levels(db, 1) == (5, 5)
    set_level(db, table, 1, 2)
    assert levels(db, 1) == (2, 2)


@BOTH
@BULK
def test_insert_creates_the_other_row_at_that_level(db, users, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    users(1)
    insert(db, table, 1, 4, "COACH")
    assert level(db, OTHER[table], 1, "COACH") == 4


def test_created_progress_has_no_xp(db, users):
    users(1)
    insert(db, LICENSE, 1, 4)
    row = db.execute("select total_xp, completed_sessions, completed_projects from specialization_progress").fetchone()
    assert row == (0, 0, 0)


def test_created_license_has_reached_its_level_and_a_start(db, users):
    users(1)
    insert(db, PROGRESS, 1, 4)
    row = db.execute(
        "select max_achieved_level, started_at > now() - interval '1 minute' from user_licenses"
    ).fetchone()
    assert row == (4, True)


@BOTH
@BULK
@pytest.mark.parametrize("policy", ["progress_wins", "license_wins"])
def test_insert_beside_a_row_never_demotes(db, users, table, inline_limit, policy):
    """Only a bypass or a move leaves a row alone; what is then inserted beside it meets it at the higher level."""
    configure(db, inline_limit=inline_limit, conflict_policy=policy)
    users(2)
    db.execute("alter table user_licenses alter column max_achieved_level set default 8")
    db.execute("set session_replication_role = replica")
    insert(db, OTHER[table], 1, 6)
    insert(db, OTHER[table], 2, 2)
    db.execute("reset session_replication_role")
    insert(db, table, 1, 4)
    insert(db, table, 2, 4)
    assert levels(db, 1) == (6, 6)
    assert levels(db, 2) == (4, 4)


def test_max_achieved_level_never_goes_down(db):
    add_pair(db, 1, level=6)
    set_level(db, PROGRESS, 1, 2)
    set_level(db, LICENSE, 1, 4)
    db.execute("update user_licenses set max_achieved_level = 4")
    assert db.execute("select current_level, max_achieved_level from user_licenses").fetchone() == (4, 6)


def test_max_achieved_level_follows_an_application_that_writes_the_level_alone(db, users):
    users(1)
    db.execute("insert into user_licenses (user_id, specialization_type, current_level) values (1, 'PLAYER', 5)")
    assert db.execute("select max_achieved_level from user_licenses").fetchone() == (5,)
    set_level(db, LICENSE, 1, 7)
    assert db.execute("select max_achieved_level from user_licenses").fetchone() == (7,)
    set_level(db, PROGRESS, 1, 8)
    assert db.execute("select max_achieved_level from user_licenses").fetchone() == (8,)


@BOTH
@BULK
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Auckland", "America/Los_Angeles"])
def test_the_side_that_follows_is_dated(db, table, inline_limit, zone):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    column = TOUCHED[OTHER[table]]
    db.execute(f"update {OTHER[table]} set {column} = '2020-01-01'")
    db.execute(f"set timezone = '{zone}'; set datestyle = 'German'")
    set_level(db, table, 1, 5)
    age = db.execute(f"select extract(epoch from clock_timestamp() - {column}) from {OTHER[table]}").fetchone()[0]
    assert 0 <= age < 60


@BOTH
@BULK
def test_two_levels_in_one_transaction_end_at_the_last(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    with db.transaction():
        set_level(db, table, 1, 5)
        set_level(db, table, 1, 4)
    assert levels(db, 1) == (4, 4)


@BOTH
@BULK
def test_both_sides_in_one_transaction_end_at_the_one_written_last(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    with db.transaction():
        set_level(db, OTHER[table], 1, 5)
        set_level(db, table, 1, 7)
    assert levels(db, 1) == (7, 7)


@BULK
def test_one_statement_may_write_both_tables(db, inline_limit):
    """Of one pair one side wins, because SQL gives a statement's parts no order; other pairs each get their level."""
    configure(db, inline_limit=inline_limit)
    for user in (1, 2, 3):
        add_pair(db, user, level=3)
    db.execute("""
        with earned as (
          update specialization_progress set current_level = 5 where student_id in (1, 2)
        )
        update user_licenses set current_level = 6 where user_id in (2, 3)
    """)
    assert levels(db, 1) == (5, 5)
    assert levels(db, 2) in [(5, 5), (6, 6)]
    assert levels(db, 3) == (6, 6)


@BOTH
@BULK
def test_upsert_is_carried_whether_it_inserts_or_updates(db, users, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    users(2)
    insert(db, table, 1, 3)
    user_column, specialization_column = KEY[table]
    for action in ("nothing", "update set current_level = excluded.current_level"):
        db.execute(
            f"insert into {table} ({user_column}, {specialization_column}, current_level)"
            f" values (1, 'PLAYER', 5), (2, 'PLAYER', 6)"
            f" on conflict ({user_column}, {specialization_column}) do {action}"
        )
        assert levels(db, 1) == ((3, 3) if action == "nothing" else (5, 5))
        assert levels(db, 2) == (6, 6)


@BOTH
@BULK
def test_merge_is_carried(db, users, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    users(3)
    insert(db, table, 1, 3)
    insert(db, table, 2, 3)
    user_column, specialization_column = KEY[table]
    db.execute(f"""
        merge into {table} as target
        using (values (1, 5), (2, 3), (3, 7)) as source (id, level)
           on target.{user_column} = source.id and target.{specialization_column} = 'PLAYER'
         when matched then update set current_level = source.level
         when not matched then insert ({user_column}, {specialization_column}, current_level)
                               values (source.id, 'PLAYER', source.level)
    """)
    assert [levels(db, user) for user in (1, 2, 3)] == [(5, 5), (3, 3), (7, 7)]


@BOTH
@BULK
def test_copy_is_carried(db, users, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    users(100)
    columns = ", ".join((*KEY[table], "current_level"))
    with db.cursor() as cursor, cursor.copy(f"copy {table} ({columns}) from stdin") as copy:
        for user in range(1, 101):
            copy.write_row((user, "PLAYER", user % 8 + 1))
    assert db.execute(f"select count(*) from {OTHER[table]}").fetchone() == (100,)
    assert levels(db, 42) == (3, 3)


@BOTH
@BULK
def test_rollback_to_a_savepoint_takes_the_sync_with_it(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    for user in (1, 2, 3):
        add_pair(db, user, level=3)
    db.execute("begin")
    set_level(db, table, 1, 4)
    db.execute("savepoint before_two")
    set_level(db, table, 2, 5)
    db.execute("rollback to savepoint before_two")
    set_level(db, table, 3, 6)
    db.execute("commit")
    assert [levels(db, user) for user in (1, 2, 3)] == [(4, 4), (3, 3), (6, 6)]
    assert [event[3] for event in events(db, 2)] == [3]


@BOTH
def test_bulk_that_began_in_a_savepoint_rolled_back_is_carried_all_the_same(db, table):
    """The first bulk row arms the commit; it goes with its savepoint, and the next one must arm it again."""
    configure(db, inline_limit=0)
    add_pair(db, 1, level=3)
    add_pair(db, 2, level=3)
    db.execute("begin")
    db.execute("savepoint first")
    set_level(db, table, 1, 4)
    db.execute("rollback to savepoint first")
    set_level(db, table, 2, 5)
    db.execute("commit")
    assert levels(db, 1) == (3, 3)
    assert levels(db, 2) == (5, 5)


@BOTH
@BULK
@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_prepared_transaction_is_carried_or_forgotten_as_a_whole(db, table, inline_limit, ending):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    db.execute("begin")
    set_level(db, table, 1, 6)
    db.execute("prepare transaction 'year_end'")
    db.execute(f"{ending} prepared 'year_end'")
    assert levels(db, 1) == ((6, 6) if ending == "commit" else (3, 3))


@BOTH
@BULK
def test_level_written_by_a_users_trigger_of_another_table_is_carried(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    db.execute("create table exams (student bigint, grade integer)")
    user_column, _ = KEY[table]
    user_trigger(
        db, "after insert on exams", f"update {table} set current_level = new.grade where {user_column} = new.student"
    )
    db.execute("insert into exams values (1, 7)")
    assert levels(db, 1) == (7, 7)


@BOTH
@BULK
def test_users_trigger_that_writes_the_other_table_itself_is_carried(db, table, inline_limit):
    """It may fire before ours or after it: whichever write is last, both sides end equal."""
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    other = OTHER[table]
    body = f"update {other} set current_level = new.current_level - 1 where {KEY[other][0]} = new.{KEY[table][0]}"
    condition = "when (new.current_level = 6)"
    user_trigger(db, f"after update on {table}", body, condition=condition, name="aaa_first")
    set_level(db, table, 1, 6)
    assert levels(db, 1) in [(5, 5), (6, 6)]
    db.execute(f"alter trigger aaa_first on {table} rename to zzz_last")
    set_level(db, table, 1, 2)
    set_level(db, table, 1, 6)
    assert levels(db, 1) == (5, 5)


@BOTH
@BULK
def test_level_that_a_users_trigger_sets_on_our_target_comes_back(db, table, inline_limit):
    """A trigger one level deeper than our statement writes the target again: that is a write like any other."""
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    other = OTHER[table]
    user_trigger(
        db,
        f"after update on {other}",
        f"update {other} set current_level = 8 where {KEY[other][0]} = new.{KEY[other][0]}",
        condition="when (new.current_level = 6)",
    )
    set_level(db, table, 1, 6)
    assert levels(db, 1) == (8, 8)


@BOTH
@BULK
def test_users_before_trigger_that_changes_the_written_level_is_followed(db, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    user_trigger(db, f"before update on {table}", "new.current_level := 4")
    set_level(db, table, 1, 6)
    assert levels(db, 1) == (4, 4)


@BOTH
@BULK
def test_every_carried_level_is_an_event_that_names_who_why_and_in_which_transaction(db, users, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    users(1)
    direction = f"{SIDE[table]}_to_{SIDE[OTHER[table]]}"
    back = f"{SIDE[OTHER[table]]}_to_{SIDE[table]}"
    insert(db, table, 1, 3)
    with db.transaction():
        db.execute("select set_config('level_sync.actor', 'exam board', true)")
        db.execute("select set_config('level_sync.reason', 'spring exam', true)")
        set_level(db, table, 1, 5)
        (transaction,) = db.execute("select pg_current_xact_id()::text").fetchone()
    set_level(db, OTHER[table], 1, 7)
    assert events(db, 1) == [
        (direction, "created", None, 3, "trigger"),
        (direction, "updated", 3, 5, "trigger"),
        (back, "updated", 5, 7, "trigger"),
    ]
    told = db.execute(
        "select actor, reason, transaction_id::text, session_role, specialization,"
        " occurred_at > now() - interval '1 minute' from level_sync.sync_events order by event_id"
    ).fetchall()
    assert told[1] == ("exam board", "spring exam", transaction, "postgres", "PLAYER", True)
    assert told[0][:2] == told[2][:2] == (None, None)


def calls_of_ours(db) -> int:
    """How often this database's functions of ours were called, as far as the statistics tell."""
    return db.execute(
        "select coalesce(sum(calls), 0)::integer from pg_stat_user_functions where schemaname = 'level_sync'"
    ).fetchone()[0]


def session_that_ends(database, db, statements) -> int:
    """Runs statements in a session of their own, waits for its end, and tells the calls counted since the reset."""
    session = database.connect()
    for statement in statements:
        session.execute(statement)
    pid = session.info.backend_pid
    session.close()
    # Its last statistics arrive with its end.
    wait_until(lambda: db.execute("select from pg_stat_activity where pid = %s", [pid]).fetchone() is None)
    return calls_of_ours(db)


def test_write_that_leaves_the_level_calls_no_function_of_ours(database, db):
    level_changes = [
        "insert into users (id) select n from generate_series(1, 50) as n",
        "insert into specialization_progress (student_id, specialization_id) select id, 'PLAYER' from users",
    ]
    other_changes = [
        "update specialization_progress set total_xp = total_xp + 10, last_activity = clock_timestamp()",
        "update specialization_progress set current_level = current_level",
        "update user_licenses set started_at = clock_timestamp(), current_level = current_level",
    ]
    before = session_that_ends(database, db, level_changes)
    assert before >= 50
    assert session_that_ends(database, db, other_changes) == before


def test_license_that_brings_its_highest_level_along_calls_no_function_for_it(db, users):
    users(1)
    internals.never_raise_the_highest_level(db)
    db.execute(
        "insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level)"
        " values (1, 'PLAYER', 3, 4)"
    )
    assert levels(db, 1) == (3, 3)
