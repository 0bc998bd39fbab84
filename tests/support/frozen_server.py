"""A server that is made to hang: all its processes stand still, and its socket still takes connections."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from servers import Server


def postmaster(server: Server) -> int:
    return int((server.data / "postmaster.pid").read_text().splitlines()[0])


def processes(server: Server) -> list[int]:
    """Process ids of a server, the postmaster's first."""
    first = postmaster(server)
    children = Path(f"/proc/{first}/task/{first}/children").read_text()
    return [first, *map(int, children.split())]


def freeze(server: Server) -> None:
    for pid in processes(server):
        os.kill(pid, signal.SIGSTOP)


def thaw(server: Server) -> None:
    for pid in reversed(processes(server)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
