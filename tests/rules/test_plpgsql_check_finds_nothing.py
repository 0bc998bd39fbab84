"""plpgsql_check finds nothing in any function, procedure or trigger function of ours."""

from __future__ import annotations

import pytest

import internals


@pytest.mark.needs("plpgsql_check")
def test_no_finding_in_any_function(db):
    db.execute("create extension plpgsql_check")
    functions = db.execute("""
        select pg_proc.oid, pg_proc.proname::text, coalesce(min(pg_trigger.tgrelid), 0)
          from pg_proc
          join pg_language on pg_language.oid = pg_proc.prolang
          left join pg_trigger on pg_trigger.tgfoid = pg_proc.oid
         where pg_proc.pronamespace = 'level_sync'::regnamespace and pg_language.lanname = 'plpgsql'
         group by pg_proc.oid
    """).fetchall()
    assert len(functions) > 40
    findings = []
    for oid, name, relation in functions:
        rows = db.execute(
            "select level, message, lineno, statement from plpgsql_check_function_tb("
            "%s, %s, fatal_errors => false, security_warnings => true, performance_warnings => false,"
            " extra_warnings => true, other_warnings => true)",
            [oid, relation],
        ).fetchall()
        findings += [
            (name, *row) for row in rows if row[1] not in (internals.FINDINGS_MEANT_SO.get(name), internals.DISCARDED)
        ]
    assert findings == []


def test_every_trigger_function_has_a_trigger(db):
    lonely = db.execute("""
        select proname from pg_proc
         where pronamespace = 'level_sync'::regnamespace and prorettype = 'trigger'::regtype
           and not exists (select from pg_trigger where tgfoid = pg_proc.oid)
    """).fetchall()
    assert lonely == []
