"""The pg_cron jobs, in whichever database of the server pg_cron lives."""

from __future__ import annotations

import psycopg

from level_sync.database import NOT_INSTALLED, connect, queries


def schedule(dsn: str, cron_expression: str | None = None) -> tuple[str, str]:
    """Makes or updates both jobs and returns the cron expression of the reconcile and the database of pg_cron.

    Without an expression settings.schedule is used. Raises psycopg.Error where pg_cron is not installed, may not be
    used, or the expression is not one; its hint says what to do.
    """
    with connect(dsn) as connection:
        access = queries.cron_access(connection)
        if not access["is_elsewhere"]:
            answer = queries.schedule(connection, cron_expression=cron_expression)
            return answer["schedule"], connection.info.dbname
        expression: str = queries.settings(connection)["schedule"] if cron_expression is None else cron_expression
        queries.check_cron_expression(connection, cron_expression=expression)
        try:
            with connect(dsn, database=access["cron_database"]) as cron_connection:
                for job in queries.wanted_cron_jobs(connection, cron_expression=expression):
                    queries.schedule_elsewhere(cron_connection, **job, database=connection.info.dbname)
        except NOT_INSTALLED as error:
            raise psycopg.errors.FeatureNotSupported(
                f"pg_cron is preloaded for database {access['cron_database']}, but its extension is not there: "
                "run create extension pg_cron; in it, as a superuser"
            ) from error
        queries.save_schedule(connection, cron_expression=expression)
        return expression, access["cron_database"]


def unschedule(dsn: str) -> int:
    """Removes both jobs and returns how many there were. Raises psycopg.Error where that is not allowed."""
    with connect(dsn) as connection:
        if not queries.has_schedule(connection):
            return 0
        access = queries.cron_access(connection)
        if not access["is_elsewhere"]:
            removed: int = queries.unschedule(connection)
        else:
            try:
                with connect(dsn, database=access["cron_database"]) as cron_connection:
                    removed = queries.unschedule_elsewhere(cron_connection, database=connection.info.dbname)
            except NOT_INSTALLED:
                removed = 0
    return removed
