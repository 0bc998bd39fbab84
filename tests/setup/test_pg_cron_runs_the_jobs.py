"""The pg_cron jobs: made once, updated, removed, and seen to be run by pg_cron itself."""

from __future__ import annotations

import threading

import psycopg
import pytest

from academy import PROGRESS, add_pair, bypass, levels, set_level, wait_until
from level_sync.setup import install
from level_sync.setup import schedule as jobs
from level_sync.verify import exit_code, verify
from servers import CRON_CONFIGURATION, CRON_HOME, Server, temporary_directory

BAD_EXPRESSIONS = [
    "61 * * * *",
    "* 24 * * *",
    "* * 0 * *",
    "* * * 13 *",
    "* * * * 8",
    "5-1 * * * *",
    "*/0 * * * *",
    "x * * * *",
    "1,,2 * * * *",
]


def in_cron_home(db, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(host=db.info.host, user=db.info.user, dbname=CRON_HOME) as connection:
        return connection.execute(query, [db.info.dbname]).fetchall()


JOBS = "select schedule, command, active, jobid from cron.job where database = %s order by command"


@pytest.fixture
def elsewhere(database, db):
    """A database whose server has pg_cron in another one."""
    yield database
    jobs.unschedule(database.dsn)


@pytest.mark.needs("pg_cron")
def test_both_jobs_are_made_once_in_the_database_of_pg_cron(elsewhere, db):
    assert jobs.schedule(elsewhere.dsn) == ("0 */6 * * *", CRON_HOME)
    first = in_cron_home(db, JOBS)
    assert [row[:3] for row in first] == [
        ("* * * * *", "call level_sync.maintain()", True),
        ("0 */6 * * *", "call level_sync.reconcile(started_by => 'cron')", True),
    ]
    jobs.schedule(elsewhere.dsn)
    assert in_cron_home(db, JOBS) == first


@pytest.mark.needs("pg_cron")
def test_to_schedule_is_to_use_pg_cron(elsewhere, db):
    db.execute("update level_sync.settings set uses_pg_cron = false")
    jobs.schedule(elsewhere.dsn)
    assert db.execute("select uses_pg_cron from level_sync.settings").fetchone() == (True,)


@pytest.mark.needs("pg_cron")
def test_another_expression_updates_the_job_and_the_setting(elsewhere, db):
    jobs.schedule(elsewhere.dsn)
    before = in_cron_home(db, JOBS)
    jobs.schedule(elsewhere.dsn, "30 2 * * mon-fri")
    after = in_cron_home(db, JOBS)
    assert [row[3] for row in after] == [row[3] for row in before]
    assert after[1][0] == "30 2 * * mon-fri"
    assert db.execute("select schedule from level_sync.settings").fetchone() == ("30 2 * * mon-fri",)
    assert [check.detail for check in verify(elsewhere.dsn) if check.name.startswith("schedule") and not check.ok] == []


@pytest.mark.needs("pg_cron")
def test_unschedule_removes_both_and_only_ours(elsewhere, db):
    in_cron_home_do = psycopg.connect(host=db.info.host, user=db.info.user, dbname=CRON_HOME, autocommit=True)
    with in_cron_home_do as connection:
        connection.execute("select cron.schedule_in_database('nightly', '0 0 * * *', 'select 1', %s)", [db.info.dbname])
        jobs.schedule(elsewhere.dsn)
        assert jobs.unschedule(elsewhere.dsn) == 2
        assert [row[1] for row in in_cron_home(db, JOBS)] == ["select 1"]
        assert jobs.unschedule(elsewhere.dsn) == 0
        connection.execute("select cron.unschedule(jobid) from cron.job where jobname = 'nightly'")


@pytest.mark.needs("pg_cron")
def test_rollback_takes_the_jobs_along(elsewhere, db):
    jobs.schedule(elsewhere.dsn)
    install.rollback(elsewhere.dsn)
    assert in_cron_home(db, JOBS) == []
    install.migrate(elsewhere.dsn)


@pytest.mark.needs("pg_cron")
@pytest.mark.parametrize("expression", BAD_EXPRESSIONS)
def test_nonsense_is_refused_and_changes_nothing(elsewhere, db, expression):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="cron field"):
        jobs.schedule(elsewhere.dsn, expression)
    assert in_cron_home(db, JOBS) == []
    assert db.execute("select schedule from level_sync.settings").fetchone() == ("0 */6 * * *",)


@pytest.mark.needs("pg_cron")
@pytest.mark.parametrize("expression", ["* * * *", "* * * * * *", "@daily", "30 seconds", ""])
def test_an_expression_without_five_fields_is_refused(elsewhere, db, expression):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="is not a cron expression of five fields"):
        jobs.schedule(elsewhere.dsn, expression)
    assert in_cron_home(db, JOBS) == []


@pytest.mark.lacks("pg_cron")
def test_without_pg_cron_the_message_says_what_to_install_and_what_else_works(database, db):
    with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
        jobs.schedule(database.dsn)
    assert caught.value.diag.message_primary == "pg_cron is not installed in this database"
    for words in ("postgresql-NN-cron", "shared_preload_libraries", "level-sync reconcile", "systemd timer"):
        assert words in caught.value.diag.message_hint
    assert jobs.unschedule(database.dsn) == 0
    add_pair(db, 1, level=3)
    db.execute("call level_sync.maintain()")


@pytest.mark.needs("pg_cron")
def test_in_another_database_the_function_itself_says_where_pg_cron_is(elsewhere, db):
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="pg_cron lives in database cron_home") as caught:
        db.execute("select level_sync.schedule()")
    assert "level-sync schedule" in caught.value.diag.message_hint


# pg_cron itself at work: a real minute is waited for


def see_pg_cron_run(version: int, background_workers: bool, failures: list[BaseException]) -> None:
    """Schedules every minute, plants a desync, sees it repaired by the job; again after a restart of the server."""
    try:
        with temporary_directory() as directory:
            server = Server(version, directory / "server")
            configuration = CRON_CONFIGURATION.format(cron_database="academy")
            if not background_workers:
                configuration = (
                    configuration.replace("workers = on", "workers = off") + f"cron.host = '{server.directory}'\n"
                )
            server.create(configuration)
            try:
                _see_pg_cron_run(server)
            finally:
                server.stop()
    except BaseException as error:
        failures.append(error)


def _see_pg_cron_run(server: Server) -> None:
    dsn = server.dsn("academy")
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute("create database academy")
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("create extension pg_cron")
        install.migrate(dsn)
        db.execute("update level_sync.settings set batch_size = 1")
        for user in (1, 2, 3):
            add_pair(db, user, level=3)
        assert db.execute("select level_sync.schedule('* * * * *')").fetchone()[0].keys() == {
            "level_sync_reconcile",
            "level_sync_maintain",
            "schedule",
        }
        break_pairs(db)
        wait_until(lambda: repaired_by_cron(db))
        assert [levels(db, user) for user in (1, 2, 3)] == [(6, 6)] * 3
        transactions = db.execute(
            "select count(distinct transaction_id::text) from level_sync.sync_events where source = 'reconcile'"
        ).fetchone()
        assert transactions == (3,)  # batch_size is 1: it commits under pg_cron too
        # The one of the two jobs that found nothing left may be at work still, and would be cut off.
        wait_until(lambda: both_jobs_ended(db))
    server.halt()
    server.start()
    with psycopg.connect(dsn, autocommit=True) as db:
        before = db.execute("select max(run_id) from level_sync.sync_log").fetchone()[0]
        break_pairs(db)
        wait_until(lambda: repaired_by_cron(db, before))
        wait_until(lambda: exit_code(verify(dsn)) == 0)
        ended = "select command, return_message from cron.job_run_details where end_time is not null and status "
        assert db.execute(ended + "<> 'succeeded'").fetchall() == []
        assert db.execute(ended + "= 'succeeded'").fetchall()


def break_pairs(db) -> None:
    with bypass(db):
        db.execute("update user_licenses set max_achieved_level = 8")
        for user in (1, 2, 3):
            set_level(db, PROGRESS, user, 6)
            db.execute("update user_licenses set current_level = 4 where user_id = %s", [user])


def repaired_by_cron(db, after: int = 0) -> bool:
    return bool(
        db.execute(
            "select from level_sync.sync_log where run_id > %s and started_by in ('cron', 'catch_up')"
            " and status = 'success' and synced_count = 3",
            [after],
        ).fetchall()
    )


def both_jobs_ended(db) -> bool:
    [(ended,)] = db.execute(
        "select count(*) % 2 = 0 and bool_and(end_time is not null) from cron.job_run_details"
    ).fetchall()
    return bool(ended)


@pytest.mark.long
@pytest.mark.needs("pg_cron")
def test_pg_cron_runs_the_job_in_both_of_its_ways_and_after_a_restart(version):
    failures: list[BaseException] = []
    ways = [threading.Thread(target=see_pg_cron_run, args=[version, workers, failures]) for workers in (True, False)]
    for way in ways:
        way.start()
    for way in ways:
        way.join()
    assert failures == []
