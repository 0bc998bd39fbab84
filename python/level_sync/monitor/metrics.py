"""Metrics of level_sync for Prometheus. Needs the extra `metrics`.

Most figures are read anew for each scrape. Those that take a look at every pair (desyncs, orphans, all checks of
`level-sync verify`) are read every `scan_interval` seconds, and a figure says when that was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from level_sync.database import queries
from level_sync.monitor.scan import Reader, ScanScheduler

# The help text of each metric, by its name without level_sync_.
METRICS = {
    "build_info": "Version of this exporter's package.",
    "up": "1 where level_sync could be read; 0 with the reason in the log.",
    "collected_timestamp_seconds": "When these figures were read.",
    "scan_interval_seconds": "Between two scans of all pairs; one may come sooner.",
    "schema_version": "Number of the newest migration applied.",
    "health_check_ok": "1 where a check of level_sync.health is good; 0 where it is not, or could not be made.",
    "queue_pairs": "Entries of sync_queue: waiting for their next attempt, due for it, or dead.",
    "queue_oldest_age_seconds": "Age of the oldest entry that is not dead; 0 where there is none.",
    "runs": "Runs of the reconcile in sync_log, which keeps them for log_retention.",
    "last_run_status": "1 for the status of the last run that has ended and was neither skipped nor dry, 0 for the "
    "others.",
    "last_success_timestamp_seconds": "When the last run that ended as success or partial began.",
    "last_run_duration_seconds": "How long the run of last_run_status took.",
    "last_run_repairs": "Pairs that the run of last_run_status has repaired, by action.",
    "desync_pairs": "Pairs whose sides differed at the last scan.",
    "recent_events": "Events of the five minutes before the last scan: levels carried, rows created, repairs, "
    "undone repairs.",
    "scan_timestamp_seconds": "When the last scan of all pairs began.",
    "scan_duration_seconds": "How long the last scan of all pairs took.",
}
ACTIONS = ("update_license", "create_license", "update_progress", "create_progress")
# Seconds that a scrape waits for the reader's lock, where the last figures are fresh enough to be sent again, and where
# they are not. Prometheus gives up after 10.
LOCK_WAIT_IF_FRESH, LOCK_WAIT = 0.2, 4
FRESH_FOR = 30  # seconds that figures may be sent again while a scan holds the lock

log = logging.getLogger("level_sync")


class LevelSyncCollector(Collector):
    """The state of level_sync now, and what the last scan of its reader found.

    A database that does not answer is level_sync_up 0, with the reason in the log; never an exception, and never later
    than Prometheus waits for.
    """

    def __init__(self, reader: Reader, scheduler: ScanScheduler | None = None) -> None:
        """The scheduler of that reader; None where this is asked only once."""
        self.reader = reader
        self.scheduler = scheduler
        self._down_reason: str | None = None
        self._latest: list[GaugeMetricFamily] = []
        self._latest_at = float("-inf")

    @property
    def is_up(self) -> bool:
        """Whether the database answered the last time it was asked."""
        return self._down_reason is None

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The names that ?name[] of a scrape may ask for, without a look at the database."""
        return (gauge(name, {}) for name in METRICS)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        # While a scan holds the lock, the figures of the last scrape are sent again rather than waited for.
        is_fresh = self.is_up and time.monotonic() - self._latest_at < self._fresh_for()
        if self.reader.lock.acquire(timeout=LOCK_WAIT_IF_FRESH if is_fresh else LOCK_WAIT):
            try:
                self._latest = list(self._read())
                self._latest_at = time.monotonic()
            finally:
                self.reader.lock.release()
            yield from self._latest
        elif is_fresh:
            yield from self._latest
        else:
            self._set_down("the scan of all pairs has had no answer for a long time")
            yield from self._exporter_metrics()

    def refresh(self) -> bool:
        """Reads the figures that are sent while a scan is at work. Returns whether the database is up."""
        list(self.collect())
        return self.is_up

    def _fresh_for(self) -> float:
        """Seconds. A scan that takes longer than twice the time of the last one is taken for a server that hangs."""
        scan = self.reader.last_scan
        return max(FRESH_FOR, 2 * scan.duration if scan else 0)

    def _read(self) -> Iterator[GaugeMetricFamily]:
        try:
            with self.reader.connection() as connection:
                current = list(self._current_metrics(connection))
            self._set_up()
        except psycopg.Error as error:
            self._set_down(str(error).strip())
            current = []
        yield from self._exporter_metrics()
        yield from current
        if self.is_up:
            yield from self._scan_metrics()

    def _set_down(self, reason: str) -> None:
        """Logs the reason when it changes, not at each scrape."""
        if reason != self._down_reason:
            log.warning("level_sync_up 0: %s", reason)
        self._down_reason = reason

    def _set_up(self) -> None:
        if not self.is_up:
            log.warning("level_sync_up 1")
        self._down_reason = None

    def _exporter_metrics(self) -> Iterator[GaugeMetricFamily]:
        """What can be said without the database."""
        yield gauge("build_info", {(version("level-sync"),): 1}, "version")
        yield gauge("up", {(): self.is_up})
        yield gauge("collected_timestamp_seconds", {(): time.time()})
        if self.scheduler is not None:
            yield gauge("scan_interval_seconds", {(): self.scheduler.interval})

    def _current_metrics(self, connection: psycopg.Connection[Any]) -> Iterator[GaugeMetricFamily]:
        """What is read anew for each scrape."""
        if self.scheduler is not None:
            self.scheduler.request_after_run(queries.last_run_ended_at(connection))
        yield gauge("schema_version", {(): queries.schema_version(connection)})
        checks = self.reader.latest_checks(list(queries.quick_health(connection)))
        yield gauge("health_check_ok", {(check.name,): float(check.ok is True) for check in checks}, "check")
        queue: dict[str, Any] = queries.queue_summary(connection)
        yield gauge("queue_pairs", {(state,): queue[state] for state in ("waiting", "due", "dead")}, "state")
        yield gauge("queue_oldest_age_seconds", {(): queue["oldest_seconds"]})
        runs = {row["status"]: row["runs"] for row in queries.runs_by_status(connection)}
        yield gauge("runs", {(status,): count for status, count in runs.items()}, "status")
        last: dict[str, Any] = queries.last_runs(connection)
        yield gauge(
            "last_run_status",
            {(status,): float(status == last["status"]) for status in runs if status not in ("running", "skipped")},
            "status",
        )
        if last["success_at"] is not None:
            yield gauge("last_success_timestamp_seconds", {(): last["success_at"]})
        if last["duration_seconds"] is not None:
            yield gauge("last_run_duration_seconds", {(): last["duration_seconds"]})
        yield gauge("last_run_repairs", {(action,): last["repairs"].get(action, 0) for action in ACTIONS}, "action")

    def _scan_metrics(self) -> Iterator[GaugeMetricFamily]:
        """What the last scan found."""
        scan = self.reader.last_scan
        if scan is None:
            return
        yield gauge(
            "desync_pairs",
            {(row["issue_type"], row["specialization"]): row["pairs"] for row in scan.desyncs},
            "issue_type",
            "specialization",
        )
        yield gauge(
            "recent_events", {(row["action"], row["source"]): row["events"] for row in scan.events}, "action", "source"
        )
        yield gauge("scan_timestamp_seconds", {(): scan.at})
        yield gauge("scan_duration_seconds", {(): scan.duration})


def gauge(name: str, values: dict[tuple[str, ...], Any], *labels: str) -> GaugeMetricFamily:
    """One of METRICS; the keys of values are the values of its labels."""
    family = GaugeMetricFamily(f"level_sync_{name}", METRICS[name], labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, float(value))
    return family


def serve(
    dsn: str, host: str, port: int, *, scan_interval: float, stop: threading.Event, is_ready: Callable[[], object]
) -> None:
    """Answers scrapes, and looks at every pair each scan_interval seconds, until stop is set. Raises OSError."""
    scheduler = ScanScheduler(Reader(dsn), scan_interval)
    collector = LevelSyncCollector(scheduler.reader, scheduler)
    server, thread = start_http_server(port, host, build_registry(collector))
    is_ready()
    with scheduler.running(collector.refresh):
        stop.wait()
    server.shutdown()
    server.server_close()
    thread.join()


def collect_once(dsn: str, textfile: Path | None = None) -> tuple[str, bool]:
    """Every figure, a scan included, in Prometheus' text format, and whether the database answered.

    The textfile is replaced in one step, as node_exporter's textfile collector needs it. Raises OSError.
    """
    collector = LevelSyncCollector(Reader(dsn))
    collector.reader.scan()
    registry = build_registry(collector)
    if textfile is None:
        return generate_latest(registry).decode(), collector.is_up
    write_to_textfile(str(textfile), registry)
    return "", collector.is_up


def build_registry(collector: LevelSyncCollector) -> CollectorRegistry:
    """The collector alone, without the figures of this process."""
    registry = CollectorRegistry()
    registry.register(collector)
    return registry
