"""Installs level_sync into a database and takes it away again.

State (tables, constraints) is versioned in migrations/ and applied by yoyo; code (functions, triggers, views) stands in
sql/ and is loaded whole each time.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg
import yoyo
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI
from yoyo.exceptions import LockTimeout

from level_sync.database import connect, queries, read_dsn, shipped
from level_sync.setup.check import check_queries
from level_sync.setup.schedule import unschedule

logger = logging.getLogger(__name__)
LOCK_TIMEOUT = "100ms"  # a step that waits for its lock this long is tried again; writers queue behind it meanwhile
LOCK_TRIES = 200

# The migrations that fail on orphans or duplicates; before each of them these rows are quarantined or refused.
FAILS_ON = {"0004_add_foreign_keys": "orphan", "0007_make_pairs_unique": "duplicate"}
QUARANTINE_CODE = ("14_transaction_state.sql", "85_quarantine.sql")  # what that takes of sql/


class MigrateError(Exception):
    """Migrate or rollback could not finish; the message says why and what to do."""


def load_code(connection: psycopg.Connection[Any]) -> None:
    """Loads every file of sql/ in order: in the transaction the caller has open, or in one of its own."""
    with connection.transaction():
        queries.pin_search_path(connection)
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
        queries.set_lock_timeout(connection, lock_timeout=LOCK_TIMEOUT)
        connection.add_notice_handler(_log_warning)
        return connection

    def init_connection(self, connection: psycopg.Connection[Any]) -> None:
        queries.use_level_sync_schema(connection)

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
            if reason := queries.why_schema_is_not_ours(backend.connection):
                raise MigrateError(reason)
            with backend.lock():
                yield backend
    except LockTimeout as error:
        raise MigrateError(f"{error}; wait for it, then run this again") from error


def _retry_on_locks(step: Callable[[], None]) -> None:
    """Runs a step, and again while live traffic holds its locks; each try makes writers wait LOCK_TIMEOUT at most."""
    for tried in range(1, LOCK_TRIES + 1):
        try:
            step()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            if tried == LOCK_TRIES:
                raise MigrateError(
                    f"live transactions held the tables through {LOCK_TRIES} tries of {LOCK_TIMEOUT}; "
                    "nothing is half done. Run this again in a quieter moment."
                ) from error
            time.sleep(random.uniform(0.02, 0.4))  # noqa: S311 - a fixed pause could meet a regular writer each time
        else:
            return


class PairIndex(NamedTuple):
    """The queries for one table's unique index on the pair."""

    drop: Any
    build: Any
    build_concurrently: Any


PAIR_INDEXES = {
    "specialization_progress": PairIndex(
        queries.drop_progress_pair_index,
        queries.build_progress_pair_index,
        queries.build_progress_pair_index_concurrently,
    ),
    "user_licenses": PairIndex(
        queries.drop_license_pair_index,
        queries.build_license_pair_index,
        queries.build_license_pair_index_concurrently,
    ),
}


def make_pairs_unique(connection: psycopg.Connection[Any]) -> None:
    """Builds the unique index on the pair of each table that has none. Raises psycopg.Error where a pair is double."""
    queries.set_lock_timeout(connection, lock_timeout="0")  # it waits for old transactions, and blocks no writer
    for on_table, is_partitioned, is_unique in check_queries.unique_pairs(connection):
        if is_unique:
            continue
        index = PAIR_INDEXES[on_table]
        index.drop(connection)  # an earlier build that was killed leaves an invalid index
        (index.build if is_partitioned else index.build_concurrently)(connection)


def drop_pair_indexes(connection: psycopg.Connection[Any]) -> None:
    """Drops the indexes that make_pairs_unique built."""
    for index in PAIR_INDEXES.values():
        index.drop(connection)


def _quarantine_or_refuse(connection: psycopg.Connection[Any], kind: str, *, may_quarantine: bool) -> int:
    """Moves orphans or duplicates of both tables into quarantine, or raises. Returns how many rows were moved."""
    with connection.transaction():
        queries.pin_search_path(connection)
        for name in QUARANTINE_CODE:
            connection.execute((shipped("sql") / name).read_bytes())
    moved = 0
    with connection.transaction():
        for table in PAIR_INDEXES:
            if may_quarantine:
                moved += queries.quarantine_rows(connection, on_table=table, kind=kind)
            else:
                queries.raise_orphans_and_duplicates(connection, on_table=table, kind=kind)
    return moved


def restore(dsn: str) -> dict[str, Any]:
    """Puts quarantined rows back; returns how many were restored and quarantined, and why the first of these was."""
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
    """Brings the database up to date and returns the steps that were applied: ids of migrations, rows that were moved.

    Each step is also passed to report as soon as it is committed: it stays, even where a later one fails.

    Idempotent, and safe to run again after it was killed. Raises MigrateError where another migrate is at work or the
    tables stay locked, and psycopg.Error where a statement fails, or where orphans or duplicates may not be
    quarantined.
    """
    applied: list[str] = []

    def record(step: str) -> None:
        applied.append(step)
        report(step)

    may_quarantine = {"orphan": quarantine_orphans, "duplicate": merge_duplicates}
    with _locked_backend(dsn) as backend:
        migrations = yoyo.read_migrations(str(shipped("migrations")))
        for migration in backend.to_apply(migrations):
            if kind := FAILS_ON.get(migration.id):
                moved = _quarantine_or_refuse(backend.connection, kind, may_quarantine=may_quarantine[kind])
                if moved:
                    record(f"{moved} {kind}(s) moved to level_sync.quarantined_rows")
            _retry_on_locks(lambda migration=migration: backend.apply_one(migration))  # type: ignore[misc]
            record(migration.id)
        _retry_on_locks(lambda: backend.run_post_apply(migrations))
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
        # The triggers go first, so that no write meets one whose function or tables are already gone.
        if queries.has_remove_triggers(backend.connection):
            _retry_on_locks(lambda: queries.remove_triggers(backend.connection))
        for migration in backend.to_rollback(yoyo.read_migrations(str(shipped("migrations")))):
            _retry_on_locks(lambda migration=migration: backend.rollback_one(migration))  # type: ignore[misc]
            undone.append(migration.id)
        queries.drop_schema(backend.connection)
    return undone
