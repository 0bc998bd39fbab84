"""Settings take effect on the next write; a nonsense value is refused by a named check."""

from __future__ import annotations

import psycopg
import pytest

from academy import BOTH, OTHER, add_pair, configure, delete, levels, queued, set_level, user_trigger

NONSENSE = [
    ("conflict_policy", "coin_toss", "conflict_policy_is_known"),
    ("on_error", "ignore", "on_error_is_queue_or_raise"),
    ("on_delete", "cascade", "on_delete_is_restrict_propagate_or_recreate"),
    ("lock_wait", "-1 ms", "lock_wait_is_between_0_and_500_milliseconds"),
    ("lock_wait", "2 s", "lock_wait_is_between_0_and_500_milliseconds"),
    ("inline_limit", -1, "inline_limit_is_between_0_and_40"),
    ("inline_limit", 65, "inline_limit_is_between_0_and_40"),
    ("trigger_search_path", "", "trigger_search_path_is_a_list_of_schemas"),
    ("trigger_search_path", "public; drop", "trigger_search_path_is_a_list_of_schemas"),
    ("trigger_search_path", "public,", "trigger_search_path_is_a_list_of_schemas"),
    ("batch_size", 0, "batch_size_is_between_1_and_100000"),
    ("repair_limit", -1, "repair_limit_is_not_negative"),
    ("max_attempts", 0, "max_attempts_is_between_1_and_100"),
    ("retry_backoff", "0 s", "retry_backoff_is_between_1_second_and_1_day"),
    ("schedule", "every day", "schedule_has_five_fields"),
    ("misfire_grace", "-1 s", "misfire_grace_is_not_negative"),
    ("log_retention", "1 hour", "log_retention_is_at_least_1_day"),
    ("event_retention", "0", "event_retention_is_at_least_1_day"),
]


@pytest.mark.parametrize(("setting", "value", "constraint"), NONSENSE)
def test_nonsense_is_refused_by_a_check_that_says_what_is_allowed(db, setting, value, constraint):
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        configure(db, **{setting: value})
    assert caught.value.diag.constraint_name == constraint


@pytest.mark.parametrize("setting", [row[0] for row in NONSENSE])
def test_no_setting_may_be_null(db, setting):
    with pytest.raises(psycopg.errors.NotNullViolation):
        configure(db, **{setting: None})


@pytest.mark.parametrize("path", ["public", '"Odd Schema", public', "app, audit_2", '"$user",public'])
def test_any_list_of_schemas_may_be_the_path_of_triggers(db, path):
    configure(db, trigger_search_path=path)
    add_pair(db, 1, level=3)
    assert levels(db, 1) == (3, 3)


def test_there_is_always_exactly_one_row(db):
    for statement in ("delete from level_sync.settings", "truncate level_sync.settings"):
        with pytest.raises(psycopg.errors.RestrictViolation) as caught:
            db.execute(statement)
        assert caught.value.diag.message_hint == "There is always exactly one row: change it with UPDATE."
    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute("insert into level_sync.settings default values")
    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute("insert into level_sync.settings (is_only_row) values (false)")


def test_every_setting_is_explained(db):
    unexplained = db.execute("""
        select attname from pg_attribute
         where attrelid = 'level_sync.settings'::regclass and attnum > 0
           and coalesce(col_description(attrelid, attnum), '') = ''
    """).fetchall()
    assert unexplained == []


@BOTH
@pytest.mark.leftovers
def test_on_error_takes_effect_with_the_next_write_of_an_open_session(database, db, table):
    add_pair(db, 1, level=3)
    writer = database.connect()
    set_level(writer, table, 1, 4)
    user_trigger(db, f"before update on {OTHER[table]}", "raise exception 'no'")
    configure(db, on_error="raise")
    with pytest.raises(psycopg.errors.RaiseException):
        set_level(writer, table, 1, 5)
    assert levels(db, 1) == (4, 4)
    configure(db, on_error="queue")
    set_level(writer, table, 1, 5)
    assert [entry[4] for entry in queued(db)] == ["P0001"]


@BOTH
def test_on_delete_takes_effect_with_the_next_commit_of_an_open_session(database, db, table):
    add_pair(db, 1, level=3)
    writer = database.connect()
    with pytest.raises(psycopg.errors.RestrictViolation):
        delete(writer, table, 1)
    writer.execute("begin")
    delete(writer, table, 1)
    configure(db, on_delete="recreate")
    writer.execute("commit")
    assert levels(db, 1) == (3, 3)
    configure(db, on_delete="propagate")
    delete(writer, table, 1)
    assert levels(db, 1) == (None, None)


@BOTH
def test_inline_limit_takes_effect_within_an_open_transaction(database, db, table):
    add_pair(db, 1, level=3)
    writer = database.connect()
    writer.execute("begin")
    set_level(writer, table, 1, 4)
    assert levels(writer, 1) == (4, 4)
    configure(db, inline_limit=0)
    set_level(writer, table, 1, 5)
    assert sorted(levels(writer, 1)) == [4, 5]
    writer.execute("commit")
    assert levels(db, 1) == (5, 5)
