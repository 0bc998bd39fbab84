"""Tells people when a check of level_sync turns red and when it is green again, where no monitoring system does."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg

from level_sync import verify
from level_sync.database import connect, queries, read_dsn
from level_sync.monitor.channels import SEND_TIMEOUT, Channel, Message
from level_sync.monitor.network import CONNECT_TIMEOUT, LOCK_TIMEOUT, connect_timeout, cut_after
from level_sync.monitor.runbook import section_of
from level_sync.monitor.scan import SCAN_TIMEOUT
from level_sync.text import printable
from level_sync.verify import Check

MIN_CHECK_TIMEOUT = 5  # seconds that the checks may take, however little patience there is
MIN_INTERVAL = 5  # seconds between two checks, however many runs end
MAX_RECONNECT_DELAY = 60  # seconds between two tries to connect, so that systemd's watchdog hears of each in time
MAX_SEND_WAIT = SEND_TIMEOUT + 5  # seconds that the next check waits for channels that are still sending
MAX_UNSENT = 100  # messages that are kept for channels that do not take them
MAX_DETAIL_LENGTH = 1000  # characters

log = logging.getLogger("level_sync")


def sd_notify(state: str) -> None:
    """Sends READY=1 or WATCHDOG=1 to systemd, where it has started this process as Type=notify; see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.connect("\0" + address[1:] if address.startswith("@") else address)
                notify.sendall(state.encode())
        except OSError as error:
            log.warning("systemd cannot be told: NOTIFY_SOCKET %s: %s", address, error)


class Watch:
    """Makes every check of `level-sync verify` each interval and whenever a run ends, over one connection."""

    def __init__(
        self, dsn: str, channels: Sequence[Channel], *, interval: float, patience: float, state: Path | None = None
    ) -> None:
        """Checks each `interval` seconds, and reports a database that is away for longer than `patience` seconds.

        The file `state` keeps what is red, and what is not sent yet, over a restart.
        """
        self.dsn = dsn
        self.channels = {channel.key: channel for channel in channels}
        self.interval = interval
        self.patience = patience
        self.state = state
        self.red: dict[str, Check] = {}
        self.unsent: list[tuple[str, Message]] = []  # with the key of the channel
        self._state_lock = threading.Lock()  # for unsent, which the threads that send shorten, and for the file
        self._senders: dict[str, threading.Thread] = {}
        self._check_timeout: float = max(MIN_CHECK_TIMEOUT, patience)
        self._check_began = 0.0
        self._away_since: float | None = None
        self._logged_reason = ""
        self._load_state()

    def run(self, stop: threading.Event) -> None:
        """Watches until stop is set. A lost connection is made again, forever."""
        while not stop.is_set():
            sd_notify("READY=1\nWATCHDOG=1")
            self._check_began = time.monotonic()
            is_connected = False
            try:
                with self._listening() as connection:
                    is_connected = True
                    while not stop.is_set():
                        self._check(connection)
                        self._wait_for_a_run(connection, stop)
            except psycopg.Error as error:
                stop.wait(self._handle_failure(error, was_connected=is_connected))

    @contextmanager
    def _listening(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        """A connection that is notified of each run that ends."""
        with connect(self.dsn, connect_timeout=connect_timeout(self.dsn)) as connection:
            with cut_after(CONNECT_TIMEOUT, connection):
                try:
                    queries.listen(connection)
                except psycopg.errors.ReadOnlySqlTransaction:
                    log.warning("a standby tells of no run that ends: there is a check each interval only")
            yield connection

    def _check(self, connection: psycopg.Connection[Any]) -> None:
        """Makes every check. The next time they may take twice as long as this time, where that is more."""
        sd_notify("WATCHDOG=1")
        self._check_began = time.monotonic()
        timeout = self._check_timeout
        with cut_after(timeout + 3, connection):
            queries.set_timeouts(connection, statement_timeout=f"{timeout}s", lock_timeout=LOCK_TIMEOUT)
            checks = verify.run_checks(connection, self.dsn)
        duration = time.monotonic() - self._check_began
        self._check_timeout = min(SCAN_TIMEOUT, max(MIN_CHECK_TIMEOUT, self.patience, 2 * duration))
        self._away_since, self._logged_reason = None, ""
        is_complete = [check.name for check in checks] != ["installation"]
        self.report_changes(checks, is_complete=is_complete)

    def _wait_for_a_run(self, connection: psycopg.Connection[Any], stop: threading.Event) -> None:
        """Waits until a run has ended, the interval at most. Runs that end one after the other bring one check."""
        began = time.monotonic()
        has_ended = False
        while not stop.is_set() and time.monotonic() < began + self.interval:
            if has_ended and time.monotonic() >= began + MIN_INTERVAL:
                return
            sd_notify("WATCHDOG=1")
            for _ in connection.notifies(timeout=min(1, self.interval), stop_after=1):
                has_ended = True

    def _handle_failure(self, error: psycopg.Error, *, was_connected: bool) -> float:
        """Reports that the database is away where the patience is over. Returns the seconds until the next try."""
        self._away_since = self._away_since or self._check_began
        reason = str(error).strip()
        if reason != self._logged_reason:
            log.warning("no look at level_sync: %s", reason)
            self._logged_reason = reason
        if was_connected and self._check_timeout < SCAN_TIMEOUT:
            # The checks may only have been slow. If so, a new connection is answered, and they get all the time.
            self._check_timeout = SCAN_TIMEOUT
            return 0
        if time.monotonic() - self._away_since >= self.patience:
            hint = "Look whether the server runs, and whether this role may connect and is a reader."
            self.report_changes([Check("connection", False, reason, hint)], is_complete=False)
        return min(self.interval, max(self.patience / 4, 0.2), MAX_RECONNECT_DELAY)

    def report_changes(self, checks: Sequence[Check], *, is_complete: bool = True) -> None:
        """Sends what has changed since the last time, once. An incomplete list says nothing of checks not in it."""
        now_red = {check.name: check for check in checks if check.ok is not True}
        turned_red = [check for name, check in now_red.items() if name not in self.red]
        # A check that is gone, such as one of a job that was removed, is not red any more. Where "schedule" as a whole
        # could not be looked at, nothing is known of "schedule: a job".
        unknown = {
            name: check
            for name, check in self.red.items()
            if not is_complete or (name not in now_red and name.partition(":")[0] in now_red)
        }
        turned_green = [check for name, check in self.red.items() if name not in now_red and name not in unknown]
        if turned_red or turned_green:
            message = build_message(describe_database(self.dsn), turned_red, turned_green)
            with self._state_lock:
                self.red = {**unknown, **now_red}
                self.unsent = [*self.unsent, *((key, message) for key in self.channels)][-MAX_UNSENT:]
                self._save_state()
        self.send()

    def say(self, text: str) -> bool:
        """Sends a text to everybody. Returns whether all could be reached."""
        subject = " ".join(text.split())
        self.unsent = [(key, Message(subject, text)) for key in self.channels]
        self.send()
        return not self.unsent

    def send(self) -> None:
        """Sends what is not sent yet, through all channels at once; what cannot be sent now is tried again later.

        Each channel has a thread of its own, so that one that hangs delays neither the others nor the next check.
        """
        for key in {key for key, _ in self.unsent}:
            if key not in self._senders or not self._senders[key].is_alive():
                self._senders[key] = threading.Thread(target=self._send_through, args=[key], daemon=True)
                self._senders[key].start()
        deadline = time.monotonic() + MAX_SEND_WAIT
        for thread in self._senders.values():
            while thread.is_alive() and time.monotonic() < deadline:
                sd_notify("WATCHDOG=1")
                thread.join(1)

    def _send_through(self, key: str) -> None:
        """Sends the messages of one channel in their order, up to the first that fails."""
        channel = self.channels[key]
        while waiting := [message for to, message in self.unsent if to == key]:
            try:
                channel.send(waiting[0])
            except Exception as error:  # whatever one channel raises, the others are told
                # Only the kind of an error of HTTP: its text may hold the webhook's address, which is a secret.
                reason = type(error).__name__ if channel.name.startswith("webhook") else str(error)
                log.warning("not sent: %s: %s: %s", channel.name, waiting[0].subject, reason)
                return
            with self._state_lock, suppress(ValueError):  # it is gone where MAX_UNSENT newer ones have come
                self.unsent.remove((key, waiting[0]))
                self._save_state()

    def _load_state(self) -> None:
        if self.state is None or not self.state.exists():
            return
        try:
            state = json.loads(self.state.read_text(encoding="utf-8"))
            self.red = {check["name"]: Check(**check) for check in state["red"]}
            self.unsent = [(key, Message(**message)) for key, message in state["unsent"] if key in self.channels]
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read, what is red is told anew: %s", self.state, error)

    def _save_state(self) -> None:
        """Replaces the file in one step, so that a crash leaves the old one or the new one."""
        if self.state is None:
            return
        text = json.dumps(
            {
                "red": [asdict(check) for check in self.red.values()],
                "unsent": [(key, asdict(message)) for key, message in self.unsent],
            }
        )
        fresh = self.state.with_name(self.state.name + ".new")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.state)
        except OSError as error:
            log.warning("a restart will tell again what is red: %s cannot be written: %s", self.state, error)


def describe_database(dsn: str) -> str:
    """Which database a message is about, without any secret of the dsn."""
    parts = read_dsn(dsn)
    database = parts.get("dbname") or os.environ.get("PGDATABASE", "the default database")
    host = parts.get("host") or os.environ.get("PGHOST", "localhost")
    return f"{database} at {host}"


def build_message(database: str, red: Sequence[Check], green: Sequence[Check]) -> Message:
    """One message for all that has changed at once."""
    parts = []
    if red:
        parts.append("RED " + ", ".join(check.name for check in red))
    if green:
        parts.append("green again " + ", ".join(check.name for check in green))
    lines = [f"RED {check.name}: {_one_line(check.detail)}\n    {check.hint}{_runbook_line(check)}" for check in red]
    lines += [f"green again {check.name} (it was: {_one_line(check.detail)})" for check in green]
    subject = " ".join(f"level_sync in {database}: {'; '.join(parts)}".split())
    return Message(
        subject,
        "\n".join(lines),
        [{**check.as_json(), "detail": _one_line(check.detail)} for check in red],
        [{"name": check.name, "ok": True, "was": _one_line(check.detail)} for check in green],
    )


def _one_line(text: str) -> str:
    """The text in one line of limited length: what stands in the database adds no lines to a message, nor megabytes."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= MAX_DETAIL_LENGTH else text[:MAX_DETAIL_LENGTH] + " ... (cut here)"


def _runbook_line(check: Check) -> str:
    section = section_of(check.name, check.detail)
    return f"\n    docker/RUNBOOK.md, section {section}" if section else ""
