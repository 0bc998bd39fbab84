"""Failures that were once found by trying to break it, each as the claim that was untrue."""

from __future__ import annotations

import time

import psycopg
import pytest
from psycopg import IsolationLevel

from academy import (
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    SIDE,
    add_pairs,
    bypass,
    configure,
    delete,
    drain,
    drop_user_trigger,
    insert,
    last_run,
    levels,
    queued,
    set_level,
    user_trigger,
)
from level_sync import install
from level_sync.verify import verify

GREATEST_ID = 2**63 - 1


@BOTH
@pytest.mark.parametrize("isolation", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_an_insert_over_a_pair_that_an_old_snapshot_still_sees_is_in_step_or_refused(database, db, table, isolation):
    add_pairs(db, 3, level=5)
    writer = database.connect(autocommit=False)
    writer.isolation_level = isolation
    writer.execute("select from users")
    with db.transaction():
        for gone in (PROGRESS, LICENSE):
            db.execute(f"delete from {gone} where {KEY[gone][0]} = 3")
    with pytest.raises(psycopg.errors.SerializationFailure):
        insert(writer, table, 3, 7)
    writer.rollback()
    assert levels(db, 3) == (None, None)
    insert(writer, table, 3, 7)  # as the message says: it succeeds when tried again
    writer.commit()
    assert levels(db, 3) == (7, 7)


@BOTH
@pytest.mark.parametrize("locked", ["settings", "specializations"])
def test_a_write_waits_for_no_table_that_only_level_sync_reads(database, db, table, locked):
    add_pairs(db, 2)
    holder = database.connect(autocommit=False)
    schema = "level_sync" if locked == "settings" else "public"
    holder.execute(f"lock table {schema}.{locked} in access exclusive mode")
    db.execute("set statement_timeout = '5s'")
    seconds = []
    for new_level in (4, 5, 6):  # a busy machine may delay one of them
        began = time.monotonic()
        set_level(db, table, 1, new_level)
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1
    assert db.execute("show lock_timeout").fetchone() == ("0",)
    holder.rollback()
    drain(db)
    assert levels(db, 1) == (6, 6)


@pytest.mark.leftovers
def test_a_chunk_that_fails_only_as_a_set_skips_no_pair(db):
    add_pairs(db, 1600)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    db.execute("""
        create function refuse_sets() returns trigger language plpgsql as $$
        begin
          if (select count(*) from written) > 1 then raise 'one at a time'; end if;
          return null;
        end $$""")
    db.execute(
        "create trigger refuse_sets after update on user_licenses referencing new table as written"
        " for each statement execute function refuse_sets()"
    )
    configure(db, batch_size=1600)
    db.execute("call level_sync.reconcile()")
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 1600)
    db.execute("drop trigger refuse_sets on user_licenses")


def test_a_drain_ends_though_held_pairs_come_due_again_meanwhile(database, db):
    configure(db, batch_size=1, retry_backoff="1 second")
    add_pairs(db, 50)
    holder = database.connect(autocommit=False)
    holder.execute("select from user_licenses for update")
    db.execute("update specialization_progress set current_level = 5")
    assert len(queued(db)) == 50
    db.execute("update level_sync.sync_queue set next_attempt_at = '-infinity'")
    user_trigger(
        db, "before update on level_sync.sync_queue", "perform pg_sleep(0.03)"
    )  # longer in all than the back-off
    db.execute("set statement_timeout = '20s'")
    db.execute("call level_sync.drain_queue()")
    assert db.execute("select max(attempts) from level_sync.sync_queue").fetchone() == (0,)
    db.execute("call level_sync.reconcile()")
    holder.rollback()
    drain(db)
    assert levels(db, 50) == (5, 5)


@BOTH
def test_a_drain_that_meets_an_uncommitted_insert_counts_no_attempt(database, db, table):
    add_pairs(db, 1)
    with bypass(db):
        db.execute(f"delete from {OTHER[table]}")
    side = "progress" if table == PROGRESS else "license"
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " values (1, 'PLAYER', %s, 'created', '55P03', 'held')",
        [side],
    )
    other = database.connect(autocommit=False)
    other.execute("set local session_replication_role = replica")
    other.execute(f"insert into {OTHER[table]} ({', '.join(KEY[OTHER[table]])}, current_level) values (1, 'PLAYER', 1)")
    for _ in range(4):
        drain(db)
    assert db.execute("select attempts, dead_at from level_sync.sync_queue").fetchall() == [(0, None)]
    other.rollback()
    drain(db)
    assert levels(db, 1) == (3, 3)
    assert queued(db) == []


@pytest.mark.leftovers
def test_a_row_without_a_pair_stops_no_run(db):
    add_pairs(db, 2)
    db.execute("alter table user_licenses drop constraint user_licenses_pkey")
    db.execute("alter table user_licenses alter column specialization_type drop not null")
    with bypass(db):
        db.execute("insert into user_licenses (user_id, specialization_type, current_level) values (1, null, 1)")
        set_level(db, PROGRESS, 2, 6)
    db.execute("call level_sync.reconcile()")
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 1)
    assert levels(db, 2) == (6, 6)
    ok, detail = db.execute("select ok, detail from level_sync.health where name = 'orphans'").fetchone()
    assert (ok, "user_licenses" in detail) == (False, True)


@pytest.mark.leftovers
def test_the_lowest_integer_as_level_is_a_desync_like_any_other(db):
    add_pairs(db, 1)
    db.execute("alter table specialization_progress drop constraint current_level_is_at_least_1")
    with bypass(db):
        set_level(db, PROGRESS, 1, -(2**31))
    assert db.execute("select difference from level_sync.desync_issues").fetchone() == (2**31 - 1,)
    db.execute("call level_sync.reconcile(direction => 'license_to_progress')")
    assert levels(db, 1) == (3, 3)


def test_highest_wins_takes_a_level_for_higher_than_none(db):
    configure(db, conflict_policy="highest_wins")
    add_pairs(db, 1)
    db.execute("alter table specialization_progress alter column current_level drop not null")
    with bypass(db):
        db.execute("update specialization_progress set current_level = null")
    db.execute("call level_sync.reconcile()")
    assert levels(db, 1) == (3, 3)


@pytest.mark.parametrize("told", ["on", "off"])
def test_ids_at_both_ends_of_bigint_are_walked(db, told):
    configure(db, batch_size=1)
    db.execute(f"set level_sync.tell_progress = '{told}'")
    for user in (-GREATEST_ID - 1, *range(1, 31), GREATEST_ID - 1, GREATEST_ID):
        db.execute("insert into users (id) values (%s)", [user])
        insert(db, PROGRESS, user, 3)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    db.execute("call level_sync.reconcile()")
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 33)


def test_undo_leaves_alone_only_the_row_that_may_not_go(db):
    db.execute("create table badges (user_id bigint, kind text, foreign key (user_id, kind) references user_licenses)")
    add_pairs(db, 3)
    with bypass(db):
        db.execute("delete from user_licenses")
    db.execute("call level_sync.reconcile()")
    db.execute("insert into badges values (2, 'PLAYER')")
    answer = db.execute("select level_sync.undo(1)").fetchone()[0]
    assert (answer["undone"], answer["left_alone"]) == (2, 1)
    assert "refused: user 2 in PLAYER" in answer["message"]
    assert [levels(db, user) for user in (1, 2, 3)] == [(3, None), (3, 3), (3, None)]
    db.execute("call level_sync.reconcile()")


@pytest.mark.leftovers
def test_the_event_of_an_undo_tells_the_level_that_came_out(db):
    add_pairs(db, 1, level=5)
    with bypass(db):
        set_level(db, PROGRESS, 1, 7)
    db.execute("call level_sync.reconcile()")
    db.execute("""
        create function one_less() returns trigger language plpgsql as $$
        begin new.current_level := 4; return new; end $$""")
    db.execute("create trigger one_less before update on user_licenses for each row execute function one_less()")
    db.execute("select level_sync.undo(1)")
    assert db.execute("select old_level, new_level from level_sync.sync_events where source = 'undo'").fetchone() == (
        7,
        4,
    )
    assert levels(db, 1) == (7, 4)


@pytest.mark.parametrize("inline_limit", [32, 0])
def test_update_progress_for_a_license_alone_takes_no_level_away(db, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pairs(db, 1, level=5)
    with bypass(db):
        db.execute("delete from specialization_progress")
    db.execute("select level_sync.update_progress(1, 'PLAYER', 1500, 6)")
    assert levels(db, 1) == (5, 5)


def test_a_function_of_an_older_version_is_gone_after_migrate(database, db):
    db.execute("create function level_sync._older(integer) returns integer language sql as 'select 1'")
    install.migrate(database.dsn)
    assert db.execute("select to_regproc('level_sync._older')").fetchone() == (None,)
    assert {check.name: check.ok for check in verify(database.dsn)}["shipped_functions"] is True


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03"])
@pytest.mark.parametrize("failures", [2, 3])
def test_a_drain_that_fails_for_a_moment_is_tried_three_times(db, state, failures):
    """SKIP LOCKED waits all the same for a row whose newer version is being written, up to lock_timeout."""
    add_pairs(db, 1)
    with bypass(db):
        set_level(db, PROGRESS, 1, 5)
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, next_attempt_at)"
        " values (1, 'PLAYER', 'progress', 'level_changed', '55P03', 'held', '-infinity')"
    )
    db.execute("create sequence tries")
    refusal = f"if nextval('public.tries') <= {failures} then raise sqlstate '{state}' using message = 'busy'; end if"
    user_trigger(db, "after delete on level_sync.sync_queue", refusal)
    if failures == 3:
        with pytest.raises(psycopg.Error, match="busy"):
            drain(db)
        assert (levels(db, 1), len(queued(db))) == ((5, 3), 1)
    drain(db)
    assert (levels(db, 1), queued(db)) == ((5, 5), [])


@BOTH
def test_a_queued_pair_whose_written_row_has_vanished_is_made_whole_by_the_drain(db, table):
    add_pairs(db, 1)
    user_trigger(db, f"before update on {OTHER[table]}", "raise 'not now'")
    set_level(db, table, 1, 5)
    drop_user_trigger(db)
    with bypass(db):
        delete(db, table, 1)
    drain(db)
    assert levels(db, 1) == (3, 3)
    assert queued(db) == []


@BOTH
def test_a_row_that_is_inserted_while_a_drain_would_make_it_keeps_its_level(database, db, table):
    add_pairs(db, 1)
    user_trigger(db, f"before update on {OTHER[table]}", "raise 'not now'")
    set_level(db, table, 1, 4)
    drop_user_trigger(db)
    with bypass(db):
        delete(db, OTHER[table], 1)
    # The row comes between the drain's look at the pair and its carry.
    inserted = {
        PROGRESS: "insert into public.specialization_progress (student_id, specialization_id, current_level)"
        " values (1, 'PLAYER', 7)",
        LICENSE: "insert into public.user_licenses (user_id, specialization_type, current_level, max_achieved_level)"
        " values (1, 'PLAYER', 7, 7)",
    }[OTHER[table]]
    db.execute("alter function level_sync._carry_pairs_that_can rename to _carry_pairs_that_can_at_once")
    db.execute(f"""
        create function level_sync._carry_pairs_that_can(
            user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint,
            subtransaction_limit integer, actors text[], reasons text[],
            out failed_numbers bigint[], out failed_sqlstates text[], out failed_messages text[])
          language plpgsql as $$
        begin
          set local session_replication_role = replica;
          {inserted};
          set local session_replication_role = origin;
          select * into failed_numbers, failed_sqlstates, failed_messages
            from level_sync._carry_pairs_that_can_at_once(user_ids, specializations, sides, changes, source, run_id,
                                                          subtransaction_limit, actors, reasons);
        end $$""")
    drain(db)
    assert levels(db, 1) == (7, 7)


@BOTH
@pytest.mark.parametrize("on_delete", ["propagate", "recreate"])
def test_a_row_that_came_back_unseen_while_its_deletion_was_queued_is_carried_as_an_insert(db, users, table, on_delete):
    users(1)
    insert(db, table, 1, 5)
    configure(db, on_delete=on_delete)
    event = f"before delete on {OTHER[table]}" if on_delete == "propagate" else f"before insert on {table}"
    user_trigger(db, event, "raise 'broken'")
    delete(db, table, 1)
    assert [entry[2:4] for entry in queued(db)] == [(SIDE[table], "deleted")]
    drop_user_trigger(db)
    db.execute("alter table user_licenses alter max_achieved_level set default 8")
    with bypass(db):
        insert(db, table, 1, 6)
    drain(db)
    assert levels(db, 1) == (6, 6)
