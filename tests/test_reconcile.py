"""The reconcile finds every desync, repairs what it may, and logs one row that is true."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

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
    drop_user_trigger,
    events,
    insert,
    last_run,
    levels,
    queued,
    set_level,
    user_trigger,
)

DIRECTION = {PROGRESS: "progress_to_license", LICENSE: "license_to_progress"}


def reconcile(db, **arguments):
    """Calls it with named arguments and returns the row of sync_log as a dict."""
    given = ", ".join(f"{name} => %s" for name in arguments)
    db.execute(f"call level_sync.reconcile({given})", list(arguments.values()))
    return last_run(db)


@pytest.fixture
def broken(db):
    """Users 1 to 6: progress ahead, license ahead, license missing, progress missing, and two that are right."""
    db.execute("alter table user_licenses alter column max_achieved_level set default 8")
    add_pairs(db, 6)
    with bypass(db):
        set_level(db, PROGRESS, 1, 6)
        db.execute("update user_licenses set max_achieved_level = 8")
        set_level(db, LICENSE, 2, 7)
        delete(db, LICENSE, 3)
        delete(db, PROGRESS, 4)
    return db


EXPECTED = {
    "progress_wins": [(6, 6), (3, 3)],
    "license_wins": [(3, 3), (7, 7)],
    "highest_wins": [(6, 6), (7, 7)],
}


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
    run = reconcile(broken, direction=DIRECTION[table])
    assert [levels(broken, user) for user in (1, 2)] == ([(6, 6), (3, 3)] if table == PROGRESS else [(3, 3), (7, 7)])
    assert run["direction"] == DIRECTION[table]


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


def test_sample_is_bounded_and_the_rows_themselves_stand_in_the_events(db):
    add_pairs(db, 300)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    run = reconcile(db)
    assert len(run["results"]["sample"]) == 20
    assert run["results"]["issues"] == {"level_mismatch": 300}
    assert db.execute("select count(*) from level_sync.sync_events where run_id = %s", [run["run_id"]]).fetchone() == (
        300,
    )
    assert db.execute("select count(*) from level_sync.sync_plan").fetchone() == (0,)


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
        (1, "23514", "progress level NULL is out of range: allowed is 1 to 8; correct it first"),
        (2, "23514", "progress level 12 is out of range: allowed is 1 to 8; correct it first"),
        (3, "23514", "progress level 0 is out of range: allowed is 1 to 8; correct it first"),
    ]


def test_old_levels_out_of_range_are_repaired_from_the_side_that_is_right(old_data):
    reconcile(old_data, direction="license_to_progress")
    assert [levels(old_data, user) for user in (1, 2, 3, 4)] == [(3, 3)] * 4


# the circuit breaker, dry runs and plans


def everything(db):
    return [db.execute(f"select * from {table} order by 1, 2").fetchall() for table in (PROGRESS, LICENSE)]


@pytest.mark.leftovers
def test_more_issues_than_repair_limit_are_left_until_somebody_approves(broken):
    configure(broken, repair_limit=3)
    before = everything(broken)
    run = reconcile(broken)
    assert (run["status"], run["issues_found"], run["synced_count"]) == ("needs_approval", 4, 0)
    assert everything(broken) == before
    assert reconcile(broken, plan=run["run_id"])["status"] == "needs_approval"
    assert everything(broken) == before
    assert reconcile(broken, plan=run["run_id"], approve=True)["status"] == "success"
    assert levels(broken, 1) == (6, 6)


def test_approve_repairs_more_than_repair_limit_at_once(broken):
    configure(broken, repair_limit=0)
    assert reconcile(broken, approve=True)["synced_count"] == 4


def test_limit_itself_is_still_repaired(broken):
    configure(broken, repair_limit=4)
    assert reconcile(broken)["status"] == "success"


def test_what_is_only_reported_needs_no_approval(broken):
    configure(broken, conflict_policy="report_only", repair_limit=2)
    assert reconcile(broken)["status"] == "success"
    configure(broken, conflict_policy="progress_wins")
    reconcile(broken)


def test_eleven_thousand_issues_are_left_alone_and_then_approved(db):
    add_pairs(db, 11_000)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    run = reconcile(db)
    assert (run["status"], run["issues_found"]) == ("needs_approval", 11_000)
    assert db.execute("select count(*) from level_sync.desync_issues").fetchone() == (11_000,)
    assert reconcile(db, plan=run["run_id"], approve=True)["synced_count"] == 11_000


def test_dry_run_changes_nothing_and_its_plan_does_exactly_that(broken):
    before = everything(broken)
    dry = reconcile(broken, dry_run=True)
    assert (dry["status"], dry["dry_run"], dry["issues_found"], dry["synced_count"]) == ("success", True, 4, 0)
    assert everything(broken) == before
    assert events(broken, 1) == [("progress_to_license", "created", None, 3, "trigger")]
    planned = broken.execute(
        "select user_id, issue_type, progress_level, license_level, action, outcome"
        " from level_sync.sync_plan order by 1"
    ).fetchall()
    assert planned == [
        (1, "level_mismatch", 6, 3, "update_license", "planned"),
        (2, "level_mismatch", 3, 7, "update_license", "planned"),
        (3, "missing_license", 3, None, "create_license", "planned"),
        (4, "missing_progress", None, 3, "create_progress", "planned"),
    ]
    applied = reconcile(broken, plan=dry["run_id"])
    assert (applied["status"], applied["synced_count"], applied["results"]["plan"]) == ("success", 4, dry["run_id"])


def test_plan_leaves_alone_what_changed_since_and_touches_nothing_else(broken):
    dry = reconcile(broken, dry_run=True)
    set_level(broken, PROGRESS, 1, 5)
    with bypass(broken):
        set_level(broken, LICENSE, 2, 8)
        set_level(broken, PROGRESS, 5, 8)
    applied = reconcile(broken, plan=dry["run_id"])
    assert applied["results"]["outcomes"] == {"changed": 2, "repaired": 2}
    assert [levels(broken, user) for user in (1, 2, 5)] == [(5, 5), (3, 8), (8, 3)]
    reconcile(broken)


def test_plan_keeps_the_direction_it_was_made_with(broken):
    dry = reconcile(broken, dry_run=True, direction="license_to_progress")
    reconcile(broken, plan=dry["run_id"])
    assert [levels(broken, user) for user in (1, 2)] == [(3, 3), (7, 7)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"plan": 99}, psycopg.errors.NoDataFound, "run 99 has no plan that could be applied"),
        ({"direction": "sideways"}, psycopg.errors.InvalidParameterValue, "unknown direction 'sideways'"),
        ({"started_by": "magic"}, psycopg.errors.InvalidParameterValue, "unknown started_by 'magic'"),
        ({"dry_run": None}, psycopg.errors.NullValueNotAllowed, "must not be NULL"),
        ({"approve": None}, psycopg.errors.NullValueNotAllowed, "must not be NULL"),
        ({"plan": 1, "dry_run": True}, psycopg.errors.InvalidParameterValue, "applied as it was recorded"),
        ({"plan": 1, "direction": "progress_to_license"}, psycopg.errors.InvalidParameterValue, "applied as it was"),
    ],
)
def test_senseless_arguments_are_refused_and_log_nothing(db, arguments, error, message):
    with pytest.raises(error, match=message):
        reconcile(db, **arguments)
    assert db.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)


def test_plan_is_applied_once(broken):
    dry = reconcile(broken, dry_run=True)
    reconcile(broken, plan=dry["run_id"])
    with pytest.raises(psycopg.errors.NoDataFound):
        reconcile(broken, plan=dry["run_id"])


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
    run = reconcile(db, direction=DIRECTION[table])
    assert (run["status"], run["synced_count"], run["failed_count"]) == ("partial", 49, 1)
    assert queued(db) == [(30, "PLAYER", SIDE[table], "level_changed", "P0001")]
    assert db.execute("select message, attempts from level_sync.sync_queue").fetchone() == ("not this one", 1)
    drop_user_trigger(db)
    assert reconcile(db, direction=DIRECTION[table])["status"] == "success"
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


# transactions


def test_inside_a_transaction_it_is_one_transaction(broken):
    broken.execute("begin")
    broken.execute("call level_sync.reconcile()")
    assert levels(broken, 1) == (6, 6)
    broken.execute("rollback")
    assert levels(broken, 1) == (6, 3)
    assert broken.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)
    assert broken.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)
    with broken.transaction():
        broken.execute("call level_sync.reconcile()")
    assert last_run(broken)["status"] == "success"


@pytest.mark.leftovers
@pytest.mark.parametrize("procedure", ["reconcile", "drain_queue", "purge", "maintain"])
@pytest.mark.parametrize(
    "statement",
    [
        "call level_sync.{}(); select 1 / 0",  # one string, one transaction
        "do $$ begin call level_sync.{}(); raise division_by_zero; exception when division_by_zero then raise; end $$",
        "select call_it('{}')",
    ],
)
def test_where_somebody_else_has_begun_the_transaction_it_is_part_of_it(broken, procedure, statement):
    """Nothing tells a procedure, least of all the time, when the transaction began with the same message."""
    broken.execute(
        "create function call_it(name text) returns void language plpgsql as $$ begin"
        "  execute format('call level_sync.%I()', name); perform 1 / 0; end $$"
    )
    with pytest.raises(psycopg.errors.DivisionByZero):
        broken.execute(statement.format(procedure))
    assert levels(broken, 1) == (6, 3)
    assert broken.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)
    assert broken.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)


@pytest.mark.parametrize("prepare", [False, True], ids=["parsed each time", "prepared"])
def test_arguments_bound_on_the_server_leave_it_free_to_commit(broken, prepare):
    configure(broken, batch_size=1)
    broken.execute("call level_sync.reconcile(direction => %s)", ["progress_to_license"], prepare=prepare)
    repaired = last_run(broken)["synced_count"]
    assert repaired > 1
    transactions = "select count(distinct transaction_id) from level_sync.sync_events where run_id is not null"
    assert broken.execute(transactions).fetchone() == (repaired,)


def test_batches_are_committed_one_by_one(database, db):
    """The fourth batch is cancelled; what three did stands, and the next run does the rest."""
    configure(db, batch_size=10)
    add_pairs(db, 60)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    user_trigger(
        db,
        "before update on user_licenses",
        "if new.user_id = 35 then raise sqlstate '57014' using message = 'cancel'; end if",
    )
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("call level_sync.reconcile()")
    run = last_run(db)
    assert (run["status"], run["issues_found"], run["synced_count"]) == ("aborted", 60, 30)
    assert run["results"]["outcomes"] == {"repaired": 30, "planned": 30}
    assert [seen["outcome"] for seen in run["results"]["sample"]] == ["repaired"] * 20
    assert db.execute("select count(*) from user_licenses where current_level = 5").fetchone() == (30,)
    drop_user_trigger(db)
    rest = reconcile(db, plan=run["run_id"])
    assert (rest["issues_found"], rest["synced_count"]) == (30, 30)
    assert [seen["user_id"] for seen in rest["results"]["sample"]] == list(range(31, 51))


@pytest.mark.leftovers
def test_counts_of_a_run_are_those_of_all_its_batches(db):
    configure(db, batch_size=7)
    add_pairs(db, 70)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5 where student_id % 2 = 0")
        db.execute("delete from specialization_progress where student_id in (11, 51)")
        db.execute("delete from user_licenses where user_id in (13, 33, 53)")
    user_trigger(db, "before update on user_licenses", "if new.user_id in (2, 50) then raise 'closed'; end if")
    run = reconcile(db)
    assert (run["status"], run["issues_found"], run["synced_count"], run["failed_count"]) == ("partial", 40, 38, 2)
    assert run["results"]["issues"] == {"level_mismatch": 35, "missing_license": 3, "missing_progress": 2}
    assert run["results"]["actions"] == {"update_license": 35, "create_license": 3, "create_progress": 2}
    assert run["results"]["repairs"] == {"update_license": 33, "create_license": 3, "create_progress": 2}
    assert run["results"]["outcomes"] == {"repaired": 38, "failed": 2}
    outcomes = [(seen["user_id"], seen["outcome"]) for seen in run["results"]["sample"]]
    assert outcomes[:6] == [(2, "failed"), *((user, "repaired") for user in (4, 6, 8, 10, 11))]
    assert {outcome for _, outcome in outcomes[1:]} == {"repaired"}
    assert db.execute("select count(*) from level_sync.sync_plan").fetchone() == (0,)


@pytest.mark.leftovers
def test_pair_is_counted_as_what_the_plan_says_although_another_row_is_missing_now(db):
    """NULL is a level that adopted tables may have. A sample of 20 stays in the plan; this is the 30th pair."""
    configure(db, batch_size=7)
    add_pairs(db, 30)
    db.execute("alter table user_licenses alter column current_level drop not null")
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
        db.execute("update user_licenses set current_level = null where user_id = 30")
    dry = reconcile(db, dry_run=True)
    with bypass(db):
        delete(db, LICENSE, 30)
    run = reconcile(db, plan=dry["run_id"])
    assert levels(db, 30) == (5, 5)
    assert run["results"]["issues"] == dry["results"]["issues"] == {"level_mismatch": 30}
    assert run["results"]["repairs"] == {"update_license": 30}


def test_run_whose_first_batches_an_older_version_made_is_counted_whole(db):
    """They left what they had repaired in the plan and told nothing meanwhile."""
    configure(db, batch_size=7)
    add_pairs(db, 60)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    run_id = db.execute("select level_sync._start_run(false, null, 'manual', null)").fetchone()[0]
    db.execute("select level_sync._plan_range(%s, null, 1, 100)", [run_id])
    with bypass(db):
        db.execute("update user_licenses set current_level = 5, max_achieved_level = 5 where user_id <= 40")
    db.execute("update level_sync.sync_plan set outcome = 'repaired' where user_id <= 40")
    next_user = 41
    while next_user is not None:
        db.execute("select level_sync._tell_progress('repairing', %s, %s)", [next_user, run_id])
        (next_user,) = db.execute(
            "select level_sync._repair_batch(%(run)s, %(run)s, %(user)s, 7)", {"run": run_id, "user": next_user}
        ).fetchone()
    db.execute("select level_sync._finish_run(%(run)s, %(run)s, null, null)", {"run": run_id})
    run = last_run(db)
    assert (run["status"], run["issues_found"], run["synced_count"]) == ("success", 60, 60)
    assert run["results"]["outcomes"] == {"repaired": 60}


def test_only_the_last_commit_of_a_run_waits_for_the_disk(db):
    """It makes the batches before it durable, too. In somebody's transaction nothing is changed about theirs."""
    configure(db, batch_size=1)
    add_pairs(db, 2)
    db.execute("create table public.waits (step text, setting text)")
    noted = "insert into public.waits values ('{}', current_setting('synchronous_commit'))"
    user_trigger(db, "before update on user_licenses", noted.format("repair"))
    user_trigger(
        db,
        "before update on level_sync.sync_log",
        noted.format("end"),
        condition="when (new.status <> 'running')",
        name="at_the_end",
    )
    for is_inside, expected in ((False, "off"), (True, "on")):
        with bypass(db):
            db.execute("update specialization_progress set current_level = current_level + 1")
            db.execute("truncate public.waits")
        with db.transaction() if is_inside else nullcontext():
            reconcile(db)
            assert db.execute("select * from public.waits").fetchall() == [("repair", expected)] * 2 + [("end", "on")]
            assert db.execute("show synchronous_commit").fetchone() == ("on",)


def test_specializations_are_filtered_and_unknown_ones_are_empty(broken):
    insert(broken, PROGRESS, 5, 2, "COACH")
    with bypass(broken):
        set_level(broken, PROGRESS, 5, 4, "COACH")
    find = "select user_id, issue_type from level_sync.find_desync_issues(%s)"
    assert broken.execute(find, ["COACH"]).fetchall() == [(5, "level_mismatch")]
    assert len(broken.execute(find, ["PLAYER"]).fetchall()) == 4
    assert broken.execute(find, ["NONE"]).fetchall() == []
    assert len(broken.execute(find, [None]).fetchall()) == 5
    reconcile(broken)


def test_progress_is_told_to_a_session_that_asks_and_to_no_other(database, db):
    configure(db, batch_size=20)
    add_pairs(db, 1000)
    with bypass(db):
        db.execute("update user_licenses set current_level = 2 where user_id <= 40")
    told: list[dict[str, Any]] = []
    db.add_notice_handler(lambda notice: told.append(json.loads(notice.message_detail or "{}")))
    reconcile(db)
    assert told == []
    with bypass(db):
        db.execute("update user_licenses set current_level = 2 where user_id <= 40")
        db.execute("delete from user_licenses where user_id > 998")  # the last user is that of either table
    db.execute("set level_sync.tell_progress = 'on'")
    reconcile(db)
    looking = [(at["done"], at["total"]) for at in told if at["phase"] == "looking"]
    repairing = [(at["done"], at["total"]) for at in told if at["phase"] != "looking"]
    assert len(looking) > 1
    assert looking == sorted(looking)
    assert all(0 < done < total == 999 for done, total in looking)
    assert repairing == [(20, 42), (40, 42), (42, 42)]


@pytest.mark.leftovers
def test_an_estimated_range_ends_with_a_user_that_fills_it_and_the_last_one_is_open(db):
    """What is inserted above the newest user meanwhile belongs to the last range."""
    db.execute(
        "insert into specializations (id) select 'S' || n from generate_series(1, 10) as n on conflict do nothing"
    )
    db.execute("insert into users (id) select n from generate_series(1, 500) as n")
    db.execute(
        f"insert into {PROGRESS} (student_id, specialization_id)"
        " select users.id, known.id from users, specializations as known"
    )
    with bypass(db):
        db.execute(f"delete from {LICENSE} where user_id > 250")  # the newest users have one side only
    db.execute(f"analyze {PROGRESS}, {LICENSE}")
    ranges = [(7, 1), (300, 1), (500, 1), (1, 100000)]
    ends = [db.execute("select level_sync._end_of_range(%s, %s)", each).fetchone() for each in ranges]
    assert ends == [(7,), (300,), (None,), (None,)]


def test_ranges_that_are_estimated_leave_no_user_out(db):
    """Dense, sparse and far apart: after ANALYZE the planner's estimate says where a range ends."""
    configure(db, batch_size=20)
    with bypass(db):
        db.execute(
            "insert into users (id)"
            " select n from generate_series(1, 3000) as n"
            " union select 10000 + n * 1000003 from generate_series(1, 500) as n"
            " union select 900000000000 + n from generate_series(1, 2000) as n"
        )
        db.execute(f"insert into {PROGRESS} (student_id, specialization_id) select id, 'PLAYER' from users")
    db.execute(f"insert into {LICENSE} (user_id, specialization_type) select id, 'COACH' from users")
    db.execute(f"analyze {PROGRESS}, {LICENSE}")
    ranges, first = 0, -(2**63)
    while first is not None:
        row = db.execute("select level_sync._end_of_range(%s, 200)", [first]).fetchone()
        assert row is not None
        held = db.execute(
            f"select count(*) from {PROGRESS} where student_id between %s and coalesce(%s, 9223372036854775807)",
            [first, row[0]],
        ).fetchone()
        assert held is not None
        assert held[0] <= 4000
        ranges, first = ranges + 1, None if row[0] is None else row[0] + 1
    assert ranges > 10
    db.execute("call level_sync.reconcile(dry_run => true)")
    assert last_run(db)["issues_found"] == 5500
    db.execute("call level_sync.reconcile()")
    assert last_run(db)["synced_count"] == 5500


@BOTH
@pytest.mark.leftovers
@pytest.mark.parametrize("is_analyzed", [False, True], ids=["counted", "estimated"])
def test_a_range_ends_where_one_side_has_enough_although_the_other_ended_before(db, users, table, is_analyzed):
    users(10_000)
    with bypass(db):
        for side, last in ((table, 10_000), (OTHER[table], 20)):
            db.execute(f"alter table {side} set (autovacuum_enabled = off)")
            db.execute(
                f"insert into {side} ({', '.join(KEY[side])}) select id, 'PLAYER' from users where id <= %s", [last]
            )
        if is_analyzed:
            db.execute(f"analyze {table}, {OTHER[table]}")
        db.execute(f"delete from {table} where {KEY[table][0]} between 501 and 9000")  # Statistics do not know of it.
    end = db.execute("select level_sync._end_of_range(0, 1000)").fetchone()[0]
    assert 500 <= end <= 2500 if is_analyzed else end == 9501


def test_plan_holds_for_a_pair_that_waited_in_the_queue_when_it_was_made(broken):
    """And waits no longer, while its levels are as they were: exactly the plan is applied."""
    broken.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, dead_at)"
        " values (1, 'PLAYER', 'license', 'level_changed', 'P0001', 'planted', now())"
    )
    plan = reconcile(broken, dry_run=True)["run_id"]
    broken.execute("delete from level_sync.sync_queue")
    reconcile(broken, plan=plan)
    assert levels(broken, 1) == (6, 6)


@BOTH
@pytest.mark.leftovers
def test_a_range_that_is_counted_ends_where_the_denser_side_has_enough(db, users, table):
    users(100)
    with bypass(db):
        for side, specializations in ((table, ["COACH", "INTERNSHIP", "PLAYER"]), (OTHER[table], ["PLAYER"])):
            db.execute(f"alter table {side} set (autovacuum_enabled = off)")
            db.execute(
                f"insert into {side} ({', '.join(KEY[side])}) select id, unnest(%s::text[]) from users",
                [specializations],
            )
    assert db.execute("select level_sync._end_of_range(0, 30)").fetchone() == (11,)


@pytest.mark.leftovers
def test_run_that_cannot_even_begin_raises(broken):
    user_trigger(broken, "before insert on level_sync.sync_log", "raise 'the log takes no more'")
    with pytest.raises(psycopg.errors.RaiseException, match="the log takes no more"):
        broken.execute("call level_sync.reconcile()")
    assert broken.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)


def test_the_sample_shows_every_specialization_of_its_last_user(db):
    for specialization in ("COACH", "PLAYER"):
        add_pairs(db, 11, specialization=specialization)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 2")
    db.execute("call level_sync.reconcile()")
    shown = [(pair["user_id"], pair["specialization"], pair["outcome"]) for pair in last_run(db)["results"]["sample"]]
    assert shown == [(user, name, "repaired") for user in range(1, 11) for name in ("COACH", "PLAYER")]
