"""level-sync dashboard in a real browser: what is wrong, what to do, and nothing that a hostile text could do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import pairwise

import psycopg
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import internals
from academy import LICENSE, PATIENCE, PROGRESS, add_pair, add_pairs, bypass, configure, set_level
from dashboard_site import PATHS, get, shown
from level_sync.setup import schedule
from servers import wait_for_launcher

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    """<script>document.title = 'owned'</script><img src=x onerror="document.title='owned'">"'&{{ 7 * 7 }}\u202etxt"""
)

pytestmark = pytest.mark.leftovers
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium here: tests/support/install_server_packages installs it as root on Debian",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab that fails the test for any error, dialog or breach of the Content-Security-Policy."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None)
    yield page
    context.close()
    assert complaints == []


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
    internals.disable_trigger(db)


@needs_chromium
@pytest.mark.needs("pg_cron")
def test_only_where_all_is_well_and_known_it_says_so(database, db, page):
    add_pair(db, 1)
    wait_for_launcher(db)
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


@needs_chromium
def test_what_is_wrong_stands_first_with_what_to_do(db, site, page):
    troubled_academy(db)
    address, scanning = site
    scanning.scan()
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_contain_text("need somebody")
    triggers = page.locator(".todo > li", has_text="triggers")
    expect(triggers).to_contain_text(f"{internals.LEVEL_CHANGED[LICENSE]} on public.{LICENSE} is disabled")
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
    assert time.monotonic() - began < 60
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
    internals.disable_trigger(db)
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
    internals.disable_trigger(db)
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
    with psycopg.connect(database.server.dsn("postgres"), autocommit=True) as admin:
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
