"""Migrate gives the whole of level_sync, beside live traffic and after any accident; rollback takes all of it away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from academy import LICENSE, PROGRESS, add_pair, configure, levels, set_level
from catalog import FOREIGN_KEYS, application_rows, foreign_keys, names, snapshot
from internals import CARRY, CREATED, LEVEL_CHANGED
from level_sync.database import shipped
from level_sync.setup import install

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


@pytest.fixture
def migrated(empty_database):
    install.migrate(empty_database.dsn)
    return empty_database.connect()


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
    "dropped trigger": f"drop trigger {LEVEL_CHANGED[PROGRESS]} on {PROGRESS}",
    "disabled trigger": f"alter table {LICENSE} disable trigger {LEVEL_CHANGED[LICENSE]}",
    "every trigger disabled": f"alter table {PROGRESS} disable trigger user",
    "trigger that fires always": f"alter table {LICENSE} enable always trigger {CREATED[LICENSE]}",
    "renamed trigger": f"alter trigger {CREATED[PROGRESS]} on {PROGRESS} rename to something_else",
    "trigger with another condition": f"""
        drop trigger {LEVEL_CHANGED[LICENSE]} on {LICENSE};
        create trigger {LEVEL_CHANGED[LICENSE]} after update on {LICENSE}
          for each row when (false) execute function {CARRY[LICENSE]}()""",
    "trigger that calls something else": f"""
        create function public.nothing() returns trigger language plpgsql as 'begin return null; end';
        create or replace trigger {CREATED[PROGRESS]} after insert on {PROGRESS}
          for each row execute function public.nothing()""",
    "replaced function body": f"""
        create or replace function {CARRY[PROGRESS]}() returns trigger language plpgsql
          as 'begin return null; end'""",
    "dropped function with its triggers": f"drop function {CARRY[LICENSE]}() cascade",
    "function without its search_path": f"alter function {CARRY[PROGRESS]}() reset all",
    "function that runs as its caller": f"alter function {CARRY[LICENSE]}() security invoker",
    "function anybody may run": """
        grant usage on schema level_sync to public;
        grant execute on function level_sync.update_progress to public""",
    "replaced view": """
        create or replace view level_sync.desync_issues as
          select null::bigint as user_id, null::text as specialization, null::text as issue_type,
                 null::bigint as progress_level, null::bigint as license_level, null::bigint as difference,
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


# Plain yoyo


def test_plain_yoyo_gives_a_working_system_and_migrate_finds_nothing_to_do(server, empty_database):
    configuration = shipped("migrations") / "yoyo.ini"
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
