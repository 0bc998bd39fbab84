"""docker/prometheus/ with Prometheus' and Alertmanager's own programs: from a broken database to an e-mail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from academy import PROGRESS, add_pair, bypass, set_level, wait_until
from command_line import run
from conftest import free_port

PROMETHEUS = Path(__file__).resolve().parent.parent / "docker" / "prometheus"
PROGRAMS = Path(sys.prefix) / "prometheus" / "usr" / "bin"
LEVEL_SYNC = Path(sys.executable).with_name("level-sync")

pytestmark = [
    pytest.mark.leftovers,
    pytest.mark.servers("embedded"),
    pytest.mark.skipif(
        not (PROGRAMS / "prometheus-alertmanager").exists(),
        reason="Prometheus is not unpacked: tests/unpack_prometheus does it on Debian and Ubuntu",
    ),
]


def promtool(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAMS / "promtool", *arguments], capture_output=True, text=True, check=False, **options)


@contextmanager
def running(log: Path, *command: str | Path, **options: Any) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def test_every_rule_does_what_its_unit_test_says():
    done = promtool("test", "rules", PROMETHEUS / "level_sync.rules.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_tests_notice_a_rule_that_never_fires(tmp_path):
    rules = (PROMETHEUS / "level_sync.rules.yml").read_text()

    def is_noticed(expression: str) -> bool:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copy(PROMETHEUS / "level_sync.rules.test.yml", folder)
        (folder / "level_sync.rules.yml").write_text(rules.replace(expression, "vector(1) > 2"))
        return promtool("test", "rules", folder / "level_sync.rules.test.yml").returncode == 1

    expressions = re.findall(r"^ +expr: (.*)$", rules, re.MULTILINE)
    with ThreadPoolExecutor() as pool:
        noticed = dict(zip(expressions, pool.map(is_noticed, expressions), strict=True))
    assert noticed == dict.fromkeys(expressions, True)


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
    known = set(re.findall(r"^level_sync_\w+", run("metrics", "--dsn", database.dsn).stdout, re.MULTILINE))
    spoken_of = set(re.findall(r"level_sync_\w+", (PROMETHEUS / "level_sync.rules.yml").read_text()))
    assert spoken_of <= known


@pytest.mark.skipif(
    not Path("/usr/share/prometheus/alertmanager").exists(),
    reason="Alertmanager's templates are missing: tests/unpack_prometheus puts them there as root",
)
def test_a_broken_database_is_told_by_mail_and_so_is_its_repair(database, db, mailbox, tmp_path):
    box, smtp_port = mailbox
    exporter, prometheus, alertmanager = free_port(), free_port(), free_port()
    # As shipped, but in seconds instead of minutes and on this machine.
    rules = re.sub(r"for: \d+[mh]", "for: 1s", (PROMETHEUS / "level_sync.rules.yml").read_text())
    (tmp_path / "level_sync.rules.yml").write_text(rules)
    configuration = (PROMETHEUS / "prometheus.yml").read_text().replace("30s", "1s")
    configuration = configuration.replace("alertmanager:9093", f"127.0.0.1:{alertmanager}")
    (tmp_path / "prometheus.yml").write_text(configuration.replace("exporter:9930", f"127.0.0.1:{exporter}"))
    routes = (PROMETHEUS / "alertmanager.yml").read_text()
    routes = routes.replace("mail.example.org:587", f"127.0.0.1:{smtp_port}").replace(
        "require_tls: true", "require_tls: false"
    )
    (tmp_path / "alertmanager.yml").write_text(routes.replace("30s", "1s").replace("5m", "1s"))
    add_pair(db, 1, level=2)
    db.execute("update level_sync.settings set repair_limit = 0")
    db.execute("call level_sync.reconcile()")
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    db.execute("call level_sync.reconcile()")
    db.execute("alter table user_licenses disable trigger license_level_changed")

    with ExitStack() as programs:
        programs.enter_context(
            running(
                tmp_path / "exporter.log",
                *(LEVEL_SYNC, "exporter", "--listen", f"127.0.0.1:{exporter}", "--scan-interval", "1"),
                env={**os.environ, "DATABASE_URL": database.dsn},
            )
        )
        programs.enter_context(
            running(
                tmp_path / "alertmanager.log",
                PROGRAMS / "prometheus-alertmanager",
                f"--config.file={tmp_path / 'alertmanager.yml'}",
                f"--storage.path={tmp_path / 'alerts'}",
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            )
        )
        programs.enter_context(
            running(
                tmp_path / "prometheus.log",
                PROGRAMS / "prometheus",
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'series'}",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            )
        )

        def is_told(alert: str, state: str) -> bool:
            return any(alert in subject and state in subject for subject in box.subjects())

        broken = ("LevelSyncTriggersOrFunctionsChanged", "LevelSyncNeedsApproval", "LevelSyncDesyncStays")
        for alert in broken:
            wait_until(lambda alert=alert: is_told(alert, "FIRING"), lambda: (box.subjects(), logs(tmp_path)))
        db.execute("alter table user_licenses enable trigger license_level_changed")
        db.execute("update level_sync.settings set repair_limit = default")
        db.execute("call level_sync.reconcile()")
        for alert in broken:
            wait_until(lambda alert=alert: is_told(alert, "RESOLVED"), lambda: (box.subjects(), logs(tmp_path)))
    assert {str(message["To"]) for message in box.messages} == {"on-call@example.org"}


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
