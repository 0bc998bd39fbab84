"""The databases of the tests: each test has its own, a copy of a template with level_sync in it, on a running server.

pytest-postgresql makes the templates, one on each server, and makes and drops the copies. What it does not know is
checked here when a test ends: nothing of it is left open, every pair is equal, and nothing waits in a queue.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pytest_postgresql import factories
from pytest_postgresql.janitor import DatabaseJanitor

import internals
from academy import Connection, wait_until
from internals import PENDING_COMMITS, PENDING_PAIRS
from level_sync.setup import install
from servers import VERSIONS, Server, running_server

_numbers = itertools.count(1)


def fixture_of_server(version: int) -> Any:
    @pytest.fixture(scope="session", name=f"server_{version}")
    def server_of_all_tests() -> Iterator[Server]:
        with (
            running_server(version) as server,
            psycopg.connect(server.dsn("postgres"), autocommit=True) as server.admin,
        ):
            yield server

    return server_of_all_tests


def migrate(*, host: str, user: str, dbname: str, **_: Any) -> None:
    install.migrate(f"host={host} user={user} dbname={dbname}")


server_15, server_16, server_17, server_18 = map(fixture_of_server, VERSIONS)
postgresql_15 = factories.postgresql_noproc(dbname="level_sync", load=[migrate], depends_on="server_15")
postgresql_16 = factories.postgresql_noproc(dbname="level_sync", load=[migrate], depends_on="server_16")
postgresql_17 = factories.postgresql_noproc(dbname="level_sync", load=[migrate], depends_on="server_17")
postgresql_18 = factories.postgresql_noproc(dbname="level_sync", load=[migrate], depends_on="server_18")


@pytest.fixture(scope="session")
def version(request: pytest.FixtureRequest) -> int:
    """The PostgreSQL that the test is run on; versions.py chooses it."""
    chosen: int = request.param
    return chosen


@pytest.fixture(scope="session")
def server(version: int, request: pytest.FixtureRequest) -> Server:
    """A running server, the same for all tests of this version."""
    found: Server = request.getfixturevalue(f"server_{version}")
    return found


@pytest.fixture(scope="session")
def template(version: int, request: pytest.FixtureRequest) -> str:
    """The name of the server's database that has level_sync in it and that nobody writes to."""
    name: str = request.getfixturevalue(f"postgresql_{version}").template_dbname
    return name


@pytest.fixture
def own_server(version: int) -> Iterator[Server]:
    """A server of this test's own, without a database, which the test may stop, freeze or kill."""
    with running_server(version) as server:
        yield server


@pytest.fixture
def own_migrated_server(own_server: Server) -> Server:
    """The same with level_sync in its database postgres."""
    install.migrate(own_server.dsn("postgres"))
    return own_server


@dataclass
class Database:
    """A test's own database. Connections made with connect() are closed when the test ends."""

    server: Server
    name: str
    _connections: ExitStack = field(default_factory=ExitStack)

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)

    def connect(self, user: str = "postgres", *, autocommit: bool = True, **options: Any) -> Connection:
        """Opens one more session; rows are tuples."""
        connection = psycopg.connect(self.server.dsn(self.name, user), autocommit=autocommit, **options)
        return self._connections.enter_context(closing(connection))

    def close(self) -> None:
        """What is open is rolled back, not kept."""
        self._connections.close()


class Janitor(DatabaseJanitor):
    """Is quick: it keeps one session for all it does, and copies the template's files instead of writing each page of
    them to the WAL."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(host=server.host, port=server.port, user=server.user, **options)
        self.admin = server.admin

    @contextmanager
    def cursor(self, dbname: str | None = None) -> Iterator[psycopg.Cursor[Any]]:
        with self.admin.cursor() as cursor:
            yield cursor

    def _build_create_database_sql(self) -> sql.Composed:
        return super()._build_create_database_sql() + sql.SQL(" strategy file_copy")


@contextmanager
def copy_of(server: Server, template: str) -> Iterator[Database]:
    """A new database that is gone when the block ends. Fails where it was left open."""
    name = f"test_{next(_numbers)}"
    with Janitor(server, dbname=name, template_dbname=template):
        database = Database(server, name)
        try:
            yield database
        finally:
            database.close()
            prepared = roll_back_prepared(database)
        assert prepared == [], "a prepared transaction was left behind"
        wait_until(lambda: sessions(database) == [], lambda: f"sessions were left open: {sessions(database)}")


def roll_back_prepared(database: Database) -> list[str]:
    """No database is dropped while it has prepared transactions. Gives their names."""
    prepared = "select gid from pg_prepared_xacts where database = %s"
    found = database.server.admin.execute(prepared, [database.name]).fetchall()
    names = [gid for (gid,) in found]
    if names:
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            for gid in names:
                connection.execute(sql.SQL("rollback prepared {}").format(sql.Literal(gid)))
    return names


def sessions(database: Database) -> list[tuple[Any, ...]]:
    """Of clients; one needs a moment to notice that its client is gone."""
    of_clients = "select pid, state, query from pg_stat_activity where datname = %s and backend_type = 'client backend'"
    return database.server.admin.execute(of_clients, [database.name]).fetchall()


@pytest.fixture
def database(server: Server, template: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database of this test's own. At the end all pairs must be equal and nothing may wait in a queue."""
    with copy_of(server, template) as database:
        yield database
        database.close()
        if request.node.get_closest_marker("leftovers") is None:
            assert_in_step(database.connect())


@pytest.fixture
def another_database(server: Server, template: str) -> Iterator[Database]:
    """A second migrated database beside the test's own, a copy of the same template."""
    with copy_of(server, template) as database:
        yield database


@pytest.fixture
def empty_database(server: Server) -> Iterator[Database]:
    """An empty database of this test's own."""
    with copy_of(server, "template0") as database:
        yield database


def assert_in_step(connection: Connection) -> None:
    for relation in ("level_sync.desync_issues", "level_sync.sync_queue", PENDING_PAIRS, PENDING_COMMITS):
        assert connection.execute(f"select * from {relation} limit 5").fetchall() == [], relation


@pytest.fixture
def db(database: Database) -> Connection:
    """A superuser's autocommit session in this test's database; rows are tuples."""
    return database.connect()


@pytest.fixture
def users(db: Connection) -> Callable[[int], None]:
    """users(n) adds the users 1 to n."""

    def add(count: int) -> None:
        db.execute("insert into users (id, name) select n, 'user ' || n from generate_series(1, %s) as n", [count])

    return add


@contextmanager
def new_role(db: Connection, name: str) -> Iterator[str]:
    """A role that may log in and nothing else, gone when the block ends."""
    db.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
    yield name
    db.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
    db.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def role(database: Database, db: Connection) -> Iterator[str]:
    """A role of the application that may log in and nothing else."""
    with new_role(db, f"app_{database.name}") as name:
        yield name


@pytest.fixture
def reader(database: Database, db: Connection) -> Iterator[str]:
    """A dsn of a role that may only read, in a session that may not write."""
    with new_role(db, f"reader_of_{database.name}") as name:
        internals.grant(db, name)
        yield database.server.dsn(database.name, name) + " options='-c default_transaction_read_only=on'"
