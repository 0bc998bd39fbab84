"""Each way in which pg_cron can silently stop running our jobs is noticed, wherever pg_cron lives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.types.json import Jsonb

import internals
from academy import health, wait_until
from command_line import run
from level_sync.setup import install, schedule
from level_sync.verify import SCHEDULE, Check, exit_code, verify
from servers import CRON_CONFIGURATION, CRON_HOME, Server, temporary_directory, wait_for_launcher

pytestmark = pytest.mark.leftovers


@pytest.fixture
def scheduled(database, healthy):
    """With its jobs in the database of pg_cron."""
    schedule.schedule(database.dsn)
    yield healthy
    schedule.unschedule(database.dsn)


def test_of_jobs_with_our_names_those_of_this_database_and_active_ones_are_judged(db):
    """Two databases share one pg_cron, and somebody has made a second job and switched it off."""
    here = db.info.dbname
    jobs = [
        {
            **{"jobid": jobid, "jobname": name + suffix, "schedule": schedule, "command": command},
            **{"database": database, "username": "postgres", "active": active, "last_run": last_run},
        }
        for name, schedule, command in internals.wanted_cron_jobs(db)
        for jobid, suffix, database, active, last_run in [
            (1, "", "another", True, {"status": "failed", "start_time": None}),
            (2, "", here, False, None),
            (3, f"_{here}", here, True, {"status": "succeeded", "start_time": "2026-01-01T00:00:00Z"}),
            (4, "", here, False, None),
            (5, "", "another", False, None),
        ]
    ]
    judged = internals.checks_of_cron_jobs(db, Jsonb(jobs))
    assert [ok for _, ok, _ in judged] == [True] * 4
    assert all(detail.startswith("job 3 at") for name, _, detail in judged if name.startswith("schedule"))
    for job in jobs:
        job["active"] = False
    judged = internals.checks_of_cron_jobs(db, Jsonb(jobs))
    assert {detail for name, _, detail in judged if name.startswith("schedule")} == {"the job is not active"}


def cron(scheduled, statement: str) -> None:
    info = scheduled.info
    with psycopg.connect(host=info.host, user=info.user, dbname=CRON_HOME, autocommit=True) as connection:
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


def verify_beside_its_launcher(dsn: str) -> list[Check]:
    """pg_cron's launcher is gone for a moment after a role that has a job was dropped, also by another test."""
    checks: list[Check] = []

    def is_there() -> bool:
        checks[:] = verify(dsn)
        return all(check.ok for check in checks if check.name == "cron_launcher")

    wait_until(is_there)
    return checks


@pytest.mark.needs("pg_cron")
@pytest.mark.parametrize("breakage", CRON_BREAKAGES)
def test_job_that_silently_stopped_is_named_by_verify(database, scheduled, breakage):
    before = verify_beside_its_launcher(database.dsn)
    assert [check for check in before if check.ok is not True] == []
    assert exit_code(before) == 0
    statement, name, detail = CRON_BREAKAGES[breakage]
    try:
        cron(scheduled, statement)
        red = [check for check in verify_beside_its_launcher(database.dsn) if check.ok is not True]
        assert [check.name.split(":")[0] for check in red] == [name]
        assert detail in red[0].detail
        assert exit_code(red) == SCHEDULE
    finally:
        cron(scheduled, "delete from cron.job where database = 'postgres'")
        cron(scheduled, "delete from cron.job_run_details where database = '{database}'")


@pytest.mark.needs("pg_cron")
def test_a_reader_sees_the_jobs_of_another_database_once_a_superuser_has_let_it(database, scheduled):
    """pg_cron shows each role its own jobs only: what is not seen is not called missing."""
    role = f"On-Call of {database.name}"
    scheduled.execute(f'create role "{role}" login')
    internals.grant(scheduled, role)
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


@pytest.mark.needs("pg_cron")
def test_pg_cron_that_is_preloaded_without_its_extension_is_told_as_that(version):
    with own_server_with_cron(version) as server:
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
            connection.execute("create database academy")
        here, elsewhere = server.dsn("academy"), server.dsn("postgres")
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
def own_server_with_cron(version: int) -> Iterator[Server]:
    """A server that preloads pg_cron for the database academy, which is not there yet."""
    with temporary_directory() as directory:
        server = Server(version, directory / "server")
        server.create(CRON_CONFIGURATION.format(cron_database="academy"))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def with_cron(version):
    """A server whose pg_cron lives in the very database of level_sync."""
    with own_server_with_cron(version) as server:
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
            connection.execute("create database academy")
        dsn = server.dsn("academy")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create extension pg_cron")
            install.migrate(dsn)
            connection.execute("call level_sync.reconcile()")
            connection.execute("select level_sync.schedule()")
            wait_for_launcher(connection)
            yield dsn


@pytest.mark.needs("pg_cron")
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


@pytest.mark.needs("pg_cron")
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


@pytest.mark.needs("pg_cron")
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


def standby_of(primary_directory: str, version: int, directory: Path) -> Server:
    standby = Server(version, directory)
    standby.make_directory()
    source = ("--host=" + primary_directory, "--username=postgres", "--checkpoint=fast", "--no-sync")
    standby.run("pg_basebackup", "--write-recovery-conf", *source)
    standby.configure(f"unix_socket_directories = '{directory}'\n")
    standby.start()
    return standby


@pytest.mark.needs("pg_cron")
def test_a_standby_is_as_green_as_its_primary(version, with_cron):
    """pg_cron runs on the primary only, and whether a run is at work is seen there."""
    primary_directory = psycopg.conninfo.conninfo_to_dict(with_cron)["host"]
    with temporary_directory() as directory, psycopg.connect(with_cron, autocommit=True) as primary:
        standby = standby_of(primary_directory, version, directory / "standby")
        try:
            with psycopg.connect(standby.dsn("academy"), autocommit=True) as connection:
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


@pytest.mark.needs("pg_cron")
def test_jobs_that_may_not_be_read_are_not_checked_and_not_called_good(with_cron):
    with psycopg.connect(with_cron) as connection:
        connection.execute("create role academy_owner")
        connection.execute("grant pg_read_all_settings to academy_owner")
        internals.make_owner_of_the_look_at_the_schedule(connection, "academy_owner")
        connection.execute("grant usage on schema level_sync to academy_owner")
        connection.execute("grant execute on all functions in schema level_sync to academy_owner")
        ok, detail, _ = health(connection)["schedule"]
        assert ok is None
        assert "not checked" in detail
        connection.rollback()
