"""The channels of `level-sync watch`: email, webhook and command."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
import smtplib
import ssl
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any
from urllib.parse import urlsplit

from level_sync.monitor.network import LOOPBACK, cut_after

SEND_TIMEOUT = 30  # seconds for one message


class ChannelError(ValueError):
    """A channel that could never send; the message says what is wrong with it."""


@dataclass(frozen=True)
class Message:
    """What is sent: the checks that have turned red, and those that are green again."""

    subject: str
    text: str
    red: list[dict[str, Any]] = field(default_factory=list)
    green: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Channel:
    """A way to somebody.

    The name may stand in a log. The key tells channels apart in the state file, and holds none of their secrets. `send`
    raises an exception where the message was not taken.
    """

    name: str
    key: str
    send: Callable[[Message], None]


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def email_channel(recipient: str, sender: str, server: str) -> Channel:
    """Mails through HOST[:PORT], an IPv6 host in brackets; encrypted where the server offers STARTTLS.

    Logs in as SMTP_USER with SMTP_PASSWORD where those are set; without encryption only on this machine. Raises
    ChannelError.
    """
    host, port = _parse_mail_server(server)
    for address in (recipient, sender):
        if "@" not in address or not address.isprintable():
            raise ChannelError(f"{address!r} is no address of mail")

    def send(message: Message) -> None:
        mail = EmailMessage()
        mail["Subject"], mail["From"], mail["To"] = message.subject, sender, recipient
        mail["Date"], mail["Message-ID"] = formatdate(localtime=True), make_msgid()
        mail.set_content(message.text)
        with cut_after(SEND_TIMEOUT) as opened, closing(_Smtp(opened, host, port)) as smtp:
            _encrypt_and_log_in(smtp, host)
            smtp.send_message(mail)
            with suppress(smtplib.SMTPException, OSError):  # the mail is taken, whatever the server says now
                smtp.quit()

    return Channel(f"mail to {recipient}", _key("email", recipient, server), send)


def _parse_mail_server(server: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{server}")
        host, port = parts.hostname or "", parts.port or 25
        is_sound = host and not parts.path and not parts.username
    except ValueError:  # from its port, or from half a bracket
        is_sound = False
    if not is_sound:
        raise ChannelError(f"{server!r} is not HOST or HOST:PORT of a mail server")
    return host, port


def _encrypt_and_log_in(smtp: smtplib.SMTP, host: str) -> None:
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


class _Smtp(smtplib.SMTP):
    """Adds itself to the opened connections before it connects, since it reads an answer while it does."""

    def __init__(self, opened: list[Any], host: str, port: int) -> None:
        opened.append(self)
        super().__init__(host, port, timeout=SEND_TIMEOUT)


def webhook_channel(url: str) -> Channel:
    """POSTs the message as JSON; its `text` is what chat services show. Raises ChannelError."""
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
        with cut_after(SEND_TIMEOUT) as opened:
            opener = urllib.request.build_opener(_NoRedirect, _Http(opened))
            opener.open(request, timeout=SEND_TIMEOUT).close()

    return Channel(f"webhook at {parts.hostname}", _key("webhook", url), send)


class _Http(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """HTTP and HTTPS; adds each connection to the opened ones before it connects."""

    def __init__(self, opened: list[Any]) -> None:
        super().__init__()
        self.opened = opened

    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        def connection(*given: Any, **named: Any) -> Any:
            self.opened.append(http_class(*given, **named))
            return self.opened[-1]

        return super().do_open(connection, req, **http_conn_args)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would make a GET without a body of the POST, and nobody would have the message."""

    def redirect_request(self, *_: Any) -> None:
        return None


def command_channel(command: str) -> Channel:
    """Runs a shell command with the message as one line of JSON on its standard input; kills it after SEND_TIMEOUT."""

    def send(message: Message) -> None:
        process = subprocess.Popen(  # noqa: S602 - the operator's own command line
            command, shell=True, stdin=subprocess.PIPE, text=True, start_new_session=True
        )

        def kill() -> None:
            os.killpg(process.pid, signal.SIGKILL)

        atexit.register(kill)  # the command does not outlive a watch that ends before it
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

    return Channel("command", _key("exec", command), send)
