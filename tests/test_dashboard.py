"""level-sync dashboard in a real browser: what is wrong, what to do, and nothing that a hostile text could do."""

from __future__ import annotations

import base64
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from academy import LICENSE, PROGRESS, add_pair, add_pairs, bypass, configure, set_level, wait_until
from command_line import run
from conftest import dsn_of, free_port
from level_sync import dashboard, metrics, scan, schedule
from level_sync.dashboard import chart
from level_sync.database import queries
from level_sync.runbook import section_of
from level_sync.scan import Reader, Scanning
from level_sync.servers import has_extension
from level_sync.verify import BITS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATHS = ["/", "/runs", "/runs/1", "/queue", "/users", "/users?id=1"]
TOKEN = "a token of some length"  # noqa: S105
HOSTILE = (
    """<script>document.title = 'owned'</script><img src=x onerror="document.title='owned'">"'&{{ 7 * 7 }}\u202etxt"""
)

pytestmark = [pytest.mark.leftovers, pytest.mark.servers("embedded")]
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: tests/install_server_packages installs it as root on Debian or Ubuntu"
)


@contextmanager
def shown(dsn: str, token: str | None = None, port: int | None = None) -> Iterator[tuple[str, Scanning]]:
    """The dashboard at work: its address and its scanning. Scans are made by the test."""
    scanning = Scanning(Reader(dsn), 300)
    port = port or free_port()
    configuration = uvicorn.Config(dashboard.application(scanning, token), port=port, log_level="warning")
    server = uvicorn.Server(configuration)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}", scanning
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def site(database) -> Iterator[tuple[str, Scanning]]:
    with shown(database.dsn) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab that fails the test for any error, dialog or breach of the Content-Security-Policy."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None)
    yield page
    context.close()
    assert complaints == []


def get(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    try:
        request = urllib.request.Request(url, headers=headers or {}, method=method)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def look_again(page: Page) -> None:
    """What the page does by itself every ten seconds."""
    with page.expect_response(lambda response: response.request.resource_type == "fetch"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def troubled_academy(db) -> None:
    """Runs of all kinds, a desync, a queue with an error, a history with names."""
    add_pairs(db, 30, level=2)
    for day in range(27, 0, -1):
        with bypass(db):
            db.execute(f"update {PROGRESS} set current_level = mod(current_level, 7) + 1 where student_id <= {day % 9}")
            db.execute(f"update {LICENSE} set max_achieved_level = 8")
        db.execute("call level_sync.reconcile()")
        db.execute(
            "update level_sync.sync_log set job_start = job_start - make_interval(days => %s),"
            " job_end = job_end - make_interval(days => %s)"
            " where run_id = (select max(run_id) from level_sync.sync_log)",
            [day, day],
        )
        with bypass(db):
            db.execute(
                "update level_sync.sync_events set occurred_at = occurred_at - make_interval(days => %s)"
                " where run_id = (select max(run_id) from level_sync.sync_log)",
                [day],
            )
    db.execute("call level_sync.reconcile()")
    db.execute(f"alter table {LICENSE} add constraint exam_closed check (current_level <> 8) not valid")
    db.execute("set level_sync.actor = 'head.coach'")
    db.execute("set level_sync.reason = 'passed the exam'")
    set_level(db, PROGRESS, 1, 8)
    with bypass(db):
        set_level(db, PROGRESS, 2, 7)
    db.execute(f"alter table {LICENSE} disable trigger license_level_changed")


@needs_chromium
@pytest.mark.servers("system")
def test_only_where_all_is_well_and_known_it_says_so(database, db, page):
    if database.server.name != "system" or not has_extension(database.server.binaries, "pg_cron"):
        pytest.skip("without pg_cron the schedule is never good")
    add_pair(db, 1)
    schedule.schedule(database.dsn, None)
    verdict = page.get_by_role("heading", level=1)
    try:
        db.execute("call level_sync.reconcile()")
        with shown(database.dsn) as (address, scanning):
            page.goto(address)
            expect(verdict).to_have_text("1 check could not be made")
            expect(page.locator("#check-scan")).to_contain_text("All pairs have not been looked at yet")
            scanning.scan()
            look_again(page)
            expect(verdict).to_have_text("Everything is in step")
            expect(page.locator(".todo")).to_have_count(0)
            expect(page.get_by_text("None: every pair has one level.")).to_be_visible()
            assert page.title() == "0 to do · level_sync"
            scanning.reader.last_scan.at -= 2 * scanning.interval + 60
            look_again(page)
            expect(verdict).to_have_text("1 check could not be made")
            expect(page.locator("#check-scan")).to_contain_text("Runbook: LevelSyncScanStale")
            expect(page.get_by_text("every pair has one level")).to_have_count(0)
            assert page.title() == "1 to do · level_sync"
    finally:
        schedule.unschedule(database.dsn)


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

    def is_wanted() -> bool:
        assert get(address)[0] == 200
        return scanning.is_wanted

    add_pairs(db, 2, level=2)
    assert scanning.scan()
    assert not is_wanted()
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    db.execute("call level_sync.reconcile(dry_run => true)")
    assert not is_wanted()
    db.execute("call level_sync.reconcile()")
    assert is_wanted()
    assert scanning.scan()
    assert not is_wanted()

    with bypass(db):
        set_level(db, PROGRESS, 1, 4)
    assert scanning.scan()
    assert not is_wanted()
    monkeypatch.setattr(scan, "SOON", 0)
    monkeypatch.setattr(scan, "REST", 0)
    assert is_wanted()
    db.execute("select level_sync.sync_user(1, 'progress_to_license')")
    assert scanning.scan()
    assert not is_wanted()


@needs_chromium
def test_what_is_wrong_stands_first_with_what_to_do(db, site, page):
    troubled_academy(db)
    address, scanning = site
    scanning.scan()
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_contain_text("need somebody")
    triggers = page.locator(".todo > li", has_text="triggers")
    expect(triggers).to_contain_text("license_level_changed on public.user_licenses is disabled")
    expect(triggers).to_contain_text("What to do: Run level-sync migrate")
    expect(triggers).to_contain_text("Runbook: LevelSyncTriggersOrFunctionsChanged")
    expect(page.get_by_role("table", name="Pairs out of step")).to_contain_text("level_mismatchPLAYER2")
    assert page.title() == f"{page.locator('.todo > li').count()} to do · level_sync"


@needs_chromium
def test_the_runs_of_the_last_weeks_are_a_picture_that_leads_to_each_of_them(db, site, page):
    troubled_academy(db)
    page.goto(site[0])
    picture = page.get_by_role("img", name="Runs of the reconcile")
    expect(picture).to_be_visible()
    assert page.locator("svg a").count() == 28
    assert "28 runs; the most found at once is 8" in page.locator("svg > desc").text_content()
    heights = [float(bar.get_attribute("height")) for bar in page.locator("svg rect.found").all()]
    assert max(heights) == 140
    assert len(heights) == 24  # four have found nothing
    page.locator("svg a").nth(1).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Run 2")
    expect(page.get_by_role("table", name="What it has done")).to_contain_text("progress_to_license")


TEXTS_IN_THE_WAY = """() => {
  const boxes = [...document.querySelectorAll('svg text')].map(text => [text.textContent, text.getBBox()]);
  const bars = [...document.querySelectorAll('svg rect:not(.hit)')].map(bar => bar.getBBox());
  const overlap = (a, b, side, size) => a[side] < b[side] + b[size] && b[side] < a[side] + a[size];
  const meet = (a, b) => b.height && overlap(a, b, 'x', 'width') && overlap(a, b, 'y', 'height');
  const [, , wide, high] = document.querySelector('svg').getAttribute('viewBox').split(' ').map(Number);
  const cut = b => b.x < -4 || b.y < -2 || b.x + b.width > wide + 4 || b.y + b.height > high;
  return boxes.filter(([, box]) => cut(box) || bars.some(bar => meet(box, bar))).map(([text]) => text);
}"""


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
    picture = chart.chart_of(runs, since, until)
    heights = {bar.run["run_id"]: bar.repaired for bar in picture.bars}
    assert max(heights.values()) == heights[2] == chart.BARS
    assert heights[1] == heights[3]


@needs_chromium
def test_a_run_that_failed_is_seen_in_the_picture_and_all_of_it_is_readable(db, browser, site):
    troubled_academy(db)
    db.execute(
        "insert into level_sync.sync_log (status, started_by, job_start, job_end, error)"
        " select status, 'cron', now() - days * interval '1 day', now() - days * interval '1 day', 'why'"
        " from (values ('failed', 20.5), ('needs_approval', 10.5), ('aborted', 0)) as run (status, days)"
    )
    db.execute("update level_sync.sync_log set status = 'partial' where issues_found = 8")
    for width in (390, 1280):
        context = browser.new_context(viewport={"width": width, "height": 844})
        page = context.new_page()
        page.goto(site[0])
        for status, mark in (("failed", "×"), ("needs_approval", "?")):  # noqa: RUF001
            assert page.locator(f"svg text.mark.{status}").text_content() == mark
            expect(page.locator(".legend")).to_contain_text(f"{mark} {status.replace('_', ' ')}")
            column = page.locator(f"svg rect.hit.{status}")
            assert float(column.evaluate("bar => getComputedStyle(bar).fillOpacity")) > 0.1
            assert column.bounding_box()["height"] > 150
        assert page.evaluate(TEXTS_IN_THE_WAY) == []
        newest = page.locator("svg rect.found").last.bounding_box()
        assert newest["width"] >= 5
        assert newest["x"] >= 0
        assert newest["x"] + newest["width"] <= width
        assert page.locator("svg").bounding_box()["height"] >= 200
        context.close()


@needs_chromium
def test_a_run_shows_its_plan_and_its_repairs(db, site, page):
    add_pairs(db, 250, level=2)
    with bypass(db):
        db.execute(f"update {PROGRESS} set current_level = 5")
    configure(db, repair_limit=100)
    db.execute("call level_sync.reconcile()")
    page.goto(site[0] + "/runs/1")
    expect(page.get_by_text("call level_sync.reconcile(plan => 1, approve => true);")).to_be_visible()
    table = page.get_by_role("table", name="What it means to do")
    expect(table.get_by_role("row")).to_have_count(101)
    page.get_by_role("link", name="More of the plan").click()
    page.get_by_role("link", name="More of the plan").click()
    expect(page.get_by_role("table", name="What it means to do").get_by_role("row")).to_have_count(51)
    db.execute("call level_sync.reconcile(plan => 1, approve => true)")
    page.goto(site[0] + "/runs/2")
    expect(page.get_by_role("table", name="What it has done").get_by_role("row")).to_have_count(101)
    page.get_by_role("link", name="More repairs").click()
    page.get_by_role("link", name="More repairs").click()
    expect(page.get_by_role("table", name="What it has done").get_by_role("row")).to_have_count(51)


@needs_chromium
def test_a_history_says_who_and_why(db, site, page):
    add_pair(db, 7, level=2)
    db.execute("set level_sync.actor = 'head.coach'")
    db.execute("set level_sync.reason = 'passed the exam'")
    set_level(db, LICENSE, 7, 5)
    page.goto(site[0])
    page.get_by_label("User id").fill("7")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Levels of user 7")
    newest = page.get_by_role("row").nth(1)
    expect(newest).to_contain_text("head.coach")
    expect(newest).to_contain_text("passed the exam")
    expect(newest).to_contain_text("license_to_progress")


@needs_chromium
def test_hostile_names_reasons_and_errors_are_only_text(db, site, page):
    add_pair(db, 1, level=2)
    db.execute(
        "select set_config('level_sync.actor', %s, false), set_config('level_sync.reason', %s, false)",
        [HOSTILE, HOSTILE],
    )
    db.execute(
        f"create function public.refuse() returns trigger language plpgsql as $f$ begin"
        f" raise exception '%', $h${HOSTILE}$h$; end $f$"
    )
    set_level(db, PROGRESS, 1, 3)
    db.execute(f"create trigger refuse before update on {LICENSE} for each row execute function public.refuse()")
    set_level(db, PROGRESS, 1, 4)
    for path in ("/users?id=1", "/queue", "/"):
        page.goto(site[0] + path)
        look_again(page)
        assert "owned" not in page.title()
        assert page.locator("main img, main script").count() == 0
    page.goto(site[0] + "/users?id=1")
    shown_text = page.get_by_role("row").nth(1).inner_text()
    assert "<script>document.title = 'owned'</script>" in shown_text
    assert "{{ 7 * 7 }}" in shown_text
    assert "\u202e" not in shown_text


@needs_chromium
def test_ten_thousand_queued_pairs_are_shown_a_page_at_a_time(db, site, page):
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " select n, 'PLAYER', 'progress', 'level_changed', '55000', repeat('a long message ', 20) || n"
        " from generate_series(1, 10000) as n"
    )
    began = time.monotonic()
    page.goto(site[0] + "/queue")
    assert time.monotonic() - began < 5
    expect(page.get_by_role("row")).to_have_count(101)
    expect(page.get_by_role("row").nth(1)).to_contain_text("a long message 1")
    page.get_by_role("link", name="More").click()
    expect(page.get_by_role("row").nth(1).get_by_role("link")).to_have_text("101")


@needs_chromium
def test_it_updates_itself_and_keeps_what_the_reader_has_opened(db, site, page):
    address, scanning = site
    scanning.scan()
    page.goto(address)
    expect(page.locator(".todo > li", has_text="triggers")).to_have_count(0)
    page.get_by_text("checks", exact=False).locator("xpath=ancestor-or-self::summary").click()
    page.get_by_label("User id").fill("12")
    page.evaluate("document.querySelector('details').marked = true")
    db.execute(f"alter table {LICENSE} disable trigger license_level_changed")
    look_again(page)
    expect(page.locator(".todo > li", has_text="triggers")).to_have_count(1)
    assert page.get_by_label("User id").input_value() == "12"
    assert page.evaluate("document.activeElement.id") == "id"
    assert page.evaluate("document.querySelector('details').open && document.querySelector('details').marked")


@needs_chromium
def test_it_looks_again_every_ten_seconds(db, site, page):
    page.clock.install()
    page.goto(site[0])
    expect(page.locator("#check-triggers")).to_have_count(0)
    db.execute(f"alter table {LICENSE} disable trigger license_level_changed")
    for _ in range(2):
        with page.expect_response(lambda response: response.request.resource_type == "fetch"):
            page.clock.run_for(10_000)
    expect(page.locator("#check-triggers")).to_have_count(1)


@needs_chromium
def test_what_the_reader_has_opened_stays_open_where_rows_before_it_come_and_go(db, site, page):
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " select n, 'PLAYER', 'progress', 'level_changed', '55000', n || repeat(' long', 100)"
        " from generate_series(1, 4) as n"
    )
    page.goto(site[0] + "/queue")
    third = page.locator("tbody tr").nth(2)
    third.locator("summary").click()
    third.locator("a").focus()
    page.evaluate("document.querySelectorAll('tbody tr')[2].marked = true")
    db.execute("delete from level_sync.sync_queue where user_id in (1, 2)")
    db.execute("update level_sync.sync_queue set message = 'mended' || message where user_id = 4")
    look_again(page)
    expect(page.locator("tbody tr")).to_have_count(2)
    assert page.evaluate(
        "[...document.querySelectorAll('tbody tr')].map(row => [!!row.marked, row.querySelector('details').open])"
    ) == [[True, True], [False, False]]
    assert page.evaluate("document.activeElement.textContent") == "3"
    expect(page.locator("tbody tr").nth(1)).to_contain_text("mended4")


@needs_chromium
def test_a_database_that_is_away_is_said_and_the_page_comes_back_by_itself(database, db, site, page):
    page.goto(site[0])
    with psycopg.connect(dsn_of(database.server, "postgres"), autocommit=True) as admin:
        admin.execute(f"alter database {database.name} allow_connections false")
        try:
            look_again(page)
            # One failed attempt takes nobody's page away; with the next one there is only the reason to be read.
            expect(page.get_by_role("status")).to_have_text("The database refuses the connection: this is old.")
            assert page.title() == "? · level_sync"
            expect(page.get_by_role("heading", level=1)).to_contain_text("need")
            look_again(page)
            expect(page.get_by_role("heading", level=1)).to_have_text("The database refuses the connection")
            assert get(site[0])[0] == 503
        finally:
            admin.execute(f"alter database {database.name} allow_connections true")
    look_again(page)
    expect(page.get_by_role("heading", level=1)).to_contain_text("need")


@needs_chromium
def test_a_dashboard_that_is_gone_is_said_on_the_page(database, page):
    with shown(database.dsn) as (address, _):
        page.goto(address)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    warning = page.get_by_role("status")
    expect(warning).to_contain_text("this is old")
    assert warning.bounding_box()["y"] < page.get_by_role("heading", level=1).bounding_box()["y"]
    assert page.title() == "? · level_sync"
    with shown(database.dsn, port=int(address.rpartition(":")[2])):
        look_again(page)
        expect(warning).to_be_empty()


CUT_OFF = """() => [...document.querySelectorAll('main *')]
  .filter(element => !element.closest('.picture, thead') && element.getClientRects().length)
  .filter(element => {
    const box = element.getBoundingClientRect();
    return box.left < 0 || box.right > innerWidth + 0.5;
  })
  .map(element => element.outerHTML.slice(0, 200))"""


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark"), (1280, "dark")])
def test_nothing_is_cut_off_whatever_stands_in_the_rows(db, browser, site, width, scheme):
    troubled_academy(db)
    site[1].scan()
    db.execute("select set_config('level_sync.actor', repeat('w', 200), false)")
    db.execute("select set_config('level_sync.reason', repeat('why', 300), false)")
    set_level(db, PROGRESS, 1, 7)
    db.execute("update level_sync.sync_queue set message = repeat('unbroken', 300)")
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    for path in PATHS:
        page.goto(site[0] + path)
        assert page.evaluate(CUT_OFF) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    assert "www" in page.locator("main").inner_text()
    context.close()


@needs_chromium
def test_on_a_phone_a_row_is_a_card_that_says_first_what_matters(db, browser, site):
    troubled_academy(db)
    site[1].scan()
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(site[0] + "/queue")
    card = page.get_by_role("table", name="Queued pairs, oldest first").get_by_role("row").nth(1)
    assert card.bounding_box()["height"] < 280
    cells = [cell.inner_text() for cell in card.get_by_role("cell").all()]
    assert cells[0].startswith("1 PLAYER due")
    assert cells[1].startswith("23514 new row for relation")
    set_level(db, PROGRESS, 1, 7)
    page.goto(site[0] + "/users?id=1")
    newest = page.get_by_role("table").get_by_role("row").nth(1)
    (when, who, why) = newest.get_by_role("cell").all()[:3]
    assert who.inner_text() == "head.coach as postgres"
    assert why.inner_text() == "passed the exam"
    assert why.bounding_box()["y"] > who.bounding_box()["y"] > when.bounding_box()["y"]
    assert page.get_by_role("columnheader").count() == 9
    context.close()


@needs_chromium
def test_keyboard_and_screen_reader_find_their_way(db, site, page):
    troubled_academy(db)
    site[1].scan()
    for path in PATHS:
        page.goto(site[0] + path)
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == 1
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("table:not(:has(caption))").count() == 0
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input')].filter(field => field.labels.length === 0).length"
        )
        assert unnamed == 0
        assert page.evaluate(
            "[...document.querySelectorAll('[id]')].every((e, _, all) => all.filter(o => o.id === e.id).length === 1)"
        )
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(heading => +heading.tagName[1])")
        assert all(later - before <= 1 for before, later in pairwise(levels))
    page.goto(site[0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    # The history of a user is near, and the runs in the picture are in nobody's way.
    page.goto(site[0])
    assert page.locator("svg a").count() == 28
    reached: list[str] = []
    while "BODY" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.nodeName"))
        assert not page.evaluate("!!document.activeElement.closest('svg')")
        assert len(reached) < 25
    assert reached.index("id") < 6


def test_every_check_names_a_section_of_the_runbook_that_is_about_it():
    runbook = (Path(__file__).parents[1] / "docker" / "RUNBOOK.md").read_text(encoding="utf-8")
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

    palettes = re.findall(r":root \{(.*?)\}", (dashboard.HERE / "static" / "dashboard.css").read_text(), re.DOTALL)
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
    with scanning.reader.is_connected:
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
    monkeypatch.setattr(dashboard, "QUEUEING", 0.5)
    assert "As of" in get(address)[1]
    with scanning.reader.is_connected:
        began = time.monotonic()
        assert get(address)[0] == 200
        status, text, _ = get(address + "/queue")
        assert (status, "One moment" in text) == (503, True)
        assert time.monotonic() - began < 5
        assert "This is how it was" not in get(address)[1]
        monkeypatch.setattr(dashboard, "FRESH_FOR", -1)
        assert "This is how it was at" in get(address)[1]
        monkeypatch.undo()
    assert "This is how it was" not in get(address)[1]


def test_several_people_who_look_at_once_wait_for_each_other(db, site, monkeypatch):
    monkeypatch.setattr(dashboard, "PATIENCE", 0.05)
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
    assert time.monotonic() - began < 10
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
        assert time.monotonic() - began < 8


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
        proxy.join(20)


def test_nothing_can_be_written_and_other_names_are_not_answered(site):
    for method in ("POST", "DELETE"):
        status, _, headers = get(site[0], method=method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert get(site[0], headers={"Host": "evil.example"})[0] == 400


@pytest.mark.servers("system", "embedded")
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


@pytest.mark.parametrize(("command", "module"), [("dashboard", dashboard), ("exporter", metrics)])
def test_who_does_not_say_where_to_listen_is_reached_from_this_machine_alone(monkeypatch, command, module):
    listens: list[str] = []
    monkeypatch.setattr(module, "serve", lambda dsn, host, port, **_: listens.append(host))
    assert run(command).exit_code == 0
    assert listens == ["127.0.0.1"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_end(database, db, how):
    port = free_port()
    command = [
        Path(sys.executable).with_name("level-sync"),
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
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
