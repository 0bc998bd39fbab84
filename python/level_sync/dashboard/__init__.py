"""A page for people on call: is everything in step, and what must I do? Needs the extra `dashboard`.

Rendered on the server, from templates that escape every text; it reads and never writes.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import threading
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

    def routes(self) -> list[Route | Mount]:
        return [
            Route("/", self._page("now.html", self._now)),
            Route("/runs", self._page("runs.html", self._runs)),
            Route("/runs/{run_id:int}", self._page("run.html", self._run)),
            Route("/queue", self._page("queue.html", self._queue)),
            Route("/users", self._page("user.html", self._user)),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]

    def _page(self, template: str, read: Page) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            # Starlette calls this in a thread of its own.
            try:
                with self.reader.is_connected, self.reader.connection() as connection:
                    found = read(request, connection)
            except psycopg.Error as error:
                return self._render(request, "away.html", {"error": str(error).strip()}, status=503)
            return self._render(request, template, found)

        return answer

    def _render(self, request: Request, template: str, found: dict[str, Any], status: int = 200) -> Response:
        html = templates.get_template(template).render(path=request.url.path, now=time.time(), **found)
        return HTMLResponse(html, status_code=status)

    def _now(self, request: Request, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        checks = self.reader.checks(list(queries.quick_health(connection)))
        since = datetime.now(timezone.utc) - timedelta(weeks=WEEKS_SHOWN)
        runs = list(queries.runs_since(connection, since=since))
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
        run_id = within_bigint(request.path_params["run_id"])
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
    if not text:
        return None
    try:
        return within_bigint(int(text))
    except ValueError:
        raise HTTPException(400, f"{name} must be a number.") from None


def within_bigint(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise HTTPException(400, "No id is as large as that.")
    return value


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
        except binascii.Error:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, (self.token or "").encode())


def application(reader: Reader, token: str | None = None) -> Starlette:
    """The dashboard; without a token it answers only to the names of this machine."""

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        html = templates.get_template("refused.html").render(path=request.url.path, now=time.time(), error=error.detail)
        return HTMLResponse(html, status_code=error.status_code)

    # Without a token a name that somebody else's page resolves to this machine must not reach it.
    hosts = ["*"] if token else [*LOOPBACK, "[::1]"]
    return Starlette(
        routes=Dashboard(reader).routes(),
        exception_handlers={HTTPException: refuse},
        middleware=[Middleware(Guard, token=token), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )


def serve(dsn: str, host: str, port: int, *, scan_interval: float, token: str | None = None) -> None:
    """Answers until Ctrl-C or SIGTERM, and looks at every pair each scan_interval seconds."""
    reader = Reader(dsn)
    stop = threading.Event()
    scanner = threading.Thread(target=reader.keep_scanning, args=[scan_interval, stop])
    scanner.start()
    try:
        uvicorn.run(application(reader, token), host=host, port=port, log_level="warning", server_header=False)
    finally:
        stop.set()
        scanner.join()
