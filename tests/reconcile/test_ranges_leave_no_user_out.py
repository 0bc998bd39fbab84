"""Users are walked range by range: each ends where there is enough for one look, and leaves nobody out."""

from __future__ import annotations

import pytest

import internals
from academy import BOTH, KEY, LICENSE, OTHER, PROGRESS, bypass, configure, insert, last_run


@pytest.mark.leftovers
def test_an_estimated_range_ends_with_a_user_that_fills_it_and_the_last_one_is_open(db):
    """What is inserted above the newest user meanwhile belongs to the last range."""
    db.execute(
        "insert into specializations (id) select 'S' || n from generate_series(1, 10) as n on conflict do nothing"
    )
    db.execute("insert into users (id) select n from generate_series(1, 500) as n")
    db.execute(
        f"insert into {PROGRESS} (student_id, specialization_id)"
        " select users.id, known.id from users, specializations as known"
    )
    with bypass(db):
        db.execute(f"delete from {LICENSE} where user_id > 250")  # the newest users have one side only
    db.execute(f"analyze {PROGRESS}, {LICENSE}")
    ranges = [(7, 1), (300, 1), (500, 1), (1, 100000)]
    assert [internals.end_of_range(db, *each) for each in ranges] == [7, 300, None, None]


def test_ranges_that_are_estimated_leave_no_user_out(db):
    """Dense, sparse and far apart: after ANALYZE the planner's estimate says where a range ends."""
    configure(db, batch_size=20)
    with bypass(db):
        db.execute(
            "insert into users (id)"
            " select n from generate_series(1, 3000) as n"
            " union select 10000 + n * 1000003 from generate_series(1, 500) as n"
            " union select 900000000000 + n from generate_series(1, 2000) as n"
        )
        db.execute(f"insert into {PROGRESS} (student_id, specialization_id) select id, 'PLAYER' from users")
    db.execute(f"insert into {LICENSE} (user_id, specialization_type) select id, 'COACH' from users")
    db.execute(f"analyze {PROGRESS}, {LICENSE}")
    ranges, first = 0, -(2**63)
    while first is not None:
        last = internals.end_of_range(db, first, 200)
        held = db.execute(
            f"select count(*) from {PROGRESS} where student_id between %s and coalesce(%s, 9223372036854775807)",
            [first, last],
        ).fetchone()
        assert held is not None
        assert held[0] <= 4000
        ranges, first = ranges + 1, None if last is None else last + 1
    assert ranges > 10
    db.execute("call level_sync.reconcile(dry_run => true)")
    assert last_run(db)["issues_found"] == 5500
    db.execute("call level_sync.reconcile()")
    assert last_run(db)["synced_count"] == 5500


@BOTH
@pytest.mark.leftovers
@pytest.mark.parametrize("is_analyzed", [False, True], ids=["counted", "estimated"])
def test_a_range_ends_where_one_side_has_enough_although_the_other_ended_before(db, users, table, is_analyzed):
    users(10_000)
    with bypass(db):
        for side, last in ((table, 10_000), (OTHER[table], 20)):
            db.execute(f"alter table {side} set (autovacuum_enabled = off)")
            db.execute(
                f"insert into {side} ({', '.join(KEY[side])}) select id, 'PLAYER' from users where id <= %s", [last]
            )
        if is_analyzed:
            db.execute(f"analyze {table}, {OTHER[table]}")
        db.execute(f"delete from {table} where {KEY[table][0]} between 501 and 9000")  # Statistics do not know of it.
    end = internals.end_of_range(db, 0, 1000)
    assert 500 <= end <= 2500 if is_analyzed else end == 9501


@BOTH
@pytest.mark.leftovers
def test_a_range_that_is_counted_ends_where_the_denser_side_has_enough(db, users, table):
    users(100)
    with bypass(db):
        for side, specializations in ((table, ["COACH", "INTERNSHIP", "PLAYER"]), (OTHER[table], ["PLAYER"])):
            db.execute(f"alter table {side} set (autovacuum_enabled = off)")
            db.execute(
                f"insert into {side} ({', '.join(KEY[side])}) select id, unnest(%s::text[]) from users",
                [specializations],
            )
    assert internals.end_of_range(db, 0, 30) == 11


GREATEST_ID = 2**63 - 1


@pytest.mark.parametrize("told", ["on", "off"])
def test_ids_at_both_ends_of_bigint_are_walked(db, told):
    configure(db, batch_size=1)
    internals.ask_for_progress(db, told)
    for user in (-GREATEST_ID - 1, *range(1, 31), GREATEST_ID - 1, GREATEST_ID):
        db.execute("insert into users (id) values (%s)", [user])
        insert(db, PROGRESS, user, 3)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 5")
    db.execute("call level_sync.reconcile()")
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 33)
