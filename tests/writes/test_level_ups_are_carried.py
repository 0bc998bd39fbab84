"""XP and exams bring levels: each function answers in jsonb, or raises an error that says what was wrong."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from academy import (
    BULK,
    LICENSE,
    PROGRESS,
    add_pair,
    add_pairs,
    break_target,
    bypass,
    call,
    configure,
    everything,
    levels,
    queued,
    set_level,
    sync_by_hand,
    user_trigger,
    write_unseen,
)

UPDATE = "select level_sync.update_progress(%s, %s, %s, %s, %s)"
ADVANCE = "select level_sync.advance_license(%s, %s, %s, %s, %s)"
HOSTILE = ["'; drop table users; --", "PLAYER\n", "%s %I", "\u202eREYALP", "名", "x" * 100_000, ""]


def update_progress(
    db: psycopg.Connection[Any],
    student: int | None,
    xp: int | None = 0,
    sessions: int | None = 0,
    projects: int | None = 0,
    specialization: str | None = "PLAYER",
) -> Any:
    return call(db, UPDATE, student, specialization, xp, sessions, projects)


def advance(
    db: psycopg.Connection[Any],
    user: int | None,
    target: int | None,
    by: str | None = None,
    reason: str | None = None,
    specialization: str | None = "PLAYER",
) -> Any:
    return call(db, ADVANCE, user, specialization, target, by, reason)


# update_progress


def test_a_total_that_no_column_holds_is_refused_with_the_total(db):
    add_pair(db, 1, level=1)
    update_progress(db, 1, xp=1, sessions=1, projects=1)
    for beyond in ({"xp": 2**63 - 1}, {"sessions": 2**31 - 1}, {"projects": 2**31 - 1}):
        with pytest.raises(
            psycopg.errors.NumericValueOutOfRange, match=f"student 1 .* {2**63 if 'xp' in beyond else 2**31}"
        ):
            update_progress(db, 1, **beyond)


def test_several_level_ups_come_at_once_where_xp_and_sessions_reach_that_far(db):
    add_pair(db, 1, level=1)
    answer = update_progress(db, 1, xp=5200, sessions=30, projects=2)
    assert answer.pop("sync_result")["action"] == "updated"
    assert answer == {
        "success": True,
        "student_id": 1,
        "specialization_id": "PLAYER",
        "leveled_up": True,
        "old_level": 1,
        "new_level": 4,
        "level_name": "Celestial River",
        "total_xp": 5200,
        "completed_sessions": 30,
        "completed_projects": 2,
    }
    assert levels(db, 1) == (4, 4)
    row = db.execute("select total_xp, completed_sessions, completed_projects from specialization_progress").fetchone()
    assert row == (5200, 30, 2)


def test_the_threshold_itself_is_enough_and_one_less_is_not(db):
    add_pair(db, 1, level=1)
    assert update_progress(db, 1, xp=999, sessions=5)["leveled_up"] is False
    assert update_progress(db, 1, xp=1)["leveled_up"] is True
    assert levels(db, 1) == (2, 2)


def test_level_ups_stop_at_a_rung_whose_sessions_are_missing(db):
    add_pair(db, 1, level=1)
    answer = update_progress(db, 1, xp=100_000, sessions=14)
    assert (answer["old_level"], answer["new_level"]) == (1, 2)
    assert update_progress(db, 1, sessions=1)["new_level"] == 3


def test_a_later_rung_within_reach_does_not_jump_over_one_that_is_not(db):
    add_pair(db, 1, level=1)
    db.execute(
        "update specialization_levels set required_sessions = 0 where level = 5 and specialization_id = 'PLAYER'"
    )
    assert update_progress(db, 1, xp=100_000, sessions=14)["new_level"] == 2


def test_level_ups_stop_at_max_levels(db):
    add_pair(db, 1, level=1)
    db.execute("update specializations set max_levels = 3 where id = 'PLAYER'")
    assert update_progress(db, 1, xp=10**9, sessions=10**6)["new_level"] == 3
    assert levels(db, 1) == (3, 3)


def test_without_max_levels_the_ladder_itself_is_the_end(db):
    add_pair(db, 1, level=1)
    db.execute("update specializations set max_levels = null where id = 'PLAYER'")
    assert update_progress(db, 1, xp=10**9, sessions=10**6)["new_level"] == 8


def test_level_ups_stop_at_a_gap_in_the_ladder(db):
    add_pair(db, 1, level=1)
    db.execute("delete from specialization_levels where specialization_id = 'PLAYER' and level = 4")
    assert update_progress(db, 1, xp=10**9, sessions=10**6)["new_level"] == 3


def test_a_specialization_without_a_ladder_only_counts(db, users):
    users(1)
    db.execute("insert into specializations (id, max_levels) values ('REFEREE', 5)")
    answer = update_progress(db, 1, xp=10**6, sessions=100, specialization="REFEREE")
    assert (answer["new_level"], answer["leveled_up"], answer["total_xp"]) == (1, False, 10**6)


def test_negative_xp_corrects_the_total_and_never_demotes(db):
    add_pair(db, 1, level=1)
    update_progress(db, 1, xp=2500, sessions=15)
    answer = update_progress(db, 1, xp=-2400, sessions=-15)
    assert (answer["total_xp"], answer["old_level"], answer["new_level"], answer["leveled_up"]) == (100, 3, 3, False)
    assert levels(db, 1) == (3, 3)


def test_a_level_above_what_xp_reaches_is_kept(db):
    add_pair(db, 1, level=6)
    assert update_progress(db, 1, xp=1000, sessions=5)["new_level"] == 6


def test_each_student_has_totals_of_their_own_in_each_specialization(db):
    for user in (1, 2):
        db.execute("insert into users (id) values (%s)", [user])
    pairs = [(1, "PLAYER"), (1, "COACH"), (2, "PLAYER"), (2, "COACH")]
    for user, specialization in pairs + pairs:
        xp = 100 * user + len(specialization)
        answer = update_progress(db, user, xp=xp, sessions=user, specialization=specialization)
    totals = (
        "select student_id, specialization_id, total_xp, completed_sessions from specialization_progress order by 3"
    )
    assert db.execute(totals).fetchall() == [
        (1, "COACH", 210, 2),
        (1, "PLAYER", 212, 2),
        (2, "COACH", 410, 4),
        (2, "PLAYER", 412, 4),
    ]
    assert (answer["student_id"], answer["total_xp"]) == (2, 410)


def test_xp_adds_up_and_sets_last_activity(db):
    add_pair(db, 1, level=1)
    update_progress(db, 1, xp=10)
    before = db.execute("select clock_timestamp()").fetchone()
    update_progress(db, 1, xp=20, projects=3)
    row = db.execute("select total_xp, completed_projects, last_activity > %s from specialization_progress", before)
    assert row.fetchone() == (30, 3, True)


def test_a_first_activity_creates_the_progress_and_the_license(db, users):
    users(1)
    answer = update_progress(db, 1, xp=1000, sessions=5)
    assert (answer["old_level"], answer["new_level"]) == (1, 2)
    assert answer["sync_result"]["action"] == "created"
    assert levels(db, 1) == (2, 2)


def test_a_first_activity_does_not_demote_a_license_that_is_there(db):
    add_pair(db, 1, level=4)
    write_unseen(db, "delete from specialization_progress")
    answer = update_progress(db, 1, xp=10)
    assert answer["new_level"] == 4
    assert levels(db, 1) == (4, 4)


def test_a_total_below_zero_is_refused(db):
    add_pair(db, 1, level=1)
    update_progress(db, 1, xp=10, sessions=5, projects=1)
    before = everything(db)
    for too_little in [{"xp": -11}, {"sessions": -6}, {"projects": -2}]:
        with pytest.raises(psycopg.errors.CheckViolation, match="student 1 in PLAYER would have a total below zero"):
            update_progress(db, 1, **too_little)
        assert everything(db) == before


def test_an_unknown_student_is_named(db):
    add_pair(db, 1)
    before = everything(db)
    for student in [2, -1, 2**63 - 1, None]:
        with pytest.raises(
            psycopg.errors.NoDataFound, match=f"there is no student {'NULL' if student is None else student}"
        ):
            update_progress(db, student, xp=10)
        assert everything(db) == before


def test_an_unknown_specialization_is_named_with_the_known_ones(db):
    add_pair(db, 1)
    before = everything(db)
    for specialization in [*HOSTILE, None, "player"]:
        with pytest.raises(psycopg.errors.NoDataFound, match="there is no specialization") as refusal:
            update_progress(db, 1, xp=10, specialization=specialization)
        assert refusal.value.diag.message_hint == "Known are COACH, INTERNSHIP, PLAYER."
        assert everything(db) == before


def test_null_is_not_a_number_of_points(db):
    add_pair(db, 1)
    before = everything(db)
    for nothing in [{"xp": None}, {"sessions": None}, {"projects": None}]:
        with pytest.raises(psycopg.errors.NullValueNotAllowed, match="must be numbers, not NULL"):
            update_progress(db, 1, **nothing)
        assert everything(db) == before


def test_a_total_too_large_to_count_is_an_error_and_nothing_is_written(db):
    add_pair(db, 1)
    update_progress(db, 1, xp=1, sessions=1, projects=1)
    before = everything(db)
    for huge in [{"xp": 2**63 - 1}, {"sessions": 2**31 - 1}, {"projects": 2**31 - 1}]:
        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            update_progress(db, 1, **huge)
        assert everything(db) == before


def test_a_mistake_corrected_below_zero_tells_totals_also_where_the_columns_are_empty(db):
    add_pair(db, 1)
    db.execute("alter table specialization_progress alter column total_xp drop not null")
    db.execute("update specialization_progress set total_xp = null")
    with pytest.raises(psycopg.errors.CheckViolation) as refusal:
        update_progress(db, 1, xp=-5)
    assert refusal.value.diag.message_hint == "They have XP 0, sessions 0, projects 0 now."


@pytest.mark.parametrize("event", ["insert", "update"])
def test_progress_that_a_trigger_drops_is_an_error(db, event):
    if event == "update":
        add_pair(db, 1)
    else:
        db.execute("insert into users (id) values (1)")
    user_trigger(db, f"before {event} on specialization_progress", "return null")
    with pytest.raises(
        psycopg.errors.ObjectNotInPrerequisiteState, match="a trigger of specialization_progress dropped"
    ):
        update_progress(db, 1, xp=1)


def test_what_a_trigger_makes_of_the_new_totals_is_what_is_told(db):
    add_pair(db, 1, level=1)
    user_trigger(db, "before update on specialization_progress", "new.current_level := 3; new.total_xp := 7")
    answer = update_progress(db, 1, xp=1)
    assert (answer["new_level"], answer["total_xp"], answer["leveled_up"]) == (3, 7, True)
    assert levels(db, 1) == (3, 3)


@pytest.mark.parametrize(("body", "level"), [("return null", 1), ("new.current_level := 3", 3)])
def test_license_that_a_trigger_keeps_from_its_level_has_not_advanced(db, body, level):
    add_pair(db, 1, level=1)
    user_trigger(db, "before update on user_licenses", body)
    answer = advance(db, 1, 5)
    assert (answer["success"], answer["old_level"], answer["new_level"]) == (False, 1, level)
    assert "a trigger of user_licenses changed or dropped the write" in answer["message"]
    assert levels(db, 1) == (level, level)


# sync_result


def test_sync_result_is_none_where_the_level_stays(db):
    add_pair(db, 1, level=3)
    result = update_progress(db, 1, xp=1)["sync_result"]
    assert (result["success"], result["action"], result["old_level"], result["new_level"]) == (True, "none", 3, 3)


def test_sync_result_is_updated_where_the_other_side_followed(db):
    add_pair(db, 1, level=1)
    result = update_progress(db, 1, xp=1000, sessions=5)["sync_result"]
    assert (result["success"], result["action"], result["old_level"], result["new_level"]) == (True, "updated", 1, 2)
    result = advance(db, 1, 4)["sync_result"]
    assert (result["success"], result["action"], result["old_level"], result["new_level"]) == (True, "updated", 2, 4)


@pytest.mark.leftovers
def test_sync_result_is_queued_where_the_license_side_fails(db):
    add_pair(db, 1, level=1)
    break_target(db, PROGRESS, when="insert or update")
    answer = update_progress(db, 1, xp=1000, sessions=5)
    assert (answer["success"], answer["new_level"]) == (True, 2)
    assert (answer["sync_result"]["success"], answer["sync_result"]["action"]) == (False, "queued")
    assert "sync_queue" in answer["sync_result"]["message"]
    assert levels(db, 1) == (2, 1)
    assert queued(db) == [(1, "PLAYER", "progress", "level_changed", "P0001")]


@pytest.mark.leftovers
def test_sync_result_is_queued_where_the_progress_side_fails(db):
    add_pair(db, 1, level=1)
    break_target(db, LICENSE, when="insert or update")
    answer = advance(db, 1, 4)
    assert (answer["success"], answer["sync_result"]["action"]) == (True, "queued")
    assert levels(db, 1) == (1, 4)


@pytest.mark.leftovers
def test_sync_result_of_a_pair_that_differed_before_says_so_and_names_no_queue(db):
    add_pair(db, 1, level=3)
    write_unseen(db, "update user_licenses set current_level = 2")
    result = update_progress(db, 1, xp=0)["sync_result"]
    assert (result["success"], result["action"], result["old_level"], result["new_level"]) == (False, "none", 2, 2)
    assert "level_sync.desync_issues" in result["message"]
    assert queued(db) == []


def test_sync_result_is_at_commit_in_bulk(db):
    for user in (1, 2, 3):
        add_pair(db, user, level=1)
    configure(db, inline_limit=1)
    answers = db.execute("select level_sync.update_progress(n, 'PLAYER', 1000, 5) from generate_series(1, 3) as n")
    actions = [answer["sync_result"]["action"] for (answer,) in answers]
    assert actions == ["updated", "at_commit", "at_commit"]
    assert [levels(db, user) for user in (1, 2, 3)] == [(2, 2)] * 3


def test_sync_result_is_at_commit_while_somebody_holds_the_other_row(database, db):
    add_pair(db, 1, level=1)
    holder = database.connect(autocommit=False)
    holder.execute("select from user_licenses for update")
    writer = database.connect(autocommit=False)
    result = update_progress(writer, 1, xp=1000, sessions=5)["sync_result"]
    assert (result["success"], result["action"]) == (False, "at_commit")
    holder.rollback()
    writer.commit()
    assert levels(db, 1) == (2, 2)


# advance_license


def test_advance_license_raises_both_sides_and_says_so(db):
    add_pair(db, 1, level=3)
    answer = advance(db, 1, 5, "head.coach", "passed the exam")
    assert answer.pop("sync_result") == {
        "success": True,
        "action": "updated",
        "old_level": 3,
        "new_level": 5,
        "message": "progress updated at level 5",
    }
    assert answer == {
        "success": True,
        "user_id": 1,
        "specialization": "PLAYER",
        "old_level": 3,
        "new_level": 5,
        "message": "license of user 1 in PLAYER advanced from level 3 to 5",
        "advanced_by": "head.coach",
        "reason": "passed the exam",
    }
    assert levels(db, 1) == (5, 5)


def test_advance_license_sets_max_achieved_level_and_last_advanced_at(db):
    add_pair(db, 1, level=6)
    set_level(db, LICENSE, 1, 2)
    before = db.execute("select clock_timestamp()").fetchone()
    row = "select current_level, max_achieved_level, last_advanced_at > %s from user_licenses"
    advance(db, 1, 4)
    assert db.execute(row, before).fetchone() == (4, 6, True)
    advance(db, 1, 8)
    assert db.execute(row, before).fetchone() == (8, 8, True)


ACTORS = "select actor, reason from level_sync.sync_events where action = 'updated' order by event_id"


def test_the_event_tells_who_advanced_the_license_and_why(db):
    add_pair(db, 1, level=3)
    advance(db, 1, 4, "head.coach", "passed the exam")
    assert db.execute(ACTORS).fetchall() == [("head.coach", "passed the exam")]


def test_the_name_of_one_advance_does_not_stick_to_the_next_write(db):
    add_pair(db, 1, level=3)
    with db.transaction():
        advance(db, 1, 4, "head.coach", "passed the exam")
        set_level(db, LICENSE, 1, 5)
        db.execute("set local level_sync.actor = 'the website'")
        advance(db, 1, 6)
        advance(db, 1, 7, "head.coach")
        set_level(db, LICENSE, 1, 8)
    assert [actor for actor, _ in db.execute(ACTORS)] == [
        "head.coach",
        None,
        "the website",
        "head.coach",
        "the website",
    ]


def test_who_and_why_stand_in_every_event_of_a_bulk_advance(db):
    for user in range(1, 6):
        add_pair(db, user, level=3)
    configure(db, inline_limit=2)
    db.execute(
        "select level_sync.advance_license(n, 'PLAYER', 4, 'head.coach', 'new year') from generate_series(1, 5) as n"
    )
    assert db.execute(ACTORS).fetchall() == [("head.coach", "new year")] * 5


def test_a_target_that_is_not_a_higher_level_is_refused_with_a_message(db):
    add_pair(db, 1, level=3)
    before = everything(db)
    for target, message in [
        (3, "target level 3 is not above the current level 3 of user 1 in PLAYER"),
        (2, "target level 2 is not above the current level 3"),
        (0, "target level 0 is not above the current level 3"),
        (-(2**31), "is not above the current level 3"),
        (9, "target level 9 is above the highest level 8 of PLAYER"),
        (2**31 - 1, "is above the highest level 8 of PLAYER"),
        (None, "target_level must be a number, not NULL"),
    ]:
        answer = advance(db, 1, target, "head.coach")
        assert answer["success"] is False
        assert message in answer["message"]
        assert (answer["old_level"], answer["new_level"], answer["sync_result"]) == (3, 3, None)
        assert everything(db) == before


def test_an_advance_without_a_license_is_refused_with_a_message(db):
    add_pair(db, 1, level=3)
    before = everything(db)
    for user, specialization in [(2, "PLAYER"), (None, "PLAYER"), (1, None), (1, "COACH")]:
        answer = advance(db, user, 4, specialization=specialization)
        assert answer["success"] is False
        shown = ["NULL" if value is None else str(value) for value in (user, specialization)]
        assert answer["message"] == f"user {shown[0]} has no license in {shown[1]}"
        assert everything(db) == before


def test_a_hostile_specialization_is_only_a_name(db):
    add_pair(db, 1, level=3)
    before = everything(db)
    for specialization in HOSTILE:
        assert advance(db, 1, 4, specialization=specialization)["success"] is False
        assert sync_by_hand(db, PROGRESS, 1, specialization)["success"] is False
        assert sync_by_hand(db, LICENSE, 1, specialization)["success"] is False
        assert call(db, "select count(*) from level_sync.find_desync_issues(%s)", specialization) == 0
        assert everything(db) == before


def test_any_text_may_stand_for_who_and_why(db):
    for user, text in enumerate(HOSTILE):
        add_pair(db, user, level=3)
        assert advance(db, user, 4, text, text)["success"] is True
        assert db.execute(ACTORS).fetchall()[-1] == (text[:200] or None, text[:1000] or None)


@BULK
def test_update_progress_for_a_license_alone_takes_no_level_away(db, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pairs(db, 1, level=5)
    with bypass(db):
        db.execute("delete from specialization_progress")
    db.execute("select level_sync.update_progress(1, 'PLAYER', 1500, 6)")
    assert levels(db, 1) == (5, 5)
