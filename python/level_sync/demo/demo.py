"""The demo: a private PostgreSQL, an academy in it, and the story told with real output.

The server stands in a folder below the temporary directory, named after the user, and is left running until
`level-sync demo --stop` removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import aiosql
import psycopg
from rich.console import Console
from rich.json import JSON
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

from level_sync.database import connect, queries
from level_sync.demo.servers import CRON_CONFIGURATION, EmbeddedServer, SystemServer, dsn_of, has_extension
from level_sync.setup import install
from level_sync.verify import exit_code, verify

DATABASE = "academy"
STUDENTS = 10_000
BATCH_SIZE = 500

story: Any = aiosql.from_path(Path(__file__).with_name("demo.sql"), "psycopg")


class DemoError(Exception):
    """The demo cannot start; the message says why and what to do."""


class DemoServer:
    """The one server of this user's demo, in a folder below the temporary directory."""

    def __init__(self) -> None:
        owner = os.getuid() if hasattr(os, "getuid") else "user"
        self.home = Path(tempfile.gettempdir()) / f"level_sync_demo_{owner}"

    @property
    def server(self) -> SystemServer | EmbeddedServer:
        """The server that an earlier demo has left running. Raises DemoError where there is none."""
        for directory in self.home.glob("*"):
            if self.home.is_symlink() or (hasattr(os, "getuid") and self.home.stat().st_uid != os.getuid()):
                raise DemoError(f"{self.home} belongs to somebody else")
            return SystemServer(directory) if directory.name.startswith("system") else EmbeddedServer(directory)
        raise DemoError("no demo is running: start one with make demo or level-sync demo")

    def start(self, kind: str) -> None:
        """Starts a new server with an empty database. One that an earlier demo has left running is removed."""
        self.stop()
        try:
            self.home.mkdir(mode=0o711)
        except FileExistsError as error:
            raise DemoError(f"{self.home} is in the way and not a demo's: move it, then run this again") from error
        # A new name each time: the embedded package remembers, by its folder, a server that this process has stopped.
        directory = self.home / f"{kind}_{time.time_ns()}"
        if kind == "system":
            server: SystemServer | EmbeddedServer = SystemServer(directory)
            has_cron = has_extension(server.binaries, "pg_cron")
            server.create(CRON_CONFIGURATION.format(cron_database=DATABASE) if has_cron else "")
        else:
            has_cron = False
            server = EmbeddedServer(directory)
            server.create()
        with connect(dsn_of(server, "postgres")) as connection:
            story.create_database(connection)
        if has_cron:
            with connect(self.dsn) as connection:
                story.create_cron(connection)

    def stop(self) -> bool:
        """Stops the server and removes its folder. False where there was none."""
        try:
            server = self.server
        except DemoError:
            if any(self.home.glob("*")):
                raise
            return False
        server.stop()
        shutil.rmtree(self.home, ignore_errors=True)
        return True

    @property
    def dsn(self) -> str:
        return dsn_of(self.server, DATABASE)

    @property
    def psql(self) -> Path:
        """The psql that came with the server."""
        return self.server.binaries / "psql"


def require_empty_database(dsn: str) -> None:
    """Raises DemoError where the database holds anything."""
    with connect(dsn) as connection:
        found: int = queries.count_relations(connection)
    if found:
        raise DemoError(
            f"this database is not empty ({found} relations): the demo fills tables and breaks them on purpose. "
            "Give it a database of its own, made with: createdb academy"
        )


def run(dsn: str, console: Console) -> None:
    """Migrates the empty database, fills it and tells the story. Raises psycopg.Error where the database goes away."""
    Narrator(dsn, console).tell()


class Narrator:
    """Shows a statement, runs it and shows what came of it."""

    def __init__(self, dsn: str, console: Console) -> None:
        self.dsn = dsn
        self.console = console

    def tell(self) -> None:
        self._title("Install")
        applied = install.migrate(self.dsn)
        self._say(f"level-sync migrate: {len(applied)} migrations applied, triggers on both tables.")
        with connect(self.dsn) as self.connection:
            self._fill()
            self._tell_both_ways()
            self._tell_bulk()
            self._tell_refusal()
            self._tell_failure()
            self._tell_repair()
            self._tell_schedule()

    def _fill(self) -> None:
        self._title(f"An academy of {STUDENTS:,} students")
        story.seed_random(self.connection)
        columns = (TextColumn("enrolling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("enrolling", total=STUDENTS)
            for first in range(1, STUDENTS + 1, BATCH_SIZE):
                last = min(first + BATCH_SIZE - 1, STUDENTS)
                story.add_students(self.connection, first_id=first, last_id=last)
                story.enrol_students(self.connection, first_id=first, last_id=last)
                progress.advance(task, last - first + 1)
        story.refresh_statistics(self.connection)
        self._say("Only specialization_progress was written. The licenses came from the triggers:")
        self._show(story.academy(self.connection))

    def _tell_both_ways(self) -> None:
        self._title("XP brings a level-up, and the license follows")
        story.enrol_lin(self.connection)
        self._run(story.lin_trains)
        self._run(story.lin_both_sides)

        self._title("An admin advances the license, and the progress follows")
        self._run(story.admin_advances_lin)
        self._say("A plain UPDATE of the table does as well:")
        self._run(story.admin_writes_the_table)
        self._run(story.lin_both_sides)
        self._say("Who changed what, through which side:")
        self._run(story.lin_history)

    def _tell_bulk(self) -> None:
        self._title("A whole year is promoted at once")
        started = time.perf_counter()
        changed: int = self._run(story.promote_a_year)
        self._say(f"{changed:,} levels and their licenses in {time.perf_counter() - started:.2f} s. Pairs that differ:")
        self._run(story.desyncs)

    def _tell_refusal(self) -> None:
        self._title("A level that does not exist is refused")
        self._run(story.promote_lin_too_far)

    def _tell_failure(self) -> None:
        self._title("The license side fails: the write goes through, the pair is queued, the drain carries it")
        self._run(story.break_the_license_side)
        self._run(story.lin_levels_up_meanwhile)
        self._run(story.lin_both_sides)
        self._run(story.queue)
        self._run(story.repair_the_license_side)
        self._run(story.drain)
        self._run(story.queue)
        self._run(story.lin_both_sides)

    def _tell_repair(self) -> None:
        self._title("A bypass gets past the triggers; the reconcile finds it, repairs it and logs it")
        if not story.may_bypass(self.connection):
            self._say("Not shown: session_replication_role may only be set by a superuser.")
            return
        self._run(story.bypass)
        self._run(story.desyncs)
        self._verify()
        self._run(story.reconcile)
        self._run(story.last_run)
        self._run(story.desyncs)
        self._verify()

    def _tell_schedule(self) -> None:
        self._title("pg_cron runs the reconcile by itself")
        if not story.has_cron(self.connection):
            self._say(
                "Not shown: this server has no pg_cron. make demo SERVER=system shows it, where one can be installed."
            )
            return
        self._run(story.schedule_every_minute)
        self._run(story.cron_jobs)
        self._run(story.bypass_again)
        with self.console.status("waiting for pg_cron to run the job at the full minute"):
            deadline = time.monotonic() + 130
            while not story.cron_has_run(self.connection) and time.monotonic() < deadline:
                time.sleep(1)
        self._run(story.last_run)
        self._run(story.desyncs)
        self._say("From now on every six hours, as settings.schedule has it by default:")
        self._run(story.schedule_as_usual)

    def _verify(self) -> None:
        """Shows the checks of level-sync verify that are not good."""
        checks = verify(self.dsn)
        self.console.print(f"[bold]level-sync verify[/bold]: {len(checks)} checks, exit code {exit_code(checks)}")
        for check in checks:
            if check.ok is not True:
                self._say(f"  {'NOT OK' if check.ok is False else 'not checked'}  {check.name}: {check.detail}")
        self.console.print()

    def _title(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{escape(text)}", align="left")

    def _say(self, text: str) -> None:
        self.console.print(escape(text))

    def _run(self, statement: Any) -> Any:
        """Shows a statement, runs it and shows its rows, its row count or its error."""
        self.console.print(Syntax(statement.sql.strip(), "sql", background_color="default"))
        try:
            result = statement(self.connection)
            if isinstance(result, int):
                if result >= 0:
                    self.console.print(f"[green]{result:,} row(s)[/green]\n")
                return result
            rows = list(result)
        except psycopg.Error as error:
            self.console.print(f"[red]{escape(str(error).splitlines()[0])}[/red] (SQLSTATE {error.sqlstate})\n")
            return None
        self._show(rows)
        return rows

    def _show(self, result: Any) -> None:
        rows = list(result)
        if not rows:
            self.console.print("[green]no rows[/green]\n")
            return
        if len(rows[0]) == 1 and isinstance(next(iter(rows[0].values())), dict):
            for row in rows:
                self.console.print(JSON.from_data(next(iter(row.values()))))
            return
        table = Table()
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*("" if value is None else escape(str(value)) for value in row.values()))
        self.console.print(table)
