"""The pages of the dashboard: what each of them reads, and what is shown while it cannot be read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from level_sync.database import is_connection_error, queries
from level_sync.monitor.dashboard.chart import build_chart
from level_sync.monitor.dashboard.rendering import MAX_TEXT_LENGTH, render
from level_sync.monitor.dashboard.staleness import staleness_check
from level_sync.monitor.scan import ScanScheduler

STATIC_FILES = Path(__file__).with_name("static")
PAGE_SIZE = 100
WEEKS_SHOWN = 4
MAX_RUNS_SHOWN = 300  # in the chart
MAX_CACHED_PAGES = 20
LOCK_WAIT_IF_CACHED = 1  # seconds a page waits for the reader's lock, where it can be shown as it was
MORE_LOCK_WAIT = 5  # seconds that it waits after these where it cannot: others may look too
MAX_QUERY_TEXT = MAX_TEXT_LENGTH + 1  # characters that are read of a text, so that a page sees that it is longer

ReadPage = Callable[[Request, psycopg.Connection[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class CachedPage:
    """What a page was rendered from, and when that was read."""

    at: float
    context: dict[str, Any]


class Dashboard:
    """The pages. All who look share one connection at a time."""

    def __init__(self, scheduler: ScanScheduler) -> None:
        self.scheduler = scheduler
        self.reader = scheduler.reader
        self._cache: dict[str, CachedPage] = {}  # by address, the latest last

    def routes(self) -> list[Route | Mount]:
        return [
            Route("/", self._page("overview.html", self._read_overview)),
            Route("/runs", self._page("runs.html", self._read_runs)),
            Route("/runs/{run_id}", self._page("run.html", self._read_run)),
            Route("/queue", self._page("queue.html", self._read_queue)),
            Route("/users", self._page("user.html", self._read_user)),
            Mount("/static", StaticFiles(directory=STATIC_FILES)),
        ]

    def _page(self, template: str, read: ReadPage) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            # Starlette calls this in a thread of its own. While a scan holds the lock, or a server hangs, the page is
            # shown as it was, and says so once it is old.
            address = str(request.url)
            if not self.reader.lock.acquire(timeout=LOCK_WAIT_IF_CACHED):
                if cached := self._cache.get(address):
                    return HTMLResponse(render(request, template, cached.at, **cached.context))
                if not self.reader.lock.acquire(timeout=MORE_LOCK_WAIT):
                    return HTMLResponse(render(request, "busy.html"), 503)
            try:
                with self.reader.connection() as connection:
                    page = CachedPage(time.time(), read(request, connection))
                self._keep(address, page)
                return HTMLResponse(render(request, template, page.at, **page.context))
            except psycopg.Error as error:
                self._cache.pop(address, None)
                return _unavailable(request, error)
            finally:
                self.reader.lock.release()

        return answer

    def _keep(self, address: str, page: CachedPage) -> None:
        self._cache.pop(address, None)
        self._cache[address] = page
        if len(self._cache) > MAX_CACHED_PAGES:
            self._cache.pop(next(iter(self._cache)))

    def _read_overview(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        quick = list(queries.quick_health(connection))
        self.scheduler.request_after_run(queries.last_run_ended_at(connection))
        self.scheduler.request_while_watched()
        checks, stale, scan = self.reader.latest_checks(quick), staleness_check(self.scheduler), self.reader.last_scan
        if stale is not None:
            # What an old scan found good is not known any more; what it found wrong still needs somebody.
            known_now = {row["name"] for row in quick if row["ok"] is not None}
            checks = [stale, *(check for check in checks if check.name in known_now or check.ok is False)]
        now = datetime.now(UTC)
        since = now - timedelta(weeks=WEEKS_SHOWN)
        runs = list(queries.runs_since(connection, since=since, row_limit=MAX_RUNS_SHOWN))
        is_cut = len(runs) == MAX_RUNS_SHOWN
        return {
            "to_do": sorted((check for check in checks if check.ok is not True), key=lambda check: check.ok is None),
            "good": [check for check in checks if check.ok is True],
            "scan": scan,
            "scan_error": self.reader.scan_error,
            "is_scan_requested": self.scheduler.is_requested,
            "is_known": stale is None,
            "desyncs": [row for row in scan.desyncs if row["pairs"]] if scan else [],
            "queue": queries.queue_summary(connection),
            "chart": build_chart(runs, runs[0]["job_start"] if is_cut else since, now),
            "runs": runs,
            "is_cut": is_cut,
            "weeks": WEEKS_SHOWN,
        }

    def _read_runs(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        before = integer_parameter(request, "before")
        rows = queries.runs_before(connection, before=before, row_limit=PAGE_SIZE + 1, text_limit=MAX_QUERY_TEXT)
        return {"page": first_rows(rows), "is_first": before is None}

    def _read_run(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        run_id = parse_integer(request.path_params["run_id"], "The number of a run")
        run = queries.run(connection, run_id=run_id, text_limit=MAX_QUERY_TEXT)
        if run is None:
            raise HTTPException(404, f"There is no run {run_id}; old ones are purged.")
        after_user, after_event = integer_parameter(request, "user"), integer_parameter(request, "event")
        plan = queries.plan_after(
            connection,
            run_id=run["plan"] or run_id,
            after_user=after_user,
            after_specialization=text_parameter(request, "specialization"),
            row_limit=PAGE_SIZE + 1,
        )
        repairs = queries.repairs_after(connection, run_id=run_id, after_event=after_event, row_limit=PAGE_SIZE + 1)
        return {
            "run": run,
            "plan": first_rows(plan),
            "repairs": first_rows(repairs),
            "is_first": after_user is None and after_event is None,
        }

    def _read_queue(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        after = integer_parameter(request, "after")
        rows = queries.queue_after(connection, after=after, row_limit=PAGE_SIZE + 1, text_limit=MAX_QUERY_TEXT)
        return {"page": first_rows(rows), "queue": queries.queue_summary(connection), "is_first": after is None}

    def _read_user(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        user_id, before = integer_parameter(request, "id"), integer_parameter(request, "before")
        rows: Iterable[dict[str, Any]] = []
        if user_id is not None:
            rows = queries.events_before(connection, user_id=user_id, before=before, row_limit=PAGE_SIZE + 1)
        return {"user_id": user_id, "page": first_rows(rows), "is_first": before is None}


def _unavailable(request: Request, error: psycopg.Error) -> Response:
    reason = " ".join(str(error).split())
    has_answered = not is_connection_error(error)
    if has_answered:
        title = "The database answers, but level_sync cannot be read"
    elif "FATAL:" in reason:  # the only sign that a server has answered and refuses the role
        title = "The database refuses the connection"
    else:
        title = "The database does not answer"
    page = render(request, "unavailable.html", title=title, error=reason, has_answered=has_answered)
    return HTMLResponse(page, 503)


@dataclass(frozen=True)
class Rows:
    """The rows of one page, and whether more follow them."""

    shown: list[dict[str, Any]]
    has_more: bool


def first_rows(rows: Iterable[dict[str, Any]]) -> Rows:
    """The rows that a page has room for; the queries return one more, which tells that there is a next page."""
    found = list(rows)
    return Rows(found[:PAGE_SIZE], len(found) > PAGE_SIZE)


def text_parameter(request: Request, name: str) -> str:
    """A parameter of the address, empty where it is not given. Refuses NUL, which no text of PostgreSQL can hold."""
    given = request.query_params.get(name, "")
    if "\0" in given:
        raise HTTPException(400, f"{name} must not contain the character NUL.")
    return given


def integer_parameter(request: Request, name: str) -> int | None:
    """A whole number of the address, None where it is not given."""
    given = text_parameter(request, name).strip()
    return parse_integer(given, name) if given else None


def parse_integer(given: str, name: str) -> int:
    """The number that was given; more than 18 digits is no id of ours."""
    if not re.fullmatch(r"-?[0-9]{1,18}", given):
        raise HTTPException(400, f"{name} must be a whole number of at most 18 digits.")
    return int(given)
