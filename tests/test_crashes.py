"""Whatever dies at whatever moment: no acknowledged write is lost, and the next maintenance mends the rest alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from academy import KEY, LICENSE, PROGRESS, add_pairs, bypass, wait_until
from conftest import Server, start_server, temporary_directory
from history_checker import Write, faults
from level_sync import install
from level_sync.servers import EmbeddedServer, dsn_of

PAIRS = 40  # written by the application; the pairs above are those that drain and reconcile find to do
BROKEN = 400
CRASH = ("57P01", "57P02", "57P03", "08006", "08003", "08001", None)


@pytest.fixture(params=["system", "embedded"])
def own_server(request) -> Iterator[Server]:
    """A server of this test's own, which it may kill."""
    with temporary_directory() as parent:
        server = start_server(request.param, parent / "server")
        try:
            yield server
        finally:
            server.stop()


def data_directory(server: Server) -> Path:
    return server.directory if isinstance(server, EmbeddedServer) else server.directory / "data"


def postmaster(server: Server) -> int:
    return int((data_directory(server) / "postmaster.pid").read_text().splitlines()[0])


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    return [int(line) for line in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_postmaster(server: Server, _: int) -> None:
    pid = postmaster(server)
    family = [pid, *children(pid)]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(member) for member in family))  # they notice that it is gone, and go too
    # Where nobody reaps it, as in some containers, the dead postmaster looks alive to the next one.
    for lock in (data_directory(server) / "postmaster.pid", server.directory / ".s.PGSQL.5432.lock"):
        lock.unlink()
    server.start()


def kill_backend(server: Server, backend: int) -> None:
    """The postmaster then stops every other session and recovers, as after any crash."""
    with suppress(ProcessLookupError):
        os.kill(backend, signal.SIGKILL)


class Application(threading.Thread):
    """Writes single levels and, now and then, all of them; knows which writes were acknowledged."""

    def __init__(self, dsn: str, number: int) -> None:
        super().__init__()
        self.dsn, self.choice = dsn, random.Random(number)  # noqa: S311
        self.history: list[Write] = []
        self.pid = 0
        self.error: psycopg.Error | None = None

    def run(self) -> None:
        with suppress(psycopg.OperationalError), psycopg.connect(self.dsn, autocommit=True) as connection:
            self.pid = connection.info.backend_pid
            while True:
                table, level = self.choice.choice([PROGRESS, LICENSE]), self.choice.randint(1, 8)
                user = KEY[table][0]
                bulk = self.choice.random() < 0.1
                pairs = list(range(1, PAIRS + 1)) if bulk else [self.choice.randint(1, PAIRS)]
                began = time.monotonic()
                try:
                    # A level that stands already is no change, and nothing that has to arrive anywhere.
                    changed = connection.execute(
                        f"update {table} set current_level = %(level)s from (select {user} as pair from {table}"
                        f" where {user} = any (%(pairs)s) order by 1 for no key update) as locked"
                        f" where {user} = locked.pair and current_level <> %(level)s returning {user}",
                        {"level": level, "pairs": pairs},
                    ).fetchall()
                except psycopg.Error as error:
                    self.history += [Write(pair, level, began, None) for pair in pairs]
                    self.error = error
                    return
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
    reconcile(dsn, db)
    db.execute("select level_sync.undo(max(run_id)) from level_sync.sync_log where synced_count > 0")


def purge(dsn: str, db: psycopg.Connection[Any]) -> None:
    db.execute(
        "insert into level_sync.sync_events (occurred_at, user_id, specialization, direction, action, source)"
        " select '2000-01-01', n, 'PLAYER', 'progress_to_license', 'updated', 'trigger' from generate_series(1, 5000) n"
    )
    db.execute("call level_sync.purge()")


def migrate(dsn: str, db: psycopg.Connection[Any]) -> None:
    install.migrate(dsn)


def write(dsn: str, db: psycopg.Connection[Any]) -> None:
    """Only the application is at work, and what dies is one of its sessions."""
    db.execute("select pg_sleep(0.05)")


class Worker(threading.Thread):
    """Does one thing over and over until the server is gone."""

    def __init__(self, dsn: str, activity: Callable[[str, psycopg.Connection[Any]], None]) -> None:
        super().__init__()
        self.dsn, self.activity = dsn, activity
        self.pid = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self.dsn, autocommit=True) as db:
                db.execute("update level_sync.settings set batch_size = 20")
                self.pid = db.info.backend_pid
                while True:
                    self.activity(self.dsn, db)
        except Exception as error:
            self.error = error


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


def test_killed_at_any_moment_no_acknowledged_write_is_lost_and_maintenance_mends_the_rest(
    own_server, request, record_property, capsys
):
    is_long = request.config.getoption("proof")
    activities = [write, reconcile, drain, undo, purge, migrate]
    kills = 108 if is_long else 12
    dsn = dsn_of(own_server, "postgres")
    install.migrate(dsn)
    with psycopg.connect(dsn, autocommit=True) as db:
        add_pairs(db, PAIRS + BROKEN)
    seed = time.time_ns() % 2**32 if is_long else 5
    choice = random.Random(seed)  # noqa: S311
    acknowledged = unknown = aborted = 0

    for number in range(kills):
        activity = activities[number % len(activities)]
        # Both ways for each activity, one after the other; the short run takes the other way on the other server.
        is_postmaster = (number // len(activities) + number + isinstance(own_server, EmbeddedServer)) % 2 == 0
        told = f"seed {seed}, kill {number}: {'postmaster' if is_postmaster else 'backend'} during {activity.__name__}"
        if is_long:
            with capsys.disabled():
                print(told, flush=True)
        with psycopg.connect(dsn, autocommit=True) as db:
            before = dict(db.execute("select student_id, current_level from specialization_progress"))
        application = [Application(dsn, choice.randrange(2**32)) for _ in range(3)]
        worker = Worker(dsn, activity)
        for thread in (worker, *application):
            thread.start()
        wait_until(lambda threads=(worker, *application): all(thread.pid for thread in threads))
        time.sleep(choice.uniform(0.02, 0.4))
        victim = application[0].pid if activity is write else worker.pid
        (kill_postmaster if is_postmaster else kill_backend)(own_server, victim)
        for thread in (worker, *application):
            thread.join(timeout=60)
            assert not thread.is_alive(), told
        assert not isinstance(worker.error, psycopg.Error) or worker.error.sqlstate in CRASH, f"{told}: {worker.error}"
        for client in application:
            assert client.error is None or client.error.sqlstate in CRASH, f"{told}: {client.error}"

        with connect_again(dsn) as db:
            if activity is migrate:
                install.migrate(dsn)
            half = db.execute(
                "select user_id from level_sync.desync_issues where user_id <= %s and not exists ("
                "select from level_sync.sync_queue as queued where queued.user_id = desync_issues.user_id)"
                " and not exists (select from level_sync.pending_pairs as left_behind"
                " where left_behind.user_id = desync_issues.user_id)",
                [PAIRS],
            ).fetchall()
            assert half == [], f"{told}: half carried"
            time_passes(db)
            db.execute("call level_sync.maintain()")
            assert db.execute("select * from level_sync.desync_issues").fetchall() == [], told
            assert db.execute("select * from level_sync.sync_queue").fetchall() == [], told
            running = "select count(*) from level_sync.sync_log where status = 'running'"
            assert db.execute(running).fetchone() == (0,), told
            aborted += db.execute("select count(*) from level_sync.sync_log where status = 'aborted'").fetchone()[0]
            db.execute("delete from level_sync.sync_log where status = 'aborted'")
            ends = {
                pair: (earned, issued)
                for pair, earned, issued in db.execute(
                    "select student_id, p.current_level, l.current_level from specialization_progress as p"
                    " join user_licenses as l on user_id = student_id where student_id <= %s",
                    [PAIRS],
                )
            }
        history = [Write(pair, before[pair], -1, -1) for pair in range(1, PAIRS + 1)]
        history += [entry for client in application for entry in client.history]
        assert faults(history, ends) == [], told
        acknowledged += sum(entry.ended is not None for entry in history) - PAIRS
        unknown += sum(entry.ended is None for entry in history)

    record_property(
        "figure",
        f"{kills} kills; {acknowledged} acknowledged writes, none lost; {unknown} without an answer;"
        f" {aborted} runs died and were closed as aborted",
    )
