"""plpgsql_check finds nothing in any function, procedure or trigger function of ours."""

from __future__ import annotations

import pytest

from level_sync.servers import SystemServer, has_extension

# Findings that are meant so, by function: whatever else it finds fails the test.
STATEMENT_OF_OURS = "text type variable is not sanitized"  # a CREATE TRIGGER of sql/, or column names quoted one by one
WRITTEN_AS_TEXT = (
    "target type is different type than source type"  # _as_utc: the column's type takes it, whichever it is
)
NEVER_READ = 'never read variable "never_read"'  # takes what set_config returns
MEANT_SO = {
    "_set_rows_aside": STATEMENT_OF_OURS,
    "_restore_rows": STATEMENT_OF_OURS,
    "_ensure_trigger": STATEMENT_OF_OURS,
    "carry_progress": WRITTEN_AS_TEXT,
    "carry_license": WRITTEN_AS_TEXT,
    "_carry_progress_to_licenses": WRITTEN_AS_TEXT,
    "_carry_licenses_to_progress": WRITTEN_AS_TEXT,
    "update_progress": WRITTEN_AS_TEXT,
    "advance_license": WRITTEN_AS_TEXT,
    "_put_back": WRITTEN_AS_TEXT,
    # They try what is refused, to hear how.
    "_refusal_to_commit": "invalid transaction termination",
    "_look_for_transaction": "cannot commit while a subtransaction is active",
    # pg_cron lives in another database here; these look before they touch it.
    "_purge_batch": 'relation "cron.job_run_details" does not exist',
    "schedule": 'schema "cron" does not exist',
    "unschedule": 'relation "cron.job" does not exist',
    "_check_schedule": 'relation "cron.job" does not exist',
}


@pytest.fixture
def checker(server, db):
    if not isinstance(server, SystemServer):
        pytest.skip("the embedded PostgreSQL has no plpgsql_check")
    if not has_extension(server.binaries, "plpgsql_check"):
        pytest.skip("plpgsql_check is not installed, and installing it needs root on Debian or Ubuntu")
    db.execute("create extension plpgsql_check")
    return db


def test_no_finding_in_any_function(checker):
    functions = checker.execute("""
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
        rows = checker.execute(
            "select level, message, lineno, statement from plpgsql_check_function_tb("
            "%s, %s, fatal_errors => false, security_warnings => true, performance_warnings => false,"
            " extra_warnings => true, other_warnings => true)",
            [oid, relation],
        ).fetchall()
        findings += [(name, *row) for row in rows if row[1] not in (MEANT_SO.get(name), NEVER_READ)]
    assert findings == []


def test_every_trigger_function_has_a_trigger(db):
    lonely = db.execute("""
        select proname from pg_proc
         where pronamespace = 'level_sync'::regnamespace and prorettype = 'trigger'::regtype
           and not exists (select from pg_trigger where tgfoid = pg_proc.oid)
    """).fetchall()
    assert lonely == []
