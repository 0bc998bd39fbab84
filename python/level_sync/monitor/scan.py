"""Reads level_sync for the exporter and the dashboard: cheap figures at any time, every pair only now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from level_sync import verify
from level_sync.database import queries
from level_sync.monitor.network import short_connection

READ_TIMEOUT = 5  # seconds for what a page or a scrape reads
SCAN_TIMEOUT = 120  # seconds for a statement that looks at every pair
RETRY_DELAY = 15  # seconds until the scan after one that failed, or while somebody watches what one has found
COOLDOWN_FACTOR = 10  # after a scan the server is left alone for so many times as long as the scan took
FIXED_BY_PEOPLE = ("desync", "orphans")  # checks that only a scan makes, and that turn good when somebody repairs

log = logging.getLogger("level_sync")


@dataclass
class Scan:
    """What a look at every pair has found.

    `at` is seconds since the epoch, `duration` is in seconds; `last_run_ended_at` is the end of the last run before it.
    """

    at: float
    duration: float
    last_run_ended_at: datetime | None
    desyncs: list[dict[str, Any]]
    checks: list[verify.Check]
    events: list[dict[str, Any]]


class Reader:
    """A database, read as a role that is a reader of level_sync. Who uses a connection holds the lock meanwhile."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.last_scan: Scan | None = None
        self.scan_error: str | None = None  # why the last scan failed; None where it succeeded
        self.lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """A connection for what takes milliseconds. Raises psycopg.Error."""
        with short_connection(self.dsn, READ_TIMEOUT) as connection:
            yield connection

    def scan(self) -> bool:
        """Looks at every pair and makes every check of `level-sync verify`. Returns whether that was possible."""
        with self.lock:
            began = time.time()
            try:
                with short_connection(self.dsn, SCAN_TIMEOUT) as connection:
                    last_run_ended_at = queries.last_run_ended_at(connection)
                    desyncs = list(queries.count_desyncs(connection))
                    checks = verify.run_checks(connection, self.dsn)
                    events = list(queries.recent_events(connection))
            except psycopg.Error as error:
                self.scan_error = str(error).strip()
                log.warning("no scan of all pairs: %s", self.scan_error)
                return False
            self.scan_error = None
            self.last_scan = Scan(began, time.time() - began, last_run_ended_at, desyncs, checks, events)
            return True

    def latest_checks(self, quick: list[dict[str, Any]]) -> list[verify.Check]:
        """The quick checks as they are now, and from the last scan those that only a scan makes."""
        now = {row["name"]: verify.Check(**row) for row in quick}
        if self.last_scan is None:
            return list(now.values())
        # A quick check may be impossible without a look into another database. The scan has taken that look.
        made = {name: check for name, check in now.items() if check.ok is not None}
        return list(({check.name: check for check in self.last_scan.checks} | made).values())


class ScanScheduler:
    """Decides when every pair is looked at: each `interval` seconds, and sooner on request."""

    def __init__(self, reader: Reader, interval: float) -> None:
        self.reader = reader
        self.interval = interval
        self._is_requested = threading.Event()
        self._is_stopped = threading.Event()

    @contextmanager
    def running(self, is_up: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Scans meanwhile, in a thread of its own.

        `is_up` is asked before each scan; where it says no, there is no scan and the next try comes as after a failure.
        """
        threading.Thread(target=self._scan_until_stopped, args=(is_up,), daemon=True).start()
        try:
            yield
        finally:
            self._is_stopped.set()
            self._is_requested.set()

    def _scan_until_stopped(self, is_up: Callable[[], bool]) -> None:
        while not self._is_stopped.is_set():
            should_scan = is_up()
            began = time.monotonic()
            is_done = should_scan and self.scan()
            cooldown = COOLDOWN_FACTOR * (time.monotonic() - began)
            delay = min(self.interval, cooldown if is_done else max(RETRY_DELAY, cooldown))
            if not self._is_stopped.wait(delay) and is_done:
                self._is_requested.wait(self.interval - delay)

    def scan(self) -> bool:
        """Looks at every pair now. Returns whether that was possible."""
        self._is_requested.clear()
        return self.reader.scan()

    def request_after_run(self, last_run_ended_at: datetime | None) -> None:
        """Requests a scan where a run has ended since the last one: what the run repaired still counts as desync."""
        scan = self.reader.last_scan
        if scan is not None and last_run_ended_at != scan.last_run_ended_at:
            self._is_requested.set()

    def request_while_watched(self) -> None:
        """Requests a scan where the last one found what people repair: who watches wants to see that it worked."""
        scan = self.reader.last_scan
        if (
            scan is not None
            and any(check.name in FIXED_BY_PEOPLE and not check.ok for check in scan.checks)
            and time.time() - scan.at > max(RETRY_DELAY, COOLDOWN_FACTOR * scan.duration)
        ):
            self._is_requested.set()

    @property
    def is_requested(self) -> bool:
        """Whether a scan is to be made before its time."""
        return self._is_requested.is_set()
