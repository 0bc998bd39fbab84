"""The command line of runs: exit codes a script can use, JSON that is only JSON, tables a person can read."""

from __future__ import annotations

import json
import subprocess

import pytest

import command_line
import internals
from academy import PROGRESS, add_pairs, bypass, configure, levels, set_level, user_trigger
from command_line import Done
from tree import LEVEL_SYNC


def run(database, *arguments: str) -> Done:
    return command_line.run(*arguments, "--dsn", database.dsn, columns=160)


@pytest.fixture
def broken(db):
    add_pairs(db, 5)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 6 where student_id <= 3")
    return db


def test_reconcile_repairs_shows_the_run_and_ends_with_0(database, broken):
    done = run(database, "reconcile")
    assert done.exit_code == 0
    for words in ("success", "issues_found", "synced_count"):
        assert words in done.stdout
    assert levels(broken, 1) == (6, 6)


def test_json_of_a_run_is_its_row(database, broken):
    done = run(database, "reconcile", "--json")
    row = json.loads(done.stdout)
    assert (row["status"], row["issues_found"], row["synced_count"]) == ("success", 3, 3)
    assert row["results"]["issues"] == {"level_mismatch": 3}


def test_progress_bar_goes_to_standard_error_only(database, broken):
    done = subprocess.run(
        [LEVEL_SYNC, "reconcile", "--json", "--dsn", database.dsn],
        env={"FORCE_COLOR": "1", "COLUMNS": "100", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["status"] == "success"
    assert "repairing" in done.stderr
    assert "100%" in done.stderr


def test_dry_run_then_plan(database, broken):
    done = run(database, "reconcile", "--dry-run", "--json")
    row = json.loads(done.stdout)
    assert (done.exit_code, row["dry_run"], row["issues_found"], row["synced_count"]) == (0, True, 3, 0)
    assert levels(broken, 1) == (6, 3)
    assert run(database, "reconcile", "--plan", str(row["run_id"])).exit_code == 0
    assert levels(broken, 1) == (6, 6)
    again = run(database, "reconcile", "--plan", str(row["run_id"]))
    assert again.exit_code == 1
    assert f"run {row['run_id']} has no plan that could be applied" in again.stderr


def test_direction(database, broken):
    assert run(database, "reconcile", "--direction", "license_to_progress").exit_code == 0
    assert levels(broken, 1) == (3, 3)
    wrong = run(database, "reconcile", "--direction", "up")
    assert wrong.exit_code == 1
    assert "unknown direction 'up'" in wrong.stderr


def test_too_many_issues_end_with_3_and_say_how_to_approve(database, broken):
    configure(broken, repair_limit=2)
    done = run(database, "reconcile")
    assert done.exit_code == 3
    assert "level-sync reconcile --plan 1 --approve" in done.stdout
    assert run(database, "reconcile", "--plan", "1", "--approve").exit_code == 0
    assert levels(broken, 1) == (6, 6)


def test_another_run_at_work_ends_with_4(database, db):
    other = database.connect()
    other.execute(internals.HOLD_RUN_LOCK)
    done = run(database, "reconcile", "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout)["status"] == "skipped"


@pytest.mark.leftovers
def test_partial_and_failed_runs_end_with_1(database, broken):
    user_trigger(broken, "before update on user_licenses", "if new.user_id = 2 then raise 'no'; end if")
    done = run(database, "reconcile", "--json")
    assert (done.exit_code, json.loads(done.stdout)["status"]) == (1, "partial")
    broken.execute("alter table level_sync.sync_plan rename to away")
    done = run(database, "reconcile", "--json")
    assert done.exit_code == 1
    broken.execute("alter table level_sync.away rename to sync_plan")


@pytest.mark.leftovers
def test_run_says_what_it_has_left_to_the_queue_and_a_dry_run_how_to_apply_it(database, broken):
    user_trigger(broken, "before update on user_licenses", "if new.user_id = 2 then raise 'no'; end if")
    assert "level-sync reconcile --plan 1\n" in run(database, "reconcile", "--dry-run").stdout
    done = run(database, "reconcile")
    assert "1 pair(s) failed, 0 are left to their queue entries. See level-sync queue." in done.stdout
    done = run(database, "reconcile")
    assert done.exit_code == 0
    assert "0 pair(s) failed, 1 are left to their queue entries. See level-sync queue." in done.stdout


@pytest.mark.leftovers
def test_undo_says_what_it_put_back(database, broken):
    run(database, "reconcile")
    done = run(database, "undo", "1")
    assert (done.exit_code, done.stdout) == (
        0,
        "3 of 3 changes of run 1 put back\n",
    )
    assert levels(broken, 1) == (6, 3)
    assert json.loads(run(database, "undo", "1", "--json").stdout)["undone"] == 0
    unknown = run(database, "undo", "77")
    assert unknown.exit_code == 1
    assert "there is no run 77" in unknown.stderr


def test_log_lists_runs_newest_first(database, broken):
    assert run(database, "log").stdout == "no run yet\n"
    run(database, "reconcile", "--dry-run")
    run(database, "reconcile")
    rows = json.loads(run(database, "log", "--json").stdout)
    assert [(row["run_id"], row["dry_run"], row["status"]) for row in rows] == [
        (2, False, "success"),
        (1, True, "success"),
    ]
    assert len(json.loads(run(database, "log", "--json", "--limit", "1").stdout)) == 1
    assert "success" in run(database, "log").stdout


def test_verify_prints_what_is_wrong_and_what_to_do(database, broken):
    done = run(database, "verify")
    assert done.exit_code & 1
    assert "3 pairs differ" in done.stdout
    assert "level_sync.reconcile()" in done.stdout
    run(database, "reconcile")
    assert not run(database, "verify").exit_code & (1 | 2 | 8 | 16)


def test_events_of_a_run_name_it(database, broken):
    run(database, "reconcile")
    rows = json.loads(run(database, "events", "--json", "--user", "1").stdout)
    assert (rows[0]["source"], rows[0]["run_id"]) == ("reconcile", 1)


@pytest.mark.needs("pg_cron")
def test_schedule_and_unschedule_end_with_0(database):
    assert run(database, "schedule", "--cron", "5 * * * *").exit_code == 0
    assert run(database, "unschedule").exit_code == 0


@pytest.mark.lacks("pg_cron")
def test_schedule_without_pg_cron_ends_with_1_and_says_what_to_do(database):
    done = run(database, "schedule")
    assert done.exit_code == 1
    assert "pg_cron is not installed in this database" in done.stderr
    assert "another scheduler" in " ".join(done.stderr.split())


def test_rows_of_a_plan_that_changed_are_counted(database, broken):
    run(database, "reconcile", "--dry-run")
    set_level(broken, PROGRESS, 1, 5)
    done = run(database, "reconcile", "--plan", "1", "--json")
    assert json.loads(done.stdout)["results"]["outcomes"] == {"changed": 1, "repaired": 2}
