"""Serves the dashboard: who is let in, and the headers that bind the browser."""

from __future__ import annotations

import base64
import hmac
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from level_sync.monitor.dashboard.pages import Dashboard
from level_sync.monitor.dashboard.rendering import render
from level_sync.monitor.network import LOOPBACK
from level_sync.monitor.scan import Reader, ScanScheduler

MIN_TOKEN_LENGTH = 16
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class AccessControl:
    """Middleware that lets in who has the token, refuses every method that writes, and adds HEADERS."""

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
        if self.token is not None and not self._is_authorized(request.headers.get("authorization", "")):
            refusal = Response(
                "The token, please.", 401, {"WWW-Authenticate": 'Basic realm="level_sync", charset="UTF-8"'}
            )
            await refusal(scope, receive, send_with_headers)
        elif request.method not in ("GET", "HEAD"):
            await Response("This page only shows.", 405, {"Allow": "GET, HEAD"})(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _is_authorized(self, authorization: str) -> bool:
        """The token is the password, whatever the user's name."""
        scheme, _, credentials = authorization.partition(" ")
        try:
            given = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except ValueError:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, (self.token or "").encode())


def application(scheduler: ScanScheduler, token: str | None = None) -> AccessControl:
    """The dashboard; without a token it answers only to the names of this machine."""

    def show_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return HTMLResponse(render(request, "error.html", error=error.detail), error.status_code)

    # Against DNS rebinding: somebody else's page must not reach it through a name that resolves to this machine.
    hosts = ["*"] if token else [*LOOPBACK, "[::1]"]
    pages = Starlette(
        routes=Dashboard(scheduler).routes(),
        exception_handlers={HTTPException: show_error},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )
    return AccessControl(pages, token)


def serve(
    dsn: str, host: str, port: int, *, scan_interval: float, is_ready: Callable[[], object], token: str | None = None
) -> None:
    """Answers until Ctrl-C or SIGTERM, and looks at every pair each scan_interval seconds. Raises OSError."""
    scheduler = ScanScheduler(Reader(dsn), scan_interval)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener, scheduler.running():
        configuration = uvicorn.Config(
            application(scheduler, token), log_level="warning", server_header=False, timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(configuration)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises the signal that has ended it once more, for the handler that was there before it. That is
            # this one, which only asks uvicorn to end.
            signal.signal(number, server.handle_exit)
        is_ready()
        server.run(sockets=[listener])
