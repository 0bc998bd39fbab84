"""The runs of the last weeks as a picture, in the coordinates of its SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

WIDTH, TOP, BARS, DURATIONS = 960, 22, 140, 50  # of the picture, of the marks, of what was found, of how long it took
LINE = TOP + BARS
THINNEST, THICKEST = 2, 8
MARKS = {"failed": "×", "aborted": "×", "partial": "!", "needs_approval": "?", "running": "…", "skipped": "–"}  # noqa: RUF001
STEPS = [timedelta(hours=1), timedelta(hours=6), timedelta(days=1), timedelta(days=7)]
MOST_LABELS = 7


@dataclass(frozen=True)
class Bar:
    """One run: where it stands, and how high what it found, repaired and failed at reaches."""

    run: dict[str, Any]
    x: float
    found: float
    repaired: float
    failed: float
    duration: float

    @property
    def mark(self) -> str:
        """What is written above a run that is not simply a success."""
        return MARKS.get(self.run["status"], "")


@dataclass(frozen=True)
class Chart:
    bars: list[Bar]
    thickness: float
    times: list[tuple[float, str]]
    most_found: int
    longest: float

    @property
    def marks(self) -> list[tuple[str, str]]:
        """Each status that the picture marks, with its mark."""
        seen = {bar.run["status"] for bar in self.bars}
        return [(status, mark) for status, mark in MARKS.items() if status in seen]


def chart_of(runs: list[dict[str, Any]], since: datetime, until: datetime) -> Chart:
    """Heights are logarithmic: one desync must be seen beside ten thousand."""
    # A run whose session ended before it did has told what it repaired, not what it found.
    most_found = max([run["issues_found"] or run["synced_count"] or 0 for run in runs], default=0)
    longest = max([float(run["duration_seconds"] or 0) for run in runs], default=0)
    span = (until - since).total_seconds()
    thickness = round(min(max(WIDTH / max(len(runs), 1) * 0.7, THINNEST), THICKEST), 1)

    def x(moment: datetime) -> float:
        return round((moment - since).total_seconds() / span * (WIDTH - thickness), 1)

    def height(value: float | None, most: float, room: int) -> float:
        return round(math.log1p(value) / math.log1p(most) * room, 1) if most and value else 0

    bars = [
        Bar(
            run,
            x(run["job_start"]),
            height(run["issues_found"], most_found, BARS),
            height(run["synced_count"], most_found, BARS),
            height(run["failed_count"], most_found, BARS),
            height(float(run["duration_seconds"] or 0), longest, DURATIONS),
        )
        for run in runs
    ]
    return Chart(bars, thickness, [(x(at), label) for at, label in times_of(since, until)], most_found, longest)


def times_of(since: datetime, until: datetime) -> list[tuple[datetime, str]]:
    """What stands below the picture: a few days, or hours where it is short."""
    step = next((step for step in STEPS if (until - since) / step <= MOST_LABELS), STEPS[-1])
    at = since.replace(hour=0, minute=0, second=0, microsecond=0)
    while at < since:
        at += min(step, timedelta(days=1))
    times = []
    # The last one would be cut off where it stands at the edge.
    while at < until - step / 3:
        times.append((at, f"{at:%d %b}" if step >= timedelta(days=1) else f"{at:%H:%M}"))
        at += step
    return times
