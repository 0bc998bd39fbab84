"""Every test gets a database of its own, cloned from a migrated template, on each of the servers."""

from __future__ import annotations

import asyncio
import email
import itertools
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiosmtpd.controller import Controller
from psycopg import sql

from level_sync import install
from level_sync.servers import (
    CRON_CONFIGURATION,
    EMBEDDED_VERSION,
    EmbeddedServer,
    SystemServer,
    dsn_of,
    has_extension,
    system_binaries,
)

Server = SystemServer | EmbeddedServer

TEMPLATE = "migrated_template"
CONFIGURATION = """
fsync = off
max_connections = 100
max_prepared_transactions = 10
max_wal_size = 256MB
statement_timeout = 5min
track_functions = all
log_min_messages = warning
"""
ROOM_IN_MEMORY = 8 * 2**30
PROGRESS_INTERVAL = 10  # seconds
_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", action="store_true", help="Run the long versions: more rows, more time. make proof.")
    parser.addoption(
        "--embedded-version",
        type=int,
        default=EMBEDDED_VERSION,
        help="PostgreSQL of the tests on the embedded server: 16 or 18.",
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests measured: record_property("figure", "...")."""
    figures = [
        f"{report.nodeid}: {value}"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(figures))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leftovers: this test leaves a desync, a queued pair or a changed schema behind on purpose"
    )
    config.addinivalue_line(
        "markers",
        "servers(kind, ...): this test is run on these of system and embedded, because the others say the same",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the servers that a test has not asked for."""
    kept, left_out = [], []
    for item in items:
        marker = item.get_closest_marker("servers")
        kind = getattr(item, "callspec", None) and item.callspec.params.get("server")  # type: ignore[attr-defined]
        (left_out if marker and kind and kind not in marker.args else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def start_server(kind: str, directory: Path, embedded_version: int = EMBEDDED_VERSION) -> Server:
    """A new server in the directory, which must not exist; skips where its packages are missing and cannot be got."""
    if kind == "embedded":
        embedded = EmbeddedServer(directory, embedded_version)
        embedded.create(CONFIGURATION)
        return embedded
    if system_binaries() is None:
        if os.geteuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail("PostgreSQL's packages are missing: run tests/install_server_packages first")
        pytest.skip("no PostgreSQL from system packages here, and installing it needs root on Debian or Ubuntu")
    system = SystemServer(directory)
    if not has_extension(system.binaries, "pg_cron"):
        system.create(CONFIGURATION)
        return system
    # pg_cron lives in a database of its own, as on managed services.
    system.create(CONFIGURATION + CRON_CONFIGURATION.format(cron_database="cron_home"))
    with psycopg.connect(dsn_of(system, "postgres"), autocommit=True) as connection:
        connection.execute("create database cron_home")
    with psycopg.connect(dsn_of(system, "cron_home"), autocommit=True) as connection:
        connection.execute("create extension pg_cron")
        wait_for_launcher(connection)
    return system


def wait_for_launcher(connection: psycopg.Connection[Any]) -> None:
    """pg_cron's launcher looks for its database again each second."""
    deadline = time.monotonic() + 20
    while not connection.execute("select from pg_stat_activity where backend_type like 'pg_cron%'").fetchall():
        assert time.monotonic() < deadline, "pg_cron's launcher does not come up"
        time.sleep(0.1)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory that the server's own user can reach; in memory where there is room, since each test's database is
    hundreds of small files."""
    memory = Path("/dev/shm")  # noqa: S108
    parent = memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM_IN_MEMORY else None
    with tempfile.TemporaryDirectory(prefix="level_sync_test_", dir=parent, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture(scope="session", params=["system", "embedded"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running server: Debian's PostgreSQL, then the embedded one. It has a migrated template database."""
    with temporary_directory() as parent:
        server = start_server(request.param, parent / "server", request.config.getoption("embedded_version"))
        try:
            with psycopg.connect(dsn_of(server, "postgres"), autocommit=True) as connection:
                if isinstance(server, EmbeddedServer):
                    assert connection.info.server_version // 10_000 == server.version
                connection.execute(f"create database {TEMPLATE}")
            install.migrate(dsn_of(server, TEMPLATE))
            yield server
        finally:
            server.stop()


@dataclass
class Database:
    """A test's own database. Connections made with connect() are closed when the test ends."""

    server: Server
    name: str
    _connections: ExitStack = field(default_factory=ExitStack)

    @property
    def dsn(self) -> str:
        return dsn_of(self.server, self.name)

    def connect(self, user: str = "postgres", *, autocommit: bool = True, **options: Any) -> psycopg.Connection[Any]:
        """Opens one more session; rows are tuples."""
        connection = psycopg.connect(dsn_of(self.server, self.name, user), autocommit=autocommit, **options)
        return self._connections.enter_context(_Closing(connection))

    def close(self) -> None:
        self._connections.close()


class _Closing:
    """Closes without committing: what a test left open is rolled back, not kept."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    def __enter__(self) -> psycopg.Connection[Any]:
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def _clone(server: Server, template: str | None, encoding: str | None = None) -> Iterator[Database]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(dsn_of(server, "postgres"), autocommit=True) as admin:
        clone = sql.SQL("create database {} template {}").format(
            sql.Identifier(name), sql.Identifier(template or "template0")
        )
        if encoding is not None:
            clone += sql.SQL(" encoding {} lc_collate 'C' lc_ctype 'C'").format(sql.Literal(encoding))
        admin.execute(clone)
        database = Database(server, name)
        try:
            yield database
            database.close()
            _assert_nothing_is_left_open(admin, name)
        finally:
            database.close()
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _assert_nothing_is_left_open(admin: psycopg.Connection[Any], name: str) -> None:
    prepared = admin.execute("select gid from pg_prepared_xacts where database = %s", [name]).fetchall()
    for (gid,) in prepared:
        with psycopg.connect(admin.info.dsn, dbname=name, autocommit=True) as connection:
            connection.execute(sql.SQL("rollback prepared {}").format(sql.Literal(gid)))
    assert prepared == [], "a prepared transaction was left behind"
    sessions: list[Any] = []
    for _ in range(50):
        sessions = admin.execute(
            "select pid, state, query from pg_stat_activity where datname = %s and backend_type = 'client backend'",
            [name],
        ).fetchall()
        if not sessions:
            return
        time.sleep(0.1)  # a backend needs a moment to notice that its client is gone
    pytest.fail(f"sessions were left open: {sessions}")


@pytest.fixture
def database(server: Server, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database of this test's own. At the end all pairs must be equal and nothing may wait in a queue."""
    for database in _clone(server, TEMPLATE):
        yield database
        database.close()
        if request.node.get_closest_marker("leftovers") is None:
            _assert_in_step(database.connect())


@pytest.fixture
def another_database(server: Server) -> Iterator[Database]:
    """A second migrated database beside the test's own, a copy of the same template."""
    yield from _clone(server, TEMPLATE)


@pytest.fixture
def empty_database(server: Server) -> Iterator[Database]:
    """An empty database of this test's own."""
    yield from _clone(server, None)


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def empty_database_not_in_utf8(server: Server, request: pytest.FixtureRequest) -> Iterator[Database]:
    yield from _clone(server, None, request.param)


def _assert_in_step(connection: psycopg.Connection[Any]) -> None:
    assert connection.execute("select * from level_sync.desync_issues limit 5").fetchall() == []
    assert connection.execute("select * from level_sync.sync_queue limit 5").fetchall() == []
    assert connection.execute("select * from level_sync.pending_pairs limit 5").fetchall() == []
    assert connection.execute("select * from level_sync.pending_commits limit 5").fetchall() == []


@pytest.fixture
def db(database: Database) -> psycopg.Connection[Any]:
    """A superuser's autocommit session in this test's database; rows are tuples."""
    return database.connect()


@pytest.fixture
def users(db: psycopg.Connection[Any]) -> Callable[[int], None]:
    """users(n) adds the users 1 to n."""

    def add(count: int) -> None:
        db.execute("insert into users (id, name) select n, 'user ' || n from generate_series(1, %s) as n", [count])

    return add


@pytest.fixture
def progress(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """progress("3 of 200 kills") is seen while the test runs: in the long versions, every 10 seconds at most."""
    is_long = request.config.getoption("proof")
    told_at = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told_at
        if is_long and time.monotonic() - told_at >= PROGRESS_INTERVAL:
            told_at = time.monotonic()
            with capsys.disabled():
                print(f"\n  {text}", end="", flush=True, file=sys.stderr)  # of a worker, stdout is not seen

    return tell


class Mailbox:
    """What a local SMTP server has received."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.messages.append(email.message_from_bytes(envelope.content))
        return "250 Message accepted for delivery"

    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for message in self.messages]


@pytest.fixture
def mailbox() -> Iterator[tuple[Mailbox, int]]:
    """A mailbox and the port its server listens on."""
    box = Mailbox()
    port = free_port()
    controller = Controller(box, hostname="127.0.0.1", port=port, loop=asyncio.new_event_loop())
    controller.start()
    try:
        yield box, port
    finally:
        controller.stop()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def reader(database: Database, db: psycopg.Connection[Any]) -> Iterator[str]:
    """A dsn of a role that may only read, in a session that may not write."""
    role = f"reader_of_{database.name}"
    db.execute(f"create role {role} login")
    db.execute("select level_sync._grant_to(%s, 'reader')", [role])
    yield dsn_of(database.server, database.name, role) + " options='-c default_transaction_read_only=on'"
    db.execute("drop owned by " + role)
    db.execute("drop role " + role)
