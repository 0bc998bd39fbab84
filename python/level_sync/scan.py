"""Reads level_sync for monitoring: over one short connection at a time, and all pairs only now and then."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg

from level_sync import verify as verification
from level_sync.database import connect, queries

# In seconds: until connected; for what a page or a scrape reads; for a look at every pair.
CONNECT_TIMEOUT, READ_TIMEOUT, SCAN_TIMEOUT = 5, 5, 120
LOCK_TIMEOUT = "1s"
RETRY_AFTER = 15  # seconds until the scan after one that failed
REST = 10  # times as long as it took is the server left in peace after a scan

log = logging.getLogger("level_sync")


@contextmanager
def short_connection(dsn: str, timeout: float) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection whose statements take no longer than timeout seconds, whatever becomes of server and network.

    Raises psycopg.Error.
    """
    with connect(dsn, connect_timeout=str(CONNECT_TIMEOUT)) as connection, cut_after(connection, timeout + 3):
        queries.limit_waits(connection, statement_timeout=f"{timeout}s", lock_timeout=LOCK_TIMEOUT)
        yield connection


@contextmanager
def cut_after(connection: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
    """Cuts a connection that has gone silent, such as one through a proxy that hangs: its query then fails."""

    def cut() -> None:
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass
class Scan:
    """What a look at every pair has found; at is a time and duration is in seconds."""

    at: float
    duration: float
    desyncs: list[dict[str, Any]]
    checks: list[verification.Check]
    events: list[dict[str, Any]]


class Reader:
    """A database, read as a role that is a reader of level_sync; whoever uses it holds is_connected meanwhile."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.last_scan: Scan | None = None
        self.scan_error: str | None = None  # why the latest attempt has found nothing out
        self.is_connected = threading.Lock()
        self._is_scan_wanted = threading.Event()
        self._run_ended_at: float | None = None

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """One connection for what takes milliseconds. Raises psycopg.Error."""
        with short_connection(self.dsn, READ_TIMEOUT) as connection:
            yield connection

    def scan(self) -> bool:
        """Looks at every pair and makes every check of `level-sync verify`. Returns whether that was possible."""
        with self.is_connected:
            began = time.time()
            try:
                with short_connection(self.dsn, SCAN_TIMEOUT) as connection:
                    desyncs = list(queries.count_desyncs(connection))
                    checks = verification.checks_of(connection, self.dsn)
                    events = list(queries.recent_events(connection))
            except psycopg.Error as error:
                self.scan_error = str(error).strip()
                log.warning("no scan of all pairs: %s", self.scan_error)
                return False
            self.scan_error = None
            self.last_scan = Scan(began, time.time() - began, desyncs, checks, events)
            return True

    def keep_scanning(self, interval: float, is_worthwhile: Callable[[], bool] = lambda: True) -> None:
        """Scans each interval seconds, in a thread that ends with the process; sooner where one failed or is wanted."""

        def scan_again_and_again() -> None:
            while True:
                is_worth_it = is_worthwhile()
                self._is_scan_wanted.clear()
                began = time.monotonic()
                is_made = is_worth_it and self.scan()
                rest = min(interval, REST * (time.monotonic() - began))
                time.sleep(rest)
                self._is_scan_wanted.wait((interval if is_made else min(interval, RETRY_AFTER)) - rest)

        threading.Thread(target=scan_again_and_again, daemon=True).start()

    def heed_run(self, ended_at: float | None) -> None:
        """Brings the next scan forward where a run has ended that was not known: what it healed is red no longer."""
        if ended_at != self._run_ended_at and self.last_scan is not None:
            self._is_scan_wanted.set()
        self._run_ended_at = ended_at

    def checks(self, quick: list[dict[str, Any]]) -> list[verification.Check]:
        """The quick checks as they are now, and what only the last scan could see."""
        now = {row["name"]: verification.Check(**row) for row in quick}
        if self.last_scan is None:
            return list(now.values())
        # What could not be made at a glance, such as a look into another database, the scan has made.
        made = {name: check for name, check in now.items() if check.ok is not None}
        return list(({check.name: check for check in self.last_scan.checks} | made).values())
