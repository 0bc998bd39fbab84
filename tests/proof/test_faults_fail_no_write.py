"""Thirty-two clients on both tables while everything around them breaks: no write fails that may not, none is lost."""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest

from academy import (
    KEY,
    LICENSE,
    PROGRESS,
    add_pairs,
    delete,
    drain,
    events,
    last_run,
    levels,
    queued,
    set_level,
    user_trigger,
    wait_until,
)
from servers import VERSIONS
from tree import SUPPORT

CLIENTS = 26
HURRIED = 4  # clients with a statement_timeout
INCONSTANT = 2  # clients that delete pairs and insert them
PAIRS = 2_000
LONELY = PAIRS + 1  # the user of a pair that only this test itself writes, and whose license refuses to be carried
WRITES_AT_ONCE = 20_000  # of one pgbench

RESTRICT_VIOLATION = "23001"

ONE_WRITE = SUPPORT / "one_write_of_many_pairs.sql"
# Of the application: refuses what is carried into its table, not what is written there.
MOODY = """
create function public.moody() returns trigger language plpgsql as $$
begin
  if pg_trigger_depth() > 1 and random() < 0.1 then raise 'not in the mood'; end if;
  return new;
end $$;
create trigger moody before insert or update on specialization_progress
  for each row execute function public.moody();
create trigger moody before insert or update on user_licenses for each row execute function public.moody();
"""


@pytest.fixture
def writes(request) -> int:
    """How many: the servers share those of the long version."""
    return 1_000_000 // len(VERSIONS) if request.config.getoption("proof") else 10_000


class Writers(threading.Thread):
    """pgbench, one after the other, until enough was written and every fault was met."""

    def __init__(self, command: list[Any], writes: int, stop: threading.Event) -> None:
        super().__init__()
        self.command, self.writes, self.stopped = command, writes, stop
        self.faults_were_met = threading.Event()
        self.done = 0
        self.problem = ""
        self.messages: Counter[str] = Counter()

    def run(self) -> None:
        while not self.stopped.is_set() and (self.done < self.writes or not self.faults_were_met.is_set()):
            transactions = min(self.writes, WRITES_AT_ONCE) // CLIENTS + 1
            ended = subprocess.run(
                [*self.command, f"--transactions={transactions}"], capture_output=True, text=True, check=False
            )
            processed = re.search(r"number of transactions actually processed: (\d+)/(\d+)", ended.stdout)
            if ended.returncode or "aborted" in ended.stderr or not processed or processed[1] != processed[2]:
                told = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
                self.problem = "\n".join(told) or ended.stdout or "pgbench said nothing"
                return
            self.done += int(processed[1])
            # A pair in a message is of no interest, what could not be done is.
            self.messages.update(re.findall(r"WARNING:  level_sync [^:]*: (.*)", ended.stderr))


class Client(threading.Thread):
    """Writes until told to stop, and counts how the writes ended."""

    def __init__(self, dsn: str, number: int, stop: threading.Event) -> None:
        super().__init__()
        self.dsn, self.stopped = dsn, stop
        self.choice = random.Random(number)  # noqa: S311
        self.outcomes: Counter[str] = Counter()
        self.errors: dict[str, str] = {}

    def run(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            while not self.stopped.is_set():
                try:
                    self.write(connection)
                    self.outcomes["done"] += 1
                except psycopg.Error as error:
                    self.outcomes[error.sqlstate or "lost connection"] += 1
                    self.errors[error.sqlstate or "lost connection"] = str(error)

    def write(self, connection: psycopg.Connection[Any]) -> None:
        raise NotImplementedError


class HurriedClient(Client):
    """Writes hot pairs with a statement_timeout that some of its statements meet."""

    def write(self, connection: psycopg.Connection[Any]) -> None:
        table = self.choice.choice(list(KEY))
        connection.execute(f"set statement_timeout = {self.choice.choice([4, 20, 500])}")
        connection.execute(
            f"update {table} set current_level = %s where {KEY[table][0]} = %s",
            [self.choice.randint(1, 8), self.choice.randint(1, 10)],
        )


class InconstantClient(Client):
    """Deletes a pair, whole, or inserts one of its sides. The hottest pairs stay."""

    def write(self, connection: psycopg.Connection[Any]) -> None:
        user = self.choice.randint(6, PAIRS)
        if self.choice.random() < 0.3:
            with connection.transaction():
                delete(connection, PROGRESS, user)
                delete(connection, LICENSE, user)
            return
        table = self.choice.choice(list(KEY))
        user_column, specialization_column = KEY[table]
        connection.execute(
            f"insert into {table} ({user_column}, {specialization_column}, current_level) values (%s, 'PLAYER', %s)"
            f" on conflict ({user_column}, {specialization_column})"
            " do update set current_level = excluded.current_level",
            [user, self.choice.randint(1, 8)],
        )


def outcomes_of(clients: Sequence[Client]) -> Counter[str]:
    return sum((client.outcomes for client in clients), Counter[str]())


def attempt(connection: psycopg.Connection[Any], *statements: str) -> bool:
    """Runs statements that want rows or a table to themselves; False where writers leave no gap.

    What they lock stays locked until the next commit or rollback.
    """
    connection.execute("begin")
    with suppress(psycopg.errors.LockNotAvailable):
        for statement in statements:
            connection.execute(statement)
        return True
    connection.execute("rollback")
    return False


def until(done: Callable[[], bool], what: str = "there is no gap between the writers") -> None:
    wait_until(done, lambda: what, pause=0.001)


@contextmanager
def locked_table(connection: psycopg.Connection[Any], table: str, mode: str) -> Iterator[None]:
    until(lambda: attempt(connection, f"lock table {table} in {mode} mode"))
    try:
        yield
    finally:
        connection.execute("commit")


@contextmanager
def held_rows(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Half of the hot pairs, on one side each."""
    until(
        lambda: attempt(
            connection,
            f"select from {PROGRESS} where student_id <= 3 order by student_id for update",
            f"select from {LICENSE} where user_id between 4 and 5 order by user_id for update",
        )
    )
    try:
        yield
    finally:
        connection.execute("rollback")


@contextmanager
def missing_queue(connection: psycopg.Connection[Any]) -> Iterator[None]:
    until(lambda: attempt(connection, "alter table level_sync.sync_queue rename to sync_queue_gone"))
    connection.execute("commit")
    try:
        yield
    finally:
        until(lambda: attempt(connection, "alter table level_sync.sync_queue_gone rename to sync_queue"))
        connection.execute("commit")


class LonelyWriter:
    """Writes a pair whose license refuses it, so that each write needs the queue."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.warnings: list[str] = []
        connection.add_notice_handler(self.hear)

    def hear(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self.warnings.append(notice.message_primary or "")

    def write_with_a_warning(self, expected: str) -> None:
        """The write stands, and the client is told that nothing could be queued, and why."""
        self.warnings.clear()
        level = 5 if levels(self.connection, LONELY)[0] == 4 else 4
        set_level(self.connection, PROGRESS, LONELY, level)
        assert levels(self.connection, LONELY) == (level, 3)
        assert len(self.warnings) == 1, self.warnings
        assert f"could neither carry nor queue 1 pair(s), first user {LONELY} in PLAYER" in self.warnings[0]
        assert expected in self.warnings[0]


@pytest.mark.leftovers
def test_no_write_fails_that_may_not_and_all_is_equal_once_the_faults_are_gone(
    database, db, writes, progress, record_property
):
    add_pairs(db, PAIRS + 1)
    db.execute(MOODY)
    user_trigger(
        db,
        f"before update on {LICENSE}",
        "raise 'never in the mood'",
        condition=f"when (new.user_id = {LONELY})",
    )
    breaker = database.connect(options="-c lock_timeout=20ms")
    lonely = LonelyWriter(database.connect())
    stop = threading.Event()
    hurried = [HurriedClient(database.dsn, number, stop) for number in range(HURRIED)]
    inconstant = [InconstantClient(database.dsn, number, stop) for number in range(INCONSTANT)]
    command = [
        database.server.binaries / "pgbench",
        *("--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2", f"--define=pairs={PAIRS}"),
        f"--file={ONE_WRITE}",
        database.dsn,
    ]

    start = time.perf_counter()
    writers = Writers(command, writes, stop)
    for thread in (writers, *hurried, *inconstant):
        thread.start()
    rounds = 0
    try:
        while writers.is_alive():
            with held_rows(breaker):
                before = outcomes_of(hurried)["57014"]
                until(
                    lambda: outcomes_of(hurried)["57014"] > before,  # noqa: B023
                    "no hurried client met the held rows",
                )
                writers.join(timeout=0.1)
            writers.join(timeout=0.15)
            with locked_table(breaker, "level_sync.sync_queue", "access exclusive"):
                lonely.write_with_a_warning("canceling statement due to lock timeout")
            writers.join(timeout=0.15)
            with missing_queue(breaker):
                lonely.write_with_a_warning('relation "level_sync.sync_queue" does not exist')
                writers.join(timeout=0.1)
            writers.join(timeout=0.15)
            with locked_table(breaker, "level_sync.settings", "access exclusive"):
                writers.join(timeout=0.15)
            writers.join(timeout=0.15)
            with locked_table(breaker, LICENSE, "share row exclusive"):
                writers.join(timeout=0.15)
            writers.join(timeout=0.15)
            if writers.is_alive():
                rounds += 1
                writers.faults_were_met.set()
            progress(f"{writers.done:,} of {writes:,} writes, {rounds} rounds of faults, {dict(writers.messages)}")
    finally:
        stop.set()
        for thread in (writers, *hurried, *inconstant):
            thread.join()
    seconds = time.perf_counter() - start

    assert not writers.problem, writers.problem
    assert writers.done >= writes
    assert rounds > 0
    assert set(outcomes_of(hurried)) == {"done", "57014"}, [client.errors for client in hurried]
    # A row that was committed on one side while the other was deleted stands alone: that is refused.
    assert {"done"} <= set(outcomes_of(inconstant)) <= {"done", RESTRICT_VIOLATION}, [
        client.errors for client in inconstant
    ]
    assert db.execute("select deadlocks from pg_stat_database where datname = current_database()").fetchone() == (0,)

    db.execute("drop function public.moody() cascade")
    db.execute("drop function public.of_the_application() cascade")
    assert LONELY not in {user for user, *_ in queued(db)}
    level = levels(db, LONELY)[0]
    waiting = len(queued(db))
    db.execute("update level_sync.settings set repair_limit = 1000000")
    db.execute("select level_sync.requeue()")
    drain(db)
    assert levels(db, LONELY) == (level, 3)  # nothing knows of it but the reconcile
    db.execute("call level_sync.reconcile()")
    run = last_run(db)
    assert run["status"] == "success"
    assert run["synced_count"] > 0
    assert events(db, LONELY)[-1] == ("progress_to_license", "updated", 3, level, "reconcile")
    assert db.execute("select count(*) from level_sync.desync_issues").fetchone() == (0,)
    assert queued(db) == []
    record_property(
        "figure",
        f"{writers.done} writes of {CLIENTS} clients in {seconds:.0f} s beside {rounds} rounds of faults,"
        f" 0 failed, 0 deadlocks; {HURRIED} hurried clients: {dict(outcomes_of(hurried))};"
        f" {INCONSTANT} that delete and insert: {dict(outcomes_of(inconstant))}; warnings: {dict(writers.messages)},"
        f" {waiting} queue rows, {run['synced_count']} pairs found and repaired by the reconcile",
    )
