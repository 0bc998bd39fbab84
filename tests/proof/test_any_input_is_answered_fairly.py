"""Whatever is given to a function or a command: a clear error or a fair answer, nothing half written, no crash."""

from __future__ import annotations

import re
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from academy import KEY, add_pair, bypass, configure, drain
from command_line import Done, run
from level_sync import cli
from level_sync.demo import demo
from level_sync.monitor import metrics
from level_sync.monitor.dashboard import web
from level_sync.monitor.watch import Watch
from level_sync.setup import install
from servers import CRON_HOME

STRANGE = [
    *("", " ", "PLAYER", "COACH", "NULL", "'", '"', "\\", "%s", "$1", "{}", "[]", "{1,2}", "0", "-1", "1e400", "NaN"),
    *("x" * 10_000, "\u202e\U0001f600é", "\x01\x1b[31m\n", "'; drop table users; --", "9" * 30, "progress_to_license"),
]
TEXTS = st.one_of(
    st.sampled_from(STRANGE),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["true", "false", "cron"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
)
MISFITS = st.sampled_from([[1, 2], [[1, 2], [3, 4]], [True]])  # of a type that no argument has
LISTS = st.sampled_from([["a", "1"], [None], [], ["'; drop table users; --", '"{,}']])
VALUES = st.one_of(
    TEXTS,
    st.none(),
    st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 1.5, float("nan"), True]),
    st.integers(-(2**70), 2**70),
    LISTS,
    MISFITS,
)
# Data, constraint and state errors, what our functions raise themselves, and 42883 for an argument of a type that no
# function of the name takes; another 42 would be a mistake in the SQL, XX a bug of the server.
FAIR = ("22", "23", "P0", "02", "55", "0A", "42883")

LAST_RUN = "the last run"  # stands for its run_id
USERS = st.integers(1, 4)
SPECIALIZATIONS = st.sampled_from(["PLAYER", "COACH"])
DIRECTIONS = st.sampled_from(["progress_to_license", "license_to_progress"])
NAMES = st.sampled_from(["head.coach", "passed the exam"])
# The next slot of each is too far away to come while a test runs.
CRON_EXPRESSIONS = st.sampled_from(["0 0 1 1 *", "30 12 1 jan,feb mon"])
# What makes sense, by the name of an argument.
NEAR = {
    "user_id": USERS,
    "student_id": USERS,
    "specialization": SPECIALIZATIONS,
    "specialization_id": SPECIALIZATIONS,
    "direction": DIRECTIONS,
    "synced_by": NAMES,
    "advanced_by": NAMES,
    "reason": NAMES,
    "target_level": st.integers(6, 9),
    "xp_gained": st.integers(0, 2_000),
    "sessions_completed": st.integers(0, 9),
    "projects_completed": st.integers(0, 9),
    "dry_run": st.booleans(),
    "approve": st.booleans(),
    "plan": st.sampled_from([None, None, None, LAST_RUN]),
    "run_id": st.just(LAST_RUN),
    "started_by": st.sampled_from(["cron", "manual", "catch_up"]),
    "cron_expression": CRON_EXPRESSIONS,
}

FUNCTIONS = """
select procs.prokind, procs.proname, procs.proargnames[1:procs.pronargs]
  from pg_proc as procs
 where pronamespace = 'level_sync'::regnamespace and proname !~ '^_' and prorettype <> 'trigger'::regtype
 order by procs.oid::regprocedure::text
"""
READERS = {"find_desync_issues"}

# pg_cron as far as it is called, where the test's database has none.
CRON = """
create schema cron;
create table cron.job (
  jobid bigint generated always as identity, jobname text unique, schedule text, command text,
  database text default current_database(), active boolean default true);
create function cron.schedule(text, text, text) returns bigint language sql as $$
  insert into cron.job (jobname, schedule, command) values ($1, $2, $3)
  on conflict (jobname) do update set schedule = excluded.schedule returning jobid $$;
create function cron.unschedule(bigint) returns boolean language sql as $$
  delete from cron.job where jobid = $1 returning true $$;
"""

WHAT_IS_THERE = """
select 'relations', count(*), sum(hashtextextended(concat(relname, relacl), 0))
  from pg_class where relkind in ('r', 'p', 'v', 'i')
 union all
select 'routines', count(*), sum(hashtextextended(concat(oid::regprocedure, proacl, prosrc), 0))
  from pg_proc where pronamespace in ('level_sync'::regnamespace, 'public'::regnamespace)
 union all
select 'schemas', count(*), sum(hashtextextended(concat(nspname, nspacl), 0)) from pg_namespace where nspname !~ '^pg_'
 union all
select 'roles', count(*), sum(hashtextextended(pg_roles::text, 0)) from pg_roles
 union all
select 'memberships', count(*), sum(hashtextextended(pg_auth_members::text, 0)) from pg_auth_members
"""
TABLES = """
select string_agg(format('select %L, count(*), sum(hashtextextended(found::text, 0)) from %s as found', name, name),
                  ' union all ')
  from (select oid::regclass::text from pg_class
         where relkind = 'r' and relnamespace::regnamespace::text in ('public', 'level_sync', 'cron')) as tables (name)
"""


class Everything:
    """What an error must leave as it was: every row, right, role and job."""

    def __init__(self, db: psycopg.Connection[Any], cron_db: psycopg.Connection[Any] | None = None) -> None:
        self.db, self.cron_db = db, cron_db
        self.query: str = WHAT_IS_THERE + " union all " + db.execute(TABLES).fetchone()[0]  # type: ignore[index]

    def look(self) -> dict[str, tuple[Any, ...]]:
        found = {name: tuple(rest) for name, *rest in self.db.execute(self.query)}
        if self.cron_db:
            found["jobs"] = tuple(self.cron_db.execute("select * from cron.job order by jobid").fetchall())
        return found


def fair_settings(request: pytest.FixtureRequest, examples: int) -> settings:
    is_long = request.config.getoption("proof")
    return settings(
        max_examples=examples * (20 if is_long else 1),
        derandomize=not is_long,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome_of(
    connection: psycopg.Connection[Any], statement: str, arguments: list[Any]
) -> tuple[Any, psycopg.Error | None]:
    """The first value of the answer, or the error. Raises one that is not fair."""
    try:
        cursor = connection.execute(statement, arguments)
        row = cursor.fetchone() if cursor.description else None
    except psycopg.Error as error:
        if not (error.sqlstate or "").startswith(FAIR):
            raise
        return None, error
    return (row[0] if row else None), None


def refusal_in(answer: Any) -> str | None:
    """What a function answers instead of an error; of several pairs, only where none of them was carried."""
    if not isinstance(answer, dict) or answer.get("success", True) or answer.get("created") or answer.get("updated"):
        return None
    return " ".join(part["message"] for part in answer.get("pairs", [answer]))


def is_clear(refusal: Any, function: str, names: list[str], values: list[Any]) -> bool:
    """Whether a refusal tells which argument, or repeats a value that was given, or quotes a part of one."""
    if isinstance(refusal, psycopg.errors.UndefinedFunction):
        return f"level_sync.{function}(" in str(refusal)
    message = refusal if isinstance(refusal, str) else f"{refusal.diag.message_primary} {refusal.diag.message_detail}"
    spelled, given_texts = unquoted(message), [as_text(value) for value in values]
    words = [word for word in (*names, *given_texts) if word.strip()]
    quotations = re.findall(r"""(["'])(.*)\1""", message, re.DOTALL)
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", spelled) for word in words) or any(
        unquoted(quotation).lower() in text.lower() and bool(quotation) == bool(text)
        for _, quotation in quotations
        for text in given_texts
    )


def as_text(value: Any) -> str:
    """A value as PostgreSQL's messages spell it."""
    if isinstance(value, list):
        return unquoted(sql.Literal(value).as_string().removeprefix("'").rpartition("'")[0])
    return "NULL" if value is None else str(value)


def unquoted(text: str) -> str:
    return text.replace("''", "'").replace("\\\\", "\\")


def add_academy(db: psycopg.Connection[Any]) -> None:
    """Three users with two pairs each, and a fourth with none."""
    db.execute("insert into users (id) values (4)")
    for user in (1, 2, 3):
        add_pair(db, user)
        add_pair(db, user, "COACH")
    # As long as it is what it was, no run of the scheduled maintenance has anything to do.
    configure(db, schedule="0 0 1 1 *")
    db.execute("call level_sync.reconcile()")


def put_out_of_step(
    db: psycopg.Connection[Any], progress_level: int, license_level: int, dead_users: tuple[int, ...] = (3,)
) -> None:
    """Past the triggers: pairs that differ, one that lacks a side, and dead in the queue those of dead_users."""
    with bypass(db), db.transaction():
        db.execute("update specialization_progress set current_level = %s, total_xp = 1000", [progress_level])
        db.execute("update user_licenses set current_level = %s, max_achieved_level = 8", [progress_level])
        db.execute("update user_licenses set current_level = %s where user_id < 3", [license_level])
        db.execute("delete from user_licenses where user_id = 2 and specialization_type = 'COACH'")
        db.execute("delete from level_sync.sync_queue")
        db.execute(
            "insert into level_sync.sync_queue"
            " (user_id, specialization, side, change, sqlstate, message, attempts, dead_at)"
            " select student_id, specialization_id, 'progress', 'level_changed', 'P0001', 'planted', 9, now()"
            " from specialization_progress where student_id = any (%s)",
            [list(dead_users)],
        )


def last_run_id(db: psycopg.Connection[Any]) -> int:
    return db.execute("select max(run_id) from level_sync.sync_log").fetchone()[0]  # type: ignore[index]


def count_desyncs(db: psycopg.Connection[Any]) -> int:
    return db.execute("select count(*) from level_sync.desync_issues").fetchone()[0]  # type: ignore[index]


def heal(db: psycopg.Connection[Any]) -> None:
    db.execute("select level_sync.requeue()")
    drain(db)
    db.execute("call level_sync.reconcile(approve => true)")


def test_any_argument_of_any_function_is_answered_fairly_and_an_error_writes_nothing(
    database, db, request, record_property
):
    # As text, because only so a procedure commits, and could leave something behind before it fails.
    caller = database.connect(cursor_factory=psycopg.ClientCursor)
    db.execute(CRON)
    add_academy(db)
    everything = Everything(db)
    outcomes: Counter[tuple[str, str]] = Counter()

    def fuzz(
        kind: str,
        name: str,
        argument_names: list[str],
        times: int,
        strange_values: st.SearchStrategy[Any] | None = None,
    ) -> None:
        @fair_settings(request, times)
        @given(st.data())
        def attempt(data: st.DataObject) -> None:
            dead_users = (1, 2, 3) if name == "requeue" else (3,)
            put_out_of_step(db, data.draw(st.integers(1, 4)), data.draw(st.integers(5, 7)), dead_users)
            if "run_id" in argument_names or "plan" in argument_names:
                dry_run = "plan" in argument_names
                db.execute(f"call level_sync.reconcile(dry_run => {dry_run}, direction => 'progress_to_license')")
            some = st.sets(st.sampled_from(argument_names), min_size=1, max_size=2)
            given_values = dict(NEAR)
            if strange_values is not None:
                given_values |= dict.fromkeys(data.draw(some), strange_values)
            arguments = [
                last_run_id(db) if value == LAST_RUN else value
                for value in (data.draw(given_values[each]) for each in argument_names)
            ]
            places = ", ".join(["%s"] * len(arguments))
            statement = f"call level_sync.{name}({places})" if kind == "p" else f"select level_sync.{name}({places})"
            before, desyncs = everything.look(), count_desyncs(db)
            answer, error = outcome_of(caller, statement, arguments)
            after = everything.look()
            refusal = error or refusal_in(answer)
            if refusal is not None:
                assert after == before, f"{name}{arguments} was refused and wrote"
                assert is_clear(refusal, name, argument_names, arguments), (name, arguments, refusal)
                outcomes[name, "refused"] += 1
                return
            outcomes[name, "accepted"] += 1
            outcomes[name, "wrote"] += after != before
            assert name == "undo" or count_desyncs(db) <= desyncs, f"{name}{arguments} put a pair out of step"

        attempt()

    functions = [function for function in db.execute(FUNCTIONS) if function[2]]
    for function in functions:
        fuzz(*function, 6)
        fuzz(*function, 10, VALUES)
        fuzz(*function, 2, MISFITS)
        with bypass(db):
            db.execute("delete from level_sync.sync_events")
    heal(db)

    names = {name for _, name, _ in functions}
    assert {"reconcile", "undo", "update_progress", "advance_license", "sync_user", "schedule"} <= names
    assert names <= {name for (name, outcome) in outcomes if outcome == "accepted"}
    assert names <= {name for (name, outcome) in outcomes if outcome == "refused"}
    assert names - READERS <= {name for (name, outcome), times in outcomes.items() if outcome == "wrote" and times}
    record_property("figure", told(outcomes))


def told(outcomes: Counter[tuple[str, str]]) -> str:
    """How many calls ended how, for each function or command."""
    kinds = sorted({kind for _, kind in outcomes})
    by_name = sorted({name for name, _ in outcomes})
    return ", ".join(kinds) + ": " + ", ".join(f"{each} {[outcomes[each, kind] for kind in kinds]}" for each in by_name)


def test_any_value_written_to_the_tables_is_carried_or_refused(database, db, request):
    add_academy(db)
    everything = Everything(db)
    outcomes: Counter[tuple[str, str]] = Counter()
    near = {"current_level": st.integers(1, 8), "key": st.just("COACH"), "actor": NAMES}

    @fair_settings(request, 120)
    @given(st.sampled_from(sorted(KEY)), st.sampled_from(sorted(near)), st.data())
    def attempt(table: str, column: str, data: st.DataObject) -> None:
        value = data.draw(st.one_of(near[column], TEXTS, st.none()))
        before = everything.look()
        user = 2 if column == "actor" else 1
        if column == "actor":
            db.execute("select set_config('level_sync.actor', %s, false)", [value])
        change = {
            "actor": "current_level = 9 - current_level",
            "key": f"{KEY[table][1]} = %s",
            "current_level": "current_level = %s::integer",
        }[column]
        _, error = outcome_of(
            db, f"update {table} set {change} where {KEY[table][0]} = {user}", [value] if "%s" in change else []
        )
        assert error is None or everything.look() == before, (table, column, value)
        outcomes[column, "refused" if error else "written"] += 1
        assert count_desyncs(db) == 0, (table, column, value)
        assert db.execute("select count(*) from level_sync.sync_queue").fetchone() == (0,), (table, column, value)

    attempt()
    assert {
        ("current_level", "written"),
        ("current_level", "refused"),
        ("key", "refused"),
        ("actor", "written"),
    } <= set(outcomes), outcomes


# What makes sense, by the name of a parameter; for the others as for functions.
NEAR_PARAMETERS = {
    "rights": st.sampled_from(["reader", "operator"]),
    "user": USERS,
    "limit": st.integers(1, 9),
    "plan": st.just(LAST_RUN),
    "run": st.just(LAST_RUN),
    "listen": st.sampled_from(["127.0.0.1:9930", "[::1]:9930"]),
    "scan_interval": st.integers(1, 9),
    "email": st.just("coach@example.org"),
    "smtp": st.just("localhost:25"),
    "sender": st.just("level-sync@example.org"),
    "webhook": st.just("http://127.0.0.1:9/"),
    "command": st.just("true"),
    "interval": st.integers(1, 9),
    "patience": st.integers(0, 9),
    "say": st.just("hello"),
    "server": st.sampled_from(["embedded", "system"]),
}
# Their exit code tells what they found.
INSPECTORS = {"check", "verify"}


def leave_the_world_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would serve for ever, run a shell's command, make a server or take the system away comes as far as that."""
    monkeypatch.setattr(metrics, "serve", lambda *_, **__: None)
    monkeypatch.setattr(web, "serve", lambda *_, **__: None)
    monkeypatch.setattr(Watch, "run", lambda _, stop: stop.set())
    monkeypatch.setattr(Watch, "say", lambda *_: True)
    monkeypatch.setattr(cli, "_stop_on_signals", threading.Event)
    demo_server = SimpleNamespace(stop=lambda: True, start=lambda _: None, psql=Path("psql"), dsn="dbname=demo")
    monkeypatch.setattr(demo, "DemoServer", lambda: demo_server)
    monkeypatch.setattr(demo, "run", lambda *_: None)

    def execute(*_: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execute)


def draw_words(
    data: st.DataObject, command: str, near: dict[str, st.SearchStrategy[Any]], *, is_strange: bool
) -> list[str]:
    """The words after a command: what makes sense, or with one to three that do not."""
    parameters = [each for each in COMMANDS[command].params if each.name not in ("dsn", "help")]
    names = [each.name for each in parameters if not getattr(each, "is_flag", False)]
    strange = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=2)) if is_strange and names else set()
    words: list[str] = []
    for parameter in parameters:
        is_needed = parameter.required or parameter.name in strange
        if not is_needed and not data.draw(st.booleans()):
            continue
        if parameter.param_type_name != "argument":
            words.append(data.draw(st.sampled_from(parameter.opts)))
        if parameter.name in names:
            words.append(str(data.draw(TEXTS if parameter.name in strange else near[parameter.name])))
    if is_strange and (not names or data.draw(st.booleans())):
        words.append(data.draw(TEXTS))
    return words


COMMANDS = typer.main.get_group(cli.app).commands


def test_any_argument_of_any_command_ends_without_a_traceback_and_an_error_writes_nothing(
    database, db, reader, request, monkeypatch, tmp_path, record_property
):
    leave_the_world_alone(monkeypatch)
    monkeypatch.setattr(install, "migrate", lambda *_, **__: ["the first migration"])
    monkeypatch.setattr(install, "rollback", lambda *_: ["the first migration"])
    monkeypatch.chdir(tmp_path)
    token = tmp_path / "token"
    token.write_text("t" * web.MIN_TOKEN_LENGTH, encoding="utf-8")
    near = NEAR | NEAR_PARAMETERS
    near["role"] = st.just(f"reader_of_{database.name}")
    near["textfile"] = st.just(tmp_path / "level_sync.prom")
    near["token_file"] = st.just(token)
    near["state"] = st.just(tmp_path / "red.json")
    add_academy(db)
    has_cron = db.execute("select from pg_settings where name = 'cron.database_name'").fetchone() is not None
    cron_db = psycopg.connect(database.server.dsn(CRON_HOME), autocommit=True) if has_cron else None
    everything = Everything(db, cron_db)
    outcomes: Counter[tuple[str, str]] = Counter()

    def fuzz(command: str, *, is_strange: bool) -> None:
        @fair_settings(request, 3)
        @given(st.data())
        def attempt(data: st.DataObject) -> None:
            if command in ("reconcile", "undo"):
                put_out_of_step(db, data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8)))
                db.execute(f"call level_sync.reconcile(dry_run => {command == 'reconcile'})")
            words = draw_words(data, command, near, is_strange=is_strange)
            words = [str(last_run_id(db)) if word == LAST_RUN else word for word in words]
            before, desyncs, runs = everything.look(), count_desyncs(db), last_run_id(db)
            done = run(command, "--dsn", database.dsn, *words)  # a traceback is an exception here
            assert 0 <= done.exit_code < 32, (command, words, done)
            if command == "schedule" and done.exit_code == 0:
                run("unschedule", "--dsn", database.dsn)  # before a job can run
            if done.exit_code == 0 or (command in INSPECTORS and not done.stderr):
                outcomes[command, "accepted"] += 1
            else:
                outcomes[command, "refused"] += 1
                assert done.stderr or done.stdout, (command, words, done)
            if done.exit_code != 0 and not (command == "reconcile" and last_run_id(db) > runs):
                assert everything.look() == before, (command, words, done)
            assert command == "undo" or count_desyncs(db) <= desyncs, (command, words, done)
            if command in ("reconcile", "undo"):
                heal(db)

        attempt()

    try:
        for command in sorted(COMMANDS):
            fuzz(command, is_strange=False)
            fuzz(command, is_strange=True)
    finally:
        run("unschedule", "--dsn", database.dsn)  # a job would outlive the database
        if cron_db:
            cron_db.close()
    accepted = {command for command, outcome in outcomes if outcome == "accepted"}
    assert accepted == set(COMMANDS) - (set() if has_cron else {"schedule"})
    assert {command for command, outcome in outcomes if outcome == "refused"} == set(COMMANDS)
    record_property("figure", told(outcomes))


UNREACHABLE = [
    "host=/nonexistent",
    "postgresql://127.0.0.1:1/academy",
    "host=127.0.0.1 port=1 dbname='\u202e\U0001f600'",
    "postgresql://user:hunter2@127.0.0.1:1/%27%3B%20drop%20database",
    "",
    " ",
]
NEEDED = {"grant": ["somebody", "--as", "reader"], "revoke": ["somebody"], "undo": ["1"], "rollback": ["--yes"]}
OFFLINE = {"exporter", "dashboard", "watch"}  # they start without a database, and tell when it is away


def run_with_dsn(command: str, dsn: str) -> Done:
    needed = {**NEEDED, "watch": ["--exec", "true"]}.get(command, [])
    return run(command, *needed, "--dsn", dsn, env={"PGHOST": "/nonexistent", "PGCONNECT_TIMEOUT": "5"})


def test_a_host_name_that_is_too_long_is_no_traceback():
    done = run_with_dsn("check", f"postgresql://u@{'x' * 64}/academy")
    assert done.exit_code == 32
    assert "host's name" in done.stderr


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OFFLINE - {"demo"}))
def test_a_dsn_that_leads_nowhere_is_no_connection(command):
    for dsn in UNREACHABLE:
        done = run_with_dsn(command, dsn)
        assert done.exit_code == 32, (dsn, done)
        assert done.stderr or done.stdout, (dsn, done)
        assert "hunter2" not in done.stdout + done.stderr, (dsn, done)


def test_any_dsn_ends_without_a_traceback(request, monkeypatch):
    leave_the_world_alone(monkeypatch)

    @fair_settings(request, 40)
    @given(
        st.sampled_from(sorted(COMMANDS)),
        st.one_of(
            TEXTS,
            TEXTS.map(lambda text: f"dbname={text}"),
            TEXTS.map(lambda text: f"postgresql://{text}:hunter2@127.0.0.1:1/academy"),
            TEXTS.map(lambda text: f"postgresql://user:hunter2@127.0.0.1:1/{text}"),
        ),
    )
    def attempt(command: str, dsn: str) -> None:
        done = run_with_dsn(command, dsn)
        if command not in OFFLINE:
            assert done.exit_code in (1, 32) or (command == "demo" and not dsn), (command, dsn, done)
        if done.exit_code:
            assert done.stderr or done.stdout, (command, dsn, done)
        assert "hunter2" not in done.stdout + done.stderr, (command, dsn, done)

    attempt()
