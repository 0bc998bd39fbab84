"""What several files about monitoring start from."""

from __future__ import annotations

import pytest

from academy import add_pairs
from dashboard_site import shown


@pytest.fixture
def healthy(db):
    add_pairs(db, 3)
    db.execute("call level_sync.reconcile()")
    return db


@pytest.fixture
def site(database):
    """The dashboard of this test's database: its address and its scanning."""
    with shown(database.dsn) as found:
        yield found
