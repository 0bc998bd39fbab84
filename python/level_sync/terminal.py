"""What the command line prints: tables, texts of the database, and the progress of a run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from level_sync.database import queries
from level_sync.text import printable

console = Console()
error_console = Console(stderr=True)


def print_rows(title: str, rows: list[dict[str, Any]], *, as_json: bool = False, empty: str = "") -> None:
    """A table, or a JSON array; without any rows the text of `empty`."""
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
        table.add_row(*(cell(value) for value in row.values()))
    unlimited = console.options.update(max_width=100_000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
        return
    # As psql's expanded display: a row that is wider than the terminal is printed column by column.
    console.print(title)
    for number, row in enumerate(rows, start=1):
        record = Table(title=f"row {number}", title_justify="left", show_header=False)
        record.add_column()
        record.add_column(overflow="fold")
        for column, value in row.items():
            record.add_row(column, cell(value))
        console.print(record)


def print_mapping(title: str, name: str, mapping: dict[str, Any]) -> None:
    """A table with a row for each key, below the heading `name`."""
    print_rows(title, [{name: key, "value": value} for key, value in mapping.items()])


def cell(value: object) -> Text:
    """A value as text that neither rich nor the terminal takes for markup or control characters."""
    return Text("" if value is None else printable(str(value)))


@contextlib.contextmanager
def progress_bar(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """A bar with rate and time left, fed by the notices of a run; on standard error, so that --json stays clean."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(diagnostic: psycopg.errors.Diagnostic) -> None:
            if diagnostic.message_primary != "level_sync progress" or diagnostic.message_detail is None:
                return
            notice = json.loads(diagnostic.message_detail)
            phase = notice["phase"]
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase)
            progress.update(tasks[phase], completed=notice["done"], total=notice["total"])

        connection.add_notice_handler(show)
        queries.report_progress(connection)
        try:
            yield
        finally:
            connection.remove_notice_handler(show)
