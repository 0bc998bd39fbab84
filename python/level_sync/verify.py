"""The verification script: every check of level_sync.health, and those that only a client can make.

The exit code is a bit mask, so that a monitor sees at once what is wrong.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from level_sync.database import NOT_INSTALLED, connect, queries, shipped

DESYNC, DRIFT, SCHEDULE, QUEUE, FOREIGN_KEYS, NO_CONNECTION = 1, 2, 4, 8, 16, 32

# The bit of each check, by its name up to a colon; a check that is not listed counts as drift.
BITS = {
    "desync": DESYNC,
    "hidden_rows": DESYNC,
    "triggers": DRIFT,
    "functions": DRIFT,
    "shipped_functions": DRIFT,
    "live": DRIFT,
    "installation": DRIFT,
    "schedule": SCHEDULE,
    "cron_launcher": SCHEDULE,
    "cron run": SCHEDULE,
    "last_success": SCHEDULE,
    "last_run": SCHEDULE,
    "running": SCHEDULE,
    "queue_dead": QUEUE,
    "queue_draining": QUEUE,
    "foreign_keys": FOREIGN_KEYS,
    "orphans": FOREIGN_KEYS,
    "connection": NO_CONNECTION,
}

SHIPPED_FUNCTION = re.compile(
    r"create or replace (?:function|procedure) level_sync\.(?P<name>\w+)\(.*?\bas \$\$(?P<body>.*?)\$\$;", re.DOTALL
)


@dataclass(frozen=True)
class Check:
    """One check and its result. Where ok is None the check could not be made, which never counts as good."""

    name: str
    ok: bool | None
    detail: str
    hint: str

    @property
    def bit(self) -> int:
        """What a failure adds to the exit code."""
        return BITS.get(self.name.split(":")[0], DRIFT)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "bit": self.bit}


def exit_code(checks: list[Check]) -> int:
    """0 where all is good, else the sum of the bits of what is not good or could not be checked."""
    code = 0
    for check in checks:
        if check.ok is not True:
            code |= check.bit
    return code


def verify(dsn: str, *, live: bool = False) -> list[Check]:
    """Makes every check. Raises psycopg.OperationalError where there is no connection."""
    with connect(dsn) as connection:
        return run_checks(connection, dsn, live=live)


def run_checks(connection: psycopg.Connection[Any], dsn: str, *, live: bool = False) -> list[Check]:
    """Makes every check over an open connection.

    The dsn is needed where pg_cron lives in another database of the server, for a second connection to that one.
    """
    try:
        checks = [Check(**row) for row in queries.health(connection)]
    except NOT_INSTALLED as error:
        detail = f"level_sync is not there, or only half: {str(error).strip()}"
        return [Check("installation", False, detail, "Run level-sync migrate.")]
    checks.append(_check_shipped_functions(connection))
    if live:
        checks += _check_live(connection)
    access = queries.cron_access(connection)
    unread = [check for check in checks if check.name == "schedule" and check.ok is None]
    if unread and access["is_elsewhere"]:
        checks = [check for check in checks if check not in unread]
        checks += _check_cron_database(dsn, connection, access["cron_database"])
    return checks


def _check_live(connection: psycopg.Connection[Any]) -> list[Check]:
    """Writes a pair both ways in a transaction that is rolled back."""
    try:
        return [Check(**row) for row in queries.check_live(connection)]
    except psycopg.errors.InsufficientPrivilege as error:
        return [
            Check("live", None, f"not checked: {str(error).strip()}", "It takes level-sync grant ROLE --as operator.")
        ]


def _check_shipped_functions(connection: psycopg.Connection[Any]) -> Check:
    """Compares the functions of this database with those that ship with this package."""
    expected: set[tuple[str, str]] = set()
    for file in shipped("sql").glob("*.sql"):
        for function in SHIPPED_FUNCTION.finditer(file.read_text(encoding="utf-8")):
            expected.add((function["name"], function["body"]))
    loaded = {(row["name"], row["body"]) for row in queries.loaded_functions(connection)}
    differing = sorted({name for name, _ in expected ^ loaded})
    detail = f"{len(expected)} functions equal to those of this package"
    if differing:
        detail = "differ from this package: " + ", ".join(differing)
    return Check("shipped_functions", not differing, detail, "Run level-sync migrate with the version you mean to run.")


def _check_cron_database(dsn: str, connection: psycopg.Connection[Any], cron_database: str) -> list[Check]:
    """Checks the jobs where pg_cron lives in another database of the server."""
    try:
        with (
            connect(dsn, database=cron_database, connect_timeout="5") as cron_connection,
            cron_connection.cursor() as cursor,
        ):
            row = cursor.execute(queries.cron_jobs_query(connection)).fetchone()
            are_others_hidden = queries.are_other_roles_jobs_hidden(cron_connection)
    except NOT_INSTALLED:
        detail = f"pg_cron is preloaded, but its extension is not in database {cron_database}"
        hint = f"In {cron_database}, as a superuser: create extension pg_cron; then run level-sync schedule."
        return [Check("schedule", False, detail, hint)]
    except psycopg.errors.InsufficientPrivilege as error:
        return [_schedule_not_checked(str(error).strip(), _grants_to_see_jobs(connection, cron_database))]
    except psycopg.Error as error:
        hint = f"Let this role connect to {cron_database}, and verify again."
        return [_schedule_not_checked(str(error).strip(), hint)]
    jobs = next(iter(row.values())) if row else []
    if are_others_hidden and not any(job["database"] == connection.info.dbname for job in jobs):
        reason = f"pg_cron in {cron_database} shows {connection.info.user} no job of this database, if any"
        return [_schedule_not_checked(reason, _grants_to_see_jobs(connection, cron_database))]
    return [Check(**found) for found in queries.check_cron_jobs(connection, jobs=Jsonb(jobs))]


def _schedule_not_checked(reason: str, hint: str) -> Check:
    return Check("schedule", None, f"not checked: {reason}", hint)


def _grants_to_see_jobs(connection: psycopg.Connection[Any], cron_database: str) -> str:
    """What a superuser runs so that this role sees the jobs of level_sync, and no others."""
    role = sql.Identifier(connection.info.user).as_string(connection)
    statements = (
        "grant usage on schema cron to {role}",
        "grant select on cron.job, cron.job_run_details to {role}",
        "create policy level_sync_jobs on cron.job for select to {role} using (jobname like 'level_sync_%')",
        "create policy level_sync_runs on cron.job_run_details for select to {role}"
        " using (jobid in (select jobid from cron.job))",
    )
    return f"In {cron_database}, as a superuser: " + "; ".join(text.format(role=role) for text in statements) + ";"
