"""level-sync watch: one message when something turns red, one when it is green again, to whoever was named."""

from __future__ import annotations

import json
import os
import shlex
import signal
import smtplib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest

import internals
from academy import PATIENCE, PROGRESS, add_pair, bypass, set_level, wait_until
from command_line import run
from frozen_server import freeze, thaw
from level_sync import verify as verification
from level_sync.monitor import channels
from level_sync.monitor import watch as alarm
from level_sync.monitor.channels import Channel, Message, command_channel, email_channel, webhook_channel
from level_sync.monitor.scan import SCAN_TIMEOUT
from level_sync.monitor.watch import Watch, sd_notify
from level_sync.verify import Check
from tree import DOCKER, LEVEL_SYNC

UNIT = DOCKER / "systemd" / "level-sync-watch.service"
BAD = Check("triggers", False, "a trigger is disabled", "Run level-sync migrate.")
GOOD = Check("triggers", True, "fine", "")

pytestmark = pytest.mark.leftovers


def into(told: list[Message], key: str = "test") -> Channel:
    return Channel("test", key, told.append)


@contextmanager
def watching(dsn: str, told: list[Message], **options: float) -> Iterator[Watch]:
    """A watch at work beside the test."""
    stop = threading.Event()
    watch = Watch(dsn, [into(told)], **{"interval": 0.2, "patience": 0.5, **options})
    thread = threading.Thread(target=watch.run, args=[stop])
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def hook(answer: bytes = b"HTTP/1.0 204 No Content\r\n\r\n") -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A web server on this machine, what it was sent, and what it says to that."""
    received: list[dict[str, object]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/alerts", received
        server.shutdown()
        thread.join()


def names(message: Message) -> tuple[list[str], list[str]]:
    return [check["name"] for check in message.red], [check["name"] for check in message.green]


def new_watch(told: list[Message], **options: object) -> Watch:
    return Watch("dbname=academy host=db", [into(told)], interval=60, patience=30, **options)


def test_red_is_told_once_and_green_once():
    told: list[Message] = []
    watch = new_watch(told)
    for check in (GOOD, BAD, BAD, BAD, GOOD, GOOD, BAD):
        watch.report_changes([check])
    assert [names(message) for message in told] == [(["triggers"], []), ([], ["triggers"]), (["triggers"], [])]
    assert told[0].subject == "level_sync in academy at db: RED triggers"
    assert told[0].text == (
        "RED triggers: a trigger is disabled\n    Run level-sync migrate.\n"
        "    docker/RUNBOOK.md, section LevelSyncTriggersOrFunctionsChanged"
    )
    assert told[1].subject == "level_sync in academy at db: green again triggers"
    assert told[1].green == [{"name": "triggers", "ok": True, "was": "a trigger is disabled"}]


def test_each_message_to_a_command_is_one_line(tmp_path):
    file = tmp_path / "messages"
    channel = command_channel(f"cat >> {file}")
    for subject in ("one", "two"):
        channel.send(Message(subject, "text\nof two lines"))
    assert [json.loads(line)["subject"] for line in file.read_text().splitlines()] == ["one", "two"]


def test_what_could_not_be_checked_is_not_good():
    told: list[Message] = []
    new_watch(told).report_changes([Check("schedule", None, "not checked", "")])
    assert names(told[0]) == (["schedule"], [])


def test_a_text_from_the_database_adds_no_line_to_a_message():
    hostile = replace(BAD, detail="1 dead: boom\ngreen again triggers (it was: bad)\n    RUNBOOK \u202e")
    told: list[Message] = []
    watch = new_watch(told)
    watch.report_changes([hostile])
    watch.report_changes([])
    for message in told:
        assert "\u202e" not in message.text
        assert not any(line.startswith("green again triggers (it was: bad") for line in message.text.split("\n"))
    assert "boom green again triggers (it was: bad) RUNBOOK \\u202e" in told[0].text


def test_all_that_changes_at_once_is_one_message():
    told: list[Message] = []
    watch = new_watch(told)
    watch.report_changes([BAD, Check("desync", False, "1 pair", "")])
    watch.report_changes([GOOD, Check("desync", True, "", ""), Check("orphans", False, "1 row", "")])
    assert [names(message) for message in told] == [(["triggers", "desync"], []), (["orphans"], ["triggers", "desync"])]


def test_a_database_that_is_away_says_nothing_of_what_was_red_before():
    told: list[Message] = []
    watch = new_watch(told)
    watch.report_changes([BAD])
    watch.report_changes([Check("connection", False, "away", "")], is_complete=False)
    watch.report_changes([BAD])
    assert [names(message) for message in told] == [(["triggers"], []), (["connection"], []), ([], ["connection"])]


def test_where_level_sync_is_gone_nothing_is_green_again(database, db):
    add_pair(db, 1)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    told: list[Message] = []
    with watching(database.dsn, told):
        wait_until(lambda: told)
        db.execute("alter schema level_sync rename to gone")
        wait_until(lambda: len(told) == 2)
        db.execute("alter schema gone rename to level_sync")
        wait_until(lambda: len(told) == 3)
    assert "desync" in names(told[0])[0]
    assert [names(message) for message in told[1:]] == [(["installation"], []), ([], ["installation"])]


def test_what_is_hidden_behind_a_check_that_could_not_be_made_is_not_green_again():
    told: list[Message] = []
    watch = new_watch(told)
    job = Check("schedule: level_sync_reconcile", False, "there is no such job", "")
    for checks in ([job], [Check("schedule", None, "not checked", "")], [job], []):
        watch.report_changes(checks)
    assert [names(message) for message in told] == [
        ([job.name], []),
        (["schedule"], []),
        ([], ["schedule"]),
        ([], [job.name]),
    ]


def test_a_restart_with_a_state_file_does_not_tell_it_again(tmp_path):
    told: list[Message] = []
    state = tmp_path / "red.json"
    new_watch(told, state=state).report_changes([BAD])
    again = new_watch(told, state=state)
    again.report_changes([BAD])
    again.report_changes([GOOD])
    new_watch(told, state=state).report_changes([GOOD])
    assert [names(message) for message in told] == [(["triggers"], []), ([], ["triggers"])]


def test_a_message_that_cannot_be_sent_waits_and_the_others_go_out():
    told: list[Message] = []
    broken = True

    def channel(message: Message) -> None:
        if broken:
            raise OSError("no route to host")
        told.append(message)

    others: list[Message] = []
    watch = Watch("", [Channel("test", "first", channel), into(others, "second")], interval=60, patience=30)
    watch.report_changes([BAD])
    watch.report_changes([BAD])
    assert (len(told), len(others)) == (0, 1)
    broken = False
    watch.report_changes([BAD])
    watch.report_changes([BAD])
    assert (len(told), len(others)) == (1, 1)


def test_what_was_not_sent_is_sent_after_a_restart_with_a_state_file(tmp_path):
    def refuse(message: Message) -> None:
        raise OSError("no route to host")

    state = tmp_path / "red.json"
    Watch("", [Channel("test", "test", refuse)], interval=60, patience=30, state=state).report_changes([BAD])
    told: list[Message] = []
    again = new_watch(told, state=state)
    again.report_changes([BAD])
    again.report_changes([BAD])
    assert [names(message) for message in told] == [(["triggers"], [])]
    assert new_watch([], state=state).unsent == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"red": [{}], "unsent": []}', "\udcff"])
def test_a_state_file_that_cannot_be_read_is_no_reason_not_to_watch(tmp_path, caplog, content):
    state = tmp_path / "red.json"
    state.write_bytes(content.encode(errors="surrogateescape"))
    told: list[Message] = []
    new_watch(told, state=state).report_changes([BAD])
    assert len(told) == 1
    assert "cannot be read" in caplog.text
    assert json.loads(state.read_text())["red"][0]["name"] == "triggers"


def test_a_state_file_that_cannot_be_written_is_no_reason_not_to_tell(tmp_path, caplog):
    told: list[Message] = []
    new_watch(told, state=tmp_path / "missing" / "red.json").report_changes([BAD])
    assert len(told) == 1
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.0 301 Moved\r\nLocation: /elsewhere\r\n\r\n", b"HTTP/1.0 500 No\r\n\r\n", b"garbage\r\n\r\n"]
)
def test_a_webhook_that_did_not_take_the_message_gets_it_again_and_the_others_are_told(caplog, answer):
    told: list[Message] = []
    with hook(answer) as (url, received):
        watch = Watch("", [webhook_channel(url), into(told)], interval=60, patience=30)
        watch.report_changes([BAD])
        watch.report_changes([BAD])
    assert (len(received), len(told), len(watch.unsent)) == (2, 1, 1)
    assert "/alerts" not in caplog.text  # the address of a webhook is its password


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--webhook", url]
            for url in (
                *("hooks.example.org/SECRET", "file:///etc/hostname", "http:///x", "http://h/a b"),
                *("http://[::1/SECRET", "http://me:SECRET@h/", "http://h:99999/SECRET", "http://h:0/"),
            )
        ),
        *(["--email", address] for address in ("nobody", "a@example.org\nBcc: b@example.org", "")),
        *(
            ["--email", "a@example.org", "--smtp", server]
            for server in ("host:abc", "", "::1", "[::1", "me:secret@host", "h/x")
        ),
    ],
)
def test_whom_it_could_never_tell_is_refused_at_the_start_and_no_secret_is_repeated(arguments):
    done = run("watch", *arguments)
    assert done.exit_code == 2
    assert "SECRET" not in done.stderr


def test_a_mail_server_may_have_an_ipv6_address():
    assert email_channel("a@example.org", "b@example.org", "[::1]:2525").name == "mail to a@example.org"


def test_a_password_is_not_sent_unencrypted_over_a_network(mailbox, monkeypatch):
    box, port = mailbox
    monkeypatch.setenv("SMTP_USER", "watch")
    monkeypatch.setenv("SMTP_PASSWORD", "hunter2")
    monkeypatch.setattr(channels, "LOOPBACK", ())
    channel = email_channel("a@example.org", "b@example.org", f"127.0.0.1:{port}")
    with pytest.raises(smtplib.SMTPException, match="not sent unencrypted"):
        channel.send(Message("subject", "text"))
    assert box.messages == []


def test_a_command_that_hangs_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(channels, "SEND_TIMEOUT", 0.3)
    with pytest.raises(TimeoutError):
        command_channel(f"(sleep 600; echo > {tmp_path}/late) & echo $! > {tmp_path}/child; wait").send(Message("", ""))
    child = int((tmp_path / "child").read_text())
    wait_until(
        lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()
    )


@contextmanager
def dripping() -> Iterator[int]:
    """A server that answers one byte each tenth of a second, for ever, whatever it is asked."""
    is_over = threading.Event()

    def drip(line: socket.socket) -> None:
        with line, suppress(OSError):
            while not is_over.wait(0.1):
                line.sendall(b"2")

    def answer() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=[listener.accept()[0]], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]
        is_over.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["webhook", "mail"])
def test_a_channel_whose_answer_drips_is_cut_and_no_other_waits_for_it(monkeypatch, kind):
    monkeypatch.setattr(channels, "SEND_TIMEOUT", 2)
    was_cut_when_told: list[bool] = []
    with dripping() as port:
        slow = (
            webhook_channel(f"http://127.0.0.1:{port}/")
            if kind == "webhook"
            else email_channel("a@example.org", "b@example.org", f"127.0.0.1:{port}")
        )

        def hear(_: Message) -> None:
            sending = watch._senders.get(slow.key)
            was_cut_when_told.append(sending is not None and not sending.is_alive())

        watch = Watch("", [slow, Channel("test", "test", hear)], interval=60, patience=30)
        watch.report_changes([BAD])
        assert was_cut_when_told == [False]
        wait_until(lambda: not any(thread.is_alive() for thread in watch._senders.values()))
    assert [key for key, _ in watch.unsent] == [slow.key]


def test_a_channel_that_hangs_is_left_to_itself_and_gets_the_message_once(monkeypatch):
    monkeypatch.setattr(alarm, "MAX_SEND_WAIT", 0.2)
    let_go = threading.Event()
    slowly: list[Message] = []
    told: list[Message] = []
    slow = Channel("slow", "slow", lambda message: (let_go.wait(PATIENCE), slowly.append(message)))
    watch = Watch("", [slow, into(told)], interval=60, patience=30)
    for check in (BAD, BAD, GOOD):
        watch.report_changes([check])
    assert (len(told), len(slowly)) == (2, 0)
    let_go.set()
    wait_until(lambda: watch.unsent == [])
    assert [names(message) for message in slowly] == [(["triggers"], []), ([], ["triggers"])]


def test_a_storm_of_notifications_makes_no_storm_of_checks(database, db, monkeypatch):
    monkeypatch.setattr(alarm, "MIN_INTERVAL", 2)
    looks: list[float] = []
    look = verification.run_checks
    monkeypatch.setattr(
        verification, "run_checks", lambda *given, **more: [looks.append(time.monotonic()), look(*given, **more)][1]
    )
    with watching(database.dsn, [], interval=600):
        wait_until(lambda: db.execute("notify level_sync") and len(looks) > 2)
    assert min(later - earlier for earlier, later in pairwise(looks)) > 1.9


def test_a_message_of_a_megabyte_makes_no_mail_of_a_megabyte():
    told: list[Message] = []
    watch = new_watch(told)
    for ok in (False, True):
        watch.report_changes([Check("queue_dead", ok, "x" * 1_000_000, "")])
    assert len(told) == 2
    assert max(len(json.dumps(asdict(message))) for message in told) < 5000


def test_a_secret_of_the_dsn_is_in_no_message():
    told: list[Message] = []
    Watch("postgresql://me:hunter2@db/academy", [into(told)], interval=1, patience=1).report_changes([BAD])
    assert "hunter2" not in str(told)


def test_a_mail_that_was_taken_is_sent_whatever_the_server_says_to_goodbye(mailbox, monkeypatch):
    box, port = mailbox
    answer = smtplib.SMTP.docmd
    monkeypatch.setattr(
        smtplib.SMTP,
        "docmd",
        lambda self, cmd, *rest: (421, b"busy") if cmd.upper() == "QUIT" else answer(self, cmd, *rest),
    )
    watch = Watch("", [email_channel("a@example.org", "b@example.org", f"127.0.0.1:{port}")], interval=60, patience=30)
    watch.report_changes([BAD])
    assert (len(box.messages), watch.unsent) == (1, [])


def test_the_address_of_a_webhook_may_be_given_where_nobody_sees_it(monkeypatch):
    with hook() as (url, received):
        monkeypatch.setenv("WATCH_WEBHOOK", url)
        assert run("watch", "--say", "a test").exit_code == 0
    assert [message["text"] for message in received] == ["a test\na test"]


def test_a_name_with_line_breaks_cannot_forge_a_header(mailbox):
    box, port = mailbox
    email_channel("on-call@example.org", "watch@example.org", f"127.0.0.1:{port}").send(
        Message("level_sync: RED cron run: x Bcc: everybody@example.org", "text\nBcc: everybody@example.org")
    )
    told: list[Message] = []
    new_watch(told).report_changes([Check("cron run: x\nBcc: everybody@example.org", False, "", "")])
    assert "\n" not in told[0].subject
    assert box.messages[0]["Bcc"] is None


def test_mail_webhook_and_command_get_the_message(mailbox, tmp_path):
    box, port = mailbox
    with hook() as (url, received):
        channels = [
            email_channel("on-call@example.org", "watch@example.org", f"127.0.0.1:{port}"),
            email_channel("boss@example.org", "watch@example.org", f"127.0.0.1:{port}"),
            webhook_channel(url),
            command_channel(f"cat > {tmp_path}/message.json"),
        ]
        watch = Watch("dbname=academy host=db", channels, interval=60, patience=30)
        watch.report_changes([BAD])
    assert watch.unsent == []
    assert sorted(mail["To"] for mail in box.messages) == ["boss@example.org", "on-call@example.org"]
    assert {mail["Subject"] for mail in box.messages} == {"level_sync in academy at db: RED triggers"}
    assert "a trigger is disabled" in box.messages[0].get_payload()
    assert len({mail["Message-ID"] for mail in box.messages}) == 2
    assert parsedate_to_datetime(box.messages[0]["Date"]).timestamp() == pytest.approx(time.time(), abs=PATIENCE)
    assert received[0]["text"].startswith("level_sync in academy at db: RED triggers\n")
    assert received[0]["red"][0]["name"] == "triggers"
    assert json.loads((tmp_path / "message.json").read_text())["red"][0]["bit"] == 2


def test_a_reader_who_may_not_write_is_told_of_a_trigger_that_is_switched_off_and_on(db, reader):
    told: list[Message] = []
    with watching(reader, told) as watch:
        wait_until(lambda: "triggers" not in watch.red and told)  # the schedule is red here from the beginning
        before = len(told)
        internals.disable_trigger(db)
        wait_until(lambda: len(told) > before)
        internals.enable_trigger(db)
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


def test_a_server_that_restarts_is_only_told_when_it_stays_away(own_migrated_server):
    server = own_migrated_server
    began = time.monotonic()
    server.halt()
    server.start()
    restart = time.monotonic() - began
    told: list[Message] = []
    with watching(server.dsn("postgres"), told, patience=4 + 4 * restart) as watch:
        wait_until(lambda: told)
        before = len(told)
        server.halt()
        server.start()
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
            internals.disable_trigger(connection)
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


def test_a_server_that_hangs_is_told_after_the_patience_and_is_green_again_when_it_goes_on(own_migrated_server, caplog):
    told: list[Message] = []
    with watching(own_migrated_server.dsn("postgres"), told, interval=0.5, patience=1) as watch:
        wait_until(lambda: told)
        freeze(own_migrated_server)
        began = time.monotonic()
        try:
            wait_until(lambda: "connection" in watch.red)
            assert time.monotonic() - began < 100  # a statement might take two minutes
        finally:
            thaw(own_migrated_server)
        wait_until(lambda: "connection" not in watch.red)
    assert [names(message) for message in told[1:]] == [(["connection"], []), ([], ["connection"])]


def test_checks_that_are_slow_are_no_database_that_is_away(database, db, monkeypatch):
    monkeypatch.setattr(alarm, "MIN_CHECK_TIMEOUT", 0.2)
    look = verification.run_checks

    def slowly(connection, dsn):
        connection.execute("select pg_sleep(0.6)")
        return look(connection, dsn)

    monkeypatch.setattr(verification, "run_checks", slowly)
    told: list[Message] = []
    with watching(database.dsn, told, patience=0.1):
        wait_until(lambda: told)
    assert "connection" not in str([names(message) for message in told])


def test_while_it_is_away_the_log_says_so_once(monkeypatch, caplog):
    stop = threading.Event()
    watch = Watch("host=/nonexistent", [into([])], interval=0.05, patience=0)
    thread = threading.Thread(target=watch.run, args=[stop])
    thread.start()
    wait_until(lambda: "connection" in watch.red)
    time.sleep(1)
    stop.set()
    thread.join(PATIENCE)
    assert sum("no look at level_sync" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("interval", [0.2, 3600])
def test_it_tells_systemd_that_it_lives(database, db, monkeypatch, tmp_path, interval):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with watching(database.dsn, [], interval=interval):
            said = [systemd.recv(100).decode() for _ in range(4)]
    assert said == ["READY=1\nWATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]


def test_without_systemd_it_tells_nobody(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sd_notify("READY=1")


def test_the_command_watches_until_it_is_told_to_end(database, db, tmp_path):
    command = [
        LEVEL_SYNC,
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
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_between_two_tries_to_connect_it_tells_systemd_too(monkeypatch):
    stop = threading.Event()
    waited: list[float] = []
    monkeypatch.setattr(stop, "wait", lambda seconds: (waited.append(seconds), stop.set()))
    Watch("host=/nowhere", [into([])], interval=86400, patience=86400).run(stop)
    assert max(waited) <= 60  # WatchdogSec is 10 minutes


def group_is_alive(group: str) -> bool:
    states = subprocess.check_output(["ps", "-A", "-o", "pgid=,stat="], text=True).splitlines()
    return any(line.split()[0] == group and "Z" not in line for line in states)


def test_it_ends_when_told_although_a_check_and_a_command_hang(database, db, tmp_path):
    blocker = database.connect(autocommit=False)
    blocker.execute("lock table user_licenses in access exclusive mode")
    command = [LEVEL_SYNC, "watch", "--patience", "0", "--exec"]
    process = subprocess.Popen(
        [*command, f"echo $$ > {tmp_path}/pid; touch {tmp_path}/called; sleep 600"],
        env={**os.environ, "DATABASE_URL": database.dsn},
    )
    try:
        wait_until((tmp_path / "called").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        group = (tmp_path / "pid").read_text().strip()
        wait_until(lambda: not group_is_alive(group))
    finally:
        process.kill()
        process.wait()
        blocker.rollback()


def test_say_sends_a_text_and_ends(tmp_path):
    assert run("watch", "--exec", f"cat > {tmp_path}/message", "--say", "a test").exit_code == 0
    assert json.loads((tmp_path / "message").read_text())["subject"] == "a test"
    assert run("watch", "--exec", "false", "--say", "a test").exit_code == 1


def test_a_watch_that_would_tell_nobody_is_refused():
    done = run("watch")
    assert done.exit_code == 2
    assert "say whom to tell" in done.stderr


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    text = UNIT.read_text().replace("/opt/level_sync/venv/bin/level-sync", str(LEVEL_SYNC))
    (tmp_path / UNIT.name).write_text(text)
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no systemd here")
    assert (done.returncode, done.stderr) == (0, "")


def unit() -> dict[str, str]:
    return dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and line[0] not in "#[")


def test_the_unit_starts_it_again_whenever_it_dies_or_hangs():
    assert (unit()["Type"], unit()["NotifyAccess"], unit()["Restart"]) == ("notify", "main", "always")
    assert unit()["StartLimitIntervalSec"] == "0"  # however often
    minutes = int(unit()["WatchdogSec"].removesuffix("min"))
    # A look that hangs may take its limit and then the longest, and messages theirs, between two signs of life.
    assert 2 * SCAN_TIMEOUT + channels.SEND_TIMEOUT < minutes * 60 <= 600


def test_what_it_can_never_start_with_is_told_once_and_not_every_half_a_minute(tmp_path):
    assert unit()["RestartPreventExitStatus"] == "2"
    told = ["watch", "--dsn", "nonsense=1", "--exec", f"cat > {tmp_path}/message"]
    assert run(*told).exit_code == 2
    assert run(*told, "--webhook", "nowhere").exit_code == 2
    assert run(*told, "--say", "the watch itself has ended").exit_code == 0
    assert (tmp_path / "message").exists()


@pytest.mark.parametrize(("result", "is_told"), [("watchdog", True), ("exit-code", True), ("success", False)])
def test_its_end_is_told_through_the_channels_as_they_were_quoted(tmp_path, result, is_told):
    """As systemd calls it: quotes of the line and of WATCH_OPTIONS are heeded, a variable that is a word is split."""
    options = f"""--exec 'cat > "{tmp_path}/the message"'"""
    words: list[str] = []
    for word in shlex.split(unit()["ExecStopPost"]):
        words += shlex.split(options) if word == "$WATCH_OPTIONS" else [word]
    level_sync = str(LEVEL_SYNC)
    words = [level_sync if word.endswith("/bin/level-sync") else word for word in words]
    environment = {"PATH": "/usr/bin:/bin", "SERVICE_RESULT": result, "WATCH_OPTIONS": options}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "the message").exists() == is_told
    if is_told:
        assert f"has ended ({result})" in json.loads((tmp_path / "the message").read_text())["subject"]
