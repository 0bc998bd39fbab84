"""Beside other sessions a write waits for nobody longer than it was told, and no level is lost."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import IsolationLevel, errors

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
    add_pairs,
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
from two_sessions import AT_ONCE, await_state, hold, let_writes_wait, meanwhile, seconds, session

ISOLATED = pytest.mark.parametrize("isolation", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])


# A row that somebody holds


@BOTH
def test_held_row_is_waited_for_as_long_as_lock_wait_and_then_queued(database, db, table):
    """The one who wrote the license waits a fifth of it, so that of two who wait for each other one gives way."""
    add_pair(db, 1, level=3)
    configure(db, lock_wait="400 milliseconds")
    holder = hold(database, OTHER[table])
    waits = 0.4 if table == PROGRESS else 0.08
    waited = [seconds(set_level, db, table, 1, level) for level in (5, 6, 7)]
    assert waits <= min(waited) < waits + 1.5
    assert queued(db) == [(1, "PLAYER", SIDE[table], "level_changed", "55P03")] * 3
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (7, 7)


@BOTH
def test_lock_wait_of_zero_never_waits(database, db, table):
    """Beside writes of a pair that nobody holds: those tell how long a write takes at the moment."""
    add_pair(db, 1, level=3)
    add_pair(db, 2, level=3)
    configure(db, lock_wait="0")
    holder = hold(database, OTHER[table])
    seconds_of_both = [[seconds(set_level, db, table, user, level) for user in (1, 2)] for level in (4, 5, 6, 7)]
    held, free = map(min, zip(*seconds_of_both, strict=True))
    assert held < free + 0.05
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
@BULK
def test_locked_table_of_the_other_side_does_not_hold_up_a_write(database, db, table, inline_limit):
    add_pair(db, 1, level=3)
    configure(db, inline_limit=inline_limit)
    holder, writer = session(database), session(database, autocommit=True)
    holder.execute(f"lock table {OTHER[table]} in access exclusive mode")
    assert seconds(set_level, writer, table, 1, 5) < AT_ONCE
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
    assert seconds(first.commit) < AT_ONCE
    assert seconds(second.commit) < AT_ONCE
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
    assert seconds(insert, db, table, 1, 6) < AT_ONCE
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
@BULK
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
    db.execute("set deadlock_timeout = '10min'; set statement_timeout = '20s'")
    set_level(db, table, 1, 5)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_statement_timeout_during_our_wait_reaches_the_writer(database, db, table):
    add_pair(db, 1, level=3)
    let_writes_wait(db)
    holder = hold(database, OTHER[table])
    db.execute("set statement_timeout = '1s'")
    with pytest.raises(errors.QueryCanceled):
        set_level(db, table, 1, 5)
    holder.rollback()
    assert levels(db, 1) == (3, 3)
    assert queued(db) == []


@BOTH
def test_cancel_during_our_wait_reaches_the_writer(database, db, table):
    add_pair(db, 1, level=3)
    let_writes_wait(db)
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


# What a write leaves in the server


@BOTH
@BULK
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
    add_pairs(db, 100, level=1)
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
    let_writes_wait(db)
    for user in (1, 2, 3):
        add_pair(db, user, level=user)
    holder = hold(database, OTHER[table], 2)
    internals.write_as_level_sync_does(holder)  # the write is for this test alone
    holder.execute(f"update {OTHER[table]} set current_level = 5 where {KEY[OTHER[table]][0]} = 2")
    writer = session(database, autocommit=True)
    with meanwhile(set_level, writer, table, 2, 7):
        await_state(db, writer)
        holder.commit()
    drain(db)
    assert events(db, 2)[-1][2:4] == (5, 7)


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


@BOTH
@pytest.mark.parametrize("isolation", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_an_insert_over_a_pair_that_an_old_snapshot_still_sees_is_in_step_or_refused(database, db, table, isolation):
    add_pairs(db, 3, level=5)
    writer = database.connect(autocommit=False)
    writer.isolation_level = isolation
    writer.execute("select from users")
    with db.transaction():
        for gone in (PROGRESS, LICENSE):
            db.execute(f"delete from {gone} where {KEY[gone][0]} = 3")
    with pytest.raises(psycopg.errors.SerializationFailure):
        insert(writer, table, 3, 7)
    writer.rollback()
    assert levels(db, 3) == (None, None)
    insert(writer, table, 3, 7)  # as the message says: it succeeds when tried again
    writer.commit()
    assert levels(db, 3) == (7, 7)


@BOTH
@pytest.mark.parametrize("locked", ["settings", "specializations"])
def test_a_write_waits_for_no_table_that_only_level_sync_reads(database, db, table, locked):
    add_pairs(db, 2)
    holder = database.connect(autocommit=False)
    schema = "level_sync" if locked == "settings" else "public"
    holder.execute(f"lock table {schema}.{locked} in access exclusive mode")
    waited = [seconds(set_level, db, table, 1, new_level) for new_level in (4, 5, 6)]
    assert min(waited) < 1  # a busy machine may delay some of them
    assert db.execute("show lock_timeout").fetchone() == ("0",)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (6, 6)
