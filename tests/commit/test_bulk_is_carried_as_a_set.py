"""Bulk writes: every row is carried, what cannot be is queued, in at most 64 subtransactions.

Only those count that are not rolled back: the others leave PostgreSQL's cache at once, and so slow nobody down.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    add_pairs,
    bypass,
    configure,
    delete,
    drain,
    drop_user_trigger,
    events,
    levels,
    queued,
    user_trigger,
    wait_until,
)
from two_sessions import seconds

MANY = 2_000
FEW = 300  # for many rounds


@pytest.fixture
def size(request) -> int:
    """Rows of the largest writes: with --proof as many as DESIGN speaks of."""
    return 300_000 if request.config.getoption("proof") else 4_000


@pytest.fixture(autouse=True, scope="module")
def no_autovacuum(server) -> Iterator[None]:
    """Transaction ids are counted for the whole server, and ANALYZE takes one for each table."""
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute("alter system set autovacuum = off")
        admin.execute("select pg_reload_conf()")
        running = "select from pg_stat_activity where backend_type like 'autovacuum%'"
        wait_until(lambda: admin.execute(running).fetchall() == [])
        yield
        admin.execute("alter system reset autovacuum")
        admin.execute("select pg_reload_conf()")


def next_transaction_id(db) -> int:
    return int(db.execute("select pg_snapshot_xmax(pg_current_snapshot())::text").fetchone()[0])


def committed_since(db, first_id: int) -> int:
    """How many transactions and subtransactions have committed that had this id or a later one."""
    return db.execute(
        "select count(*) from generate_series(%s::bigint, %s::bigint) as id"
        " where pg_xact_status(id::text::xid8) = 'committed'",
        [first_id, next_transaction_id(db) - 1],
    ).fetchone()[0]


def used(db, *statements: str) -> int:
    """Runs the statements in one transaction and tells how many transaction ids that took and kept."""
    first_id = next_transaction_id(db)
    with db.transaction():
        for statement in statements:
            db.execute(statement)
    return committed_since(db, first_id)


def equal_pairs(db, level: int) -> int:
    return db.execute(
        "select count(*) from specialization_progress as p join user_licenses as l"
        "    on l.user_id = p.student_id and l.specialization_type = p.specialization_id"
        " where p.current_level = %s and l.current_level = %s",
        [level, level],
    ).fetchone()[0]


def refuse(db, table: str, *users: int) -> None:
    column = KEY[table][0]
    body = f"if new.{column} in ({', '.join(map(str, users))}) then raise 'not user %', new.{column}; end if"
    user_trigger(db, f"before update on {table}", body)


@BOTH
def test_all_but_the_three_that_fail_are_carried_and_those_are_queued(db, table, size):
    add_pairs(db, size)
    failing = [5, size // 2, size - 1]
    refuse(db, OTHER[table], *failing)
    assert used(db, f"update {table} set current_level = 6") <= 64 + 1
    assert equal_pairs(db, 6) == size - 3
    assert queued(db) == [(user, "PLAYER", SIDE[table], "level_changed", "P0001") for user in failing]
    messages = db.execute("select message from level_sync.sync_queue order by queue_id").fetchall()
    assert messages == [(f"not user {user}",) for user in failing]
    drop_user_trigger(db)
    drain(db)
    assert equal_pairs(db, 6) == size


@BOTH
def test_copy_of_many_rows_creates_the_other_side(db, users, table, size):
    users(size)
    columns = ", ".join((*KEY[table], "current_level"))
    first_id = next_transaction_id(db)
    with db.cursor() as cursor, cursor.copy(f"copy {table} ({columns}) from stdin") as copy:
        for user in range(1, size + 1):
            copy.write_row((user, "PLAYER", user % 8 + 1))
    assert committed_since(db, first_id) <= 64 + 1
    assert db.execute(f"select count(*) from {OTHER[table]}").fetchone() == (size,)
    assert sum(equal_pairs(db, level) for level in range(1, 9)) == size


@BOTH
@pytest.mark.parametrize("nestloop", ["on", "off"])
def test_triggers_of_the_application_are_planned_as_usual_within_a_set(db, users, table, nestloop):
    """How the set itself is planned would be ruinous for a query about one row."""
    db.execute("create table public.planned (mode text)")
    user_trigger(
        db,
        f"before insert or update on {OTHER[table]}",
        "insert into public.planned select concat_ws(' ', current_setting('plan_cache_mode'),"
        " current_setting('enable_nestloop'))",
    )
    db.execute(f"set enable_nestloop = {nestloop}")
    db.execute("set jit = off")  # every plan that cannot do without a nested loop would be compiled
    users(2000)
    key = ", ".join(KEY[table])
    db.execute(f"insert into {table} ({key}) select n, 'PLAYER' from generate_series(1, 2000) as n")
    db.execute(f"update {table} set current_level = 5")
    assert equal_pairs(db, 5) == 2000
    assert db.execute("select mode, count(*) from public.planned group by mode").fetchall() == [
        (f"auto {nestloop}", 4000)
    ]
    assert db.execute("show enable_nestloop").fetchone() == (nestloop,)


@BOTH
@pytest.mark.parametrize("inline_limit", [0, 1, 32, 40])
@pytest.mark.parametrize("rows", [1, 31, 33, 41, 65, 500])
def test_any_number_of_rows_takes_at_most_64_subtransactions(db, table, inline_limit, rows):
    configure(db, inline_limit=inline_limit)
    add_pairs(db, rows)
    assert used(db, f"update {table} set current_level = 5") <= 64 + 1
    assert equal_pairs(db, 5) == rows


@BOTH
@pytest.mark.parametrize("rows", [100, 198, 700])
def test_many_failures_are_queued_and_the_rest_is_carried(db, table, rows):
    """Every second pair fails. A hundred failures are told apart; what is left over is queued, never lost."""
    add_pairs(db, rows)
    refuse(db, OTHER[table], *range(1, rows + 1, 2))
    assert used(db, f"update {table} set current_level = 5") <= 64 + 1
    carried = equal_pairs(db, 5)
    assert carried >= min(rows // 2, 100)
    assert carried + len({entry[0] for entry in queued(db)}) == rows
    drop_user_trigger(db)
    drain(db)
    assert equal_pairs(db, 5) == rows


@BOTH
def test_one_row_at_a_time_is_carried_as_a_set_too(db, table):
    add_pairs(db, 300)
    column = KEY[table][0]
    assert used(db, *(f"update {table} set current_level = 4 where {column} = {n}" for n in range(1, 301))) <= 64 + 1
    assert equal_pairs(db, 4) == 300


@BOTH
def test_set_constraints_immediate_brings_the_carry_forward_again_and_again(db, table):
    add_pairs(db, MANY)
    first_id = next_transaction_id(db)
    with db.transaction():
        for level in range(4, 9):
            db.execute(f"update {table} set current_level = {level}")
            db.execute("set constraints all immediate")
            assert equal_pairs(db, level) == MANY
            if level % 2:
                db.execute("set constraints all deferred")
    assert committed_since(db, first_id) <= 64 + 1
    assert equal_pairs(db, 8) == MANY


@BOTH
@pytest.mark.leftovers
def test_a_transaction_of_many_rounds_stays_within_64_and_leaves_the_rest_to_the_drain(db, table):
    add_pairs(db, FEW)
    first_id = next_transaction_id(db)
    with db.transaction():
        for turn in range(30):
            db.execute(f"update {table} set current_level = {turn % 2 + 4}")
            db.execute("set constraints all immediate")
    assert committed_since(db, first_id) <= 64 + 1
    drain(db)
    assert equal_pairs(db, 5) == FEW
    assert queued(db) == []


@BOTH
def test_last_write_of_a_pair_wins_where_both_sides_were_written_in_bulk(db, table):
    add_pairs(db, MANY)
    other = OTHER[table]
    with db.transaction():
        db.execute(f"update {table} set current_level = 5")
        db.execute(f"update {other} set current_level = 7 where {KEY[other][0]} % 2 = 0")
    assert equal_pairs(db, 5) == equal_pairs(db, 7) == MANY // 2


@BOTH
def test_bulk_in_a_savepoint_rolled_back_leaves_nothing(db, table):
    add_pairs(db, MANY)
    db.execute("begin")
    db.execute("savepoint trial")
    db.execute(f"update {table} set current_level = 7")
    db.execute("rollback to savepoint trial")
    db.execute("commit")
    assert equal_pairs(db, 3) == MANY


def test_both_tables_in_one_statement_of_many_rows(db):
    add_pairs(db, MANY)
    db.execute(
        "with earned as (update specialization_progress set current_level = 5 where student_id % 2 = 0 returning 1)"
        " update user_licenses set current_level = 6 where user_id % 2 = 1"
    )
    assert equal_pairs(db, 5) == equal_pairs(db, 6) == MANY // 2


@BOTH
def test_upsert_of_many_rows_inserts_half_and_updates_half(db, users, table):
    add_pairs(db, MANY // 2)
    db.execute("insert into users (id) select n from generate_series(1, %s) as n on conflict do nothing", [MANY])
    key = ", ".join(KEY[table])
    db.execute(
        f"insert into {table} ({key}, current_level) select id, 'PLAYER', 6 from users"
        f" on conflict ({key}) do update set current_level = excluded.current_level"
    )
    assert equal_pairs(db, 6) == MANY


def test_many_pairs_move_together(db):
    add_pairs(db, MANY)
    with db.transaction():
        db.execute("update specialization_progress set specialization_id = 'COACH'")
        db.execute("update user_licenses set specialization_type = 'COACH'")
    assert equal_pairs(db, 3) == MANY
    assert levels(db, 7, "COACH") == (3, 3)


@BOTH
@pytest.mark.parametrize("on_delete", ["propagate", "recreate"])
def test_many_deletes_follow_the_setting(db, table, on_delete):
    configure(db, on_delete=on_delete)
    add_pairs(db, MANY)
    assert used(db, f"delete from {table}") <= 64 + 1
    assert equal_pairs(db, 3) == (MANY if on_delete == "recreate" else 0)


@BOTH
def test_actor_and_reason_stand_in_every_event_of_a_bulk_write(db, table):
    add_pairs(db, 200)
    with db.transaction():
        db.execute("select set_config('level_sync.actor', 'dean', true), set_config('level_sync.reason', 'june', true)")
        db.execute(f"update {table} set current_level = 5")
    told = db.execute(
        "select actor, reason, count(*), count(distinct transaction_id::text) from level_sync.sync_events"
        " where new_level = 5 group by actor, reason"
    ).fetchall()
    assert told == [("dean", "june", 200, 1)]
    assert len(events(db, 200)) == 2


def test_time_of_a_bulk_update_stays_near_that_of_the_best_by_hand(db, size, record_property):
    """A bound that only a plan gone wrong breaks; make bench measures. In turn: a machine is not always as fast."""
    add_pairs(db, size)

    def of_ours() -> float:
        db.execute("vacuum analyze specialization_progress, user_licenses")
        taken = seconds(db.execute, "update specialization_progress set current_level = 5")
        assert equal_pairs(db, 5) == size
        return taken

    def of_both_by_hand() -> float:
        db.execute("vacuum analyze specialization_progress, user_licenses")
        with bypass(db):
            return seconds(
                db.execute,
                "update specialization_progress set current_level = 6;"
                " update user_licenses as l set current_level = p.current_level,"
                " max_achieved_level = greatest(l.max_achieved_level, p.current_level),"
                " last_advanced_at = clock_timestamp()"
                " from specialization_progress as p"
                " where p.student_id = l.user_id and p.specialization_id = l.specialization_type",
            )

    ours, by_hand = map(min, zip(*((of_ours(), of_both_by_hand()) for _ in range(3)), strict=True))
    record_property(
        "figure", f"update of {size} levels {ours:.2f} s, by hand {by_hand:.2f} s, ratio {ours / by_hand:.1f}"
    )
    assert ours / by_hand < 10


def test_update_of_either_table_alone_carries_nothing_back(db):
    """The echo ends by value: one event a pair."""
    add_pairs(db, MANY)
    for table in (PROGRESS, LICENSE):
        db.execute("select count(*) from level_sync.sync_events")
        before = db.execute("select count(*) from level_sync.sync_events").fetchone()[0]
        db.execute(f"update {table} set current_level = current_level + 1")
        after = db.execute("select count(*) from level_sync.sync_events").fetchone()[0]
        assert after - before == MANY


@BOTH
def test_a_set_that_has_arrived_for_certain_is_not_looked_at_again(db, table):
    """Neither at the commit, nor in a drain, nor in a repair."""
    configure(db, inline_limit=0, conflict_policy=f"{SIDE[table]}_wins")
    internals.forbid_a_second_look(db)
    add_pairs(db, 10)
    db.execute(f"update {table} set current_level = 5")
    assert equal_pairs(db, 5) == 10
    with bypass(db):
        db.execute(f"update {table} set current_level = 4")
    db.execute(
        "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
        " select n, 'PLAYER', %s, 'level_changed', 'P0001', 'planted' from generate_series(1, 10) as n",
        [SIDE[table]],
    )
    drain(db)
    assert equal_pairs(db, 4) == 10
    with bypass(db):
        db.execute(f"update {table} set current_level = 3")
        delete(db, OTHER[table], 1)
    db.execute("call level_sync.reconcile()")
    assert equal_pairs(db, 3) == 10
    assert queued(db) == []
