"""docker/ without Docker: its configuration and scripts, run on the machine's own server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest

import internals
from academy import PATIENCE, wait_until
from command_line import run
from level_sync.monitor.watch import Channel, Message, Watch
from servers import Server, temporary_directory
from tree import DOCKER


@pytest.fixture(scope="module")
def container(version):
    """What the image's entry point does at the first start: a server with docker/postgresql.conf, then initdb.d."""
    with temporary_directory() as directory:
        server = Server(version, directory / "server")
        configuration = (DOCKER / "postgresql.conf").read_text()
        server.create(configuration + f"listen_addresses = ''\nunix_socket_directories = '{server.directory}'\n")
        try:
            with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
                connection.execute("create database academy")
            first_start(server)
            yield server
        finally:
            server.stop()


def script(server: Server, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{server.binaries}:/usr/bin:/bin",
        "POSTGRES_USER": "postgres",
        "POSTGRES_DB": "academy",
        "PGHOST": str(server.directory),
        "HOME": "/nonexistent",
        "MONITOR_PASSWORD": "it's a \\ secret",
    }
    return subprocess.run(["bash", path], env=environment, capture_output=True, text=True, check=False)


def first_start(server: Server) -> None:
    for path in sorted((DOCKER / "initdb.d").glob("*.sh")):
        done = script(server, path)
        assert done.returncode == 0, done.stderr


@pytest.mark.needs("pg_cron")
def test_first_start_installs_and_schedules_and_is_healthy(container):
    first_start(container)  # again is harmless
    with psycopg.connect(container.dsn("academy"), autocommit=True) as connection:
        assert connection.execute("select jobname from cron.job order by 1").fetchall() == [
            ("level_sync_maintain",),
            ("level_sync_reconcile",),
        ]
        healthy = script(container, DOCKER / "healthcheck")
        assert (healthy.returncode, healthy.stdout) == (0, "")
        connection.execute("select cron.unschedule('level_sync_reconcile')")
        sick = script(container, DOCKER / "healthcheck")
        assert sick.returncode == 1
        assert "the job is missing" in sick.stdout
        connection.execute("select level_sync.schedule()")
        connection.execute("alter table user_licenses disable trigger user")
        assert "is disabled" in script(container, DOCKER / "healthcheck").stdout
        connection.execute("alter table user_licenses enable trigger user")


@pytest.mark.needs("pg_cron")
def test_monitor_sees_every_check_although_it_may_not_look_into_the_schema_of_pg_cron(container, tmp_path):
    dsn = container.dsn("academy", "monitor")
    with psycopg.connect(container.dsn("academy"), autocommit=True) as connection:
        assert connection.execute("select has_schema_privilege('monitor', 'cron', 'usage')").fetchone() == (False,)
        connection.execute("call level_sync.reconcile()")
    monitored = run("metrics", "--dsn", dsn)
    assert (monitored.exit_code, monitored.stderr) == (0, "")
    for line in ("level_sync_up 1.0", 'level_sync_health_check_ok{check="orphans"} 1.0', "level_sync_desync_pairs{"):
        assert line in monitored.stdout
    assert "\nlevel_sync_scan_timestamp_seconds " in monitored.stdout
    checks = json.loads(run("verify", "--json", "--dsn", dsn).stdout)["checks"]
    assert [check for check in checks if check["ok"] is not True] == []
    assert {"schedule: level_sync_reconcile", "cron run: level_sync_maintain"} <= {check["name"] for check in checks}

    told: list[Message] = []
    watch = Watch(dsn, [Channel("test", "test", told.append)], interval=0.2, patience=0)
    stop = threading.Event()
    thread = threading.Thread(target=watch.run, args=[stop])
    with psycopg.connect(container.dsn("academy"), autocommit=True) as connection:
        internals.disable_trigger(connection)
        try:
            thread.start()
            wait_until(lambda: told)
        finally:
            internals.enable_trigger(connection)
            wait_until(lambda: len(told) > 1 or not thread.is_alive())
            stop.set()
            thread.join(PATIENCE)
    assert [message.subject.partition(": ")[2] for message in told] == ["RED triggers", "green again triggers"]


@pytest.mark.needs("pg_cron")
def test_maintenance_runs_as_an_owner_who_may_not_look_into_the_schema_of_pg_cron(container):
    with psycopg.connect(container.dsn("academy")) as connection:
        connection.execute("create role academy_owner")
        connection.execute("grant usage on schema level_sync to academy_owner")
        connection.execute("grant all on all tables in schema level_sync to academy_owner")
        connection.execute("grant execute on all functions in schema level_sync to academy_owner")
        internals.make_owner_of_the_purge(connection, "academy_owner")
        assert internals.purge_batch(connection) is not None
        connection.rollback()


@pytest.mark.needs("pg_cron")
def test_jobs_run_in_workers_of_the_server_so_that_no_password_is_needed(container):
    with psycopg.connect(container.dsn("postgres")) as connection:
        assert connection.execute("show cron.use_background_workers").fetchone() == ("on",)
        assert connection.execute("show cron.database_name").fetchone() == ("academy",)
        assert connection.execute("show shared_preload_libraries").fetchone() == ("pg_cron",)


def test_compose_has_a_volume_no_default_password_and_stays_on_this_machine():
    text = (DOCKER / "compose.yml").read_text()
    assert "POSTGRES_PASSWORD: ${POSTGRES_PASSWORD:?" in text
    assert "academy:/var/lib/postgresql" in text
    assert '"127.0.0.1:5432:5432"' in text


def test_monitoring_is_optional_and_its_parts_find_each_other():
    text = (DOCKER / "compose.yml").read_text()
    assert text.count("profiles: [monitoring]") == 3
    exporter = re.search(r'--listen, "0.0.0.0:(\d+)"', text)[1]
    configuration = (DOCKER / "prometheus" / "prometheus.yml").read_text()
    assert f'"exporter:{exporter}"' in configuration
    assert '"alertmanager:9093"' in configuration
    assert re.findall(r'- "([\d.]+):\d+:\d+"', text) == ["127.0.0.1"] * 3
    assert "'/opt/level_sync/source[metrics]'" in (DOCKER / "Dockerfile").read_text()


def test_monitor_can_be_made_after_the_first_start_as_the_header_says_and_the_exporter_is_not_root():
    text = (DOCKER / "compose.yml").read_text()
    assert re.search(r"exec --env MONITOR_PASSWORD=\.\.\. database (\S+)", text)[1] == (
        "/docker-entrypoint-initdb.d/20_monitor.sh"
    )
    assert (DOCKER / "initdb.d" / "20_monitor.sh").exists()
    exporter = text[text.index("\n  exporter:") : text.index("\n  prometheus:")]
    assert re.search(r'^    user: "(\d+):\d+"$', exporter, re.MULTILINE)[1] != "0"


def test_image_copies_what_exists_and_runs_the_scripts_that_are_there():
    text = (DOCKER / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (DOCKER.parent / source).exists(), source
    version = re.search(r"^FROM postgres:(\d+)", text, re.MULTILINE).group(1)
    assert f"postgresql-{version}-cron" in text
    assert "HEALTHCHECK" in text
    for path in (DOCKER / "healthcheck", *(DOCKER / "initdb.d").iterdir()):
        assert os.access(path, os.X_OK), path
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
