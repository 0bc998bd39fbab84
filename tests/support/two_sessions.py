"""A second session that holds what a first one wants, and how long that one waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg

from academy import KEY, OTHER, PATIENCE, Connection, configure, wait_until

# Seconds. On a busy machine a write may take long, but one that waits for what somebody keeps takes for ever.
AT_ONCE = 10


def session(database: Any, *, autocommit: bool = False) -> psycopg.Connection[Any]:
    """One more session that fails rather than hangs; by default it commits when told."""
    return database.connect(autocommit=autocommit, options=f"-c statement_timeout={PATIENCE}s")


def hold(database: Any, table: str, user: int = 1) -> psycopg.Connection[Any]:
    """A session that has locked a user's row, and keeps it until it is told to end."""
    holder = session(database)
    holder.execute(f"select from {table} where {KEY[table][0]} = %s for update", [user])
    return holder


@contextmanager
def meanwhile(function: Callable[..., Any], *arguments: Any) -> Iterator[Future[Any]]:
    """Runs the function in a thread beside the block; at its end the function must have returned."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function, *arguments)
        yield future
        future.result(timeout=PATIENCE)


def await_state(db: psycopg.Connection[Any], waiting: psycopg.Connection[Any], state: str = "Lock") -> None:
    """Returns as soon as the session waits for a lock (or for another wait event type)."""
    look = "select wait_event_type from pg_stat_activity where pid = %s"
    wait_until(
        lambda: db.execute(look, [waiting.info.backend_pid]).fetchone() == (state,),
        lambda: f"the session never came to wait for {state}",
    )


def let_writes_wait(db: Connection) -> None:
    """Longer than level_sync allows, so that whoever waits for a row is seen to wait."""
    db.execute("alter table level_sync.settings drop constraint lock_wait_is_between_0_and_500_milliseconds")
    configure(db, lock_wait="30 seconds")


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    started = time.monotonic()
    function(*arguments)
    return time.monotonic() - started


def warnings_of(connection: psycopg.Connection[Any]) -> list[str]:
    """A list that fills with the warnings this session gets from now on."""
    warnings: list[str] = []
    connection.add_notice_handler(
        lambda notice: warnings.append(notice.message_primary or "") if notice.severity == "WARNING" else None
    )
    return warnings


def desyncs(db: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    return db.execute("select user_id, issue_type from level_sync.desync_issues order by user_id").fetchall()


def make_other_side_fail(db: psycopg.Connection[Any], table: str) -> None:
    db.execute(f"alter table {OTHER[table]} add constraint no_level_above_6 check (current_level <= 6) not valid")


def deadlocks(db: psycopg.Connection[Any]) -> int:
    row = db.execute("select deadlocks from pg_stat_database where datname = current_database()").fetchone()
    assert row is not None
    return row[0]
