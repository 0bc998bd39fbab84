"""Whether what the last look at every pair has found may still be believed."""

from __future__ import annotations

import time

from level_sync.scan import Scanning
from level_sync.verify import Check

SLACK = 30  # seconds that a scan may be late


def doubt_of(scanning: Scanning) -> Check | None:
    """What keeps the last scan from being believed: there is none, or it is older than two intervals."""
    scan, error = scanning.reader.last_scan, scanning.reader.scan_error
    if scan is not None and time.time() - scan.at <= 2 * scanning.interval + SLACK:
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
