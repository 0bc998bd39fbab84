"""The maintenance drains what is due, catches up a missed run, and purges. Times are moved, not waited for."""

from __future__ import annotations

from datetime import datetime

import psycopg
import pytest

import internals
from academy import (
    PROGRESS,
    add_pair,
    add_pairs,
    bypass,
    configure,
    drop_user_trigger,
    last_run,
    levels,
    set_level,
    user_trigger,
)


def maintain(db) -> None:
    db.execute("call level_sync.maintain()")


def runs(db) -> list[tuple[str, str]]:
    return db.execute("select started_by, status from level_sync.sync_log order by run_id").fetchall()


def age_runs(db, interval: str) -> None:
    """Moves every run into the past."""
    db.execute(
        "update level_sync.sync_log set job_start = job_start - %s::interval, job_end = job_end - %s::interval",
        [interval, interval],
    )


def test_first_maintenance_runs_what_never_ran(db):
    add_pair(db, 1, level=3)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    maintain(db)
    assert runs(db) == [("catch_up", "success")]
    assert levels(db, 1) == (5, 5)
    maintain(db)
    assert len(runs(db)) == 1


def test_slot_that_was_missed_is_caught_up_once(db):
    db.execute("call level_sync.reconcile()")
    age_runs(db, "7 hours")  # every 6 hours: a slot lies between
    assert db.execute("select ok from level_sync.health where name = 'last_success'").fetchone() == (False,)
    maintain(db)
    assert runs(db) == [("manual", "success"), ("catch_up", "success")]
    maintain(db)
    assert len(runs(db)) == 2
    assert db.execute("select ok from level_sync.health where name = 'last_success'").fetchone() == (True,)


@pytest.mark.parametrize(
    ("schedule", "last_run_at", "now", "missed"),
    [
        ("0 */6 * * *", "05:59", "06:04:59", False),  # the run of 06:00 is not yet late
        ("0 */6 * * *", "05:59", "12:04:59", True),
        ("0 */6 * * *", "06:00:01", "12:04:59", False),
        ("0 */6 * * *", "06:00:01", "12:05:01", True),
        ("0 */6 * * *", "12:00:02", "17:59", False),
        ("30 2 * * *", "02:30:01", "02:34", False),
        ("* * * * *", "11:58", "12:05", True),
        ("15,45 9-17 * * mon-fri", "17:45:30", "23:00", False),
    ],
)
def test_run_is_missed_when_its_slot_and_the_grace_are_over(db, schedule, last_run_at, now, missed):
    configure(db, schedule=schedule)
    day = "2026-11-23"  # a Monday
    db.execute(
        "insert into level_sync.sync_log (status, job_start, job_end) values ('success', %s, %s)",
        [f"{day} {last_run_at}Z", f"{day} {last_run_at}Z"],
    )
    assert internals.is_run_missed(db, f"{day} {now}Z") is missed


@pytest.mark.parametrize(
    ("expression", "before", "slot"),
    [
        ("0 */6 * * *", "2026-11-23 13:00", "2026-11-23 12:00"),
        ("0 */6 * * *", "2026-11-23 12:00", "2026-11-23 12:00"),
        ("*/15 * * * *", "2026-11-23 00:14", "2026-11-23 00:00"),
        ("5 0 1 * *", "2026-11-23 12:00", "2026-11-01 00:05"),
        ("0 0 29 2 *", "2026-11-23 12:00", "2024-02-29 00:00"),
        ("0 9 * * mon", "2026-11-22 12:00", "2026-11-16 09:00"),
        ("0 9 * * 7", "2026-11-23 12:00", "2026-11-22 09:00"),
        ("0 9 13 * fri", "2026-11-15 12:00", "2026-11-13 09:00"),
        ("0 0 * jan *", "2026-11-23 12:00", "2026-01-31 00:00"),
        ("10-20/5,50 8 * * *", "2026-11-23 08:30", "2026-11-23 08:20"),
    ],
)
def test_last_slot_of_a_schedule(db, expression, before, slot):
    assert internals.last_slot(db, expression, before + "Z") == datetime.fromisoformat(slot + "+00:00")


def test_run_that_failed_is_tried_again_after_the_grace_not_every_minute(db):
    add_pair(db, 1, level=3)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    user_trigger(db, "before insert on level_sync.sync_plan", "raise 'no'")
    maintain(db)
    maintain(db)
    assert runs(db) == [("catch_up", "failed")]
    age_runs(db, "301 seconds")
    drop_user_trigger(db)
    maintain(db)
    assert runs(db)[-1] == ("catch_up", "success")


def test_run_left_running_by_a_dead_session_is_caught_up(db):
    db.execute("insert into level_sync.sync_log default values")
    maintain(db)
    assert runs(db) == [("manual", "aborted"), ("catch_up", "success")]


def test_due_entries_are_drained_and_others_wait(db):
    db.execute("call level_sync.reconcile()")
    add_pairs(db, 2)
    user_trigger(db, "before update on user_licenses", "raise 'closed'")
    db.execute("update specialization_progress set current_level = 5")
    drop_user_trigger(db)
    db.execute("update level_sync.sync_queue set next_attempt_at = 'infinity' where user_id = 2")
    maintain(db)
    assert [levels(db, user) for user in (1, 2)] == [(5, 5), (5, 3)]
    assert db.execute("select level_sync.requeue(2, 'PLAYER')").fetchone() == (1,)
    maintain(db)
    assert levels(db, 2) == (5, 5)


def test_requeue_takes_one_pair_one_user_or_all(db):
    for user in (1, 2):
        for specialization in ("PLAYER", "COACH"):
            add_pair(db, user, specialization, level=2)
            db.execute(
                "insert into level_sync.sync_queue"
                " (user_id, specialization, side, change, sqlstate, message, attempts, dead_at)"
                " values (%s, %s, 'progress', 'level_changed', 'P0001', 'no', 3, now())",
                [user, specialization],
            )
    assert db.execute("select level_sync.requeue(1, 'COACH')").fetchone() == (1,)
    assert db.execute("select level_sync.requeue(1)").fetchone() == (2,)
    assert db.execute("select level_sync.requeue()").fetchone() == (4,)
    assert db.execute(
        "select count(*) from level_sync.sync_queue where dead_at is not null or attempts > 0"
    ).fetchone() == (0,)
    maintain(db)


def test_what_is_past_its_retention_goes_in_small_batches_and_the_rest_stays(db):
    configure(db, batch_size=10, log_retention="30 days", event_retention="100 days")
    add_pairs(db, 35)
    db.execute("call level_sync.reconcile()")
    db.execute(
        "insert into level_sync.sync_log (status, job_start, job_end)"
        " select 'success', now() - '31 days'::interval, now() from generate_series(1, 35)"
    )
    db.execute(
        "insert into level_sync.sync_log (status, job_start, job_end)"
        " values ('success', now() - '29 days'::interval, now())"
    )
    db.execute(
        "insert into level_sync.sync_plan (run_id, user_id, specialization, issue_type, action)"
        " select 2, n, 'PLAYER', 'level_mismatch', 'update_license' from generate_series(1, 35) as n"
    )
    db.execute(
        "insert into level_sync.sync_events"
        " (occurred_at, user_id, specialization, direction, action, new_level, source)"
        " select now() - make_interval(days => 80 + n), 1, 'PLAYER', 'progress_to_license', 'created', 1, 'trigger'"
        " from generate_series(1, 40) as n"
    )
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, dead_at)"
        " select 900 + n, 'PLAYER', 'progress', 'level_changed', 'P0001', 'no', now() - make_interval(days => 20 + n)"
        " from generate_series(1, 20) as n"
    )
    assert internals.purge_batch(db) <= 10 * 5
    maintain(db)
    assert db.execute("select count(*) from level_sync.sync_log").fetchone() == (2,)
    assert db.execute("select count(*) from level_sync.sync_plan").fetchone() == (0,)
    assert db.execute("select count(*) from level_sync.sync_events").fetchone() == (35 + 19,)
    assert db.execute("select count(*) from level_sync.sync_queue").fetchone() == (9,)
    assert last_run(db)["status"] == "success"
    db.execute("delete from level_sync.sync_queue")


def test_events_cannot_be_changed_by_hand(db):
    add_pair(db, 1, level=3)
    for statement in ("update level_sync.sync_events set new_level = 8", "truncate level_sync.sync_events"):
        with pytest.raises(psycopg.errors.RestrictViolation, match="refused"):
            db.execute(statement)


@pytest.mark.parametrize("expression", ["* * * * sunday", "* * * mont *", "61 * * * *", "* * * janfeb *"])
def test_a_bad_cron_field_is_told_as_it_was_written(db, expression):
    field = next(field for field in expression.split() if field != "*")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"'{field}' is"):
        internals.last_slot(db, expression, "now")
