"""level_sync measured side by side with what people would use instead, in one run: make bench."""

from __future__ import annotations

import io
import json
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib as mpl
import psycopg
import typer
from competitors import (
    APPLICATION_TRANSACTION,
    DROP_LEAST,
    IN_BATCHES,
    LEAST_TRIGGERS,
    NAIVE_TRIGGERS,
    Service,
    by_hand,
)
from rich.console import Console
from rich.table import Table

from internals import PENDING_PAIRS
from level_sync.demo.servers import EmbeddedServer, SystemServer, dsn_of
from level_sync.setup import install
from tree import SUPPORT

Connection = psycopg.Connection[Any]
console = Console()
if not console.is_terminal:
    console.width = 160  # a file has no edge at which to wrap

CONFIGURATION = """
fsync = on
shared_buffers = 512MB
max_wal_size = 4GB
checkpoint_timeout = 30min
autovacuum = off
max_connections = 50
"""
# Statements within functions are counted as well, each with those it calls itself.
PROFILING = """
shared_preload_libraries = pg_stat_statements
pg_stat_statements.track = all
"""
LEVEL_CHANGE = """
\\set pair random(1, {pairs})
update specialization_progress set current_level = 1 + current_level % 8
 where student_id = :pair and specialization_id = 'PLAYER';
"""
XP = """
\\set pair random(1, {pairs})
update specialization_progress set total_xp = total_xp + 10
 where student_id = :pair and specialization_id = 'PLAYER';
"""
BOTH_SIDES = (SUPPORT / "one_write_of_a_hot_pair.sql").read_text()
# What is in step, found in one query as the planner likes it best.
BARE_JOIN = """
select count(*)
  from specialization_progress as progress
  full join user_licenses as license
    on license.user_id = progress.student_id and license.specialization_type = progress.specialization_id
 where progress.current_level is distinct from license.current_level
"""


@dataclass
class Result:
    """One line of the table; ratio is the median of the rounds' ratios."""

    case: str
    bar: str
    ratio: float
    is_met: bool
    ours: str
    other: str
    rounds: list[float] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)  # the ratio of the least that could do something like it


@dataclass
class Bench:
    """A server with three databases: ours, the same tables without triggers, and naive triggers."""

    server: SystemServer | EmbeddedServer
    directory: Path
    rounds: int
    seconds: int
    results: list[Result] = field(default_factory=list)

    def connect(self, database: str, **options: Any) -> Connection:
        # Nothing prepared: a CALL that was would run as one transaction.
        return psycopg.connect(dsn_of(self.server, database), autocommit=True, prepare_threshold=None, **options)

    def pgbench(self, database: str, script: str, clients: int = 1) -> float:
        """Transactions a second; raises where one failed."""
        file = self.directory / "script.sql"
        file.write_text(script)
        done = subprocess.run(
            [
                self.server.binaries / "pgbench",
                *("--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=2", f"--time={self.seconds}"),
                *(f"--file={file}", dsn_of(self.server, database)),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search(r"tps = ([0-9.]+)", done.stdout)
        failed = re.search(r"number of failed transactions: (\d+)", done.stdout)
        if found is None or (database == "ours" and (failed is None or failed[1] != "0")):
            raise RuntimeError(done.stdout + done.stderr)
        return float(found[1])

    def compare(
        self,
        case: str,
        ours: Callable[[], float],
        other: Callable[[], float],
        bar: tuple[Literal["at least", "at most"], float],
        unit: str,
        against: str,
    ) -> Result:
        """Warms both up, then measures them in turn."""
        console.print(f"[bold]{case}[/bold] against {against} ...")
        ours(), other()
        pairs = [(ours(), other()) for _ in range(self.rounds)]
        ratios = [mine / theirs for mine, theirs in pairs]
        return self.note(
            case,
            bar,
            ratios,
            spread([mine for mine, _ in pairs], unit),
            f"{spread([theirs for _, theirs in pairs], unit)}, {against}",
        )

    def note(
        self,
        case: str,
        bar: tuple[Literal["at least", "at most"], float],
        ratios: list[float],
        ours: str,
        other: str,
    ) -> Result:
        ratio = statistics.median(ratios)
        is_met = ratio >= bar[1] if bar[0] == "at least" else ratio <= bar[1]
        result = Result(case, f"{bar[0]} {bar[1]:g}", ratio, is_met, ours, other, ratios)
        self.results.append(result)
        console.print(f"  {ratio:.2f} times ({result.bar}): {ours}; {other}", highlight=False)
        return result

    def limit(self, result: Result, least: Callable[[], float], other: Callable[[], float], what: str) -> None:
        """How near to its bar the least comes that could do something like it, measured in the same way."""
        least(), other()
        result.limits[what] = statistics.median([least() / other() for _ in range(self.rounds)])
        console.print(f"  {result.limits[what]:.2f} times: {what}", highlight=False)

    @contextmanager
    def least_trigger(self, kind: str) -> Iterator[None]:
        """A trigger on the tables without level_sync that does next to nothing."""
        with self.connect("bare") as connection:
            connection.execute(LEAST_TRIGGERS[kind])
            try:
                yield
            finally:
                connection.execute(DROP_LEAST)


def spread(values: list[float], unit: str) -> str:
    """The median, and between which values the rounds lay."""
    digits = 0 if statistics.median(values) >= 100 else 2
    return f"{statistics.median(values):.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def timed(connection: Connection, *statements: str) -> float:
    """Seconds that the statements take in one transaction."""
    start = time.perf_counter()
    with connection.transaction():
        for statement in statements:
            connection.execute(statement)
    return time.perf_counter() - start


def fill(connection: Connection, pairs: int, level: int = 3) -> None:
    """Users 1 to pairs, each with both rows at one level and no other; nothing bloated."""
    connection.execute("set session_replication_role = replica")
    connection.execute("truncate specialization_progress, user_licenses, level_sync.sync_events, level_sync.sync_queue")
    connection.execute(
        "insert into users (id) select n from generate_series(1, %s) as n on conflict do nothing", [pairs]
    )
    connection.execute(
        "insert into specialization_progress (student_id, specialization_id, current_level)"
        " select n, 'PLAYER', %s from generate_series(1, %s) as n",
        [level, pairs],
    )
    connection.execute(
        "insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level)"
        " select n, 'PLAYER', %s, 8 from generate_series(1, %s) as n",
        [level, pairs],
    )
    connection.execute("reset session_replication_role")
    tidy(connection)


def tidy(connection: Connection) -> None:
    """So that no measurement pays for the one before it."""
    connection.execute("vacuum analyze specialization_progress, user_licenses, level_sync.sync_events")
    connection.execute(f"vacuum analyze level_sync.sync_queue, {PENDING_PAIRS}, level_sync.sync_plan")
    connection.execute("checkpoint")


def shift(connection: Connection, table: str, condition: str = "true") -> None:
    """Changes levels past the triggers."""
    connection.execute("set session_replication_role = replica")
    connection.execute(f"update {table} set current_level = 1 + current_level % 8 where {condition}")
    connection.execute("reset session_replication_role")


def transaction_id(connection: Connection) -> int:
    """A new one; the difference of two says how many were used between them."""
    row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def last_run(connection: Connection) -> dict[str, Any]:
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        row = cursor.execute("select * from level_sync.sync_log order by run_id desc limit 1").fetchone()
    assert row is not None
    return row


@contextmanager
def watching(bench: Bench, backend: int) -> Iterator[dict[str, float]]:
    """The longest transaction of a backend in seconds and its memory in MB, looked at 100 times a second."""
    seen = {"longest": 0.0, "memory": 0.0}
    ends = threading.Event()
    # What the process holds for itself: pages of shared_buffers that it has touched are not counted.
    resident = re.compile(r"RssAnon:\s+(\d+) kB")

    def look() -> None:
        with bench.connect("ours") as connection:
            while not ends.wait(0.01):
                row = connection.execute(
                    "select extract(epoch from clock_timestamp() - xact_start) from pg_stat_activity where pid = %s",
                    [backend],
                ).fetchone()
                seen["longest"] = max(seen["longest"], float((row and row[0]) or 0))
                status = Path(f"/proc/{backend}/status")
                if status.exists() and (found := resident.search(status.read_text())):
                    seen["memory"] = max(seen["memory"], int(found[1]) / 1024)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        ends.set()
        watcher.join()


# The cases


def one_at_a_time(bench: Bench, pairs: int) -> None:
    for database in ("ours", "bare"):
        with bench.connect(database) as connection:
            fill(connection, pairs)
    xp, change = XP.format(pairs=pairs), LEVEL_CHANGE.format(pairs=pairs)

    def with_least(kind: str, script: str) -> float:
        with bench.least_trigger(kind):
            return bench.pgbench("bare", script)

    result = bench.compare(
        "update that leaves the level alone",
        lambda: bench.pgbench("ours", xp),
        lambda: bench.pgbench("bare", xp),
        ("at least", 0.95),
        "tps",
        "no sync at all",
    )
    bench.limit(
        result,
        lambda: with_least("nothing", xp),
        lambda: bench.pgbench("bare", xp),
        "one trigger that compares the levels",
    )
    bench.limit(
        result,
        lambda: with_least("note at once", xp),
        lambda: bench.pgbench("bare", xp),
        "a trigger for each statement, which would note a bulk update at once",
    )
    result = bench.compare(
        "one level change",
        lambda: bench.pgbench("ours", change),
        lambda: bench.pgbench("bare", change),
        ("at least", 0.45),
        "tps",
        "no sync at all",
    )
    bench.limit(
        result,
        lambda: with_least("carry", change),
        lambda: bench.pgbench("bare", change),
        "one trigger of two statements, which waits for locks and fails the write",
    )
    bench.compare(
        "one level change",
        lambda: bench.pgbench("ours", change),
        lambda: bench.pgbench("bare", APPLICATION_TRANSACTION.format(pairs=pairs)),
        ("at least", 1.3),
        "tps",
        "both updates and the log row in one transaction, prepared",
    )
    service = Service(dsn_of(bench.server, "bare"))
    result = bench.compare(
        "one level change",
        lambda: bench.pgbench("ours", change),
        lambda: service.per_second(pairs, bench.seconds),
        ("at least", 15),
        "tps",
        "a Python service with SQLAlchemy",
    )
    bench.limit(
        result,
        lambda: bench.pgbench("bare", change),
        lambda: service.per_second(pairs, bench.seconds),
        "no sync at all",
    )
    with bench.connect("ours") as connection:
        before = connection.execute("select pg_current_wal_lsn(), count(*) from level_sync.sync_events").fetchone()
        bench.pgbench("ours", change)
        after = connection.execute(
            "select pg_wal_lsn_diff(pg_current_wal_lsn(), %s) / (count(*) - %s),"
            " pg_total_relation_size('level_sync.sync_events') / count(*) from level_sync.sync_events",
            before,
        ).fetchone()
        assert after is not None
        console.print(f"  {after[0]:.0f} bytes of WAL and {after[1]} bytes of sync_events for each level change")


def hot_pairs(bench: Bench) -> None:
    with bench.connect("ours") as connection:
        fill(connection, 10)
    with bench.connect("naive") as connection:
        connection.execute(NAIVE_TRIGGERS)
    bench.compare(
        "10 hot pairs, 8 clients, both tables",
        lambda: bench.pgbench("ours", BOTH_SIDES, clients=8),
        lambda: bench.pgbench("naive", BOTH_SIDES, clients=8),
        ("at least", 100),
        "tps",
        "naive mirrored triggers",
    )
    with bench.connect("ours") as connection:
        row = connection.execute(
            "select count(*), (select deadlocks from pg_stat_database where datname = 'ours')"
            " from level_sync.sync_queue"
        ).fetchone()
        console.print(f"  pairs queued, deadlocks: {row}")


def bulk(bench: Bench, rows: int) -> None:
    ours, bare = bench.connect("ours"), bench.connect("bare")
    with ours, bare:
        fill(ours, rows)
        fill(bare, rows)
        update = "update specialization_progress set current_level = 1 + current_level % 8"

        def carried() -> float:
            tidy(ours)
            first_id = transaction_id(ours)
            seconds = timed(ours, update)
            console.print(f"  {transaction_id(ours) - first_id - 1} transaction ids, those of subtransactions included")
            return seconds

        def written() -> float:
            tidy(bare)
            return timed(bare, update, *by_hand("carry"))

        def noted() -> float:
            tidy(bare)
            with bench.least_trigger("note"):
                return timed(bare, update, *by_hand("carry"))

        result = bench.compare(
            f"UPDATE of {rows:,} levels", carried, written, ("at most", 1.8), "s", "three statements by hand"
        )
        bench.limit(result, noted, written, "the same, with a trigger that notes each pair in an unlogged table")
        text = "".join(f"{n}\tPLAYER\t{1 + n % 8}\n" for n in range(1, rows + 1))

        def copied(connection: Connection, *then: str) -> float:
            fill(connection, 0)
            start = time.perf_counter()
            with connection.transaction(), connection.cursor() as cursor:
                with cursor.copy(
                    "copy specialization_progress (student_id, specialization_id, current_level) from stdin"
                ) as copy:
                    data = io.StringIO(text)
                    while chunk := data.read(1 << 16):
                        copy.write(chunk)
                for statement in then:
                    cursor.execute(statement)
            return time.perf_counter() - start

        bench.compare(
            f"COPY of {rows:,} new progress rows",
            lambda: copied(ours),
            lambda: copied(bare, *by_hand("create")),
            ("at most", 1.8),
            "s",
            "COPY and two statements by hand",
        )


def runs(bench: Bench, large: int, wrong: int) -> None:
    ours, bare = bench.connect("ours"), bench.connect("bare")
    with ours, bare:
        per_pair: dict[int, float] = {}
        for pairs in sorted({100_000, large}):
            fill(ours, pairs)
            reconcile = "call level_sync.reconcile()"
            best = [clean_run(ours, reconcile) for _ in range(bench.rounds + 1)]
            per_pair[pairs] = statistics.median(best[1:]) / pairs
        console.print(f"  seconds for each pair: {per_pair}")
        bench.note(
            f"growth of time for each pair, 100,000 to {large:,}",
            ("at most", 1.3),
            [per_pair[large] / per_pair[100_000]],
            f"{per_pair[large] * 1e9:.0f} ns a pair",
            f"{per_pair[100_000] * 1e9:.0f} ns a pair at 100,000",
        )
        with watching(bench, ours.info.backend_pid) as seen:
            bench.compare(
                f"reconcile of {large:,} pairs, nothing wrong",
                lambda: clean_run(ours, "call level_sync.reconcile()"),
                lambda: timed(ours, "set local enable_hashjoin = off", BARE_JOIN),
                ("at most", 1.3),
                "s",
                "the bare merge join",
            )
        with watching(bench, ours.info.backend_pid) as seen:
            clean_run(ours, "call level_sync.reconcile()")
        console.print(f"  longest transaction {seen['longest']:.2f} s, at most {seen['memory']:.0f} MB")
        beside_writers(bench, ours, large)

        def repaired() -> float:
            fill(ours, wrong)
            shift(ours, "specialization_progress")
            tidy(ours)
            start = time.perf_counter()
            ours.execute("call level_sync.reconcile(approve => true)")
            assert last_run(ours)["synced_count"] == wrong
            return time.perf_counter() - start

        def updated() -> float:
            fill(bare, wrong)
            shift(bare, "specialization_progress")
            tidy(bare)
            return timed(bare, *by_hand("carry"))

        def in_batches(connection: Connection, pairs: int, size: int = 5000) -> float:
            start = time.perf_counter()
            for first in range(1, pairs + 1, size):
                connection.execute(IN_BATCHES, {"first": first, "last": first + size - 1})
            return time.perf_counter() - start

        def updated_in_batches() -> float:
            fill(bare, wrong)
            shift(bare, "specialization_progress")
            tidy(bare)
            return in_batches(bare, wrong)

        result = bench.compare(
            f"reconcile of {wrong:,} pairs, all wrong",
            repaired,
            updated,
            ("at most", 2),
            "s",
            "one UPDATE and one INSERT by hand",
        )
        least = "by hand, in batches that lock their rows, without plan, log of the run or a look afterwards"
        bench.limit(result, updated_in_batches, updated, least)

        def queued(connection: Connection) -> None:
            fill(connection, 100_000)
            queue_all(connection)
            tidy(connection)

        def drained() -> float:
            queued(ours)
            start = time.perf_counter()
            ours.execute("call level_sync.drain_queue()")
            assert ours.execute("select count(*) from level_sync.sync_queue").fetchone() == (0,)
            return time.perf_counter() - start

        def emptied() -> float:
            queued(bare)
            return timed(bare, *by_hand("carry"), "delete from level_sync.sync_queue")

        def emptied_in_batches() -> float:
            queued(bare)
            return in_batches(bare, 100_000)

        result = bench.compare(
            "drain of 100,000 queued pairs", drained, emptied, ("at most", 2), "s", "three statements by hand"
        )
        bench.limit(result, emptied_in_batches, emptied, least)
        service = Service(dsn_of(bench.server, "bare"))

        def found(connection: Connection, repair: Callable[[], object]) -> float:
            fill(connection, 100_000)
            shift(connection, "specialization_progress", "student_id % 50 = 0")
            tidy(connection)
            start = time.perf_counter()
            repair()
            return 2000 / (time.perf_counter() - start)

        bench.compare(
            "find and repair 2,000 desyncs among 100,000 pairs",
            lambda: found(ours, lambda: ours.execute("call level_sync.reconcile()")),
            lambda: found(bare, service.repair_all),
            ("at least", 100),
            "pairs/s",
            "a Python service with SQLAlchemy, row by row",
        )


def profile(bench: Bench, pairs: int) -> None:
    """Which statements the time, the WAL and the buffers of the set-based cases go to, for each pair."""
    ours, bare = bench.connect("ours"), bench.connect("bare")
    update = "update specialization_progress set current_level = 1 + current_level % 8"
    with ours, bare:
        ours.execute("create extension pg_stat_statements")
        cases: list[tuple[str, Callable[[Connection], None], str, tuple[str, ...]]] = [
            (f"UPDATE of {pairs:,} levels", lambda connection: None, update, (update, *by_hand("carry"))),
            (
                f"reconcile of {pairs:,} pairs, all wrong",
                lambda connection: shift(connection, "specialization_progress"),
                "call level_sync.reconcile(approve => true)",
                by_hand("carry"),
            ),
            (
                f"drain of {pairs:,} queued pairs",
                queue_all,
                "call level_sync.drain_queue()",
                (*by_hand("carry"), "delete from level_sync.sync_queue"),
            ),
        ]
        for case, prepare, statement, others in cases:
            for connection in (ours, bare):
                fill(connection, pairs)
                prepare(connection)
                tidy(connection)
            ours.execute("select pg_stat_statements_reset()")
            ours.execute(statement)
            timed(bare, *others)
            table = Table(title=case, title_justify="left")
            for column in ("database", "calls", "\u00b5s a pair", "WAL bytes a pair", "buffers a pair", "statement"):
                table.add_column(column)
            for row in ours.execute(
                "select datname, calls, total_exec_time * 1000 / %(pairs)s, wal_bytes / %(pairs)s,"
                " (shared_blks_hit + shared_blks_read) / %(pairs)s::numeric, regexp_replace(query, '\\s+', ' ', 'g')"
                " from pg_stat_statements join pg_database on oid = dbid"
                " where total_exec_time * 1000 / %(pairs)s >= 0.1 and query not like '%%pg_stat_statements%%'"
                " order by datname desc, total_exec_time desc",
                {"pairs": pairs},
            ):
                database, calls, *figures, query = row
                table.add_row(database, f"{calls:,}", *(f"{figure:.1f}" for figure in figures), query[:70])
            console.print(table)


def queue_all(connection: Connection) -> None:
    """Every level changed past the triggers, and every pair queued."""
    shift(connection, "specialization_progress")
    connection.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " select student_id, specialization_id, 'progress', 'level_changed', '55P03', 'held'"
        " from specialization_progress"
    )


def clean_run(connection: Connection, statement: str) -> float:
    start = time.perf_counter()
    connection.execute(statement)
    seconds = time.perf_counter() - start
    run = last_run(connection)
    assert (run["status"], run["issues_found"]) == ("success", 0), run
    return seconds


def beside_writers(bench: Bench, ours: Connection, pairs: int) -> None:
    """How long 99 of 100 writes take, without a run and while one run follows the other."""
    script = bench.directory / "writers.sql"
    script.write_text(LEVEL_CHANGE.format(pairs=pairs))

    def p99(beside: str | None) -> float:
        """Milliseconds, while the statement runs again and again."""
        prefix = bench.directory / f"latencies_{time.monotonic_ns()}"
        pgbench = subprocess.Popen(
            [
                bench.server.binaries / "pgbench",
                *("--no-vacuum", "--protocol=prepared", "--client=1", "--rate=200", f"--time={bench.seconds}"),
                *("--log", f"--log-prefix={prefix}", f"--file={script}", dsn_of(bench.server, "ours")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while pgbench.poll() is None:
            if beside is not None:
                ours.execute(beside)
            else:
                time.sleep(0.05)
        lines = "".join(file.read_text() for file in bench.directory.glob(f"{prefix.name}*")).splitlines()
        latencies = sorted(float(line.split()[2]) / 1000 for line in lines)
        return latencies[int(len(latencies) * 0.99)]

    result = bench.compare(
        f"writers' p99 beside a reconcile of {pairs:,} pairs",
        lambda: p99("call level_sync.reconcile()"),
        lambda: p99(None),
        ("at most", 1.2),
        "ms",
        "alone",
    )
    bench.limit(result, lambda: p99(BARE_JOIN), lambda: p99(None), "beside the bare join, again and again")


def main(
    server: Annotated[str, typer.Option(help="system (Debian's PostgreSQL) or embedded (PostgreSQL 18).")] = "system",
    pairs: Annotated[int, typer.Option(help="Pairs of the cases that write one at a time.")] = 10_000,
    rows: Annotated[int, typer.Option(help="Rows of the bulk cases.")] = 300_000,
    large: Annotated[int, typer.Option(help="Pairs of the largest reconcile.")] = 10_000_000,
    wrong: Annotated[int, typer.Option(help="Pairs of the reconcile that finds all of them wrong.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Measured rounds after the warm-up.")] = 3,
    seconds: Annotated[int, typer.Option(help="Length of each pgbench.")] = 5,
    only: Annotated[str, typer.Option(help="one, hot, bulk, runs; all of them without it.")] = "one,hot,bulk,runs",
    profiled: Annotated[
        bool, typer.Option("--profile", help="Show instead which statements the --rows of the set-based cases cost.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for results.json and results.svg.")] = Path("bench-results"),
) -> None:
    """Prints a table of ratios, and writes it as JSON and as a picture."""
    with tempfile.TemporaryDirectory(prefix="level_sync_bench_", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        running: SystemServer | EmbeddedServer = (
            SystemServer(directory / "server") if server == "system" else EmbeddedServer(directory / "server")
        )
        running.create(CONFIGURATION + (PROFILING if profiled else ""))
        try:
            bench = Bench(running, directory, rounds, seconds)
            with bench.connect("postgres") as connection:
                for database in ("ours", "bare", "naive"):
                    connection.execute(f"create database {database}")
                version = connection.execute("show server_version").fetchone()
            for database in ("ours", "bare"):
                install.migrate(dsn_of(running, database))
            with bench.connect("bare") as connection:
                for table in ("specialization_progress", "user_licenses"):
                    connection.execute(f"alter table {table} disable trigger user")
            if profiled:
                profile(bench, rows)
                return
            if "one" in only:
                one_at_a_time(bench, pairs)
            if "hot" in only:
                hot_pairs(bench)
            if "bulk" in only:
                bulk(bench, rows)
            if "runs" in only:
                runs(bench, large, wrong)
        finally:
            running.stop()
    report(bench.results, str(version and version[0]), output)


def report(results: list[Result], version: str, output: Path) -> None:
    table = Table(title=f"PostgreSQL {version}, {datetime.now(UTC):%Y-%m-%d}", title_justify="left")
    for column in ("case", "ratio", "bar", "", "level_sync", "against", "limit"):
        table.add_column(column)
    for result in results:
        mark = "met" if result.is_met else "NOT MET"
        limits = "\n".join(f"{ratio:.2f}: {what}" for what, ratio in result.limits.items())
        table.add_row(result.case, f"{result.ratio:.2f}", result.bar, mark, result.ours, result.other, limits)
    console.print(table)
    output.mkdir(exist_ok=True)
    (output / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2))
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(results) + 1), layout="constrained")
    axes.barh(
        [f"{result.case}\n{result.other.split(', ')[-1]}" for result in results],
        [result.ratio / float(result.bar.split()[-1]) for result in results],
        color=["tab:green" if result.is_met else "tab:red" for result in results],
    )
    axes.axvline(1, color="black")
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("ratio as a multiple of its bar")
    figure.savefig(output / "results.svg")
    console.print(f"written to {output}/results.json and {output}/results.svg")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
