"""Installs level_sync into a database and takes it away again.

State (tables, constraints) is versioned in migrations/ and applied by yoyo; code (functions, triggers, views) stands in
sql/ and is loaded whole each time. Both stand beside this package in a wheel, and at the top of the source tree.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import yoyo
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI
from yoyo.exceptions import LockTimeout

from level_sync.check import inspection
from level_sync.database import connect, queries, read_dsn
from level_sync.schedule import unschedule

logger = logging.getLogger(__name__)
LOCK_TIMEOUT = "100ms"  # how long one try of a step may make writers queue behind it
LOCK_TRIES = 200

ORPHANS_GO_BEFORE = "0005_restrict_orphans"
DUPLICATES_GO_BEFORE = "0009_make_pairs_unique"


class MigrateError(Exception):
    """Migrate or rollback could not finish; the message says why and what to do."""


def shipped(name: str) -> Path:
    """Folder of shipped SQL, `sql` or `migrations`: inside an installed wheel or at the top of the source tree."""
    here = Path(__file__).resolve().parent
    inside_wheel = here / name
    return inside_wheel if inside_wheel.is_dir() else here.parents[1] / name


def load_code(connection: psycopg.Connection[Any]) -> None:
    """Loads every file of sql/ in order: in the transaction the caller has open, or in one of its own."""
    with connection.transaction():
        queries.resolve_nothing_but_pg_catalog(connection)
        for file in sorted(shipped("sql").glob("*.sql")):
            connection.execute(file.read_bytes())


def _log_warning(notice: psycopg.errors.Diagnostic) -> None:
    if notice.sqlstate == "01000":  # what a migration raises, and none of PostgreSQL's own
        logger.warning("%s", notice.message_primary)


class LevelSyncBackend(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """yoyo's psycopg 3 backend (`postgresql+psycopg://`) with its bookkeeping in schema level_sync.

    Its lock is an advisory lock of the session, so a run that was killed leaves no lock to break.
    """

    _is_locked: bool

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[Any]:
        # An empty name would be taken for the user's name; without one libpq reads PGDATABASE.
        connection: psycopg.Connection[Any] = super().connect(dburi._replace(database=dburi.database or None))
        queries.limit_lock_wait(connection, lock_timeout=LOCK_TIMEOUT)
        connection.add_notice_handler(_log_warning)
        return connection

    def init_connection(self, connection: psycopg.Connection[Any]) -> None:
        queries.use_only_our_schema(connection)

    def init_database(self) -> None:
        with self.lock():
            if not queries.has_schema(self.connection):
                queries.create_schema(self.connection)

    @contextlib.contextmanager
    def lock(self, timeout: float = 10) -> Iterator[None]:
        """One migrate at a time; another one waits up to `timeout` seconds, then raises LockTimeout."""
        if self._is_locked:
            yield
            return
        deadline = time.monotonic() + timeout
        while not queries.try_migrate_lock(self.connection):
            if time.monotonic() > deadline:
                raise LockTimeout("another migrate or rollback is at work in this database")
            time.sleep(0.1)
        self._is_locked = True
        try:
            yield
        finally:
            self._is_locked = False
            queries.release_migrate_lock(self.connection)


@contextlib.contextmanager
def _locked_backend(dsn: str) -> Iterator[LevelSyncBackend]:
    uri = DatabaseURI("postgresql+levelsync", None, None, None, None, None, read_dsn(dsn))
    try:
        with LevelSyncBackend(uri, yoyo.default_migration_table) as backend:
            backend.init_database()
            if refusal := queries.refusal_of_our_schema(backend.connection):
                raise MigrateError(refusal)
            with backend.lock():
                yield backend
    except LockTimeout as error:
        raise MigrateError(f"{error}; wait for it, then run this again") from error


def _patiently(step: Callable[[], None]) -> None:
    """Tries a step again while live traffic holds the locks it needs; each try blocks writers LOCK_TIMEOUT at most."""
    for tried in range(1, LOCK_TRIES + 1):
        try:
            step()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            if tried == LOCK_TRIES:
                raise MigrateError(
                    f"live transactions held the tables through {LOCK_TRIES} tries of {LOCK_TIMEOUT}; "
                    "nothing is half done. Run this again in a quieter moment."
                ) from error
            time.sleep(random.uniform(0.02, 0.4))  # noqa: S311 - out of step with writers that come at intervals
        else:
            return


def make_pairs_unique(connection: psycopg.Connection[Any]) -> None:
    """Builds the unique index on the pair of each table that has none. Raises psycopg.Error where a pair is double."""
    queries.limit_lock_wait(connection, lock_timeout="0")  # it waits for old transactions, and blocks no writer
    for on_table, is_partitioned, is_unique in inspection.unique_pairs(connection):
        if is_unique:
            continue
        drop, build, build_at_once = PAIR_INDEXES[on_table]
        drop(connection)
        (build_at_once if is_partitioned else build)(connection)


def drop_pair_indexes(connection: psycopg.Connection[Any]) -> None:
    """Drops the indexes that make_pairs_unique built."""
    for drop, _, _ in PAIR_INDEXES.values():
        drop(connection)


PAIR_INDEXES = {
    "specialization_progress": (
        queries.drop_progress_pair_index,
        queries.build_progress_pair_index,
        queries.build_progress_pair_index_at_once,
    ),
    "user_licenses": (
        queries.drop_license_pair_index,
        queries.build_license_pair_index,
        queries.build_license_pair_index_at_once,
    ),
}


def _clear_the_way(connection: psycopg.Connection[Any], why: str, *, set_aside: bool) -> int:
    """Moves orphans or duplicates of both tables aside, or refuses them. Returns how many rows were moved."""
    with connection.transaction():
        queries.resolve_nothing_but_pg_catalog(connection)
        connection.execute((shipped("sql") / "12_quarantine.sql").read_bytes())
    moved = 0
    with connection.transaction():
        for table in PAIR_INDEXES:
            if set_aside:
                moved += queries.set_rows_aside(connection, on_table=table, why=why)
            else:
                queries.refuse_stray_rows(connection, on_table=table, why=why)
    return moved


def restore(dsn: str) -> dict[str, Any]:
    """Puts quarantined rows back; returns restored, left_aside and the first reason why one could not come back."""
    with connect(dsn) as connection:
        outcome: dict[str, Any] = queries.restore_rows(connection)
    return outcome


def migrate(
    dsn: str,
    *,
    quarantine_orphans: bool = False,
    merge_duplicates: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Brings the database up to date and returns the ids of the migrations that were applied.

    Each of them is also given to report as soon as it stands, since it stays where a later one fails.

    Idempotent, and safe to run again after it was killed. Raises MigrateError where another migrate is at work or the
    tables stay locked, and psycopg.Error where a statement fails, or where orphans or duplicates stand in the tables
    and no leave is given to move them aside.
    """
    applied: list[str] = []

    def tell(what: str) -> None:
        applied.append(what)
        report(what)

    stray = {ORPHANS_GO_BEFORE: ("orphan", quarantine_orphans), DUPLICATES_GO_BEFORE: ("duplicate", merge_duplicates)}
    with _locked_backend(dsn) as backend:
        migrations = yoyo.read_migrations(str(shipped("migrations")))
        for migration in backend.to_apply(migrations):
            if migration.id in stray:
                why, set_aside = stray[migration.id]
                moved = _clear_the_way(backend.connection, why, set_aside=set_aside)
                if moved:
                    tell(f"{moved} {why}(s) moved to level_sync.quarantined_rows")
            _patiently(lambda migration=migration: backend.apply_one(migration))  # type: ignore[misc]
            tell(migration.id)
        _patiently(lambda: backend.run_post_apply(migrations))
    return applied


def rollback(dsn: str) -> list[str]:
    """Removes everything of level_sync and returns the ids of the migrations that were rolled back.

    The application's tables and rows stay, and what migrate changed on tables it did not create is put back; a column
    that it added stays where there are values in it, with a warning in the log. Raises as migrate does.
    """
    undone: list[str] = []
    try:
        unschedule(dsn)
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege) as error:
        logger.warning(
            "The pg_cron jobs could not be looked at (%s). If there are any, remove them in the database of pg_cron: "
            "select cron.unschedule(jobid) from cron.job where jobname like 'level_sync_%%'",
            str(error).strip(),
        )
    with _locked_backend(dsn) as backend:
        # First, so that no write meets a trigger whose functions or tables are already gone.
        if queries.has_remove_triggers(backend.connection):
            _patiently(lambda: queries.remove_triggers(backend.connection))
        for migration in backend.to_rollback(yoyo.read_migrations(str(shipped("migrations")))):
            _patiently(lambda migration=migration: backend.rollback_one(migration))  # type: ignore[misc]
            undone.append(migration.id)
        queries.drop_schema(backend.connection)
    return undone
