"""Tells people when a check of level_sync turns red and when it is green again, where no monitoring system does."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from level_sync import verify as verification
from level_sync.database import connect, queries, read_dsn
from level_sync.runbook import section_of
from level_sync.scan import CONNECT_TIMEOUT, LOCK_TIMEOUT, SCAN_TIMEOUT, connect_timeout, cut_after
from level_sync.text import printable
from level_sync.verify import Check

SEND_TIMEOUT = 30  # seconds for one message, however many bytes come meanwhile
PROMPT = 5  # seconds that every look may take, however little patience there is
LONGEST_DETAIL = 1000  # characters of what a check has found
LONGEST_PAUSE = 60  # seconds between two tries to connect: systemd is told that the watch lives each time
SHORTEST_INTERVAL = 5  # seconds between two checks, however many runs end
MESSAGES_KEPT = 100
LOOPBACK = ("localhost", "127.0.0.1", "::1")

log = logging.getLogger("level_sync")


class ChannelError(ValueError):
    """A channel that could never send: the message says what is wrong with it."""


@dataclass(frozen=True)
class Message:
    """What is sent: the checks that have turned red, and those that are green again."""

    subject: str
    text: str
    red: list[dict[str, Any]] = field(default_factory=list)
    green: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Channel:
    """A way to somebody. The name may stand in a log; the key tells channels apart in a file, without their secrets."""

    name: str
    key: str
    send: Callable[[Message], None]


def key_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def cut_off(seconds: float) -> Iterator[list[Any]]:
    """Cuts what the body opens, things with a `sock`, when the time is over: a timeout of theirs is for each read."""
    opened: list[Any] = []
    is_over = threading.Event()

    def cut() -> None:
        wait = seconds
        while not is_over.wait(wait):
            wait = 1  # what is still connecting is cut as soon as it has connected
            for line in opened:
                with suppress(OSError, AttributeError):
                    line.sock.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=cut, daemon=True).start()
    try:
        yield opened
    finally:
        is_over.set()


def by_email(recipient: str, sender: str, server: str) -> Channel:
    """Mails through HOST[:PORT], an IPv6 host in brackets; encrypted where the server offers STARTTLS.

    Logs in as SMTP_USER with SMTP_PASSWORD where those are set; unencrypted only on this machine.
    """
    try:
        parts = urlsplit(f"//{server}")
        host, port = parts.hostname or "", parts.port or 25
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    if not host or parts.path or parts.username:
        raise ChannelError(f"{server!r} is not HOST or HOST:PORT of a mail server")
    for address in (recipient, sender):
        if "@" not in address or not address.isprintable():
            raise ChannelError(f"{address!r} is no address of mail")

    def send(message: Message) -> None:
        mail = EmailMessage()
        mail["Subject"], mail["From"], mail["To"] = message.subject, sender, recipient
        mail["Date"], mail["Message-ID"] = formatdate(localtime=True), make_msgid()
        mail.set_content(message.text)
        with cut_off(SEND_TIMEOUT) as opened, closing(_Mailing(opened, host, port)) as smtp:
            smtp.ehlo()
            is_safe = host in LOOPBACK
            if smtp.has_extn("starttls"):
                context = ssl.create_default_context()
                if host in LOOPBACK:  # its certificate is for another name
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                smtp.starttls(context=context)
                smtp.ehlo()
                is_safe = True
            if "SMTP_USER" in os.environ:
                if not is_safe:
                    raise smtplib.SMTPException("the server offers no STARTTLS: the password is not sent unencrypted")
                smtp.login(os.environ["SMTP_USER"], os.environ.get("SMTP_PASSWORD", ""))
            smtp.send_message(mail)
            with suppress(smtplib.SMTPException, OSError):  # whatever it says now, it has taken the mail
                smtp.quit()

    return Channel(f"mail to {recipient}", key_of("email", recipient, server), send)


class _Mailing(smtplib.SMTP):
    """Is among what has been opened before the first answer is read."""

    def __init__(self, opened: list[Any], host: str, port: int) -> None:
        opened.append(self)
        super().__init__(host, port, timeout=SEND_TIMEOUT)


class _Opening(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """HTTP and HTTPS, with its connections among what has been opened."""

    def __init__(self, opened: list[Any]) -> None:
        super().__init__()
        self.opened = opened

    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        def connection(*given: Any, **named: Any) -> Any:
            self.opened.append(http_class(*given, **named))
            return self.opened[-1]

        return super().do_open(connection, req, **http_conn_args)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere becomes a GET without its body: that is no delivery."""

    def redirect_request(self, *_: Any) -> None:
        return None


def by_webhook(url: str) -> Channel:
    """POSTs the message as JSON; its `text` is what chat services show."""
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # from its port, or from half a bracket
        is_sound = False
    if not is_sound or parts.username is not None or not url.isprintable() or " " in url:
        raise ChannelError(
            "a webhook is a URL that begins with http:// or https://, without a space, and without user and password"
        )

    def send(message: Message) -> None:
        body = json.dumps({**asdict(message), "text": f"{message.subject}\n{message.text}"}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
        with cut_off(SEND_TIMEOUT) as opened:
            opener = urllib.request.build_opener(_NoRedirect, _Opening(opened))
            opener.open(request, timeout=SEND_TIMEOUT).close()

    return Channel(f"webhook at {parts.hostname}", key_of("webhook", url), send)


def by_command(command: str) -> Channel:
    """Runs a shell command with the message as JSON on its standard input; it is killed after half a minute."""

    def send(message: Message) -> None:
        process = subprocess.Popen(  # noqa: S602 - the operator's own command line
            command, shell=True, stdin=subprocess.PIPE, text=True, start_new_session=True
        )

        def kill() -> None:
            os.killpg(process.pid, signal.SIGKILL)

        atexit.register(kill)  # or nobody would, where the watch ends before it
        try:
            process.communicate(json.dumps(asdict(message)) + "\n", timeout=SEND_TIMEOUT)
        except subprocess.TimeoutExpired:
            kill()
            process.wait()
            raise TimeoutError(f"it took longer than {SEND_TIMEOUT} s") from None
        finally:
            atexit.unregister(kill)
        if process.returncode != 0:
            raise OSError(f"it ended with exit code {process.returncode}")

    return Channel("command", key_of("exec", command), send)


def tell_systemd(state: str) -> None:
    """READY=1 and WATCHDOG=1, where systemd has started this process as Type=notify."""
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
        """Seconds between two checks; seconds a database may be away before that is told; a file for what is red."""
        self.dsn = dsn
        self.channels = {channel.key: channel for channel in channels}
        self.interval = interval
        self.patience = patience
        self.state = state
        self.red: dict[str, Check] = {}
        self.unsent: list[tuple[str, Message]] = []
        self._is_changing = threading.Lock()
        self._sending: dict[str, threading.Thread] = {}
        if state is not None and state.exists():
            try:
                kept = json.loads(state.read_text(encoding="utf-8"))
                self.red = {check["name"]: Check(**check) for check in kept["red"]}
                self.unsent = [(key, Message(**message)) for key, message in kept["unsent"] if key in self.channels]
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("%s cannot be read, what is red is told anew: %s", state, error)

    def run(self, stop: threading.Event) -> None:
        """Watches until stop is set. A lost connection is made again, forever."""
        away_since: float | None = None
        told = ""
        limit = max(PROMPT, self.patience)
        while not stop.is_set():
            tell_systemd("READY=1\nWATCHDOG=1")
            began = time.monotonic()
            is_connected = False
            try:
                with self._listening() as connection:
                    is_connected = True
                    while not stop.is_set():
                        tell_systemd("WATCHDOG=1")
                        began = time.monotonic()
                        with cut_after(connection, limit + 3):
                            queries.limit_waits(connection, statement_timeout=f"{limit}s", lock_timeout=LOCK_TIMEOUT)
                            checks = verification.checks_of(connection, self.dsn)
                        limit = min(SCAN_TIMEOUT, max(PROMPT, self.patience, 2 * (time.monotonic() - began)))
                        away_since, told = None, ""
                        is_complete = [check.name for check in checks] != ["installation"]
                        self.judge(checks, is_complete=is_complete)
                        self._wait_for_a_run(connection, stop)
            except psycopg.Error as error:
                away_since = away_since or began
                reason = str(error).strip()
                if reason != told:
                    log.warning("no look at level_sync: %s", reason)
                    told = reason
                if is_connected and limit < SCAN_TIMEOUT:
                    limit = SCAN_TIMEOUT  # where a new connection is answered, the look was only slow
                    continue
                if time.monotonic() - away_since >= self.patience:
                    hint = "Look whether the server runs, and whether this role may connect and is a reader."
                    self.judge([Check("connection", False, reason, hint)], is_complete=False)
                stop.wait(min(self.interval, max(self.patience / 4, 0.2), LONGEST_PAUSE))

    @contextmanager
    def _listening(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        with connect(self.dsn, connect_timeout=connect_timeout(self.dsn)) as connection:
            with cut_after(connection, CONNECT_TIMEOUT):
                try:
                    queries.listen(connection)
                except psycopg.errors.ReadOnlySqlTransaction:
                    log.warning("a standby tells of no run that ends: there is a check each interval only")
            yield connection

    def _wait_for_a_run(self, connection: psycopg.Connection[Any], stop: threading.Event) -> None:
        began = time.monotonic()
        has_ended = False
        while not stop.is_set() and time.monotonic() < began + self.interval:
            if has_ended and time.monotonic() >= began + SHORTEST_INTERVAL:
                return
            tell_systemd("WATCHDOG=1")
            for _ in connection.notifies(timeout=min(1, self.interval), stop_after=1):
                has_ended = True

    def judge(self, checks: Sequence[Check], *, is_complete: bool = True) -> None:
        """Sends what has changed since the last time, once; an incomplete list says nothing of the others."""
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
            message = message_of(database_of(self.dsn), turned_red, turned_green)
            with self._is_changing:
                self.red = {**unknown, **now_red}
                self.unsent = [*self.unsent, *((key, message) for key in self.channels)][-MESSAGES_KEPT:]
                self._keep()
        self.send()

    def say(self, text: str) -> bool:
        """Sends a text to everybody. Returns whether all could be reached."""
        subject = " ".join(text.split())
        self.unsent = [(key, Message(subject, text)) for key in self.channels]
        self.send()
        return not self.unsent

    def send(self) -> None:
        """Sends what is not sent yet, through all channels at once; what cannot be sent now is tried again later.

        A channel that takes longer than one message may is left to itself: no other one waits, nor does the next check.
        """
        for key in {key for key, _ in self.unsent}:
            if key not in self._sending or not self._sending[key].is_alive():
                self._sending[key] = threading.Thread(target=self._send_through, args=[key], daemon=True)
                self._sending[key].start()
        deadline = time.monotonic() + SEND_TIMEOUT + 5
        for thread in self._sending.values():
            while thread.is_alive() and time.monotonic() < deadline:
                tell_systemd("WATCHDOG=1")
                thread.join(1)

    def _send_through(self, key: str) -> None:
        """Sends what waits for one channel, in its order, up to what fails."""
        channel = self.channels[key]
        while waiting := [message for to, message in self.unsent if to == key]:
            try:
                channel.send(waiting[0])
            except Exception as error:  # whatever one channel answers, the others are told
                # Not the error's text of an HTTP library: a webhook's address is a secret.
                reason = type(error).__name__ if channel.name.startswith("webhook") else str(error)
                log.warning("not sent: %s: %s: %s", channel.name, waiting[0].subject, reason)
                return
            with self._is_changing, suppress(ValueError):  # the oldest of too many may be gone
                self.unsent.remove((key, waiting[0]))
                self._keep()

    def _keep(self) -> None:
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
    lines = [f"RED {check.name}: {short(check.detail)}\n    {check.hint}{more(check)}" for check in red]
    lines += [f"green again {check.name} (it was: {short(check.detail)})" for check in green]
    subject = " ".join(f"level_sync in {where}: {'; '.join(parts)}".split())
    return Message(
        subject,
        "\n".join(lines),
        [{**check.as_json(), "detail": short(check.detail)} for check in red],
        [{"name": check.name, "ok": True, "was": short(check.detail)} for check in green],
    )


def short(text: str) -> str:
    """A mail is no place for a message of a megabyte, nor for lines that a text from the database would add to it."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST_DETAIL else text[:LONGEST_DETAIL] + " ... (cut here)"


def more(check: Check) -> str:
    """Where the runbook says more of a check."""
    section = section_of(check.name, check.detail)
    return f"\n    docker/RUNBOOK.md, section {section}" if section else ""
