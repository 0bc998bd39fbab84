"""Reads level_sync for monitoring: over one short connection at a time, and all pairs only now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from level_sync import verify as verification
from level_sync.database import connect, queries

READ_TIMEOUT = "5s"
SCAN_TIMEOUT = "10min"
# A server that has gone without a word is noticed: seconds until connected, milliseconds until an answer is given up.
NETWORK: dict[str, Any] = {"connect_timeout": 5, "tcp_user_timeout": 10_000}

log = logging.getLogger("level_sync")


@dataclass
class Scan:
    """What a look at every pair has found; at is a time and duration is in seconds."""

    at: float
    duration: float
    desyncs: list[dict[str, Any]]
    checks: list[verification.Check]


class Reader:
    """A database, read as a role that is a reader of level_sync; whoever uses it waits for the connection."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.last_scan: Scan | None = None
        self.is_connected = threading.Lock()

    @contextmanager
    def connection(self, statement_timeout: str = READ_TIMEOUT) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """One connection; the caller holds is_connected. Raises psycopg.Error."""
        with connect(self.dsn, **NETWORK) as connection:
            queries.limit_statement(connection, statement_timeout=statement_timeout)
            yield connection

    def scan(self) -> bool:
        """Looks at every pair and makes every check of `level-sync verify`. Returns whether that was possible."""
        with self.is_connected:
            began = time.time()
            try:
                with self.connection(SCAN_TIMEOUT) as connection:
                    desyncs = list(queries.count_desyncs(connection))
                    checks = verification.checks_of(connection, self.dsn)
            except psycopg.Error as error:
                log.warning("no scan of all pairs: %s", str(error).strip())
                return False
            self.last_scan = Scan(began, time.time() - began, desyncs, checks)
            return True

    def keep_scanning(self, interval: float, stop: threading.Event) -> None:
        """A scan each interval seconds, until stop is set."""
        while True:
            self.scan()
            if stop.wait(interval):
                return

    def checks(self, quick: list[dict[str, Any]]) -> list[verification.Check]:
        """The quick checks as they are now, and what only the last scan could see."""
        now = {row["name"]: verification.Check(**row) for row in quick}
        if self.last_scan is None:
            return list(now.values())
        # What could not be made at a glance, such as a look into another database, the scan has made.
        made = {name: check for name, check in now.items() if check.ok is not None}
        return list(({check.name: check for check in self.last_scan.checks} | made).values())
