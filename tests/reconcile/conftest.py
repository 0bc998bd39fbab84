"""What several files about the reconcile start from."""

from __future__ import annotations

import pytest

from academy import LICENSE, PROGRESS, add_pairs, bypass, delete, set_level


@pytest.fixture
def broken(db):
    """Users 1 to 6: progress ahead, license ahead, license missing, progress missing, and two that are right."""
    db.execute("alter table user_licenses alter column max_achieved_level set default 8")
    add_pairs(db, 6)
    with bypass(db):
        set_level(db, PROGRESS, 1, 6)
        db.execute("update user_licenses set max_achieved_level = 8")
        set_level(db, LICENSE, 2, 7)
        delete(db, LICENSE, 3)
        delete(db, PROGRESS, 4)
    return db
