"""The reconcile finds every desync, repairs what it may, and logs one row that is true."""

from __future__ import annotations

import json

import psycopg
import pytest

from academy import (
    ACROSS,
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
    drop_user_trigger,
    last_run,
    levels,
    queued,
    reconcile,
    set_level,
    user_trigger,
)
from servers import VERSIONS

EXPECTED = {
    "progress_wins": [(6, 6), (3, 3)],
    "license_wins": [(3, 3), (7, 7)],
    "highest_wins": [(6, 6), (7, 7)],
}

pytestmark = pytest.mark.servers(*VERSIONS)


@pytest.mark.parametrize("policy", EXPECTED)
def test_every_desync_is_repaired_after_the_policy_and_missing_rows_come_from_the_other_side(broken, policy):
    configure(broken, conflict_policy=policy)
    run = reconcile(broken)
    assert [levels(broken, user) for user in (1, 2)] == EXPECTED[policy]
    assert [levels(broken, user) for user in (3, 4, 5, 6)] == [(3, 3)] * 4
    assert (run["status"], run["issues_found"], run["synced_count"], run["failed_count"]) == ("success", 4, 4, 0)
    assert run["results"]["issues"] == {"level_mismatch": 2, "missing_license": 1, "missing_progress": 1}
    assert run["results"]["outcomes"] == {"repaired": 4}
    assert sum(run["results"]["actions"].values()) == 4
    assert len(run["results"]["sample"]) == 4
    touched = broken.execute(
        "select user_id, source, run_id from level_sync.sync_events where source = 'reconcile' order by 1"
    ).fetchall()
    assert touched == [(user, "reconcile", run["run_id"]) for user in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("earned_at", "issued_at", "winner"),
    [
        ("2026-01-01", "2026-01-02", LICENSE),
        ("2026-01-02", "2026-01-01", PROGRESS),
        ("2026-01-01", "2026-01-01", PROGRESS),
        (None, "2026-01-01", PROGRESS),
        ("2026-01-01", None, PROGRESS),
        (None, None, PROGRESS),
    ],
)
def test_latest_wins_and_a_tie_or_null_falls_back_to_progress(db, earned_at, issued_at, winner):
    configure(db, conflict_policy="latest_wins")
    add_pair(db, 1, level=3)
    with bypass(db):
        set_level(db, PROGRESS, 1, 2)
        db.execute("update specialization_progress set last_activity = %s", [earned_at])
        db.execute("update user_licenses set last_advanced_at = %s", [issued_at])
    reconcile(db)
    assert levels(db, 1) == ((2, 2) if winner == PROGRESS else (3, 3))


@pytest.mark.leftovers
def test_report_only_repairs_no_level_but_creates_what_is_missing(broken):
    configure(broken, conflict_policy="report_only")
    run = reconcile(broken)
    assert [levels(broken, user) for user in (1, 2, 3, 4)] == [(6, 3), (3, 7), (3, 3), (3, 3)]
    assert run["results"]["actions"] == {"report_only": 2, "create_license": 1, "create_progress": 1}
    assert (run["status"], run["synced_count"]) == ("success", 2)


@BOTH
@pytest.mark.parametrize("policy", ["progress_wins", "license_wins", "report_only"])
def test_direction_given_overrides_the_policy(broken, table, policy):
    configure(broken, conflict_policy=policy)
    run = reconcile(broken, direction=ACROSS[table])
    assert [levels(broken, user) for user in (1, 2)] == ([(6, 6), (3, 3)] if table == PROGRESS else [(3, 3), (7, 7)])
    assert run["direction"] == ACROSS[table]


def test_second_run_repairs_nothing(broken):
    reconcile(broken)
    run = reconcile(broken)
    assert (run["status"], run["issues_found"], run["synced_count"]) == ("success", 0, 0)


def test_row_of_the_log_tells_who_when_and_how_long(database, broken):
    run = reconcile(broken)
    assert (run["started_by"], run["dry_run"], run["direction"], run["error"]) == ("manual", False, None, None)
    assert run["backend_pid"] == broken.info.backend_pid
    assert float(run["duration_seconds"]) == pytest.approx(
        (run["job_end"] - run["job_start"]).total_seconds(), abs=1e-5
    )
    assert reconcile(broken, started_by="cron")["started_by"] == "cron"


def test_end_of_a_run_is_notified_as_json(database, broken):
    listener = database.connect()
    listener.execute("listen level_sync")
    run = reconcile(broken)
    (note,) = listener.notifies(timeout=5, stop_after=1)
    told = json.loads(note.payload)
    assert (told["run_id"], told["status"], told["issues_found"]) == (run["run_id"], "success", 4)
    assert told["results"]["issues"] == run["results"]["issues"]


@pytest.mark.leftovers
def test_run_that_fails_says_why_and_how_long_it_took_and_leaves_no_lock(database, broken):
    user_trigger(broken, "before insert on level_sync.sync_plan", "raise 'no room: %', repeat('x', 20000)")
    listener = database.connect()
    listener.execute("listen level_sync")
    run = reconcile(broken)
    assert run["status"] == "failed"
    assert run["error"].startswith("no room: xxx")
    assert run["error"].endswith("(SQLSTATE P0001)")
    assert float(run["duration_seconds"]) > 0
    (note,) = listener.notifies(timeout=5, stop_after=1)  # shortened: a payload has a limit
    assert json.loads(note.payload)["status"] == "failed"
    assert broken.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)


@pytest.mark.leftovers
def test_run_whose_end_cannot_be_logged_raises_leaves_no_lock_and_is_marked_by_the_next(broken):
    user_trigger(
        broken,
        "before update on level_sync.sync_log",
        "raise 'the log is full'",
        condition="when (new.status = 'success')",
    )
    with pytest.raises(psycopg.errors.RaiseException, match="the log is full"):
        broken.execute("call level_sync.reconcile()")
    assert levels(broken, 1) == (6, 6)
    assert broken.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)
    assert last_run(broken)["status"] == "running"
    drop_user_trigger(broken)
    second = reconcile(broken)
    assert second["status"] == "success"
    first = broken.execute("select status, error from level_sync.sync_log order by run_id limit 1").fetchone()
    assert first == ("aborted", "its session ended before the run did")


# old data


@pytest.fixture
def old_data(db):
    """Users 1 to 3 with progress at NULL, above max_levels and below 1, from the time before any check."""
    db.execute("alter table specialization_progress drop constraint current_level_is_at_least_1")
    db.execute("alter table specialization_progress alter column current_level drop not null")
    db.execute("alter table user_licenses alter column current_level drop not null")
    add_pairs(db, 4)
    with bypass(db):
        for user, level in ((1, None), (2, 12), (3, 0), (4, 5)):
            set_level(db, PROGRESS, user, level)
    return db


@pytest.mark.leftovers
def test_old_levels_that_are_out_of_range_are_queued_with_their_reason_never_cut(old_data):
    run = reconcile(old_data)
    assert (run["status"], run["issues_found"], run["synced_count"], run["failed_count"]) == ("partial", 4, 1, 3)
    assert [levels(old_data, user) for user in (1, 2, 3, 4)] == [(None, 3), (12, 3), (0, 3), (5, 5)]
    reasons = old_data.execute(
        "select user_id, sqlstate, message from level_sync.sync_queue order by user_id"
    ).fetchall()
    assert reasons == [
        (1, "23514", "the progress level of user 1 in PLAYER is NULL; correct it first"),
        (2, "23514", "level 12 of user 2 in PLAYER is out of range: allowed is 1 to 8; correct it first"),
        (3, "23514", "level 0 of user 3 in PLAYER is out of range: allowed is 1 to 8; correct it first"),
    ]


def test_old_levels_out_of_range_are_repaired_from_the_side_that_is_right(old_data):
    reconcile(old_data, direction="license_to_progress")
    assert [levels(old_data, user) for user in (1, 2, 3, 4)] == [(3, 3)] * 4


# the queue


def queue_against_the_policy(db) -> None:
    """An admin's license write that progress refused: by progress_wins a reconcile would undo it."""
    add_pair(db, 1, level=3)
    user_trigger(db, "before update on specialization_progress", "raise 'closed'")
    set_level(db, LICENSE, 1, 6)
    drop_user_trigger(db)


def test_queue_is_drained_first_because_it_knows_which_side_was_written(db):
    queue_against_the_policy(db)
    run = reconcile(db)
    assert levels(db, 1) == (6, 6)
    assert run["issues_found"] == 0


@pytest.mark.parametrize("dead", [False, True], ids=["waiting", "dead"])
@pytest.mark.leftovers
def test_pair_that_waits_in_the_queue_is_not_repaired_against_its_entry(db, dead):
    queue_against_the_policy(db)
    db.execute(
        "update level_sync.sync_queue set next_attempt_at = 'infinity', dead_at = case when %s then now() end", [dead]
    )
    run = reconcile(db)
    assert levels(db, 1) == (3, 6)
    assert run["results"]["outcomes"] == {"queued": 1}
    assert len(queued(db)) == 1
    run = reconcile(db, direction="progress_to_license")  # a person who names the direction decides
    assert levels(db, 1) == (3, 3)
    assert run["results"]["outcomes"] == {"repaired": 1}
    assert queued(db) == []


@BOTH
def test_pair_that_fails_is_queued_with_its_error_and_the_rest_of_its_batch_is_repaired(db, table):
    add_pairs(db, 50)
    with bypass(db):
        db.execute("update user_licenses set max_achieved_level = 8")
        db.execute(f"update {table} set current_level = 5")
    column = KEY[OTHER[table]][0]
    user_trigger(db, f"before update on {OTHER[table]}", f"if new.{column} = 30 then raise 'not this one'; end if")
    run = reconcile(db, direction=ACROSS[table])
    assert (run["status"], run["synced_count"], run["failed_count"]) == ("partial", 49, 1)
    assert queued(db) == [(30, "PLAYER", SIDE[table], "level_changed", "P0001")]
    assert db.execute("select message, attempts from level_sync.sync_queue").fetchone() == ("not this one", 1)
    drop_user_trigger(db)
    assert reconcile(db, direction=ACROSS[table])["status"] == "success"
    assert levels(db, 30) == (5, 5)


@pytest.mark.leftovers
def test_pair_that_always_fails_ends_dead_after_three_attempts_and_turns_health_red(db):
    add_pair(db, 1, level=3)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    user_trigger(db, "before update on user_licenses", "raise 'never'")
    assert reconcile(db)["status"] == "partial"
    for attempts, dead in ((2, False), (3, True)):
        db.execute("update level_sync.sync_queue set next_attempt_at = '-infinity'")
        db.execute("call level_sync.maintain()")
        assert db.execute("select attempts, dead_at is not null from level_sync.sync_queue").fetchone() == (
            attempts,
            dead,
        )
    red = db.execute("select ok, detail from level_sync.health where name = 'queue_dead'").fetchone()
    assert red == (False, "1 dead, first user 1 in PLAYER: never")


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03"])
@pytest.mark.parametrize("failures", [2, 3])
@pytest.mark.leftovers
def test_batch_that_fails_for_a_moment_is_tried_three_times(db, state, failures):
    """Counted in a sequence, because what a failed try writes is rolled back."""
    add_pairs(db, 5)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    db.execute("create sequence tries")
    user_trigger(
        db,
        "before insert on level_sync.sync_events",
        f"if nextval('tries') <= {failures} then raise sqlstate '{state}' using message = 'busy'; end if",
        condition="when (new.source = 'reconcile')",
    )
    run = reconcile(db)
    if state == "40001":
        assert run["status"] == ("success" if failures == 2 else "failed")
        assert run["error"] == (None if failures == 2 else "busy (SQLSTATE 40001)")
    else:  # told apart pair by pair within the batch
        assert run["status"] in ("success", "partial")
        assert run["synced_count"] + run["failed_count"] == 5


@pytest.mark.leftovers
def test_run_that_cannot_even_begin_raises(broken):
    user_trigger(broken, "before insert on level_sync.sync_log", "raise 'the log takes no more'")
    with pytest.raises(psycopg.errors.RaiseException, match="the log takes no more"):
        broken.execute("call level_sync.reconcile()")
    assert broken.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)


@pytest.mark.leftovers
def test_a_chunk_that_fails_only_as_a_set_skips_no_pair(db):
    add_pairs(db, 1600)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    db.execute("""
        create function refuse_sets() returns trigger language plpgsql as $$
        begin
          if (select count(*) from written) > 1 then raise 'one at a time'; end if;
          return null;
        end $$""")
    db.execute(
        "create trigger refuse_sets after update on user_licenses referencing new table as written"
        " for each statement execute function refuse_sets()"
    )
    configure(db, batch_size=1600)
    db.execute("call level_sync.reconcile()")
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 1600)
    db.execute("drop trigger refuse_sets on user_licenses")


@pytest.mark.leftovers
def test_a_row_without_a_pair_stops_no_run(db):
    add_pairs(db, 2)
    db.execute("alter table user_licenses drop constraint user_licenses_pkey")
    db.execute("alter table user_licenses alter column specialization_type drop not null")
    with bypass(db):
        db.execute("insert into user_licenses (user_id, specialization_type, current_level) values (1, null, 1)")
        set_level(db, PROGRESS, 2, 6)
    db.execute("call level_sync.reconcile()")
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 1)
    assert levels(db, 2) == (6, 6)
    ok, detail = db.execute("select ok, detail from level_sync.health where name = 'orphans'").fetchone()
    assert (ok, "user_licenses" in detail) == (False, True)


@pytest.mark.leftovers
def test_the_lowest_integer_as_level_is_a_desync_like_any_other(db):
    add_pairs(db, 1)
    db.execute("alter table specialization_progress drop constraint current_level_is_at_least_1")
    with bypass(db):
        set_level(db, PROGRESS, 1, -(2**31))
    assert db.execute("select difference from level_sync.desync_issues").fetchone() == (2**31 + 3,)
    db.execute("call level_sync.reconcile(direction => 'license_to_progress')")
    assert levels(db, 1) == (3, 3)


def test_highest_wins_takes_a_level_for_higher_than_none(db):
    configure(db, conflict_policy="highest_wins")
    add_pairs(db, 1)
    db.execute("alter table specialization_progress alter column current_level drop not null")
    with bypass(db):
        db.execute("update specialization_progress set current_level = null")
    db.execute("call level_sync.reconcile()")
    assert levels(db, 1) == (3, 3)
