"""The private names of sql/ and migrations/, each behind a helper that says what it is good for.

Tests speak of what level_sync promises; where one has to reach inside, it does it from here. So whoever renames a
function, a trigger or a file changes this module and no test, and tests/rules holds that no other file names any.
"""

from __future__ import annotations

import re
from typing import Any

from psycopg import sql

from academy import LICENSE, PROGRESS, Connection, call
from tree import ROOT

# Triggers of the application's tables, and the functions they call

LEVEL_CHANGED = {PROGRESS: "progress_level_changed", LICENSE: "license_level_changed"}
CREATED = {PROGRESS: "progress_created", LICENSE: "license_created"}
TRUNCATED = {PROGRESS: "progress_truncated", LICENSE: "licenses_truncated"}
CARRY = {PROGRESS: "level_sync.carry_progress", LICENSE: "level_sync.carry_license"}


def disable_trigger(db: Connection, table: str = LICENSE) -> None:
    """Levels changed in this table are no longer carried."""
    db.execute(f"alter table {table} disable trigger {LEVEL_CHANGED[table]}")


def enable_trigger(db: Connection, table: str = LICENSE) -> None:
    db.execute(f"alter table {table} enable trigger {LEVEL_CHANGED[table]}")


def never_raise_the_highest_level(db: Connection) -> None:
    """An error, where a license should need it."""
    db.execute(
        "create or replace function level_sync.raise_max_achieved_level() returns trigger language plpgsql"
        " as $$ begin raise 'called'; end $$"
    )


# Tables

PENDING = "pending_pairs"  # what a transaction carries at its commit, or has left behind
PENDING_PAIRS = f"level_sync.{PENDING}"
PENDING_COMMITS = "level_sync.pending_commits"
INSTALLED_FUNCTIONS = "level_sync.installed_functions"
APPLIED_MIGRATIONS = "level_sync._yoyo_migration"


def leave_behind(db: Connection, user: int, side: str) -> None:
    """As a transaction does that could not carry its own set."""
    db.execute(
        f"insert into {PENDING_PAIRS} (user_id, specialization, side, change)"
        " values (%s, 'PLAYER', %s, 'level_changed')",
        [user, side],
    )


def no_drain_takes_up_what_is_left_behind(db: Connection) -> None:
    db.execute(
        "create or replace function level_sync._drain_batch(due_before timestamptz) returns integer"
        " language sql as 'select 0'"
    )


# What a session notes in settings of its own


def write_as_level_sync_does(session: Connection) -> None:
    """What the session writes from here on is taken for an echo and not carried."""
    session.execute("set level_sync.own_depth = 0")


def spend_subtransactions(session: Connection) -> None:
    """As after many rounds of one transaction: none is left to carry anything with."""
    session.execute("select set_config('level_sync.subtransactions', repeat('.', 60), false)")


def subtransactions_used(session: Connection) -> int:
    """By the open transaction."""
    used: int = call(session, "select length(current_setting('level_sync.subtransactions'))")
    return used


def is_clean(session: Connection) -> bool:
    """Whether nothing is noted any more."""
    noted = "select current_setting('level_sync.' || name, true) from unnest(%s::text[]) as name"
    names = ["own_depth", "pending", "subtransactions"]
    return {value for (value,) in session.execute(noted, [names])} <= {None, ""}


def ask_for_progress(session: Connection, asked: str = "on") -> None:
    """Runs of the session then tell how far they are, in notices."""
    session.execute(f"set level_sync.report_progress = {asked}")


# Steps of the work at which somebody can be made to wait, or to do something first

STEPS = {
    "carry": ("_carry_pairs", "^begin$", "begin\n  perform {};"),
    "confirm": ("_confirm_planned", "^begin$", "begin\n  perform {};"),
    "isolate": ("_carry_or_isolate", "^  select ", "  select {};\n  select "),
    "lock": ("_drain_batch", "^  due := level_sync._lock_pairs", "  perform {};\n  due := level_sync._lock_pairs"),
    "purge": ("_purge_batch", "^begin$", "begin\n  perform {};"),
    "uncontended": ("_carry_uncontended", "^begin$", "begin\n  perform {};"),
    # The statement that locks and writes a whole set at once.
    "set": (
        "_carry_levels",
        "where pair.change <> 'deleted'",
        "where (select count(*) from (select {}) as waited) = 1 and pair.change <> 'deleted'",
    ),
}


def do_first(db: Connection, step: str, expressions: str) -> None:
    """Whoever comes to the step evaluates these expressions of a SELECT before it goes on."""
    function, place, instead = STEPS[step]
    _replace_in(db, function, place, instead.format(expressions))


def _replace_in(db: Connection, function: str, place: str, text: str) -> None:
    definition = (
        "select pg_get_functiondef(oid) from pg_proc where pronamespace = 'level_sync'::regnamespace and proname = %s"
    )
    row = db.execute(definition, [function]).fetchone()
    assert row, f"there is no function {function}"
    changed = re.sub(place, lambda _: text, row[0], count=1, flags=re.MULTILINE)
    assert changed != row[0], f"{function} has no {place}"
    db.execute(changed.encode())


def look_one_by_one_at_no_more_than(db: Connection, count: int) -> None:
    """From now on it is an error to tell apart, pair by pair, more pairs than that."""
    too_many = f"if cardinality($1) > {count} then raise 'looked at one by one'; end if"
    _replace_in(db, "_lock_pairs", "^begin$", f"begin\n  {too_many};")


def before_a_set_is_carried(db: Connection, statement: str) -> None:
    """Whoever carries a set first executes the statement, unseen by triggers."""
    function, place, _ = STEPS["isolate"]
    unseen = f"set local session_replication_role = replica; {statement}; set local session_replication_role = origin"
    _replace_in(db, function, place, f"  {unseen};\n  select ")


def forbid_a_second_look(db: Connection) -> None:
    """It is an error to look at pairs again that have been carried for certain."""
    _replace_in(db, "_unequal_pairs", "^begin$", "begin\n  if $1 <> '{}' then raise 'looked at again'; end if;")


# Runs

HOLD_RUN_LOCK = "select pg_advisory_lock(level_sync._run_lock())"


def run_is_seen_at_the_third_look(db: Connection) -> None:
    """And at no other: as if it were between two of its transactions at the others."""
    db.execute("create sequence public.looks")
    db.execute(
        "create or replace function level_sync._is_run_active() returns boolean language sql volatile"
        " as $$ select nextval('public.looks') = 3 $$"
    )


def end_of_range(db: Connection, first_user: int, pairs: int) -> int | None:
    """The last user of a range of about so many pairs; None where it is open."""
    end: int | None = call(db, "select level_sync._end_of_range(%s, %s)", first_user, pairs)
    return end


DESYNCS_OF_1_TO_1000 = "select * from level_sync._desync_issues_between(1, 1000)"


def start_and_plan_run(db: Connection, last_user: int) -> int:
    """A run that has planned what it means to do with the users 1 to last_user."""
    run_id: int = call(db, "select level_sync._start_run(false, null, 'manual', null)")
    db.execute("select level_sync._plan_range(%s, null, 1, %s)", [run_id, last_user])
    return run_id


def finish_run(db: Connection, run_id: int, next_user: int | None, batch_size: int) -> None:
    """Repairs what is planned from a user on, batch by batch, and closes the run."""
    while next_user is not None:
        db.execute("select level_sync._report_progress('repairing', %s, %s)", [next_user, run_id])
        next_user = call(db, "select level_sync._repair_batch(%s, %s, %s, %s)", run_id, run_id, next_user, batch_size)
    db.execute("select level_sync._finish_run(%s, %s, null, null)", [run_id, run_id])


# The schedule and the maintenance


def is_run_missed(db: Connection, now: str) -> bool:
    missed: bool = call(db, "select level_sync._is_run_missed(%s)", now)
    return missed


def last_slot(db: Connection, cron_expression: str, before: str) -> Any:
    """The latest moment, before or at another one, at which a schedule is due."""
    return call(db, "select level_sync._last_slot(%s, %s)", cron_expression, before)


def wanted_cron_jobs(db: Connection) -> list[tuple[str, str, str]]:
    """(name, schedule, command) of the jobs that should be there."""
    return db.execute("select jobname, schedule, command from level_sync._wanted_cron_jobs()").fetchall()


def checks_of_cron_jobs(db: Connection, jobs: Any) -> list[tuple[str, bool, str]]:
    """(name, ok, detail) of each check, for jobs as pg_cron's tables would show them."""
    return db.execute("select name, ok, detail from level_sync._check_cron_jobs(%s)", [jobs]).fetchall()


def purge_batch(db: Connection) -> int | None:
    """Deletes one batch of what is past its retention; how many rows that were."""
    deleted: int | None = call(db, "select level_sync._purge_batch()")
    return deleted


# Rights

# What nobody but the owner may call.
CALLS_OF_THE_OWNER = [
    "select level_sync._grant_to(session_user, 'operator')",
    "select level_sync._revoke_from('postgres')",
    "select level_sync._enqueue('{}')",
    "select level_sync._quarantine_rows('user_licenses', 'orphan')",
    "select level_sync._remove_triggers()",
]


def grant(db: Connection, role: str, rights: str = "reader") -> None:
    db.execute("select level_sync._grant_to(%s, %s)", [role, rights])


def revoke(db: Connection, role: str) -> None:
    db.execute("select level_sync._revoke_from(%s)", [role])


def take_away(db: Connection, role: str, *, of_operators: bool) -> None:
    """One of the functions that a reader needs, or one that an operator needs besides."""
    function = "_drain_batch(timestamptz)" if of_operators else "_check_runs()"
    _forbid(db, role, function)


def forbid_scan(db: Connection, role: str) -> None:
    _forbid(db, role, "_count_desyncs()")


def _forbid(db: Connection, role: str, function: str) -> None:
    db.execute(
        sql.SQL("revoke execute on function level_sync.{} from {}").format(sql.SQL(function), sql.Identifier(role))  # type: ignore[arg-type]
    )


def make_owner_of_the_purge(db: Connection, role: str) -> None:
    db.execute(f"alter function level_sync._purge_batch() owner to {role}")


def make_owner_of_the_look_at_the_schedule(db: Connection, role: str) -> None:
    for function in ("_check_schedule()", "_cron_access()"):
        db.execute(f"alter function level_sync.{function} owner to {role}")


def make_owner_of_the_look_for_hidden_rows(db: Connection, role: str) -> None:
    for function in ("_check_hidden_rows()", "_hidden_tables()"):
        db.execute(f"alter function level_sync.{function} owner to {role}")


# What is installed


def change_a_function(db: Connection) -> None:
    """Of level_sync's, as somebody might who does not know better."""
    db.execute(
        "create or replace function level_sync._session_reason() returns text language sql as 'select null::text'"
    )


def record_as_loaded(db: Connection) -> None:
    """As if what is there had been loaded so."""
    beginning = "delete from level_sync.installed_functions"
    _, _, rest = (ROOT / "sql" / "95_finish_loading.sql").read_text().partition(beginning)
    db.execute((beginning + rest).encode())


def make_runs_uncheckable(db: Connection) -> None:
    """The check of the last run says that it could not be made."""
    db.execute(
        "create or replace function level_sync._check_runs() returns setof level_sync.check_result language sql stable"
        " as $$ select 'last_run', null::boolean, 'not checked', 'hint' $$"
    )


FUNCTION_OF_AN_OLDER_VERSION = "level_sync._older"
LIVE_CHECK = "select * from level_sync._check_live()"
# The migration that makes level_sync's own tables.
TABLES_OF_OURS = "0003_create_level_sync_tables"

# What the rules read off the code

# What is run within the application's writes.
FILES_OF_A_WRITE = (
    "08_guarded_tables.sql",
    "10_level_rules.sql",
    "12_pairs.sql",
    "14_transaction_state.sql",
    "16_queue.sql",
    "20_progress_to_license.sql",
    "30_license_to_progress.sql",
    "40_carry_sets.sql",
    "42_isolate_failures.sql",
    "44_at_commit.sql",
)
# Its function that refuses statements names the table in its message.
NAMES_ITS_TABLE = "08_guarded_tables.sql"
# SQL functions that the planner sees through, which it does only without a SET clause; each names every object in full
# and is called by functions only that pin the path.
INLINED = {
    "_is_level_in_range",
    "_session_actor",
    "_session_reason",
    "_pair",
    "_failed",
    "_write_budget",
    "_commit_budget",
    "_used_subtransactions",
    "_lock_timeout",
    "_as_utc",
    "_repairs",
    "_desync_issues_between",
}
# They set the path of whoever calls them, which a SET clause would take back; they name every object in full.
SETTERS = {"_enter_trigger_context", "_enter_trigger_context_of_set", "_leave_trigger_context"}

# What plpgsql_check finds and is meant so, by function.
STATEMENT_OF_OURS = "text type variable is not sanitized"  # a CREATE TRIGGER of sql/, or column names quoted one by one
WRITTEN_AS_TEXT = "target type is different type than source type"  # the column's type takes it, whichever it is
DISCARDED = 'never read variable "discarded"'  # takes what set_config returns
FINDINGS_MEANT_SO = {
    "_quarantine_rows": STATEMENT_OF_OURS,
    "_restore_rows": STATEMENT_OF_OURS,
    "_ensure_trigger": STATEMENT_OF_OURS,
    "carry_progress": WRITTEN_AS_TEXT,
    "carry_license": WRITTEN_AS_TEXT,
    "_carry_levels": WRITTEN_AS_TEXT,
    "_create_missing": WRITTEN_AS_TEXT,
    "update_progress": WRITTEN_AS_TEXT,
    "advance_license": WRITTEN_AS_TEXT,
    "_put_back": WRITTEN_AS_TEXT,
    # They try what is refused, to hear how.
    "_refusal_to_commit": "invalid transaction termination",
    "_detect_outer_transaction": "cannot commit while a subtransaction is active",
    # pg_cron lives in another database here; these look before they touch it.
    "_purge_batch": 'relation "cron.job_run_details" does not exist',
    "schedule": 'schema "cron" does not exist',
    "unschedule": 'relation "cron.job" does not exist',
    "_check_schedule": 'relation "cron.job" does not exist',
}

# What mutations.py has to know of the code

CALL_OF_BEGIN_BATCH = r"call level_sync\._begin_batch\([^;]*;"
TRY_RUN_LOCK = r"pg_try_advisory_xact_lock\(level_sync\._run_lock\(\)\)"
QUEUE_A_PAIR = r"perform level_sync\._(?:enqueue|defer_pair)\([^;]*;"
ABOUT_CRON = ("70_schedule.sql", "80_health.sql")
# Which tests notice a change of a file first.
FIRST_TO_NOTICE = {
    "05_installed_triggers.sql": ("setup/test_migrate_gives_the_whole_of_level_sync",),
    "08_guarded_tables.sql": (
        "setup/test_migrate_gives_the_whole_of_level_sync",
        "writes/test_a_writer_needs_no_right_on_the_other_side",
    ),
    "10_level_rules.sql": ("writes/test_levels_out_of_range_are_refused", "setup/test_settings_take_effect_at_once"),
    "42_isolate_failures.sql": ("commit/test_bulk_is_carried_as_a_set",),
    "48_drain.sql": ("drain/test_the_drain_reads_the_live_rows", "drain/test_many_pairs_are_done_at_once"),
    "50_desync_issues.sql": ("reconcile/test_every_desync_is_repaired", "reconcile/test_desync_issues_are_shown_once"),
    "52_sync_by_hand.sql": ("reconcile/test_sync_by_hand_says_what_it_did",),
    "54_level_ups.sql": ("writes/test_level_ups_are_carried",),
    "60_reconcile.sql": ("reconcile/test_every_desync_is_repaired", "reconcile/test_one_run_at_a_time"),
    "62_repair.sql": ("reconcile/test_every_desync_is_repaired", "drain/test_many_pairs_are_done_at_once"),
    "64_undo.sql": ("reconcile/test_undo_puts_back_what_a_run_changed",),
    "70_schedule.sql": ("drain/test_maintenance_does_what_is_due",),
    "72_maintain.sql": ("drain/test_maintenance_does_what_is_due",),
    "80_health.sql": ("monitor/test_every_silent_stop_is_noticed",),
    "85_quarantine.sql": (
        "adopt/test_a_live_database_is_adopted_and_given_back",
        "setup/test_migrate_gives_the_whole_of_level_sync",
    ),
    "90_grants.sql": (
        "setup/test_grants_allow_no_more_than_they_say",
        "writes/test_a_writer_needs_no_right_on_the_other_side",
    ),
    "95_finish_loading.sql": (
        "adopt/test_an_upgrade_misses_no_write",
        "setup/test_grants_allow_no_more_than_they_say",
    ),
}
