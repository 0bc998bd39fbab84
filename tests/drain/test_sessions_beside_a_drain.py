"""Schedules of sessions beside a drain or a purge: each batch stands before the next, and no write is lost.

Each runs for both tables; session_schedule.py tells how they are written. A setting that is not named is the default,
but lock_wait is 30 seconds: whoever waits for a row shows it.
"""

from __future__ import annotations

from academy import BOTH
from session_schedule import Schedule, each_of

DRAIN = {
    "a pair somebody writes is left to them": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        B: begin
        B: Y 6
        D: drain
        B: commit
        = 6 6 queued X
        D: drain
        = 6 6""",
    "a held pair waits for the next drain": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        D: drain
        = 4 3 queued X
        H: commit
        D: drain
        = 4 4""",
    "a write waits for a carry under way and wins": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        gate carry
        D: drain | waits for gate
        B: Y 7 | waits for D
        open
        D goes on
        B goes on
        = 7 7""",
    "a write queued while the drain locks its pair is not lost": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        gate lock
        D: drain | waits for gate
        H: hold X
        B: Y 6
        = 4 6 queued X Y
        H: commit
        open
        D goes on
        = 6 6""",
    "two drains take a pair once": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        gate carry
        D: drain | waits for gate
        E: drain
        open
        D goes on
        = 4 4""",
    "each batch stands before the next": """
        levels 3 3
        A: insert X 3 of user 2
        with batch_size 1
        with lock_wait 0
        H: hold all Y
        A: X 4
        A: X 4 of user 2
        H: commit
        = 4 3 queued X
        of user 2: = 4 3 queued X
        gate carry
        D: drain | waits for gate
        D passes once
        = 4 4
        of user 2: = 4 3 queued X
        open
        D goes on
        of user 2: = 4 4""",
    "each batch of a maintenance stands before the next": """
        levels 3 3
        A: insert X 3 of user 2
        A: reconcile
        with batch_size 1
        with lock_wait 0
        H: hold all Y
        A: X 4
        A: X 4 of user 2
        H: commit
        = 4 3 queued X
        of user 2: = 4 3 queued X
        gate carry
        M: maintain | waits for gate
        M passes once
        = 4 4
        of user 2: = 4 3 queued X
        open
        M goes on
        of user 2: = 4 4""",
    "a session whose snapshots are old by default sees what came while it waited": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        D: set default_transaction_isolation = 'repeatable read'
        gate lock
        D: drain | waits for gate
        A: X 5
        open
        D goes on
        = 5 5""",
    "and so does its maintenance": """
        levels 3 3
        A: reconcile
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        D: set default_transaction_isolation = 'repeatable read'
        gate lock
        D: maintain | waits for gate
        A: X 5
        open
        D goes on
        = 5 5""",
    "a delete of both sides waits for it and leaves nothing": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        gate carry
        D: drain | waits for gate
        B: begin
        B: delete Y | waits for D
        open
        D goes on
        B goes on
        B: delete X
        B: commit
        = - -""",
}


PURGE = {
    "each batch stands before the next": """
        levels 3 3
        A: reconcile
        A: reconcile
        A: make the log old
        with batch_size 1
        gate purge
        P: purge | waits for gate
        P passes once
        P passes once
        open
        P goes on
        = 3 3""",
    "each batch of a maintenance stands before the next": """
        levels 3 3
        A: reconcile
        A: reconcile
        A: make the log old
        A: reconcile
        with batch_size 1
        gate purge
        M: maintain | waits for gate
        M passes once
        M passes once
        open
        M goes on
        = 3 3""",
    "what a maintenance has drained stands before it purges": """
        levels 3 3
        A: reconcile
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        gate purge
        M: maintain | waits for gate
        = 4 4
        open
        M goes on""",
    "a session whose snapshots are old by default sees what was purged while it waited": """
        levels 3 3
        A: reconcile
        A: make the log old
        P: set default_transaction_isolation = 'repeatable read'
        gate purge
        P: purge | waits for gate
        A: delete from level_sync.sync_log
        open
        P goes on
        = 3 3""",
}


@BOTH
@each_of({"drain": DRAIN, "purge": PURGE})
def test_schedule(database, table, schedule):
    Schedule(database, table).run(schedule)
