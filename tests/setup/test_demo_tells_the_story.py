"""The demo as a newcomer types it: it starts a server, tells the story, stays up for a look, and is stopped again."""

from __future__ import annotations

import os
import re
import subprocess
import time

import psycopg
import pytest

from servers import temporary_directory
from tree import LEVEL_SYNC


@pytest.fixture
def run():
    """run(arguments) calls level-sync with a temporary directory of its own, in which the demo's server lives."""
    with temporary_directory() as directory:
        directory.chmod(0o1777)

        def call(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "TMPDIR": str(directory), "COLUMNS": "120"}
            return subprocess.run(
                [LEVEL_SYNC, *arguments], env=environment, input=stdin, capture_output=True, text=True, check=False
            )

        yield call
        call("demo", "--stop")


def test_demo_runs_again_and_again_stays_up_and_stops(run):
    before = run("demo", "--stop")
    assert (before.returncode, before.stdout) == (0, "No demo is running.\n")
    for _ in range(2):
        start = time.monotonic()
        shown = run("demo")
        assert shown.returncode == 0, shown.stderr
        assert time.monotonic() - start < 300  # ten, where nothing else runs
    parts = (
        "XP brings a level-up",
        "An admin advances the license",
        "A whole year is promoted at once",
        "A level that does not exist is refused",
        "sync_queue",
        "session_replication_role",
        "level_sync.reconcile",
        "make stop",
    )
    assert [part for part in parts if part not in shown.stdout] == []
    dsn = re.search(r"'(host=\S+ dbname=academy user=postgres)'", shown.stdout).group(1)
    assert f'export DATABASE_URL="{dsn}"' in shown.stdout
    verified = run("verify", "--dsn", dsn)
    assert "desync" in verified.stdout
    looked = run("demo", "--psql", stdin="update user_licenses set current_level = 3 where user_id = 20001;\n")
    assert "UPDATE 1" in looked.stdout
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select count(*) > 10000 from specialization_progress").fetchone() == (True,)
        assert connection.execute("select * from level_sync.desync_issues").fetchall() == []
    stopped = run("demo", "--stop")
    assert stopped.stdout == "The demo's server is gone.\n"
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


@pytest.mark.long
@pytest.mark.needs("pg_cron")
@pytest.mark.usefixtures("version")
def test_demo_on_the_machines_own_server_shows_pg_cron_running_the_job(run):
    shown = run("demo", "--server", "system")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"\bcron\b.*success|success.*\bcron\b", shown.stdout)


@pytest.mark.leftovers
def test_demo_in_a_given_database_refuses_one_that_is_not_empty(server, database, empty_database, run):
    refused = run("demo", "--dsn", database.dsn)
    assert refused.returncode == 1
    assert "this database is not empty" in " ".join(refused.stderr.split())
    told = run("demo", "--dsn", server.dsn(empty_database.name))
    assert told.returncode == 0, told.stderr
    again = run("demo", "--dsn", empty_database.dsn)
    assert again.returncode == 1
