"""When every pair is looked at, for the exporter and for the dashboard."""

from __future__ import annotations

import time

import pytest

from academy import LICENSE, wait_until
from level_sync.database import queries
from level_sync.monitor import scan
from level_sync.monitor.scan import Reader, Scan, ScanScheduler

pytestmark = pytest.mark.leftovers


class SlowReader(Reader):
    """Takes a while for a look at nothing, and notes when it began and when it ended."""

    def __init__(self) -> None:
        super().__init__("")
        self.looks: list[tuple[float, float]] = []

    def scan(self) -> bool:
        began = time.time()
        time.sleep(0.1)
        self.last_scan = Scan(began, 0.1, None, [], [], [])
        self.looks.append((began, time.time()))
        return True


def test_a_scan_that_failed_is_tried_again_soon(database, db, monkeypatch):
    monkeypatch.setattr(scan, "RETRY_DELAY", 0.2)
    monkeypatch.setattr(scan, "COOLDOWN_FACTOR", 0)
    scanning = ScanScheduler(Reader(database.dsn), 3600)
    blocker = database.connect(autocommit=False)
    blocker.execute(f"lock table {LICENSE} in access exclusive mode")
    with scanning.running():
        wait_until(lambda: scanning.reader.scan_error)
        blocker.rollback()
        wait_until(lambda: scanning.reader.last_scan)
        assert scanning.reader.scan_error is None


def test_a_scan_that_is_requested_is_made(database, db):
    scanning = ScanScheduler(Reader(database.dsn), 3600)
    with scanning.running():
        wait_until(lambda: scanning.reader.last_scan)
        at = scanning.reader.last_scan.at
        db.execute("call level_sync.reconcile()")
        scanning.request_after_run(db.execute("select max(job_end) from level_sync.sync_log").fetchone()[0])
        wait_until(lambda: scanning.reader.last_scan.at > at)


def test_a_run_before_the_first_scan_does_not_bring_a_second_one_forward(database, db):
    db.execute("call level_sync.reconcile()")
    scanning = ScanScheduler(Reader(database.dsn), 3600)
    scanning.request_after_run(queries.last_run_ended_at(db))
    assert scanning.scan()
    scanning.request_after_run(queries.last_run_ended_at(db))
    assert not scanning.is_requested


def test_a_run_that_was_skipped_or_dry_has_healed_nothing(database, db):
    scanning = ScanScheduler(Reader(database.dsn), 3600)
    assert scanning.scan()
    db.execute("call level_sync.reconcile(dry_run => true)")
    db.execute("insert into level_sync.sync_log (status, job_end) values ('skipped', now())")
    scanning.request_after_run(queries.last_run_ended_at(db))
    assert not scanning.is_requested


def test_a_run_that_ends_while_a_scan_does_not_succeed_is_not_forgotten(database, db):
    scanning = ScanScheduler(Reader(database.dsn), 3600)
    assert scanning.scan()
    db.execute("call level_sync.reconcile()")
    blocker = database.connect(autocommit=False)
    blocker.execute(f"lock table {LICENSE} in access exclusive mode")
    assert not scanning.scan()
    blocker.rollback()
    scanning.request_after_run(queries.last_run_ended_at(db))
    assert scanning.is_requested


def test_a_long_scan_leaves_the_server_in_peace_though_another_is_requested():
    reader = SlowReader()
    scanning = ScanScheduler(reader, 3600)
    with scanning.running():
        wait_until(lambda: reader.looks)
        scanning._is_requested.set()
        wait_until(lambda: len(reader.looks) > 1)
    (_, first_end), (second_begin, _) = reader.looks[:2]
    assert second_begin - first_end > 0.9 * scan.COOLDOWN_FACTOR * 0.1


def test_what_is_not_worthwhile_is_not_looked_at_and_asked_about_again_soon(monkeypatch):
    monkeypatch.setattr(scan, "RETRY_DELAY", 0.2)
    answers = iter([False, False])
    reader = SlowReader()
    began = time.time()
    with ScanScheduler(reader, 3600).running(lambda: next(answers, True)):
        wait_until(lambda: reader.looks)
    assert reader.looks[0][0] - began > 0.3


def test_nothing_is_looked_at_any_more_once_it_is_over():
    reader = SlowReader()
    with ScanScheduler(reader, 0.01).running():
        wait_until(lambda: len(reader.looks) > 1)
    time.sleep(1)  # one that was under way may end
    looks = len(reader.looks)
    time.sleep(0.3)
    assert len(reader.looks) == looks
