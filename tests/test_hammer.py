"""Thirty-two clients on both tables while everything around them breaks: no write fails that may not, none is lost."""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from academy import KEY, LICENSE, PROGRESS, add_pairs, drain, events, last_run, levels, queued, set_level, user_trigger

CLIENTS = 28
HURRIED = 4  # clients with a statement_timeout
PAIRS = 2_000
LONELY = PAIRS + 1  # the user of a pair that only this test itself writes, and whose license refuses to be carried
WRITES_AT_ONCE = 20_000  # of one pgbench

ONE_WRITE = Path(__file__).with_name("one_write_of_many_pairs.sql")
# For pgbench, with pairs defined: a pair goes, whole, or comes from either side. Rows of the hottest stay.
COMING_AND_GOING = r"""
\set pair random(6, :pairs)
\set level random(1, 8)
\set what random(1, 4)
\if :what = 1
begin;
delete from specialization_progress where student_id = :pair and specialization_id = 'PLAYER';
delete from user_licenses where user_id = :pair and specialization_type = 'PLAYER';
commit;
\elif :what = 2
insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level)
values (:pair, 'PLAYER', :level, :level) on conflict do nothing;
\else
insert into specialization_progress (student_id, specialization_id, current_level) values (:pair, 'PLAYER', :level)
on conflict (student_id, specialization_id) do update set current_level = excluded.current_level;
\endif
"""

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
    return 1_000_000 if request.config.getoption("proof") else 10_000


@pytest.fixture
def progress(capsys) -> Callable[[str], None]:
    """progress(text) prints how far a long test is, at most every ten seconds."""
    told_at = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told_at
        if time.monotonic() - told_at < 10:
            return
        told_at = time.monotonic()
        with capsys.disabled():
            print(f"\n{text}", end="", flush=True)

    return tell


class Writers(threading.Thread):
    """pgbench, one after the other, until enough was written and every fault was met."""

    def __init__(self, command: list[Any], writes: int) -> None:
        super().__init__()
        self.command, self.writes = command, writes
        self.faults_were_met = threading.Event()
        self.done = 0
        self.problem = ""
        self.messages: Counter[str] = Counter()

    def run(self) -> None:
        while not self.problem and (self.done < self.writes or not self.faults_were_met.is_set()):
            transactions = min(self.writes, WRITES_AT_ONCE) // CLIENTS + 1
            ended = subprocess.run(
                [*self.command, f"--transactions={transactions}"], capture_output=True, text=True, check=False
            )
            processed = re.search(r"number of transactions actually processed: (\d+)/(\d+)", ended.stdout)
            if ended.returncode or "aborted" in ended.stderr or not processed or processed[1] != processed[2]:
                self.problem = (ended.stdout + ended.stderr[-2000:]) or "pgbench said nothing"
                return
            self.done += int(processed[1])
            # A pair in a message is of no interest, what could not be done is.
            self.messages.update(re.findall(r"WARNING:  level_sync [^:]*: (.*)", ended.stderr))


class HurriedClient(threading.Thread):
    """Writes hot pairs with a statement_timeout that some of its statements meet."""

    def __init__(self, dsn: str, number: int, stop: threading.Event) -> None:
        super().__init__()
        self.dsn, self.stopped = dsn, stop
        self.choice = random.Random(number)  # noqa: S311
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            while not self.stopped.is_set():
                table = self.choice.choice(list(KEY))
                try:
                    connection.execute(f"set statement_timeout = {self.choice.choice([4, 20, 500])}")
                    connection.execute(
                        f"update {table} set current_level = %s where {KEY[table][0]} = %s",
                        [self.choice.randint(1, 8), self.choice.randint(1, 10)],
                    )
                    self.outcomes["done"] += 1
                except psycopg.Error as error:
                    self.outcomes[error.sqlstate or "lost connection"] += 1


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


def until(done: Callable[[], bool], what: str = "no gap between the writers in a minute") -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


@contextmanager
def locked_table(connection: psycopg.Connection[Any], table: str, mode: str) -> Iterator[None]:
    until(lambda: attempt(connection, f"lock table {table} in {mode} mode"))
    yield
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
    yield
    connection.execute("rollback")


@contextmanager
def missing_queue(connection: psycopg.Connection[Any]) -> Iterator[None]:
    until(lambda: attempt(connection, "alter table level_sync.sync_queue rename to sync_queue_gone"))
    connection.execute("commit")
    yield
    until(lambda: attempt(connection, "alter table level_sync.sync_queue_gone rename to sync_queue"))
    connection.execute("commit")


class LonelyWriter:
    """Writes a pair whose license refuses it, so that each write needs the queue."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.warnings: list[str] = []
        connection.add_notice_handler(lambda notice: self.warnings.append(notice.message_primary or ""))

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
    database, db, writes, tmp_path, progress, record_property
):
    add_pairs(db, PAIRS + 1)
    db.execute(MOODY)
    user_trigger(
        db,
        f"before update on {LICENSE}",
        "raise 'never in the mood'",
        condition=f"when (new.user_id = {LONELY})",
    )
    coming_and_going = tmp_path / "coming_and_going.sql"
    coming_and_going.write_text(COMING_AND_GOING, encoding="utf-8")
    breaker = database.connect(options="-c lock_timeout=20ms")
    lonely = LonelyWriter(database.connect())
    stop = threading.Event()
    hurried = [HurriedClient(database.dsn, number, stop) for number in range(HURRIED)]
    command = [
        database.server.binaries / "pgbench",
        *("--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2", f"--define=pairs={PAIRS}"),
        *(f"--file={ONE_WRITE}@9", f"--file={coming_and_going}@1"),
        database.dsn,
    ]

    def cancelled() -> int:
        return sum(client.outcomes["57014"] for client in hurried)

    start = time.perf_counter()
    writers = Writers(command, writes)
    for thread in (writers, *hurried):
        thread.start()
    rounds = 0
    try:
        while writers.is_alive():
            with held_rows(breaker):
                before = cancelled()
                until(lambda: cancelled() > before, "no hurried client met the held rows")  # noqa: B023
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
        writers.faults_were_met.set()
        stop.set()
        for thread in (writers, *hurried):
            thread.join()
    seconds = time.perf_counter() - start

    assert not writers.problem, writers.problem
    assert writers.done >= writes
    assert rounds > 0
    outcomes = sum((client.outcomes for client in hurried), Counter[str]())
    assert set(outcomes) == {"done", "57014"}, outcomes
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
        f" 0 failed, 0 deadlocks; {HURRIED} hurried clients: {dict(outcomes)}; warnings: {dict(writers.messages)},"
        f" {waiting} queue rows, {run['synced_count']} pairs found and repaired by the reconcile",
    )
