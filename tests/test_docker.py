"""docker/ without Docker: its configuration and scripts, run on the machine's own server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from command_line import run
from conftest import dsn_of, temporary_directory
from level_sync.servers import SystemServer, has_extension, system_binaries

DOCKER = Path(__file__).resolve().parent.parent / "docker"


@pytest.fixture(scope="module")
def container():
    """What the image's entry point does at the first start: a server with docker/postgresql.conf, then initdb.d."""
    binaries = system_binaries()
    if binaries is None or not has_extension(binaries, "pg_cron"):
        pytest.skip("no pg_cron from system packages here, and installing it needs root on Debian or Ubuntu")
    with temporary_directory() as directory:
        server = SystemServer(directory / "server")
        configuration = (DOCKER / "postgresql.conf").read_text()
        server.create(
            configuration + f"listen_addresses = ''\nunix_socket_directories = '{server.directory}'\nfsync = off\n"
        )
        try:
            with psycopg.connect(dsn_of(server, "postgres"), autocommit=True) as connection:
                connection.execute("create database academy")
            yield server
        finally:
            server.stop()


def script(server: SystemServer, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{server.binaries}:/usr/bin:/bin",
        "POSTGRES_USER": "postgres",
        "POSTGRES_DB": "academy",
        "PGHOST": str(server.directory),
        "HOME": "/nonexistent",
        "MONITOR_PASSWORD": "it's a \\ secret",
    }
    return subprocess.run(["bash", path], env=environment, capture_output=True, text=True, check=False)


def test_first_start_installs_and_schedules_and_is_healthy(container):
    for _ in range(2):  # again is harmless
        for path in sorted((DOCKER / "initdb.d").glob("*.sh")):
            done = script(container, path)
            assert done.returncode == 0, done.stderr
    with psycopg.connect(dsn_of(container, "academy"), autocommit=True) as connection:
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
    monitored = run("metrics", "--dsn", dsn_of(container, "academy", "monitor"))
    assert monitored.exit_code == 0
    assert "level_sync_up 1.0" in monitored.stdout


def test_jobs_run_in_workers_of_the_server_so_that_no_password_is_needed(container):
    with psycopg.connect(dsn_of(container, "postgres")) as connection:
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
