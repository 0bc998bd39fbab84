"""What a monitoring system asks: level-sync metrics and level-sync exporter."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

import internals
from academy import LICENSE, PATIENCE, PROGRESS, add_pair, add_pairs, bypass, configure, delete, set_level, wait_until
from command_line import run
from frozen_server import freeze, postmaster, thaw
from level_sync import cli
from level_sync import verify as verification
from level_sync.monitor import metrics
from level_sync.monitor.metrics import LevelSyncCollector, build_registry
from level_sync.monitor.network import CONNECT_TIMEOUT, connect_timeout
from level_sync.monitor.scan import Reader, ScanScheduler
from mail_server import free_port
from tree import LEVEL_SYNC, MIGRATIONS
from two_sessions import seconds
from versions import NEWEST, OLDEST

pytestmark = pytest.mark.leftovers


def figures(text: str) -> dict[str, float]:
    """Each sample by its name and labels, as Prometheus shows them."""
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(collector: LevelSyncCollector) -> dict[str, float]:
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in build_registry(collector).collect()
        for sample in family.samples
    }


@pytest.mark.servers(OLDEST, NEWEST)
def test_a_reader_sees_desyncs_queue_runs_repairs_events_and_checks(database, db, reader):
    for user in range(1, 5):
        add_pair(db, user, level=2)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
        delete(db, LICENSE, 2)
    db.execute("call level_sync.reconcile()")
    with bypass(db):
        set_level(db, LICENSE, 3, 1)
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, queued_at,"
        " next_attempt_at, dead_at)"
        " values (4, 'PLAYER', 'progress', 'level_changed', '55000', 'broken', now() - interval '1 hour', now(), null),"
        "        (4, 'PLAYER', 'progress', 'level_changed', '55000', 'broken', now(), now() + interval '1 hour', null),"
        "        (4, 'PLAYER', 'progress', 'level_changed', '55000', 'broken', now(), now(), now())"
    )
    done = run("metrics", "--dsn", reader)
    assert done.exit_code == 0, done.stderr
    found = figures(done.stdout)
    assert found["level_sync_up"] == 1
    assert found["level_sync_schema_version"] == int(MIGRATIONS[-1][:4])
    kinds = {name: value for name, value in found.items() if name.startswith("level_sync_desync_pairs")}
    assert {name: value for name, value in kinds.items() if value} == {
        "level_sync_desync_pairs issue_type=level_mismatch specialization=PLAYER": 1
    }
    assert len(kinds) == 9  # three kinds of three specializations: what is healed is 0, it does not vanish
    assert abs(found["level_sync_scan_timestamp_seconds"] - time.time()) < PATIENCE
    assert [found[f"level_sync_queue_pairs state={state}"] for state in ("waiting", "due", "dead")] == [1, 1, 1]
    assert found["level_sync_queue_oldest_age_seconds"] == pytest.approx(3600, abs=PATIENCE)
    assert found["level_sync_runs status=success"] == 1
    assert found["level_sync_runs status=failed"] == 0
    assert [name for name, value in found.items() if "last_run_status" in name and value] == [
        "level_sync_last_run_status status=success"
    ]
    assert abs(found["level_sync_last_success_timestamp_seconds"] - time.time()) < PATIENCE
    assert 0 < found["level_sync_last_run_duration_seconds"] < PATIENCE
    repairs = {name.rpartition("=")[2]: value for name, value in found.items() if "last_run_repairs" in name}
    assert repairs == {"update_license": 1, "create_license": 1, "update_progress": 0, "create_progress": 0}
    assert found["level_sync_recent_events action=created source=trigger"] == 4
    assert found["level_sync_recent_events action=created source=reconcile"] == 1
    assert (
        found["level_sync_recent_events action=updated source=undo"] == 0
    )  # what does not happen is 0, it does not vanish
    assert found["level_sync_health_check_ok check=triggers"] == 1
    assert found["level_sync_health_check_ok check=shipped_functions"] == 1
    assert found["level_sync_health_check_ok check=desync"] == 0
    assert found["level_sync_health_check_ok check=queue_dead"] == 0


def test_repairs_are_those_that_were_made_not_those_that_were_meant(database, db):
    for user in range(1, 4):
        add_pair(db, user, level=2)
    configure(db, repair_limit=1)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    collector = LevelSyncCollector(Reader(database.dsn))
    name = "level_sync_last_run_repairs action=update_license"
    db.execute("call level_sync.reconcile()")
    assert scraped(collector)["level_sync_last_run_status status=needs_approval"] == 1
    assert scraped(collector)[name] == 0
    db.execute("alter table user_licenses add constraint not_one check (user_id <> 1) not valid")
    db.execute("call level_sync.reconcile(approve => true)")
    assert scraped(collector)["level_sync_last_run_status status=partial"] == 1
    assert scraped(collector)[name] == 2


def test_a_run_at_work_and_one_that_was_skipped_do_not_say_that_the_failed_one_before_is_over(database, db):
    db.execute(
        "insert into level_sync.sync_log (status, job_start, job_end, error)"
        " values ('failed', now() - interval '7 seconds', now(), 'disk full')"
    )
    collector = LevelSyncCollector(Reader(database.dsn))
    for later in ("", "('skipped', false, now())", "('success', true, now())", "('running', false, null)"):
        if later:
            db.execute(f"insert into level_sync.sync_log (status, dry_run, job_end) values {later}")
        found = scraped(collector)
        assert [name for name in found if "last_run_status" in name and found[name]] == [
            "level_sync_last_run_status status=failed"
        ]
        assert found["level_sync_last_run_duration_seconds"] == pytest.approx(7, abs=0.1)
        assert found["level_sync_health_check_ok check=last_run"] == 0
    db.execute("update level_sync.sync_log set status = 'success', job_end = now() where status = 'running'")
    assert scraped(collector)["level_sync_last_run_status status=success"] == 1
    assert scraped(collector)["level_sync_health_check_ok check=last_run"] == 1


def test_events_of_long_ago_are_not_recent(database, db):
    add_pair(db, 1, level=2)
    with bypass(db):
        db.execute("update level_sync.sync_events set occurred_at = now() - interval '6 minutes'")
    add_pair(db, 2, level=2)
    collector = LevelSyncCollector(Reader(database.dsn))
    collector.reader.scan()
    assert scraped(collector)["level_sync_recent_events action=created source=trigger"] == 1


def test_the_oldest_that_waits_is_told_not_a_dead_one_and_what_could_not_be_checked_is_not_good(database, db):
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, queued_at,"
        " dead_at)"
        " values (4, 'PLAYER', 'progress', 'level_changed', '55000', 'broken', now() - interval '9 hours', now())"
    )
    collector = LevelSyncCollector(Reader(database.dsn))
    assert scraped(collector)["level_sync_queue_oldest_age_seconds"] == 0
    internals.make_runs_uncheckable(db)
    assert scraped(collector)["level_sync_health_check_ok check=last_run"] == 0


def test_every_figure_is_explained_and_named_as_prometheus_wants_it(database, db, reader):
    db.execute("call level_sync.reconcile()")
    text = run("metrics", "--dsn", reader).stdout
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"level_sync_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_total", "_count", "_sum"))  # those are counters'
        if "timestamp" in family.name or "duration" in family.name or "age" in family.name:
            assert family.name.endswith("_seconds")


def test_a_check_that_turns_red_is_seen_at_the_next_scrape_without_a_scan(database, db):
    collector = LevelSyncCollector(Reader(database.dsn))
    assert "level_sync_scan_timestamp_seconds" not in scraped(collector)
    assert scraped(collector)["level_sync_health_check_ok check=triggers"] == 1
    internals.disable_trigger(db)
    assert scraped(collector)["level_sync_health_check_ok check=triggers"] == 0
    collector.reader.scan()
    internals.enable_trigger(db)
    assert scraped(collector)["level_sync_health_check_ok check=triggers"] == 1


def test_a_healed_desync_is_zero_after_the_next_scan_and_the_time_of_the_scan_is_told(database, db):
    add_pair(db, 1, level=2)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    collector = LevelSyncCollector(Reader(database.dsn))
    name = "level_sync_desync_pairs issue_type=level_mismatch specialization=PLAYER"
    collector.reader.scan()
    first = scraped(collector)
    db.execute("call level_sync.reconcile()")
    assert (first[name], scraped(collector)[name]) == (1, 1)
    collector.reader.scan()
    second = scraped(collector)
    assert second[name] == 0
    assert second["level_sync_scan_timestamp_seconds"] > first["level_sync_scan_timestamp_seconds"]
    assert second["level_sync_collected_timestamp_seconds"] > first["level_sync_collected_timestamp_seconds"]


def test_a_database_that_is_away_is_up_0_and_up_1_at_the_next_scrape_when_it_is_back(database, db, caplog):
    collector = LevelSyncCollector(Reader(database.dsn))
    assert collector.reader.scan()
    assert scraped(collector)["level_sync_up"] == 1
    with psycopg.connect(database.server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(f"alter database {database.name} allow_connections false")
        try:
            assert scraped(collector)["level_sync_up"] == 0
            assert "level_sync_desync_pairs" not in str(scraped(collector))
            assert not collector.reader.scan()
            told = [message for message in caplog.messages if "level_sync_up" in message]
            assert len(told) == 1  # once, not at each scrape
        finally:
            admin.execute(f"alter database {database.name} allow_connections true")
    db.execute("alter table level_sync.sync_log rename to away")
    assert scraped(collector)["level_sync_up"] == 0
    assert "does not exist" in caplog.messages[-1]  # another reason is told as well
    db.execute("alter table level_sync.away rename to sync_log")
    assert scraped(collector)["level_sync_up"] == 1
    assert caplog.messages[-1] == "level_sync_up 1"
    assert "not currently accepting connections" in told[0]


def test_metrics_that_cannot_be_written_are_an_error_not_a_traceback(database):
    command = [LEVEL_SYNC, "metrics", "--dsn", database.dsn]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "[Errno 28] No space left on device\n")


def test_no_database_and_no_installation_are_up_0_and_not_a_crash(empty_database):
    for dsn in (empty_database.dsn, "host=/nonexistent dbname=nothing"):
        done = run("metrics", "--dsn", dsn)
        assert done.exit_code == 32
        assert figures(done.stdout)["level_sync_up"] == 0


def test_a_scrape_during_a_scan_tells_the_last_figures_and_does_not_wait(database, db):
    collector = LevelSyncCollector(Reader(database.dsn))
    before = scraped(collector)["level_sync_collected_timestamp_seconds"]
    with collector.reader.lock:
        began = time.monotonic()
        assert scraped(collector)["level_sync_collected_timestamp_seconds"] == before
        assert time.monotonic() - began < metrics.LOCK_WAIT


def test_a_scan_that_hangs_is_up_0_in_time_and_up_1_with_the_next_scrape_after_it(own_migrated_server, monkeypatch):
    monkeypatch.setattr(metrics, "FRESH_FOR", 1)
    monkeypatch.setattr(metrics, "LOCK_WAIT", 0.5)
    reader = Reader(own_migrated_server.dsn("postgres"))
    collector = LevelSyncCollector(reader)
    assert scraped(collector)["level_sync_up"] == 1
    make_checks = verification.run_checks
    hangs = threading.Event()

    def freeze_and_check(*given):
        freeze(own_migrated_server)
        hangs.set()
        return make_checks(*given)

    monkeypatch.setattr(verification, "run_checks", freeze_and_check)
    scanning = threading.Thread(target=reader.scan)
    scanning.start()
    try:
        assert hangs.wait(PATIENCE)
        time.sleep(1.1)
        began = time.monotonic()
        assert scraped(collector)["level_sync_up"] == 0
        assert "level_sync_desync_pairs" not in str(scraped(collector))
        assert scraped(LevelSyncCollector(reader))["level_sync_up"] == 0  # one that has nothing to tell again
        assert time.monotonic() - began < 30  # the scan itself may take two minutes
    finally:
        thaw(own_migrated_server)
    scanning.join(PATIENCE)
    assert scraped(collector)["level_sync_up"] == 1


def test_an_exporter_whose_server_hangs_says_so_and_is_back_with_the_next_scrape(own_migrated_server):
    with exporting(own_migrated_server.dsn("postgres"), "--scan-interval", "1") as (port, _):
        wait_until(lambda: "level_sync_scan_timestamp_seconds" in scrape(port))
        os.kill(postmaster(own_migrated_server), signal.SIGSTOP)
        try:
            began = time.monotonic()
            wait_until(lambda: scrape(port)["level_sync_up"] == 0)
            assert time.monotonic() - began < 100  # the scan itself may take two minutes
        finally:
            os.kill(postmaster(own_migrated_server), signal.SIGCONT)
        assert scrape(port)["level_sync_up"] == 1


def test_a_run_that_ends_brings_the_next_scan_forward(database, db, reader):
    add_pair(db, 1, level=2)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    name = "level_sync_desync_pairs issue_type=level_mismatch specialization=PLAYER"
    with exporting(reader, "--scan-interval", "3600") as (port, _):
        wait_until(lambda: scrape(port).get(name) == 1)
        db.execute("call level_sync.reconcile()")
        wait_until(lambda: scrape(port)[name] == 0)


def test_a_textfile_is_replaced_in_one_step_also_when_the_database_is_away(database, db, tmp_path):
    path = tmp_path / "level_sync.prom"
    assert run("metrics", "--dsn", database.dsn, "--textfile", str(path)).exit_code == 0
    first = path.stat().st_ino
    assert figures(path.read_text())["level_sync_up"] == 1
    assert run("metrics", "--dsn", "host=/nonexistent", "--textfile", str(path)).exit_code == 32
    assert figures(path.read_text())["level_sync_up"] == 0
    assert path.stat().st_ino != first
    assert os.listdir(tmp_path) == ["level_sync.prom"]


def test_a_folder_that_is_not_there_is_a_plain_error(database, tmp_path):
    done = run("metrics", "--dsn", database.dsn, "--textfile", str(tmp_path / "missing" / "level_sync.prom"))
    assert done.exit_code == 1
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("dsn", ["host=a,b,c", "hostaddr=10.0.0.1,10.0.0.2,10.0.0.3", "postgresql://a,b,c/academy"])
def test_several_hosts_that_do_not_answer_share_the_time_that_one_has(dsn):
    assert connect_timeout(dsn) == "2"  # together 6 seconds, and Prometheus waits for 10
    assert connect_timeout("host=a") == str(CONNECT_TIMEOUT)


@pytest.mark.parametrize(
    "listen",
    [
        "9930",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:99999",
        ":9930",
        "127.0.0.1:http",
        "a..b:9930",
        f"{'x' * 64}:9930",
    ],
)
def test_an_address_that_is_none_is_refused(listen):
    done = run("exporter", "--listen", listen)
    assert done.exit_code == 2
    assert "is not HOST:PORT" in re.sub(r"[\s│]+", " ", done.stderr)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "level_sync.monitor.metrics")
    monkeypatch.delattr("level_sync.monitor.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    done = run("metrics")
    assert done.exit_code == 1
    assert "pip install '.[metrics]'" in done.stderr


@contextmanager
def exporting(dsn: str, *options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """An exporter at work: its port and its process."""
    port = free_port()
    command = [LEVEL_SYNC, "exporter", "--listen", f"127.0.0.1:{port}"]
    exporter = subprocess.Popen(
        [*command, *options], env={**os.environ, "DATABASE_URL": dsn}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert f"http://127.0.0.1:{port}/metrics" in exporter.stderr.readline()
        yield port, exporter
    finally:
        exporter.kill()
        exporter.communicate()


def scrape(port: int, query: str = "") -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics{query}", timeout=PATIENCE) as answer:
        return figures(answer.read().decode())


def test_the_exporter_answers_prometheus_and_ends_when_told(database, db, reader):
    with exporting(reader, "--scan-interval", "1") as (port, exporter):
        wait_until(lambda: "level_sync_scan_timestamp_seconds" in scrape(port))
        found = scrape(port)
        assert (found["level_sync_up"], found["level_sync_scan_interval_seconds"]) == (1, 1)
        assert run("exporter", "--listen", f"127.0.0.1:{port}").exit_code == 1  # the port is taken
        exporter.send_signal(signal.SIGTERM)
        assert exporter.wait(PATIENCE) == 0


def test_a_scrape_that_asks_for_some_figures_by_name_gets_those(database, db, reader):
    with exporting(reader) as (port, _):
        wait_until(lambda: "level_sync_scan_timestamp_seconds" in scrape(port))
        assert scrape(port, "?name[]=level_sync_up") == {"level_sync_up": 1}
        asked = "?name[]=level_sync_schema_version&name[]=level_sync_desync_pairs&name[]=nothing"
        assert {name.partition(" ")[0] for name in scrape(port, asked)} == {
            "level_sync_schema_version",
            "level_sync_desync_pairs",
        }


def test_every_figure_can_be_asked_for_by_name(database, db):
    db.execute("call level_sync.reconcile()")
    scanning = ScanScheduler(Reader(database.dsn), 300)
    collector = LevelSyncCollector(scanning.reader, scanning)
    scanning.scan()
    assert sorted(family.name for family in collector.describe()) == sorted(
        family.name for family in collector.collect()
    )


def test_the_exporter_holds_one_connection_at_most_and_none_between(database, db, reader):
    ours = "select count(*) from pg_stat_activity where usename like 'reader_of_%'"
    with exporting(reader, "--scan-interval", "3600") as (port, _):
        wait_until(lambda: "level_sync_scan_timestamp_seconds" in scrape(port))
        seen = []
        with ThreadPoolExecutor(4) as pool:
            scrapes = [pool.submit(lambda: [scrape(port) for _ in range(10)]) for _ in range(4)]
            while not all(each.done() for each in scrapes):
                seen.append(db.execute(ours).fetchone()[0])
        # A backend is seen for a moment after its client has gone.
        wait_until(lambda: db.execute(ours).fetchone() == (0,))
        assert max(seen) <= 2
        time.sleep(0.5)
        assert db.execute(ours).fetchone() == (0,)


def test_it_listens_on_this_machine_alone_unless_told_otherwise():
    options = {option.name: option.default for option in typer.main.get_command(cli.app).commands["exporter"].params}
    assert options["listen"] == "127.0.0.1:9930"


def test_a_scrape_costs_little_however_many_pairs_and_runs_there_are_and_were_just_written(
    database, db, another_database, record_property, pytestconfig
):
    """The runs are those of three months, one each minute. Scrapes of an empty database in between tell how fast the
    machine is at the moment."""
    is_proof = pytestconfig.getoption("--proof")
    pairs, fresh, runs = (1_000_000, 300_000, 129_600) if is_proof else (20_000, 20_000, 5_000)
    add_pairs(db, pairs)
    db.execute("call level_sync.reconcile()")
    db.execute(
        "insert into level_sync.sync_log (status, started_by, job_start, job_end, results)"
        " select status, 'cron', job_start + n * interval '1 second', job_end + n * interval '1 second', results"
        " from level_sync.sync_log, generate_series(1, %s) as n",
        [runs],
    )
    db.execute("vacuum analyze level_sync.sync_log")
    full, empty = (LevelSyncCollector(Reader(each.dsn)) for each in (database, another_database))
    full.reader.scan()
    empty.reader.scan()
    db.execute("update specialization_progress set current_level = 5 where student_id <= %s", [fresh])
    times = [(seconds(scraped, full), seconds(scraped, empty)) for _ in range(21)]
    of_full, of_empty = map(statistics.median, zip(*times, strict=True))
    record_property(
        "figure",
        f"a scrape of {pairs:,} pairs, {fresh:,} of them just written, {runs:,} runs: {of_full * 1000:.0f} ms,"
        f" of none {of_empty * 1000:.0f} ms, scan {full.reader.last_scan.duration:.2f} s",
    )
    assert of_full < 2 * of_empty
    if is_proof:  # it runs alone
        assert of_full < 0.05


def test_a_scrape_reads_no_table_that_grows_with_each_write(database, db):
    """What it costs does not depend on how much was written: it looks neither at the pairs nor at the events."""
    add_pairs(db, 200)
    db.execute("select pg_stat_force_next_flush()")
    collector = LevelSyncCollector(Reader(database.dsn))

    def reads() -> list[tuple[object, ...]]:
        return db.execute(
            "select relname, seq_tup_read, idx_tup_fetch from pg_stat_user_tables"
            " where relname in ('specialization_progress', 'user_licenses', 'sync_events') order by 1"
        ).fetchall()

    before = reads()
    for _ in range(3):
        assert scraped(collector)["level_sync_up"] == 1
    wait_until(
        lambda: (
            db.execute(
                "select count(*) from pg_stat_activity"
                " where datname = current_database() and backend_type = 'client backend'"
            ).fetchone()
            == (1,)
        )
    )  # a session tells its figures when it ends
    assert reads() == before
    collector.reader.scan()
    wait_until(lambda: reads() != before)
