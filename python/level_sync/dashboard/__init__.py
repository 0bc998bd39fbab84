"""A page for people on call: is everything in step, and what must I do? Needs the extra `dashboard`.

Rendered on the server, from templates that escape every text; it reads and never writes.
"""

from __future__ import annotations

import base64
import hmac
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from level_sync.dashboard import chart as picture
from level_sync.dashboard.doubt import doubt_of
from level_sync.database import is_away, queries
from level_sync.runbook import section_of
from level_sync.scan import Reader, Scanning
from level_sync.text import printable

HERE = Path(__file__).parent
PAGE_SIZE = 100
WEEKS_SHOWN = 4
RUNS_SHOWN = 300  # in the picture
PAGES_KEPT = 20
FRESH_FOR = 15  # seconds that a page may be shown again without saying that it is old
PATIENCE = 1  # seconds a page waits for the connection, where it can be shown as it was
QUEUEING = 5  # seconds more that it waits where it cannot: others may look too
LONGEST_TEXT = 1000  # characters of an error or of a message that a page shows
SHORTEST_TOKEN = 16
LOOPBACK = ("127.0.0.1", "::1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

templates = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def moment(value: datetime | float | None) -> str:
    """A time as people on call write it, always UTC."""
    if value is None:
        return ""
    if not isinstance(value, datetime):
        value = datetime.fromtimestamp(value, timezone.utc)
    return value.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def readable(value: object) -> str:
    """A text without characters that would hide what it says, such as those that turn its direction round; no novel."""
    text = "" if value is None else str(value)
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + "… (cut here)"
    return printable(text)


def span(seconds: float | Decimal | None) -> str:
    """A length of time, as exactly as somebody on call wants to know it."""
    if seconds is None:
        return ""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)} {name}"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


templates.filters.update(moment=moment, readable=readable, span=span)
templates.globals.update(section_of=section_of, picture=picture)

Page = Callable[[Request, psycopg.Connection[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """What a page has shown, and when that was read."""

    at: float
    found: dict[str, Any]


class Dashboard:
    """The pages. One connection at a time reads for all who look."""

    def __init__(self, scanning: Scanning) -> None:
        self.scanning = scanning
        self.reader = scanning.reader
        self._last: dict[str, Seen] = {}

    def routes(self) -> list[Route | Mount]:
        return [
            Route("/", self._page("now.html", self._now)),
            Route("/runs", self._page("runs.html", self._runs)),
            Route("/runs/{run_id}", self._page("run.html", self._run)),
            Route("/queue", self._page("queue.html", self._queue)),
            Route("/users", self._page("user.html", self._user)),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]

    def _page(self, template: str, read: Page) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            # Starlette calls this in a thread of its own. While a scan has the connection, or a server that hangs, the
            # page is shown as it was, and soon says so.
            address = str(request.url)
            if not self.reader.is_connected.acquire(timeout=PATIENCE):
                if last := self._last.get(address):
                    return HTMLResponse(render(request, template, last.at, **last.found))
                if not self.reader.is_connected.acquire(timeout=QUEUEING):
                    return HTMLResponse(render(request, "busy.html"), 503)
            try:
                with self.reader.connection() as connection:
                    seen = Seen(time.time(), read(request, connection))
                self._last.pop(address, None)
                self._last[address] = seen
                if len(self._last) > PAGES_KEPT:
                    self._last.pop(next(iter(self._last)))
                return HTMLResponse(render(request, template, seen.at, **seen.found))
            except psycopg.Error as error:
                self._last.pop(address, None)
                reason = " ".join(str(error).split())
                if not is_away(error):
                    title = "The database answers, but level_sync cannot be read"
                elif "FATAL:" in reason:  # libpq tells a refusal in no other way
                    title = "The database refuses the connection"
                else:
                    title = "The database does not answer"
                page = render(request, "away.html", title=title, error=reason, is_away=is_away(error))
                return HTMLResponse(page, 503)
            finally:
                self.reader.is_connected.release()

        return answer

    def _now(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        quick = list(queries.quick_health(connection))
        self.scanning.heed_run(queries.newest_end(connection))
        self.scanning.heed_spectator()
        checks, doubt, scan = self.reader.checks(quick), doubt_of(self.scanning), self.reader.last_scan
        if doubt is not None:
            # What only an old scan has found good is not known; what it has found wrong still needs somebody.
            seen_now = {row["name"] for row in quick if row["ok"] is not None}
            checks = [doubt, *(check for check in checks if check.name in seen_now or check.ok is False)]
        now = datetime.now(timezone.utc)
        since = now - timedelta(weeks=WEEKS_SHOWN)
        runs = list(queries.runs_since(connection, since=since, row_limit=RUNS_SHOWN))
        is_cut = len(runs) == RUNS_SHOWN
        return {
            "to_do": sorted((check for check in checks if check.ok is not True), key=lambda check: check.ok is None),
            "good": [check for check in checks if check.ok is True],
            "scan": scan,
            "scan_error": self.reader.scan_error,
            "is_scan_wanted": self.scanning.is_wanted,
            "is_known": doubt is None,
            "desyncs": [row for row in scan.desyncs if row["pairs"]] if scan else [],
            "queue": queries.queue_figures(connection),
            "chart": picture.chart_of(runs, runs[0]["job_start"] if is_cut else since, now),
            "runs": runs,
            "is_cut": is_cut,
            "weeks": WEEKS_SHOWN,
        }

    def _runs(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        before = number(request, "before")
        rows = queries.runs_before(connection, before=before, row_limit=PAGE_SIZE + 1, text_limit=LONGEST_TEXT + 1)
        return {"page": page_of(rows), "is_first": before is None}

    def _run(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        run_id = whole(request.path_params["run_id"], "The number of a run")
        run = queries.run(connection, run_id=run_id, text_limit=LONGEST_TEXT + 1)
        if run is None:
            raise HTTPException(404, f"There is no run {run_id}; old ones are purged.")
        after_user, after_event = number(request, "user"), number(request, "event")
        plan = queries.plan_after(
            connection,
            run_id=run["plan"] or run_id,
            after_user=after_user,
            after_specialization=text(request, "specialization"),
            row_limit=PAGE_SIZE + 1,
        )
        repairs = queries.repairs_after(connection, run_id=run_id, after_event=after_event, row_limit=PAGE_SIZE + 1)
        return {
            "run": run,
            "plan": page_of(plan),
            "repairs": page_of(repairs),
            "is_first": after_user is None and after_event is None,
        }

    def _queue(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        after = number(request, "after")
        rows = queries.queue_after(connection, after=after, row_limit=PAGE_SIZE + 1, text_limit=LONGEST_TEXT + 1)
        return {"page": page_of(rows), "queue": queries.queue_figures(connection), "is_first": after is None}

    def _user(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        user_id, before = number(request, "id"), number(request, "before")
        rows: Iterable[dict[str, Any]] = []
        if user_id is not None:
            rows = queries.events_before(connection, user_id=user_id, before=before, row_limit=PAGE_SIZE + 1)
        return {"user_id": user_id, "page": page_of(rows), "is_first": before is None}


@dataclass(frozen=True)
class Rows:
    """The rows of one page, and whether more follow them."""

    shown: list[dict[str, Any]]
    has_more: bool


def page_of(rows: Iterable[dict[str, Any]]) -> Rows:
    """One row more than the page has room for tells that there is a next one."""
    found = list(rows)
    return Rows(found[:PAGE_SIZE], len(found) > PAGE_SIZE)


def text(request: Request, name: str) -> str:
    """A text of the query, empty where it is not given. What no text of PostgreSQL can be is the visitor's mistake."""
    given = request.query_params.get(name, "")
    if "\0" in given:
        raise HTTPException(400, f"{name} must not contain the character NUL.")
    return given


def number(request: Request, name: str) -> int | None:
    """A number of the query, None where it is not given. Anything else is the visitor's mistake."""
    given = text(request, name).strip()
    return whole(given, name) if given else None


def whole(given: str, name: str) -> int:
    """The number that was given; more than 18 digits is no id of ours."""
    if not re.fullmatch(r"-?[0-9]{1,18}", given):
        raise HTTPException(400, f"{name} must be a whole number of at most 18 digits.")
    return int(given)


class Guard:
    """Lets in who has the token, sends the headers that bind the browser, and turns away what would write."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app = app
        self.token = token

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
            await send(message)

        request = Request(scope)
        if self.token is not None and not self._is_known(request.headers.get("authorization", "")):
            refusal = Response(
                "The token, please.", 401, {"WWW-Authenticate": 'Basic realm="level_sync", charset="UTF-8"'}
            )
            await refusal(scope, receive, send_with_headers)
        elif request.method not in ("GET", "HEAD"):
            await Response("This page only shows.", 405, {"Allow": "GET, HEAD"})(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _is_known(self, authorization: str) -> bool:
        """The token is the password, whatever the user's name."""
        scheme, _, credentials = authorization.partition(" ")
        try:
            given = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except ValueError:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, (self.token or "").encode())


def render(request: Request, template: str, at: float | None = None, **found: Any) -> str:
    """The page, with what was read at that time."""
    now = time.time()
    at = at or now
    return templates.get_template(template).render(path=request.url.path, at=at, is_old=now - at > FRESH_FOR, **found)


def application(scanning: Scanning, token: str | None = None) -> Guard:
    """The dashboard; without a token it answers only to the names of this machine."""

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return HTMLResponse(render(request, "refused.html", error=error.detail), error.status_code)

    # Without a token a name that somebody else's page resolves to this machine must not reach it.
    hosts = ["*"] if token else [*LOOPBACK, "[::1]"]
    pages = Starlette(
        routes=Dashboard(scanning).routes(),
        exception_handlers={HTTPException: refuse},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )
    return Guard(pages, token)


def serve(
    dsn: str, host: str, port: int, *, scan_interval: float, is_ready: Callable[[], object], token: str | None = None
) -> None:
    """Answers until Ctrl-C or SIGTERM, and looks at every pair each scan_interval seconds. Raises OSError."""
    scanning = Scanning(Reader(dsn), scan_interval)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener, scanning.at_work():
        configuration = uvicorn.Config(
            application(scanning, token), log_level="warning", server_header=False, timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(configuration)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises the signal that has ended it once more, for whoever handled it before: that is itself.
            signal.signal(number, server.handle_exit)
        is_ready()
        server.run(sockets=[listener])
