"""Connections, the queries of queries.sql as functions, and where the shipped SQL stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import aiosql
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

# What a database answers in which level_sync, or pg_cron, is not installed.
NOT_INSTALLED = (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction)

queries: Any = aiosql.from_path(Path(__file__).with_name("queries.sql"), "psycopg")


class DsnError(Exception):
    """A connection string cannot be read. The message does not repeat it, since it may hold a password."""


def shipped(name: str) -> Path:
    """Folder of shipped SQL, `sql` or `migrations`: inside an installed wheel or at the top of the source tree."""
    here = Path(__file__).resolve().parent
    inside_wheel = here / name
    return inside_wheel if inside_wheel.is_dir() else here.parents[1] / name


def read_dsn(dsn: str) -> dict[str, Any]:
    """The dsn's parts by libpq's names; of SQLAlchemy's and yoyo's `postgresql+driver://` the driver is dropped.

    For what the dsn leaves out libpq reads PGHOST, PGDATABASE and the other PG* variables. Text is always sent and read
    as UTF-8, whatever encoding the database has: from an SQL_ASCII one psycopg would otherwise return bytes.
    """
    try:
        parts = conninfo_to_dict(re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", dsn))
        if "@" in str(parts.get("host", ""))[1:] or "@" in str(parts.get("port", "")):
            raise psycopg.ProgrammingError  # libpq would print a part of the password as the host's name or the port
        return parts | {"client_encoding": "UTF8"}
    except psycopg.ProgrammingError:
        raise DsnError(
            "the connection string cannot be read (it is not repeated here, since it may hold a password); "
            "it should be like postgresql://user@host:5432/database or host=... dbname=... user=..., "
            "with special characters in a password percent-encoded or quoted"
        ) from None


def connect(dsn: str, database: str | None = None, **options: Any) -> psycopg.Connection[dict[str, Any]]:
    """Opens an autocommit connection whose rows are dicts, to `database` instead of the dsn's where one is given.

    Raises psycopg.OperationalError where no server answers, and DsnError where the dsn cannot be read.
    """
    if database is not None:
        options["dbname"] = database
    arguments = read_dsn(dsn) | {"application_name": "level-sync"} | options
    try:
        return psycopg.connect(autocommit=True, row_factory=dict_row, **arguments)
    except UnicodeError as error:  # a label of the host's name that is empty or longer than 63 characters
        raise psycopg.OperationalError(f"the host's name cannot be looked up: {error}") from None


def is_connection_error(error: psycopg.Error) -> bool:
    """Whether there is no connection. What a server answers to a query has a SQLSTATE."""
    return isinstance(error, psycopg.OperationalError) and error.sqlstate is None
