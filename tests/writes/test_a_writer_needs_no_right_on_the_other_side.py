"""Whoever may write one table needs no right on the other, gets none by us, and cannot lead our code astray."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

import internals
from academy import (
    BOTH,
    BULK,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    add_pair,
    add_pairs,
    configure,
    delete,
    drain,
    insert,
    level,
    levels,
    set_level,
)
from internals import CARRY, PENDING

# What anybody may have around our names: functions, operators and relations that are found before the server's own.
HOSTILE = """
create schema hostile;
create function hostile.trap() returns text language plpgsql as $$ begin raise 'hostile code was run'; end $$;
create function hostile.length(text) returns integer language sql as $$ select hostile.trap()::integer $$;
create function hostile.now() returns timestamptz language sql as $$ select hostile.trap()::timestamptz $$;
create function hostile.clock_timestamp() returns timestamptz language sql as $$ select hostile.trap()::timestamptz $$;
create function hostile.pg_trigger_depth() returns integer language sql as $$ select hostile.trap()::integer $$;
create function hostile.current_setting(text, boolean) returns text language sql as $$ select hostile.trap() $$;
create function hostile.set_config(text, text, boolean) returns text language sql as $$ select hostile.trap() $$;
create function hostile.format(text, variadic text[]) returns text language sql as $$ select hostile.trap() $$;
create function hostile.pg_try_advisory_lock(bigint) returns boolean language sql as
  $$ select hostile.trap()::boolean $$;
create function hostile.pg_try_advisory_xact_lock(bigint) returns boolean language sql as
  $$ select hostile.trap()::boolean $$;
create function hostile.equal(integer, integer) returns boolean language sql as $$ select hostile.trap()::boolean $$;
create function hostile.equal(bigint, bigint) returns boolean language sql as $$ select hostile.trap()::boolean $$;
create function hostile.equal(text, text) returns boolean language sql as $$ select hostile.trap()::boolean $$;
create function hostile.equal(varchar, text) returns boolean language sql as $$ select hostile.trap()::boolean $$;
create operator hostile.= (leftarg = integer, rightarg = integer, function = hostile.equal);
create operator hostile.= (leftarg = bigint, rightarg = bigint, function = hostile.equal);
create operator hostile.= (leftarg = text, rightarg = text, function = hostile.equal);
create operator hostile.= (leftarg = varchar, rightarg = text, function = hostile.equal);
create operator hostile.> (leftarg = integer, rightarg = integer, function = hostile.equal);
create operator hostile.<> (leftarg = timestamptz, rightarg = timestamptz, function = hostile.later);
create table hostile.settings (on_error text);
create table hostile.user_licenses (user_id text);
create table hostile.specialization_progress (student_id text);
create table hostile.sync_queue (user_id text);
create table hostile.specializations (id text);
""".replace(
    "create operator hostile.<>",
    "create function hostile.later(timestamptz, timestamptz) returns boolean language sql"
    " as $$ select hostile.trap()::boolean $$;\ncreate operator hostile.<>",
)
SHADOWS = f"""
create temp table settings (on_error text);
create temp table user_licenses (user_id text);
create temp table specialization_progress (student_id text);
create temp table specializations (id text);
create temp table sync_queue (user_id text);
create temp table {PENDING} (user_id text);
create temp table pg_proc (proname text);
"""


NO_RIGHT = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.WrongObjectType,  # TRUNCATE of a view
    psycopg.errors.ObjectNotInPrerequisiteState,  # a write to a view that takes none
)


@BOTH
@BULK
def test_a_role_with_rights_on_one_table_is_carried_to_the_other(database, db, role, table, inline_limit):
    configure(db, inline_limit=inline_limit, on_delete="propagate")
    add_pair(db, 1, level=3)
    db.execute("insert into users (id) values (2)")
    db.execute(f"grant select, insert, update, delete on {table} to {role}")
    app = database.connect(role)
    set_level(app, table, 1, 5)
    insert(app, table, 2, 4)
    assert levels(db, 1) == (5, 5)
    assert levels(db, 2) == (4, 4)
    delete(app, table, 1)
    assert levels(db, 1) == (None, None)
    with pytest.raises(psycopg.errors.CheckViolation, match="out of range"):
        set_level(app, table, 2, 9)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        level(app, OTHER[table], 2)
    assert db.execute("select distinct session_role from level_sync.sync_events where user_id = 2").fetchone() == (
        role,
    )


@BOTH
def test_what_fails_for_such_a_role_is_queued_though_it_may_not_read_level_sync(database, db, role, table):
    add_pairs(db, 100)
    db.execute(f"grant select, update on {table} to {role}")
    db.execute(f"alter table {OTHER[table]} add constraint below_six check (current_level < 6)")
    app = database.connect(role)
    app.execute(f"update {table} set current_level = 6 where {KEY[table][0]} <= 3")
    app.execute(f"update {table} set current_level = 7")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute("select * from level_sync.sync_queue")
    assert db.execute("select count(distinct user_id) from level_sync.sync_queue").fetchone() == (100,)
    db.execute(f"alter table {OTHER[table]} drop constraint below_six")
    drain(db)
    assert levels(db, 50) == (7, 7)


def test_nobody_but_the_owner_has_any_right_unasked(db):
    assert (
        db.execute("""
        select pg_proc.oid::regprocedure from pg_proc
         where pronamespace = 'level_sync'::regnamespace and has_function_privilege('public', pg_proc.oid, 'execute')
    """).fetchall()
        == []
    )
    assert (
        db.execute("""
        select oid::regclass from pg_class
         where relnamespace = 'level_sync'::regnamespace and relkind in ('r', 'v', 'S')
           and case relkind when 'S' then has_sequence_privilege('public', oid, 'usage')
                    else has_table_privilege('public', oid, 'select, insert, update, delete, truncate') end
    """).fetchall()
        == []
    )
    assert db.execute("select has_schema_privilege('public', 'level_sync', 'usage')").fetchone() == (False,)


def test_a_role_of_the_application_can_call_and_write_nothing_of_ours(database, db, role):
    for table in KEY:
        db.execute(f"grant all on {table} to {role}")
    db.execute(f"grant usage on schema level_sync to {role}")  # even so
    app = database.connect(role)
    relations = db.execute(
        "select relname from pg_class where relnamespace = 'level_sync'::regnamespace and relkind in ('r', 'v')"
    ).fetchall()
    assert len(relations) > 8
    for (name,) in relations:
        for statement in ("select * from {}", "delete from {}", "insert into {} default values", "truncate {}"):
            with pytest.raises(NO_RIGHT):
                app.execute(sql.SQL(statement).format(sql.Identifier("level_sync", name)))
    functions = db.execute("""
        select proname, prokind, prorettype = 'trigger'::regtype,
               coalesce((select string_agg('null::' || format_type(type, null), ', ' order by number)
                           from unnest(proargtypes) with ordinality as argument (type, number)), '')
          from pg_proc where pronamespace = 'level_sync'::regnamespace
    """).fetchall()
    for name, kind, is_trigger, arguments in functions:
        call = "call" if kind == "p" else "select"
        expected = psycopg.errors.FeatureNotSupported if is_trigger else psycopg.errors.InsufficientPrivilege
        with pytest.raises((expected, psycopg.errors.InsufficientPrivilege)):
            app.execute(f"{call} level_sync.{name}({arguments})")


def test_a_trigger_function_of_ours_cannot_be_put_on_another_table(database, db, role):
    db.execute(f"grant create on schema public to {role}")
    db.execute(f"grant usage on schema level_sync to {role}")
    app = database.connect(role)
    app.execute("create table mine (user_id bigint, specialization_type text, current_level integer)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute(f"create trigger t after insert on mine for each row execute function {CARRY[LICENSE]}()")


HOSTILE_PATHS = ["hostile, pg_catalog, public", "pg_temp, hostile, pg_catalog, public", "hostile"]


@BOTH
@pytest.mark.parametrize("path", HOSTILE_PATHS)
@BULK
def test_hostile_names_around_a_write_are_never_called(database, db, table, path, inline_limit):
    configure(db, inline_limit=inline_limit, on_error="raise", on_delete="propagate")
    add_pair(db, 1, level=3)
    db.execute(HOSTILE)
    writer = database.connect()
    writer.execute(SHADOWS)
    writer.execute(f"set search_path = {path}")
    user_column, specialization_column = KEY[table]
    writer.execute(f"update public.{table} set current_level = 5")
    assert levels(db, 1) == (5, 5)
    writer.execute(f"delete from public.{table}")
    assert levels(db, 1) == (None, None)
    writer.execute(
        f"insert into public.{table} ({user_column}, {specialization_column}, current_level) values (1, 'COACH', 2)"
    )
    assert levels(db, 1, "COACH") == (2, 2)


@pytest.mark.parametrize("path", HOSTILE_PATHS)
@pytest.mark.parametrize("in_a_transaction", [False, True])
def test_hostile_names_around_the_jobs_and_functions_are_never_called(database, db, path, in_a_transaction):
    add_pairs(db, 3)
    db.execute(HOSTILE)
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " values (1, 'PLAYER', 'progress', 'level_changed', '00000', '')"
    )
    db.execute("set session_replication_role = replica")
    set_level(db, PROGRESS, 2, 6)
    db.execute("reset session_replication_role")
    operator = database.connect()
    operator.execute(SHADOWS)
    operator.execute(f"set search_path = {path}")
    for call in (
        "call level_sync.drain_queue()",
        "call level_sync.reconcile()",
        "call level_sync.purge()",
        "call level_sync.maintain()",
        "select level_sync.update_progress(1, 'PLAYER', 3000, 20, 0)",
        "select level_sync.advance_license(3, 'PLAYER', 5)",
        "select level_sync.sync_user(2, 'license_to_progress')",
        "select level_sync.sync_progress_to_license(1, 'PLAYER')",
        "select * from level_sync.find_desync_issues('PLAYER')",
        "select * from level_sync.desync_issues",
        "select * from level_sync.health",
        "select level_sync.undo(1)",
        "call level_sync.reconcile()",
        "select level_sync.requeue()",
    ):
        if in_a_transaction:
            operator.execute("begin")
        operator.execute(call)
        if in_a_transaction:
            operator.execute("commit")
    assert operator.execute("show search_path").fetchone() == (path,)
    assert levels(db, 3) == (5, 5)


@BOTH
def test_settings_of_the_writers_session_make_no_difference(database, db, table):
    add_pair(db, 1, level=3)
    writer = database.connect()
    for setting in (
        "standard_conforming_strings = off",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = sql_standard",
        "timezone = 'Asia/Kathmandu'",
        "row_security = off",
        "default_transaction_deferrable = on",
        "enable_seqscan = off",
        "lock_timeout = 0",
        "transform_null_equals = on",
        "extra_float_digits = -10",
        "check_function_bodies = off",
    ):
        writer.execute(f"set {setting}")
    set_level(writer, table, 1, 5)
    assert levels(db, 1) == (5, 5)
    configure(db, inline_limit=0)
    set_level(writer, table, 1, 6)
    assert levels(db, 1) == (6, 6)


@pytest.mark.parametrize(
    "name", ["'; drop table users; --", "a\nb", "%s%I%L", "x" * 5000, "名\u202e", "\\", '"quoted"']
)
@BOTH
def test_hostile_texts_are_only_texts(db, users, table, name):
    users(1)
    db.execute("insert into specializations (id, max_levels) values (%s, 5)", [name])
    with db.transaction():
        db.execute(
            "select set_config('level_sync.actor', %s, true), set_config('level_sync.reason', %s, true)", [name] * 2
        )
        insert(db, table, 1, 4, name)
    assert levels(db, 1, name) == (4, 4)
    told = db.execute("select specialization, actor, reason from level_sync.sync_events").fetchone()
    assert told == (name, name[:200], name[:1000])
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        set_level(db, table, 1, 6, name)
    assert caught.value.diag.message_primary == f"level 6 of user 1 in {name} is out of range: allowed is 1 to 5"


def test_the_applications_triggers_run_in_the_path_that_settings_name(db):
    """And not in that of the writer, who could lead them to objects of his own with the owner's rights."""
    add_pair(db, 1, level=3)
    db.execute("create schema hostile")
    db.execute("create schema audit")
    for schema in ("hostile", "audit", "public"):
        db.execute(f"create table {schema}.trail (note text)")
    db.execute("""
        create function public.write_trail() returns trigger language plpgsql as $$
        begin
          insert into trail values (current_setting('search_path'));
          return new;
        end $$;
        create trigger write_trail after update on user_licenses for each row execute function write_trail();
    """)
    db.execute("set search_path = hostile, public")
    set_level(db, PROGRESS, 1, 4)
    configure(db, trigger_search_path="audit, public")
    set_level(db, PROGRESS, 1, 5)
    configure(db, inline_limit=0)
    set_level(db, PROGRESS, 1, 6)
    trails = [db.execute(f"select note from {schema}.trail").fetchall() for schema in ("hostile", "public", "audit")]
    assert trails == [[], [("public, pg_temp",)], [("audit, public, pg_temp",)] * 2]
    assert db.execute("show search_path").fetchone() == ("hostile, public",)


def test_run_that_is_skipped_heeds_no_function_of_the_caller_either(database, db):
    db.execute(HOSTILE)
    other = database.connect()
    other.execute(internals.HOLD_RUN_LOCK)
    db.execute("set search_path = hostile, pg_catalog")
    db.execute("call level_sync.reconcile()")
    assert other.execute("select status from level_sync.sync_log").fetchone() == ("skipped",)
