"""Connections that take a limited time, whatever becomes of the server and of the network between."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

from level_sync.database import connect, queries, read_dsn

CONNECT_TIMEOUT = 5  # seconds
LOCK_TIMEOUT = "1s"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def connect_timeout(dsn: str) -> str:
    """The connect_timeout for a dsn: the hosts that it names share CONNECT_TIMEOUT, but psycopg waits 2 s at least."""
    parts = read_dsn(dsn)
    hosts = str(parts.get("host") or parts.get("hostaddr") or os.environ.get("PGHOST", ""))
    return str(max(2, CONNECT_TIMEOUT // (hosts.count(",") + 1)))


@contextmanager
def short_connection(dsn: str, timeout: float) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection whose statements take `timeout` seconds at most. Raises psycopg.Error."""
    with connect(dsn, connect_timeout=connect_timeout(dsn)) as connection, cut_after(timeout + 3, connection):
        queries.set_timeouts(connection, statement_timeout=f"{timeout}s", lock_timeout=LOCK_TIMEOUT)
        yield connection


@contextmanager
def cut_after(seconds: float, *connections: Any) -> Iterator[list[Any]]:
    """Shuts down these connections, and those the body adds to the list, when the time is up. Their reads then fail.

    A timeout of the server does not help where a proxy between hangs, and one of smtplib or urllib is for each read: an
    answer that comes byte by byte never reaches it.
    """
    opened = list(connections)
    is_done = threading.Event()

    def cut() -> None:
        wait = seconds
        while not is_done.wait(wait):
            wait = 1  # what is still connecting is cut as soon as it has connected
            for connection in opened:
                _shut_down(connection)

    threading.Thread(target=cut, daemon=True).start()
    try:
        yield opened
    finally:
        is_done.set()


def _shut_down(connection: Any) -> None:
    """Shuts down a connection of psycopg, smtplib or http.client; one of these without a socket is not connected."""
    with suppress(OSError, AttributeError, psycopg.Error):
        if isinstance(connection, psycopg.Connection):
            with socket.socket(fileno=os.dup(connection.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)
        else:
            connection.sock.shutdown(socket.SHUT_RDWR)
