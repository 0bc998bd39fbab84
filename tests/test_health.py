"""Each way in which level_sync can silently stop is noticed, by the view health and by level-sync verify alike."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.types.json import Jsonb

from academy import (
    LICENSE,
    PROGRESS,
    add_pair,
    add_pairs,
    bypass,
    configure,
    delete,
    set_level,
    user_trigger,
    wait_until,
)
from command_line import run
from conftest import dsn_of, temporary_directory, wait_for_launcher
from level_sync import install, schedule
from level_sync.servers import CRON_CONFIGURATION, SystemServer, has_extension, system_binaries
from level_sync.verify import (
    DESYNC,
    DRIFT,
    FOREIGN_KEYS,
    NO_CONNECTION,
    QUEUE,
    SCHEDULE,
    Check,
    exit_code,
    verify,
)

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
        "alter table user_licenses disable trigger license_level_changed",
        ("triggers", DRIFT, "license_level_changed on public.user_licenses is disabled"),
    ),
    "all triggers disabled": (
        "alter table specialization_progress disable trigger user",
        ("triggers", DRIFT, "progress_created on public.specialization_progress is disabled"),
    ),
    "trigger for replicas only": (
        "alter table user_licenses enable replica trigger license_created",
        ("triggers", DRIFT, "license_created"),
    ),
    "trigger dropped": (
        "drop trigger progress_level_changed on specialization_progress",
        ("triggers", DRIFT, "progress_level_changed on public.specialization_progress is missing"),
    ),
    "trigger replaced": (
        "drop trigger progress_level_changed on specialization_progress;"
        " create trigger progress_level_changed after update on specialization_progress for each row"
        " when (false) execute function level_sync.carry_progress()",
        ("triggers", DRIFT, "progress_level_changed on public.specialization_progress is changed"),
    ),
    "function body replaced": (
        "create or replace function level_sync.carry_progress() returns trigger language plpgsql security definer"
        " set search_path = pg_catalog, pg_temp as $$ begin return null; end $$",
        ("functions", DRIFT, "level_sync.carry_progress() is changed"),
    ),
    "function no longer definer": (
        "alter function level_sync.carry_license() security invoker",
        ("functions", DRIFT, "level_sync.carry_license() is changed"),
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


def health(db) -> dict[str, tuple[bool | None, str, str]]:
    return {row[0]: row[1:] for row in db.execute("select name, ok, detail, hint from level_sync.health").fetchall()}


@pytest.fixture
def healthy(db):
    add_pairs(db, 3)
    db.execute("call level_sync.reconcile()")
    return db


@pytest.fixture
def scheduled(database, healthy):
    """With its jobs in the database of pg_cron, where the server has it."""
    if isinstance(database.server, SystemServer) and has_extension(database.server.binaries, "pg_cron"):
        schedule.schedule(database.dsn)
        yield healthy
        schedule.unschedule(database.dsn)
    else:
        pytest.skip("this server has no pg_cron")


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


def test_without_pg_cron_the_schedule_is_red_and_says_what_to_install(database, healthy):
    if isinstance(database.server, SystemServer):
        pytest.skip("this server has pg_cron preloaded")
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


def test_of_jobs_with_our_names_those_of_this_database_and_active_ones_are_judged(db):
    """Two databases share one pg_cron, and somebody has made a second job and switched it off."""
    here = db.info.dbname
    jobs = [
        {
            **{"jobid": jobid, "jobname": name + suffix, "schedule": schedule, "command": command},
            **{"database": database, "username": "postgres", "active": active, "last_run": last_run},
        }
        for name, schedule, command in db.execute(
            "select jobname, schedule, command from level_sync._wanted_cron_jobs()"
        )
        for jobid, suffix, database, active, last_run in [
            (1, "", "another", True, {"status": "failed", "start_time": None}),
            (2, "", here, False, None),
            (3, f"_{here}", here, True, {"status": "succeeded", "start_time": "2026-01-01T00:00:00Z"}),
            (4, "", here, False, None),
            (5, "", "another", False, None),
        ]
    ]
    judge = "select name, ok, detail from level_sync._judge_cron_jobs(%s)"
    judged = db.execute(judge, [Jsonb(jobs)]).fetchall()
    assert [ok for _, ok, _ in judged] == [True] * 4
    assert all(detail.startswith("job 3 at") for name, _, detail in judged if name.startswith("schedule"))
    for job in jobs:
        job["active"] = False
    judged = db.execute(judge, [Jsonb(jobs)]).fetchall()
    assert {detail for name, _, detail in judged if name.startswith("schedule")} == {"the job is not active"}


# the jobs, where pg_cron lives in another database


def cron(scheduled, statement: str) -> None:
    info = scheduled.info
    with psycopg.connect(host=info.host, user=info.user, dbname="cron_home", autocommit=True) as connection:
        connection.execute(statement.format(database=info.dbname))


OURS = "where database = '{database}' and jobname like 'level_sync_reconcile%'"
DETAILS = (
    "insert into cron.job_run_details (jobid, runid, database, username, command, status, return_message, start_time,"
    " end_time) select jobid, nextval('cron.runid_seq'), database, username, command, {values} from cron.job " + OURS
)
CRON_BREAKAGES = {
    "job deleted": ("delete from cron.job " + OURS, "schedule", "the job is missing"),
    "job inactive": ("update cron.job set active = false " + OURS, "schedule", "the job is not active"),
    "another database": ("update cron.job set database = 'postgres' " + OURS, "schedule", "the job "),
    "wrong command": ("update cron.job set command = 'select 1' " + OURS, "schedule", "runs another command: select 1"),
    "wrong schedule": (
        "update cron.job set schedule = '1 1 * * *' " + OURS,
        "schedule",
        "runs at 1 1 * * * instead of",
    ),
    "role dropped": ("update cron.job set username = 'gone' " + OURS, "schedule", "role gone, which does not exist"),
    "role without rights": (
        "update cron.job set username = 'pg_monitor' " + OURS,
        "schedule",
        "role pg_monitor, which may not call it",
    ),
    "connection failed": (
        DETAILS.replace("{values}", "'failed', 'connection failed', null, null"),
        "cron run",
        "last run failed at no time: connection failed",
    ),
    "runs failing": (
        DETAILS.replace("{values}", "'failed', 'ERROR: no', now(), now()"),
        "cron run",
        "ERROR: no",
    ),
}


@pytest.mark.parametrize("breakage", CRON_BREAKAGES)
def test_job_that_silently_stopped_is_named_by_verify(database, scheduled, breakage):
    before = verify(database.dsn)
    assert [check for check in before if check.ok is not True] == []
    assert exit_code(before) == 0
    statement, name, detail = CRON_BREAKAGES[breakage]
    try:
        cron(scheduled, statement)
        red = [check for check in verify(database.dsn) if check.ok is not True]
        assert [check.name.split(":")[0] for check in red] == [name]
        assert detail in red[0].detail
        assert exit_code(red) == SCHEDULE
    finally:
        cron(scheduled, "delete from cron.job where database = 'postgres'")
        cron(scheduled, "delete from cron.job_run_details where database = '{database}'")


def test_a_reader_sees_the_jobs_of_another_database_once_a_superuser_has_let_it(database, scheduled):
    """pg_cron shows each role its own jobs only: what is not seen is not called missing."""
    role = f"On-Call of {database.name}"
    scheduled.execute(f'create role "{role}" login')
    scheduled.execute("select level_sync._grant_to(%s, 'reader')", [role])
    dsn = psycopg.conninfo.make_conninfo(database.dsn, user=role)

    def of_jobs() -> list[Check]:
        return [
            check for check in verify(dsn) if check.bit == SCHEDULE and check.name.startswith(("schedule", "cron run"))
        ]

    try:
        [unread] = of_jobs()
        assert (unread.name, unread.ok) == ("schedule", None)
        assert "permission denied for schema cron" in unread.detail
        for statement in unread.hint.partition("as a superuser: ")[2].split(";")[:2]:
            cron(scheduled, statement)
        [hidden] = of_jobs()
        assert (hidden.name, hidden.ok, hidden.hint) == ("schedule", None, unread.hint)
        assert "no job of this database, if any" in hidden.detail
        for statement in unread.hint.partition("as a superuser: ")[2].split(";")[2:-1]:
            cron(scheduled, statement)
        assert [check.ok for check in of_jobs()] == [True] * 4
        cron(scheduled, "update cron.job set active = false " + OURS)
        assert [check.detail for check in of_jobs() if not check.ok] == ["the job is not active"]
    finally:
        cron(scheduled, f'drop owned by "{role}"')
        scheduled.execute(f'drop owned by "{role}"')
        scheduled.execute(f'drop role "{role}"')


def test_pg_cron_that_is_preloaded_without_its_extension_is_told_as_that():
    with own_server_with_cron() as server:
        with psycopg.connect(dsn_of(server, "postgres"), autocommit=True) as connection:
            connection.execute("create database academy")
        here, elsewhere = dsn_of(server, "academy"), dsn_of(server, "postgres")
        for dsn, words in ((here, "is not in this database"), (elsewhere, "is not in database academy")):
            install.migrate(dsn)
            [check] = [check for check in verify(dsn) if check.name == "schedule"]
            assert check.ok is False
            assert words in check.detail
            assert "create extension pg_cron; then run level-sync schedule" in check.hint
            told = run("schedule", "--dsn", dsn)
            assert told.exit_code == 1
            assert "create extension pg_cron" in " ".join(told.stderr.split())
            assert run("unschedule", "--dsn", dsn).stdout == "0 job(s) removed\n"
        with psycopg.connect(here, autocommit=True) as connection:
            connection.execute("create extension pg_cron")
        for dsn in (here, elsewhere):
            assert run("schedule", "--dsn", dsn).exit_code == 0
            assert [check.ok for check in verify(dsn) if check.name.startswith("schedule")] == [True] * 2


@contextmanager
def own_server_with_cron() -> Iterator[SystemServer]:
    """A server that preloads pg_cron for the database academy, which is not there yet."""
    binaries = system_binaries()
    if binaries is None or not has_extension(binaries, "pg_cron"):
        pytest.skip("no pg_cron from system packages here, and installing it needs root on Debian or Ubuntu")
    with temporary_directory() as directory:
        server = SystemServer(directory / "server")
        server.create("fsync = off\n" + CRON_CONFIGURATION.format(cron_database="academy"))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def with_cron():
    """A server whose pg_cron lives in the very database of level_sync."""
    with own_server_with_cron() as server:
        with psycopg.connect(dsn_of(server, "postgres"), autocommit=True) as connection:
            connection.execute("create database academy")
        dsn = dsn_of(server, "academy")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create extension pg_cron")
            install.migrate(dsn)
            connection.execute("call level_sync.reconcile()")
            connection.execute("select level_sync.schedule()")
            wait_for_launcher(connection)
            yield dsn


def test_health_itself_judges_the_jobs_where_it_can_read_them(with_cron):
    with psycopg.connect(with_cron) as connection:
        assert {name: row for name, row in health(connection).items() if row[0] is not True} == {}
        for statement, name, detail in CRON_BREAKAGES.values():
            with connection.transaction(force_rollback=True):
                connection.execute(statement.replace("{database}", "academy"))
                red = {name: row for name, row in health(connection).items() if row[0] is not True}
                assert [name.split(":")[0] for name in red] == [name]
                assert detail in next(iter(red.values()))[1]
    assert exit_code(verify(with_cron)) == 0


def test_purge_deletes_old_runs_of_our_jobs_in_this_database_and_no_others(with_cron):
    with psycopg.connect(with_cron) as connection:
        connection.execute("select cron.schedule('nightly', '0 0 * * *', 'select 1')")
        connection.execute(
            "select cron.schedule_in_database('level_sync_elsewhere', '0 0 * * *', 'select 1', 'postgres')"
        )
        connection.execute(
            "insert into cron.job_run_details (jobid, runid, database, username, command, status, start_time, end_time)"
            " select jobid, nextval('cron.runid_seq'), database, username, command, 'succeeded', days.ago, days.ago"
            " from cron.job"
            " cross join (values (now() - '91 days'::interval), (now() - '89 days'::interval)) as days (ago)"
        )
        connection.execute("call level_sync.purge()")
        kept = connection.execute(
            "select jobname, count(*) from cron.job_run_details join cron.job using (jobid)"
            " where start_time < now() - '80 days'::interval group by 1 order by 1"
        ).fetchall()
        assert kept == [
            ("level_sync_elsewhere", 2),
            ("level_sync_maintain", 1),
            ("level_sync_reconcile", 1),
            ("nightly", 2),
        ]
        connection.rollback()


def test_launcher_that_is_gone_is_noticed(with_cron):
    """The server starts it again within seconds, so health is asked at once."""
    with psycopg.connect(with_cron, autocommit=True) as connection:
        seen = []
        for _ in range(100):
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where backend_type like 'pg_cron%'"
            )
            seen.append(health(connection)["cron_launcher"][:2])
            if seen[-1][0] is False:
                break
            time.sleep(0.02)
        assert seen[-1] == (False, "the pg_cron launcher is not seen")


def standby_of(primary_directory: str, directory: Path) -> SystemServer:
    standby = SystemServer(directory)
    directory.mkdir(mode=0o755)
    if os.geteuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
    source = ("--host=" + primary_directory, "--username=postgres", "--checkpoint=fast", "--no-sync")
    standby._run("pg_basebackup", "--write-recovery-conf", *source)
    with (directory / "data" / "postgresql.conf").open("a") as file:
        file.write(f"unix_socket_directories = '{directory}'\n")
    standby.start()
    return standby


def test_a_standby_is_as_green_as_its_primary(with_cron):
    """pg_cron runs on the primary only, and whether a run is at work is seen there."""
    primary_directory = psycopg.conninfo.conninfo_to_dict(with_cron)["host"]
    with temporary_directory() as directory, psycopg.connect(with_cron, autocommit=True) as primary:
        standby = standby_of(primary_directory, directory / "standby")
        try:
            with psycopg.connect(dsn_of(standby, "academy"), autocommit=True) as connection:
                assert connection.execute("select pg_is_in_recovery()").fetchone() == (True,)
                checks = health(connection)
                assert "cron_launcher" not in checks
                assert [name for name, (ok, _, _) in checks.items() if ok is not True] == []
                primary.execute(
                    "insert into level_sync.sync_log (status, dry_run, started_by, job_start, backend_pid)"
                    " values ('running', false, 'cron', now(), 1)"
                )
                assert health(primary)["running"][0] is False
                wait_until(lambda: "seen on the primary" in health(connection)["running"][1])
                assert health(connection)["running"][0] is True
        finally:
            standby.stop()
            primary.execute("delete from level_sync.sync_log where status = 'running'")


def test_of_two_runs_the_later_one_is_the_last_success(db):
    db.execute("call level_sync.reconcile()")
    db.execute("update level_sync.sync_log set job_start = job_start - interval '2 days'")
    assert health(db)["last_success"][0] is False
    db.execute("call level_sync.reconcile()")
    assert health(db)["last_success"][0] is True


def test_a_column_of_the_application_that_refers_to_users_too_is_none_of_our_business(database, healthy):
    healthy.execute("alter table user_licenses add column approved_by bigint references users (id)")
    assert health(healthy)["foreign_keys"][0] is True


def test_jobs_that_may_not_be_read_are_not_checked_and_not_called_good(with_cron):
    with psycopg.connect(with_cron) as connection:
        connection.execute("create role academy_owner")
        connection.execute("grant pg_read_all_settings to academy_owner")
        for function in ("_check_schedule()", "_cron_access()"):
            connection.execute(f"alter function level_sync.{function} owner to academy_owner")
        connection.execute("grant usage on schema level_sync to academy_owner")
        connection.execute("grant execute on all functions in schema level_sync to academy_owner")
        ok, detail, _ = health(connection)["schedule"]
        assert ok is None
        assert "not checked" in detail
        connection.rollback()


# verify


def test_installation_missing_is_said_plainly(empty_database):
    checks = verify(empty_database.dsn)
    assert [(check.name, check.ok) for check in checks] == [("installation", False)]
    assert exit_code(checks) == DRIFT


def everything(db) -> list[object]:
    tables = (PROGRESS, LICENSE, "level_sync.sync_events", "level_sync.sync_queue", "level_sync.pending_pairs")
    return [db.execute(f"select * from {table} order by 1, 2").fetchall() for table in tables]


@pytest.mark.parametrize("inline_limit", [32, 0], ids=["inline", "bulk"])
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
