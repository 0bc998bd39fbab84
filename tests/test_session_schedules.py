"""Written schedules of two and three sessions: who waits for whom, what comes of it, and what is never lost.

Each runs for both tables; session_schedule.py tells how they are written. A setting that is not named is the default,
but lock_wait is 30 seconds: whoever waits for a row shows it.
"""

from __future__ import annotations

import pytest

from academy import BOTH
from session_schedule import Schedule

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
        with lock_wait 2 seconds
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
        A: set statement_timeout = '500ms'
        A: X 4 | waits for H, fails 57014
        H: commit
        = 3 3""",
    "a locked table is not waited for longer than lock_wait": """
        levels 3 3
        with lock_wait 2 seconds
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

RECONCILE = {
    "a pair that is being written is left alone": """
        levels 3 3
        A: bypass Y 2
        A: begin
        A: X 4
        R: reconcile towards Y
        run success 0 of 1
        A: commit
        = 4 4""",
    "a held pair is left alone and repaired by the next run": """
        levels 3 3
        A: bypass Y 2
        H: hold X
        R: reconcile towards Y
        run success 0 of 1
        = 3 2
        H: commit
        R: reconcile towards Y
        run success 1 of 1
        = 3 3""",
    "a pair that came right after it was planned is not touched": """
        levels 3 3
        A: bypass Y 2
        gate _confirm_planned
        R: reconcile towards Y | waits for gate
        A: X 5
        = 5 5
        open
        R goes on
        run success 0 of 1
        = 5 5""",
    "a write waits for a repair under way and wins": """
        levels 3 3
        A: bypass Y 2
        gate _carry_pairs
        R: reconcile towards Y | waits for gate
        A: X 5 | waits for R
        open
        R goes on
        A goes on
        run success 1 of 1
        = 5 5""",
    "a delete waits for a repair under way": """
        levels 3 3
        A: bypass Y 2
        gate _carry_pairs
        R: reconcile towards Y | waits for gate
        A: begin
        A: delete X | waits for R
        open
        R goes on
        A goes on
        A: delete Y
        A: commit
        = - -""",
    "a row inserted while it is being made keeps the higher level": """
        levels 3 3
        A: bypass delete Y
        with lock_wait 0
        gate _carry_pairs_that_can
        R: reconcile | waits for gate
        A: insert Y 7
        = 3 7 queued Y
        open
        R goes on
        A: drain
        = 7 7""",
    "a pair that its transaction left behind is the drain's": """
        levels 3 3
        A: bypass Y 2
        gate _confirm_planned
        R: reconcile | waits for gate
        A: leave behind Y
        open
        R goes on
        run success 0 of 1
        = 3 2
        D: drain
        = 2 2""",
    "a second run does not wait": """
        levels 3 3
        A: bypass Y 2
        gate _carry_pairs_that_can
        R: reconcile towards Y | waits for gate
        S: reconcile
        run skipped
        open
        R goes on
        = 3 3""",
    "a drain beside it does not wait": """
        levels 3 3
        A: bypass Y 2
        gate _carry_pairs_that_can
        R: reconcile towards Y | waits for gate
        D: drain
        open
        R goes on
        = 3 3""",
    "a catch-up beside a manual run starts none": """
        levels 3 3
        A: reconcile
        A: update level_sync.sync_log set job_start = job_start - interval '1 day', job_end = job_end - interval '1 day'
        A: bypass Y 2
        gate _carry_pairs_that_can
        R: reconcile towards Y | waits for gate
        M: maintain
        open
        R goes on
        run success 1 of 1
        = 3 3""",
    "a manual run beside a catch-up is skipped": """
        levels 3 3
        A: reconcile
        A: update level_sync.sync_log set job_start = job_start - interval '1 day', job_end = job_end - interval '1 day'
        A: bypass Y 2
        gate _carry_pairs_that_can
        M: maintain | waits for gate
        R: reconcile
        run skipped
        open
        M goes on
        A: reconcile
        run success 0 of 0""",
}

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
        gate _carry_pairs
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
        gate _lock_pairs_that_are_free
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
        gate _carry_pairs
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
        gate _carry_pairs
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
        gate _carry_pairs
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
        gate _lock_pairs_that_are_free
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
        gate _lock_pairs_that_are_free
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
        gate _carry_pairs
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
        gate _purge_batch
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
        gate _purge_batch
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
        gate _purge_batch
        M: maintain | waits for gate
        = 4 4
        open
        M goes on""",
    "a session whose snapshots are old by default sees what was purged while it waited": """
        levels 3 3
        A: reconcile
        A: make the log old
        P: set default_transaction_isolation = 'repeatable read'
        gate _purge_batch
        P: purge | waits for gate
        A: delete from level_sync.sync_log
        open
        P goes on
        = 3 3""",
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
        with lock_wait 1 second
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
        A: set deadlock_timeout = '1min'
        B: set deadlock_timeout = '100ms'
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
        with lock_wait 1 second
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

PLANS_UNDO_MIGRATE_AND_CHECK = {
    "a plan leaves alone what was written since": """
        levels 3 3
        A: bypass Y 2
        R: reconcile dry_run => true
        A: X 5
        R: reconcile plan => 1
        run success 0 of 1
        = 5 5""",
    "a plan leaves alone what is held": """
        levels 3 3
        A: bypass Y 2
        R: reconcile dry_run => true
        H: hold X
        R: reconcile plan => 1
        run success 0 of 1
        H: commit
        = 3 2
        R: reconcile towards Y
        = 3 3""",
    "a second run of a plan is skipped, and later finds it used up": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y dry_run => true
        gate _carry_pairs_that_can
        R: reconcile plan => 1 | waits for gate
        S: reconcile plan => 1
        run skipped
        open
        R goes on
        = 3 3
        S: reconcile plan => 1 | fails P0002""",
    "a plan leaves alone what is being undone": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y dry_run => true
        R: reconcile towards Y
        U: begin
        U: undo
        R: reconcile plan => 1
        run success 0 of 1
        U: commit
        = 3 2
        R: reconcile towards Y
        = 3 3""",
    "a plan repairs what was undone right before its turn": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y dry_run => true
        R: reconcile towards Y
        gate _confirm_planned
        R: reconcile plan => 1 | waits for gate
        U: select level_sync.undo(2)
        = 3 2
        open
        R goes on
        run success 1 of 1
        = 3 3""",
    "an undo beside an undo takes nothing twice": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y
        U: begin
        U: undo
        V: undo
        U: commit
        = 3 2
        V: undo
        = 3 2
        R: reconcile towards Y
        = 3 3""",
    "a reconcile does not see what is being undone": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y
        U: begin
        U: undo
        R: reconcile towards Y
        run success 0 of 0
        U: commit
        = 3 2
        R: reconcile towards Y
        run success 1 of 1
        = 3 3""",
    "an undo leaves alone what a drain carries": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y
        with lock_wait 0
        H: hold Y
        A: X 4
        H: commit
        = 4 3 queued X
        gate _carry_pairs
        D: drain | waits for gate
        U: undo
        open
        D goes on
        = 4 4""",
    "an undo leaves alone what is being written": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y
        = 3 3
        A: begin
        A: X 7
        R: undo
        A: commit
        = 7 7""",
    "a write waits for an undo and wins": """
        levels 3 3
        A: bypass Y 2
        R: reconcile towards Y
        R: begin
        R: undo
        A: X 7 | waits for R
        R: commit
        A goes on
        = 7 7""",
    "a migrate with nothing to do waits for no writer": """
        levels 3 3
        A: begin
        A: X 4
        M: migrate
        A: commit
        = 4 4""",
    "a migrate that has a trigger to make lets a writer end": """
        levels 3 3
        M: drop trigger progress_truncated on specialization_progress
        A: begin
        A: X 4
        M: migrate | waits for A
        A: commit
        M goes on
        = 4 4""",
    "a writer that comes while a migrate waits goes on": """
        levels 3 3
        A: insert X 3 of user 2
        M: drop trigger progress_truncated on specialization_progress
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
        M: drop trigger progress_truncated on specialization_progress
        gate migrate
        M: migrate | waits for gate
        A: X 4 | waits for M
        open
        M goes on
        A goes on
        = 4 4""",
    "a migrate that makes a trigger holds both tables": """
        levels 3 3
        M: drop trigger progress_truncated on specialization_progress
        gate migrate
        M: migrate | waits for gate
        A: touch X | waits for M
        open
        M goes on
        A goes on""",
    "a migrate that makes a trigger anew holds both tables": """
        levels 3 3
        M: alter table specialization_progress disable trigger progress_truncated
        gate migrate
        M: migrate | waits for gate
        A: touch X | waits for M
        open
        M goes on
        A goes on""",
    "a live check waits for nobody": """
        levels 3 3
        H: hold Y
        V: select * from level_sync._check_live()
        H: commit
        = 3 3""",
}

SCHEDULES = {
    f"{race}: {name}": schedule
    for race, schedules in {
        "opposite writes": OPPOSITE_WRITES,
        "lock_wait": LOCK_WAIT,
        "reconcile": RECONCILE,
        "drain": DRAIN,
        "purge": PURGE,
        "insert": INSERTS,
        "delete and move": DELETES_AND_MOVES,
        "isolation": ISOLATION,
        "plan, undo, migrate": PLANS_UNDO_MIGRATE_AND_CHECK,
    }.items()
    for name, schedule in schedules.items()
}


@BOTH
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(database, table, name):
    Schedule(database, table).run(SCHEDULES[name])
