"""A drain computes each queued pair anew from the live rows, and tells the pairs that fail apart."""

from __future__ import annotations

import psycopg
import pytest

import internals
from academy import (
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    SIDE,
    add_pair,
    add_pairs,
    break_target,
    bypass,
    configure,
    delete,
    drain,
    drop_user_trigger,
    events,
    insert,
    level,
    levels,
    queued,
    set_level,
    user_trigger,
)


@BOTH
def test_of_two_entries_of_one_moment_the_later_one_knows_the_side(db, table):
    add_pair(db, 1, level=6)
    with bypass(db):
        set_level(db, table, 1, 5)
    for side in (SIDE[OTHER[table]], SIDE[table]):
        db.execute(
            "insert into level_sync.sync_queue (queued_at, user_id, specialization, side, change, sqlstate, message)"
            " values ('2026-01-01', 1, 'PLAYER', %s, 'level_changed', '55P03', 'held')",
            [side],
        )
    drain(db)
    assert levels(db, 1) == (5, 5)


@BOTH
def test_queue_holds_pairs_and_the_drain_reads_the_live_rows(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    set_level(db, table, 1, 6)
    assert len(queued(db)) == 2
    columns = db.execute(
        "select string_agg(attname, ' ') from pg_attribute where attrelid = 'level_sync.sync_queue'::regclass"
    )
    assert "level" not in columns.fetchone()[0]
    db.execute("set session_replication_role = replica")
    set_level(db, table, 1, 4)
    db.execute("reset session_replication_role")
    drop_user_trigger(db)
    drain(db)
    assert levels(db, 1) == (4, 4)
    assert events(db, 1)[-1][2:4] == (3, 4)


@BOTH
def test_entry_whose_pair_is_equal_by_now_is_dropped_without_an_event(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    drop_user_trigger(db)
    set_level(db, OTHER[table], 1, 6)
    assert levels(db, 1) == (6, 6)
    told = events(db, 1)
    drain(db)
    assert queued(db) == []
    assert events(db, 1) == told


@BOTH
def test_side_written_last_wins_where_both_were_queued(db, table):
    add_pair(db, 1, level=3)
    for side in KEY:
        user_trigger(
            db, f"before update on {side}", "if pg_trigger_depth() > 1 then raise 'no'; end if", name=f"no_{side}"
        )
    set_level(db, OTHER[table], 1, 4)
    set_level(db, table, 1, 7)
    assert len(queued(db)) == 2
    for side in KEY:
        drop_user_trigger(db, f"no_{side}")
    drain(db)
    assert levels(db, 1) == (7, 7)


@BOTH
def test_pair_deleted_on_both_sides_meanwhile_leaves_the_queue(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    with db.transaction():
        delete(db, PROGRESS, 1)
        delete(db, LICENSE, 1)
    drain(db)
    assert queued(db) == []
    assert levels(db, 1) == (None, None)


def attempt(db) -> tuple[int, float, bool]:
    """(attempts, seconds until the next one, dead) of the one entry."""
    return db.execute("""
        select attempts, round(extract(epoch from next_attempt_at - clock_timestamp()))::float, dead_at is not null
          from level_sync.sync_queue
    """).fetchone()


@BOTH
@pytest.mark.leftovers
def test_back_off_doubles_and_after_max_attempts_the_pair_is_dead(db, table):
    configure(db, retry_backoff="100 seconds", max_attempts=3)
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    for attempts, seconds, dead in ((1, 100, False), (2, 200, False), (3, 400, True)):
        drain(db)
        found = attempt(db)
        assert (found[0], found[2]) == (attempts, dead)
        assert found[1] == pytest.approx(seconds, abs=5)
        db.execute("call level_sync.drain_queue()")  # not due yet: nothing happens
        assert attempt(db)[0] == attempts
    drop_user_trigger(db)
    drain(db)
    assert level(db, OTHER[table], 1) == 3  # dead: it waits for a person
    assert db.execute("select level_sync.requeue()").fetchone() == (1,)
    db.execute("call level_sync.drain_queue()")
    assert levels(db, 1) == (5, 5)
    assert queued(db) == []


@BOTH
def test_new_write_of_a_dead_pair_is_carried_and_takes_its_entry_along(db, table):
    configure(db, max_attempts=1)
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    drain(db)
    assert attempt(db)[2] is True
    set_level(db, table, 1, 6)
    drop_user_trigger(db)
    drain(db)
    assert levels(db, 1) == (6, 6)
    assert queued(db) == []


@BOTH
def test_drain_commits_batch_by_batch(database, db, users, table):
    """The third batch fails for good; what the first two did stands."""
    configure(db, batch_size=10)
    add_pairs(db, 30)
    break_target(db, table)
    db.execute(f"update {table} set current_level = 5")
    drop_user_trigger(db)
    db.execute(
        "update level_sync.sync_queue set next_attempt_at = clock_timestamp() - make_interval(secs => 100 - user_id)"
    )
    user_trigger(
        db,
        f"before update on {OTHER[table]}",
        f"if new.{KEY[OTHER[table]][0]} = 25 then raise sqlstate '57014'; end if",
    )
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("call level_sync.drain_queue()")
    assert db.execute(f"select count(*) from {OTHER[table]} where current_level = 5").fetchone() == (20,)
    drop_user_trigger(db)
    drain(db)


@BOTH
def test_drain_inside_a_transaction_is_one_transaction(db, table):
    add_pair(db, 1, level=3)
    break_target(db, table)
    set_level(db, table, 1, 5)
    drop_user_trigger(db)
    db.execute("begin")
    db.execute("call level_sync.drain_queue()")
    assert levels(db, 1) == (5, 5)
    db.execute("rollback")
    assert level(db, OTHER[table], 1) == 3
    drain(db)


@BOTH
def test_one_pair_that_fails_does_not_hold_up_the_others_of_its_batch(db, users, table):
    add_pairs(db, 100)
    break_target(db, table)
    db.execute(f"update {table} set current_level = 5")
    drop_user_trigger(db)
    column = KEY[OTHER[table]][0]
    break_target(db, table, f"if new.{column} in (7, 70) then raise 'not {column}'; end if")
    drain(db)
    assert [entry[0] for entry in queued(db)] == [7, 70]
    assert db.execute(f"select count(*) from {OTHER[table]} where current_level = 5").fetchone() == (98,)
    drop_user_trigger(db)
    drain(db)


@BOTH
def test_deferred_trigger_of_the_application_that_fails_is_told_apart_in_a_drain(db, users, table):
    """It fires inside the batch, not at its COMMIT, where it would take the others with it."""
    add_pairs(db, 20)
    break_target(db, table)
    db.execute(f"update {table} set current_level = 5")
    drop_user_trigger(db)
    column = KEY[OTHER[table]][0]
    db.execute(f"""
        create function late() returns trigger language plpgsql as $$
        begin
          if new.{column} = 7 then raise 'too late'; end if;
          return null;
        end $$;
        create constraint trigger late after update on {OTHER[table]} deferrable initially deferred
          for each row execute function late();
    """)
    drain(db)
    assert [(entry[0], entry[4]) for entry in queued(db)] == [(7, "P0001")]
    db.execute("drop function late() cascade")
    drain(db)


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
    internals.before_a_set_is_carried(db, inserted)
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
