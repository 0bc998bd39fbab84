"""A drain beside writers and other drains: it skips what somebody holds, and undoes no later write."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import internals
from academy import BOTH, OTHER, add_pair, add_pairs, configure, drain, events, levels, queued, set_level
from two_sessions import AT_ONCE, desyncs, hold, meanwhile, seconds, session


@BOTH
def test_drain_skips_the_pair_of_an_open_writer_without_counting_an_attempt(database, db, table):
    add_pair(db, 1, level=3)
    holder = hold(database, OTHER[table])
    set_level(db, table, 1, 5)
    assert seconds(drain, db) < AT_ONCE
    assert db.execute("select attempts, dead_at from level_sync.sync_queue").fetchall() == [(0, None)]
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
def test_drain_skips_a_held_pair_and_carries_the_others(database, db, table):
    add_pairs(db, 3, level=1)
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
    add_pairs(db, 300, level=1)
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
    add_pairs(db, 300, level=1)
    # What a transaction leaves that has no subtransaction left at its commit.
    internals.spend_subtransactions(db)
    db.execute(f"update {table} set current_level = 5")
    assert db.execute(f"select count(*) from {internals.PENDING_PAIRS}").fetchone() == (300,)
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
    internals.spend_subtransactions(spent)
    set_level(spent, table, 1, 3)
    assert sorted(levels(db, 1)) == [1, 3]
    holder = hold(database, table)
    set_level(db, OTHER[table], 1, 7)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (7, 7)
