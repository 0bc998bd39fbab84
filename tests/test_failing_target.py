"""What the other side refuses never fails the write: the pair is queued, and a drain mends it from the live rows."""

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
    bypass,
    configure,
    delete,
    drain,
    drop_user_trigger,
    events,
    insert,
    level,
    levels,
    queued,
    set_level,
    user_trigger,
)

BULK = pytest.mark.parametrize("inline_limit", [32, 0], ids=["inline", "bulk"])


def break_target(db, table: str, body: str = "raise exception 'closed for stocktaking'", when: str = "update") -> None:
    user_trigger(db, f"before {when} on {OTHER[table]}", body)


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


@BOTH
def test_of_two_entries_of_one_moment_the_later_one_knows_the_side(db, table):
    add_pair(db, 1, level=6)
    with bypass(db):
        set_level(db, table, 1, 5)
    for side in (SIDE[OTHER[table]], SIDE[table]):
        db.execute(
            "insert into level_sync.sync_queue (queued_at, user_id, specialization, side, change, sqlstate, message)"
            " values ('2026-01-01', 1, 'PLAYER', %s, 'level_changed', '55P03', 'held')",
            [side],
        )
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_queue_holds_pairs_and_the_drain_reads_the_live_rows(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    set_level(db, table, 1, 6)
    assert len(queued(db)) == 2
    columns = db.execute(
        "select string_agg(attname, ' ') from pg_attribute where attrelid = 'level_sync.sync_queue'::regclass"
    )
    assert "level" not in columns.fetchone()[0]
    db.execute("set session_replication_role = replica")
    set_level(db, table, 1, 4)
    db.execute("reset session_replication_role")
    drop_user_trigger(db)
    drain(db)
    assert levels(db, 1) == (4, 4)
    assert events(db, 1)[-1][2:4] == (3, 4)


@BOTH
def test_entry_whose_pair_is_equal_by_now_is_dropped_without_an_event(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    drop_user_trigger(db)
    set_level(db, OTHER[table], 1, 6)
    assert levels(db, 1) == (6, 6)
    told = events(db, 1)
    drain(db)
    assert queued(db) == []
    assert events(db, 1) == told


@BOTH
def test_side_written_last_wins_where_both_were_queued(db, table):
    add_pair(db, 1, level=3)
    for side in KEY:
        user_trigger(
            db, f"before update on {side}", "if pg_trigger_depth() > 1 then raise 'no'; end if", name=f"no_{side}"
        )
    set_level(db, OTHER[table], 1, 4)
    set_level(db, table, 1, 7)
    assert len(queued(db)) == 2
    for side in KEY:
        drop_user_trigger(db, f"no_{side}")
    drain(db)
    assert levels(db, 1) == (7, 7)


@BOTH
def test_pair_deleted_on_both_sides_meanwhile_leaves_the_queue(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    with db.transaction():
        delete(db, PROGRESS, 1)
        delete(db, LICENSE, 1)
    drain(db)
    assert queued(db) == []
    assert levels(db, 1) == (None, None)


def attempt(db) -> tuple[int, float, bool]:
    """(attempts, seconds until the next one, dead) of the one entry."""
    return db.execute("""
        select attempts, round(extract(epoch from next_attempt_at - clock_timestamp()))::float, dead_at is not null
          from level_sync.sync_queue
    """).fetchone()


@BOTH
@pytest.mark.leftovers
def test_back_off_doubles_and_after_max_attempts_the_pair_is_dead(db, table):
    configure(db, retry_backoff="100 seconds", max_attempts=3)
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    for attempts, seconds, dead in ((1, 100, False), (2, 200, False), (3, 400, True)):
        drain(db)
        found = attempt(db)
        assert (found[0], found[2]) == (attempts, dead)
        assert found[1] == pytest.approx(seconds, abs=5)
        db.execute("call level_sync.drain_queue()")  # not due yet: nothing happens
        assert attempt(db)[0] == attempts
    drop_user_trigger(db)
    drain(db)
    assert level(db, OTHER[table], 1) == 3  # dead: it waits for a person
    assert db.execute("select level_sync.requeue()").fetchone() == (1,)
    db.execute("call level_sync.drain_queue()")
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
def test_new_write_of_a_dead_pair_is_carried_and_takes_its_entry_along(db, table):
    configure(db, max_attempts=1)
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    drain(db)
    assert attempt(db)[2] is True
    set_level(db, table, 1, 6)
    drop_user_trigger(db)
    drain(db)
    assert levels(db, 1) == (6, 6)
    assert queued(db) == []


@BOTH
def test_drain_commits_batch_by_batch(database, db, users, table):
    """The third batch fails for good; what the first two did stands."""
    configure(db, batch_size=10)
    add_pairs(db, 30)
    break_target(db, table)
    db.execute(f"update {table} set current_level = 5")
    drop_user_trigger(db)
    db.execute(
        "update level_sync.sync_queue set next_attempt_at = clock_timestamp() - make_interval(secs => 100 - user_id)"
    )
    user_trigger(
        db,
        f"before update on {OTHER[table]}",
        f"if new.{KEY[OTHER[table]][0]} = 25 then raise sqlstate '57014'; end if",
    )
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("call level_sync.drain_queue()")
    assert db.execute(f"select count(*) from {OTHER[table]} where current_level = 5").fetchone() == (20,)
    drop_user_trigger(db)
    drain(db)


@BOTH
def test_drain_inside_a_transaction_is_one_transaction(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    drop_user_trigger(db)
    db.execute("begin")
    db.execute("call level_sync.drain_queue()")
    assert levels(db, 1) == (5, 5)
    db.execute("rollback")
    assert level(db, OTHER[table], 1) == 3
    drain(db)


@BOTH
def test_one_pair_that_fails_does_not_hold_up_the_others_of_its_batch(db, users, table):
    add_pairs(db, 100)
    break_target(db, table)
    db.execute(f"update {table} set current_level = 5")
    drop_user_trigger(db)
    column = KEY[OTHER[table]][0]
    break_target(db, table, f"if new.{column} in (7, 70) then raise 'not {column}'; end if")
    drain(db)
    assert [entry[0] for entry in queued(db)] == [7, 70]
    assert db.execute(f"select count(*) from {OTHER[table]} where current_level = 5").fetchone() == (98,)
    drop_user_trigger(db)
    drain(db)


@BOTH
def test_deferred_trigger_of_the_application_that_fails_is_told_apart_in_a_drain(db, users, table):
    """It fires inside the batch, not at its COMMIT, where it would take the others with it."""
    add_pairs(db, 20)
    break_target(db, table)
    db.execute(f"update {table} set current_level = 5")
    drop_user_trigger(db)
    column = KEY[OTHER[table]][0]
    db.execute(f"""
        create function late() returns trigger language plpgsql as $$
        begin
          if new.{column} = 7 then raise 'too late'; end if;
          return null;
        end $$;
        create constraint trigger late after update on {OTHER[table]} deferrable initially deferred
          for each row execute function late();
    """)
    drain(db)
    assert [(entry[0], entry[4]) for entry in queued(db)] == [(7, "P0001")]
    db.execute("drop function late() cascade")
    drain(db)
