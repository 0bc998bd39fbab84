"""docker/prometheus/ with Prometheus' and Alertmanager's own programs: from a broken database to an e-mail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import internals
from academy import LICENSE, PATIENCE, PROGRESS, Connection, add_pair, bypass, configure, set_level, wait_until
from command_line import run
from databases import Database
from level_sync.monitor.metrics import LevelSyncCollector, build_registry
from level_sync.monitor.scan import Reader, ScanScheduler
from mail_server import free_port
from tree import DOCKER, LEVEL_SYNC

PROMETHEUS = DOCKER / "prometheus"
PROGRAMS = Path(sys.prefix) / "prometheus" / "usr" / "bin"

pytestmark = [
    pytest.mark.leftovers,
    pytest.mark.skipif(
        not (PROGRAMS / "prometheus-alertmanager").exists(),
        reason="Prometheus is not unpacked: tests/support/unpack_prometheus does it on Debian and Ubuntu",
    ),
]


def promtool(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAMS / "promtool", *arguments], capture_output=True, text=True, check=False, **options)


@contextmanager
def running(log: Path, *command: str | Path, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


UNIT_TESTS = ("level_sync.rules.test.yml", "level_sync.desync.test.yml")


def test_every_rule_does_what_its_unit_test_says():
    done = promtool("test", "rules", *(PROMETHEUS / name for name in UNIT_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def unnoticed(rules: list[str], folder: Path) -> list[str]:
    """Those of the rule files that pass their unit tests; what takes hours is asked where the other passes."""

    def passes(text: str) -> bool:
        there = Path(tempfile.mkdtemp(dir=folder))
        (there / "level_sync.rules.yml").write_text(text)
        for name in UNIT_TESTS:
            shutil.copy(PROMETHEUS / name, there)
            if promtool("test", "rules", there / name).returncode != 0:
                return False
        return True

    with ThreadPoolExecutor(2) as pool:
        return [text for text, is_passed in zip(rules, pool.map(passes, rules), strict=True) if is_passed]


def test_the_unit_tests_notice_a_rule_that_never_fires(tmp_path):
    rules = (PROMETHEUS / "level_sync.rules.yml").read_text()
    expressions = re.findall(r"^ +expr: (.*)$", rules, re.MULTILINE)
    assert unnoticed([rules.replace(expression, "vector(1) > 2") for expression in expressions], tmp_path) == []


def test_the_unit_tests_notice_a_figure_that_is_forgotten_while_the_database_is_away(tmp_path):
    rules = (PROMETHEUS / "level_sync.rules.yml").read_text()
    remembered = list(re.finditer(r"last_over_time\((.*?)\[15m\]\)", rules))
    assert len(remembered) > 0
    forgetful = [rules.replace(text, "") for text in re.findall(r" or last_over_time\(\w+\[1d\]\) .* == 0", rules)]
    assert len(forgetful) > 0
    forgetful += [rules[: match.start()] + match[1] + rules[match.end() :] for match in remembered]
    assert unnoticed(forgetful, tmp_path) == []


def test_the_configurations_are_valid():
    assert promtool("check", "config", PROMETHEUS / "prometheus.yml").returncode == 0
    done = subprocess.run([PROGRAMS / "amtool", "check-config", PROMETHEUS / "alertmanager.yml"], check=False)
    assert done.returncode == 0


def test_promtool_finds_nothing_wrong_with_the_metrics(database, db):
    db.execute("call level_sync.reconcile()")
    done = promtool("check", "metrics", input=run("metrics", "--dsn", database.dsn).stdout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_rules_speak_of_metrics_that_exist(database, db):
    db.execute("call level_sync.reconcile()")
    scanning = ScanScheduler(Reader(database.dsn), 300)
    collector = LevelSyncCollector(scanning.reader, scanning)
    scanning.scan()
    known = {family.name for family in build_registry(collector).collect()}
    spoken_of = set(re.findall(r"\blevel_sync_\w+", (PROMETHEUS / "level_sync.rules.yml").read_text()))
    assert spoken_of <= known


NEEDS_TEMPLATES = pytest.mark.skipif(
    not Path("/usr/share/prometheus/alertmanager").exists(),
    reason="Alertmanager's templates are missing: tests/support/unpack_prometheus puts them there as root",
)


@contextmanager
def alertmanager(folder: Path, smtp_port: int) -> Iterator[int]:
    """Alertmanager as shipped, but in a second instead of minutes and with mails to this machine; its port."""
    port = free_port()
    routes = (PROMETHEUS / "alertmanager.yml").read_text()
    routes = routes.replace("mail.example.org:587", f"127.0.0.1:{smtp_port}").replace(
        "require_tls: true", "require_tls: false"
    )
    (folder / "alertmanager.yml").write_text(routes.replace("30s", "1s").replace("5m", "1s"))
    with running(
        folder / "alertmanager.log",
        PROGRAMS / "prometheus-alertmanager",
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alerts'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ):
        yield port


@NEEDS_TEMPLATES
def test_a_database_that_is_away_silences_its_own_alerts_and_nobody_else_s(mailbox, tmp_path):
    box, smtp_port = mailbox
    alerts = [
        {"alertname": "LevelSyncDatabaseUnreachable", "instance": "staging"},
        {"alertname": "LevelSyncQueueDead", "instance": "staging"},
        {"alertname": "LevelSyncQueueDead", "instance": "production"},
        {"alertname": "DiskFull", "instance": "staging"},
    ]
    with alertmanager(tmp_path, smtp_port) as port:

        def known() -> list[Any]:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/alerts") as answer:
                return json.load(answer)
            return []

        def post() -> bool:
            body = json.dumps([{"labels": labels} for labels in alerts]).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/api/v2/alerts", body, {"Content-Type": "application/json"}
            )
            with suppress(OSError), urllib.request.urlopen(request):  # noqa: S310
                return True
            return False

        wait_until(post, lambda: logs(tmp_path))
        wait_until(lambda: any(alert["status"]["inhibitedBy"] for alert in known()), lambda: (known(), logs(tmp_path)))
        silenced = [alert["labels"] for alert in known() if alert["status"]["inhibitedBy"]]
        wait_until(lambda: sum("FIRING" in subject for subject in box.subjects()) >= 3, lambda: box.subjects())
    assert silenced == [alerts[1]]
    assert not any("LevelSyncQueueDead" in subject and "FIRING:2" in subject for subject in box.subjects())


def fail_a_run(db: Connection) -> None:
    """Pair 1 differs, and its license cannot be written."""
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    db.execute(f"alter table {LICENSE} add constraint no_five check (current_level <> 5) not valid")
    configure(db, max_attempts=1)
    db.execute("call level_sync.reconcile()")


def want_approval(db: Connection) -> None:
    with bypass(db):
        set_level(db, PROGRESS, 1, 6)
    configure(db, repair_limit=0)
    db.execute("call level_sync.reconcile()")


# What is broken at the same time, what then mends it all, and the alerts of it.
BREAKAGES = {
    "a pair whose repair fails": (
        fail_a_run,
        lambda db: (
            db.execute(f"alter table {LICENSE} drop constraint no_five"),
            db.execute("select level_sync.requeue()"),
            db.execute("call level_sync.reconcile()"),
        ),
        ("LevelSyncRunFailed", "LevelSyncQueueDead", "LevelSyncDesyncStays"),
    ),
    "too many issues, and a trigger that is off": (
        lambda db: (
            want_approval(db),
            internals.disable_trigger(db),
        ),
        lambda db: (
            internals.enable_trigger(db),
            configure(db, repair_limit=1000),
            db.execute("call level_sync.reconcile()"),
        ),
        ("LevelSyncTriggersOrFunctionsChanged", "LevelSyncNeedsApproval"),
    ),
    "no run, an overdue pair, orphans": (
        lambda db: (
            db.execute("delete from level_sync.sync_log"),
            db.execute(
                "insert into level_sync.sync_queue"
                " (user_id, specialization, side, change, sqlstate, message, next_attempt_at)"
                " values (2, 'PLAYER', 'progress', 'level_changed', 'P0001', 'no', now() - interval '6 minutes')"
            ),
            db.execute(
                "set session_replication_role = replica; delete from users where id = 1; reset session_replication_role"
            ),
        ),
        lambda db: (
            db.execute("insert into users (id) values (1)"),
            db.execute("call level_sync.reconcile()"),
        ),
        ("LevelSyncNoSuccess", "LevelSyncQueueStuck", "LevelSyncOrphans"),
    ),
}


@contextmanager
def monitoring(database: Database, folder: Path, smtp_port: int) -> Iterator[subprocess.Popen[Any]]:
    """Exporter, Prometheus and Alertmanager as shipped, but in seconds and on this machine; the exporter's process."""
    exporter, prometheus = free_port(), free_port()
    rules = re.sub(r"for: \d+[mh]", "for: 1s", (PROMETHEUS / "level_sync.rules.yml").read_text())
    rules = rules.replace("[7h:10m]", "[5s:1s]").replace("[7h]", "[1m]").replace("[15m]", "[5s]")
    rules = rules.replace("[1h] offset 6h", "[5s] offset 2s")
    (folder / "level_sync.rules.yml").write_text(rules)
    with ExitStack() as programs:
        to = programs.enter_context(alertmanager(folder, smtp_port))
        configuration = (PROMETHEUS / "prometheus.yml").read_text().replace("30s", "1s")
        configuration = configuration.replace("alertmanager:9093", f"127.0.0.1:{to}")
        (folder / "prometheus.yml").write_text(configuration.replace("exporter:9930", f"127.0.0.1:{exporter}"))
        process = programs.enter_context(
            running(
                folder / "exporter.log",
                *(LEVEL_SYNC, "exporter", "--listen", f"127.0.0.1:{exporter}", "--scan-interval", "1"),
                env={**os.environ, "DATABASE_URL": database.dsn},
            )
        )
        programs.enter_context(
            running(
                folder / "prometheus.log",
                PROGRAMS / "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'series'}",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            )
        )
        yield process


@NEEDS_TEMPLATES
@pytest.mark.long
def test_a_broken_database_is_told_by_mail_and_so_is_its_repair(database, db, mailbox, tmp_path):
    box, smtp_port = mailbox

    def wait_for(alerts: tuple[str, ...], state: str) -> None:
        for alert in alerts:
            wait_until(
                lambda alert=alert: any(alert in subject and state in subject for subject in box.subjects()),
                lambda alert=alert: (alert, state, box.subjects(), logs(tmp_path)),
                seconds=2 * PATIENCE,
            )

    for user in (1, 2):
        add_pair(db, user, level=2)
    db.execute("call level_sync.reconcile()")
    with monitoring(database, tmp_path, smtp_port) as exporter:
        for break_it, mend_it, alerts in BREAKAGES.values():
            box.messages.clear()
            break_it(db)
            if "LevelSyncDesyncStays" in alerts:  # it stays after a run that has begun since it was first seen
                wait_for(alerts[:1], "FIRING")
                db.execute("call level_sync.reconcile()")
            wait_for(alerts, "FIRING")
            mend_it(db)
            wait_for(alerts, "RESOLVED")
        exporter.terminate()
        wait_for(("LevelSyncExporterDown",), "FIRING")
    assert {str(message["To"]) for message in box.messages} == {"on-call@example.org"}
    assert [subject for subject in box.subjects() if "academy" not in subject] == []
    parts = [[part.get_payload(decode=True) or b"" for part in message.walk()] for message in box.messages]
    assert all(b"docker/RUNBOOK.md#levelsync" in b"".join(payloads) for payloads in parts)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
