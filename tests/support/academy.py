"""What tests ask the academy's tables again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

Connection = psycopg.Connection[Any]

PROGRESS = "specialization_progress"
LICENSE = "user_licenses"
KEY = {PROGRESS: ("student_id", "specialization_id"), LICENSE: ("user_id", "specialization_type")}
OTHER = {PROGRESS: LICENSE, LICENSE: PROGRESS}
SIDE = {PROGRESS: "progress", LICENSE: "license"}
ACROSS = {PROGRESS: "progress_to_license", LICENSE: "license_to_progress"}
PATIENCE = 180  # seconds until something is taken to hang; much more than anything takes, because machines are busy

BOTH = pytest.mark.parametrize("table", [PROGRESS, LICENSE])
# Carried row by row, or as one set at commit.
BULK = pytest.mark.parametrize("inline_limit", [32, 0], ids=["inline", "bulk"])


def add_pair(db: Connection, user: int, specialization: str = "PLAYER", level: int = 3) -> None:
    """A user with both rows at one level; the license comes from the trigger."""
    db.execute("insert into users (id) values (%s) on conflict do nothing", [user])
    insert(db, PROGRESS, user, level, specialization)


def add_pairs(db: Connection, count: int, level: int = 3, specialization: str = "PLAYER") -> None:
    """The users 1 to count, each with both rows at one level."""
    db.execute("insert into users (id) select n from generate_series(1, %s) as n on conflict do nothing", [count])
    db.execute(
        "insert into specialization_progress (student_id, specialization_id, current_level)"
        " select n, %s, %s from generate_series(1, %s) as n",
        [specialization, level, count],
    )


def insert(db: Connection, table: str, user: int, level: int | None, specialization: str = "PLAYER") -> None:
    user_column, specialization_column = KEY[table]
    db.execute(
        f"insert into {table} ({user_column}, {specialization_column}, current_level) values (%s, %s, %s)",
        [user, specialization, level],
    )


def set_level(db: Connection, table: str, user: int, level: int | None, specialization: str = "PLAYER") -> None:
    user_column, specialization_column = KEY[table]
    db.execute(
        f"update {table} set current_level = %s where {user_column} = %s and {specialization_column} = %s",
        [level, user, specialization],
    )


def delete(db: Connection, table: str, user: int, specialization: str = "PLAYER") -> None:
    user_column, specialization_column = KEY[table]
    db.execute(f"delete from {table} where {user_column} = %s and {specialization_column} = %s", [user, specialization])


def level(db: Connection, table: str, user: int, specialization: str = "PLAYER") -> int | None:
    """The level on one side; None where the row is missing (or its level is NULL)."""
    user_column, specialization_column = KEY[table]
    row = db.execute(
        f"select current_level from {table} where {user_column} = %s and {specialization_column} = %s",
        [user, specialization],
    ).fetchone()
    return None if row is None else row[0]


def levels(db: Connection, user: int, specialization: str = "PLAYER") -> tuple[int | None, int | None]:
    """(progress level, license level) of a pair."""
    return level(db, PROGRESS, user, specialization), level(db, LICENSE, user, specialization)


def queued(db: Connection) -> list[tuple[Any, ...]]:
    """(user_id, specialization, side, change, sqlstate) of every queued pair, oldest first."""
    return db.execute(
        "select user_id, specialization, side, change, sqlstate from level_sync.sync_queue order by queue_id"
    ).fetchall()


def events(db: Connection, user: int) -> list[tuple[Any, ...]]:
    """(direction, action, old_level, new_level, source) of a user's events, oldest first."""
    return db.execute(
        "select direction, action, old_level, new_level, source from level_sync.sync_events"
        " where user_id = %s order by event_id",
        [user],
    ).fetchall()


def drain(db: Connection) -> None:
    """Drains everything that is queued, due or not."""
    db.execute("update level_sync.sync_queue set next_attempt_at = '-infinity' where dead_at is null")
    db.execute("call level_sync.drain_queue()")


@contextmanager
def bypass(db: Connection) -> Iterator[None]:
    """Writes that triggers do not see."""
    db.execute("set session_replication_role = replica")
    yield
    db.execute("reset session_replication_role")


def write_unseen(db: Connection, statement: str, *arguments: Any) -> None:
    """One write that triggers do not see."""
    with bypass(db):
        db.execute(statement, arguments)


def call(db: Connection, query: str, *arguments: Any) -> Any:
    """What a function answers."""
    (answer,) = db.execute(query, arguments).fetchone() or (None,)
    return answer


def sync_by_hand(db: Connection, table: str, user: int | None, specialization: str | None = "PLAYER") -> Any:
    """Calls the function that carries the level written in this table to the other one."""
    return call(db, f"select level_sync.sync_{ACROSS[table]}(%s, %s)", user, specialization)


def reconcile(db: Connection, **arguments: Any) -> dict[str, Any]:
    """Runs it with named arguments and returns its row of sync_log."""
    given = ", ".join(f"{name} => %s" for name in arguments)
    db.execute(f"call level_sync.reconcile({given})", list(arguments.values()))
    return last_run(db)


def last_run(db: Connection) -> dict[str, Any]:
    """The newest row of sync_log, by column."""
    with db.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute("select * from level_sync.sync_log order by run_id desc limit 1").fetchone()
    assert row is not None
    return row


def configure(db: Connection, **settings: Any) -> None:
    """configure(db, on_delete='propagate') changes settings."""
    for name, value in settings.items():
        db.execute(f"update level_sync.settings set {name} = %s", [value])


def user_trigger(
    db: Connection, event: str, body: str, *, condition: str = "", name: str = "of_the_application", argument: str = ""
) -> None:
    """A trigger as an application's own: user_trigger(db, 'before update on t', 'new.x := 1')."""
    db.execute(f"""
        create function public.{name}() returns trigger language plpgsql as $$
        begin
          {body};
          return new;
        end $$;
        create trigger {name} {event} for each row {condition} execute function public.{name}({argument});
    """)


def break_target(
    db: Connection, table: str, body: str = "raise exception 'closed for stocktaking'", when: str = "update"
) -> None:
    """What is carried from the table fails on the other side."""
    user_trigger(db, f"before {when} on {OTHER[table]}", body)


def drop_user_trigger(db: Connection, name: str = "of_the_application") -> None:
    db.execute(f"drop function public.{name}() cascade")


def health(db: Connection) -> dict[str, tuple[bool | None, str, str]]:
    """(ok, detail, hint) of each check, by its name."""
    return {row[0]: row[1:] for row in db.execute("select name, ok, detail, hint from level_sync.health").fetchall()}


def everything(db: Connection) -> list[Any]:
    """Every row that a write or a run may touch."""
    tables = ("users", PROGRESS, LICENSE, "level_sync.sync_events", "level_sync.sync_queue")
    return [db.execute(f"select * from {table} order by 1, 2").fetchall() for table in tables]


def wait_until(
    condition: Callable[[], object],
    what: Callable[[], object] = lambda: "waited in vain",
    *,
    seconds: float = PATIENCE,
    pause: float = 0.01,
) -> None:
    """Looks again and again until the condition holds; fails with what `what` then says."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(pause)
