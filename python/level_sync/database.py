"""Connections, and the queries of queries.sql as functions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import aiosql
import psycopg
from psycopg.rows import dict_row

queries: Any = aiosql.from_path(Path(__file__).with_name("queries.sql"), "psycopg")


def libpq_dsn(dsn: str) -> str:
    """The dsn as libpq takes it: SQLAlchemy's and yoyo's `postgresql+driver://` loses its driver.

    An empty dsn stays empty: libpq then reads PGHOST, PGDATABASE and the other PG* variables.
    """
    return re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", dsn)


def connect(dsn: str, database: str | None = None, **options: Any) -> psycopg.Connection[dict[str, Any]]:
    """Opens an autocommit connection whose rows are dicts, to `database` instead of the dsn's where one is given.

    Raises psycopg.OperationalError where no server answers.
    """
    if database is not None:
        options["dbname"] = database
    return psycopg.connect(
        libpq_dsn(dsn), autocommit=True, row_factory=dict_row, application_name="level-sync", **options
    )
