"""The runs of the last weeks as a picture, in the coordinates of its SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

WIDTH, BARS, DURATIONS = 960, 140, 60  # of the picture, of what was found, and of how long it took
BAR = 5


@dataclass(frozen=True)
class Bar:
    """One run: where it stands, and how high what it found, repaired and failed at reaches."""

    run: dict[str, Any]
    x: float
    found: float
    repaired: float
    failed: float
    duration: float


@dataclass(frozen=True)
class Chart:
    bars: list[Bar]
    days: list[tuple[float, str]]
    most_found: int
    longest: float


def chart_of(runs: list[dict[str, Any]], since: datetime, until: datetime) -> Chart:
    """Heights are logarithmic: one desync must be seen beside ten thousand."""
    most_found = max([run["issues_found"] or 0 for run in runs], default=0)
    longest = max([float(run["duration_seconds"] or 0) for run in runs], default=0)
    span = (until - since).total_seconds()

    def x(moment: datetime) -> float:
        return round((moment - since).total_seconds() / span * (WIDTH - 2 * BAR), 1)

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
    midnight = since.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    days = [(x(midnight + timedelta(days=day)), f"{midnight + timedelta(days=day):%d %b}") for day in range(0, 28, 7)]
    return Chart(bars, days, most_found, longest)
