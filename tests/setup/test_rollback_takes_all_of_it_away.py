"""Rollback takes all of level_sync away, and leaves the tables, their rows and what was written in between."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from academy import LICENSE, PROGRESS, add_pair, insert, levels, set_level
from catalog import application_rows, snapshot
from level_sync.setup import install


def leftovers(db: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """Anything that only level_sync or yoyo can have made."""
    return db.execute(
        """select 'schema', nspname::text from pg_namespace where nspname = 'level_sync'
           union all select 'function', oid::regprocedure::text from pg_proc
            where pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
           union all select 'trigger', tgname from pg_trigger where not tgisinternal
           union all select 'relation', oid::regclass::text from pg_class where relname ~ 'yoyo|sync'
           union all select 'type', oid::regtype::text from pg_type where typname ~ 'yoyo|sync'
            and typnamespace <> 'pg_catalog'::regnamespace"""
    ).fetchall()


@pytest.mark.leftovers
def test_rollback_removes_everything_of_ours(database, db):
    add_pair(db, 1)
    assert leftovers(db) != []
    install.rollback(database.dsn)
    assert leftovers(db) == []


@pytest.mark.leftovers
def test_rollback_leaves_tables_rows_and_foreign_keys_that_migrate_created(database, db):
    add_pair(db, 1, level=4)
    rows = application_rows(db)
    constraints = [
        constraint
        for constraint in snapshot(db)["constraints"]
        if "level_sync." not in constraint[1] and not constraint[4].startswith("TRIGGER")
    ]
    install.rollback(database.dsn)
    assert application_rows(db) == rows
    assert snapshot(db)["constraints"] == constraints


@pytest.mark.leftovers
def test_after_rollback_each_table_is_on_its_own(database, db):
    add_pair(db, 1, level=4)
    install.rollback(database.dsn)
    set_level(db, PROGRESS, 1, 6)
    assert levels(db, 1) == (6, 4)


def test_rollback_gives_adopted_tables_back_as_they_were(empty_database, adopted):
    ours = """create table specialization_levels (specialization_id text, level integer, name text,
              required_xp bigint, required_sessions integer)"""
    adopted.execute(ours)
    before = snapshot(adopted, with_oids=False), application_rows(adopted)
    install.migrate(empty_database.dsn)
    assert snapshot(adopted, with_oids=False) != before[0]
    install.rollback(empty_database.dsn)
    assert (snapshot(adopted, with_oids=False), application_rows(adopted)) == before


def test_rollback_gives_a_replaced_foreign_key_its_comment_back(empty_database, adopted):
    adopted.execute("comment on constraint license_holder on user_licenses is 'agreed with the registry'")
    install.migrate(empty_database.dsn)
    install.rollback(empty_database.dsn)
    found = adopted.execute(
        "select conname, obj_description(oid) from pg_constraint where conname like '%license%' and contype = 'f'"
    )
    assert found.fetchall() == [("license_holder", "agreed with the registry")]


def test_rollback_keeps_a_comment_that_was_rewritten_since(empty_database, adopted):
    install.migrate(empty_database.dsn)
    adopted.execute("comment on table user_licenses is 'our own words'")
    install.rollback(empty_database.dsn)
    assert adopted.execute("select obj_description('user_licenses'::regclass)").fetchone() == ("our own words",)


def test_rollback_keeps_what_was_written_in_between(empty_database, adopted):
    install.migrate(empty_database.dsn)
    set_level(adopted, PROGRESS, 7, 5)
    insert(adopted, LICENSE, 8, 2, "COACH")
    install.rollback(empty_database.dsn)
    assert levels(adopted, 7) == (5, 5)
    assert levels(adopted, 8, "COACH") == (2, 2)


@pytest.mark.leftovers
def test_second_rollback_is_harmless(database, db):
    install.rollback(database.dsn)
    before = snapshot(db)
    assert install.rollback(database.dsn) == []
    assert snapshot(db) == before


def test_rollback_of_an_empty_database_leaves_it_empty(empty_database):
    db = empty_database.connect()
    before = snapshot(db)
    assert install.rollback(empty_database.dsn) == []
    assert snapshot(db) == before


def test_migrate_rollback_migrate_is_migrate(database, db):
    before = snapshot(db, with_oids=False)
    install.rollback(database.dsn)
    assert len(install.migrate(database.dsn)) >= 6
    assert snapshot(db, with_oids=False) == before
    add_pair(db, 1, level=3)
    assert levels(db, 1) == (3, 3)
