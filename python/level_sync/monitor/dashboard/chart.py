"""The runs of the last weeks as a bar chart, in the coordinates of its SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

# Heights from the top: room for the marks, the bars of what was found, the axis, and below it the bars of how long it
# took.
WIDTH, MARKS_HEIGHT, BARS_HEIGHT, DURATIONS_HEIGHT = 960, 22, 140, 50
AXIS = MARKS_HEIGHT + BARS_HEIGHT
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 2, 8
MARKS = {"failed": "×", "aborted": "×", "partial": "!", "needs_approval": "?", "running": "…", "skipped": "–"}  # noqa: RUF001
LABEL_STEPS = [timedelta(hours=1), timedelta(hours=6), timedelta(days=1), timedelta(days=7)]
MAX_LABELS = 7


@dataclass(frozen=True)
class Bar:
    """One run: where it stands, and the heights of what it found, repaired and failed at, and of how long it took."""

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
    """The bars, the labels below the axis with their x, and the values of the highest bars (pairs; seconds)."""

    bars: list[Bar]
    bar_width: float
    labels: list[tuple[float, str]]
    most_found: int
    longest: float

    @property
    def marks(self) -> list[tuple[str, str]]:
        """Each status that is marked in the chart, with its mark."""
        seen = {bar.run["status"] for bar in self.bars}
        return [(status, mark) for status, mark in MARKS.items() if status in seen]


def build_chart(runs: list[dict[str, Any]], since: datetime, until: datetime) -> Chart:
    """Heights are logarithmic: one desync must be seen beside ten thousand."""
    # A run whose session ended early has recorded what it repaired, but not what it found.
    most_found = max([run["issues_found"] or run["synced_count"] or 0 for run in runs], default=0)
    longest = max([float(run["duration_seconds"] or 0) for run in runs], default=0)
    span = (until - since).total_seconds()
    bar_width = round(min(max(WIDTH / max(len(runs), 1) * 0.7, MIN_BAR_WIDTH), MAX_BAR_WIDTH), 1)

    def x(moment: datetime) -> float:
        return round((moment - since).total_seconds() / span * (WIDTH - bar_width), 1)

    def height(value: float | None, highest: float, room: int) -> float:
        return round(math.log1p(value) / math.log1p(highest) * room, 1) if highest and value else 0

    bars = [
        Bar(
            run,
            x(run["job_start"]),
            height(run["issues_found"], most_found, BARS_HEIGHT),
            height(run["synced_count"], most_found, BARS_HEIGHT),
            height(run["failed_count"], most_found, BARS_HEIGHT),
            height(float(run["duration_seconds"] or 0), longest, DURATIONS_HEIGHT),
        )
        for run in runs
    ]
    labels = [(x(at), label) for at, label in _axis_labels(since, until)]
    return Chart(bars, bar_width, labels, most_found, longest)


def _axis_labels(since: datetime, until: datetime) -> list[tuple[datetime, str]]:
    """At most MAX_LABELS days, or hours where the time is short."""
    step = next((step for step in LABEL_STEPS if (until - since) / step <= MAX_LABELS), LABEL_STEPS[-1])
    at = since.replace(hour=0, minute=0, second=0, microsecond=0)
    while at < since:
        at += min(step, timedelta(days=1))
    labels = []
    while at < until - step / 3:  # a label at the edge would be cut off
        labels.append((at, f"{at:%d %b}" if step >= timedelta(days=1) else f"{at:%H:%M}"))
        at += step
    return labels
