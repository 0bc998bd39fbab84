"""level-sync watch: one message when something turns red, one when it is green again, to whoever was named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psycopg
import pytest

from academy import PROGRESS, add_pair, bypass, set_level, wait_until
from command_line import run
from conftest import CONFIGURATION, dsn_of, temporary_directory
from level_sync import install
from level_sync.servers import EmbeddedServer
from level_sync.verify import Check
from level_sync.watch import Message, Watch, by_command, by_email, by_webhook, tell_systemd

UNIT = Path(__file__).resolve().parent.parent / "docker" / "systemd" / "level-sync-watch.service"
BAD = Check("triggers", False, "license_level_changed is disabled", "Run level-sync migrate.")
GOOD = Check("triggers", True, "fine", "")

pytestmark = [pytest.mark.leftovers, pytest.mark.servers("embedded")]


@contextmanager
def watching(dsn: str, told: list[Message], **options: float) -> Iterator[Watch]:
    """A watch at work beside the test."""
    stop = threading.Event()
    watch = Watch(dsn, [told.append], **{"interval": 0.2, "patience": 0.5, **options})
    thread = threading.Thread(target=watch.run, args=[stop])
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def names(message: Message) -> tuple[list[str], list[str]]:
    return [check["name"] for check in message.red], [check["name"] for check in message.green]


def new_watch(told: list[Message], **options: object) -> Watch:
    return Watch("dbname=academy host=db", [told.append], interval=60, patience=30, **options)


def test_red_is_told_once_and_green_once():
    told: list[Message] = []
    watch = new_watch(told)
    for check in (GOOD, BAD, BAD, BAD, GOOD, GOOD, BAD):
        watch.judge([check])
    assert [names(message) for message in told] == [(["triggers"], []), ([], ["triggers"]), (["triggers"], [])]
    assert told[0].subject == "level_sync in academy at db: RED triggers"
    assert told[0].text == "RED triggers: license_level_changed is disabled\n    Run level-sync migrate."
    assert told[1].subject == "level_sync in academy at db: green again triggers"


def test_what_could_not_be_checked_is_not_good():
    told: list[Message] = []
    new_watch(told).judge([Check("schedule", None, "not checked", "")])
    assert names(told[0]) == (["schedule"], [])


def test_all_that_changes_at_once_is_one_message():
    told: list[Message] = []
    watch = new_watch(told)
    watch.judge([BAD, Check("desync", False, "1 pair", "")])
    watch.judge([GOOD, Check("desync", True, "", ""), Check("orphans", False, "1 row", "")])
    assert [names(message) for message in told] == [(["triggers", "desync"], []), (["orphans"], ["triggers", "desync"])]


def test_a_database_that_is_away_says_nothing_of_what_was_red_before():
    told: list[Message] = []
    watch = new_watch(told)
    watch.judge([BAD])
    watch.judge([Check("connection", False, "away", "")], is_complete=False)
    watch.judge([BAD])
    assert [names(message) for message in told] == [(["triggers"], []), (["connection"], []), ([], ["connection"])]


def test_a_restart_with_a_state_file_does_not_tell_it_again(tmp_path):
    told: list[Message] = []
    state = tmp_path / "red.json"
    new_watch(told, state=state).judge([BAD])
    again = new_watch(told, state=state)
    again.judge([BAD])
    again.judge([GOOD])
    new_watch(told, state=state).judge([GOOD])
    assert [names(message) for message in told] == [(["triggers"], []), ([], ["triggers"])]


def test_a_message_that_cannot_be_sent_waits_and_the_others_go_out():
    told: list[Message] = []
    broken = True

    def channel(message: Message) -> None:
        if broken:
            raise OSError("no route to host")
        told.append(message)

    others: list[Message] = []
    watch = Watch("", [channel, others.append], interval=60, patience=30)
    watch.judge([BAD])
    watch.judge([BAD])
    assert (len(told), len(others)) == (0, 1)
    broken = False
    watch.judge([BAD])
    watch.judge([BAD])
    assert (len(told), len(others)) == (1, 1)


def test_a_secret_of_the_dsn_is_in_no_message():
    told: list[Message] = []
    Watch("postgresql://me:hunter2@db/academy", [told.append], interval=1, patience=1).judge([BAD])
    assert "hunter2" not in str(told)


def test_a_name_with_line_breaks_cannot_forge_a_header(mailbox):
    box, port = mailbox
    by_email(["on-call@example.org"], "watch@example.org", f"127.0.0.1:{port}")(
        Message("level_sync: RED cron run: x Bcc: everybody@example.org", "text\nBcc: everybody@example.org")
    )
    told: list[Message] = []
    new_watch(told).judge([Check("cron run: x\nBcc: everybody@example.org", False, "", "")])
    assert "\n" not in told[0].subject
    assert box.messages[0]["Bcc"] is None


def test_mail_webhook_and_command_get_the_message(mailbox, tmp_path):
    box, port = mailbox
    received: list[dict[str, object]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Hook) as hook:
        threading.Thread(target=hook.serve_forever).start()
        channels = [
            by_email(["on-call@example.org", "boss@example.org"], "watch@example.org", f"127.0.0.1:{port}"),
            by_webhook(f"http://127.0.0.1:{hook.server_port}/alerts"),
            by_command(f"cat > {tmp_path}/message.json"),
        ]
        watch = Watch("dbname=academy host=db", channels, interval=60, patience=30)
        watch.judge([BAD])
        hook.shutdown()
    assert watch.unsent == []
    (mail,) = box.messages
    assert (mail["Subject"], mail["To"]) == (
        "level_sync in academy at db: RED triggers",
        "on-call@example.org, boss@example.org",
    )
    assert "license_level_changed is disabled" in mail.get_payload()
    assert received[0]["text"].startswith("level_sync in academy at db: RED triggers\n")
    assert received[0]["red"][0]["name"] == "triggers"
    assert json.loads((tmp_path / "message.json").read_text())["red"][0]["bit"] == 2


def test_a_reader_who_may_not_write_is_told_of_a_trigger_that_is_switched_off_and_on(db, reader):
    told: list[Message] = []
    with watching(reader, told) as watch:
        wait_until(lambda: "triggers" not in watch.red and told)  # the schedule is red here from the beginning
        before = len(told)
        db.execute("alter table user_licenses disable trigger license_level_changed")
        wait_until(lambda: len(told) > before)
        db.execute("alter table user_licenses enable trigger license_level_changed")
        wait_until(lambda: len(told) > before + 1)
    assert [names(message) for message in told[before:]] == [(["triggers"], []), ([], ["triggers"])]


def test_a_run_that_ends_is_looked_at_at_once(database, db):
    add_pair(db, 1, level=2)
    db.execute("update level_sync.settings set repair_limit = 0")
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    told: list[Message] = []
    with watching(database.dsn, told, interval=600):
        wait_until(lambda: told)
        db.execute("call level_sync.reconcile()")
        wait_until(lambda: len(told) > 1)
    assert "last_run" in names(told[1])[0]
    assert "approve => true" in told[1].text


def test_a_server_that_restarts_is_only_told_when_it_stays_away():
    with temporary_directory() as parent:
        server = EmbeddedServer(parent / "server")
        server.create(CONFIGURATION)
        try:
            install.migrate(dsn_of(server, "postgres"))
            told: list[Message] = []
            with watching(dsn_of(server, "postgres"), told, patience=4) as watch:
                wait_until(lambda: told)
                before = len(told)
                server.halt()
                server.start()
                with psycopg.connect(dsn_of(server, "postgres"), autocommit=True) as connection:
                    connection.execute("alter table user_licenses disable trigger license_level_changed")
                wait_until(lambda: "triggers" in watch.red)  # it has connected again by itself
                server.halt()
                wait_until(lambda: "connection" in watch.red)
                server.start()
                wait_until(lambda: "connection" not in watch.red)
            assert [names(message) for message in told[before:]] == [
                (["triggers"], []),
                (["connection"], []),
                ([], ["connection"]),
            ]
        finally:
            server.stop()


def test_it_tells_systemd_that_it_lives(database, db, monkeypatch, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with watching(database.dsn, []):
            said = [systemd.recv(100).decode() for _ in range(4)]
    assert said == ["READY=1\nWATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]


def test_without_systemd_it_tells_nobody(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell_systemd("READY=1")


def test_the_command_watches_until_it_is_told_to_end(database, db, tmp_path):
    command = [
        Path(sys.executable).with_name("level-sync"),
        "watch",
        "--exec",
        f"cat >> {tmp_path}/messages",
        "--interval",
        "1",
    ]
    process = subprocess.Popen(command, env={**os.environ, "DATABASE_URL": database.dsn})
    try:
        wait_until((tmp_path / "messages").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_say_sends_a_text_and_ends(tmp_path):
    assert run("watch", "--exec", f"cat > {tmp_path}/message", "--say", "a test").exit_code == 0
    assert json.loads((tmp_path / "message").read_text())["subject"] == "a test"
    assert run("watch", "--exec", "false", "--say", "a test").exit_code == 1


def test_a_watch_that_would_tell_nobody_is_refused():
    done = run("watch")
    assert done.exit_code == 2
    assert "say whom to tell" in done.stderr


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    text = UNIT.read_text().replace(
        "/opt/level_sync/venv/bin/level-sync", str(Path(sys.executable).with_name("level-sync"))
    )
    (tmp_path / UNIT.name).write_text(text)
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no systemd here")
    assert (done.returncode, done.stderr) == (0, "")
    assert "WatchdogSec=" in text
