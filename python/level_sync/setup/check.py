"""A look at a database before level_sync is installed: what migrate would do, and what stands in its way.

It only reads. Each finding has a verdict: `ok`, `migrate` (migrate does it), `note` (worth knowing), `decide` (a person
has to choose first) or `cannot` (level_sync does not work with this; the fix says what to change).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiosql
import psycopg

from level_sync.database import connect

READY, NEEDS_DECISIONS, CANNOT = 0, 1, 2
VERDICTS = ["ok", "note", "migrate", "decide", "cannot"]

OLDEST_VERSION = 150000
NOT_VALID_ON_PARTITIONED = 180000  # the first version in which a partitioned table takes a NOT VALID foreign key

# The columns of the pair, in each of the two tables that are kept in step.
PAIR_COLUMNS = {
    "specialization_progress": ("student_id", "specialization_id"),
    "user_licenses": ("user_id", "specialization_type"),
}

check_queries: Any = aiosql.from_path(Path(__file__).with_name("check.sql"), "psycopg")


@dataclass(frozen=True)
class Finding:
    """One thing seen, with its verdict and, for an obstacle, the exact SQL or option that removes it."""

    verdict: str
    subject: str
    detail: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def exit_code(findings: list[Finding]) -> int:
    """0 ready, 1 needs decisions, 2 cannot."""
    verdicts = {finding.verdict for finding in findings}
    return CANNOT if "cannot" in verdicts else NEEDS_DECISIONS if "decide" in verdicts else READY


def check(dsn: str) -> list[Finding]:
    """Looks at the database, in one read-only transaction. Raises psycopg.OperationalError without a connection."""
    with connect(dsn) as connection:
        connection.read_only = True
        with connection.transaction():
            return list(_inspect(connection))


def _inspect(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    server = check_queries.server(connection)
    tables = {row["name"]: row for row in check_queries.tables(connection)}
    columns = list(check_queries.columns(connection))
    yield from _check_server(server)
    yield from _check_rights(server, tables)
    yield from _check_pg_cron(server)
    for table in tables.values():
        yield from _check_table(table, server)
    yield from _check_columns(columns, tables)

    # Without the tables, or with keys that cannot be compared, their rows cannot be checked yet.
    are_keys_unfit = any(
        column["is_key"] and (not column["type"] or column["family"] == "integer" != column["actual_family"])
        for column in columns
    )
    are_readable = all(tables[name]["is_there"] and tables[name]["is_table"] for name in ("users", *PAIR_COLUMNS))
    if are_keys_unfit or not are_readable or not tables["specializations"]["is_there"]:
        return
    yield from _check_lengths(columns, check_queries.longest_specialization(connection))
    yield from _check_duplicates(connection)
    yield from _check_foreign_keys(connection)
    yield from _check_data(connection)
    yield from _check_dependents(connection)


def _check_server(server: dict[str, Any]) -> Iterator[Finding]:
    if server["version_number"] < OLDEST_VERSION:
        yield Finding("cannot", "server", f"PostgreSQL {server['version']} is too old", "Upgrade to 15 or newer.")
    else:
        yield Finding("ok", "server", f"PostgreSQL {server['version']}")


def _check_rights(server: dict[str, Any], tables: dict[str, Any]) -> Iterator[Finding]:
    if not server["is_installed"] and not server["may_create_schema"]:
        yield Finding(
            "cannot",
            "rights",
            f"role {server['role']} may not create a schema in {server['database']}",
            f'grant create on database "{server["database"]}" to "{server["role"]}";',
        )
    if not all(table["is_there"] for table in tables.values()) and not server["may_create_tables"]:
        yield Finding(
            "cannot",
            "rights",
            f"role {server['role']} may not create the missing tables in schema public",
            f'grant create on schema public to "{server["role"]}";',
        )
    if server["may_anybody_create"]:
        yield Finding(
            "note",
            "schema public",
            "everybody may create objects in it, and the application's own triggers are run with it in their "
            "search_path and with the rights of the owner of level_sync",
            "revoke create on schema public from public;",
        )


def _check_pg_cron(server: dict[str, Any]) -> Iterator[Finding]:
    if server["cron_database"] is None and not server["may_read_settings"]:
        yield Finding(
            "note",
            "pg_cron",
            f"not checked: role {server['role']} may not see whether it is preloaded",
            f'grant pg_read_all_settings to "{server["role"]}";',
        )
    elif server["cron_database"] is None:
        yield Finding(
            "note",
            "pg_cron",
            "not preloaded: everything but the schedule works",
            "Install postgresql-NN-cron and set shared_preload_libraries = 'pg_cron', or let another scheduler "
            "run level-sync reconcile and level_sync.maintain().",
        )
    else:
        yield Finding("ok", "pg_cron", f"preloaded, in database {server['cron_database']}")


def _check_table(table: dict[str, Any], server: dict[str, Any]) -> Iterator[Finding]:
    name = table["name"]
    if not table["is_there"]:
        if table["other_schemas"]:
            schema = table["other_schemas"][0]
            yield Finding(
                "cannot",
                name,
                f"stands in schema {schema}; level_sync works on schema public only",
                f"alter table {schema}.{name} set schema public;",
            )
        else:
            yield Finding("migrate", name, "does not exist and is created")
        return
    if not table["is_table"]:
        yield Finding("cannot", name, "is not a table", "level_sync needs the table itself, not a view of it.")
        return
    if not table["is_owned"]:
        yield Finding(
            "cannot",
            name,
            f"belongs to {table['owner']}, and role {server['role']} is no member of it",
            f'Run as {table["owner"]}, or: grant "{table["owner"]}" to "{server["role"]}";',
        )
    else:
        rows = "never analyzed" if table["estimated_rows"] is None else f"about {table['estimated_rows']:,} rows"
        yield Finding("ok", name, f"{rows}, adopted as it is")
    if name in PAIR_COLUMNS:
        yield from _check_synced_table(table, server)


def _check_synced_table(table: dict[str, Any], server: dict[str, Any]) -> Iterator[Finding]:
    """What matters of the two tables that get triggers and foreign keys."""
    name = table["name"]
    for rule in table["rules"] or ():
        yield Finding(
            "cannot",
            name,
            f"has the rule {rule}: PostgreSQL then refuses the statements that carry a level, and each is queued",
            f'Make it a trigger, then: drop rule "{rule}" on public.{name};',
        )
    if server["is_superuser"] and not table["is_owned_by_superuser"]:
        yield Finding(
            "note",
            name,
            f"belongs to {table['owner']}, but the triggers would run with the rights of superuser {server['role']}",
            f'grant create on database "{server["database"]}" to "{table["owner"]}"; then run migrate as that role.',
        )
    if table["is_partitioned"] and server["version_number"] < NOT_VALID_ON_PARTITIONED:
        yield Finding(
            "note",
            name,
            "is partitioned: before PostgreSQL 18 its foreign keys are checked while writers wait",
            "Migrate in a quiet moment.",
        )
    if table["forces_row_security"] and not server["is_superuser"]:
        yield Finding(
            "decide",
            name,
            "forces row level security on its owner: rows hidden from the owner would be taken for missing",
            f"alter table public.{name} no force row level security;",
        )
    elif table["has_row_security"]:
        yield Finding("note", name, "has row level security; the triggers run as its owner, who sees every row")


def _check_columns(columns: list[dict[str, Any]], tables: dict[str, Any]) -> Iterator[Finding]:
    for column in columns:
        if not tables[column["on_table"]]["is_table"]:
            continue
        where = f"{column['on_table']}.{column['name']}"
        alter = f"alter table public.{column['on_table']} alter column {column['name']} type"
        wanted, actual = column["family"], column["actual_family"]
        if not column["type"] and column["is_key"]:
            yield Finding("cannot", where, "does not exist", "level_sync needs this column under this name.")
        elif not column["type"]:
            yield Finding("migrate", where, "does not exist and is added, empty")
        elif (wanted, column["type"]) == ("integer", "uuid"):
            yield Finding(
                "cannot",
                where,
                "is uuid",
                "level_sync knows users by number: give users a bigint id that the others refer to.",
            )
        elif (wanted, actual) == ("timestamptz", "timestamp"):
            yield Finding("note", where, "has no time zone; it is taken for UTC, whatever TimeZone says")
        elif wanted != actual:
            new_type = {"integer": "bigint"}.get(wanted, wanted)
            is_enum = actual == "enum"
            cast = f"::text::{new_type}" if is_enum and new_type != "text" else f"::{new_type}"
            yield Finding(
                "cannot",
                where,
                f"is an enum ({column['type']})" if is_enum else f"is {column['type']}",
                f"{alter} {new_type} using {column['name']}{cast};",
            )


def _check_lengths(columns: list[dict[str, Any]], longest: int) -> Iterator[Finding]:
    for column in columns:
        if column["max_length"] is not None and column["max_length"] < longest:
            yield Finding(
                "decide",
                f"{column['on_table']}.{column['name']}",
                f"holds {column['max_length']} characters; the longest specialization id has {longest}",
                f"alter table public.{column['on_table']} alter column {column['name']} type varchar({longest});",
            )


def _check_duplicates(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in check_queries.unique_pairs(connection):
        table = row["on_table"]
        pair = ", ".join(PAIR_COLUMNS[table])
        if row["is_unique"]:
            yield Finding("ok", table, f"({pair}) is unique")
            continue
        found = check_queries.duplicates(connection, on_table=table)
        if found["pairs"]:
            yield Finding(
                "decide",
                table,
                f"{found['pairs']:,} pairs stand more than once: {'; '.join(found['examples'])}",
                "level-sync migrate --merge-duplicates keeps the highest level, then the latest, of each.",
            )
        else:
            yield Finding("migrate", table, f"({pair}) has no unique index; one is built, concurrently")


def _check_foreign_keys(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for key in check_queries.foreign_keys(connection):
        where = f"{key['on_table']}.{key['on_column']}"
        if key["replaced"]:
            yield Finding("migrate", where, f"{key['name']} (RESTRICT) replaces {'; '.join(key['replaced'])}")
        elif key["is_there"]:
            yield Finding("ok", where, f"{key['name']} is there")
        else:
            yield Finding("migrate", where, f"{key['name']} to {key['refers_to']} is added, ON DELETE RESTRICT")
    for row in check_queries.orphans(connection):
        yield Finding(
            "decide",
            row["on_table"],
            f"{row['pairs']:,} rows without their row in {row['refers_to']}: {'; '.join(row['examples'])}",
            f"Add the missing {row['refers_to']}, or level-sync migrate --quarantine-orphans moves the rows aside.",
        )


def _check_data(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in check_queries.out_of_range_levels(connection):
        yield Finding(
            "note",
            row["on_table"],
            f"{row['pairs']:,} levels are NULL or out of range: {'; '.join(row['examples'])}",
            "Correct them; until then a reconcile queues these pairs.",
        )
    counts: dict[str, int] = defaultdict(int)
    for row in check_queries.desyncs(connection):
        counts[row["issue_type"]] = row["pairs"]
        yield Finding(
            "note",
            row["issue_type"],
            f"{row['pairs']:,} pairs: {'; '.join(row['examples'])}",
            "After migrate: level-sync reconcile --dry-run shows what would be done, level-sync reconcile does it.",
        )
    missing_of = {"specialization_progress": "missing_progress", "user_licenses": "missing_license"}
    for column in check_queries.columns_without_default(connection):
        table = column["on_table"]
        yield Finding(
            "decide",
            f"{table}.{column['name']}",
            f"is NOT NULL without a default ({column['type']}): no row can be created for a pair that has none "
            f"({counts[missing_of[table]]:,} now)",
            f"alter table public.{table} alter column {column['name']} set default ...;",
        )


def _check_dependents(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in check_queries.triggers(connection):
        yield Finding(
            "note", row["on_table"], f"has a trigger of its own, {row['name']}, which fires for our writes too"
        )
    for row in check_queries.referring_tables(connection):
        yield Finding("note", row["on_table"], f"is referred to by {row['name']}")
