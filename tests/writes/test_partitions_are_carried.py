"""Partitioned tables: written through the parent, or straight to a partition, in either direction."""

from __future__ import annotations

import psycopg
import pytest

from academy import BOTH, KEY, LICENSE, OTHER, PROGRESS, add_pair, configure, delete, level, levels, set_level
from level_sync.setup import install

USERS = 60


@pytest.fixture
def db(empty_database):
    """Both tables hash-partitioned in three, as an application made them, with level_sync installed on top."""
    connection = empty_database.connect()
    for table, (user_column, specialization_column) in KEY.items():
        extra = ", max_achieved_level integer not null default 1" if table == LICENSE else ""
        connection.execute(f"""
            create table {table} (
              {user_column} bigint not null, {specialization_column} text not null,
              current_level integer not null {extra},
              primary key ({user_column}, {specialization_column}))
            partition by hash ({user_column})
        """)
        for number in range(3):
            connection.execute(
                f"create table {table}_{number} partition of {table} for values with (modulus 3, remainder {number})"
            )
    install.migrate(empty_database.dsn)
    connection.execute("insert into users (id) select n from generate_series(1, %s) as n", [USERS])
    yield connection
    assert connection.execute("select * from level_sync.desync_issues").fetchall() == []
    assert connection.execute("select * from level_sync.sync_queue").fetchall() == []


def partition_of(db, table: str, user: int) -> str:
    return db.execute(f"select tableoid::regclass::text from {table} where {KEY[table][0]} = %s", [user]).fetchone()[0]


@BOTH
def test_writes_through_the_parent_and_straight_to_a_partition_are_carried(db, table):
    user_column, specialization_column = KEY[table]
    for inline_limit in (32, 0):
        configure(db, inline_limit=inline_limit)
        user = 1 + inline_limit
        add_pair(db, user, level=3)
        set_level(db, table, user, 5)
        assert levels(db, user) == (5, 5)
        partition = partition_of(db, table, user)
        db.execute(f"update {partition} set current_level = 6 where {user_column} = {user}")
        assert levels(db, user) == (6, 6)
        db.execute("begin")
        delete(db, PROGRESS, user)
        delete(db, LICENSE, user)
        db.execute("commit")
        db.execute(
            f"insert into {partition} ({user_column}, {specialization_column}, current_level)"
            f" values ({user}, 'PLAYER', 4)"
        )
        assert levels(db, user) == (4, 4)
        with pytest.raises(psycopg.errors.RestrictViolation):
            db.execute(f"delete from {partition} where {user_column} = {user}")
        with pytest.raises(psycopg.errors.CheckViolation, match="out of range"):
            db.execute(f"update {partition} set current_level = 9")


@BOTH
def test_copy_into_a_partition_is_carried(db, table):
    user_column, specialization_column = KEY[table]
    db.execute(
        f"insert into {table} ({user_column}, {specialization_column}, current_level) select id, 'PLAYER', 3 from users"
    )
    partition = partition_of(db, table, 1)
    rows = db.execute(f"select {user_column} from {partition}").fetchall()
    with db.cursor() as cursor:
        copied = f"copy {partition} ({user_column}, {specialization_column}, current_level) from stdin"
        with cursor.copy(copied) as copy:
            for (user,) in rows:
                copy.write_row((user, "COACH", 4))
    assert len(rows) > 1
    assert all(levels(db, user, "COACH") == (4, 4) for (user,) in rows)


@BOTH
def test_bulk_update_through_the_parent_is_carried(db, table):
    db.execute(
        f"insert into {table} ({KEY[table][0]}, {KEY[table][1]}, current_level) select id, 'PLAYER', 3 from users"
    )
    db.execute(f"update {table} set current_level = 7")
    assert db.execute(f"select count(*) from {OTHER[table]} where current_level = 7").fetchone() == (USERS,)


@BOTH
def test_truncate_of_one_partition_is_refused(db, table):
    add_pair(db, 1, level=3)
    partition = partition_of(db, table, 1)
    with pytest.raises(psycopg.errors.RestrictViolation, match="cannot be truncated alone"):
        db.execute(f"truncate {partition}")
    assert level(db, table, 1) == 3


def test_reconcile_finds_what_got_past_the_triggers_of_a_partition(db):
    for user in (1, 2, 3):
        add_pair(db, user, level=3)
    db.execute("set session_replication_role = replica")
    db.execute(f"update {partition_of(db, PROGRESS, 1)} set current_level = 6")
    db.execute("reset session_replication_role")
    db.execute("call level_sync.reconcile()")
    assert levels(db, 1) == (6, 6)
