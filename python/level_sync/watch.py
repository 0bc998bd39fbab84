"""Tells people when a check of level_sync turns red and when it is green again, where no monitoring system does."""

from __future__ import annotations

import json
import logging
import os
import smtplib
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import psycopg

from level_sync import verify as verification
from level_sync.database import connect, queries, read_dsn
from level_sync.scan import NETWORK
from level_sync.verify import Check

CHECK_TIMEOUT = "5min"
SEND_TIMEOUT = 30  # seconds
MESSAGES_KEPT = 100

log = logging.getLogger("level_sync")


@dataclass(frozen=True)
class Message:
    """What is sent: the checks that have turned red, and those that are green again."""

    subject: str
    text: str
    red: list[dict[str, Any]] = field(default_factory=list)
    green: list[dict[str, Any]] = field(default_factory=list)


Channel = Callable[[Message], None]


def by_email(recipients: Sequence[str], sender: str, server: str) -> Channel:
    """Sends mails through HOST[:PORT], encrypted where it offers STARTTLS, as SMTP_USER with SMTP_PASSWORD if set."""
    host, _, port = server.partition(":")

    def send(message: Message) -> None:
        mail = EmailMessage()
        mail["Subject"], mail["From"], mail["To"] = message.subject, sender, ", ".join(recipients)
        mail.set_content(message.text)
        with smtplib.SMTP(host, int(port or 25), timeout=SEND_TIMEOUT) as smtp:
            smtp.ehlo()
            if smtp.has_extn("starttls"):
                smtp.starttls()
                smtp.ehlo()
            if "SMTP_USER" in os.environ:
                smtp.login(os.environ["SMTP_USER"], os.environ.get("SMTP_PASSWORD", ""))
            smtp.send_message(mail)

    return send


def by_webhook(url: str) -> Channel:
    """POSTs the message as JSON; its `text` is what chat services show."""

    def send(message: Message) -> None:
        body = json.dumps({**asdict(message), "text": f"{message.subject}\n{message.text}"}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=SEND_TIMEOUT):  # noqa: S310
            pass

    return send


def by_command(command: str) -> Channel:
    """Runs a shell command with the message as JSON on its standard input."""

    def send(message: Message) -> None:
        subprocess.run(  # noqa: S602 - the operator's own command line
            command,
            shell=True,
            input=json.dumps(asdict(message)),
            text=True,
            timeout=SEND_TIMEOUT,
            check=True,
        )

    return send


def tell_systemd(state: str) -> None:
    """READY=1 and WATCHDOG=1, where systemd has started this process as Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.sendall(state.encode())


class Watch:
    """Makes every check of `level-sync verify` each interval and whenever a run ends, over one connection."""

    def __init__(
        self, dsn: str, channels: Sequence[Channel], *, interval: float, patience: float, state: Path | None = None
    ) -> None:
        """Seconds between two checks; seconds a database may be away before that is told; a file for what is red."""
        self.dsn = dsn
        self.channels = channels
        self.interval = interval
        self.patience = patience
        self.state = state
        self.red: dict[str, Check] = {}
        self.unsent: list[tuple[Channel, Message]] = []
        if state is not None and state.exists():
            self.red = {kept["name"]: Check(**kept) for kept in json.loads(state.read_text())}

    def run(self, stop: threading.Event) -> None:
        """Watches until stop is set. A lost connection is made again, forever."""
        away_since: float | None = None
        while not stop.is_set():
            tell_systemd("READY=1\nWATCHDOG=1")
            try:
                with connect(self.dsn, **NETWORK) as connection:
                    queries.limit_statement(connection, statement_timeout=CHECK_TIMEOUT)
                    queries.listen(connection)
                    while not stop.is_set():
                        tell_systemd("WATCHDOG=1")
                        self.judge(verification.checks_of(connection, self.dsn))
                        away_since = None
                        self._wait_for_a_run(connection, stop)
            except psycopg.Error as error:
                away_since = away_since or time.monotonic()
                log.warning("no connection: %s", str(error).strip())
                if time.monotonic() - away_since >= self.patience:
                    hint = "Look whether the server runs and whether this role may connect."
                    self.judge([Check("connection", False, str(error).strip(), hint)], is_complete=False)
                stop.wait(min(self.interval, max(self.patience / 4, 0.2)))

    def _wait_for_a_run(self, connection: psycopg.Connection[Any], stop: threading.Event) -> None:
        deadline = time.monotonic() + self.interval
        while not stop.is_set() and time.monotonic() < deadline:
            for _ in connection.notifies(timeout=min(1, deadline - time.monotonic()), stop_after=1):
                return

    def judge(self, checks: Sequence[Check], *, is_complete: bool = True) -> None:
        """Sends what has changed since the last time, once; an incomplete list says nothing of the others."""
        now_red = {check.name: check for check in checks if check.ok is not True}
        turned_red = [check for name, check in now_red.items() if name not in self.red]
        # A check that is gone, such as one of a job that was removed, is not red any more.
        turned_green = [check for name, check in self.red.items() if is_complete and name not in now_red]
        if turned_red or turned_green:
            self.red = {**({} if is_complete else self.red), **now_red}
            if self.state is not None:
                kept = self.state.with_suffix(".new")
                kept.write_text(json.dumps([asdict(check) for check in self.red.values()]))
                kept.replace(self.state)
            message = message_of(database_of(self.dsn), turned_red, turned_green)
            self.unsent += [(channel, message) for channel in self.channels]
        self.send()

    def send(self) -> None:
        """Sends what is not sent yet; what cannot be sent now is tried again with the next check."""
        failed = []
        for channel, message in self.unsent:
            try:
                channel(message)
            except (OSError, smtplib.SMTPException, subprocess.SubprocessError) as error:
                log.warning("not sent, tried again later: %s: %s", message.subject, error)
                failed.append((channel, message))
        self.unsent = failed[-MESSAGES_KEPT:]


def database_of(dsn: str) -> str:
    """Which database a message is about, without any secret of the dsn."""
    parts = read_dsn(dsn)
    database = parts.get("dbname") or os.environ.get("PGDATABASE", "the default database")
    host = parts.get("host") or os.environ.get("PGHOST", "localhost")
    return f"{database} at {host}"


def message_of(where: str, red: Sequence[Check], green: Sequence[Check]) -> Message:
    """One message for all that has changed at once."""
    parts = []
    if red:
        parts.append("RED " + ", ".join(check.name for check in red))
    if green:
        parts.append("green again " + ", ".join(check.name for check in green))
    lines = [f"RED {check.name}: {check.detail}\n    {check.hint}" for check in red]
    lines += [f"green again {check.name} (it was: {check.detail})" for check in green]
    subject = " ".join(f"level_sync in {where}: {'; '.join(parts)}".split())
    return Message(subject, "\n".join(lines), [check.as_json() for check in red], [check.as_json() for check in green])
