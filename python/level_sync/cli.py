"""The command line: `level-sync`."""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer
from rich.table import Table

from level_sync import verify
from level_sync.database import NOT_INSTALLED, DsnError, connect, is_connection_error, queries, read_dsn
from level_sync.demo import demo
from level_sync.demo.servers import ServerError
from level_sync.monitor import channels, watch
from level_sync.monitor.network import LOOPBACK
from level_sync.setup import check, install, schedule
from level_sync.terminal import cell, console, error_console, print_mapping, print_rows, progress_bar

app = typer.Typer(
    help="Keeps a student's level equal in specialization_progress and user_licenses, inside PostgreSQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RUN_FAILED, NEEDS_APPROVAL, SKIPPED, INTERRUPTED = 1, 3, 4, 130  # exit codes of reconcile

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
ScanInterval = Annotated[
    float,
    typer.Option(
        "--scan-interval", min=1, max=86400, help="Seconds between two looks at every pair; the rest is read anew."
    ),
]


class Rights(enum.StrEnum):
    """What a role may do with level_sync."""

    READER = "reader"
    OPERATOR = "operator"


class ServerKind(enum.StrEnum):
    """Whose PostgreSQL the demo runs on."""

    EMBEDDED = "embedded"
    SYSTEM = "system"


@contextlib.contextmanager
def _print_errors() -> Iterator[None]:
    """Prints what went wrong and what to do instead of a traceback. Exit code 32: no connection; 1: anything else."""
    try:
        yield
    except NOT_INSTALLED as error:
        error_console.print(
            f"level_sync is not installed in this database, or too old ({_message(error)}): run level-sync migrate."
        )
        raise typer.Exit(1) from error
    except psycopg.OperationalError as error:
        if not is_connection_error(error):
            error_console.print(f"{_message(error)} (SQLSTATE {error.sqlstate})", markup=False)
            raise typer.Exit(1) from error
        error_console.print(f"No connection: {_message(error)}", markup=False)
        error_console.print("Give --dsn, or set DATABASE_URL or PGHOST, PGUSER and PGDATABASE.")
        raise typer.Exit(verify.NO_CONNECTION) from error
    except (psycopg.Error, DsnError, install.MigrateError, demo.DemoError, ServerError, OSError) as error:
        error_console.print(_message(error), markup=False)
        raise typer.Exit(1) from error


def _message(error: Exception) -> str:
    return str(error).strip()


@app.command("demo")
def demo_command(
    dsn: Annotated[
        str, typer.Option("--dsn", help="An empty database to use instead of a server of the demo's own.")
    ] = "",
    server: Annotated[
        ServerKind,
        typer.Option("--server", help="The embedded PostgreSQL, or the machine's own, with pg_cron if it has it."),
    ] = ServerKind.EMBEDDED,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the demo's server and remove it.")] = False,
    psql: Annotated[bool, typer.Option("--psql", help="Open psql in the demo's database.")] = False,
) -> None:
    """Start a private PostgreSQL, fill an academy and tell the story step by step with real output."""
    demo_server = demo.DemoServer()
    with _print_errors():
        if stop:
            console.print("The demo's server is gone." if demo_server.stop() else "No demo is running.")
            return
        if psql:
            os.execv(demo_server.psql, ["psql", demo_server.dsn])  # noqa: S606
        if dsn:
            demo.require_empty_database(dsn)
            demo.run(dsn, console)
            return
        demo_server.start(server)
        demo.run(demo_server.dsn, console)
        _print_how_to_look_around(demo_server)


def _print_how_to_look_around(demo_server: demo.DemoServer) -> None:
    console.rule("[bold]Look around", align="left")
    console.print("The server stays up. In psql, try the queries below; write either table and see the other.")
    console.print(f"  {demo_server.psql} '{demo_server.dsn}'", soft_wrap=True, highlight=False, markup=False)
    console.print("  (in the source tree: make psql)")
    console.print("The other commands of level-sync, such as status and verify, find it with:")
    console.print(f'  export DATABASE_URL="{demo_server.dsn}"\n', soft_wrap=True, highlight=False, markup=False)
    console.print("  select * from level_sync.sync_events order by event_id desc limit 10;")
    console.print("  select * from level_sync.desync_issues;")
    console.print("  update user_licenses set current_level = 3 where user_id = 20001 returning *;")
    console.print("  select * from specialization_progress where student_id = 20001;\n")
    console.print("Stop and remove it with: make stop, or level-sync demo --stop")


@app.command("check")
def check_command(dsn: Dsn = "", as_json: AsJson = False) -> None:
    """Look at a database before migrate: what would be done, and what stands in the way. Changes nothing.

    Exit code: 0 ready, 1 needs decisions, 2 cannot, 32 no connection.
    """
    with _print_errors():
        findings = check.check(dsn)
    code = check.exit_code(findings)
    if as_json:
        typer.echo(json.dumps({"exit_code": code, "findings": [finding.as_json() for finding in findings]}))
    else:
        for finding in sorted(findings, key=lambda finding: check.VERDICTS.index(finding.verdict)):
            console.print(cell(f"{finding.verdict:8}{finding.subject}: {finding.detail}"))
            if finding.fix:
                console.print(cell(f"{'':8}-> {finding.fix}"))
        console.print(
            {0: "Ready: run level-sync migrate.", 1: "Decide what is marked `decide`.", 2: "Not possible yet."}[code]
        )
    raise typer.Exit(code)


@app.command()
def migrate(
    dsn: Dsn = "",
    quarantine_orphans: Annotated[
        bool, typer.Option("--quarantine-orphans", help="Move rows without user or specialization aside.")
    ] = False,
    merge_duplicates: Annotated[
        bool,
        typer.Option(
            "--merge-duplicates", help="Keep the highest level, then the latest, of a pair; move the others aside."
        ),
    ] = False,
) -> None:
    """Install level_sync, or bring it up to date. Safe to run again, and beside live traffic."""
    applied: list[str] = []

    def report(what: str) -> None:
        applied.append(what)
        console.print(f"applied {what}")

    with _print_errors():
        try:
            install.migrate(
                dsn, quarantine_orphans=quarantine_orphans, merge_duplicates=merge_duplicates, report=report
            )
        except (psycopg.Error, install.MigrateError):
            if applied:
                error_console.print(
                    "It stopped half way. What is applied stays: remove the cause and migrate again, "
                    "or take it back with level-sync rollback."
                )
            raise
        console.print("Up to date: tables, triggers, functions and views are those of this version.")


@app.command()
def restore(dsn: Dsn = "") -> None:
    """Bring back the rows that migrate moved aside, where nothing forbids it any more."""
    with _print_errors():
        outcome = install.restore(dsn)
    console.print(f"{outcome['restored']} row(s) restored, {outcome['quarantined']} still in quarantine")
    if outcome["quarantined"]:
        error_console.print(cell(f"The first that could not come back: {outcome['reason']}"))
        raise typer.Exit(1)


@app.command()
def rollback(
    dsn: Dsn = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove everything of level_sync, its log included. The application's tables and rows stay."""
    if not yes:
        typer.confirm("Remove the schema level_sync with its log, events and queue?", abort=True)
    with _print_errors():
        for migration in install.rollback(dsn):
            console.print(f"rolled back {migration}")
        console.print("level_sync is gone; specialization_progress and user_licenses stay, with all their rows.")


@app.command()
def grant(
    role: Annotated[str, typer.Argument(help="An existing role of the server.")],
    rights: Annotated[
        Rights,
        typer.Option(
            "--as",
            help="reader: sees everything, changes nothing. operator: also runs, repairs, undoes, changes settings.",
        ),
    ],
    dsn: Dsn = "",
) -> None:
    """Give a role the rights of a reader or an operator, and no others. An application that writes needs none."""
    with _print_errors(), connect(dsn) as connection:
        queries.grant_to(connection, role=role, kind=rights.value)
    console.print(f"{role} is {rights} of level_sync", highlight=False, markup=False)


@app.command()
def revoke(role: Annotated[str, typer.Argument(help="A role of the server.")], dsn: Dsn = "") -> None:
    """Take every right in level_sync from a role."""
    with _print_errors(), connect(dsn) as connection:
        queries.revoke_from(connection, role=role)
    console.print(f"{role} has no rights in level_sync", highlight=False, markup=False)


@app.command()
def status(dsn: Dsn = "", as_json: AsJson = False) -> None:
    """What stands in the tables, what differs, what waits in the queue, and the settings."""
    with _print_errors(), connect(dsn) as connection:
        now: dict[str, Any] = queries.status(connection)
        desyncs = [row for row in queries.count_desyncs(connection) if row["pairs"]]
        settings: dict[str, Any] = queries.settings(connection)
    if as_json:
        typer.echo(json.dumps({**now, "desyncs": desyncs, "settings": settings}, default=str))
        return
    print_mapping("status", "what", now)
    print_rows("desyncs", desyncs, empty="no desync: every pair has one level")
    print_mapping("settings", "setting", settings)


@app.command()
def events(
    dsn: Dsn = "",
    user: Annotated[int | None, typer.Option("--user", help="Only this user id.")] = None,
    specialization: Annotated[str | None, typer.Option("--specialization", help="Only this specialization.")] = None,
    limit: RowLimit = 20,
    as_json: AsJson = False,
) -> None:
    """What level_sync wrote, newest first: who changed what, when, through which side."""
    with _print_errors(), connect(dsn) as connection:
        rows = list(queries.events(connection, user_id=user, specialization=specialization, row_limit=limit))
    print_rows("events", rows, as_json=as_json, empty="no events")


@app.command()
def queue(dsn: Dsn = "", limit: RowLimit = 20, as_json: AsJson = False) -> None:
    """The pairs whose sync could not be done yet, with their errors."""
    with _print_errors(), connect(dsn) as connection:
        rows = list(queries.queue(connection, row_limit=limit))
    print_rows("queue", rows, as_json=as_json, empty="the queue is empty")


@app.command()
def log(dsn: Dsn = "", limit: RowLimit = 20, as_json: AsJson = False) -> None:
    """The runs of the reconcile, newest first."""
    with _print_errors(), connect(dsn) as connection:
        rows = list(queries.log(connection, row_limit=limit))
    print_rows("log", rows, as_json=as_json, empty="no run yet")


@app.command()
def reconcile(
    dsn: Dsn = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; record the plan.")] = False,
    direction: Annotated[
        str | None,
        typer.Option("--direction", help="progress_to_license or license_to_progress instead of the policy."),
    ] = None,
    plan: Annotated[int | None, typer.Option("--plan", help="Apply exactly the plan of this run.")] = None,
    approve: Annotated[bool, typer.Option("--approve", help="Repair more than settings.repair_limit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find every desync, repair it and log the run.

    Exit code: 0 done, 1 failed or partial, 3 needs approval, 4 skipped because another run is at work.
    """
    with _print_errors(), connect(dsn) as connection:
        with progress_bar(connection), _cancel_on_ctrl_c(connection):
            queries.reconcile(connection, dry_run=dry_run, direction=direction, plan=plan, approve=approve)
        run: dict[str, Any] = queries.own_last_run(connection)
    if as_json:
        typer.echo(json.dumps(run, default=str))
    else:
        _print_run(run)
    codes = {"success": 0, "needs_approval": NEEDS_APPROVAL, "skipped": SKIPPED}
    raise typer.Exit(codes.get(run["status"], RUN_FAILED))


def _print_run(run: dict[str, Any]) -> None:
    """A run's row of sync_log, and what is left to do after it."""
    print_mapping("run", "what", {key: value for key, value in run.items() if key != "results"})
    if run["status"] == "needs_approval":
        console.print(f"Look at level_sync.sync_plan, then: level-sync reconcile --plan {run['run_id']} --approve")
    elif run["dry_run"] and run["issues_found"]:
        console.print(f"Look at level_sync.sync_plan, then: level-sync reconcile --plan {run['run_id']}")
    outcomes = run["results"].get("outcomes", {}) if run["results"] else {}
    if outcomes.get("queued") or outcomes.get("failed"):
        console.print(
            f"{outcomes.get('failed', 0)} pair(s) failed, {outcomes.get('queued', 0)} are left to their queue entries. "
            "See level-sync queue. The drain tries them again; dead ones wait for level_sync.requeue()."
        )


@contextlib.contextmanager
def _cancel_on_ctrl_c(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Ctrl-C cancels the run on the server and waits for its answer: by then the run is logged as aborted.

    Ctrl-C once more does not wait.
    """
    is_interrupted = False

    def cancel(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        connection.cancel_safe()

    outer_handler = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    except psycopg.errors.QueryCanceled:
        if not is_interrupted:
            raise
        error_console.print("Interrupted: what was committed stands, and the run is logged as aborted.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, outer_handler)


@app.command()
def undo(
    run: Annotated[int, typer.Argument(help="run_id from level-sync log.")], dsn: Dsn = "", as_json: AsJson = False
) -> None:
    """Put back what a run changed, where the pair has not changed since."""
    with _print_errors(), connect(dsn) as connection:
        answer: dict[str, Any] = queries.undo(connection, run_id=run)
    typer.echo(json.dumps(answer) if as_json else answer["message"])


@app.command("schedule")
def schedule_command(
    dsn: Dsn = "",
    cron_expression: Annotated[
        str | None, typer.Option("--cron", help="Five-field cron expression; without it settings.schedule.")
    ] = None,
) -> None:
    """Make or update the pg_cron jobs: the reconcile, and the maintenance every minute."""
    with _print_errors():
        expression, cron_database = schedule.schedule(dsn, cron_expression)
    console.print(f"scheduled at {expression}, by pg_cron in database {cron_database}", highlight=False, markup=False)


@app.command()
def unschedule(dsn: Dsn = "") -> None:
    """Remove the pg_cron jobs."""
    with _print_errors():
        console.print(f"{schedule.unschedule(dsn)} job(s) removed")


@contextlib.contextmanager
def _requires_extra(name: str) -> Iterator[None]:
    """Says which extra of the package to install, where a module that only it brings is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        error_console.print(f"{error.name} is not installed: pip install '.[{name}]'", markup=False)
        raise typer.Exit(1) from error


def _parse_address(listen: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, an IPv6 host in brackets."""
    host, _, port = listen.rpartition(":")
    try:
        is_sound = host.encode("idna") != b"" and port.isdecimal() and 0 < int(port) < 65536
    except UnicodeError:  # a label of the host's name that is empty or longer than 63 characters
        is_sound = False
    if not is_sound:
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT, for example 127.0.0.1:9930")
    return host.strip("[]"), int(port)


def _stop_on_signals() -> threading.Event:
    """Set by Ctrl-C and by SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


@app.command()
def exporter(
    dsn: Dsn = "",
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT to answer Prometheus on; nothing is encrypted.")
    ] = "127.0.0.1:9930",
    scan_interval: ScanInterval = 300,
) -> None:
    """Serve metrics to Prometheus until stopped. The role needs level-sync grant ROLE --as reader."""
    host, port = _parse_address(listen)
    with _print_errors(), _requires_extra("metrics"):
        from level_sync.monitor import metrics

        read_dsn(dsn)
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        metrics.serve(
            dsn,
            host,
            port,
            scan_interval=scan_interval,
            stop=_stop_on_signals(),
            is_ready=lambda: error_console.print(f"metrics at http://{listen}/metrics", highlight=False, markup=False),
        )


@app.command("metrics")
def metrics_command(
    dsn: Dsn = "",
    textfile: Annotated[
        Path | None, typer.Option("--textfile", help="Replace this file, *.prom, for node_exporter to read.")
    ] = None,
) -> None:
    """Print the metrics once. Exit code 32 where no database answered; level_sync_up is 0 then."""
    if textfile is not None and textfile.suffix != ".prom":
        raise typer.BadParameter(f"{textfile} does not end in .prom: node_exporter would not read it")
    with _print_errors(), _requires_extra("metrics"):
        from level_sync.monitor import metrics

        read_dsn(dsn)
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        text, is_up = metrics.collect_once(dsn, textfile)
        typer.echo(text, nl=False)
    raise typer.Exit(0 if is_up else verify.NO_CONNECTION)


@app.command("dashboard")
def dashboard_command(
    dsn: Dsn = "",
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT; nothing is encrypted.")] = "127.0.0.1:9931",
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the token that browsers then ask for as a password; a must beyond this machine.",
        ),
    ] = None,
    scan_interval: ScanInterval = 300,
) -> None:
    """Show in a browser whether all is in step and what to do. The role needs level-sync grant ROLE --as reader."""
    host, port = _parse_address(listen)
    with _print_errors(), _requires_extra("dashboard"):
        from level_sync.monitor.dashboard import web

        read_dsn(dsn)
        token = _read_token(token_file) if token_file else None
        if token is None and host not in LOOPBACK:
            raise typer.BadParameter(
                f"{host} is not this machine alone: give --token-file, so that not everybody sees it"
            )
        if token is not None and len(token) < web.MIN_TOKEN_LENGTH:
            raise typer.BadParameter(f"the token in {token_file} is shorter than {web.MIN_TOKEN_LENGTH} characters")
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        web.serve(
            dsn,
            host,
            port,
            scan_interval=scan_interval,
            token=token,
            is_ready=lambda: error_console.print(f"dashboard at http://{listen}/", highlight=False, markup=False),
        )


def _read_token(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from error


@app.command("watch")
def watch_command(
    dsn: Dsn = "",
    email: Annotated[
        list[str] | None, typer.Option("--email", help="Address to send mail to; may be repeated.")
    ] = None,
    smtp: Annotated[
        str,
        typer.Option(
            "--smtp", help="HOST[:PORT] that takes the mail; logs in with SMTP_USER and SMTP_PASSWORD if set."
        ),
    ] = "localhost",
    sender: Annotated[str, typer.Option("--from", help="Address the mail comes from.")] = "level-sync@localhost",
    webhook: Annotated[
        list[str] | None,
        typer.Option(
            "--webhook",
            envvar="WATCH_WEBHOOK",
            help="URL to POST JSON to; in the variable, others on this machine do not see it.",
        ),
    ] = None,
    command: Annotated[
        list[str] | None, typer.Option("--exec", help="Shell command that gets the message as JSON on standard input.")
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, max=86400, help="Seconds between two checks.")
    ] = 300,
    patience: Annotated[
        float,
        typer.Option("--patience", min=0, max=86400, help="Seconds the database may be away before that is told."),
    ] = 30,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="File that keeps what is red, so that a restart does not tell it again."),
    ] = None,
    say: Annotated[str, typer.Option("--say", help="Send this text to everybody named, and end.")] = "",
) -> None:
    """Send a message when a check of verify turns red, and one when it is green again, until stopped.

    Checks each interval and whenever a reconcile ends. The role needs level-sync grant ROLE --as reader.
    """
    try:
        recipients = [
            *(channels.email_channel(address, sender, smtp) for address in email or []),
            *(channels.webhook_channel(url) for url in webhook or []),
            *(channels.command_channel(text) for text in command or []),
        ]
        if not say:
            read_dsn(dsn)
    except (channels.ChannelError, DsnError) as error:
        raise typer.BadParameter(str(error)) from error
    if not recipients:
        raise typer.BadParameter("say whom to tell: --email, --webhook or --exec")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    with _print_errors():
        watcher = watch.Watch(dsn, recipients, interval=interval, patience=patience, state=None if say else state)
        if say:
            raise typer.Exit(0 if watcher.say(say) else 1)
        stop = _stop_on_signals()
        worker = threading.Thread(target=watcher.run, args=[stop], daemon=True)
        worker.start()
        while worker.is_alive() and not stop.wait(1):
            pass
        worker.join(5)  # a check or a message under way may take longer than that, and is given up
    raise typer.Exit(0 if stop.is_set() else 1)


@app.command("verify")
def verify_command(
    dsn: Dsn = "",
    live: Annotated[
        bool, typer.Option("--live", help="Also write a pair both ways in a transaction and take it back.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Every check, its result and what to do.

    Exit code, added up: 1 desync, 2 schema or trigger drift, 4 schedule, 8 dead or stuck queue, 16 foreign keys or
    orphans, 32 no connection. What could not be checked counts as not good.
    """
    with _print_errors():
        try:
            checks = verify.verify(dsn, live=live)
        except psycopg.Error as error:
            if not as_json and is_connection_error(error):
                raise
            checks = [_check_from_error(error)]
    code = verify.exit_code(checks)
    if as_json:
        typer.echo(json.dumps({"ok": code == 0, "exit_code": code, "checks": [each.as_json() for each in checks]}))
    else:
        words = {True: "[green]ok[/green]", False: "[red]NOT OK[/red]", None: "[yellow]not checked[/yellow]"}
        table = Table(title="verify", title_justify="left")
        for column in ("check", "result", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for each in checks:
            table.add_row(each.name, words[each.ok], cell(each.detail), cell("" if each.ok else each.hint))
        console.print(table)
    raise typer.Exit(code)


def _check_from_error(error: psycopg.Error) -> verify.Check:
    """Stands for all checks, where none could be made."""
    if is_connection_error(error):
        return verify.Check("connection", False, _message(error), "Give --dsn, or set DATABASE_URL.")
    hint = "Remove the cause, and verify again."
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        hint = "It takes level-sync grant ROLE --as reader."
    return verify.Check("health", None, f"not checked: {_message(error)}", hint)
