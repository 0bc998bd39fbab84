"""The command line tells what psql would show, readably, and fails with a plain sentence and a documented exit code."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import psycopg
import pytest
import typer

from academy import LICENSE, PROGRESS, add_pair, set_level
from command_line import Done, run
from databases import copy_of
from level_sync import cli
from tree import LEVEL_SYNC, MIGRATIONS

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
TAKES_DSN = ["migrate", "rollback", "status", "events", "queue"]
READS = ["status", "events", "queue"]
SECRET = "s3cret"  # noqa: S105
NO_SERVER = "host=127.0.0.1 port=1 connect_timeout=2"


def said(done: Done) -> str:
    """All that was printed, with line wraps undone."""
    return " ".join((done.stdout + done.stderr).split())


def rows_of(done: Done) -> Any:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def story(db):
    """Three carried levels and one queued pair."""
    add_pair(db, 1, level=3)
    add_pair(db, 2, "COACH", level=2)
    db.execute("begin; set local level_sync.actor = 'head.coach'; set local level_sync.reason = 'passed the exam'")
    set_level(db, LICENSE, 1, 5)
    db.execute("commit")
    db.execute(
        """insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)
           values (2, 'COACH', 'progress', 'level_changed', 'P0001', 'the license side is broken')"""
    )


# migrate and rollback


def test_migrate_names_what_it_applied_and_nothing_the_second_time(empty_database):
    first = run("migrate", "--dsn", empty_database.dsn)
    assert first.exit_code == 0, first.stderr
    assert f"applied {MIGRATIONS[0]}" in first.stdout
    second = run("migrate", "--dsn", empty_database.dsn)
    assert second.exit_code == 0
    assert said(second).startswith("Up to date")


@pytest.mark.leftovers
def test_rollback_asks_and_does_nothing_on_no(database, db):
    refused = run("rollback", "--dsn", database.dsn, stdin="n\n")
    assert refused.exit_code == 1
    assert "Remove the schema level_sync with its log, events and queue?" in said(refused)
    assert db.execute("select to_regnamespace('level_sync') is not null").fetchone() == (True,)
    accepted = run("rollback", "--dsn", database.dsn, stdin="y\n")
    assert accepted.exit_code == 0
    assert db.execute("select to_regnamespace('level_sync') is null").fetchone() == (True,)


@pytest.mark.leftovers
def test_rollback_with_yes_does_not_ask(database, db):
    done = run("rollback", "--yes", "--dsn", database.dsn)
    assert done.exit_code == 0, done.stderr
    assert "level_sync is gone" in said(done)
    assert db.execute("select to_regnamespace('level_sync') is null").fetchone() == (True,)


# status, events, queue


def test_status_counts_rows_desyncs_and_the_queue(database, db, users):
    users(3)
    add_pair(db, 1)
    add_pair(db, 2)
    done = run("status", "--dsn", database.dsn)
    assert done.exit_code == 0
    assert "no desync: every pair has one level" in said(done)
    now = rows_of(run("status", "--json", "--dsn", database.dsn))
    assert now["database"] == database.name
    assert (now["progress_rows"], now["license_rows"], now["queued"], now["dead"]) == (2, 2, 0, 0)
    assert now["desyncs"] == []
    assert now["settings"]["conflict_policy"] == "progress_wins"


@pytest.mark.leftovers
def test_status_shows_desyncs_by_type(database, db):
    add_pair(db, 1, level=3)
    db.execute("set session_replication_role = replica")
    set_level(db, PROGRESS, 1, 5)
    assert rows_of(run("status", "--json", "--dsn", database.dsn))["desyncs"] == [
        {"issue_type": "level_mismatch", "specialization": "PLAYER", "pairs": 1}
    ]
    assert "level_mismatch" in run("status", "--dsn", database.dsn).stdout


def test_status_json_has_stable_keys(database):
    now = rows_of(run("status", "--json", "--dsn", database.dsn))
    assert set(now) >= {
        *("database", "server_version", "progress_rows", "license_rows", "queued", "dead"),
        *("oldest_queued_seconds", "last_event_at", "desyncs", "settings"),
    }


@pytest.mark.leftovers
def test_events_are_listed_newest_first(database, story):
    found = rows_of(run("events", "--json", "--dsn", database.dsn))
    assert [(row["user_id"], row["action"], row["old_level"], row["new_level"]) for row in found] == [
        (1, "updated", 3, 5),
        (2, "created", None, 2),
        (1, "created", None, 3),
    ]
    assert (found[0]["actor"], found[0]["reason"]) == ("head.coach", "passed the exam")


@pytest.mark.leftovers
def test_events_json_has_stable_keys(database, story):
    found = rows_of(run("events", "--json", "--limit", "1", "--dsn", database.dsn))
    assert set(found[0]) >= {
        *("event_id", "occurred_at", "user_id", "specialization", "direction", "action", "old_level", "new_level"),
        *("source", "run_id", "session_role", "actor", "reason", "transaction_id"),
    }


@pytest.mark.leftovers
@pytest.mark.parametrize(
    ("filters", "users"),
    [
        (["--user", "1"], [1, 1]),
        (["--specialization", "COACH"], [2]),
        (["--user", "1", "--specialization", "COACH"], []),
        (["--user", "1", "--limit", "1"], [1]),
        (["--limit", "2"], [1, 2]),
        (["--specialization", "' or true --"], []),
    ],
)
def test_events_are_filtered(database, story, filters, users):
    found = rows_of(run("events", "--json", *filters, "--dsn", database.dsn))
    assert [row["user_id"] for row in found] == users


@pytest.mark.leftovers
def test_queue_shows_the_pair_and_its_error(database, story):
    found = rows_of(run("queue", "--json", "--dsn", database.dsn))
    assert len(found) == 1
    assert set(found[0]) >= {
        *("queue_id", "queued_at", "user_id", "specialization", "side", "change", "sqlstate", "message"),
        *("attempts", "next_attempt_at", "dead_at"),
    }
    assert (found[0]["user_id"], found[0]["sqlstate"]) == (2, "P0001")
    assert rows_of(run("queue", "--json", "--limit", "1", "--dsn", database.dsn)) == found


@pytest.mark.leftovers
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("events", ["user_id", "PLAYER", "COACH", "created", "updated", "head.coach"]),
        ("queue", ["user_id", "COACH", "progress", "P0001", "level_changed"]),
        ("status", ["progress_rows", "conflict_policy", "progress_wins"]),
    ],
)
def test_a_table_is_readable_on_80_columns(database, story, command, words):
    done = run(command, "--dsn", database.dsn)
    assert done.exit_code == 0
    assert [word for word in words if word not in done.stdout] == []


def test_empty_lists_say_so(database):
    assert "no events" in run("events", "--dsn", database.dsn).stdout
    assert "the queue is empty" in run("queue", "--dsn", database.dsn).stdout
    assert rows_of(run("events", "--json", "--dsn", database.dsn)) == []
    assert rows_of(run("queue", "--json", "--dsn", database.dsn)) == []


HOSTILE = [
    "[red]coach[/red]",
    "[/b]",
    "[link=https://academy.test]x[/link]",
    ":smiley:",
    "'; drop table users; --",
    "ąćę 名",
]


@pytest.mark.leftovers
@pytest.mark.parametrize("actor", HOSTILE)
def test_hostile_text_is_printed_as_it_is(database, db, actor):
    add_pair(db, 1, level=3)
    db.execute("select set_config('level_sync.actor', %s, false)", [actor])
    set_level(db, PROGRESS, 1, 4)
    db.execute(
        """insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)
           values (1, 'PLAYER', 'progress', 'level_changed', 'P0001', %s)""",
        [actor],
    )
    for command in ("events", "queue"):
        done = run(command, "--dsn", database.dsn, columns=400)
        assert done.exit_code == 0, done.stderr[-300:]
        assert actor in done.stdout
    assert rows_of(run("events", "--json", "--dsn", database.dsn))[0]["actor"] == actor


@pytest.mark.leftovers
def test_control_characters_do_not_reach_the_terminal(database, db):
    add_pair(db, 1, level=3)
    db.execute("select set_config('level_sync.actor', %s, false)", ["a\x1b[2Jb\x07c\rd\ne\x9bf"])
    set_level(db, PROGRESS, 1, 4)
    done = run("events", "--dsn", database.dsn, columns=400)
    assert done.exit_code == 0
    assert not set(done.stdout) & set("\x1b\x07\r\x9b")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len({len(line) for line in lines[1:]}) == 1, "the table's right edge is straight"


# Connections


def test_dsn_comes_from_the_option_the_url_or_pg_variables(database, server):
    pieces = {"PGHOST": str(server.directory), "PGDATABASE": database.name, "PGUSER": "postgres"}
    url = f"postgresql://postgres@/{database.name}?host={server.directory}"
    for arguments, env in [
        (["--dsn", database.dsn], {}),
        (["--dsn", url], {}),
        (["--dsn", url.replace("postgresql://", "postgresql+psycopg://")], {}),
        (["--dsn", url.replace("postgresql://", "postgres://")], {}),
        ([], {"DATABASE_URL": url}),
        ([], {"DATABASE_URL": database.dsn}),
        ([], pieces),
        (["--dsn", database.dsn], {"DATABASE_URL": NO_SERVER}),
    ]:
        done = run("status", "--json", *arguments, env=env)
        assert rows_of(done)["database"] == database.name


@pytest.mark.parametrize("form", ["key=value", "url", "sqlalchemy url", "DATABASE_URL", "PG variables"])
def test_migrate_takes_every_form_of_connection(server, empty_database, form):
    url = f"postgresql://postgres@/{empty_database.name}?host={server.directory}"
    arguments, env = {
        "key=value": (["--dsn", empty_database.dsn], {}),
        "url": (["--dsn", url], {}),
        "sqlalchemy url": (["--dsn", url.replace("postgresql://", "postgresql+psycopg://")], {}),
        "DATABASE_URL": ([], {"DATABASE_URL": url}),
        "PG variables": (
            [],
            {"PGHOST": str(server.directory), "PGDATABASE": empty_database.name, "PGUSER": "postgres"},
        ),
    }[form]
    done = run("migrate", *arguments, env=env)
    assert done.exit_code == 0, done.stderr
    assert empty_database.connect().execute("select count(*) from level_sync.settings").fetchone() == (1,)


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def database_not_in_utf8(server, request):
    template = f"in_{request.param.lower()}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        like_it = f"template template0 encoding '{request.param}' lc_collate 'C' lc_ctype 'C'"
        admin.execute(f"create database {template} {like_it}")
        with copy_of(server, template) as database:
            yield database
        admin.execute(f"drop database {template}")


def test_a_database_need_not_be_in_utf8(database_not_in_utf8):
    database = database_not_in_utf8
    assert run("check", "--dsn", database.dsn).exit_code == 0
    assert run("migrate", "--dsn", database.dsn, env={"PGCLIENTENCODING": "SQL_ASCII"}).exit_code == 0
    db = database.connect(client_encoding="UTF8")
    add_pair(db, 1, level=2)
    db.execute("set level_sync.actor = 'Zoë'")
    set_level(db, LICENSE, 1, 5)
    assert rows_of(run("events", "--json", "--dsn", database.dsn))[0]["actor"] == "Zoë"
    assert rows_of(run("status", "--json", "--dsn", database.dsn))["database"] == database.name
    checks = json.loads(run("verify", "--json", "--dsn", database.dsn).stdout)["checks"]
    assert [check["name"] for check in checks if check["ok"] is not True and "schedule" not in check["name"]] == [
        "last_success"
    ]
    assert rows_of(run("reconcile", "--json", "--dsn", database.dsn))["status"] == "success"
    assert "level_sync_up 1" in run("metrics", "--dsn", database.dsn).stdout.replace(".0", "")
    nothing = run("events", "--specialization", "€", "--dsn", database.dsn)
    assert nothing.exit_code in (0, 1)  # LATIN1 has no such character
    assert said(nothing) != ""
    db.execute("do $$ begin perform set_config('level_sync.actor', 'Zo' || chr(235), false); end $$")
    set_level(db, LICENSE, 1, 6)
    in_latin1 = run("events", "--dsn", database.dsn)  # in SQL_ASCII that is a byte of no meaning
    is_refused = in_latin1.exit_code == 1 and "invalid byte sequence" in said(in_latin1)
    assert is_refused or "Zoë" in said(in_latin1)


@pytest.mark.parametrize("command", TAKES_DSN)
def test_no_server_is_exit_code_32_and_says_what_to_set(command):
    done = run(command, "--dsn", NO_SERVER, *(["--yes"] if command == "rollback" else []))
    assert done.exit_code == 32
    assert "No connection" in said(done)
    assert "DATABASE_URL" in said(done)


def test_an_unknown_database_is_exit_code_32(server):
    done = run("status", "--dsn", f"host={server.directory} user=postgres dbname=nowhere")
    assert done.exit_code == 32
    assert 'database "nowhere" does not exist' in said(done)


@pytest.mark.parametrize("command", ["status", "migrate"])
@pytest.mark.parametrize(
    "dsn",
    [
        f"{NO_SERVER} user=lin password={SECRET}",
        f"postgresql://lin:{SECRET}@127.0.0.1:1/academy",
        f"postgresql+psycopg://lin:{SECRET}@127.0.0.1:1/academy",
        f"postgresql://lin:{SECRET}@127.0.0.1:1/academy?no_such_option=1",
        f"mysql://lin:{SECRET}@127.0.0.1:1/academy",
        f"postgresql://lin:pass/{SECRET}@127.0.0.1/academy",
        f"postgresql://lin@home:{SECRET}@127.0.0.1:1/academy",
        f"postgresql://@:{SECRET}@127.0.0.1:1/academy",
        f"{NO_SERVER} password=my {SECRET}",
        f"{NO_SERVER} password='{SECRET}",
    ],
)
def test_a_password_is_never_printed(command, dsn):
    for arguments, env in (["--dsn", dsn], {}), ([], {"DATABASE_URL": dsn}):
        done = run(command, *arguments, env=env)
        assert done.exit_code != 0
        assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("command", READS)
def test_a_database_without_level_sync_gets_a_hint_not_a_traceback(empty_database, command):
    done = run(command, "--dsn", empty_database.dsn)
    assert done.exit_code == 1
    assert "run level-sync migrate" in said(done)
    assert done.stdout == ""


@pytest.mark.parametrize("command", READS)
def test_json_is_not_mixed_with_an_error(empty_database, command):
    done = run(command, "--json", "--dsn", empty_database.dsn)
    assert done.exit_code == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["events", "--limit", "0"], ["queue", "--limit", "-1"], ["events", "--user", "Lin"], ["nonsense"]]
)
def test_wrong_arguments_are_explained(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


@pytest.mark.parametrize("arguments", [["--user", str(2**63)], ["--limit", str(2**63)]])
def test_a_number_too_large_is_an_error_not_a_traceback(database, arguments):
    done = run("events", *arguments, "--dsn", database.dsn)
    assert done.exit_code in (1, 2)
    assert said(done) != ""


def test_a_missing_right_is_an_error_not_a_traceback(database, db):
    role = f"stranger_of_{database.name}"
    db.execute(f"create role {role} login")
    try:
        done = run("status", "--dsn", f"{database.dsn} user={role}")
        assert done.exit_code == 1
        assert "permission denied" in said(done)
    finally:
        db.execute(f"drop role {role}")


# Help


def test_the_installed_program_runs():
    done = subprocess.run([LEVEL_SYNC, "events", "--dsn", NO_SERVER], capture_output=True, text=True, check=False)
    assert done.returncode == 32
    assert "No connection" in done.stderr
    assert done.stdout == ""


def test_help_lists_every_command_with_a_sentence():
    done = run("--help")
    assert done.exit_code == 0
    for name in COMMANDS:
        assert name in done.stdout
    assert all((command.help or "").strip() for command in COMMANDS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command):
    options = [parameter for parameter in COMMANDS[command].params if parameter.param_type_name == "option"]
    assert [option.name for option in options if not option.help] == []
    done = run(command, "--help", columns=120)
    assert done.exit_code == 0
    assert (COMMANDS[command].help or "?").split(".")[0].split("\n")[0] in said(done)


@pytest.mark.parametrize("command", TAKES_DSN)
def test_help_shows_where_the_connection_comes_from(command):
    assert "DATABASE_URL" in run(command, "--help", columns=120).stdout


def test_every_command_that_connects_takes_dsn():
    without = [name for name, command in COMMANDS.items() if "--dsn" not in str([p.opts for p in command.params])]
    assert without == []
