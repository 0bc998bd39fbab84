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
from datetime import datetime
from typing import Any

import psycopg

from level_sync import verify as verification
from level_sync.database import connect, queries, read_dsn

# In seconds: until connected; for what a page or a scrape reads; for a look at every pair.
CONNECT_TIMEOUT, READ_TIMEOUT, SCAN_TIMEOUT = 5, 5, 120
LOCK_TIMEOUT = "1s"
SOON = 15  # seconds until the scan after one that failed, or while somebody looks at what one has found
REST = 10  # times as long as it took is the server left in peace after a scan
MENDED_BY_HAND = ("desync", "orphans")  # checks that only a scan makes, and that somebody's work makes good

log = logging.getLogger("level_sync")


def connect_timeout(dsn: str) -> str:
    """Seconds for each of the hosts that a dsn names: CONNECT_TIMEOUT shared out, but psycopg waits 2 at least."""
    parts = read_dsn(dsn)
    hosts = str(parts.get("host") or parts.get("hostaddr") or os.environ.get("PGHOST", ""))
    return str(max(2, CONNECT_TIMEOUT // (hosts.count(",") + 1)))


@contextmanager
def short_connection(dsn: str, timeout: float) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection whose statements take no longer than timeout seconds, whatever becomes of server and network.

    Raises psycopg.Error.
    """
    with connect(dsn, connect_timeout=connect_timeout(dsn)) as connection, cut_after(connection, timeout + 3):
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
    """What a look at every pair has found; at is a time, duration is in seconds, newest_end is that of a run before."""

    at: float
    duration: float
    newest_end: datetime | None
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
                    newest_end = queries.newest_end(connection)
                    desyncs = list(queries.count_desyncs(connection))
                    checks = verification.checks_of(connection, self.dsn)
                    events = list(queries.recent_events(connection))
            except psycopg.Error as error:
                self.scan_error = str(error).strip()
                log.warning("no scan of all pairs: %s", self.scan_error)
                return False
            self.scan_error = None
            self.last_scan = Scan(began, time.time() - began, newest_end, desyncs, checks, events)
            return True

    def checks(self, quick: list[dict[str, Any]]) -> list[verification.Check]:
        """The quick checks as they are now, and what only the last scan could see."""
        now = {row["name"]: verification.Check(**row) for row in quick}
        if self.last_scan is None:
            return list(now.values())
        # What could not be made at a glance, such as a look into another database, the scan has made.
        made = {name: check for name, check in now.items() if check.ok is not None}
        return list(({check.name: check for check in self.last_scan.checks} | made).values())


class Scanning:
    """When every pair is looked at: each interval seconds, and sooner where that is worth it."""

    def __init__(self, reader: Reader, interval: float) -> None:
        self.reader = reader
        self.interval = interval
        self._is_wanted = threading.Event()
        self._is_over = threading.Event()

    @contextmanager
    def at_work(self, is_worthwhile: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Scans meanwhile, in a thread that ends with the process at the latest.

        What is not worthwhile is left out like a scan that failed.
        """
        threading.Thread(target=self._scan_again_and_again, args=(is_worthwhile,), daemon=True).start()
        try:
            yield
        finally:
            self._is_over.set()
            self._is_wanted.set()

    def _scan_again_and_again(self, is_worthwhile: Callable[[], bool]) -> None:
        while not self._is_over.is_set():
            is_worth_it = is_worthwhile()
            began = time.monotonic()
            is_done = is_worth_it and self.scan()
            peace = REST * (time.monotonic() - began)
            rest = min(self.interval, peace if is_done else max(SOON, peace))
            if not self._is_over.wait(rest) and is_done:
                self._is_wanted.wait(self.interval - rest)

    def scan(self) -> bool:
        """Looks at every pair now. Returns whether that was possible."""
        self._is_wanted.clear()
        return self.reader.scan()

    def heed_run(self, newest_end: datetime | None) -> None:
        """Wants a scan where a run has ended that the last one did not know: what it healed is red no longer."""
        scan = self.reader.last_scan
        if scan is not None and newest_end != scan.newest_end:
            self._is_wanted.set()

    def heed_spectator(self) -> None:
        """Wants a scan soon where the last one has found what somebody mends who watches."""
        scan = self.reader.last_scan
        if (
            scan is not None
            and any(check.name in MENDED_BY_HAND and not check.ok for check in scan.checks)
            and time.time() - scan.at > max(SOON, REST * scan.duration)
        ):
            self._is_wanted.set()

    @property
    def is_wanted(self) -> bool:
        """Whether a scan is to be made before its time."""
        return self._is_wanted.is_set()
