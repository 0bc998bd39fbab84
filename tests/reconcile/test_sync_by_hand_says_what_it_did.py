"""One pair or one user brought into step by hand: each function answers what it did, or why it did nothing."""

from __future__ import annotations

import time
from typing import Any

import psycopg
import pytest

from academy import (
    ACROSS,
    BOTH,
    KEY,
    LICENSE,
    OTHER,
    PROGRESS,
    SIDE,
    add_pair,
    break_target,
    call,
    drop_user_trigger,
    events,
    everything,
    level,
    levels,
    set_level,
    sync_by_hand,
    write_unseen,
)
from two_sessions import AT_ONCE, seconds


def bypass_level(db: psycopg.Connection[Any], table: str, user: int, new_level: int) -> None:
    if table == LICENSE:
        write_unseen(db, "update user_licenses set max_achieved_level = 8 where user_id = %s", user)
    user_column, _ = KEY[table]
    write_unseen(db, f"update {table} set current_level = %s where {user_column} = %s", new_level, user)


@BOTH
def test_sync_updates_the_side_that_differs(db, table):
    add_pair(db, 1, level=3)
    bypass_level(db, table, 1, 5)
    side, other = SIDE[table], SIDE[OTHER[table]]
    assert sync_by_hand(db, table, 1) == {
        "success": True,
        "action": "updated",
        "user_id": 1,
        "specialization": "PLAYER",
        "direction": f"{side}_to_{other}",
        "old_level": 3,
        "new_level": 5,
        "message": f"{other} level 3 -> 5",
    }
    assert levels(db, 1) == (5, 5)
    assert events(db, 1)[-1] == (ACROSS[table], "updated", 3, 5, "manual")


@BOTH
def test_sync_by_hand_may_demote(db, table):
    add_pair(db, 1, level=6)
    bypass_level(db, table, 1, 2)
    assert sync_by_hand(db, table, 1)["new_level"] == 2
    assert levels(db, 1) == (2, 2)
    highest = 8 if table == LICENSE else 6  # bypass_level raises it
    assert db.execute("select max_achieved_level from user_licenses").fetchone() == (highest,)


@BOTH
def test_sync_creates_the_row_that_is_missing(db, table):
    add_pair(db, 1, level=3)
    write_unseen(db, f"delete from {OTHER[table]}")
    answer = sync_by_hand(db, table, 1)
    assert (answer["success"], answer["action"], answer["old_level"], answer["new_level"]) == (True, "created", None, 3)
    assert answer["message"] == f"{SIDE[OTHER[table]]} created at level 3"
    assert levels(db, 1) == (3, 3)
    assert events(db, 1)[-1] == (ACROSS[table], "created", None, 3, "manual")


@BOTH
def test_sync_of_equal_sides_does_nothing_and_says_so(db, table):
    add_pair(db, 1, level=3)
    before = everything(db)
    answer = sync_by_hand(db, table, 1)
    assert (answer["success"], answer["action"], answer["old_level"], answer["new_level"]) == (True, "none", 3, 3)
    assert answer["message"] == "both sides already have level 3"
    assert everything(db) == before


@BOTH
def test_sync_without_a_source_row_fails_with_a_message_and_deletes_nothing(db, table):
    add_pair(db, 1, level=3)
    write_unseen(db, f"delete from {table}")
    answer = sync_by_hand(db, table, 1)
    assert (answer["success"], answer["action"]) == (False, "none")
    assert answer["message"] == f"user 1 has no {SIDE[table]} in PLAYER: nothing to carry"
    assert level(db, OTHER[table], 1) == 3
    write_unseen(db, f"delete from {OTHER[table]}")


@BOTH
def test_sync_does_not_spread_an_old_level_that_is_out_of_range(db, table):
    add_pair(db, 1, level=3)
    bypass_level(db, table, 1, 8)
    db.execute("update specializations set max_levels = 5 where id = 'PLAYER'")
    answer = sync_by_hand(db, table, 1)
    assert (answer["success"], answer["action"]) == (False, "none")
    assert "level 8 of user 1 in PLAYER is out of range: allowed is 1 to 5; correct it first" in answer["message"]
    assert level(db, OTHER[table], 1) == 3
    bypass_level(db, table, 1, 3)


@BOTH
def test_sync_against_a_failing_trigger_answers_with_its_error(db, table):
    add_pair(db, 1, level=3)
    bypass_level(db, table, 1, 5)
    break_target(db, table, when="insert or update")
    before = everything(db)
    answer = sync_by_hand(db, table, 1)
    assert (answer["success"], answer["action"], answer["old_level"], answer["new_level"]) == (False, "none", 3, 3)
    assert answer["message"] == "closed for stocktaking (SQLSTATE P0001)"
    assert everything(db) == before
    drop_user_trigger(db)
    assert sync_by_hand(db, table, 1)["success"] is True


def test_sync_gives_up_a_held_row_after_its_lock_timeout(database, db):
    add_pair(db, 1, level=3)
    bypass_level(db, PROGRESS, 1, 5)
    holder = database.connect(autocommit=False)
    holder.execute("select from user_licenses for update")
    began = time.monotonic()
    answer = sync_by_hand(db, PROGRESS, 1)
    assert 1.5 < time.monotonic() - began < AT_ONCE
    assert (answer["success"], answer["action"], answer["new_level"]) == (False, "none", 3)
    assert "55P03" in answer["message"]
    holder.rollback()
    assert sync_by_hand(db, PROGRESS, 1)["action"] == "updated"


@BOTH
def test_sync_of_null_is_an_error(db, table):
    for user, specialization in [(None, "PLAYER"), (1, None), (None, None)]:
        with pytest.raises(psycopg.errors.NullValueNotAllowed, match="must both be given"):
            sync_by_hand(db, table, user, specialization)


@BOTH
def test_sync_of_an_unknown_user_fails_with_a_message(db, table):
    add_pair(db, 1)
    for user in [2, -(2**63), 2**63 - 1]:
        answer = sync_by_hand(db, table, user)
        assert (answer["success"], answer["action"]) == (False, "none")
        assert f"user {user} has no {SIDE[table]} in PLAYER" in answer["message"]


@BOTH
def test_sync_names_its_actor_and_forgets_him(db, table):
    add_pair(db, 1, level=3)
    bypass_level(db, table, 1, 5)
    with db.transaction():
        call(db, f"select level_sync.sync_{ACROSS[table]}(1, 'PLAYER', synced_by => 'night shift')")
        set_level(db, table, 1, 6)
    actors = db.execute("select actor from level_sync.sync_events where action = 'updated' order by event_id")
    assert actors.fetchall() == [("night shift",), (None,)]


@BOTH
def test_sync_user_carries_every_specialization_and_counts(db, table):
    for specialization, start in [("PLAYER", 3), ("COACH", 3), ("INTERNSHIP", 2)]:
        add_pair(db, 1, specialization, start)
    add_pair(db, 2, level=3)
    write_unseen(db, "update user_licenses set max_achieved_level = 8")
    write_unseen(db, f"update {table} set current_level = 5 where current_level = 3")
    write_unseen(db, f"delete from {OTHER[table]} where current_level = 2")
    answer = call(db, "select level_sync.sync_user(1, %s)", ACROSS[table])
    assert (answer["success"], answer["created"], answer["updated"], answer["none"]) == (True, 1, 2, 0)
    assert [(pair["specialization"], pair["action"]) for pair in answer["pairs"]] == [
        ("COACH", "updated"),
        ("INTERNSHIP", "created"),
        ("PLAYER", "updated"),
    ]
    assert [levels(db, 1, name) for name in ("PLAYER", "COACH", "INTERNSHIP")] == [(5, 5), (5, 5), (2, 2)]
    assert set(levels(db, 2)) == {3, 5}
    write_unseen(db, "update specialization_progress set current_level = 5 where student_id = 2")
    write_unseen(db, "update user_licenses set current_level = 5, max_achieved_level = 5 where user_id = 2")


def test_sync_user_follows_progress_unless_told_otherwise(db):
    add_pair(db, 1, level=3)
    bypass_level(db, PROGRESS, 1, 5)
    assert call(db, "select level_sync.sync_user(1)")["direction"] == "progress_to_license"
    assert levels(db, 1) == (5, 5)


def test_sync_user_is_no_success_where_one_pair_failed(db):
    add_pair(db, 1, "PLAYER", 3)
    add_pair(db, 1, "COACH", 3)
    write_unseen(db, "delete from specialization_progress where specialization_id = 'COACH'")
    bypass_level(db, PROGRESS, 1, 5)
    answer = call(db, "select level_sync.sync_user(1, 'progress_to_license')")
    assert (answer["success"], answer["updated"], answer["none"]) == (False, 1, 1)
    assert levels(db, 1) == (5, 5)
    call(db, "select level_sync.sync_user(1, 'license_to_progress')")


def test_sync_user_gives_up_sooner_than_a_deadlock_is_looked_for(database, db):
    """Else an application that holds some rows of the user and wants others might be the one that fails."""
    for specialization in ("COACH", "INTERNSHIP", "PLAYER"):
        add_pair(db, 1, specialization, 2)
        write_unseen(db, "update specialization_progress set current_level = 3")
    application = database.connect(autocommit=False)
    application.execute("update specialization_progress set total_xp = 1 where specialization_id <> 'COACH'")
    application.execute("update user_licenses set started_at = now() where specialization_type <> 'COACH'")
    answer = call(db, "select level_sync.sync_user(1)")
    assert [pair["success"] for pair in answer["pairs"]] == [True, False, False]
    waited = [seconds(call, db, "select level_sync.sync_user(1)") for _ in range(3)]
    assert min(waited) < 1  # as deadlock_timeout; a busy machine may delay some of them
    application.rollback()
    assert call(db, "select level_sync.sync_user(1)")["success"]


def test_sync_user_without_any_pair_is_a_success_of_nothing(db, users):
    users(1)
    answer = call(db, "select level_sync.sync_user(1)")
    assert (answer["success"], answer["created"], answer["updated"], answer["none"]) == (True, 0, 0, 0)
    assert answer["pairs"] == []


def test_sync_user_names_an_unknown_user(db, users):
    users(1)
    for user in [2, -1, 2**63 - 1, None]:
        with pytest.raises(psycopg.errors.NoDataFound, match=f"there is no user {'NULL' if user is None else user}"):
            call(db, "select level_sync.sync_user(%s)", user)


def test_sync_user_names_an_unknown_direction(db, users):
    users(1)
    for direction in [None, "", "up", "progress_to_license; drop table users"]:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="unknown direction") as refusal:
            call(db, "select level_sync.sync_user(1, %s)", direction)
        assert refusal.value.diag.message_hint == "Use progress_to_license or license_to_progress."
