"""Whether the last scan is too old to be relied on."""

from __future__ import annotations

import time

from level_sync.monitor.scan import ScanScheduler
from level_sync.verify import Check

TOLERANCE = 30  # seconds that a scan may be late


def staleness_check(scheduler: ScanScheduler) -> Check | None:
    """A check `scan` where there is no scan, or the last one is older than two intervals; else None."""
    scan, error = scheduler.reader.last_scan, scheduler.reader.scan_error
    if scan is not None and time.time() - scan.at <= 2 * scheduler.interval + TOLERANCE:
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
