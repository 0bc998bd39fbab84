"""A run commits batch by batch, or is part of a transaction that somebody else has begun, and counts all of it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

import internals
from academy import (
    LICENSE,
    add_pairs,
    bypass,
    configure,
    delete,
    drop_user_trigger,
    last_run,
    levels,
    reconcile,
    user_trigger,
)


def test_sample_is_bounded_and_the_rows_themselves_stand_in_the_events(db):
    add_pairs(db, 300)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    run = reconcile(db)
    assert len(run["results"]["sample"]) == 20
    assert run["results"]["issues"] == {"level_mismatch": 300}
    assert db.execute("select count(*) from level_sync.sync_events where run_id = %s", [run["run_id"]]).fetchone() == (
        300,
    )
    assert db.execute("select count(*) from level_sync.sync_plan").fetchone() == (0,)


def test_inside_a_transaction_it_is_one_transaction(broken):
    broken.execute("begin")
    broken.execute("call level_sync.reconcile()")
    assert levels(broken, 1) == (6, 6)
    broken.execute("rollback")
    assert levels(broken, 1) == (6, 3)
    assert broken.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)
    assert broken.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)
    with broken.transaction():
        broken.execute("call level_sync.reconcile()")
    assert last_run(broken)["status"] == "success"


@pytest.mark.leftovers
@pytest.mark.parametrize("procedure", ["reconcile", "drain_queue", "purge", "maintain"])
@pytest.mark.parametrize(
    "statement",
    [
        "call level_sync.{}(); select 1 / 0",  # one string, one transaction
        "do $$ begin call level_sync.{}(); raise division_by_zero; exception when division_by_zero then raise; end $$",
        "select call_it('{}')",
    ],
)
def test_where_somebody_else_has_begun_the_transaction_it_is_part_of_it(broken, procedure, statement):
    """Nothing tells a procedure, least of all the time, when the transaction began with the same message."""
    broken.execute(
        "create function call_it(name text) returns void language plpgsql as $$ begin"
        "  execute format('call level_sync.%I()', name); perform 1 / 0; end $$"
    )
    with pytest.raises(psycopg.errors.DivisionByZero):
        broken.execute(statement.format(procedure))
    assert levels(broken, 1) == (6, 3)
    assert broken.execute("select count(*) from level_sync.sync_log").fetchone() == (0,)
    assert broken.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)


@pytest.mark.parametrize("prepare", [False, True], ids=["parsed each time", "prepared"])
def test_arguments_bound_on_the_server_leave_it_free_to_commit(broken, prepare):
    configure(broken, batch_size=1)
    broken.execute("call level_sync.reconcile(direction => %s)", ["progress_to_license"], prepare=prepare)
    repaired = last_run(broken)["synced_count"]
    assert repaired > 1
    transactions = "select count(distinct transaction_id) from level_sync.sync_events where run_id is not null"
    assert broken.execute(transactions).fetchone() == (repaired,)


def test_batches_are_committed_one_by_one(database, db):
    """The fourth batch is cancelled; what three did stands, and the next run does the rest."""
    configure(db, batch_size=10)
    add_pairs(db, 60)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    user_trigger(
        db,
        "before update on user_licenses",
        "if new.user_id = 35 then raise sqlstate '57014' using message = 'cancel'; end if",
    )
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("call level_sync.reconcile()")
    run = last_run(db)
    assert (run["status"], run["issues_found"], run["synced_count"]) == ("aborted", 60, 30)
    assert run["results"]["outcomes"] == {"repaired": 30, "planned": 30}
    assert [seen["outcome"] for seen in run["results"]["sample"]] == ["repaired"] * 20
    assert db.execute("select count(*) from user_licenses where current_level = 5").fetchone() == (30,)
    drop_user_trigger(db)
    rest = reconcile(db, plan=run["run_id"])
    assert (rest["issues_found"], rest["synced_count"]) == (30, 30)
    assert [seen["user_id"] for seen in rest["results"]["sample"]] == list(range(31, 51))


@pytest.mark.leftovers
def test_counts_of_a_run_are_those_of_all_its_batches(db):
    configure(db, batch_size=7)
    add_pairs(db, 70)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5 where student_id % 2 = 0")
        db.execute("delete from specialization_progress where student_id in (11, 51)")
        db.execute("delete from user_licenses where user_id in (13, 33, 53)")
    user_trigger(db, "before update on user_licenses", "if new.user_id in (2, 50) then raise 'closed'; end if")
    run = reconcile(db)
    assert (run["status"], run["issues_found"], run["synced_count"], run["failed_count"]) == ("partial", 40, 38, 2)
    assert run["results"]["issues"] == {"level_mismatch": 35, "missing_license": 3, "missing_progress": 2}
    assert run["results"]["actions"] == {"update_license": 35, "create_license": 3, "create_progress": 2}
    assert run["results"]["repairs"] == {"update_license": 33, "create_license": 3, "create_progress": 2}
    assert run["results"]["outcomes"] == {"repaired": 38, "failed": 2}
    outcomes = [(seen["user_id"], seen["outcome"]) for seen in run["results"]["sample"]]
    assert outcomes[:6] == [(2, "failed"), *((user, "repaired") for user in (4, 6, 8, 10, 11))]
    assert {outcome for _, outcome in outcomes[1:]} == {"repaired"}
    assert db.execute("select count(*) from level_sync.sync_plan").fetchone() == (0,)


@pytest.mark.leftovers
def test_pair_is_counted_as_what_the_plan_says_although_another_row_is_missing_now(db):
    """NULL is a level that adopted tables may have. A sample of 20 stays in the plan; this is the 30th pair."""
    configure(db, batch_size=7)
    add_pairs(db, 30)
    db.execute("alter table user_licenses alter column current_level drop not null")
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
        db.execute("update user_licenses set current_level = null where user_id = 30")
    dry = reconcile(db, dry_run=True)
    with bypass(db):
        delete(db, LICENSE, 30)
    run = reconcile(db, plan=dry["run_id"])
    assert levels(db, 30) == (5, 5)
    assert run["results"]["issues"] == dry["results"]["issues"] == {"level_mismatch": 30}
    assert run["results"]["repairs"] == {"update_license": 30}


def test_only_the_last_commit_of_a_run_waits_for_the_disk(db):
    """It makes the batches before it durable, too. In somebody's transaction nothing is changed about theirs."""
    configure(db, batch_size=1)
    add_pairs(db, 2)
    db.execute("create table public.waits (step text, setting text)")
    noted = "insert into public.waits values ('{}', current_setting('synchronous_commit'))"
    user_trigger(db, "before update on user_licenses", noted.format("repair"))
    user_trigger(
        db,
        "before update on level_sync.sync_log",
        noted.format("end"),
        condition="when (new.status <> 'running')",
        name="at_the_end",
    )
    for is_inside, expected in ((False, "off"), (True, "on")):
        with bypass(db):
            db.execute("update specialization_progress set current_level = current_level + 1")
            db.execute("truncate public.waits")
        with db.transaction() if is_inside else nullcontext():
            reconcile(db)
            assert db.execute("select * from public.waits").fetchall() == [("repair", expected)] * 2 + [("end", "on")]
            assert db.execute("show synchronous_commit").fetchone() == ("on",)


def test_progress_is_told_to_a_session_that_asks_and_to_no_other(database, db):
    configure(db, batch_size=20)
    add_pairs(db, 1000)
    with bypass(db):
        db.execute("update user_licenses set current_level = 2 where user_id <= 40")
    told: list[dict[str, Any]] = []
    db.add_notice_handler(lambda notice: told.append(json.loads(notice.message_detail or "{}")))
    reconcile(db)
    assert told == []
    with bypass(db):
        db.execute("update user_licenses set current_level = 2 where user_id <= 40")
        db.execute("delete from user_licenses where user_id > 998")  # the last user is that of either table
    internals.ask_for_progress(db)
    reconcile(db)
    looking = [(at["done"], at["total"]) for at in told if at["phase"] == "looking"]
    repairing = [(at["done"], at["total"]) for at in told if at["phase"] != "looking"]
    assert len(looking) > 1
    assert looking == sorted(looking)
    assert all(0 < done < total == 999 for done, total in looking)
    assert repairing == [(20, 42), (40, 42), (42, 42)]


def test_the_sample_shows_every_specialization_of_its_last_user(db):
    for specialization in ("COACH", "PLAYER"):
        add_pairs(db, 11, specialization=specialization)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 2")
    db.execute("call level_sync.reconcile()")
    shown = [(pair["user_id"], pair["specialization"], pair["outcome"]) for pair in last_run(db)["results"]["sample"]]
    assert shown == [(user, name, "repaired") for user in range(1, 11) for name in ("COACH", "PLAYER")]
