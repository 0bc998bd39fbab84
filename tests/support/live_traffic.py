"""Writers that go on while something is done to their tables, and how long they waited for it."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from academy import LICENSE, PROGRESS, set_level, wait_until
from tree import LEVEL_SYNC


def start(database: Any, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [LEVEL_SYNC, *command, "--dsn", database.dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


def other_sessions(db: psycopg.Connection[Any]) -> int:
    """Other sessions in this database."""
    query = """select count(*) from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()"""
    return db.execute(query).fetchone()[0]


@dataclass
class Traffic:
    """What writers met: the seconds of each write, and of each write to a table that nobody else wants."""

    durations: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def was_held_up(self) -> bool:
        """Whether a write took a second, beyond what this machine makes anything wait at the moment."""
        return max(self.durations) >= 1 + 5 * max(self.beside)


@contextmanager
def live_traffic(database: Any) -> Iterator[Traffic]:
    """Two sessions write both tables, in both orders, until the end, and a third one writes one of its own."""
    traffic = Traffic()
    ends = threading.Event()

    def write(user: int, tables: tuple[str, str]) -> None:
        connection = database.connect(autocommit=False)
        number = 0
        while not ends.is_set():
            number += 1
            try:
                for table in tables:
                    with timed(traffic.durations):
                        set_level(connection, table, user, 1 + number % 8)
                with timed(traffic.durations):
                    connection.commit()
                time.sleep(0.002)  # think time
            except psycopg.Error as error:
                traffic.errors.append(str(error))
                connection.rollback()

    def write_beside() -> None:
        connection = database.connect()
        connection.execute("create temp table beside as select 1 as n")
        while not ends.is_set():
            with timed(traffic.beside):
                connection.execute("update beside set n = n + 1")
            time.sleep(0.002)

    writers = [
        threading.Thread(target=write, args=(1, (PROGRESS, LICENSE))),
        threading.Thread(target=write, args=(2, (LICENSE, PROGRESS))),
        threading.Thread(target=write_beside),
    ]
    for writer in writers:
        writer.start()
    try:
        wait_until(lambda: len(traffic.durations) > 20 and traffic.beside)
        yield traffic
        written = len(traffic.durations)
        wait_until(lambda: len(traffic.durations) > written + 20)
    finally:
        ends.set()
        for writer in writers:
            writer.join()


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds.append(time.monotonic() - began)
