"""What a monitoring system asks: level-sync metrics and level-sync exporter."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from academy import LICENSE, PROGRESS, add_pair, add_pairs, bypass, delete, set_level
from command_line import run
from conftest import dsn_of, free_port
from level_sync.metrics import LevelSyncCollector, registry_of
from level_sync.scan import Reader

pytestmark = [pytest.mark.leftovers, pytest.mark.servers("embedded")]


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
        for family in registry_of(collector).collect()
        for sample in family.samples
    }


@pytest.mark.servers("system", "embedded")
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
    assert found["level_sync_schema_version"] == 9
    kinds = {name: value for name, value in found.items() if name.startswith("level_sync_desync_pairs")}
    assert {name: value for name, value in kinds.items() if value} == {
        "level_sync_desync_pairs issue_type=level_mismatch specialization=PLAYER": 1
    }
    assert len(kinds) == 9  # three kinds of three specializations: what is healed is 0, it does not vanish
    assert abs(found["level_sync_scan_timestamp_seconds"] - time.time()) < 60
    assert [found[f"level_sync_queue_pairs state={state}"] for state in ("waiting", "due", "dead")] == [1, 1, 1]
    assert found["level_sync_queue_oldest_age_seconds"] == pytest.approx(3600, abs=60)
    assert found["level_sync_runs status=success"] == 1
    assert found["level_sync_runs status=failed"] == 0
    assert [name for name, value in found.items() if "last_run_status" in name and value] == [
        "level_sync_last_run_status status=success"
    ]
    assert abs(found["level_sync_last_success_timestamp_seconds"] - time.time()) < 60
    assert 0 < found["level_sync_last_run_duration_seconds"] < 60
    assert found["level_sync_last_run_pairs action=update_license"] == 1
    assert found["level_sync_last_run_pairs action=create_license"] == 1
    assert found["level_sync_recent_events action=created source=trigger"] == 4
    assert found["level_sync_recent_events action=created source=reconcile"] == 1
    assert found["level_sync_health_check_ok check=triggers"] == 1
    assert found["level_sync_health_check_ok check=shipped_functions"] == 1
    assert found["level_sync_health_check_ok check=desync"] == 0
    assert found["level_sync_health_check_ok check=queue_dead"] == 0


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
    db.execute("alter table user_licenses disable trigger license_level_changed")
    assert scraped(collector)["level_sync_health_check_ok check=triggers"] == 0
    collector.reader.scan()
    db.execute("alter table user_licenses enable trigger license_level_changed")
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
    with psycopg.connect(dsn_of(database.server, "postgres"), autocommit=True) as admin:
        admin.execute(f"alter database {database.name} allow_connections false")
        try:
            assert scraped(collector)["level_sync_up"] == 0
            assert "level_sync_desync_pairs" not in str(scraped(collector))
            assert not collector.reader.scan()
            assert sum("level_sync_up 0" in message for message in caplog.messages) == 1  # once, not at each scrape
        finally:
            admin.execute(f"alter database {database.name} allow_connections true")
    assert scraped(collector)["level_sync_up"] == 1


def test_no_database_and_no_installation_are_up_0_and_not_a_crash(empty_database):
    for dsn in (empty_database.dsn, "host=/nonexistent dbname=nothing"):
        done = run("metrics", "--dsn", dsn)
        assert done.exit_code == 32
        assert figures(done.stdout)["level_sync_up"] == 0


def test_a_scrape_during_a_scan_tells_the_last_figures_and_does_not_wait(database, db):
    collector = LevelSyncCollector(Reader(database.dsn))
    before = scraped(collector)["level_sync_collected_timestamp_seconds"]
    with collector.reader.is_connected:
        began = time.monotonic()
        assert scraped(collector)["level_sync_collected_timestamp_seconds"] == before
        assert time.monotonic() - began < 0.5


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


@pytest.mark.parametrize("listen", ["9930", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999", ":9930", "127.0.0.1:http"])
def test_an_address_that_is_none_is_refused(listen):
    done = run("exporter", "--listen", listen)
    assert done.exit_code == 2
    assert "is not HOST:PORT" in re.sub(r"[\s│]+", " ", done.stderr)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "level_sync.metrics")
    monkeypatch.delattr("level_sync.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    done = run("metrics")
    assert done.exit_code == 1
    assert "pip install 'level-sync[metrics]'" in done.stderr


def test_the_exporter_answers_prometheus_and_ends_when_told(database, db, reader):
    port = free_port()
    command = [str(Path(sys.executable).with_name("level-sync")), "exporter", "--listen", f"127.0.0.1:{port}"]
    exporter = subprocess.Popen(
        [*command, "--scan-interval", "1"],
        env={**os.environ, "DATABASE_URL": reader},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert f"http://127.0.0.1:{port}/metrics" in exporter.stderr.readline()
        deadline = time.monotonic() + 20
        found: dict[str, float] = {}
        while "level_sync_scan_timestamp_seconds" not in found:
            assert time.monotonic() < deadline, found
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    found = figures(answer.read().decode())
            except OSError:
                time.sleep(0.1)
        assert found["level_sync_up"] == 1
        assert run("exporter", "--listen", f"127.0.0.1:{port}").exit_code == 1  # the port is taken
        exporter.send_signal(signal.SIGTERM)
        assert exporter.wait(10) == 0
        # It held no connection longer than its queries took.
        assert db.execute("select count(*) from pg_stat_activity where usename like 'reader_of_%'").fetchone() == (0,)
    finally:
        exporter.kill()
        exporter.communicate()


def test_a_scrape_costs_little_however_many_pairs_there_are(database, db, record_property, pytestconfig):
    pairs = 1_000_000 if pytestconfig.getoption("--proof") else 20_000
    add_pairs(db, pairs)
    collector = LevelSyncCollector(Reader(database.dsn))
    collector.reader.scan()
    times = []
    for _ in range(21):
        began = time.perf_counter()
        scraped(collector)
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    record_property(
        "figure",
        f"a scrape of {pairs:,} pairs: {median * 1000:.0f} ms, scan {collector.reader.last_scan.duration:.2f} s",
    )
    # A busy machine is given room; the proof, which runs alone, is not.
    assert median < (0.05 if pytestconfig.getoption("--proof") else 0.5)
