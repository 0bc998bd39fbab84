"""Migrate gives the whole of level_sync, beside live traffic and after any accident; rollback takes all of it away."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yoyo

from academy import (
    BOTH,
    KEY,
    LICENSE,
    PROGRESS,
    add_pair,
    add_pairs,
    configure,
    drain,
    insert,
    level,
    levels,
    queued,
    set_level,
    wait_until,
)
from level_sync import install
from level_sync.verify import verify

LEVEL_SYNC = [sys.executable, "-c", "from level_sync.cli import app; app()"]

FOREIGN_KEYS = {
    "fk_specialization_progress_user": (PROGRESS, "users"),
    "fk_specialization_progress_spec": (PROGRESS, "specializations"),
    "fk_user_licenses_user": (LICENSE, "users"),
    "fk_user_licenses_spec": (LICENSE, "specializations"),
}

LEVELS = [
    ("COACH", 1, "Pre Football Assistant Coach", 0, 0),
    ("COACH", 2, "Pre Football Head Coach", 1000, 15),
    ("COACH", 3, "Youth Football Assistant Coach", 2500, 30),
    ("COACH", 4, "Youth Football Head Coach", 5000, 50),
    ("COACH", 5, "Amateur Football Assistant Coach", 10000, 75),
    ("COACH", 6, "Amateur Football Head Coach", 20000, 100),
    ("COACH", 7, "Pro Football Assistant Coach", 40000, 130),
    ("COACH", 8, "Pro Football Head Coach", 80000, 200),
    ("INTERNSHIP", 1, "Startup Explorer", 0, 10),
    ("INTERNSHIP", 2, "Startup Contributor", 5000, 30),
    ("INTERNSHIP", 3, "Startup Leader", 15000, 50),
    ("PLAYER", 1, "Bamboo Disciple", 0, 0),
    ("PLAYER", 2, "Morning Dew", 1000, 5),
    ("PLAYER", 3, "Flexible Reed", 2500, 15),
    ("PLAYER", 4, "Celestial River", 5000, 30),
    ("PLAYER", 5, "Strong Root", 10000, 50),
    ("PLAYER", 6, "Winter Moon", 20000, 75),
    ("PLAYER", 7, "Midnight Guardian", 40000, 100),
    ("PLAYER", 8, "Dragon Wisdom", 80000, 150),
]

# What an ORM leaves behind: serial ids, no natural primary key, its own foreign keys, comments and extra columns.
ORM_TABLES = """
create table users (id serial primary key, email text unique);
create table specializations (id varchar(50) primary key, title text, max_levels integer);
create table specialization_progress (
  id serial primary key,
  student_id integer not null,
  specialization_id varchar(50) not null,
  current_level integer not null default 1,
  total_xp integer not null default 0,
  completed_sessions integer not null default 0,
  completed_projects integer not null default 0,
  last_activity timestamp,
  theory_score numeric(5, 2),
  constraint uq_progress_pair unique (student_id, specialization_id),
  constraint progress_student foreign key (student_id) references users (id) on delete cascade
);
create table user_licenses (
  id serial primary key,
  user_id integer not null,
  specialization_type varchar(50) not null,
  current_level integer not null default 1,
  max_achieved_level integer not null default 1,
  started_at timestamp not null default now(),
  last_advanced_at timestamp,
  motivation jsonb,
  constraint uq_license_pair unique (user_id, specialization_type),
  constraint license_holder foreign key (user_id) references users (id)
);
create index license_level on user_licenses (current_level);
comment on column specialization_progress.current_level is 'the ORM''s own words';
comment on column user_licenses.motivation is 'why they train';
insert into users (email) select n || '@academy.test' from generate_series(1, 200) as n;
insert into specializations (id, title, max_levels) values ('PLAYER', 'Player', 8), ('COACH', 'Coach', 8);
insert into specialization_progress (student_id, specialization_id, current_level, total_xp, theory_score)
  select n, 'PLAYER', 1 + n % 8, n * 10, 4.5 from generate_series(1, 200) as n;
insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level, motivation)
  select n, 'PLAYER', 1 + n % 8, 8, '{}' from generate_series(1, 199) as n;
"""

# Nothing but the pair and its level: each migrate has to add and build the rest.
BARE_TABLES = """
create table specialization_progress (
  student_id bigint not null, specialization_id text not null, current_level integer not null);
create table user_licenses (
  user_id bigint not null, specialization_type text not null, current_level integer not null);
"""

OBJECTS = {
    "functions": """
        select oid, oid::regprocedure::text, pg_get_functiondef(oid), proacl::text, obj_description(oid, 'pg_proc')
          from pg_proc where pronamespace::regnamespace::text in ('public', 'level_sync')""",
    "triggers": """
        select oid, tgrelid::regclass::text, tgname, tgenabled, pg_get_triggerdef(oid),
               obj_description(oid, 'pg_trigger')
          from pg_trigger where not tgisinternal""",
    "constraints": """
        select oid, conrelid::regclass::text, conname, convalidated, pg_get_constraintdef(oid),
               obj_description(oid, 'pg_constraint')
          from pg_constraint where connamespace::regnamespace::text in ('public', 'level_sync')""",
    "relations": """
        select oid, oid::regclass::text, relkind::text, relpersistence::text, relacl::text,
               case relkind when 'v' then pg_get_viewdef(oid) when 'i' then pg_get_indexdef(oid) end,
               obj_description(oid, 'pg_class')
          from pg_class
         where relnamespace::regnamespace::text in ('public', 'level_sync') and relname !~ 'yoyo'""",
    "columns": """
        select attrelid, attrelid::regclass::text, attnum, attname, format_type(atttypid, atttypmod), attnotnull,
               (select pg_get_expr(adbin, adrelid) from pg_attrdef where adrelid = attrelid and adnum = attnum),
               col_description(attrelid, attnum)
          from pg_attribute join pg_class on pg_class.oid = attrelid
         where relnamespace::regnamespace::text in ('public', 'level_sync') and relname !~ 'yoyo' and attnum > 0""",
    "schemas": "select oid, nspname, nspacl::text, obj_description(oid) from pg_namespace where nspname !~ '^pg_'",
}


def snapshot(db: psycopg.Connection[Any], *, with_oids: bool = True) -> dict[str, list[tuple[Any, ...]]]:
    """Everything the catalog says about the application's objects and ours; the first column is the oid."""
    found = {name: db.execute(query).fetchall() for name, query in OBJECTS.items()}
    return {name: sorted((row if with_oids else row[1:] for row in rows), key=repr) for name, rows in found.items()}


def application_rows(db: psycopg.Connection[Any]) -> dict[str, list[tuple[Any, ...]]]:
    tables = ("users", "specializations", PROGRESS, LICENSE)
    return {table: db.execute(f"select * from {table} order by 1, 2").fetchall() for table in tables}


def foreign_keys(db: psycopg.Connection[Any], table: str) -> dict[str, str]:
    """Name and definition of each foreign key of a table."""
    query = """select conname, pg_get_constraintdef(oid) from pg_constraint
                where contype = 'f' and conrelid = %s::regclass"""
    return dict(db.execute(query, [table]).fetchall())


def names(db: psycopg.Connection[Any], query: str) -> set[str]:
    return {row[0] for row in db.execute(query)}


@pytest.fixture
def migrated(empty_database):
    install.migrate(empty_database.dsn)
    return empty_database.connect()


@pytest.fixture
def adopted(empty_database):
    """An ORM's tables with rows in them, before migrate."""
    db = empty_database.connect()
    db.execute(ORM_TABLES)
    return db


def start(database: Any, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LEVEL_SYNC, *command, "--dsn", database.dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


# A new database


def test_migrate_creates_the_five_application_tables(migrated):
    columns = migrated.execute(
        """select table_name, string_agg(column_name || ' ' || data_type, ', ' order by ordinal_position)
             from information_schema.columns where table_schema = 'public' group by table_name"""
    ).fetchall()
    assert dict(columns) == {
        "users": "id bigint, name text",
        "specializations": "id text, max_levels integer",
        "specialization_levels": "specialization_id text, level integer, name text, required_xp bigint,"
        " required_sessions integer",
        PROGRESS: "student_id bigint, specialization_id text, current_level integer, total_xp bigint,"
        " completed_sessions integer, completed_projects integer, last_activity timestamp with time zone",
        LICENSE: "user_id bigint, specialization_type text, current_level integer, max_achieved_level integer,"
        " started_at timestamp with time zone, last_advanced_at timestamp with time zone",
    }


def test_four_named_foreign_keys_restrict_and_are_validated(migrated):
    found = migrated.execute(
        """select conname, conrelid::regclass::text, confrelid::regclass::text from pg_constraint
            where contype = 'f' and confdeltype = 'r' and convalidated"""
    ).fetchall()
    assert {name: (table, refers_to) for name, table, refers_to in found} == FOREIGN_KEYS


@pytest.mark.parametrize("table", [PROGRESS, LICENSE])
def test_each_table_has_exactly_two_foreign_keys(migrated, table):
    assert len(foreign_keys(migrated, table)) == 2


@pytest.mark.parametrize("table", [PROGRESS, LICENSE])
def test_the_primary_key_is_the_pair_and_covers_the_level(migrated, table):
    definitions = migrated.execute(
        "select pg_get_constraintdef(oid) from pg_constraint where contype = 'p' and conrelid = %s::regclass", [table]
    ).fetchall()
    key = {PROGRESS: "student_id, specialization_id", LICENSE: "user_id, specialization_type"}[table]
    assert definitions == [(f"PRIMARY KEY ({key}) INCLUDE (current_level)",)]


def test_checks_are_named_after_what_they_claim(migrated):
    checks = migrated.execute(
        """select conrelid::regclass::text, conname from pg_constraint
            where contype = 'c' and connamespace = 'public'::regnamespace"""
    ).fetchall()
    assert set(checks) == {
        ("specializations", "max_levels_is_at_least_1"),
        ("specialization_levels", "level_is_at_least_1"),
        ("specialization_levels", "required_xp_is_not_negative"),
        ("specialization_levels", "required_sessions_is_not_negative"),
        (PROGRESS, "current_level_is_at_least_1"),
        (PROGRESS, "total_xp_is_not_negative"),
        (PROGRESS, "completed_sessions_is_not_negative"),
        (PROGRESS, "completed_projects_is_not_negative"),
        (LICENSE, "current_level_is_at_least_1"),
        (LICENSE, "max_achieved_level_covers_current_level"),
    }


def test_the_academys_specializations_are_there(migrated):
    found = migrated.execute("select id, max_levels from specializations order by id").fetchall()
    assert found == [("COACH", 8), ("INTERNSHIP", 3), ("PLAYER", 8)]


def test_level_names_and_thresholds_are_the_academys(migrated):
    found = migrated.execute(
        """select specialization_id, level, name, required_xp, required_sessions
             from specialization_levels order by specialization_id, level"""
    ).fetchall()
    assert found == LEVELS


def test_every_promised_object_of_level_sync_is_there(migrated):
    relations = names(migrated, "select relname from pg_class where relnamespace = 'level_sync'::regnamespace")
    assert {"settings", "sync_log", "sync_events", "sync_queue", "desync_issues"} <= relations
    routines = names(
        migrated,
        """select proname || '(' || coalesce(array_to_string(proargnames[1:pronargs], ', '), '') || ')'
             from pg_proc where pronamespace = 'level_sync'::regnamespace""",
    )
    assert {
        "find_desync_issues(specialization)",
        "sync_progress_to_license(user_id, specialization, synced_by)",
        "sync_user(user_id, direction)",
        "update_progress(student_id, specialization_id, xp_gained, sessions_completed, projects_completed)",
        "advance_license(user_id, specialization, target_level, advanced_by, reason)",
    } <= routines
    assert {name.partition("(")[0] for name in routines} >= {"sync_license_to_progress", "drain_queue"}


def test_settings_is_exactly_one_row_with_the_promised_defaults(migrated):
    migrated.execute("set intervalstyle = 'iso_8601'")
    found = migrated.execute(
        """select conflict_policy, on_error, on_delete, inline_limit, repair_limit, schedule, misfire_grace::text
             from level_sync.settings"""
    ).fetchall()
    assert found == [("progress_wins", "queue", "restrict", 32, 10000, "0 */6 * * *", "PT5M")]
    with pytest.raises(psycopg.errors.UniqueViolation):
        migrated.execute("insert into level_sync.settings default values")
    with pytest.raises(psycopg.errors.CheckViolation):
        migrated.execute("insert into level_sync.settings (is_only_row) values (false)")


def test_both_tables_and_all_their_columns_are_documented(migrated):
    undocumented = migrated.execute(
        """select attrelid::regclass::text, attname from pg_attribute
            where attrelid in ('specialization_progress'::regclass, 'user_licenses'::regclass)
              and (attnum > 0 and col_description(attrelid, attnum) is null
                   or obj_description(attrelid, 'pg_class') is null)"""
    ).fetchall()
    assert undocumented == []


def test_every_table_view_and_column_a_user_touches_is_documented(migrated):
    tables = migrated.execute(
        """select oid::regclass::text from pg_class
            where relnamespace = 'level_sync'::regnamespace and relkind in ('r', 'p', 'v') and relname !~ 'yoyo'
              and obj_description(oid, 'pg_class') is null"""
    ).fetchall()
    assert tables == []
    columns = migrated.execute(
        """select attrelid::regclass::text, attname from pg_attribute
             join pg_class on pg_class.oid = attrelid
            where relnamespace = 'level_sync'::regnamespace
              and (relkind = 'v' or relname in ('settings', 'sync_log', 'sync_events', 'sync_queue'))
              and attnum > 0 and col_description(attrelid, attnum) is null
            order by attrelid, attnum"""
    ).fetchall()
    assert columns == []


def test_every_function_and_trigger_is_documented(migrated):
    routines = migrated.execute(
        """select oid::regprocedure::text from pg_proc
            where pronamespace = 'level_sync'::regnamespace and obj_description(oid, 'pg_proc') is null"""
    ).fetchall()
    assert routines == []
    triggers = migrated.execute(
        "select tgname from pg_trigger where not tgisinternal and obj_description(oid, 'pg_trigger') is null"
    ).fetchall()
    assert triggers == []


@pytest.mark.parametrize("command", ["migrate", "rollback"])
def test_stranger_is_told_whose_level_sync_it_is(server, database, db, command):
    role = f"stranger_in_{database.name}"
    db.execute(f"create role {role} login")
    try:
        with pytest.raises(
            install.MigrateError, match=f"belongs to postgres, and {role} may not change it: run this as"
        ):
            getattr(install, command)(f"{database.dsn} user={role}")
    finally:
        db.execute(f"drop role {role}")


def test_migrate_needs_no_superuser(server, empty_database):
    role = f"owner_of_{empty_database.name}"
    admin = empty_database.connect()
    admin.execute(f"create role {role} login; alter database {empty_database.name} owner to {role}")
    try:
        install.migrate(f"{empty_database.dsn} user={role}")
        owner = empty_database.connect(role)
        add_pair(owner, 1, level=3)
        assert levels(owner, 1) == (3, 3)
        install.rollback(f"{empty_database.dsn} user={role}")
        owner.close()
    finally:
        admin.execute(f"reassign owned by {role} to postgres; drop owned by {role}; drop role {role}")


# Once more


def test_second_migrate_changes_nothing(database, db):
    configure(db, on_delete="propagate", inline_limit=7)
    add_pair(db, 1)
    before = snapshot(db), db.execute("select * from level_sync.settings").fetchall(), application_rows(db)
    assert install.migrate(database.dsn) == []
    assert (snapshot(db), db.execute("select * from level_sync.settings").fetchall(), application_rows(db)) == before


def test_second_migrate_does_not_wait_for_an_open_transaction_that_wrote_both_tables(database, db, monkeypatch):
    add_pair(db, 1, level=3)
    monkeypatch.setattr(install, "LOCK_TRIES", 1)
    writer = database.connect(autocommit=False)
    set_level(writer, PROGRESS, 1, 4)
    set_level(writer, LICENSE, 1, 5)
    assert install.migrate(database.dsn) == []
    writer.commit()
    assert levels(db, 1) == (5, 5)


def test_second_migrate_takes_no_lock_on_the_tables_but_for_reading(database, monkeypatch):
    monkeypatch.setattr(install, "LOCK_TRIES", 1)
    holder = database.connect(autocommit=False)
    holder.execute("lock table specialization_progress, user_licenses in exclusive mode")
    assert install.migrate(database.dsn) == []


DAMAGES = {
    "dropped trigger": "drop trigger progress_level_changed on specialization_progress",
    "disabled trigger": "alter table user_licenses disable trigger license_level_changed",
    "every trigger disabled": "alter table specialization_progress disable trigger user",
    "trigger that fires always": "alter table user_licenses enable always trigger license_created",
    "renamed trigger": "alter trigger progress_created on specialization_progress rename to something_else",
    "trigger with another condition": """
        drop trigger license_level_changed on user_licenses;
        create trigger license_level_changed after update on user_licenses
          for each row when (false) execute function level_sync.carry_license()""",
    "trigger that calls something else": """
        create function public.nothing() returns trigger language plpgsql as 'begin return null; end';
        create or replace trigger progress_created after insert on specialization_progress
          for each row execute function public.nothing()""",
    "replaced function body": """
        create or replace function level_sync.carry_progress() returns trigger language plpgsql
          as 'begin return null; end'""",
    "dropped function with its triggers": "drop function level_sync.carry_license() cascade",
    "function without its search_path": "alter function level_sync.carry_progress() reset all",
    "function that runs as its caller": "alter function level_sync.carry_license() security invoker",
    "function anybody may run": """
        grant usage on schema level_sync to public;
        grant execute on function level_sync.update_progress to public""",
    "replaced view": """
        create or replace view level_sync.desync_issues as
          select null::bigint as user_id, null::text as specialization, null::text as issue_type,
                 null::integer as progress_level, null::integer as license_level, null::integer as difference,
                 null::text as recommended_action where false""",
    "dropped view": "drop view level_sync.desync_issues cascade",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_migrate_restores(database, db, damage):
    before = snapshot(db, with_oids=False)
    db.execute(damage)
    assert snapshot(db, with_oids=False) != before
    install.migrate(database.dsn)
    db.execute("drop function if exists public.nothing()")
    assert snapshot(db, with_oids=False) == before
    add_pair(db, 1, level=3)
    set_level(db, PROGRESS, 1, 4)
    assert levels(db, 1) == (4, 4)
    set_level(db, LICENSE, 1, 5)
    assert levels(db, 1) == (5, 5)


# Rollback


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


# Adopting


def test_an_adopted_table_is_never_replaced(empty_database, adopted):
    kept = "select oid, relfilenode from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
    kept += " and relname <> 'specialization_levels' order by oid"
    before = application_rows(adopted), adopted.execute(kept).fetchall()
    install.migrate(empty_database.dsn)
    assert (application_rows(adopted), adopted.execute(kept).fetchall()) == before


def test_adopted_tables_carry_levels_both_ways(empty_database, adopted):
    install.migrate(empty_database.dsn)
    set_level(adopted, PROGRESS, 1, 7)
    assert levels(adopted, 1) == (7, 7)
    set_level(adopted, LICENSE, 1, 3)
    assert levels(adopted, 1) == (3, 3)
    insert(adopted, PROGRESS, 1, 2, "COACH")
    assert level(adopted, LICENSE, 1, "COACH") == 2


def test_desyncs_that_were_there_before_are_found_not_touched(empty_database, adopted):
    install.migrate(empty_database.dsn)
    found = adopted.execute("select user_id, specialization, issue_type from level_sync.desync_issues").fetchall()
    assert found == [(200, "PLAYER", "missing_license")]


def test_an_older_foreign_key_is_replaced_not_doubled(empty_database, adopted):
    install.migrate(empty_database.dsn)
    for table in (PROGRESS, LICENSE):
        found = foreign_keys(adopted, table)
        assert set(found) == {name for name, (on_table, _) in FOREIGN_KEYS.items() if on_table == table}
        assert all("ON DELETE RESTRICT" in definition for definition in found.values())


def test_a_wanted_foreign_key_with_another_delete_rule_is_replaced(empty_database, adopted):
    adopted.execute("alter table user_licenses rename constraint license_holder to fk_user_licenses_user")
    before = foreign_keys(adopted, LICENSE)
    install.migrate(empty_database.dsn)
    assert "ON DELETE RESTRICT" in foreign_keys(adopted, LICENSE)["fk_user_licenses_user"]
    install.rollback(empty_database.dsn)
    assert foreign_keys(adopted, LICENSE) == before


def test_an_older_foreign_key_beside_the_wanted_one_goes(empty_database, adopted):
    adopted.execute(
        """alter table user_licenses add constraint fk_user_licenses_user foreign key (user_id)
           references users (id) on delete restrict"""
    )
    before = foreign_keys(adopted, LICENSE)
    install.migrate(empty_database.dsn)
    assert set(foreign_keys(adopted, LICENSE)) == {"fk_user_licenses_user", "fk_user_licenses_spec"}
    install.rollback(empty_database.dsn)
    assert foreign_keys(adopted, LICENSE) == before


def test_a_replaced_foreign_key_keeps_its_update_rule_and_stays_deferrable(empty_database, adopted):
    adopted.execute(
        """alter table specialization_progress add constraint progress_spec foreign key (specialization_id)
           references specializations (id) on update cascade on delete cascade deferrable initially deferred"""
    )
    install.migrate(empty_database.dsn)
    definition = foreign_keys(adopted, PROGRESS)["fk_specialization_progress_spec"]
    assert definition == (
        "FOREIGN KEY (specialization_id) REFERENCES specializations(id)"
        " ON UPDATE CASCADE ON DELETE RESTRICT DEFERRABLE INITIALLY DEFERRED"
    )


def test_an_orphan_stops_migrate_with_its_name_and_nothing_is_lost(empty_database, adopted):
    adopted.execute("insert into user_licenses (user_id, specialization_type) values (1, 'GHOST')")
    with pytest.raises(psycopg.errors.ForeignKeyViolation, match="GHOST"):
        install.migrate(empty_database.dsn)
    assert level(adopted, LICENSE, 1, "GHOST") == 1
    adopted.execute("insert into specializations (id) values ('GHOST')")
    install.migrate(empty_database.dsn)
    assert set(foreign_keys(adopted, LICENSE)) == {"fk_user_licenses_user", "fk_user_licenses_spec"}


def test_an_adopted_comment_stays(empty_database, adopted):
    install.migrate(empty_database.dsn)
    comment = "select col_description('specialization_progress'::regclass, attnum) from pg_attribute where attname = %s"
    found = adopted.execute(comment + " and attrelid = 'specialization_progress'::regclass", ["current_level"])
    assert found.fetchall() == [("the ORM's own words",)]


# Plain yoyo


def test_plain_yoyo_gives_a_working_system_and_migrate_finds_nothing_to_do(server, empty_database):
    configuration = install.shipped("migrations") / "yoyo.ini"
    before = configuration.read_text()
    done = subprocess.run(
        [Path(sys.executable).with_name("yoyo"), "apply", "--batch", "--config", str(configuration)],
        env={**os.environ, "PGHOST": str(server.directory), "PGDATABASE": empty_database.name, "PGUSER": "postgres"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert configuration.read_text() == before
    db = empty_database.connect()
    add_pair(db, 1, level=3)
    set_level(db, LICENSE, 1, 5)
    assert levels(db, 1) == (5, 5)
    before_migrate = snapshot(db)
    assert install.migrate(empty_database.dsn) == []
    assert snapshot(db) == before_migrate


# Accidents and company


def test_two_migrates_at_the_same_moment_leave_one_whole_system(empty_database, db):
    both = [start(empty_database, "migrate") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 0 or "another migrate or rollback is at work" in output, output
    assert 0 in [process.returncode for process in both]
    assert snapshot(empty_database.connect(), with_oids=False) == snapshot(db, with_oids=False)


def test_a_second_migrate_gives_up_with_a_clear_message_while_the_first_is_at_work(database, monkeypatch):
    holder = database.connect()
    holder.execute("select pg_advisory_lock(hashtext('level_sync migrate'))")
    lock = install.LevelSyncBackend.lock
    monkeypatch.setattr(install.LevelSyncBackend, "lock", lambda backend, timeout=0.1: lock(backend, timeout))
    with pytest.raises(install.MigrateError, match="another migrate or rollback is at work in this database; wait"):
        install.migrate(database.dsn)


def sessions(db: psycopg.Connection[Any]) -> int:
    """Other sessions in this database."""
    query = """select count(*) from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()"""
    return db.execute(query).fetchone()[0]


@pytest.mark.parametrize("command", ["migrate", "rollback"])
def test_killed_at_any_moment_it_can_be_run_again_and_ends_whole(request, empty_database, db, command):
    victim_db = empty_database.connect()
    victim_db.execute(ORM_TABLES)
    untouched = snapshot(victim_db, with_oids=False), application_rows(victim_db)
    install.migrate(empty_database.dsn)
    whole = snapshot(victim_db, with_oids=False)
    started = time.monotonic()
    install.rollback(empty_database.dsn)
    wholly_removed = snapshot(victim_db, with_oids=False)
    if command == "migrate":
        started = time.monotonic()
        install.migrate(empty_database.dsn)
    full_run = time.monotonic() - started
    moments = random.Random(7)  # noqa: S311
    for _ in range(30 if request.config.getoption("proof") else 4):
        (install.rollback if command == "migrate" else install.migrate)(empty_database.dsn)
        process = start(empty_database, command, *(["--yes"] if command == "rollback" else []))
        wait_until(lambda: sessions(victim_db) > 0)
        time.sleep(moments.uniform(0, full_run))  # the moment of the accident, not a wait for anything
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (install.migrate if command == "migrate" else install.rollback)(empty_database.dsn)
        assert snapshot(victim_db, with_oids=False) == (whole if command == "migrate" else wholly_removed)
        assert application_rows(victim_db) == untouched[1]
    install.rollback(empty_database.dsn)
    levels_table = "specialization_levels"  # migrate's own, in this database
    for kind, rows in snapshot(victim_db, with_oids=False).items():
        assert [row for row in rows if levels_table not in str(row)] == untouched[0][kind]


def test_rollback_killed_before_a_step_was_marked_undone_does_it_again(empty_database, adopted):
    untouched = application_rows(adopted)
    install.migrate(empty_database.dsn)
    step = install.shipped("migrations") / "0003_create_level_sync_tables.rollback.sql"
    for later in (
        "0014_forget_repaired_plans",
        "0013_find_runs_by_status",
        "0012_let_others_schedule",
        "0011_leave_room_in_plans",
        "0010_arm_commits_apart",
        "0008_create_reconcile_tables",
        "0005_restrict_orphans",
        "0004_add_missing_columns",
    ):
        adopted.execute((install.shipped("migrations") / f"{later}.rollback.sql").read_bytes())
        adopted.execute("delete from level_sync._yoyo_migration where migration_id = %s", [later])
    adopted.execute(step.read_bytes())
    install.rollback(empty_database.dsn)
    assert adopted.execute("select to_regnamespace('level_sync')").fetchone() == (None,)
    assert application_rows(adopted) == untouched


@pytest.mark.parametrize("undone", range(1, 12))
def test_migrate_goes_on_where_a_rollback_was_killed(empty_database, undone):
    """On tables that lack columns, keys and constraints, after any number of steps of the rollback."""
    with psycopg.connect(empty_database.dsn, autocommit=True) as db:
        db.execute(BARE_TABLES)
    install.migrate(empty_database.dsn)
    with install._locked_backend(empty_database.dsn) as backend:
        install.queries.remove_triggers(backend.connection)
        for migration in backend.to_rollback(yoyo.read_migrations(str(install.shipped("migrations"))))[:undone]:
            backend.rollback_one(migration)
    install.migrate(empty_database.dsn)
    with psycopg.connect(empty_database.dsn, autocommit=True) as db:
        add_pair(db, 1, level=3)
        set_level(db, LICENSE, 1, 5)
        assert levels(db, 1) == (5, 5)


@contextmanager
def live_traffic(database: Any) -> Iterator[tuple[list[float], list[str]]]:
    """Two sessions write both tables, in both orders, until the end; gives each write's seconds and each error."""
    durations: list[float] = []
    errors: list[str] = []
    ends = threading.Event()

    def write(user: int, tables: tuple[str, str]) -> None:
        connection = database.connect(autocommit=False)
        number = 0
        while not ends.is_set():
            number += 1
            try:
                for table in tables:
                    began = time.monotonic()
                    set_level(connection, table, user, 1 + number % 8)
                    durations.append(time.monotonic() - began)
                began = time.monotonic()
                connection.commit()
                durations.append(time.monotonic() - began)
                time.sleep(0.002)  # think time
            except psycopg.Error as error:
                errors.append(str(error))
                connection.rollback()

    writers = [
        threading.Thread(target=write, args=(1, (PROGRESS, LICENSE))),
        threading.Thread(target=write, args=(2, (LICENSE, PROGRESS))),
    ]
    for writer in writers:
        writer.start()
    try:
        wait_until(lambda: len(durations) > 20)
        yield durations, errors
        written = len(durations)
        wait_until(lambda: len(durations) > written + 20)
    finally:
        ends.set()
        for writer in writers:
            writer.join()


def test_no_write_fails_or_waits_long_while_migrate_and_rollback_run(empty_database, adopted, monkeypatch):
    monkeypatch.setattr(install, "LOCK_TRIES", 20)
    with live_traffic(empty_database) as (durations, errors):
        install.migrate(empty_database.dsn)
        install.migrate(empty_database.dsn)
        install.rollback(empty_database.dsn)
        install.migrate(empty_database.dsn)
    assert errors == []
    assert max(durations) < 1
    assert levels(adopted, 1) in [(n, n) for n in range(1, 9)]
    assert len(adopted.execute("select from pg_trigger where not tgisinternal").fetchall()) > 8


def test_killed_at_any_moment_beside_writers_it_ends_whole_and_no_write_fails(request, empty_database, adopted):
    install.migrate(empty_database.dsn)
    whole = snapshot(adopted, with_oids=False)
    install.rollback(empty_database.dsn)
    moments = random.Random(11)  # noqa: S311
    with live_traffic(empty_database) as (durations, errors):
        for _ in range(40 if request.config.getoption("proof") else 3):
            process = start(empty_database, "migrate")
            wait_until(lambda: sessions(adopted) > 2)
            time.sleep(moments.uniform(0, 1))  # the moment of the accident, not a wait for anything
            process.send_signal(signal.SIGKILL)
            process.communicate()
            install.migrate(empty_database.dsn)
            assert snapshot(adopted, with_oids=False) == whole
            install.rollback(empty_database.dsn)
        install.migrate(empty_database.dsn)
    assert errors == []
    assert max(durations) < 1
    assert snapshot(adopted, with_oids=False) == whole


def lock_both(db: psycopg.Connection[Any]) -> None:
    """Both tables at once, in short tries, so that no writer that has one and wants the other meets a deadlock."""
    while True:
        try:
            with db.transaction():
                db.execute("set local lock_timeout = '50ms'")
                db.execute("lock table specialization_progress, user_licenses in access exclusive mode")
                return
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.01)


@BOTH
def test_an_upgrade_leaves_no_moment_without_triggers(database, db, table):
    """The writer looks after each commit whether its write was carried."""
    add_pairs(db, 2)
    was_carried: list[bool] = []
    ends = threading.Event()

    def write() -> None:
        connection = database.connect(autocommit=False)
        while not ends.is_set():
            new = 1 + len(was_carried) % 8
            set_level(connection, table, 1, new)
            connection.commit()
            # While a table is locked the pair may be queued, as for any lock.
            was_carried.append(levels(connection, 1) == (new, new) or queued(connection) != [])
            connection.commit()
            time.sleep(0.002)  # think time

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for version in range(6):
            # An older version: other bodies, another WHEN.
            with db.transaction():
                lock_both(db)
                for name, on_table, function in (
                    ("progress_level_changed", PROGRESS, "carry_progress"),
                    ("license_level_changed", LICENSE, "carry_license"),
                ):
                    body = db.execute("select pg_get_functiondef(%s::regproc)", [f"level_sync.{function}"]).fetchone()[
                        0
                    ]
                    db.execute(body.replace("begin\n", f"begin  -- version {version}\n", 1))
                    db.execute(f"drop trigger {name} on {on_table}")
                    db.execute(
                        f"create trigger {name} after update on {on_table} for each row"
                        f" when (old.current_level <> new.current_level) execute function level_sync.{function}()"
                    )
            written = len(was_carried)
            install.migrate(database.dsn)
            wait_until(lambda written=written: len(was_carried) > written + 20)
    finally:
        ends.set()
        writer.join()
    assert all(was_carried)
    drain(db)
    checks = {check.name: check.ok for check in verify(database.dsn)}
    assert checks["triggers"] is checks["functions"] is checks["shipped_functions"] is True


def test_many_rows_without_keys_are_adopted_beside_writers(request, empty_database, adopted, record_property):
    rows = 10_000_000 if request.config.getoption("proof") else 20_000
    adopted.execute("set statement_timeout = 0; set session_replication_role = replica")
    adopted.execute("alter table specialization_progress drop constraint uq_progress_pair")
    adopted.execute("alter table user_licenses drop constraint uq_license_pair, drop constraint license_holder")
    adopted.execute("create index on specialization_progress (student_id); create index on user_licenses (user_id)")
    adopted.execute("insert into users (email) select n || '@large.test' from generate_series(1, %s) as n", [rows])
    for table, (user, specialization) in KEY.items():
        adopted.execute(
            f"insert into {table} ({user}, {specialization}, current_level) select id, 'COACH', 1 from users"
        )
    adopted.execute("vacuum analyze")
    with live_traffic(empty_database) as (durations, errors):
        began = time.monotonic()
        install.migrate(empty_database.dsn)
        took = time.monotonic() - began
    record_property(
        "figure",
        f"{rows} rows on each side adopted in {took:.1f} s; the slowest of {len(durations)} writes beside it"
        f" took {max(durations):.2f} s",
    )
    assert errors == []
    assert max(durations) < 1
    assert levels(adopted, 1) in [(n, n) for n in range(1, 9)]


def test_migrate_waits_in_short_tries_for_a_long_transaction_and_finishes_after_it(empty_database, adopted):
    holder = empty_database.connect(autocommit=False)
    set_level(holder, PROGRESS, 3, 5)
    set_level(holder, LICENSE, 4, 5)
    failures: list[BaseException] = []

    def migrate() -> None:
        try:
            install.migrate(empty_database.dsn)
        except BaseException as error:
            failures.append(error)

    migration = threading.Thread(target=migrate)
    migration.start()
    waiting = "select count(*) from pg_locks where not granted and database = %s"
    here = adopted.execute("select oid from pg_database where datname = current_database()").fetchone()
    wait_until(lambda: adopted.execute(waiting, here).fetchone() != (0,))
    began = time.monotonic()
    set_level(adopted, PROGRESS, 9, 6)  # another writer, queued behind migrate's try
    set_level(adopted, LICENSE, 9, 6)
    assert time.monotonic() - began < 1
    assert migration.is_alive()
    holder.commit()
    migration.join(timeout=30)
    assert not migration.is_alive()
    assert failures == []
    set_level(adopted, PROGRESS, 3, 6)
    assert levels(adopted, 3) == (6, 6)


def test_migrate_gives_up_with_a_clear_message_and_nothing_half_done(empty_database, adopted, monkeypatch):
    monkeypatch.setattr(install, "LOCK_TRIES", 2)
    monkeypatch.setattr(install, "LOCK_TIMEOUT", "50ms")
    before = foreign_keys(adopted, PROGRESS), foreign_keys(adopted, LICENSE)
    holder = empty_database.connect(autocommit=False)
    set_level(holder, LICENSE, 3, 5)
    with pytest.raises(
        install.MigrateError, match=r"live transactions held the tables through 2 tries.*nothing is half"
    ):
        install.migrate(empty_database.dsn)
    assert (foreign_keys(adopted, PROGRESS), foreign_keys(adopted, LICENSE)) == before
    holder.rollback()
    install.migrate(empty_database.dsn)
    set_level(adopted, LICENSE, 3, 6)
    assert levels(adopted, 3) == (6, 6)
