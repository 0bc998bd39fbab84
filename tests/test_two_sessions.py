"""Two sessions at once: a write waits for nobody longer than it was told, and no level is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, errors

from academy import (
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    SIDE,
    add_pair,
    bypass,
    configure,
    delete,
    drain,
    events,
    insert,
    levels,
    queued,
    set_level,
)

ISOLATED = pytest.mark.parametrize("isolation", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
WHEN_CARRIED = pytest.mark.parametrize("inline_limit", [32, 0], ids=["at_once", "at_commit"])
PATIENCE = 20  # seconds until a hanging session is given up


def session(database: Any, *, autocommit: bool = False) -> psycopg.Connection[Any]:
    """One more session that fails rather than hangs; by default it commits when told."""
    return database.connect(autocommit=autocommit, options=f"-c statement_timeout={PATIENCE}s")


def hold(database: Any, table: str, user: int = 1) -> psycopg.Connection[Any]:
    """A session that has locked a user's row, and keeps it until it is told to end."""
    holder = session(database)
    holder.execute(f"select from {table} where {KEY[table][0]} = %s for update", [user])
    return holder


@contextmanager
def meanwhile(function: Callable[..., Any], *arguments: Any) -> Iterator[Future[Any]]:
    """Runs the function in a thread beside the block; at its end the function must have returned."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function, *arguments)
        yield future
        future.result(timeout=PATIENCE + 10)


def await_state(db: psycopg.Connection[Any], waiting: psycopg.Connection[Any], state: str = "Lock") -> None:
    """Returns as soon as the session waits for a lock (or for another wait event type)."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        row = db.execute(
            "select wait_event_type from pg_stat_activity where pid = %s", [waiting.info.backend_pid]
        ).fetchone()
        if row == (state,):
            return
        time.sleep(0.002)
    pytest.fail(f"the session never came to wait for {state}")


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    started = time.monotonic()
    function(*arguments)
    return time.monotonic() - started


def warnings_of(connection: psycopg.Connection[Any]) -> list[str]:
    """A list that fills with the warnings this session gets from now on."""
    warnings: list[str] = []
    connection.add_notice_handler(
        lambda notice: warnings.append(notice.message_primary or "") if notice.severity == "WARNING" else None
    )
    return warnings


def desyncs(db: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    return db.execute("select user_id, issue_type from level_sync.desync_issues order by user_id").fetchall()


def add_pairs(db: psycopg.Connection[Any], count: int, level: int = 1) -> None:
    db.execute("insert into users (id) select generate_series(1, %s)", [count])
    db.execute(
        "insert into specialization_progress (student_id, specialization_id, current_level)"
        " select id, 'PLAYER', %s from users",
        [level],
    )


def make_other_side_fail(db: psycopg.Connection[Any], table: str) -> None:
    db.execute(f"alter table {OTHER[table]} add constraint no_level_above_6 check (current_level <= 6) not valid")


# A row that somebody holds


@BOTH
def test_held_row_is_waited_for_as_long_as_lock_wait_and_then_queued(database, db, table):
    """The one who wrote the license waits a fifth of it, so that of two who wait for each other one gives way."""
    add_pair(db, 1, level=3)
    configure(db, lock_wait="400 milliseconds")
    holder = hold(database, OTHER[table])
    waits = 0.4 if table == PROGRESS else 0.08
    assert waits <= seconds(set_level, db, table, 1, 5) < waits + 1.5
    assert queued(db) == [(1, "PLAYER", SIDE[table], "level_changed", "55P03")]
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_lock_wait_of_zero_never_waits(database, db, table):
    add_pair(db, 1, level=3)
    configure(db, lock_wait="0")
    holder = hold(database, OTHER[table])
    set_level(db, table, 1, 4)  # the first write of a session also reads its catalogs
    assert min(seconds(set_level, db, table, 1, level) for level in (5, 6, 7)) < 0.05
    assert {entry[4] for entry in queued(db)} == {"55P03"}
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (7, 7)


@BOTH
def test_lock_that_ends_before_constraints_are_immediate_leaves_nothing_queued(database, db, table):
    add_pair(db, 1, level=3)
    holder, writer = hold(database, OTHER[table]), session(database)
    set_level(writer, table, 1, 5)
    holder.commit()
    writer.execute("set constraints all immediate")
    assert levels(writer, 1) == (5, 5)
    writer.commit()
    assert queued(db) == []


@BOTH
@WHEN_CARRIED
def test_locked_table_of_the_other_side_does_not_hold_up_a_write(database, db, table, inline_limit):
    add_pair(db, 1, level=3)
    configure(db, inline_limit=inline_limit)
    holder, writer = session(database), session(database, autocommit=True)
    holder.execute(f"lock table {OTHER[table]} in access exclusive mode")
    writer.execute("set statement_timeout = '3s'")
    assert seconds(set_level, writer, table, 1, 5) < 2
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)


# Inserts and deletes


@BOTH
@pytest.mark.parametrize(("first_level", "second_level"), [(3, 5), (5, 3)])
def test_inserts_on_both_sides_at_once_meet_at_the_higher_level(database, db, users, table, first_level, second_level):
    users(1)
    configure(db, inline_limit=0)
    first, second = session(database), session(database)
    insert(first, table, 1, first_level)
    insert(second, OTHER[table], 1, second_level)
    assert seconds(first.commit) < 2
    assert seconds(second.commit) < 2
    drain(db)
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
def test_insert_waits_no_longer_than_lock_wait_for_an_insert_of_the_other_side(database, db, users, table):
    users(1)
    configure(db, inline_limit=0)
    holder = session(database)
    insert(holder, OTHER[table], 1, 4)
    configure(db, inline_limit=32, lock_wait="200 milliseconds")
    assert seconds(insert, db, table, 1, 6) < 2
    holder.commit()
    drain(db)
    assert levels(db, 1) == (6, 6)


@BOTH
def test_update_beside_a_refused_delete_keeps_its_level(database, db, table):
    add_pair(db, 1, level=3)
    deleter, writer = session(database), session(database, autocommit=True)
    delete(deleter, OTHER[table], 1)
    set_level(writer, table, 1, 6)
    with pytest.raises(errors.RestrictViolation):
        deleter.commit()
    drain(db)
    assert levels(db, 1) == (6, 6)


@BOTH
def test_update_beside_a_propagated_delete_leaves_no_row_behind(database, db, table):
    add_pair(db, 1, level=3)
    configure(db, on_delete="propagate")
    deleter, writer = session(database), session(database, autocommit=True)
    delete(deleter, OTHER[table], 1)
    set_level(writer, table, 1, 6)
    deleter.commit()
    drain(db)
    assert levels(db, 1) == (None, None)


# Isolation levels


@BOTH
@ISOLATED
@WHEN_CARRIED
def test_serialization_failure_of_the_carry_reaches_the_writer_and_a_retry_works(
    database, db, table, isolation, inline_limit
):
    add_pair(db, 1, level=3)
    configure(db, inline_limit=inline_limit)
    touched = {PROGRESS: "last_activity", LICENSE: "last_advanced_at"}[OTHER[table]]
    writer = session(database)
    writer.isolation_level = isolation
    writer.execute("select from users")
    db.execute(f"update {OTHER[table]} set {touched} = clock_timestamp()")

    def write_and_commit():
        set_level(writer, table, 1, 5)
        writer.commit()

    with pytest.raises(errors.SerializationFailure):
        write_and_commit()
    writer.rollback()
    assert levels(db, 1) == (3, 3)
    assert queued(db) == []
    write_and_commit()
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
@ISOLATED
def test_isolated_writer_is_not_disturbed_by_writes_of_other_pairs(database, db, table, isolation):
    add_pair(db, 1, level=3)
    add_pair(db, 2, level=3)
    writer = session(database)
    writer.isolation_level = isolation
    writer.execute("select from users")
    set_level(db, OTHER[table], 2, 4)
    set_level(writer, table, 1, 5)
    set_level(db, table, 2, 6)
    writer.commit()
    assert (levels(db, 1), levels(db, 2)) == ((5, 5), (6, 6))
    assert queued(db) == []


@BOTH
@ISOLATED
def test_isolated_writer_queues_what_is_held(database, db, table, isolation):
    add_pair(db, 1, level=3)
    holder, writer = hold(database, OTHER[table]), session(database)
    writer.isolation_level = isolation
    set_level(writer, table, 1, 5)
    writer.commit()
    holder.rollback()
    assert queued(db) == [(1, "PLAYER", SIDE[table], "level_changed", "55P03")]
    drain(db)
    assert levels(db, 1) == (5, 5)


# Time limits of the writer


@BOTH
def test_statement_timeout_longer_than_lock_wait_does_not_fail_a_write(database, db, table):
    add_pair(db, 1, level=3)
    holder = hold(database, OTHER[table])
    db.execute("set statement_timeout = '500ms'")  # shorter than deadlock_timeout
    set_level(db, table, 1, 5)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_statement_timeout_during_our_wait_reaches_the_writer(database, db, table):
    add_pair(db, 1, level=3)
    configure(db, lock_wait="500 milliseconds")
    holder = hold(database, OTHER[table])
    db.execute("set statement_timeout = '100ms'")
    with pytest.raises(errors.QueryCanceled):
        set_level(db, table, 1, 5)
    holder.rollback()
    assert levels(db, 1) == (3, 3)
    assert queued(db) == []


@BOTH
def test_cancel_during_our_wait_reaches_the_writer(database, db, table):
    add_pair(db, 1, level=3)
    configure(db, lock_wait="500 milliseconds")
    holder, writer = hold(database, OTHER[table]), session(database, autocommit=True)

    def write():
        with pytest.raises(errors.QueryCanceled):
            set_level(writer, table, 1, 5)

    with meanwhile(write):
        await_state(db, writer)
        writer.cancel_safe()
    holder.rollback()
    assert levels(db, 1) == (3, 3)
    assert queued(db) == []


@BOTH
def test_lock_timeout_of_the_writer_is_its_own_again_afterwards(database, db, table):
    add_pair(db, 1, level=3)
    holder, writer = hold(database, OTHER[table]), session(database)
    writer.execute("set local lock_timeout = '1234ms'")
    set_level(writer, table, 1, 5)
    holder.rollback()
    set_level(writer, table, 1, 6)
    writer.execute("set constraints all immediate")
    assert writer.execute("show lock_timeout").fetchone() == ("1234ms",)
    writer.commit()


# A queue that cannot be written


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
    assert seconds(set_level, writer, table, 1, 7) < 2
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
    assert seconds(set_level, writer, table, 1, 7) < 2
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
        ("free", ["pending_pairs", "sync_queue"]),
        ("failing", ["pending_pairs", "sync_queue"]),
        ("failing", ["pending_pairs"]),
        ("failing", ["sync_queue"]),
    ],
    ids=["free-both", "failing-both", "failing-pending_pairs", "failing-sync_queue"],
)
def test_bulk_write_stands_whatever_cannot_be_queued(database, db, table, take_away, tables, targets):
    add_pairs(db, 500)
    if targets == "failing":
        make_other_side_fail(db, table)
    restore = take_away(database, tables)
    writer = session(database, autocommit=True)
    warnings = warnings_of(writer)
    writer.execute("set statement_timeout = '8s'")
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


# The drain beside writers


@BOTH
def test_drain_skips_the_pair_of_an_open_writer_without_counting_an_attempt(database, db, table):
    add_pair(db, 1, level=3)
    holder = hold(database, OTHER[table])
    set_level(db, table, 1, 5)
    assert seconds(drain, db) < 2
    assert db.execute("select attempts, dead_at from level_sync.sync_queue").fetchall() == [(0, None)]
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
def test_drain_skips_a_held_pair_and_carries_the_others(database, db, table):
    add_pairs(db, 3)
    held = [hold(database, OTHER[table], user) for user in (1, 2, 3)]
    db.execute(f"update {table} set current_level = 5")
    held[0].rollback()
    held[2].rollback()
    drain(db)
    assert [entry[0] for entry in queued(db)] == [2]
    assert levels(db, 1) == levels(db, 3) == (5, 5)
    held[1].rollback()
    drain(db)


@BOTH
def test_two_drains_at_once_carry_every_pair_once(database, db, table):
    add_pairs(db, 300)
    configure(db, batch_size=20)
    for level in (3, 4, 5):
        holder = session(database)
        holder.execute(f"select from {OTHER[table]} for update")
        db.execute(f"update {table} set current_level = %s", [level])
        assert len(queued(db)) == 300
        holder.rollback()
        sessions = [session(database, autocommit=True) for _ in range(2)]
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(lambda one: one.execute("call level_sync.drain_queue()"), sessions))
        assert queued(db) == []
        assert desyncs(db) == []
    assert {len(events(db, user)) for user in range(1, 301)} == {4}


@BOTH
def test_drains_at_once_take_up_what_a_transaction_left_behind(database, db, table):
    add_pairs(db, 300)
    # What a transaction leaves that has no subtransaction left at its commit.
    db.execute("set level_sync.subtransactions = %s" % ("'" + "." * 60 + "'"))
    db.execute(f"update {table} set current_level = 5")
    assert db.execute("select count(*) from level_sync.pending_pairs").fetchone() == (300,)
    first, second = session(database), session(database, autocommit=True)
    first.execute("call level_sync.drain_queue()")
    second.execute("call level_sync.drain_queue()")
    first.commit()
    drain(db)
    assert desyncs(db) == []


@BOTH
def test_write_beside_a_drain_of_the_other_side_is_not_lost(database, db, table):
    add_pair(db, 1, level=1)
    configure(db, lock_wait="0")
    drainer = session(database, autocommit=True)
    for turn in range(20):
        holder = hold(database, table)
        set_level(db, OTHER[table], 1, 2 + turn % 3)
        holder.close()
        with meanwhile(drain, drainer):
            time.sleep(turn * 0.0006)  # another moment of the drain each time
            set_level(db, table, 1, 5 + turn % 3)
        drain(db)
        assert levels(db, 1) == (5 + turn % 3, 5 + turn % 3)


@BOTH
def test_pair_left_behind_does_not_undo_a_later_write_that_was_queued(database, db, table):
    add_pair(db, 1, level=1)
    spent = session(database, autocommit=True)
    spent.execute("set level_sync.subtransactions = %s" % ("'" + "." * 60 + "'"))
    set_level(spent, table, 1, 3)
    assert sorted(levels(db, 1)) == [1, 3]
    holder = hold(database, table)
    set_level(db, OTHER[table], 1, 7)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (7, 7)


# Bulk in both directions


def test_bulk_writes_of_both_sides_at_once_neither_fail_nor_deadlock(database, db):
    add_pairs(db, 500)

    def write(table: str) -> None:
        writer = session(database, autocommit=True)
        try:
            for turn in range(20):
                writer.execute(f"update {table} set current_level = %s", [1 + (turn + (table == LICENSE)) % 8])
        finally:
            writer.close()

    with ThreadPoolExecutor(2) as executor:
        for written in [executor.submit(write, table) for table in (PROGRESS, LICENSE)]:
            written.result(timeout=3 * PATIENCE)
    drain(db)
    assert deadlocks(db) == 0
    assert desyncs(db) == []


def test_bulk_writes_of_both_sides_in_opposite_order_neither_fail_nor_deadlock(database, db):
    add_pairs(db, 500)
    db.execute("create table backwards as select license.* from user_licenses as license order by user_id desc")
    db.execute("alter table user_licenses disable trigger user; delete from user_licenses")
    db.execute("vacuum user_licenses")
    db.execute("insert into user_licenses select * from backwards")
    db.execute("alter table user_licenses enable trigger user")

    def write(table: str) -> None:
        writer = session(database, autocommit=True)
        try:
            for turn in range(20):
                writer.execute(f"update {table} set current_level = %s", [1 + (turn + (table == LICENSE)) % 8])
        finally:
            writer.close()

    with ThreadPoolExecutor(2) as executor:
        for written in [executor.submit(write, table) for table in (PROGRESS, LICENSE)]:
            written.result(timeout=3 * PATIENCE)
    drain(db)
    assert deadlocks(db) == 0
    assert desyncs(db) == []


def deadlocks(db: psycopg.Connection[Any]) -> int:
    row = db.execute("select deadlocks from pg_stat_database where datname = current_database()").fetchone()
    assert row is not None
    return row[0]


# What a write leaves in the server


@BOTH
@WHEN_CARRIED
def test_write_can_be_prepared_so_it_notifies_nobody_and_makes_no_temporary_table(database, db, table, inline_limit):
    add_pair(db, 1, level=3)
    configure(db, inline_limit=inline_limit)
    writer = session(database)
    writer.execute("listen level_sync")
    writer.commit()
    writer.tpc_begin("a write of a level")
    set_level(writer, table, 1, 5)
    writer.tpc_prepare()
    writer.tpc_commit()
    assert list(writer.notifies(timeout=0.1)) == []
    assert levels(db, 1) == (5, 5)


@BOTH
def test_write_takes_no_advisory_lock_and_makes_no_temporary_table(database, db, table):
    add_pairs(db, 100)
    holder, writer = hold(database, OTHER[table], 50), session(database)
    writer.execute(f"update {table} set current_level = 5")
    writer.execute("set constraints all immediate")
    assert writer.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)
    assert writer.execute("select count(*) from pg_class where relpersistence = 't'").fetchone() == (0,)
    assert writer.execute("select pg_my_temp_schema() = 0").fetchone() == (True,)
    writer.commit()
    holder.rollback()
    drain(db)


@BOTH
def test_the_event_of_a_write_that_waited_names_the_level_the_holder_left(database, db, table):
    configure(db, lock_wait="500 ms")
    for user in (1, 2, 3):
        add_pair(db, user, level=user)
    holder = hold(database, OTHER[table], 2)
    holder.execute("set level_sync.own_depth = 0")  # what it writes is for this test alone
    holder.execute(f"update {OTHER[table]} set current_level = 5 where {KEY[OTHER[table]][0]} = 2")
    writer = session(database, autocommit=True)
    with meanwhile(set_level, writer, table, 2, 7):
        await_state(db, writer)
        holder.commit()
    drain(db)
    assert events(db, 2)[-1][2:4] == (5, 7)


@BOTH
def test_a_held_row_of_a_set_costs_the_others_no_subtransaction(database, db, table):
    configure(db, inline_limit=0)
    for user in range(1, 41):
        add_pair(db, user, level=2)
    holder = hold(database, OTHER[table], 20)
    writer = session(database)
    writer.execute(f"update {table} set current_level = 5")
    writer.execute("set constraints all immediate")
    used = writer.execute("select length(current_setting('level_sync.subtransactions'))").fetchone()[0]
    writer.commit()
    holder.rollback()
    assert queued(db) != []
    assert used <= 5  # a set that failed would be done again in parts
    drain(db)
    assert {levels(db, user) for user in range(1, 41)} == {(5, 5)}


@BOTH
def test_an_insert_whose_other_row_is_held_waits_for_the_drain_and_blames_no_trigger(database, db, users, table):
    users(1)
    with bypass(db):
        insert(db, OTHER[table], 1, 1)
    holder = hold(database, OTHER[table])
    insert(session(database, autocommit=True), table, 1, 5)
    assert [entry[-1] for entry in queued(db)] == ["55P03"]
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
@pytest.mark.parametrize("lock_wait", ["0", "5 ms"])
def test_a_set_waits_for_no_row_that_somebody_is_about_to_insert(database, db, users, table, lock_wait):
    users(1)
    configure(db, inline_limit=0, lock_wait=lock_wait)
    other = session(database)
    insert(other, OTHER[table], 1, 2)
    with meanwhile(insert, session(database, autocommit=True), table, 1, 5) as done:
        wait([done], timeout=5)
        has_waited = not done.done()
        other.commit()
    assert not has_waited
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_a_set_waits_half_of_lock_wait_for_a_row_that_somebody_is_about_to_insert(database, db, users, table):
    users(1)
    configure(db, inline_limit=0, lock_wait="500 ms")
    other = session(database)
    insert(other, OTHER[table], 1, 2)
    writer = session(database, autocommit=True)
    with meanwhile(insert, writer, table, 1, 5):
        await_state(db, writer)
        time.sleep(0.05)  # longer than the shortest lock_timeout, shorter than half of lock_wait
        other.rollback()
    assert (levels(db, 1), queued(db)) == ((5, 5), [])


def test_advance_waits_for_who_holds_the_license_and_does_not_go_below_what_they_leave(database, db):
    add_pair(db, 1, level=3)
    holder, advancer = session(database), session(database, autocommit=True)
    set_level(holder, LICENSE, 1, 6)
    with meanwhile(advancer.execute, "select level_sync.advance_license(1, 'PLAYER', 5) ->> 'message'") as answer:
        await_state(db, advancer)
        holder.commit()
    message = "target level 5 is not above the current level 6 of user 1 in PLAYER"
    assert answer.result().fetchone() == (message,)
    assert levels(db, 1) == (6, 6)
