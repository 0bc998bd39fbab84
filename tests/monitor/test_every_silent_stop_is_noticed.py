"""Each way in which level_sync can silently stop is noticed, by the view health and by level-sync verify alike."""

from __future__ import annotations

import json

import pytest

from academy import (
    BULK,
    LICENSE,
    PROGRESS,
    add_pair,
    bypass,
    configure,
    delete,
    everything,
    health,
    set_level,
    user_trigger,
)
from command_line import run
from internals import CARRY, CREATED, LEVEL_CHANGED
from level_sync.verify import DESYNC, DRIFT, FOREIGN_KEYS, NO_CONNECTION, QUEUE, SCHEDULE, exit_code, verify

pytestmark = pytest.mark.leftovers

DEAD = (
    "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, dead_at)"
    " values (1, 'PLAYER', 'progress', 'level_changed', 'P0001', 'no', now())"
)
OVERDUE = (
    "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, next_attempt_at)"
    " values (1, 'PLAYER', 'progress', 'level_changed', 'P0001', 'no', now() - '6 minutes'::interval)"
)
FAILED_RUN = "insert into level_sync.sync_log (status, job_end, error) values ('failed', now(), 'disk full')"
APPROVAL = "insert into level_sync.sync_log (status, job_end) values ('needs_approval', now())"

# What is broken, the check that says so, the bit of the exit code, and what the detail names.
BREAKAGES = {
    "trigger disabled": (
        f"alter table {LICENSE} disable trigger {LEVEL_CHANGED[LICENSE]}",
        ("triggers", DRIFT, f"{LEVEL_CHANGED[LICENSE]} on public.{LICENSE} is disabled"),
    ),
    "all triggers disabled": (
        f"alter table {PROGRESS} disable trigger user",
        ("triggers", DRIFT, f"{CREATED[PROGRESS]} on public.{PROGRESS} is disabled"),
    ),
    "trigger for replicas only": (
        f"alter table {LICENSE} enable replica trigger {CREATED[LICENSE]}",
        ("triggers", DRIFT, CREATED[LICENSE]),
    ),
    "trigger dropped": (
        f"drop trigger {LEVEL_CHANGED[PROGRESS]} on {PROGRESS}",
        ("triggers", DRIFT, f"{LEVEL_CHANGED[PROGRESS]} on public.{PROGRESS} is missing"),
    ),
    "trigger replaced": (
        f"drop trigger {LEVEL_CHANGED[PROGRESS]} on {PROGRESS};"
        f" create trigger {LEVEL_CHANGED[PROGRESS]} after update on {PROGRESS} for each row"
        f" when (false) execute function {CARRY[PROGRESS]}()",
        ("triggers", DRIFT, f"{LEVEL_CHANGED[PROGRESS]} on public.{PROGRESS} is changed"),
    ),
    "function body replaced": (
        f"create or replace function {CARRY[PROGRESS]}() returns trigger language plpgsql security definer"
        " set search_path = pg_catalog, pg_temp as $$ begin return null; end $$",
        ("functions", DRIFT, f"{CARRY[PROGRESS]}() is changed"),
    ),
    "function no longer definer": (
        f"alter function {CARRY[LICENSE]}() security invoker",
        ("functions", DRIFT, f"{CARRY[LICENSE]}() is changed"),
    ),
    "function dropped": (
        "drop function level_sync.requeue(bigint, text)",
        ("functions", DRIFT, "level_sync.requeue(bigint,text) is missing"),
    ),
    "foreign key dropped": (
        "alter table user_licenses drop constraint fk_user_licenses_user",
        ("foreign_keys", FOREIGN_KEYS, "fk_user_licenses_user is missing"),
    ),
    "foreign key not validated": (
        "alter table user_licenses drop constraint fk_user_licenses_user, add constraint fk_user_licenses_user"
        " foreign key (user_id) references users (id) on delete restrict not valid",
        ("foreign_keys", FOREIGN_KEYS, "fk_user_licenses_user is not validated"),
    ),
    "foreign key that cascades": (
        "alter table specialization_progress drop constraint fk_specialization_progress_spec,"
        " add constraint fk_specialization_progress_spec"
        " foreign key (specialization_id) references specializations (id) on delete cascade",
        ("foreign_keys", FOREIGN_KEYS, "fk_specialization_progress_spec is not ON DELETE RESTRICT"),
    ),
    "foreign key to another table": (
        "create table people (id bigint primary key); insert into people select id from users;"
        " alter table user_licenses drop constraint fk_user_licenses_user, add constraint fk_user_licenses_user"
        " foreign key (user_id) references people (id) on delete restrict",
        ("foreign_keys", FOREIGN_KEYS, "fk_user_licenses_user refers to public.people"),
    ),
    "foreign key doubled": (
        "alter table user_licenses add constraint older foreign key (user_id) references users (id) on delete cascade",
        ("foreign_keys", FOREIGN_KEYS, "older"),
    ),
    "orphans": (
        "set session_replication_role = replica; delete from users where id = 2; reset session_replication_role",
        ("orphans", FOREIGN_KEYS, "1 rows of specialization_progress without user"),
    ),
    "desync": (
        "set session_replication_role = replica; update specialization_progress set current_level = 6"
        " where student_id = 2; reset session_replication_role",
        ("desync", DESYNC, "1 pairs differ, first user 2 in PLAYER (level_mismatch)"),
    ),
    "dead pair": (DEAD, ("queue_dead", QUEUE, "1 dead, first user 1 in PLAYER: no")),
    "overdue pair": (OVERDUE, ("queue_draining", QUEUE, "1 pairs overdue")),
    "slot missed": (
        "update level_sync.sync_log"
        " set job_start = job_start - '7 hours'::interval, job_end = job_end - '7 hours'::interval",
        ("last_success", SCHEDULE, "last successful run"),
    ),
    "never run": ("delete from level_sync.sync_log", ("last_success", SCHEDULE, "no run has succeeded yet")),
    "last run failed": (FAILED_RUN, ("last_run", SCHEDULE, "failed, disk full")),
    "run needs approval": (APPROVAL, ("last_run", SCHEDULE, "needs_approval")),
    "running for ever": (
        "insert into level_sync.sync_log default values",
        ("running", SCHEDULE, "says running, but its session is gone"),
    ),
}


def test_all_is_well_in_a_healthy_database(database, healthy):
    elsewhere = {"schedule", "cron_launcher"}
    assert {name: row for name, row in health(healthy).items() if row[0] is not True and name not in elsewhere} == {}
    assert exit_code([check for check in verify(database.dsn) if check.bit != SCHEDULE]) == 0


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_broken_is_named_by_health_and_by_verify(database, healthy, breakage):
    statement, (name, bit, detail) = BREAKAGES[breakage]
    healthy.execute(statement)
    ok, told, hint = health(healthy)[name]
    assert ok is False
    assert detail in told
    assert hint
    checks = {check.name: check for check in verify(database.dsn)}
    assert (checks[name].ok, checks[name].bit) == (False, bit)
    assert exit_code(list(checks.values())) & bit
    unbroken = [check.name for check in checks.values() if check.ok is False and check.bit not in (bit, SCHEDULE)]
    assert [name for name in unbroken if name not in ("shipped_functions", "orphans", "foreign_keys", "desync")] == []


def test_partial_run_is_not_good_news(healthy):
    healthy.execute("insert into level_sync.sync_log (status, job_end) values ('partial', now())")
    assert health(healthy)["last_run"][0] is False


def test_a_run_that_failed_is_not_good_again_because_another_one_is_at_work_or_was_skipped(healthy):
    healthy.execute(FAILED_RUN)
    for later in ("('skipped', now())", "('running', null)"):
        healthy.execute(f"insert into level_sync.sync_log (status, job_end) values {later}")
        ok, detail, _ = health(healthy)["last_run"]
        assert (ok, "failed, disk full" in detail) == (False, True)


def test_a_desync_that_no_run_will_repair_is_not_said_to_wait_for_the_next_one(healthy):
    with bypass(healthy):
        set_level(healthy, PROGRESS, 1, 6)
    assert "wait for the next run" in health(healthy)["desync"][2]
    healthy.execute(APPROVAL)
    assert "approves" in health(healthy)["desync"][2]
    configure(healthy, conflict_policy="report_only")
    assert "report_only" in health(healthy)["desync"][2]


def test_what_is_found_is_told_in_a_few_words_however_long_the_message(healthy):
    healthy.execute(DEAD.replace("'no'", "repeat('x', 1000000)"))
    healthy.execute(FAILED_RUN.replace("'disk full'", "repeat('x', 1000000)"))
    assert max(len(row[1]) for row in health(healthy).values()) < 1000


@pytest.mark.lacks("pg_cron")
def test_without_pg_cron_the_schedule_is_red_and_says_what_to_install(database, healthy):
    ok, detail, hint = health(healthy)["schedule"]
    assert (ok, detail) == (False, "pg_cron is not preloaded")
    assert "level-sync reconcile" in hint
    assert exit_code(verify(database.dsn)) == SCHEDULE


def test_where_another_scheduler_runs_it_no_jobs_are_looked_for(database, healthy):
    configure(healthy, uses_pg_cron=False)
    ok, detail, hint = health(healthy)["schedule"]
    assert ok
    assert "another scheduler" in detail
    assert "last_success" in hint
    assert [check.name for check in verify(database.dsn) if check.bit == SCHEDULE and "cron" in check.name] == []
    assert exit_code(verify(database.dsn)) == 0


def test_of_two_runs_the_later_one_is_the_last_success(db):
    db.execute("call level_sync.reconcile()")
    db.execute("update level_sync.sync_log set job_start = job_start - interval '2 days'")
    assert health(db)["last_success"][0] is False
    db.execute("call level_sync.reconcile()")
    assert health(db)["last_success"][0] is True


def test_a_column_of_the_application_that_refers_to_users_too_is_none_of_our_business(database, healthy):
    healthy.execute("alter table user_licenses add column approved_by bigint references users (id)")
    assert health(healthy)["foreign_keys"][0] is True


# verify


def test_installation_missing_is_said_plainly(empty_database):
    checks = verify(empty_database.dsn)
    assert [(check.name, check.ok) for check in checks] == [("installation", False)]
    assert exit_code(checks) == DRIFT


@BULK
def test_live_proves_both_ways_and_leaves_no_trace(database, healthy, inline_limit):
    configure(healthy, inline_limit=inline_limit)
    before = everything(healthy)
    live = [check for check in verify(database.dsn, live=True) if check.name == "live"]
    assert [(check.ok, check.detail) for check in live] == [(True, "a level went both ways and was taken back")]
    assert everything(healthy) == before


def test_live_is_red_where_the_triggers_do_not_carry(database, healthy):
    healthy.execute("alter table user_licenses disable trigger user")
    live = [check for check in verify(database.dsn, live=True) if check.name == "live"]
    assert [(check.ok, check.detail) for check in live] == [(False, "a license level did not arrive at the progress")]


def test_live_is_red_where_the_other_side_fails_and_queues_nothing(database, healthy):
    user_trigger(healthy, "before update on user_licenses", "raise 'closed'")
    live = [check for check in verify(database.dsn, live=True) if check.name == "live"]
    assert live[0].ok is False
    assert healthy.execute("select count(*) from level_sync.sync_queue").fetchone() == (0,)


def test_live_without_any_pair_is_not_checked(database, db):
    live = [check for check in verify(database.dsn, live=True) if check.name == "live"]
    assert live[0].ok is None
    assert exit_code(live) == DRIFT


def test_json_has_a_stable_shape_and_the_exit_code_is_the_sum_of_bits(database, healthy):
    with bypass(healthy):
        set_level(healthy, PROGRESS, 1, 6)
        delete(healthy, LICENSE, 2)
    healthy.execute(DEAD)
    done = run("verify", "--json", "--dsn", database.dsn)
    told = json.loads(done.stdout)
    assert set(told) == {"ok", "exit_code", "checks"}
    assert told["ok"] is False
    assert told["exit_code"] == done.exit_code
    assert done.exit_code & ~SCHEDULE == DESYNC | QUEUE
    assert all(set(check) == {"name", "ok", "detail", "hint", "bit"} for check in told["checks"])


def test_no_connection_is_32():
    assert run("verify", "--dsn", "host=/nonexistent dbname=x").exit_code == NO_CONNECTION


def test_a_check_that_could_not_be_made_is_no_success(database, healthy):
    add_pair(healthy, 9, level=3)
    checks = verify(database.dsn)
    assert all(check.bit for check in checks)
    unknown = [check for check in checks if check.ok is None]
    assert exit_code(unknown) == sum({check.bit for check in unknown})
