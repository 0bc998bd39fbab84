"""level-sync dashboard at work beside a test."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from academy import PATIENCE, wait_until
from level_sync.monitor.dashboard import web
from level_sync.monitor.scan import Reader, ScanScheduler
from mail_server import free_port

PATHS = ["/", "/runs", "/runs/1", "/queue", "/users", "/users?id=1"]


@contextmanager
def shown(dsn: str, token: str | None = None, port: int | None = None) -> Iterator[tuple[str, ScanScheduler]]:
    """The dashboard at work: its address and its scanning. Scans are made by the test."""
    scanning = ScanScheduler(Reader(dsn), 300)
    port = port or free_port()
    configuration = uvicorn.Config(web.application(scanning, token), port=port, log_level="warning")
    server = uvicorn.Server(configuration)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}", scanning
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def get(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    try:
        request = urllib.request.Request(url, headers=headers or {}, method=method)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)
