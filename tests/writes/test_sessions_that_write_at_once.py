"""Schedules of sessions that write: who waits for whom, what comes of it, and what is never lost.

Each runs for both tables; session_schedule.py tells how they are written. A setting that is not named is the default,
but lock_wait is 30 seconds: whoever waits for a row shows it.
"""

from __future__ import annotations

from academy import BOTH
from session_schedule import Schedule, each_of

OPPOSITE_WRITES = {
    "the second waits for the row and wins": """
        levels 3 3
        A: begin
        A: X 4
        = 3 3
        B: Y 5 | waits for A
        A: commit
        B goes on
        = 5 5""",
    "the first gives up": """
        levels 3 3
        A: begin
        A: X 4
        B: Y 5 | waits for A
        A: rollback
        B goes on
        = 5 5""",
    "both on one side": """
        levels 3 3
        A: begin
        A: X 4
        B: X 6 | waits for A
        A: commit
        B goes on
        = 6 6""",
    "one transaction writes both sides": """
        levels 3 3
        A: begin
        A: X 4
        A: Y 5
        B: X 7 | waits for A
        = 3 3
        A: commit
        B goes on
        = 7 7""",
    "a savepoint taken back still holds what came before": """
        levels 3 3
        A: begin
        A: X 4
        A: savepoint here
        A: X 5
        A: rollback to here
        B: Y 7 | waits for A
        A: commit
        B goes on
        = 7 7""",
    "a savepoint taken back frees what came after": """
        levels 3 3
        A: begin
        A: savepoint here
        A: X 4
        A: rollback to here
        B: Y 5
        = 5 5
        A: commit
        = 5 5""",
    "three in a row are served in turn": """
        levels 3 3
        A: begin
        A: X 4
        B: X 5 | waits for A
        A: commit
        B goes on
        C: begin
        C: Y 6
        B: X 7 | waits for C
        C: commit
        B goes on
        = 7 7""",
    "carried at commit, the first to commit leaves its pair to the drain": """
        levels 3 3
        with inline_limit 0
        A: begin
        A: X 4
        B: begin
        B: Y 5
        A: commit
        = 4 3 queued X
        B: commit
        = 5 5 queued X
        A: drain
        = 5 5""",
    "carried at commit, the second to write commits first": """
        levels 3 3
        with inline_limit 0
        A: begin
        A: X 4
        B: begin
        B: Y 5
        B: commit
        = 3 5 queued Y
        A: commit
        = 4 4 queued Y
        A: drain
        = 4 4""",
    "carried at commit, one rolls back": """
        levels 3 3
        with inline_limit 0
        A: begin
        A: X 4
        B: begin
        B: Y 5
        A: rollback
        B: commit
        = 5 5""",
    "prepared and committed later": """
        levels 3 3
        A: begin
        A: X 4
        A: prepare transaction 'later'
        = 3 3
        B: Y 5 | waits for prepared
        A: commit prepared 'later'
        B goes on
        = 5 5""",
}


LOCK_WAIT = {
    "a held row is waited for": """
        levels 3 3
        H: hold Y
        A: X 4 | waits for H
        H: commit
        A goes on
        = 4 4""",
    "no longer than lock_wait": """
        levels 3 3
        with lock_wait 3 seconds
        H: hold Y
        A: X 4 | waits for H, gives up
        = 4 3 queued X
        H: commit
        A: drain
        = 4 4""",
    "never with lock_wait zero": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: X 4
        = 4 3 queued X
        H: commit
        A: drain
        = 4 4""",
    "free again at our commit": """
        levels 3 3
        with lock_wait 0
        H: hold Y
        A: begin
        A: X 4
        H: rollback
        A: commit
        = 4 4""",
    "a write of another column is waited for as well": """
        levels 3 3
        H: begin
        H: touch Y
        A: X 4 | waits for H
        H: commit
        A goes on
        = 4 4""",
    "the hot path waits for nobody": """
        levels 3 3
        H: hold Y
        A: touch X
        H: commit
        = 3 3""",
    "a statement_timeout reaches the writer and undoes the write": """
        levels 3 3
        H: hold Y
        A: set statement_timeout = '3s'
        A: X 4 | waits for H, fails 57014
        H: commit
        = 3 3""",
    "a locked table is not waited for longer than lock_wait": """
        levels 3 3
        with lock_wait 3 seconds
        L: lock Y
        A: X 4 | waits for L, gives up
        L: commit
        = 4 3 queued X
        A: drain
        = 4 4""",
    "writes of two pairs do not meet": """
        levels 3 3
        A: insert into specialization_progress (student_id, specialization_id, current_level) values (2, 'PLAYER', 3)
        A: begin
        A: X 4
        B: Y 6 of user 2
        A: commit
        = 4 4""",
}


INSERTS = {
    "the other row was made by the one who came first": """
        levels - -
        A: begin
        A: insert X 4
        B: insert Y 6 | waits for A
        A: commit
        B goes on | fails 23505
        = 4 4""",
    "an upsert waits and wins": """
        levels - -
        A: begin
        A: insert X 4
        B: upsert Y 6 | waits for A
        A: commit
        B goes on
        = 6 6""",
    "the first gives up": """
        levels - -
        A: begin
        A: insert X 4
        B: insert Y 6 | waits for A
        A: rollback
        B goes on
        = 6 6""",
    "carried at commit, both meet at the higher level": """
        levels - -
        with inline_limit 0
        with lock_wait 3 seconds
        A: begin
        A: insert X 4
        B: begin
        B: insert Y 6
        A: commit | waits for B, gives up
        = 4 - queued X
        B: commit
        = 6 6 queued X
        B: drain
        = 6 6""",
    "a row that is there and held is not waited for": """
        levels 3 3
        A: bypass delete X
        H: hold Y
        A: insert X 7
        = 7 3 queued X
        because 55P03
        H: commit
        A: drain
        = 7 7""",
    "after a delete of the pair that was waited for": """
        levels 3 3
        A: begin
        A: delete X
        A: delete Y
        B: insert X 6 | waits for A
        A: commit
        B goes on
        = 6 6""",
}


DELETES_AND_MOVES = {
    "a level for a pair that is being deleted finds no row": """
        levels 3 3
        A: begin
        A: delete X
        A: delete Y
        B: X 5 | waits for A
        A: commit
        B goes on
        = - -""",
    "one side alone is refused and the other's write stands": """
        levels 3 3
        A: begin
        A: delete X
        B: Y 5 | waits for A
        A: commit | fails 23001
        B goes on
        = 5 5""",
    "a row whose other side is coming is not deleted before that is there": """
        levels 3 3
        A: bypass delete Y
        A: begin
        A: insert Y 2
        B: delete X | waits for A
        A: commit
        B goes on | fails 23001
        = 3 3""",
    "nor where the other side comes at the same level": """
        levels 3 3
        A: bypass delete Y
        A: begin
        A: insert Y 3
        B: delete X | waits for A
        A: rollback
        B goes on
        = - -""",
    "nor where it was carried in a set": """
        levels 3 3
        with inline_limit 0
        A: bypass delete Y
        A: begin
        A: insert Y 2
        A: set constraints all immediate
        B: delete X | waits for A
        A: commit
        B goes on | fails 23001
        = 3 3""",
    "and where it was deleted before that, it comes back": """
        levels 3 3
        with inline_limit 0
        A: bypass delete Y
        A: begin
        A: insert Y 2
        B: delete X
        A: commit
        = 2 2""",
    "a row that comes while its other side is being deleted waits for that": """
        levels 3 3
        A: bypass delete Y
        B: begin
        B: delete X
        A: insert Y 2 | waits for B
        B: commit
        A goes on
        = 2 2""",
    "a row whose other side somebody locks against all others is left to the drain": """
        levels 3 3
        A: bypass delete Y
        B: begin
        B: select from specialization_progress for update
        B: select from user_licenses for update
        A: insert Y 2
        = 3 2 queued Y
        because 55P03
        B: commit
        A: drain
        = 3 3""",
    "propagated beside a write that waits, which comes later and makes the row anew": """
        levels 3 3
        with on_delete propagate
        A: begin
        A: delete X
        B: Y 5 | waits for A
        A: commit
        B goes on
        A: drain
        = 5 5""",
    "propagated for two pairs of which one is held, which is not waited for": """
        levels 3 3
        A: insert X 3 of user 2
        with on_delete propagate
        H: hold Y
        A: begin
        A: delete X
        A: delete X of user 2
        A: commit
        = - 3 queued X
        of user 2: = - -
        H: commit
        A: drain
        = - -""",
    "recreated beside a write that waits": """
        levels 3 3
        with on_delete recreate
        A: begin
        A: delete X
        B: Y 5 | waits for A
        A: commit
        B goes on
        A: drain
        = 5 5""",
    "each side deleted by another is refused to both": """
        levels 3 3
        A: begin
        A: delete X
        B: begin
        B: delete Y
        A: commit | fails 23001
        B: commit | fails 23001
        = 3 3""",
    "each side deleted by another, propagated: both are gone": """
        levels 3 3
        with on_delete propagate
        A: begin
        A: delete X
        B: begin
        B: delete Y
        A: commit
        = - 3 queued X
        B: commit
        = - - queued X
        A: drain
        = - -""",
    "each side deleted by another, propagated though the second gives up": """
        levels 3 3
        with on_delete propagate
        A: begin
        A: delete X
        B: begin
        B: delete Y
        A: commit
        D: drain
        = - 3 queued X
        B: rollback
        D: drain
        = - -""",
    "each side deleted by another, recreated: nothing is left to do it from": """
        levels 3 3
        with on_delete recreate
        A: begin
        A: delete X
        B: begin
        B: delete Y
        A: commit
        = - 3 queued X
        B: commit
        = - - queued X
        A: drain
        = - -""",
    "each side deleted by another, recreated where the second gives up": """
        levels 3 3
        with on_delete recreate
        A: begin
        A: delete X
        B: begin
        B: delete Y
        A: commit
        D: drain
        = - 3 queued X
        B: rollback
        D: drain
        = 3 3""",
    "a write of a pair that is moved away finds no row": """
        levels 3 3
        A: begin
        A: move X
        A: move Y
        B: X 5 | waits for A
        A: commit
        B goes on
        = - -""",
    "one side moved alone is refused and the other's write stands": """
        levels 3 3
        A: begin
        A: move X
        B: Y 5 | waits for A
        A: commit | fails 23001
        B goes on
        = 5 5""",
    "each side moved by another is refused to both": """
        levels 3 3
        A: begin
        A: move X
        B: begin
        B: move Y
        A: commit | fails 23001
        B: commit | fails 23001
        = 3 3
        of user 2: = - -""",
    "two moves in opposite order: who came second gives way": """
        levels 3 3
        A: set deadlock_timeout = '10min'
        B: set deadlock_timeout = '3s'
        A: begin
        A: move X
        B: begin
        B: move Y
        A: move Y | waits for B
        B: move X | waits for A, fails 40P01
        B: rollback
        A goes on
        A: commit
        = - -
        of user 2: = 3 3""",
    "an insert at the place a pair is moved to comes second": """
        levels 3 3
        A: begin
        A: move X
        A: move Y
        B: insert X 5 of user 2 | waits for A
        A: commit
        B goes on | fails 23505
        = - -
        of user 2: = 3 3""",
    "an insert at the place a pair is moved to was there first": """
        levels 3 3
        B: begin
        B: insert X 5 of user 2
        A: begin
        A: move X | waits for B
        B: commit
        A goes on | fails 23505
        A: rollback
        = 3 3
        of user 2: = 5 5""",
    "an insert at the place a pair is moved to gives up": """
        levels 3 3
        B: begin
        B: insert X 5 of user 2
        A: begin
        A: move Y | waits for B
        B: rollback
        A goes on
        A: move X
        A: commit
        = - -
        of user 2: = 3 3""",
    "an insert of the other side while only one was moved": """
        levels 3 3
        with lock_wait 3 seconds
        A: begin
        A: move X
        B: insert Y 5 of user 2 | waits for A, gives up
        of user 2: = - 5 queued Y
        A: move Y | fails 23505
        A: rollback
        A: drain
        = 3 3
        of user 2: = 5 5""",
}


ISOLATION = {
    "an old snapshot may not overwrite the same side": """
        levels 3 3
        A: begin isolation level repeatable read
        A: select from users
        B: X 5
        A: X 6 | fails 40001
        A: rollback
        = 5 5""",
    "nor the other side": """
        levels 3 3
        A: begin isolation level repeatable read
        A: select from users
        B: X 5
        A: Y 6 | fails 40001
        A: rollback
        = 5 5""",
    "a pair that is only held is queued": """
        levels 3 3
        with lock_wait 0
        A: begin isolation level repeatable read
        A: select from users
        H: hold Y
        A: X 5
        A: commit
        = 5 3 queued X
        H: commit
        A: drain
        = 5 5""",
    "serializable writers of one pair": """
        levels 3 3
        A: begin isolation level serializable
        B: begin isolation level serializable
        A: X 4
        B: Y 5 | waits for A
        A: commit
        B goes on | fails 40001
        B: rollback
        = 4 4""",
    "an old snapshot may not delete one side alone": """
        levels 3 3
        A: begin isolation level repeatable read
        A: select from users
        B: touch Y
        A: delete X
        A: commit | fails 23001
        = 3 3""",
    "but it may where it does not know the other side, until the next reconcile": """
        levels 3 3
        A: bypass delete Y
        B: begin isolation level repeatable read
        B: select from users
        A: insert Y 3
        B: delete X
        B: commit
        = - 3
        A: reconcile
        = 3 3""",
    "nor propagate its delete to a row it does not know": """
        levels 3 3
        with on_delete propagate
        A: begin isolation level repeatable read
        A: select from users
        B: touch Y
        A: delete X
        A: commit | fails 40001
        = 3 3""",
    "nor recreate a row from one it does not know": """
        levels 3 3
        with on_delete recreate
        A: begin isolation level repeatable read
        A: select from users
        B: touch Y
        A: delete X
        A: commit | fails 40001
        = 3 3""",
    "nor delete what was deleted since": """
        levels 3 3
        A: begin isolation level repeatable read
        A: select from users
        B: begin
        B: delete X
        B: delete Y
        B: commit
        A: delete X | fails 40001
        A: rollback
        = - -""",
    "nor write a level whose row a delete has taken along": """
        levels 3 3
        with on_delete propagate
        A: begin isolation level repeatable read
        A: select from users
        B: delete X
        = - -
        A: Y 5 | fails 40001
        A: rollback
        = - -""",
    "a write that waits for a propagated delete comes later and makes the row anew": """
        levels 3 3
        with on_delete propagate
        A: begin isolation level repeatable read
        A: delete X
        B: Y 5 | waits for A
        A: commit
        B goes on
        A: drain
        = 5 5""",
    "of two old snapshots that delete a side each the second is told to try again": """
        levels 3 3
        with on_delete propagate
        A: begin isolation level repeatable read
        A: delete X
        B: begin isolation level repeatable read
        B: delete Y
        A: commit
        B: commit | fails 40001
        = - 3 queued X
        A: drain
        = - -""",
}


@BOTH
@each_of(
    {
        "opposite writes": OPPOSITE_WRITES,
        "lock_wait": LOCK_WAIT,
        "insert": INSERTS,
        "delete and move": DELETES_AND_MOVES,
        "isolation": ISOLATION,
    }
)
def test_schedule(database, table, schedule):
    Schedule(database, table).run(schedule)
