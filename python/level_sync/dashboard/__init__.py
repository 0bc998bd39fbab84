"""A page for people on call: is everything in step, and what must I do? Needs the extra `dashboard`.

Rendered on the server, from templates that escape every text; it reads and never writes.
"""

from __future__ import annotations

import base64
import hmac
import re
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
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

from level_sync.dashboard.chart import chart_of
from level_sync.database import queries
from level_sync.scan import Reader

HERE = Path(__file__).parent
PAGE_SIZE = 100
WEEKS_SHOWN = 4
RUNS_SHOWN = 300  # in the picture
PAGES_KEPT = 20
PATIENCE = 1  # seconds a page waits for the connection
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


def printable(value: object) -> str:
    """A text without characters that would hide what it says, such as those that turn its direction round."""
    text = "" if value is None else str(value)
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


templates.filters["moment"] = moment
templates.filters["printable"] = printable

Page = Callable[[Request, psycopg.Connection[dict[str, Any]]], dict[str, Any]]


class Dashboard:
    """The pages. One connection at a time reads for all who look."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._last: dict[str, str] = {}

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
            # page is shown as it was: its foot says when that was.
            if not self.reader.is_connected.acquire(timeout=PATIENCE):
                last = self._last.get(str(request.url))
                return HTMLResponse(last) if last else HTMLResponse(render(request, "busy.html"), 503)
            try:
                with self.reader.connection() as connection:
                    html = render(request, template, **read(request, connection))
                self._last[str(request.url)] = html
                if len(self._last) > PAGES_KEPT:
                    self._last.pop(next(iter(self._last)))
                return HTMLResponse(html)
            except psycopg.Error as error:
                self._last.clear()
                is_away = error.sqlstate is None
                return HTMLResponse(render(request, "away.html", error=str(error).strip(), is_away=is_away), 503)
            finally:
                self.reader.is_connected.release()

        return answer

    def _now(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        checks = self.reader.checks(list(queries.quick_health(connection)))
        since = datetime.now(timezone.utc) - timedelta(weeks=WEEKS_SHOWN)
        runs = list(queries.runs_since(connection, since=since, row_limit=RUNS_SHOWN))
        scan = self.reader.last_scan
        return {
            "to_do": [check for check in checks if check.ok is not True],
            "good": [check for check in checks if check.ok is True],
            "scan": scan,
            "desyncs": [row for row in scan.desyncs if row["pairs"]] if scan else [],
            "queue": queries.queue_figures(connection),
            "last": queries.last_runs(connection),
            "chart": chart_of(runs, since, datetime.now(timezone.utc)),
            "runs": runs,
            "weeks": WEEKS_SHOWN,
        }

    def _runs(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        before = number(request, "before")
        return {"rows": list(queries.runs_before(connection, before=before, row_limit=PAGE_SIZE)), "size": PAGE_SIZE}

    def _run(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        run_id = whole(request.path_params["run_id"], "The number of a run")
        run = queries.run(connection, run_id=run_id)
        if run is None:
            raise HTTPException(404, f"There is no run {run_id}; old ones are purged.")
        plan = queries.plan_after(
            connection,
            run_id=run["plan"] or run_id,
            after_user=number(request, "user"),
            after_specialization=request.query_params.get("specialization", ""),
            row_limit=PAGE_SIZE,
        )
        repairs = queries.repairs_after(
            connection, run_id=run_id, after_event=number(request, "event"), row_limit=PAGE_SIZE
        )
        return {"run": run, "plan": list(plan), "repairs": list(repairs), "size": PAGE_SIZE}

    def _queue(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        after = number(request, "after")
        rows = list(queries.queue_after(connection, after=after, row_limit=PAGE_SIZE))
        return {"rows": rows, "queue": queries.queue_figures(connection), "size": PAGE_SIZE}

    def _user(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        user_id, before = number(request, "id"), number(request, "before")
        rows: list[dict[str, Any]] = []
        if user_id is not None:
            rows = list(queries.events_before(connection, user_id=user_id, before=before, row_limit=PAGE_SIZE))
        return {"user_id": user_id, "rows": rows, "size": PAGE_SIZE}


def number(request: Request, name: str) -> int | None:
    """A number of the query, None where it is not given. Anything else is the visitor's mistake."""
    text = request.query_params.get(name, "").strip()
    return whole(text, name) if text else None


def whole(text: str, name: str) -> int:
    """The number that the text is; more than 18 digits is no id of ours."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise HTTPException(400, f"{name} must be a whole number of at most 18 digits.")
    return int(text)


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
            await Response("This page only shows.", 405)(scope, receive, send_with_headers)
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


def render(request: Request, template: str, **found: Any) -> str:
    return templates.get_template(template).render(path=request.url.path, now=time.time(), **found)


def application(reader: Reader, token: str | None = None) -> Guard:
    """The dashboard; without a token it answers only to the names of this machine."""

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return HTMLResponse(render(request, "refused.html", error=error.detail), error.status_code)

    # Without a token a name that somebody else's page resolves to this machine must not reach it.
    hosts = ["*"] if token else [*LOOPBACK, "[::1]"]
    pages = Starlette(
        routes=Dashboard(reader).routes(),
        exception_handlers={HTTPException: refuse},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )
    return Guard(pages, token)


def serve(
    dsn: str, host: str, port: int, *, scan_interval: float, is_ready: Callable[[], object], token: str | None = None
) -> None:
    """Answers until Ctrl-C or SIGTERM, and looks at every pair each scan_interval seconds. Raises OSError."""
    reader = Reader(dsn)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        is_ready()
        reader.keep_scanning(scan_interval)
        configuration = uvicorn.Config(
            application(reader, token), log_level="warning", server_header=False, timeout_graceful_shutdown=3
        )
        uvicorn.Server(configuration).run(sockets=[listener])
