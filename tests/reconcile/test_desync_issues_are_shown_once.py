"""The view of what differs: each pair once, with its difference and what a reconcile would do about it."""

from __future__ import annotations

import pytest

import internals
from academy import (
    LICENSE,
    PROGRESS,
    add_pair,
    bypass,
    call,
    configure,
    delete,
    insert,
    reconcile,
    set_level,
    write_unseen,
)

ISSUES = """select user_id, specialization, issue_type, progress_level, license_level, difference, recommended_action
              from level_sync.find_desync_issues(%s)"""


@pytest.fixture
def broken_academy(db):
    """One desync of each type, and three more mismatches: the license newer, undated, and the progress newer."""
    for user in range(1, 7):
        add_pair(db, user, level=4)
    add_pair(db, 5, "COACH", 2)
    write_unseen(db, "delete from user_licenses where user_id = 1")
    write_unseen(db, "delete from specialization_progress where student_id = 2")
    write_unseen(
        db,
        """update specialization_progress
              set current_level = 7, last_activity = timestamptz '2024-01-01' where student_id = 3""",
    )
    write_unseen(db, "update user_licenses set last_advanced_at = timestamptz '2024-01-02' where user_id = 3")
    write_unseen(
        db,
        """update user_licenses set current_level = 6, max_achieved_level = 6,
                                    last_advanced_at = null where user_id = 4""",
    )
    write_unseen(db, "update user_licenses set current_level = 1, last_advanced_at = '2024-01-01' where user_id = 6")
    write_unseen(db, "update specialization_progress set last_activity = '2024-01-02' where student_id = 6")


@pytest.mark.leftovers
@pytest.mark.parametrize(
    ("policy", "actions"),
    [
        ("progress_wins", ["update_license", "update_license", "update_license"]),
        ("license_wins", ["update_progress", "update_progress", "update_progress"]),
        ("highest_wins", ["update_license", "update_progress", "update_license"]),
        ("latest_wins", ["update_progress", "update_license", "update_license"]),
        ("report_only", ["report_only", "report_only", "report_only"]),
    ],
)
def test_each_desync_is_shown_once_with_its_difference_and_what_to_do(db, broken_academy, policy, actions):
    configure(db, conflict_policy=policy)
    assert db.execute(ISSUES, [None]).fetchall() == [
        (1, "PLAYER", "missing_license", 4, None, None, "create_license"),
        (2, "PLAYER", "missing_progress", None, 4, None, "create_progress"),
        (3, "PLAYER", "level_mismatch", 7, 4, 3, actions[0]),
        (4, "PLAYER", "level_mismatch", 4, 6, 2, actions[1]),
        (6, "PLAYER", "level_mismatch", 4, 1, 3, actions[2]),
    ]


@pytest.mark.leftovers
def test_a_tie_of_dates_falls_back_to_progress(db, broken_academy):
    configure(db, conflict_policy="latest_wins")
    write_unseen(db, "update user_licenses set last_advanced_at = '2024-01-01' where user_id = 3")
    write_unseen(db, "update specialization_progress set last_activity = '2024-01-01' where student_id = 3")
    assert db.execute(ISSUES, [None]).fetchall()[2][-1] == "update_license"


@pytest.mark.leftovers
def test_find_desync_issues_is_the_view_filtered(db, broken_academy):
    write_unseen(db, "delete from user_licenses where specialization_type = 'COACH'")
    everywhere = db.execute(ISSUES, [None]).fetchall()
    assert len(everywhere) == 6
    assert db.execute(ISSUES.replace("(%s)", "()")).fetchall() == everywhere
    view = ISSUES.replace("find_desync_issues(%s)", "desync_issues")
    assert sorted(db.execute(view).fetchall(), key=repr) == sorted(everywhere, key=repr)
    assert [row[0] for row in db.execute(ISSUES, ["COACH"])] == [5]
    assert [row[0] for row in db.execute(ISSUES, ["PLAYER"])] == [1, 2, 3, 4, 6]
    assert db.execute(ISSUES, ["nowhere"]).fetchall() == []


def test_equal_pairs_are_no_desync(db):
    add_pair(db, 1)
    insert(db, LICENSE, 1, 2, "COACH")
    with db.transaction():
        delete(db, LICENSE, 1, "COACH")
        delete(db, PROGRESS, 1, "COACH")
    assert db.execute(ISSUES, [None]).fetchall() == []


def test_desyncs_of_a_range_of_users_are_found_in_the_indexes_alone(db):
    write_unseen(db, "insert into users (id) select n from generate_series(1, 60000) as n")
    write_unseen(
        db,
        """insert into specialization_progress (student_id, specialization_id, current_level)
           select n, name, 3
             from generate_series(1, 60000) as n cross join (values ('PLAYER'), ('COACH')) as known (name)""",
    )
    write_unseen(
        db,
        """insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level)
           select student_id, specialization_id, 3, 3 from specialization_progress""",
    )
    db.execute("vacuum (analyze) specialization_progress, user_licenses")
    explained = db.execute(f"explain (analyze, timing off) {internals.DESYNCS_OF_1_TO_1000}")
    plan = "\n".join(row[0] for row in explained)
    assert plan.count("Index Only Scan") == 2
    assert plan.count("Heap Fetches: 0") == 2
    assert "Sort" not in plan
    assert call(db, "select count(*) from level_sync.desync_issues") == 0


def test_specializations_are_filtered_and_unknown_ones_are_empty(broken):
    insert(broken, PROGRESS, 5, 2, "COACH")
    with bypass(broken):
        set_level(broken, PROGRESS, 5, 4, "COACH")
    find = "select user_id, issue_type from level_sync.find_desync_issues(%s)"
    assert broken.execute(find, ["COACH"]).fetchall() == [(5, "level_mismatch")]
    assert len(broken.execute(find, ["PLAYER"]).fetchall()) == 4
    assert broken.execute(find, ["NONE"]).fetchall() == []
    assert len(broken.execute(find, [None]).fetchall()) == 5
    reconcile(broken)
