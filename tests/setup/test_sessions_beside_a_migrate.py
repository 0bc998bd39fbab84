"""Schedules of sessions beside a migrate or a live check: nobody waits who need not, and every write is carried.

Each runs for both tables; session_schedule.py tells how they are written. A setting that is not named is the default,
but lock_wait is 30 seconds: whoever waits for a row shows it.
"""

from __future__ import annotations

from academy import BOTH
from session_schedule import Schedule, each_of

MIGRATE_AND_CHECK = {
    "a migrate with nothing to do waits for no writer": """
        levels 3 3
        A: begin
        A: X 4
        M: migrate
        A: commit
        = 4 4""",
    "a migrate that has a trigger to make lets a writer end": """
        levels 3 3
        M: drop a trigger
        A: begin
        A: X 4
        M: migrate | waits for A
        A: commit
        M goes on
        = 4 4""",
    "a writer that comes while a migrate waits goes on": """
        levels 3 3
        A: insert X 3 of user 2
        M: drop a trigger
        A: begin
        A: X 4
        M: migrate | waits for A
        B: X 6 of user 2 | ends
        of user 2: = 6 6
        A: commit
        M goes on
        = 4 4""",
    "a writer that comes while a migrate makes a trigger is carried": """
        levels 3 3
        M: drop a trigger
        gate migrate
        M: migrate | waits for gate
        A: X 4 | waits for M
        open
        M goes on
        A goes on
        = 4 4""",
    "a migrate that makes a trigger holds both tables": """
        levels 3 3
        M: drop a trigger
        gate migrate
        M: migrate | waits for gate
        A: touch X | waits for M
        open
        M goes on
        A goes on""",
    "a migrate that makes a trigger anew holds both tables": """
        levels 3 3
        M: disable a trigger
        gate migrate
        M: migrate | waits for gate
        A: touch X | waits for M
        open
        M goes on
        A goes on""",
    "a live check waits for nobody": """
        levels 3 3
        H: hold Y
        V: live check
        H: commit
        = 3 3""",
}


@BOTH
@each_of({"migrate and check": MIGRATE_AND_CHECK})
def test_schedule(database, table, schedule):
    Schedule(database, table).run(schedule)
