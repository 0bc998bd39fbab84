"""One run at a time; a run that dies leaves what is right, and the next one says so and finishes the work."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

import internals
from academy import (
    PATIENCE,
    add_pairs,
    bypass,
    call,
    configure,
    drain,
    drop_user_trigger,
    last_run,
    levels,
    user_trigger,
    wait_until,
)
from tree import LEVEL_SYNC


def wait_for(db, condition: str) -> None:
    """Until a condition on the database holds."""
    wait_until(lambda: call(db, f"select {condition}"), lambda: f"this did not come about: {condition}")


AT_USER_35 = """exists (
  select from pg_locks
   where locktype = 'advisory' and not granted
     and database = (select oid from pg_database where datname = current_database()))"""
# The run itself waits 100 ms at most; this trigger waits until the test lets it go on.
WAIT_AT_USER_35 = """
if new.user_id = 35 then
  perform set_config('lock_timeout', '0', true), pg_advisory_xact_lock(35);
end if"""


@pytest.fixture
def broken(db):
    """60 desyncs in batches of 10; the repair of user 35 waits for a lock that the test holds."""
    configure(db, batch_size=10)
    add_pairs(db, 60)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    user_trigger(db, "before update on user_licenses", WAIT_AT_USER_35)
    return db


@contextmanager
def stopped_at_user_35(database, broken) -> Iterator[psycopg.Connection]:
    """A run in another session that stands in the middle of its fourth batch."""
    gate = database.connect(autocommit=False)
    gate.execute("select pg_advisory_xact_lock(35)")
    runner = database.connect()
    raised: list[psycopg.Error] = []

    def run() -> None:
        try:
            runner.execute("call level_sync.reconcile()")
        except psycopg.Error as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(broken, AT_USER_35)
        yield runner
    finally:
        gate.rollback()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_second_run_at_once_is_skipped_and_repairs_nothing(database, broken):
    with stopped_at_user_35(database, broken):
        second = database.connect()
        second.execute("call level_sync.reconcile(started_by => 'cron')")
        row = last_run(second)
        assert (row["status"], row["started_by"], row["error"]) == ("skipped", "cron", "another run holds the lock")
        assert row["duration_seconds"] is not None
        assert second.execute("select ok, detail from level_sync.health where name = 'running'").fetchone() == (
            True,
            "a run is at work",
        )
    assert broken.execute("select run_id, status from level_sync.sync_log order by 1").fetchall() == [
        (1, "success"),
        (2, "skipped"),
    ]
    assert levels(broken, 60) == (5, 5)


def test_run_waits_for_its_row_of_the_log_with_no_pair_locked(database, broken):
    user_trigger(broken, "before insert on level_sync.sync_plan", WAIT_AT_USER_35, name="while_planning")
    gate, reader, runner = (database.connect(autocommit=each) for each in (False, False, True))
    gate.execute("select pg_advisory_xact_lock(35)")
    with ThreadPoolExecutor() as pool:
        run_ends = pool.submit(runner.execute, "call level_sync.reconcile()")
        try:
            wait_for(broken, AT_USER_35)
            reader.execute("select from level_sync.sync_log for update")
            gate.rollback()
            waits = f"(select wait_event_type = 'Lock' from pg_stat_activity where pid = {runner.info.backend_pid})"
            wait_for(broken, f"{waits} and not {AT_USER_35}")
            time.sleep(0.5)  # longer than a batch waits for a pair
            assert broken.execute(f"select {waits}").fetchone() == (True,)
            with broken.transaction():
                broken.execute("select from user_licenses for update nowait")
                broken.execute("select from specialization_progress for update nowait")
        finally:
            gate.rollback()
            reader.rollback()
        run_ends.result(PATIENCE)
    run = last_run(broken)
    assert (run["status"], run["synced_count"]) == ("success", 60)


def test_run_is_seen_at_work_from_its_first_batch_on(database, broken):
    """Which drains the queue, and here stands still at user 35."""
    broken.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " values (35, 'PLAYER', 'progress', 'level_changed', 'P0001', 'planted')"
    )
    with stopped_at_user_35(database, broken):
        assert broken.execute("select status from level_sync.sync_log").fetchall() == [("running",)]
    assert last_run(broken)["synced_count"] == 59


def test_run_whose_session_is_killed_is_marked_aborted_by_the_next_which_finishes(database, broken):
    with stopped_at_user_35(database, broken) as runner:
        assert broken.execute("select pg_terminate_backend(%s)", [runner.info.backend_pid]).fetchone() == (True,)
        wait_for(broken, f"not exists (select from pg_stat_activity where pid = {runner.info.backend_pid})")
    died = last_run(broken)
    repaired = {"repaired": {"update_license": 10}}  # of 30, the plan keeps 20 as the sample
    assert (died["status"], died["synced_count"], died["results"]) == ("running", 30, repaired)
    assert broken.execute("select ok from level_sync.health where name = 'running'").fetchone() == (False,)
    assert broken.execute("select count(*) from user_licenses where current_level = 5").fetchone() == (30,)
    broken.execute("call level_sync.reconcile()")
    rows = broken.execute("select status, error, synced_count from level_sync.sync_log order by run_id").fetchall()
    assert rows == [("aborted", "its session ended before the run did", 30), ("success", None, 30)]


def test_run_cancelled_says_aborted_at_once_and_raises(database, broken):
    with stopped_at_user_35(database, broken) as runner:
        runner.cancel()
        wait_for(broken, "exists (select from level_sync.sync_log where status = 'aborted')")
    row = last_run(broken)
    assert (row["status"], row["synced_count"]) == ("aborted", 30)
    assert "canceling statement due to user request (SQLSTATE 57014)" in row["error"]
    broken.execute("call level_sync.reconcile()")


@pytest.mark.leftovers
def test_cancel_while_a_run_pauses_before_it_tries_again_ends_it_as_any_other(database, broken):
    holder, runner = database.connect(autocommit=False), database.connect()
    holder.execute("lock table level_sync.sync_queue in access exclusive mode")  # waited for briefly, three times
    pauses = f"select from pg_stat_activity where pid = {runner.info.backend_pid} and wait_event = 'PgSleep'"
    with ThreadPoolExecutor() as executor:

        def is_cancelled() -> bool:
            run = executor.submit(runner.execute, "call level_sync.reconcile()")
            wait_until(lambda: run.done() or broken.execute(pauses).fetchone() is not None)
            runner.cancel_safe()
            return isinstance(run.exception(PATIENCE), psycopg.errors.QueryCanceled)

        wait_until(is_cancelled)  # a pause is short: it may be over before it is seen
    holder.rollback()
    assert last_run(broken)["status"] == "aborted"


def test_run_that_is_between_two_transactions_is_at_work_all_the_same(broken):
    """It lets go of its lock there. The one that comes sees its row, and then its lock when it looks the third time."""
    broken.execute("insert into level_sync.sync_log (dry_run, started_by) values (false, 'cron')")
    internals.run_is_seen_at_the_third_look(broken)
    broken.execute("call level_sync.reconcile()")
    statuses = "select status from level_sync.sync_log order by run_id"
    assert broken.execute(statuses).fetchall() == [("running",), ("skipped",)]
    broken.execute("call level_sync.reconcile()")  # and now never again
    assert broken.execute(statuses).fetchall() == [("aborted",), ("skipped",), ("success",)]


@pytest.mark.leftovers
def test_run_that_has_lost_its_lock_to_another_ends(database, broken):
    wait_in_log = "perform set_config('lock_timeout', '0', true), pg_advisory_xact_lock(36)"
    user_trigger(broken, "after insert on level_sync.sync_log", wait_in_log, name="of_the_log")
    gate, runner, other = (database.connect() for _ in range(3))
    gate.execute("select pg_advisory_lock(36)")
    waiting = "(select count(*) from pg_locks where locktype = 'advisory' and not granted) = {}"
    with ThreadPoolExecutor() as executor:
        run = executor.submit(runner.execute, "call level_sync.reconcile()")
        wait_for(broken, waiting.format(1))
        taken = executor.submit(other.execute, internals.HOLD_RUN_LOCK)
        wait_for(broken, waiting.format(2))
        gate.execute("select pg_advisory_unlock(36)")
        taken.result(PATIENCE)
        run.result(PATIENCE)
    row = last_run(broken)
    assert (row["status"], row["error"]) == ("failed", "another run has begun (SQLSTATE 55P03)")
    assert levels(broken, 60) == (5, 3)


@pytest.mark.leftovers
def test_plan_applied_a_second_time_counts_only_what_was_left_of_it(database, broken):
    broken.execute("call level_sync.reconcile(dry_run => true)")
    drop_user_trigger(broken)
    cancelled = "if new.user_id = 35 then raise query_canceled; end if"
    user_trigger(broken, "before update on user_licenses", cancelled)
    with pytest.raises(psycopg.errors.QueryCanceled):
        broken.execute("call level_sync.reconcile(plan => 1)")
    drop_user_trigger(broken)
    broken.execute("call level_sync.reconcile(plan => 1)")
    counts = "select issues_found, synced_count, status from level_sync.sync_log where run_id > 1 order by run_id"
    assert broken.execute(counts).fetchall() == [(60, 30, "aborted"), (30, 30, "success")]
    assert broken.execute("select level_sync.undo(3) ->> 'undone'").fetchone() == ("30",)


def test_cancel_that_comes_as_two_signals_is_one_cancel(database, broken):
    """As PostgreSQL before 17 sends it; here the second one comes at several moments after the first."""
    twice = "select pg_cancel_backend(%(pid)s), pg_sleep(%(pause)s), pg_cancel_backend(%(pid)s)"
    # Seconds. Two signals sent at once are some milliseconds apart where the sender loses its processor between them.
    pauses = [step / 20_000 for step in range(10)] + [step / 1000 for step in range(10, 20)]
    for number, pause in enumerate(pauses, 1):
        with stopped_at_user_35(database, broken) as runner:
            broken.execute(twice, {"pid": runner.info.backend_pid, "pause": pause})
            wait_for(broken, f"(select count(*) = {number} from level_sync.sync_log where status = 'aborted')")
    assert broken.execute("select sum(synced_count) from level_sync.sync_log").fetchone() == (30,)
    broken.execute("call level_sync.reconcile()")


def test_ctrl_c_leaves_a_consistent_database_and_an_aborted_row(database, broken):
    gate = database.connect(autocommit=False)
    gate.execute("select pg_advisory_xact_lock(35)")
    process = subprocess.Popen(
        [LEVEL_SYNC, "reconcile", "--dsn", database.dsn], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        wait_for(broken, AT_USER_35)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Interrupted: what was committed stands" in said
    assert last_run(broken)["status"] == "aborted"
    assert broken.execute("select count(*) from user_licenses where current_level = 5").fetchone() == (30,)
    gate.rollback()
    broken.execute("call level_sync.reconcile()")
    assert last_run(broken)["synced_count"] == 30


def test_pair_that_somebody_holds_is_left_alone_counted_and_repaired_by_the_next(database, db):
    add_pairs(db, 3)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    holder = database.connect(autocommit=False)
    holder.execute("select from user_licenses where user_id = 2 for update")
    db.execute("call level_sync.reconcile()")
    assert last_run(db)["results"]["outcomes"] == {"busy": 1, "repaired": 2}
    holder.rollback()
    db.execute("call level_sync.reconcile()")
    assert levels(db, 2) == (5, 5)


def test_pair_that_came_right_between_plan_and_repair_is_not_touched(database, broken):
    """While the run stands at user 35, user 50 is written: the plan is old then, and the write stays."""
    with stopped_at_user_35(database, broken):
        broken.execute("update user_licenses set current_level = 7 where user_id = 50")
    assert levels(broken, 50) == (7, 7)
    assert broken.execute("select results -> 'outcomes' from level_sync.sync_log").fetchone() == (
        {"changed": 1, "repaired": 59},
    )
    assert broken.execute(
        "select count(*) from level_sync.sync_events where user_id = 50 and source = 'reconcile'"
    ).fetchone() == (0,)
    drop_user_trigger(broken)


def test_drain_ends_while_another_session_holds_one_of_the_entries_of_a_pair(database, db):
    add_pairs(db, 1)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    for _ in range(2):
        db.execute(
            "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
            " values (1, 'PLAYER', 'progress', 'level_changed', '55P03', 'planted')"
        )
    holder = database.connect(autocommit=False)
    holder.execute("select from level_sync.sync_queue order by queue_id limit 1 for update")
    db.execute("call level_sync.drain_queue()", prepare=False)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (5, 5)
