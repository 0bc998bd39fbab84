"""What level-sync dashboard answers: pages of bounded size, plain refusals, and nothing that could be written."""

from __future__ import annotations

import base64
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from academy import LICENSE, PATIENCE, PROGRESS, add_pairs, bypass, configure, set_level, wait_until
from command_line import run
from dashboard_site import PATHS, get, shown
from level_sync.database import queries
from level_sync.monitor import metrics, scan
from level_sync.monitor.dashboard import chart, pages, rendering, web
from level_sync.monitor.runbook import section_of
from level_sync.monitor.scan import Reader
from level_sync.verify import BITS
from mail_server import free_port
from tree import LEVEL_SYNC, RUNBOOK
from versions import NEWEST, OLDEST

TOKEN = "a token of some length"  # noqa: S105


pytestmark = pytest.mark.leftovers


def test_a_scan_that_was_not_possible_is_said_with_its_reason(database, db, site):
    address, scanning = site
    blocker = database.connect(autocommit=False)
    blocker.execute(f"lock table {LICENSE} in access exclusive mode")
    assert not scanning.scan()
    blocker.rollback()
    text = get(address)[1]
    assert "Not all pairs could be looked at since the dashboard was started: canceling statement due to lock" in text
    assert scanning.scan()
    text = get(address)[1]
    assert "could be looked at" not in text
    assert "attempt failed" not in text
    blocker.execute(f"lock table {LICENSE} in access exclusive mode")
    assert not scanning.scan()
    blocker.rollback()
    text = get(address)[1]
    assert "The latest attempt failed: canceling statement due to lock timeout" in text
    assert "check-scan" not in text  # the one before is young enough to be believed
    scanning.reader.last_scan.at -= 2 * scanning.interval + 60
    assert "Not all pairs could be looked at for a long time: canceling statement due to lock" in get(address)[1]


def test_what_has_been_mended_is_looked_at_before_the_next_scan_is_due(db, site, monkeypatch):
    address, scanning = site

    def is_requested() -> bool:
        assert get(address)[0] == 200
        return scanning.is_requested

    add_pairs(db, 2, level=2)
    assert scanning.scan()
    assert not is_requested()
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    db.execute("call level_sync.reconcile(dry_run => true)")
    assert not is_requested()
    db.execute("call level_sync.reconcile()")
    assert is_requested()
    assert scanning.scan()
    assert not is_requested()

    with bypass(db):
        set_level(db, PROGRESS, 1, 4)
    assert scanning.scan()
    assert not is_requested()
    monkeypatch.setattr(scan, "RETRY_DELAY", 0)
    monkeypatch.setattr(scan, "COOLDOWN_FACTOR", 0)
    assert is_requested()
    db.execute("select level_sync.sync_user(1, 'progress_to_license')")
    assert scanning.scan()
    assert not is_requested()


def test_a_run_that_died_is_as_high_in_the_picture_as_what_it_had_repaired(db):
    add_pairs(db, 20)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    db.execute("call level_sync.reconcile()")
    for repaired in (9000, 20):
        db.execute(
            "insert into level_sync.sync_log (status, job_start, job_end, synced_count, error)"
            " values ('aborted', now() - interval '1 day', now() - interval '1 day', %s, 'died')",
            [repaired],
        )
    since, until = db.execute("select now() - interval '21 days', now() + interval '1 hour'").fetchone()
    with psycopg.connect(db.info.dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as connection:
        runs = connection.execute("select * from level_sync.sync_log order by job_start").fetchall()
    picture = chart.build_chart(runs, since, until)
    heights = {bar.run["run_id"]: bar.repaired for bar in picture.bars}
    assert max(heights.values()) == heights[2] == chart.BARS_HEIGHT
    assert heights[1] == heights[3]


def test_every_check_names_a_section_of_the_runbook_that_is_about_it():
    runbook = RUNBOOK.read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in runbook.split("\n## ")[1:])
    for check in set(BITS) - {"live"}:
        section = section_of(check, "")
        assert section in sections, check
        assert re.search(rf"^Checks?:.*`{check}[`:]", sections[section], re.MULTILINE), check
    assert section_of("schedule: level_sync_maintain", "") == section_of("schedule", "")
    assert section_of("last_run", "run 7: needs_approval, because") == "LevelSyncNeedsApproval"
    assert section_of("last_run", "run 7: failed, needs_approval is no word of ours") == "LevelSyncRunFailed"
    assert section_of("scan", "") in sections


def test_colours_can_be_told_apart_by_everybody():
    """WCAG AA: text has a contrast of at least 4.5 to what it stands on."""

    def luminance(colour: str) -> float:
        if len(colour) == 4:
            colour = "#" + "".join(2 * digit for digit in colour[1:])
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    palettes = re.findall(r":root \{(.*?)\}", (pages.STATIC_FILES / "dashboard.css").read_text(), re.DOTALL)
    assert len(palettes) == 2
    for palette in palettes:
        colours = dict(re.findall(r"--(\w+): (#\w+);", palette))
        for text in ("text", "quiet", "link", "good", "bad", "unknown"):
            for ground in ("ground", "raised"):
                lighter, darker = sorted([luminance(colours[text]), luminance(colours[ground])], reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


def test_every_answer_binds_the_browser(db, site):
    db.execute("call level_sync.reconcile()")
    for path in [
        *PATHS,
        "/static/dashboard.css",
        "/static/dashboard.js",
        "/nothing",
        "/users?id=x",
        "/runs/99999999999999999999",
    ]:
        _, text, headers = get(site[0] + path)
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
        assert not re.search(r"<script(?! src=\"/static)|\son\w+=|\sstyle=", text)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/users?id=x", 400, "id must be a whole number"),
        ("/users?id=99999999999999999999", 400, "of at most 18 digits."),
        ("/runs/" + "9" * 5000, 400, "The number of a run must be a whole number"),
        ("/runs/%D9%A3", 400, "must be a whole number"),
        ("/runs/77", 404, "There is no run 77"),
        ("/queue?after=%27", 400, "after must be a whole number"),
        ("/nothing", 404, "Not Found"),
        ("/static/../__init__.py", 404, "Not Found"),
    ],
)
def test_what_is_not_there_is_refused_plainly(site, path, status, message):
    found, text, _ = get(site[0] + path)
    assert (found, message in text) == (status, True)


def test_a_visitors_mistake_is_not_blamed_on_the_database_and_costs_nobody_a_page(db, site):
    db.execute("call level_sync.reconcile()")
    address, scanning = site
    assert get(address)[0] == 200
    for path in ("/runs/1?specialization=%00&user=1", "/queue?after=%00", "/users?id=1%00"):
        status, text, _ = get(address + path)
        assert (status, "must not contain the character NUL" in text) == (400, True), path
    with scanning.reader.lock:
        assert get(address)[0] == 200


def test_more_is_offered_only_where_there_is_more(db, site):
    def look(path: str) -> tuple[int, list[str]]:
        """How many rows a page has, and where its links to more of them lead."""
        text = get(site[0] + path)[1]
        return text.count('<tr role="row"') - text.count("<thead"), [
            address.replace("&amp;", "&") for address in re.findall(r'href="([^"]+)">(?:More|Older)', text)
        ]

    def add_runs(count: int) -> None:
        db.execute(
            "insert into level_sync.sync_log"
            " (status, started_by, job_start, job_end, issues_found, synced_count, failed_count)"
            " select 'success', 'cron', now(), now(), 0, 0, 0 from generate_series(1, %s)",
            [count],
        )

    def add_queued(count: int) -> None:
        db.execute(
            "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
            " select n, 'PLAYER', 'progress', 'level_changed', '55000', 'm' from generate_series(1, %s) as n",
            [count],
        )

    add_pairs(db, 100, level=2)
    with bypass(db):
        db.execute(f"update {PROGRESS} set current_level = 5")
    db.execute("call level_sync.reconcile(dry_run => true)")
    assert look("/runs/1") == (100, [])
    db.execute("call level_sync.reconcile(plan => 1)")
    assert look("/runs/2") == (100, [])
    add_runs(98)
    add_queued(100)
    for change in range(98):  # beside the creation and the repair
        set_level(db, PROGRESS, 1, change % 2 + 1)
    for path in ("/queue", "/runs", "/users?id=1"):
        assert look(path) == (100, []), path

    add_runs(1)
    add_queued(1)
    set_level(db, PROGRESS, 1, 8)
    for path in ("/queue", "/runs", "/users?id=1"):
        rows, (following,) = look(path)
        assert (rows, look(following)) == (100, (1, [])), path
    for path, words in [
        ("/queue?after=999999", "No more queued pairs."),
        ("/runs?before=1", "No older run."),
        ("/users?id=1&before=1", "Nothing older."),
    ]:
        assert words in get(site[0] + path)[1]


def test_messages_of_any_length_make_no_large_page(database, db, site):
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, dead_at)"
        " select n, 'PLAYER', 'progress', 'level_changed', 'P0001', repeat('long ', 200000), now()"
        " from generate_series(1, 100) as n"
    )
    db.execute(
        "insert into level_sync.sync_log"
        " (status, started_by, job_start, job_end, issues_found, synced_count, failed_count, error)"
        " values ('failed', 'cron', now(), now(), 0, 0, 0, repeat('long ', 200000))"
    )
    for path in ("/", "/queue", "/runs", "/runs/1"):
        status, text, _ = get(site[0] + path)
        assert status == 200
        assert "long long" in text
        assert path == "/" or "(cut here)" in text  # what health says there is short already
        assert len(text) < 300_000, path
    with Reader(database.dsn).connection() as connection:  # what is not shown is not even sent
        queued = list(queries.queue_after(connection, after=None, row_limit=100, text_limit=1001))
    assert max(len(row["message"]) for row in queued) == 1001


@pytest.mark.parametrize("status", ["running", "skipped", "aborted"])
def test_a_run_that_has_found_nothing_yet_is_in_the_picture_too(db, site, status):
    db.execute("call level_sync.reconcile()")
    ends = None if status == "running" else "now()"
    db.execute(
        "insert into level_sync.sync_log"
        " (status, started_by, job_start, job_end, issues_found, synced_count, failed_count)"
        " values (%s, 'manual', now(), %s, null, null, null)",
        [status, ends],
    )
    for path in ("/", "/runs", "/runs/1", "/runs/2"):
        assert get(site[0] + path)[0] == 200, path


def test_thousands_of_runs_make_no_large_page(db, site):
    db.execute(
        "insert into level_sync.sync_log"
        " (status, started_by, job_start, job_end, issues_found, synced_count, failed_count)"
        " select 'success', 'cron', at, at, 3, 3, 0"
        " from generate_series(now() - interval '27 days', now(), '5 minutes') as at"
    )
    status, text, _ = get(site[0])
    assert status == 200
    assert len(text) < 300_000


def test_while_a_scan_is_at_work_a_page_is_as_it_was_and_does_not_wait(site, monkeypatch):
    address, scanning = site
    monkeypatch.setattr(pages, "MORE_LOCK_WAIT", 0.5)
    assert "As of" in get(address)[1]
    with scanning.reader.lock:
        began = time.monotonic()
        assert get(address)[0] == 200
        status, text, _ = get(address + "/queue")
        assert (status, "One moment" in text) == (503, True)
        assert time.monotonic() - began < 30
        assert "This is how it was" not in get(address)[1]
        monkeypatch.setattr(rendering, "FRESH_FOR", -1)
        assert "This is how it was at" in get(address)[1]
        monkeypatch.undo()
    assert "This is how it was" not in get(address)[1]


def test_several_people_who_look_at_once_wait_for_each_other(db, site, monkeypatch):
    monkeypatch.setattr(pages, "LOCK_WAIT_IF_CACHED", 0.05)
    monkeypatch.setattr(pages, "MORE_LOCK_WAIT", PATIENCE)
    runs = "select 'success', now() from generate_series(1, 5000)"
    db.execute(f"insert into level_sync.sync_log (status, job_end) {runs}")
    with ThreadPoolExecutor(12) as people:
        answers = list(people.map(lambda n: get(f"{site[0]}/runs?before={n}")[0], range(100, 148)))
    assert answers == [200] * 48


def test_a_plan_that_was_applied_is_not_offered_again(db, site):
    add_pairs(db, 3)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    configure(db, repair_limit=0)
    db.execute("call level_sync.reconcile()")
    offer = "call level_sync.reconcile(plan => 1, approve => true);"
    assert offer in get(site[0] + "/runs/1")[1]
    db.execute("call level_sync.reconcile(plan => 1, approve => true)")
    assert offer not in get(site[0] + "/runs/1")[1]


def test_an_error_of_several_lines_is_told_as_one(tmp_path):
    with shown(f"host={tmp_path} dbname=academy") as (url, _):
        status, body, _ = get(url)
    assert status == 503
    assert "failed: No such file or directory Is the server running" in body


def test_a_locked_table_is_no_database_that_is_away(database, db, site):
    blocker = database.connect(autocommit=False)
    blocker.execute(f"lock table {LICENSE} in access exclusive mode")
    began = time.monotonic()
    assert not site[1].scan()
    status, text, _ = get(site[0])
    assert time.monotonic() - began < 60  # a scan itself may take two minutes
    assert (status, "The database answers, but level_sync cannot be read" in text) == (503, True)
    assert "lock timeout" in text
    blocker.rollback()


def test_a_connection_that_falls_silent_is_cut(database, db, monkeypatch):
    """As through a proxy or pooler that hangs: the server accepts what is sent, and nothing comes back."""
    monkeypatch.setattr(scan, "READ_TIMEOUT", 0.5)
    with silent_after(database.server.directory / ".s.PGSQL.5432", 3000) as port:
        reader = Reader(f"host=127.0.0.1 port={port} user=postgres dbname={database.name} gssencmode=disable")
        began = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            ask_until_it_fails(reader)
        assert time.monotonic() - began < 60


def ask_until_it_fails(reader: Reader) -> None:
    with reader.connection() as connection:
        while True:
            connection.execute("select 1")


@contextmanager
def silent_after(server: Path, count: int) -> Iterator[int]:
    """A proxy to the server's socket that passes on so many bytes of its answers and then no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as inner:

        def pass_on() -> None:
            outer = listener.accept()[0]
            inner.connect(str(server))
            asking = threading.Thread(target=pipe, args=[outer, inner, 1 << 60])
            asking.start()
            pipe(inner, outer, count)
            asking.join()  # the client has hung up
            outer.close()

        def pipe(source: socket.socket, target: socket.socket, left: int) -> None:
            with suppress(OSError):
                while left > 0 and (data := source.recv(65536)):
                    target.sendall(data)
                    left -= len(data)

        proxy = threading.Thread(target=pass_on)
        proxy.start()
        yield listener.getsockname()[1]
        proxy.join(PATIENCE)


def test_nothing_can_be_written_and_other_names_are_not_answered(site):
    for method in ("POST", "DELETE"):
        status, _, headers = get(site[0], method=method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert get(site[0], headers={"Host": "evil.example"})[0] == 400


@pytest.mark.servers(OLDEST, NEWEST)
def test_a_reader_who_may_not_write_sees_every_page(db, reader):
    db.execute("call level_sync.reconcile()")
    with shown(reader) as (address, pairs):
        assert pairs.scan()
        assert [get(address + path)[0] for path in PATHS] == [200] * len(PATHS)


def test_with_a_token_only_who_has_it_is_let_in_and_it_stands_nowhere(database):
    def authorization(password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    with shown(database.dsn, TOKEN) as (address, _):
        for headers in (
            {},
            {"Authorization": "Basic é"},
            authorization("wrong"),
            authorization(""),
            {"Authorization": "Basic !"},
            {"Authorization": TOKEN},
        ):
            for path in (*PATHS, "/static/dashboard.css"):
                status, text, found = get(address + path, headers)
                assert (status, text) == (401, "The token, please.")
                assert found["www-authenticate"].startswith("Basic")
        status, text, found = get(address, authorization(TOKEN) | {"Host": "dashboard.example.org"})
        assert status == 200
        assert TOKEN not in text + str(found)


def test_beyond_this_machine_it_wants_a_token(tmp_path):
    done = run("dashboard", "--listen", "0.0.0.0:9931")
    assert done.exit_code == 2
    assert "give --token-file" in re.sub(r"[\s│]+", " ", done.stderr)
    (tmp_path / "token").write_text("short\n")
    done = run("dashboard", "--listen", "0.0.0.0:9931", "--token-file", str(tmp_path / "token"))
    assert done.exit_code == 2
    assert "is shorter than 16 characters" in re.sub(r"[\s│]+", " ", done.stderr)


@pytest.mark.parametrize(("command", "module"), [("dashboard", web), ("exporter", metrics)])
def test_who_does_not_say_where_to_listen_is_reached_from_this_machine_alone(monkeypatch, command, module):
    listens: list[str] = []
    monkeypatch.setattr(module, "serve", lambda dsn, host, port, **_: listens.append(host))
    assert run(command).exit_code == 0
    assert listens == ["127.0.0.1"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_end(database, db, how):
    port = free_port()
    command = [
        LEVEL_SYNC,
        "dashboard",
        "--dsn",
        database.dsn,
        "--listen",
        f"127.0.0.1:{port}",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}/" in process.stderr.readline()

        def answers() -> bool:
            try:
                return get(f"http://127.0.0.1:{port}/")[0] == 200
            except urllib.error.URLError:
                return False

        wait_until(answers)
        process.send_signal(how)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.communicate()
