"""When every pair is looked at, and whether what was found then may still be believed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from level_sync.scan import Reader
from level_sync.verify import Check

# Seconds until the next scan after one that failed, or while somebody looks at a desync or an orphan that was found; a
# scan that takes long leaves the server ten times as long in peace.
SOON, REST = 15, 10
SLACK = 30  # seconds that a scan may be late
MENDED_BY_HAND = ("desync", "orphans")  # checks that only a scan makes, and that somebody's work makes good


class Scanning:
    """Has its reader scan each interval seconds, sooner where that is worth it, and knows how fresh the last is."""

    def __init__(self, reader: Reader, interval: float) -> None:
        self.reader = reader
        self.interval = interval
        self._is_wanted = threading.Event()
        self._is_over = False
        self._newest_end: datetime | None = None
        self._end_before_scan: datetime | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Scans meanwhile, in a thread that ends with the process at the latest."""
        threading.Thread(target=self._scan_again_and_again, daemon=True).start()
        try:
            yield
        finally:
            self._is_over = True
            self._is_wanted.set()

    def _scan_again_and_again(self) -> None:
        while not self._is_over:
            began = time.monotonic()
            is_done = self.scan()
            rest = min(self.interval, REST * (time.monotonic() - began))
            self._is_wanted.wait(self.interval if is_done else min(self.interval, max(SOON, rest)))
            if self.is_wanted and not self._is_over:
                time.sleep(rest)

    def scan(self) -> bool:
        """Looks at every pair now. Returns whether that was possible."""
        self._is_wanted.clear()
        self._end_before_scan = self._newest_end
        return self.reader.scan()

    def somebody_looks(self, newest_end: datetime | None) -> None:
        """Wants a scan soon, where what the last one has found may not be so any more.

        The newest end of a run is news where it was not known before that scan.
        """
        self._newest_end = newest_end
        scan = self.reader.last_scan
        is_red = scan is not None and any(check.name in MENDED_BY_HAND and not check.ok for check in scan.checks)
        if newest_end != self._end_before_scan or (
            is_red and scan is not None and time.time() - scan.at > max(SOON, REST * scan.duration)
        ):
            self._is_wanted.set()

    @property
    def is_wanted(self) -> bool:
        """Whether a scan is to be made before its time."""
        return self._is_wanted.is_set()

    def doubt(self) -> Check | None:
        """What keeps the last scan from being believed: there is none, or it is older than two intervals."""
        scan, error = self.reader.last_scan, self.reader.scan_error
        if scan is not None and time.time() - scan.at <= 2 * self.interval + SLACK:
            return None
        if scan is None and error is None:
            return Check(
                "scan",
                None,
                "All pairs have not been looked at yet: desyncs and orphans are not known.",
                "Wait a moment: that comes by itself.",
            )
        since = "since the dashboard was started" if scan is None else "for a long time"
        return Check(
            "scan",
            None,
            f"Not all pairs could be looked at {since}: {error or 'the scan does not come to an end'}",
            "Look whether this role is a reader of level_sync, and whether somebody has locked the tables. "
            "level-sync verify makes the same checks.",
        )
