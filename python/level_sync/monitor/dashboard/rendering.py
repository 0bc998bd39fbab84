"""Turns what was read into HTML: the templates, and how they write times, durations and texts of the database."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.requests import Request

from level_sync.monitor.dashboard import chart
from level_sync.monitor.runbook import section_of
from level_sync.text import printable

FRESH_FOR = 15  # seconds that a page may be shown again without saying that it is old
MAX_TEXT_LENGTH = 1000  # characters of an error or of a message that a page shows

templates = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(request: Request, template: str, at: float | None = None, **context: Any) -> str:
    """The page, with what was read at that time (seconds since the epoch; None is now)."""
    now = time.time()
    at = at or now
    is_old = now - at > FRESH_FOR
    return templates.get_template(template).render(path=request.url.path, at=at, is_old=is_old, **context)


def timestamp(value: datetime | float | None) -> str:
    """A time to the second, always UTC."""
    if value is None:
        return ""
    if not isinstance(value, datetime):
        value = datetime.fromtimestamp(value, UTC)
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | Decimal | None) -> str:
    """A length of time, as exactly as somebody on call wants to know it."""
    if seconds is None:
        return ""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)} {name}"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def plain_text(value: object) -> str:
    """A text of limited length; characters that would hide what it says, such as right-to-left marks, are escaped."""
    text = "" if value is None else str(value)
    if len(text) > MAX_TEXT_LENGTH:
        text = text[:MAX_TEXT_LENGTH] + "… (cut here)"
    return printable(text)


templates.filters.update(timestamp=timestamp, plain_text=plain_text, duration=duration)
templates.globals.update(section_of=section_of, layout=chart)
