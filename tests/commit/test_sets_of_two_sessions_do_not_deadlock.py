"""Sets that are carried at commit, beside other sessions: they wait for nobody for long, and none is lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

import internals
from academy import (
    BOTH,
    LICENSE,
    OTHER,
    PATIENCE,
    PROGRESS,
    add_pair,
    add_pairs,
    configure,
    drain,
    insert,
    levels,
    queued,
)
from two_sessions import AT_ONCE, await_state, deadlocks, desyncs, hold, let_writes_wait, meanwhile, session


def write_both_sides_at_once(database, db) -> None:
    """Every level of either side, twenty times; then a drain."""

    def write(table: str) -> None:
        writer = session(database, autocommit=True)
        try:
            for turn in range(20):
                writer.execute(f"update {table} set current_level = %s", [1 + (turn + (table == LICENSE)) % 8])
        finally:
            writer.close()

    with ThreadPoolExecutor(2) as executor:
        for written in [executor.submit(write, table) for table in (PROGRESS, LICENSE)]:
            written.result(timeout=PATIENCE)
    drain(db)


def test_bulk_writes_of_both_sides_at_once_neither_fail_nor_deadlock(database, db):
    add_pairs(db, 500, level=1)
    write_both_sides_at_once(database, db)
    assert deadlocks(db) == 0
    assert desyncs(db) == []


def test_bulk_writes_of_both_sides_in_opposite_order_neither_fail_nor_deadlock(database, db):
    add_pairs(db, 500, level=1)
    db.execute("create table backwards as select license.* from user_licenses as license order by user_id desc")
    db.execute("alter table user_licenses disable trigger user; delete from user_licenses")
    db.execute("vacuum user_licenses")
    db.execute("insert into user_licenses select * from backwards")
    db.execute("alter table user_licenses enable trigger user")
    write_both_sides_at_once(database, db)
    assert deadlocks(db) == 0
    assert desyncs(db) == []


@BOTH
def test_a_held_row_of_a_set_costs_the_others_no_subtransaction(database, db, table):
    configure(db, inline_limit=0)
    for user in range(1, 41):
        add_pair(db, user, level=2)
    holder = hold(database, OTHER[table], 20)
    writer = session(database)
    writer.execute(f"update {table} set current_level = 5")
    writer.execute("set constraints all immediate")
    used = internals.subtransactions_used(writer)
    writer.commit()
    holder.rollback()
    assert queued(db) != []
    assert used <= 5  # a set that failed would be done again in parts
    drain(db)
    assert {levels(db, user) for user in range(1, 41)} == {(5, 5)}


@BOTH
@pytest.mark.parametrize("lock_wait", ["0", "5 ms"])
def test_a_set_waits_for_no_row_that_somebody_is_about_to_insert(database, db, users, table, lock_wait):
    users(1)
    configure(db, inline_limit=0, lock_wait=lock_wait)
    other = session(database)
    insert(other, OTHER[table], 1, 2)
    with meanwhile(insert, session(database, autocommit=True), table, 1, 5) as done:
        wait([done], timeout=AT_ONCE)
        has_waited = not done.done()
        other.commit()
    assert not has_waited
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_a_set_waits_half_of_lock_wait_for_a_row_that_somebody_is_about_to_insert(database, db, users, table):
    users(1)
    let_writes_wait(db)
    configure(db, inline_limit=0)
    other = session(database)
    insert(other, OTHER[table], 1, 2)
    writer = session(database, autocommit=True)
    with meanwhile(insert, writer, table, 1, 5):
        await_state(db, writer)
        time.sleep(0.05)  # longer than the shortest lock_timeout, shorter than half of lock_wait
        other.rollback()
    assert (levels(db, 1), queued(db)) == ((5, 5), [])
