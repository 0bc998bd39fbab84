"""Whatever is given to a function or a command: a clear error or a fair answer, nothing half written, no crash."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from academy import KEY, add_pairs
from command_line import run
from level_sync import cli, dashboard, metrics
from level_sync.watch import Watch

STRANGE = [
    *("", " ", "PLAYER", "COACH", "NULL", "'", '"', "\\", "%s", "$1", "{}", "[]", "{1,2}", "0", "-1", "1e400", "NaN"),
    *("x" * 10_000, "\u202e\U0001f600é", "\x01\x1b[31m\n", "'; drop table users; --", "9" * 30, "progress_to_license"),
]
VALUES = st.one_of(
    st.none(),
    st.sampled_from(STRANGE),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2, 2**31 - 1, 2**31, 2**63 - 1, 2**63]).map(str),
    st.sampled_from(["true", "false", "cron"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
)
# Data, constraint and state errors, and what our functions raise themselves; 42 would be a mistake in the SQL,
# XX a bug of the server.
FAIR = ("22", "23", "P0", "02", "55", "0A")

FUNCTIONS = """
select procs.oid::regprocedure::text, procs.prokind, procs.proname,
       array(select typname::text from unnest(procs.proargtypes) with ordinality as given (oid, position)
               join pg_type on pg_type.oid = given.oid order by position)
  from pg_proc as procs
 where pronamespace = 'level_sync'::regnamespace and proname !~ '^_' and prorettype <> 'trigger'::regtype
 order by 1
"""

FINGERPRINT = """
select md5(string_agg(row_text, '|' order by row_text))
  from (select 'p' || p::text as row_text from specialization_progress as p
         union all select 'l' || l::text from user_licenses as l
         union all select 'e' || e::text from level_sync.sync_events as e
         union all select 'q' || q::text from level_sync.sync_queue as q
         union all select 's' || s::text from level_sync.settings as s
         union all select 'r' || r::text from level_sync.sync_log as r
         union all select 't' || relname from pg_class where relkind = 'r') as everything
"""


def fair_settings(request: pytest.FixtureRequest, examples: int) -> settings:
    is_long = request.config.getoption("proof")
    return settings(
        max_examples=examples * (40 if is_long else 1),
        derandomize=not is_long,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.leftovers
def test_any_argument_of_any_function_is_answered_fairly_and_an_error_writes_nothing(database, db, request):
    add_pairs(db, 2)
    functions = db.execute(FUNCTIONS).fetchall()
    assert {"reconcile", "undo", "update_progress", "advance_license", "sync_user"} <= {
        name for _, _, name, _ in functions
    }
    backend = db.info.backend_pid

    @fair_settings(request, 400)
    @given(st.sampled_from([function for function in functions if function[3]]), st.data())
    def attempt(function: tuple[str, str, str, list[str]], data: st.DataObject) -> None:
        _, kind, name, types = function
        arguments = [data.draw(VALUES) for _ in types]
        before = db.execute(FINGERPRINT).fetchone()
        places = ", ".join(f"%s::{type_name}" for type_name in types)
        call = f"call level_sync.{name}({places})" if kind == "p" else f"select * from level_sync.{name}({places})"
        try:
            with db.transaction():
                db.execute(call, arguments)
        except psycopg.Error as error:
            if not (error.sqlstate or "").startswith(FAIR):
                raise
            after = db.execute(FINGERPRINT).fetchone()
            assert after == before, f"{name}{arguments} failed and wrote"
        assert db.info.backend_pid == backend

    attempt()
    assert db.execute("select count(*) from level_sync.desync_issues").fetchone() == (0,)


@pytest.mark.leftovers
def test_any_value_written_to_the_tables_is_carried_or_refused(database, db, request):
    add_pairs(db, 2)

    @fair_settings(request, 150)
    @given(st.sampled_from(sorted(KEY)), st.sampled_from(["current_level", "key", "actor"]), VALUES)
    def attempt(table: str, column: str, value: Any) -> None:
        try:
            with db.transaction():
                if column == "actor":
                    db.execute("select set_config('level_sync.actor', %s, true)", [value])
                    db.execute(f"update {table} set current_level = 9 - current_level where {KEY[table][0]} = 2")
                elif column == "key":
                    db.execute(f"update {table} set {KEY[table][1]} = %s where {KEY[table][0]} = 1", [value])
                else:
                    db.execute(f"update {table} set current_level = %s::integer where {KEY[table][0]} = 1", [value])
        except psycopg.Error as error:
            if not (error.sqlstate or "").startswith(FAIR):
                raise
        assert db.execute("select count(*) from level_sync.desync_issues").fetchone() == (0,), (table, column, value)
        assert db.execute("select count(*) from level_sync.sync_queue").fetchone() == (0,), (table, column, value)

    attempt()


def test_any_argument_of_any_command_ends_without_a_traceback(database, db, request, monkeypatch):
    # What would serve for ever, or run a command of the shell, comes as far as that.
    monkeypatch.setattr(metrics, "serve", lambda *_, **__: None)
    monkeypatch.setattr(dashboard, "serve", lambda *_, **__: None)
    monkeypatch.setattr(Watch, "run", lambda *_: None)
    monkeypatch.setattr(Watch, "say", lambda *_: True)
    group = typer.main.get_group(cli.app)
    # These make servers or take the whole system away, which their own tests do.
    commands = sorted(set(group.commands) - {"demo", "rollback", "migrate", "restore"})
    add_pairs(db, 2)

    @fair_settings(request, 60)
    @given(st.sampled_from(commands), st.data())
    def attempt(command: str, data: st.DataObject) -> None:
        words: list[str] = []
        for parameter in group.commands[command].params:
            if parameter.name in ("dsn", "help"):
                continue
            if parameter.param_type_name == "argument":
                words.append(data.draw(VALUES.filter(lambda value: value is not None)))
            elif not getattr(parameter, "is_flag", False) and data.draw(st.booleans()):
                words += [parameter.opts[0], data.draw(VALUES.filter(lambda value: value is not None))]
        done = run(command, *words, "--dsn", database.dsn)  # a traceback is an exception here
        assert 0 <= done.exit_code < 32, (command, words, done)
        if done.exit_code == 2:
            assert done.stderr or done.stdout, (command, words)

    attempt()
    run("unschedule", "--dsn", database.dsn)  # a job would outlive the database
    assert db.execute("select count(*) from level_sync.desync_issues").fetchone() == (0,)
    assert db.execute("select current_level from specialization_progress").fetchall() == [(3,), (3,)]
