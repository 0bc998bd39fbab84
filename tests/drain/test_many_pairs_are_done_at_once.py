"""A drain and a reconcile of many pairs do at once what nobody is in the way of, and the rest as of a few: nothing
that is held, waits or has changed is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

import internals
from academy import (
    ACROSS,
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PATIENCE,
    PROGRESS,
    SIDE,
    Connection,
    add_pairs,
    bypass,
    configure,
    delete,
    drain,
    drop_user_trigger,
    events,
    last_run,
    level,
    levels,
    queued,
    set_level,
    user_trigger,
    wait_until,
)
from session_schedule import stand_gate_in

PAIRS = 150  # from 100 on a set is a large one
ONE = 70  # a user in the middle
WAYS = pytest.mark.parametrize("way", ["drain", "reconcile"])


def add_many(db: Connection, count: int = PAIRS) -> None:
    """Pairs at level 3, whose licenses may be written past their trigger."""
    add_pairs(db, count)
    db.execute("update user_licenses set max_achieved_level = 8")


def write_past_triggers(db: Connection, table: str, new_level: int = 5) -> None:
    """Everybody's level on one side."""
    with bypass(db):
        db.execute(f"update {table} set current_level = %s", [new_level])


def queue_all(db: Connection, table: str) -> None:
    user, specialization = KEY[table]
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        f" select {user}, {specialization}, %s, 'level_changed', '55P03', 'held' from {table}",
        [SIDE[table]],
    )


def large_set(db: Connection, table: str, way: str) -> Callable[[Connection], None]:
    """PAIRS pairs of which one side was written, and what brings them into step."""
    add_many(db)
    write_past_triggers(db, table)
    if way == "drain":
        queue_all(db, table)
        return lambda session: session.execute("call level_sync.drain_queue()") and None
    configure(db, conflict_policy={PROGRESS: "progress_wins", LICENSE: "license_wins"}[table])
    return lambda session: session.execute("call level_sync.reconcile()") and None


def unequal(db: Connection) -> list[int]:
    return [row[0] for row in db.execute("select user_id from level_sync.desync_issues order by user_id")]


def leave_behind(db: Connection, table: str) -> None:
    """As a transaction does that could not carry its own set; no drain takes it up."""
    internals.no_drain_takes_up_what_is_left_behind(db)
    internals.leave_behind(db, ONE, SIDE[table])


@contextmanager
def at_the_gate(database: Any, db: Connection, work: Callable[[Connection], None], step: str) -> Iterator[None]:
    """Lets the work go on until it comes to this step; it goes on when the block has ended."""
    stand_gate_in(db, step)
    gate, worker = database.connect(), database.connect()
    gate.execute("select pg_advisory_lock(4711)")
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(work, worker)
        wait_until(
            lambda: db.execute(
                "select from pg_locks where pid = %s and locktype = 'advisory' and not granted",
                [worker.info.backend_pid],
            ).fetchall(),
        )
        yield
        gate.close()
        running.result(timeout=PATIENCE)


@WAYS
@BOTH
def test_what_nobody_is_in_the_way_of_is_done_at_once(db, table, way):
    bring_into_step = large_set(db, table, way)
    internals.look_one_by_one_at_no_more_than(db, 0)
    db.execute("set level_sync.actor = 'night shift'")
    bring_into_step(db)
    assert unequal(db) == queued(db) == []
    source = {"drain": "trigger", "reconcile": "reconcile"}[way]
    assert events(db, ONE)[1:] == [(ACROSS[table], "updated", 3, 5, source)]
    if way == "reconcile":
        run = last_run(db)
        assert (run["status"], run["synced_count"], run["failed_count"]) == ("success", PAIRS, 0)
        assert run["results"]["outcomes"] == {"repaired": PAIRS}


@BOTH
def test_an_event_of_a_large_drain_says_who_had_written_and_why(db, table):
    add_many(db)
    write_past_triggers(db, table)
    queue_all(db, table)
    db.execute("update level_sync.sync_queue set actor = 'a' || user_id, reason = 'r' || user_id")
    drain(db)
    assert db.execute(
        "select count(*), bool_and(actor = 'a' || user_id and reason = 'r' || user_id) from level_sync.sync_events"
        " where action = 'updated'"
    ).fetchone() == (PAIRS, True)


@WAYS
@BOTH
@pytest.mark.parametrize("held", ["the row that was written", "the row that is to follow"])
def test_a_pair_that_somebody_holds_is_left_and_the_others_are_done(database, db, table, way, held):
    bring_into_step = large_set(db, table, way)
    held_table = table if held == "the row that was written" else OTHER[table]
    holder = database.connect(autocommit=False)
    holder.execute(f"select from {held_table} where {KEY[held_table][0]} = %s for update", [ONE])
    internals.look_one_by_one_at_no_more_than(db, 1)
    bring_into_step(db)
    assert unequal(db) == [ONE]
    assert [row[0] for row in queued(db)] == ([ONE] if way == "drain" else [])
    if way == "reconcile":
        assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 1, "busy": 1}
    holder.rollback()
    drain(db)
    bring_into_step(db)
    assert unequal(db) == []


@WAYS
@BOTH
def test_a_level_that_somebody_writes_meanwhile_is_not_written_over(database, db, table, way):
    """After the pairs were chosen, before any of them is locked."""
    bring_into_step = large_set(db, table, way)
    with at_the_gate(database, db, bring_into_step, "uncontended"):
        set_level(db, OTHER[table], ONE, 7)
        set_level(db, table, ONE + 1, 8)
    assert (levels(db, ONE), levels(db, ONE + 1)) == ((7, 7), (8, 8))
    assert unequal(db) == []
    if way == "reconcile":
        assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 2, "changed": 2}
    # And the event says which level was replaced.
    assert [event[:4] for event in events(db, ONE)[1:]] == [(ACROSS[OTHER[table]], "updated", 5, 7)]


@WAYS
@BOTH
def test_a_level_is_read_when_its_row_is_locked_and_not_before(database, db, table, way):
    """Written back to what the other side has, within the statement that locks and writes: nothing is left to carry."""
    bring_into_step = large_set(db, table, way)
    with at_the_gate(database, db, bring_into_step, "set"):
        set_level(db, table, ONE, 3)
    assert levels(db, ONE) == (3, 3)
    assert unequal(db) == queued(db) == []
    assert len(events(db, ONE)) == 1  # of its insert


@WAYS
@BOTH
def test_a_write_that_is_queued_meanwhile_is_not_lost(database, db, table, way):
    """It was made after the pairs were chosen, and its own entry knows better which side is the newer one."""
    bring_into_step = large_set(db, table, way)
    configure(db, lock_wait="0")
    with at_the_gate(database, db, bring_into_step, "uncontended"):
        holder = database.connect(autocommit=False)
        holder.execute(f"select from {table} where {KEY[table][0]} = %s for update", [ONE])
        set_level(db, OTHER[table], ONE, 7 if way == "drain" else 3)
        if way == "reconcile":  # The level that was planned, but written again: its entry is the newest truth.
            db.execute(
                "insert into level_sync.sync_queue"
                " (user_id, specialization, side, change, sqlstate, message, next_attempt_at)"
                " values (%s, 'PLAYER', %s, 'level_changed', '55P03', 'held', clock_timestamp() + interval '1 hour')",
                [ONE, SIDE[OTHER[table]]],
            )
        holder.rollback()
    expected = 7 if way == "drain" else 3
    assert level(db, OTHER[table], ONE) == expected
    assert [user for user in unequal(db) if user != ONE] == []
    if way == "reconcile":
        assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 1, "queued": 1}
    drain(db)
    assert levels(db, ONE) == (expected, expected)


@BOTH
def test_what_a_transaction_left_behind_is_not_repaired_over(db, table):
    bring_into_step = large_set(db, table, "reconcile")
    leave_behind(db, OTHER[table])
    bring_into_step(db)
    assert unequal(db) == [ONE]
    assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 1, "queued": 1}
    db.execute(f"truncate {internals.PENDING_PAIRS}")
    bring_into_step(db)


@BOTH
@pytest.mark.leftovers
def test_a_dead_entry_does_not_keep_the_other_pairs_from_being_done_at_once(db, table):
    bring_into_step = large_set(db, table, "reconcile")
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, dead_at)"
        " values (%s, 'PLAYER', %s, 'level_changed', '55000', 'dead', clock_timestamp())",
        [ONE, SIDE[table]],
    )
    internals.look_one_by_one_at_no_more_than(db, 1)
    bring_into_step(db)
    assert unequal(db) == [ONE]
    assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 1, "queued": 1}


@WAYS
@BOTH
def test_what_is_done_at_once_waits_for_nobody(db, table, way):
    bring_into_step = large_set(db, table, way)
    db.execute("create table seen (lock_timeout text)")
    user_trigger(db, f"before update on {OTHER[table]}", "insert into seen values (current_setting('lock_timeout'))")
    internals.look_one_by_one_at_no_more_than(db, 0)
    bring_into_step(db)
    assert db.execute("select lock_timeout, count(*) from seen group by lock_timeout").fetchall() == [("1ms", PAIRS)]


@WAYS
@BOTH
@pytest.mark.parametrize("told", [False, True], ids=["by policy", "told"])
def test_what_a_trigger_of_the_batch_writes_and_cannot_carry_stays_queued(db, table, way, told):
    """The level that it wrote is the newest one: it is neither settled nor called repaired."""
    bring_into_step = large_set(db, table, way)
    user, other_user = KEY[table][0], KEY[OTHER[table]][0]
    user_trigger(
        db,
        f"after update on {OTHER[table]}",
        f"if new.{other_user} = 10 and new.current_level = 5 then"
        f" update {table} set current_level = 7 where {user} in (2, 100); end if",
        name="writes_others",
    )
    refuses = f"if new.{other_user} in (2, 100) and new.current_level = 7 then raise 'no 7'; end if"
    user_trigger(db, f"before update on {OTHER[table]}", refuses, name="refuses")
    if told and way == "reconcile":
        db.execute(f"call level_sync.reconcile(direction => '{ACROSS[table]}')")
    else:
        bring_into_step(db)
    assert unequal(db) == [2, 100]
    assert sorted({(row[0], row[2]) for row in queued(db)}) == [(2, SIDE[table]), (100, SIDE[table])]
    if way == "reconcile":
        assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 2, "queued": 2}
    drop_user_trigger(db, "refuses")
    drain(db)
    assert levels(db, 2) == levels(db, 100) == (7, 7)


@WAYS
@BOTH
@pytest.mark.leftovers
def test_a_pair_that_a_trigger_writes_again_is_no_failure(db, table, way):
    """Its set comes after this one, at the commit of the same transaction."""
    add_many(db, 3)
    write_past_triggers(db, table)
    configure(db, inline_limit=0, max_attempts=1)
    user, other_user = KEY[table][0], KEY[OTHER[table]][0]
    again = f"update {table} set current_level = 4 where {user} = 2"
    user_trigger(db, f"after update on {OTHER[table]}", f"if new.{other_user} = 1 then {again}; end if", name="again")
    user_trigger(
        db, f"before update on {OTHER[table]}", f"if new.{other_user} = 3 then return null; end if", name="drops"
    )
    if way == "drain":
        queue_all(db, table)
        db.execute("call level_sync.drain_queue()")
    else:
        db.execute(f"call level_sync.reconcile(direction => '{ACROSS[table]}')")
        assert last_run(db)["failed_count"] == 1
    assert levels(db, 2) == (4, 4)
    assert [(row[0], row[4]) for row in queued(db)] == [(3, "55000")]


@BOTH
def test_somebody_who_tells_the_direction_need_not_wait_for_the_queue(db, table):
    large_set(db, table, "reconcile")
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, dead_at)"
        " values (%s, 'PLAYER', %s, 'level_changed', '55000', 'dead', clock_timestamp())",
        [ONE, SIDE[table]],
    )
    leave_behind(db, table)
    internals.look_one_by_one_at_no_more_than(db, 1)
    db.execute(f"call level_sync.reconcile(direction => '{ACROSS[table]}')")
    assert unequal(db) == queued(db) == []
    db.execute(f"truncate {internals.PENDING_PAIRS}")


@BOTH
def test_a_plan_is_applied_only_where_both_levels_are_as_it_saw_them(db, table):
    add_many(db)
    write_past_triggers(db, table)
    configure(db, conflict_policy={PROGRESS: "progress_wins", LICENSE: "license_wins"}[table])
    db.execute("call level_sync.reconcile(dry_run => true)")
    plan = last_run(db)["run_id"]
    with bypass(db):
        set_level(db, table, ONE, 6)
        set_level(db, OTHER[table], ONE + 1, 4)
        delete(db, OTHER[table], ONE + 2)
    db.execute("call level_sync.reconcile(plan => %s)", [plan])
    assert unequal(db) == [ONE, ONE + 1, ONE + 2]
    assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 3, "changed": 3}
    db.execute("call level_sync.reconcile()")


@WAYS
@BOTH
@pytest.mark.leftovers
def test_a_pair_that_fails_keeps_its_error_and_the_others_are_done(db, table, way):
    bring_into_step = large_set(db, table, way)
    column = KEY[OTHER[table]][0]
    user_trigger(db, f"before update on {OTHER[table]}", f"if new.{column} = {ONE} then raise 'not this one'; end if")
    bring_into_step(db)
    assert unequal(db) == [ONE]
    assert db.execute("select user_id, sqlstate, message from level_sync.sync_queue").fetchall() == [
        (ONE, "P0001", "not this one")
    ]
    if way == "reconcile":
        assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 1, "failed": 1}
    drop_user_trigger(db)


@WAYS
@BOTH
@pytest.mark.leftovers
@pytest.mark.parametrize("does", ["return null", "new.current_level := 4"])
def test_a_level_that_does_not_arrive_is_a_failure_of_that_pair(db, table, way, does):
    bring_into_step = large_set(db, table, way)
    column = KEY[OTHER[table]][0]
    user_trigger(db, f"before update on {OTHER[table]}", f"if new.{column} = {ONE} then {does}; end if")
    bring_into_step(db)
    assert unequal(db) == [ONE]
    assert [(row[0], row[4]) for row in queued(db)] == [(ONE, "55000")]
    if way == "reconcile":
        assert last_run(db)["results"]["outcomes"] == {"repaired": PAIRS - 1, "failed": 1}
    drop_user_trigger(db)


@BOTH
@pytest.mark.leftovers
def test_a_level_out_of_range_is_told_and_the_others_are_done(db, table):
    large_set(db, table, "drain")
    with bypass(db):
        set_level(db, table, ONE, 8)
    with bypass(db):
        db.execute("update specializations set max_levels = 7 where id = 'PLAYER'")
    drain(db)
    assert unequal(db) == [ONE]
    assert [(row[0], row[4]) for row in queued(db)] == [(ONE, "23514")]


@BOTH
def test_a_missing_row_in_a_large_set_is_created(db, table):
    large_set(db, table, "drain")
    with bypass(db):
        delete(db, OTHER[table], ONE)
    drain(db)
    assert levels(db, ONE) == (5, 5)
    assert unequal(db) == queued(db) == []


@BOTH
def test_an_entry_whose_pair_is_equal_by_now_is_settled_without_an_event(db, table):
    large_set(db, table, "drain")
    with bypass(db):
        set_level(db, OTHER[table], ONE, 5)
    internals.look_one_by_one_at_no_more_than(db, 0)
    drain(db)
    assert unequal(db) == queued(db) == []
    assert len(events(db, ONE)) == 1  # of its insert


@BOTH
def test_a_row_that_was_created_does_not_demote_in_a_large_set_either(db, table):
    large_set(db, table, "drain")
    with bypass(db):
        set_level(db, OTHER[table], ONE, 7)
    db.execute("update level_sync.sync_queue set change = 'created' where user_id = %s", [ONE])
    drain(db)
    assert levels(db, ONE) == (7, 7)
    assert unequal(db) == queued(db) == []


def test_entries_of_both_sides_in_one_large_drain_each_win(db):
    add_many(db)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5 where student_id % 2 = 0")
        db.execute("update user_licenses set current_level = 6 where user_id % 2 = 1")
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " select n, 'PLAYER', case n %% 2 when 0 then 'progress' else 'license' end, 'level_changed', '55P03', 'held'"
        " from generate_series(1, %s) as n",
        [PAIRS],
    )
    drain(db)
    assert levels(db, 2) == (5, 5)
    assert levels(db, 3) == (6, 6)
    assert unequal(db) == queued(db) == []


@BOTH
def test_an_old_snapshot_makes_a_large_drain_fail_for_a_retry(database, db, table):
    """As a small one does: a transaction of the caller's that began before somebody else's write."""
    large_set(db, table, "drain")
    caller = database.connect(autocommit=False)
    caller.isolation_level = IsolationLevel.REPEATABLE_READ
    caller.execute("select from users")
    with bypass(db):
        set_level(db, table, ONE, 6)
    with pytest.raises(psycopg.errors.SerializationFailure):
        caller.execute("call level_sync.drain_queue()")
    caller.rollback()
    drain(db)
    assert levels(db, ONE) == (6, 6)


@BOTH
def test_a_large_set_keeps_how_the_caller_s_statements_are_planned(db, table):
    add_many(db, 1100)  # enough that joins of one row at a time would be the slower ones
    write_past_triggers(db, table)
    queue_all(db, table)
    internals.look_one_by_one_at_no_more_than(db, 0)
    shown = "select current_setting('enable_nestloop'), current_setting('work_mem'), current_setting('plan_cache_mode')"
    with db.transaction():
        before = db.execute(shown).fetchone()
        db.execute("call level_sync.drain_queue()")
        assert db.execute(shown).fetchone() == before
    assert unequal(db) == []
