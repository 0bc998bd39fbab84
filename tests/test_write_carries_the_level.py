"""An UPDATE, or an INSERT, of the level on one side arrives on the other side."""

from __future__ import annotations

import pytest

from academy import LICENSE, OTHER, PROGRESS, add_pair, events, insert, level, levels, set_level

BOTH = pytest.mark.parametrize("table", [PROGRESS, LICENSE])


@BOTH
def test_update_of_one_side_arrives_on_the_other(db, table):
    add_pair(db, 1, level=3)
    set_level(db, table, 1, 5)
    assert levels(db, 1) == (5, 5)
    set_level(db, table, 1, 2)
    assert levels(db, 1) == (2, 2)


@BOTH
def test_insert_creates_the_other_row_at_that_level(db, users, table):
    users(1)
    insert(db, table, 1, 4, "COACH")
    assert level(db, OTHER[table], 1, "COACH") == 4


def test_created_progress_has_no_xp(db, users):
    users(1)
    insert(db, LICENSE, 1, 4)
    row = db.execute("select total_xp, completed_sessions, completed_projects from specialization_progress").fetchone()
    assert row == (0, 0, 0)


def test_max_achieved_level_never_goes_down(db):
    add_pair(db, 1, level=6)
    set_level(db, PROGRESS, 1, 2)
    set_level(db, LICENSE, 1, 4)
    db.execute("update user_licenses set max_achieved_level = 4")
    assert db.execute("select current_level, max_achieved_level from user_licenses").fetchone() == (4, 6)


def test_every_carried_level_is_an_event(db):
    add_pair(db, 1, level=3)
    set_level(db, PROGRESS, 1, 5)
    set_level(db, LICENSE, 1, 7)
    assert events(db, 1) == [
        ("progress_to_license", "created", None, 3, "trigger"),
        ("progress_to_license", "updated", 3, 5, "trigger"),
        ("license_to_progress", "updated", 5, 7, "trigger"),
    ]
