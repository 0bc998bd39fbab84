"""A server that can be made to hang: all its processes stand still, and its socket still takes connections."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import CONFIGURATION, dsn_of, temporary_directory
from level_sync import install
from level_sync.servers import EmbeddedServer


@pytest.fixture
def private_server() -> Iterator[EmbeddedServer]:
    """A migrated server of this test's own, to be frozen."""
    with temporary_directory() as parent:
        server = EmbeddedServer(parent / "server")
        server.create(CONFIGURATION)
        try:
            install.migrate(dsn_of(server, "postgres"))
            yield server
        finally:
            server.stop()


def processes(server: EmbeddedServer) -> list[int]:
    """Process ids of a server, the postmaster's first."""
    postmaster = int((server.directory / "postmaster.pid").read_text().split("\n")[0])
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text()
    return [postmaster, *map(int, children.split())]


def freeze(server: EmbeddedServer) -> None:
    for pid in processes(server):
        os.kill(pid, signal.SIGSTOP)


def thaw(server: EmbeddedServer) -> None:
    for pid in reversed(processes(server)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
