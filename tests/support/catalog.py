"""What the catalog says of the application's objects and of ours, and the application's rows."""

from __future__ import annotations

from typing import Any

import psycopg

from academy import LICENSE, PROGRESS

FOREIGN_KEYS = {
    "fk_specialization_progress_user": (PROGRESS, "users"),
    "fk_specialization_progress_spec": (PROGRESS, "specializations"),
    "fk_user_licenses_user": (LICENSE, "users"),
    "fk_user_licenses_spec": (LICENSE, "specializations"),
}


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
