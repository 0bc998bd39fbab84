"""Too many issues wait for somebody's approval, a dry run changes nothing, and its plan does exactly that, once."""

from __future__ import annotations

import psycopg
import pytest

from academy import LICENSE, PROGRESS, add_pairs, bypass, configure, events, everything, levels, reconcile, set_level


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
