"""Whatever dies at whatever moment: no acknowledged write is lost, and the next maintenance mends the rest alone."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

import internals
from academy import KEY, LICENSE, PATIENCE, PROGRESS, add_pairs, bypass, wait_until
from frozen_server import postmaster, processes
from history_checker import Write, faults
from level_sync.setup import install
from servers import Server, ServerError
from versions import NEWEST, OLDEST

PAIRS = 40  # written by the application; the pairs above are those that drain and reconcile find to do
BROKEN = 200
CRASH = ("57P01", "57P02", "57P03", "08006", "08003", "08001", None)
# Tables without a key on the pair and without the columns of level_sync: each migrate has to add and build them.
OWN_TABLES = """
    create table specialization_progress (
      id bigint generated always as identity primary key,
      student_id bigint not null, specialization_id text not null, current_level integer not null);
    create table user_licenses (
      id bigint generated always as identity primary key,
      user_id bigint not null, specialization_type text not null, current_level integer not null);
"""


@pytest.fixture
def quick_threads() -> Iterator[None]:
    """What a thread has seen of the server is still so when it acts, although others want to go on too."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(usual)


def state_of(pid: int) -> str | None:
    """As ps says it: T is stopped, Z is dead and not reaped; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def kill_backend(server: Server, backend: int) -> None:
    """The postmaster then stops every other session and recovers, as after any crash. Raises ProcessLookupError where
    the session has just ended: its process may still be there for the postmaster to reap, and no kill is a crash."""
    os.kill(backend, signal.SIGSTOP)
    wait_until(lambda: state_of(backend) in ("T", "Z", None))
    if state_of(backend) != "T":
        raise ProcessLookupError(backend)
    os.kill(backend, signal.SIGKILL)


def kill_postmaster(server: Server, _: int) -> None:
    """Its sessions notice when they next wait for their clients; until then they go on, and may still commit."""
    family = stopped_family(server)
    os.kill(family[0], signal.SIGKILL)
    start_again(server, family)


def kill_all(server: Server, victim: int) -> None:
    """As when a container is killed or the machine goes down: everything is cut short."""
    os.kill(postmaster(server), signal.SIGSTOP)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    family = stopped_family(server)
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    start_again(server, family)


KILLS = [kill_backend, kill_postmaster, kill_all]


def stopped_family(server: Server) -> list[int]:
    """The postmaster, standing still so that it cannot start another process, and all of its processes."""
    pid = postmaster(server)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")
    return processes(server)


def start_again(server: Server, family: list[int]) -> None:
    wait_until(lambda: not any(state_of(member) not in (None, "Z") for member in family))
    # Where nobody reaps it, as in some containers, the dead postmaster looks alive to the next one.
    for lock in (server.data / "postmaster.pid", server.directory / ".s.PGSQL.5432.lock"):
        lock.unlink()
    try:
        server.start()
    except ServerError:
        # PostgreSQL's own: a session that outlives its postmaster takes back the making of an unlogged table, and
        # removes the fork that recovery would know the table's file by. The next recovery finds it again.
        fatal = [line for line in server.log.read_text().splitlines() if "FATAL" in line]
        if "could not create file" not in fatal[-1] or "File exists" not in fatal[-1]:
            raise
        server.start()


class Application(threading.Thread):
    """Writes single levels and, now and then, all of them; knows which writes were acknowledged."""

    def __init__(self, dsn: str, number: int, tables: list[str], bulk_share: float) -> None:
        super().__init__()
        self.dsn, self.choice = dsn, random.Random(number)  # noqa: S311
        self.tables, self.bulk_share = tables, bulk_share
        self.history: list[Write] = []
        self.pid = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with closing(psycopg.connect(self.dsn, autocommit=True)) as connection:
                self.pid = connection.info.backend_pid
                while True:
                    self.write(connection)
        except Exception as error:
            self.error = error

    def write(self, connection: psycopg.Connection[Any]) -> None:
        table, level = self.choice.choice(self.tables), self.choice.randint(1, 8)
        user = KEY[table][0]
        is_bulk = self.choice.random() < self.bulk_share
        pairs = list(range(1, PAIRS + 1)) if is_bulk else [self.choice.randint(1, PAIRS)]
        began = time.monotonic()
        try:
            # A level that stands already is no change, and nothing that has to arrive anywhere.
            changed = connection.execute(
                f"update {table} set current_level = %(level)s from (select {user} as pair from {table}"
                f" where {user} = any (%(pairs)s) order by 1 for no key update) as locked"
                f" where {user} = locked.pair and current_level <> %(level)s returning {user}",
                {"level": level, "pairs": pairs},
            ).fetchall()
        except psycopg.Error:
            self.history += [Write(pair, level, began, None) for pair in pairs]
            raise
        self.history += [Write(pair, level, began, time.monotonic()) for (pair,) in changed]


def break_pairs(db: psycopg.Connection[Any], *, queue: bool) -> None:
    """Pairs out of step behind the triggers' back, found by the reconcile, or known to the queue."""
    with bypass(db):
        db.execute("update user_licenses set current_level = 2 where user_id > %s", [PAIRS])
    if queue:
        db.execute(
            "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
            " select student_id, 'PLAYER', 'progress', 'level_changed', 'P0001', 'planted'"
            " from specialization_progress where student_id > %s",
            [PAIRS],
        )


def reconcile(dsn: str, db: psycopg.Connection[Any]) -> None:
    break_pairs(db, queue=False)
    db.execute("call level_sync.reconcile()")


def drain(dsn: str, db: psycopg.Connection[Any]) -> None:
    break_pairs(db, queue=True)
    db.execute("call level_sync.drain_queue()")


def undo(dsn: str, db: psycopg.Connection[Any]) -> None:
    db.execute("update level_sync.settings set batch_size = 1000")  # The undo is all one transaction, and the point.
    reconcile(dsn, db)
    db.execute("select level_sync.undo(max(run_id)) from level_sync.sync_log where synced_count > 0")


def purge(dsn: str, db: psycopg.Connection[Any]) -> None:
    db.execute(
        "insert into level_sync.sync_events (occurred_at, user_id, specialization, direction, action, source)"
        " select '2000-01-01', n, 'PLAYER', 'progress_to_license', 'updated', 'trigger' from generate_series(1, 500) n"
    )
    db.execute("call level_sync.purge()")


def remove_and_install(dsn: str, db: psycopg.Connection[Any]) -> None:
    install.rollback(f"{dsn} application_name=rollback")
    install.migrate(f"{dsn} application_name=migrate")


class Worker(threading.Thread):
    """Does one thing over and over until the server is gone."""

    def __init__(self, dsn: str, activity: Callable[[str, psycopg.Connection[Any]], None]) -> None:
        super().__init__()
        self.dsn, self.activity = dsn, activity
        self.pid = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with closing(psycopg.connect(self.dsn, autocommit=True)) as db:
                self.pid = db.info.backend_pid
                while True:
                    self.activity(self.dsn, db)
        except Exception as error:
            self.error = error


MIGRATIONS = f"select count(*) from {internals.APPLIED_MIGRATIONS}"
NO_BOOKKEEPING = (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName)


@dataclass(frozen=True)
class Activity:
    """What is going on when a session or the postmaster is killed."""

    name: str
    victim: str  # finds the session that is in the middle of it; pid is the worker's
    is_cut_short: str = ""  # whether it shows after the recovery that it did not come to its end
    work: Callable[[str, psycopg.Connection[Any]], None] | None = None  # None: the application's own writes
    bulk_share: float = 0.1
    # Nothing is carried while level_sync is not installed: then only the side is written that the reconcile follows.
    tables: tuple[str, ...] = (PROGRESS, LICENSE)
    again: tuple[Callable[[str], Any], ...] = ()  # what people do who find it half done


def at(statement: str) -> str:
    return f"select pid from pg_stat_activity where pid = %(pid)s and state = 'active' and query like '%%{statement}%%'"


def at_the_migrations(application_name: str) -> str:
    return (
        f"select pid from pg_stat_activity where application_name = '{application_name}' and state <> 'idle'"
        f" and ({MIGRATIONS}) between 1 and %(migrations)s - 1"
    )


ACTIVITIES = [
    Activity("write", at("update")),
    Activity("bulk", at("update"), bulk_share=1),
    Activity(
        "reconcile",
        at("call level_sync.reconcile"),
        "select exists (select from level_sync.sync_log where status = 'running')",
        reconcile,
    ),
    Activity(
        "drain",
        at("call level_sync.drain_queue"),
        f"select exists (select from level_sync.sync_queue where user_id > {PAIRS})",
        drain,
    ),
    Activity(
        "undo",
        at("level_sync.undo"),
        "select not exists (select from level_sync.sync_events where source = 'undo'"
        " and run_id = (select max(run_id) from level_sync.sync_log where synced_count > 0))",
        undo,
    ),
    Activity(
        "purge",
        at("call level_sync.purge"),
        "select exists (select from level_sync.sync_events where occurred_at < '2001-01-01')",
        purge,
    ),
    Activity(
        "migrate",
        at_the_migrations("migrate"),
        f"select ({MIGRATIONS}) < %(migrations)s",
        remove_and_install,
        tables=(PROGRESS,),
        again=(install.migrate,),
    ),
    Activity(
        "rollback",
        at_the_migrations("rollback"),
        f"select ({MIGRATIONS}) > 0",
        remove_and_install,
        tables=(PROGRESS,),
        again=(install.rollback, install.migrate),
    ),
]


def kill_in_the_middle(
    activity: Activity,
    kill: Callable[[Server, int], None],
    server: Server,
    threads: list[Application | Worker],
    db: psycopg.Connection[Any],
    known: dict[str, int],
    choice: random.Random,
    told: str,
) -> None:
    """Looks at random moments, and kills at the first one at which a session is in the middle of the activity."""
    deadline = time.monotonic() + PATIENCE
    time.sleep(choice.uniform(0.02, 0.2))
    while True:
        with suppress(*NO_BOOKKEEPING, ProcessLookupError):
            victim = db.execute(activity.victim, known).fetchone()
            assert all(thread.is_alive() for thread in threads), f"{told}: {[thread.error for thread in threads]}"
            if victim:
                kill(server, victim[0])
                return
        if time.monotonic() > deadline:
            sessions = db.execute(
                "select pid, application_name, state, wait_event, query from pg_stat_activity"
            ).fetchall()
            pytest.fail(f"{told}: never seen at work: {sessions}")
        time.sleep(choice.uniform(0, 0.05))


def time_passes(db: psycopg.Connection[Any]) -> None:
    """Until the back-off of the queue is over and the next reconcile is overdue."""
    db.execute("update level_sync.sync_queue set next_attempt_at = '-infinity'")
    db.execute(
        "update level_sync.sync_log set job_start = job_start - interval '1 day', job_end = job_end - interval '1 day'"
    )


def connect_again(dsn: str) -> psycopg.Connection[Any]:
    connections: list[psycopg.Connection[Any]] = []

    def connected() -> bool:
        with suppress(psycopg.OperationalError):
            connections.append(psycopg.connect(dsn, autocommit=True))
        return bool(connections)

    wait_until(connected)
    return connections[0]


def was_cut_short(activity: Activity, db: psycopg.Connection[Any], known: dict[str, int]) -> bool:
    try:
        return db.execute(activity.is_cut_short, known).fetchone()[0]
    except NO_BOOKKEEPING:
        return activity.name == "migrate"  # its bookkeeping came before the first migration


def assert_in_step(db: psycopg.Connection[Any], told: str) -> None:
    """Every pair is there and equal, nothing waits or runs, and what is installed is whole."""
    for relation in ("level_sync.desync_issues", "level_sync.sync_queue", internals.PENDING_PAIRS):
        assert db.execute(f"select * from {relation}").fetchall() == [], f"{told}: {relation}"
    for table in (PROGRESS, LICENSE):
        assert db.execute(f"select count(*) from {table}").fetchone() == (PAIRS + BROKEN,), told
    assert db.execute("select * from level_sync.sync_log where status = 'running'").fetchall() == [], told
    red = "select name, detail from level_sync.health where ok is not true and name not like 'schedule%'"
    assert db.execute(red).fetchall() == [], told
    assert db.execute("select indexrelid::regclass from pg_index where not indisvalid").fetchall() == [], told


@pytest.mark.servers(OLDEST, NEWEST)
def test_killed_at_any_moment_no_acknowledged_write_is_lost_and_maintenance_mends_the_rest(
    own_server, quick_threads, request, record_property, progress
):
    is_long = request.config.getoption("proof")
    # Long: each way for each activity, three times on each server. Short: two of the ways, others on the oldest server.
    kills = len(ACTIVITIES) * (len(KILLS) * 3 if is_long else 2)
    dsn = own_server.dsn("postgres")
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute(OWN_TABLES)
        install.migrate(dsn)
        add_pairs(db, PAIRS + BROKEN)
        migrations = db.execute(MIGRATIONS).fetchone()[0]
    seed = time.time_ns() % 2**32 if is_long else 5
    choice = random.Random(seed)  # noqa: S311
    acknowledged = unknown = aborted = 0
    cut_short: Counter[str] = Counter()

    for number in range(kills):
        activity = ACTIVITIES[number % len(ACTIVITIES)]
        turn = number // len(ACTIVITIES) + number % len(ACTIVITIES) + 2 * (own_server.version > OLDEST)
        way = KILLS[turn % len(KILLS)]
        told = f"seed {seed}, kill {number}: {way.__name__} during {activity.name}"
        progress(f"PostgreSQL {own_server.version}, {told}, of {kills}; cut short: {dict(cut_short)}")
        clients = [
            Application(dsn, choice.randrange(2**32), [*activity.tables], share)
            for share in (activity.bulk_share, 0.1, 0.1)
        ]
        threads = [*clients, *([Worker(dsn, activity.work)] if activity.work else [])]
        worker = threads[-1] if activity.work else clients[0]
        with closing(psycopg.connect(dsn, autocommit=True)) as db:
            before = dict(db.execute("select student_id, current_level from specialization_progress"))
            db.execute("update level_sync.settings set batch_size = 5, inline_limit = 4")
            for thread in threads:
                thread.start()
            wait_until(lambda threads=threads: all(thread.pid or not thread.is_alive() for thread in threads))
            known = {"pid": worker.pid, "migrations": migrations}
            kill_in_the_middle(activity, way, own_server, threads, db, known, choice, told)
        for thread in threads:
            thread.join(timeout=PATIENCE)
            assert not thread.is_alive(), told
        for thread in threads:
            assert isinstance(thread.error, psycopg.OperationalError), f"{told}: {thread.error!r}"
            assert thread.error.sqlstate in CRASH, f"{told}: {thread.error!r}"

        with connect_again(dsn) as db:
            if activity.work is None:
                cut_short[activity.name] += clients[0].history[-1].ended is None
            else:
                cut_short[activity.name] += was_cut_short(activity, db, known)
            for step in activity.again:
                step(dsn)
            if not activity.again:  # What was written while nothing was installed is the reconcile's.
                half = db.execute(
                    "select user_id from level_sync.desync_issues where user_id <= %s and not exists ("
                    "select from level_sync.sync_queue as queued where queued.user_id = desync_issues.user_id)"
                    f" and not exists (select from {internals.PENDING_PAIRS} as left_behind"
                    " where left_behind.user_id = desync_issues.user_id)",
                    [PAIRS],
                ).fetchall()
                assert half == [], f"{told}: half carried"
            died = db.execute("select count(*) from level_sync.sync_log where status = 'running'").fetchone()[0]
            time_passes(db)
            db.execute("call level_sync.maintain()")
            assert_in_step(db, told)
            closed = db.execute("delete from level_sync.sync_log where status = 'aborted' returning run_id").fetchall()
            assert len(closed) == died, told
            aborted += died
            ends = {
                pair: (earned, issued)
                for pair, earned, issued in db.execute(
                    "select coalesce(student_id, user_id), p.current_level, l.current_level"
                    " from specialization_progress as p full join user_licenses as l on user_id = student_id"
                    " where coalesce(student_id, user_id) <= %s",
                    [PAIRS],
                )
            }
        assert ends.keys() == set(range(1, PAIRS + 1)), told
        history = [Write(pair, before[pair], -1, -1) for pair in range(1, PAIRS + 1)]
        history += [entry for client in clients for entry in client.history]
        assert faults(history, ends) == [], told
        acknowledged += sum(entry.ended is not None for entry in history) - PAIRS
        unknown += sum(entry.ended is None for entry in history)

    if is_long:
        assert aborted > 0
        assert [activity.name for activity in ACTIVITIES if not cut_short[activity.name]] == []
    record_property(
        "figure",
        f"{kills} kills, {kills // len(ACTIVITIES)} of each activity; {acknowledged} acknowledged writes, none lost;"
        f" {unknown} without an answer; {aborted} runs died and were closed as aborted; cut short: {dict(cut_short)}",
    )
