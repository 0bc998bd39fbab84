"""docker/RUNBOOK.md: for every alert the database is broken in that way, and each step of its section is run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

import internals
from academy import LICENSE, PATIENCE, PROGRESS, add_pair, bypass, configure, drain, levels, set_level, wait_until
from command_line import run
from databases import Database
from level_sync.monitor.runbook import SECTIONS as SECTION_OF
from level_sync.monitor.runbook import section_of
from level_sync.setup import install, schedule
from mail_server import free_port
from servers import AS_NOBODY, CRON_HOME, wait_for_launcher
from tree import DOCKER, RUNBOOK
from versions import NEWEST, OLDEST

STEPS = ("Look", "Do", "See that it worked")

pytestmark = pytest.mark.leftovers


@dataclass
class Section:
    """What the runbook says of one alert: the checks it stands for, and the code of each step with its language.

    Where the cause decides what to do, that step has several.
    """

    checks: list[str]
    steps: dict[str, list[tuple[str, str]]]
    wants_no_row: bool


def sections() -> dict[str, Section]:
    found = {}
    for part in re.split(r"(?m)^## ", RUNBOOK.read_text())[1:]:
        alert = part.split("\n", 1)[0]
        checks = re.search(r"^Checks?: (.*)\.$", part, re.MULTILINE)
        steps = {}
        for step, text in re.findall(r"\*\*(Look|Do|See that it worked)\*\*(.*?)(?=\n\*\*|\Z)", part, re.DOTALL):
            steps[step] = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
        found[alert] = Section(
            re.findall(r"`([\w ]+)", checks[1]) if checks else [], steps, "**See that it worked**: no row." in part
        )
    return found


SECTIONS = sections()


class Operator:
    """Somebody on call with a shell, psql and the runbook."""

    def __init__(self, database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.port = free_port()
        self.role = f"monitor_of_{database.name}"
        self.url = database.dsn
        self.reads = ""  # the reason, where the runbook tells what to do by it
        self.goes_home: Callable[[], object] = lambda: None

    def does(self, language: str, code: str) -> subprocess.CompletedProcess[str]:
        binaries = self.database.server.binaries
        command = [str(binaries / "psql"), "--no-psqlrc", "-qAt", "--set=ON_ERROR_STOP=1", self.database.dsn]
        if language == "sh":
            # Only the server's own account may start it, never root.
            command = [*(AS_NOBODY if "pg_ctl" in code else []), "bash", "-e"]
            code = code.replace("9930", str(self.port)).replace("grant monitor", f"grant {self.role}")
        code = code.replace("alter role monitor", f"alter role {self.role}")
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{binaries}:/usr/bin:/bin:/usr/sbin:/sbin",
            "DATABASE_URL": self.url,
            "OWNER_URL": self.database.dsn,
            "PGDATA": str(self.database.server.data),
            "HOME": str(self.folder),
            "COLUMNS": "200",
            "PYTHONPATH": str(self.folder),
        }
        return subprocess.run(
            command,
            input=code,
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


@pytest.fixture
def operator(database, db, tmp_path):
    operator = Operator(database, tmp_path)
    db.execute(f"create role {operator.role} login")
    internals.grant(db, operator.role)
    yield operator
    operator.goes_home()
    listening = subprocess.run(
        ["pgrep", "--full", "--", f"--listen 127.0.0.1:{operator.port}"], capture_output=True, text=True, check=False
    )
    for pid in listening.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    db.execute(f"drop owned by {operator.role}")
    db.execute(f"drop role {operator.role}")


@pytest.fixture
def own_operator(own_server):
    """On a server that he may stop and start; it has pg_cron, with no job."""
    with psycopg.connect(own_server.dsn("postgres"), autocommit=True) as connection:
        connection.execute("create database academy")
    database = Database(own_server, "academy")
    install.migrate(database.dsn)
    yield Operator(database, own_server.directory)
    database.close()


def refuse_level_5(db) -> Callable[[], object]:
    """Licenses of level 5 cannot be written any more; returns what removes the cause."""
    db.execute(f"alter table {LICENSE} add constraint no_five check (current_level <> 5) not valid")
    return lambda: db.execute(f"alter table {LICENSE} drop constraint no_five")


def differ(db) -> None:
    add_pair(db, 1, level=2)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)


def exporter_down(operator, db):
    pass  # it does not run


def database_unreachable(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    internals.revoke(db, operator.role)
    operator.reads = "permission denied"


def role_may_not_log_in(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    db.execute(f"alter role {operator.role} nologin")
    operator.reads = "is not permitted to log in"


def role_has_no_connection_left(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    db.execute(f"alter role {operator.role} connection limit 0")
    operator.reads = "too many connections for role"


def not_installed(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    db.execute("drop schema level_sync cascade")
    operator.reads = "does not exist"


def locked(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    blocker = operator.database.connect(autocommit=False)
    blocker.execute("lock table level_sync.sync_log in access exclusive mode")
    operator.reads = "lock timeout"


def application_locked(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    blocker = operator.database.connect(autocommit=False)
    blocker.execute(f"lock table {LICENSE} in access exclusive mode")
    operator.reads = "lock timeout"


def everybody_waits_behind_one_who_waits(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    reader = operator.database.connect(autocommit=False)
    reader.execute("select from level_sync.sync_log")
    waiting = operator.database.connect(autocommit=False)

    def wait() -> None:
        with suppress(psycopg.errors.AdminShutdown):
            waiting.execute("lock table level_sync.sync_log in access exclusive mode")

    thread = threading.Thread(target=wait)
    thread.start()
    operator.goes_home = thread.join
    wait_until(lambda: db.execute("select from pg_locks where not granted").fetchall())
    operator.reads = "lock timeout"


def run_failed(operator, db):
    differ(db)
    remove_cause = refuse_level_5(db)
    db.execute("call level_sync.reconcile()")
    return remove_cause


def needs_approval(operator, db):
    configure(db, repair_limit=0)
    differ(db)
    db.execute("call level_sync.reconcile()")


def no_success(operator, db):
    db.execute("call level_sync.reconcile()")
    db.execute(
        "update level_sync.sync_log"
        " set job_start = job_start - interval '2 days', job_end = job_end - interval '2 days'"
    )


def desync_stays(operator, db):
    configure(db, conflict_policy="report_only")
    differ(db)
    db.execute("call level_sync.reconcile()")


def queue_dead(operator, db):
    configure(db, max_attempts=1)
    add_pair(db, 1, level=2)
    remove_cause = refuse_level_5(db)
    set_level(db, PROGRESS, 1, 5)
    drain(db)
    return remove_cause


def queue_stuck(operator, db):
    remove_cause = refuse_level_5(db)
    add_pair(db, 1, level=2)
    set_level(db, PROGRESS, 1, 5)
    remove_cause()
    db.execute("update level_sync.sync_queue set next_attempt_at = now() - interval '1 hour'")


def triggers_or_functions_changed(operator, db):
    add_pair(db, 1, level=2)
    internals.disable_trigger(db, PROGRESS)
    set_level(db, PROGRESS, 1, 5)
    internals.change_a_function(db)


def package_alone_upgraded(operator, db):
    """What is loaded is as it was loaded, but not what this package ships."""
    operator.reads = "differ from this package"
    internals.change_a_function(db)
    internals.record_as_loaded(db)


def uses_cron(operator) -> str:
    """Leaves no job behind. Gives the dsn of the database of pg_cron."""
    operator.goes_home = lambda: schedule.unschedule(operator.database.dsn)
    return operator.database.server.dsn(CRON_HOME)


def set_for_the_server(operator, assignment: str) -> None:
    """alter system, and a restart."""
    server = operator.database.server
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f"alter system {assignment}")
    server.halt()
    server.start()


def server_stopped(operator):
    operator.database.server.halt()
    operator.reads = "No such file"


def cron_not_preloaded(operator):
    uses_cron(operator)
    set_for_the_server(operator, "set shared_preload_libraries = auto_explain")


def cron_without_extension(operator):
    """pg_cron is preloaded for this very database."""
    uses_cron(operator)
    set_for_the_server(operator, f"set cron.database_name = '{operator.database.name}'")
    operator.reads = "its extension is not in this database"


def launcher_away(operator):
    """The server has no place for it. Nothing runs the jobs, so none is cut off by the restart."""
    uses_cron(operator)
    set_for_the_server(operator, "set max_worker_processes = 0")
    schedule.schedule(operator.database.dsn)

    def remove_cause() -> None:
        with operator.database.connect() as connection:
            connection.execute("alter system reset max_worker_processes")

    return remove_cause


def never_scheduled(operator, db):
    uses_cron(operator)
    db.execute(
        "insert into level_sync.sync_log (status, dry_run, started_by, job_start, backend_pid)"
        " values ('running', false, 'cron', now() - interval '1 hour', 1)"
    )


def one_job_missing(operator, db):
    cron_home = uses_cron(operator)
    schedule.schedule(operator.database.dsn)
    with psycopg.connect(cron_home, autocommit=True) as cron:
        cron.execute(
            "delete from cron.job where database = %s and jobname like 'level_sync_maintain%%'",
            [operator.database.name],
        )


def job_failing(operator, db):
    """Its next run is not waited for: it is written where pg_cron would write it."""
    cron_home = uses_cron(operator)
    schedule.schedule(operator.database.dsn)

    def runs(status: str) -> None:
        with psycopg.connect(cron_home, autocommit=True) as cron:
            cron.execute(
                "insert into cron.job_run_details (jobid, runid, database, username, command, status, return_message,"
                " start_time, end_time) select jobid, nextval('cron.runid_seq'), database, username, command, %s,"
                " 'the message', now(), now() from cron.job"
                " where database = %s and jobname like 'level_sync_reconcile%%'",
                [status, operator.database.name],
            )

    runs("failed")
    return lambda: runs("succeeded")


def another_scheduler(operator, db):
    uses_cron(operator)  # so that the check is about the jobs, which are not there
    db.execute("call level_sync.reconcile()")


def cron_cannot_connect(operator):
    """Its job is waited for, a minute at most: pg_cron itself says that it failed, and later that it did not."""
    cron_home = uses_cron(operator)
    set_for_the_server(operator, "set cron.use_background_workers = off")
    set_for_the_server(operator, "set cron.host = 'nowhere.invalid'")
    schedule.schedule(operator.database.dsn)
    with psycopg.connect(cron_home, autocommit=True) as cron:
        wait_until(lambda: cron.execute("select from cron.job_run_details where status = 'failed'").fetchall())


def user_missing(operator, db):
    add_pair(db, 1, level=2)
    db.execute("update users set name = 'somebody'")
    db.execute("alter table users alter column name set not null")
    with bypass(db):
        db.execute("delete from users")


def specialization_missing(operator, db):
    add_pair(db, 1, level=2)
    with bypass(db):
        db.execute("delete from specializations where id = 'PLAYER'")


def foreign_key_missing(operator, db):
    db.execute("alter table user_licenses drop constraint fk_user_licenses_user")


def foreign_key_that_cascades(operator, db):
    foreign_key_not_validated(operator, db, "cascade")


def foreign_key_not_validated(operator, db, rule: str = "restrict"):
    add_pair(db, 1, level=2)
    db.execute(
        "alter table user_licenses drop constraint fk_user_licenses_user, add constraint fk_user_licenses_user"
        f" foreign key (user_id) references users (id) on delete {rule} not valid"
    )


def rows_hidden(operator, db):
    # A superuser is never bound: the owner of the tables and of level_sync is an ordinary role here.
    owner = f"owner_of_{operator.database.name}"
    db.execute(f"create role {owner}")
    db.execute(f"grant usage, create on schema level_sync, public to {owner}")
    db.execute(f"alter schema level_sync owner to {owner}")
    for table in (PROGRESS, LICENSE):
        db.execute(f"alter table {table} owner to {owner}")
        db.execute(f"alter table {table} enable row level security")
        db.execute(f"alter table {table} force row level security")
    internals.make_owner_of_the_look_for_hidden_rows(db, owner)

    def goes_home() -> None:
        db.execute(f"reassign owned by {owner} to postgres")
        db.execute(f"drop owned by {owner}")
        db.execute(f"drop role {owner}")

    operator.goes_home = goes_home


def scan_not_allowed(operator, db):
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    internals.forbid_scan(db, operator.role)
    operator.reads = "permission denied"


def scan_too_slow(operator, db):
    """Statistics that are far off: the server compiles for rows it does not have, which takes 500 ms. A scan takes 40
    ms in all otherwise; on a busy machine one out of some must get through."""
    operator.url = operator.database.server.dsn(operator.database.name, operator.role)
    (operator.folder / "sitecustomize.py").write_text(
        "from level_sync.monitor import scan\n\nscan.SCAN_TIMEOUT = 0.15\n"
    )
    add_pair(db, 1)
    db.execute(
        "update pg_class set reltuples = 1e9, relpages = 1 where oid in (%s::regclass, %s::regclass)",
        [PROGRESS, LICENSE],
    )
    operator.reads = "statement timeout"


def test_every_alert_has_a_section_and_every_section_an_alert():
    rules = (DOCKER / "prometheus" / "level_sync.rules.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert list(SECTIONS) == alerts
    assert re.findall(r"runbook: docker/RUNBOOK.md#(\w+)", rules) == [alert.lower() for alert in alerts]
    for section in SECTIONS.values():
        assert tuple(section.steps) == STEPS
        assert [len(section.steps[step]) for step in ("Look", "See that it worked")] == [1, 1]


@pytest.mark.servers(OLDEST, NEWEST)
def test_every_check_of_verify_is_in_a_section(database):
    named = {check for section in SECTIONS.values() for check in section.checks}
    checks = json.loads(run("verify", "--json", "--dsn", database.dsn).stdout)["checks"]
    assert {check["name"].split(":")[0] for check in checks} <= named


# What is broken, and which of the things to do it then takes.
BREAKS = {
    "LevelSyncExporterDown": [(exporter_down, [0])],
    "LevelSyncDatabaseUnreachable": [
        (database_unreachable, [1]),
        (not_installed, [2]),
        (locked, [3]),
        (application_locked, [3]),
        (everybody_waits_behind_one_who_waits, [3]),
        (role_may_not_log_in, [4]),
        (role_has_no_connection_left, [4]),
    ],
    "LevelSyncRunFailed": [(run_failed, [0])],
    "LevelSyncNeedsApproval": [(needs_approval, [0]), (needs_approval, [1])],
    "LevelSyncNoSuccess": [(no_success, [0])],
    "LevelSyncDesyncStays": [(desync_stays, [0])],
    "LevelSyncQueueDead": [(queue_dead, [0])],
    "LevelSyncQueueStuck": [(queue_stuck, [0])],
    "LevelSyncTriggersOrFunctionsChanged": [
        (triggers_or_functions_changed, [0]),
        (package_alone_upgraded, [0]),
    ],
    "LevelSyncOrphans": [
        (user_missing, [0]),
        (specialization_missing, [1]),
        (user_missing, [2]),
        (specialization_missing, [2]),
        (foreign_key_missing, [3, 4]),
        (foreign_key_that_cascades, [3, 4]),
        (foreign_key_not_validated, [4]),
    ],
    "LevelSyncRowsHidden": [(rows_hidden, [0]), (rows_hidden, [1])],
    "LevelSyncScanStale": [(scan_not_allowed, [1]), (application_locked, [2])],
}
BREAKS_OF_SCHEDULES = {
    "LevelSyncScheduleBroken": [
        (never_scheduled, [0]),
        (one_job_missing, [0]),
        (job_failing, []),
        (another_scheduler, [5]),
    ],
}
BREAKS_OF_STATISTICS = {"LevelSyncScanStale": [(scan_too_slow, [0])]}
# The same where the server itself is stopped or started: and which check says so, with what.
BREAKS_OF_SERVERS = {
    "LevelSyncDatabaseUnreachable": [(server_stopped, [0], "connection", "No such file or directory")],
    "LevelSyncScheduleBroken": [
        (cron_not_preloaded, [2, 4, 0], "schedule", "pg_cron is not preloaded"),
        (launcher_away, [4], "cron_launcher", "the pg_cron launcher is not seen"),
        (cron_cannot_connect, [1, 4], "cron run: level_sync_maintain", "failed at no time: connection failed"),
        (cron_without_extension, [3, 0], "schedule", "its extension is not in this database"),
    ],
}
# What brings the difference back is no repair: it has a test of its own.
TAKES_BACK = ("LevelSyncNeedsApproval", 2)


def test_everything_there_is_to_do_is_done_by_a_test():
    written = {(alert, number) for alert, section in SECTIONS.items() for number in range(len(section.steps["Do"]))}
    done = {
        (alert, number)
        for breaks in (BREAKS, BREAKS_OF_SCHEDULES, BREAKS_OF_STATISTICS, BREAKS_OF_SERVERS)
        for alert, cases in breaks.items()
        for _, numbers, *_ in cases
        for number in numbers
    }
    assert done | {TAKES_BACK} == written


def each_of(breaks) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("alert", "breakage", "numbers"),
        [
            pytest.param(alert, breakage, numbers, id=f"{alert}-{breakage.__name__}-{numbers}")
            for alert, cases in breaks.items()
            for breakage, numbers in cases
        ],
    )


@each_of(BREAKS)
def test_its_steps_mend_what_it_is_about(operator, db, alert, breakage, numbers):
    mend(operator, db, alert, breakage, numbers)


@pytest.mark.needs("pg_cron")
@each_of(BREAKS_OF_SCHEDULES)
def test_its_steps_mend_the_schedule(operator, db, alert, breakage, numbers):
    mend(operator, db, alert, breakage, numbers)


@pytest.mark.needs("llvmjit")
@each_of(BREAKS_OF_STATISTICS)
def test_its_steps_mend_statistics_that_are_far_off(operator, db, alert, breakage, numbers):
    mend(operator, db, alert, breakage, numbers)


def mend(operator, db, alert, breakage, numbers) -> None:
    remove_cause = breakage(operator, db)
    see_it_is_broken(operator, alert)
    if remove_cause is not None:
        remove_cause()
    do(operator, alert, numbers)
    wait_until(lambda: told_as_mended(operator, alert))


@pytest.mark.parametrize(("alert", "number"), [("LevelSyncDatabaseUnreachable", 3), ("LevelSyncScanStale", 2)])
def test_a_lock_in_another_database_of_the_server_is_left_alone(operator, db, another_database, alert, number):
    """Which may be a copy: its tables have the same oids."""
    other = another_database.connect(autocommit=False)
    other.execute("lock table level_sync.sync_log, user_licenses in access exclusive mode")
    same = "select 'level_sync.sync_log'::regclass::oid, 'user_licenses'::regclass::oid"
    assert other.execute(same).fetchone() == db.execute(same).fetchone()
    do(operator, alert, [number])
    assert other.execute("select 1").fetchone() == (1,)


def test_a_run_that_was_wrong_is_taken_back(operator, db):
    needs_approval(operator, db)
    do(operator, "LevelSyncNeedsApproval", [0])
    assert levels(db, 1) == (5, 5)
    do(operator, "LevelSyncNeedsApproval", [2])
    assert levels(db, 1) == (5, 2)


def see_it_is_broken(operator, alert: str) -> None:
    """The look shows it, and what proves the repair does not hold yet."""
    seen = operator.does(*SECTIONS[alert].steps["Look"][0])
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.strip() != ""
    assert operator.reads in seen.stdout
    assert not told_as_mended(operator, alert)


def do(operator, alert: str, numbers: list[int]) -> None:
    for number in numbers:
        done = operator.does(*SECTIONS[alert].steps["Do"][number])
        assert done.returncode == 0, done.stdout + done.stderr


def told_as_mended(operator, alert: str) -> bool:
    worked = operator.does(*SECTIONS[alert].steps["See that it worked"][0])
    return worked.returncode == 0 and not (SECTIONS[alert].wants_no_row and worked.stdout)


def red_checks(operator) -> dict[str, str]:
    """What verify says of the checks that are not good."""
    checks = json.loads(run("verify", "--json", "--dsn", operator.database.dsn).stdout)["checks"]
    return {check["name"]: check["detail"] for check in checks if check["ok"] is not True}


@pytest.mark.needs("pg_cron")
@pytest.mark.parametrize(
    ("alert", "breakage", "numbers", "check", "detail"),
    [
        pytest.param(
            *(alert, *case),
            id=f"{alert}-{case[0].__name__}",
            marks=[pytest.mark.long] if case[0] is cron_cannot_connect else [],
        )
        for alert, cases in BREAKS_OF_SERVERS.items()
        for case in cases
    ],
)
def test_its_steps_start_the_server_as_it_should_be(own_operator, alert, breakage, numbers, check, detail):
    remove_cause = breakage(own_operator)
    assert detail in red_checks(own_operator)[check]
    see_it_is_broken(own_operator, alert)
    if remove_cause is not None:
        remove_cause()
        assert not told_as_mended(own_operator, alert)  # the restart is needed
    do(own_operator, alert, numbers)
    if alert == "LevelSyncScheduleBroken":
        with psycopg.connect(own_operator.database.server.dsn(CRON_HOME)) as cron:
            wait_for_launcher(cron)  # it comes up a moment after the server
    wait_until(lambda: told_as_mended(own_operator, alert))
    assert check not in red_checks(own_operator)


def test_a_red_check_is_told_with_the_section_that_names_it():
    for alert, section in SECTIONS.items():
        for check in section.checks:
            name = check.partition(":")[0].strip()
            assert name in SECTION_OF, name
            if alert != "LevelSyncNeedsApproval":
                assert SECTION_OF[name] == alert
    assert section_of("last_run", "run 7: needs_approval") == "LevelSyncNeedsApproval"
