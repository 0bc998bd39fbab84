"""The command line: `level-sync`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from level_sync import demo as demonstration
from level_sync import install
from level_sync.database import connect, queries

app = typer.Typer(
    help="Keeps a student's level equal in specialization_progress and user_licenses, inside PostgreSQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
error_console = Console(stderr=True)

NO_CONNECTION = 32

Dsn = Annotated[
    str,
    typer.Option(
        "--dsn",
        envvar="DATABASE_URL",
        show_envvar=True,
        help="Connection URI or key=value string; without it the PG* variables.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RowLimit = Annotated[int, typer.Option("--limit", min=1, help="Rows to show.")]


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Prints what went wrong and what to do instead of a traceback. Exit code 32: no connection; 1: anything else."""
    try:
        yield
    except psycopg.errors.UndefinedTable as error:
        error_console.print(
            f"level_sync is not installed in this database ({_message(error)}): run level-sync migrate."
        )
        raise typer.Exit(1) from error
    except psycopg.OperationalError as error:
        if error.sqlstate is not None:
            error_console.print(f"{_message(error)} (SQLSTATE {error.sqlstate})", markup=False)
            raise typer.Exit(1) from error
        error_console.print(f"No connection: {_message(error)}", markup=False)
        error_console.print("Give --dsn, or set DATABASE_URL or PGHOST, PGUSER and PGDATABASE.")
        raise typer.Exit(NO_CONNECTION) from error
    except (psycopg.Error, install.MigrateError, demonstration.DemoError) as error:
        error_console.print(_message(error), markup=False)
        raise typer.Exit(1) from error


def _message(error: Exception) -> str:
    return str(error).strip()


def _print_rows(title: str, rows: list[dict[str, Any]], as_json: bool, empty: str) -> None:
    if as_json:
        typer.echo(json.dumps(rows, default=str))
        return
    if not rows:
        console.print(empty)
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)


@app.command()
def demo(
    dsn: Annotated[
        str, typer.Option("--dsn", help="An empty database to use instead of a server of the demo's own.")
    ] = "",
    stop: Annotated[bool, typer.Option("--stop", help="Stop the demo's server and remove it.")] = False,
    psql: Annotated[bool, typer.Option("--psql", help="Open psql in the demo's database.")] = False,
) -> None:
    """Start a private PostgreSQL, fill an academy and tell the story step by step with real output."""
    server = demonstration.EmbeddedServer()
    with _plain_errors():
        if stop:
            console.print("The demo's server is gone." if server.stop() else "No demo is running.")
            return
        if psql:
            os.execv(server.psql, ["psql", server.dsn()])  # noqa: S606
        if dsn:
            demonstration.refuse_unless_empty(dsn)
            demonstration.run(dsn, console)
            return
        server.start()
        demonstration.run(server.dsn(), console)
        console.rule("[bold]Look around", align="left")
        console.print("The server stays up. In psql, try the queries below; write either table and see the other.")
        console.print(f"  {server.psql} '{server.dsn()}'", soft_wrap=True, highlight=False, markup=False)
        console.print("  (in the source tree: make psql)\n")
        console.print("  select * from level_sync.sync_events order by event_id desc limit 10;")
        console.print("  select * from level_sync.desync_issues;")
        console.print("  update user_licenses set current_level = 3 where user_id = 20001 returning *;")
        console.print("  select * from specialization_progress where student_id = 20001;\n")
        console.print("Stop and remove it with: make stop, or level-sync demo --stop")


@app.command()
def migrate(dsn: Dsn = "") -> None:
    """Install level_sync, or bring it up to date. Safe to run again, and beside live traffic."""
    with _plain_errors():
        applied = install.migrate(dsn)
        for migration in applied:
            console.print(f"applied {migration}")
        console.print(f"{len(applied)} migration(s) applied; triggers, functions and views are those of this version.")


@app.command()
def rollback(
    dsn: Dsn = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove everything of level_sync, its log included. The application's tables and rows stay as they are."""
    if not yes:
        typer.confirm("Remove the schema level_sync with its log, events and queue?", abort=True)
    with _plain_errors():
        undone = install.rollback(dsn)
        for migration in undone:
            console.print(f"rolled back {migration}")
        console.print("level_sync is gone; specialization_progress and user_licenses are as they were.")


@app.command()
def status(dsn: Dsn = "", as_json: AsJson = False) -> None:
    """What stands in the tables, what differs, what waits in the queue, and the settings."""
    with _plain_errors(), connect(dsn) as connection:
        now: dict[str, Any] = queries.status(connection)
        desyncs = list(queries.desyncs_by_type(connection))
        settings: dict[str, Any] = queries.settings(connection)
    if as_json:
        typer.echo(json.dumps({**now, "desyncs": desyncs, "settings": settings}, default=str))
        return
    _print_rows("status", [{"what": key, "value": value} for key, value in now.items()], False, "")
    _print_rows("desyncs", desyncs, False, "no desync: every pair has one level")
    _print_rows("settings", [{"setting": key, "value": value} for key, value in settings.items()], False, "")


@app.command()
def events(
    dsn: Dsn = "",
    user: Annotated[int | None, typer.Option("--user", help="Only this user id.")] = None,
    specialization: Annotated[str | None, typer.Option("--specialization", help="Only this specialization.")] = None,
    limit: RowLimit = 20,
    as_json: AsJson = False,
) -> None:
    """What level_sync wrote, newest first: who changed what, when, through which side."""
    with _plain_errors(), connect(dsn) as connection:
        rows = list(queries.events(connection, user_id=user, specialization=specialization, row_limit=limit))
    _print_rows("events", rows, as_json, "no events")


@app.command()
def queue(dsn: Dsn = "", limit: RowLimit = 20, as_json: AsJson = False) -> None:
    """The pairs whose sync could not be done yet, with their errors."""
    with _plain_errors(), connect(dsn) as connection:
        rows = list(queries.queue(connection, row_limit=limit))
    _print_rows("queue", rows, as_json, "the queue is empty")
