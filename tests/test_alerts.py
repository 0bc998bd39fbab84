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


UNIT_TESTS = ("level_sync.rules.test.yml", "level_sync.desync.test.yml")


def test_every_rule_does_what_its_unit_test_says():
    done = promtool("test", "rules", *(PROMETHEUS / name for name in UNIT_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def unnoticed(rules: list[str], folder: Path) -> list[str]:
    """Those of the rule files that pass their unit tests."""

    def passes(text: str) -> bool:
        there = Path(tempfile.mkdtemp(dir=folder))
        for name in UNIT_TESTS:
            shutil.copy(PROMETHEUS / name, there)
        (there / "level_sync.rules.yml").write_text(text)
        return promtool("test", "rules", *(there / name for name in UNIT_TESTS)).returncode == 0

    with ThreadPoolExecutor(4) as pool:
        return [text for text, is_passed in zip(rules, pool.map(passes, rules), strict=True) if is_passed]


def test_the_unit_tests_notice_a_rule_that_never_fires(tmp_path):
    rules = (PROMETHEUS / "level_sync.rules.yml").read_text()
    expressions = re.findall(r"^ +expr: (.*)$", rules, re.MULTILINE)
    assert unnoticed([rules.replace(expression, "vector(1) > 2") for expression in expressions], tmp_path) == []


def test_the_unit_tests_notice_a_figure_that_is_forgotten_while_the_database_is_away(tmp_path):
    rules = (PROMETHEUS / "level_sync.rules.yml").read_text()
    remembered = list(re.finditer(r"last_over_time\((.*?)\[15m\]\)", rules))
    assert len(remembered) == rules.count("last_over_time(") > 0
    forgetful = [rules[: match.start()] + match[1] + rules[match.end() :] for match in remembered]
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
