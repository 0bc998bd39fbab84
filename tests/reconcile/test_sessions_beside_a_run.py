"""Schedules of sessions beside a reconcile, a plan or an undo: what is being written is left alone.

Each runs for both tables; session_schedule.py tells how they are written. A setting that is not named is the default,
but lock_wait is 30 seconds: whoever waits for a row shows it.
"""

from __future__ import annotations

from academy import BOTH
from session_schedule import Schedule, each_of

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
        gate confirm
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
        gate carry
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
        gate carry
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
        gate isolate
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
        gate confirm
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
        gate isolate
        R: reconcile towards Y | waits for gate
        S: reconcile
        run skipped
        open
        R goes on
        = 3 3""",
    "a drain beside it does not wait": """
        levels 3 3
        A: bypass Y 2
        gate isolate
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
        gate isolate
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
        gate isolate
        M: maintain | waits for gate
        R: reconcile
        run skipped
        open
        M goes on
        A: reconcile
        run success 0 of 0""",
}


PLANS_AND_UNDO = {
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
        gate isolate
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
        gate confirm
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
        gate carry
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
}


@BOTH
@each_of({"reconcile": RECONCILE, "plan and undo": PLANS_AND_UNDO})
def test_schedule(database, table, schedule):
    Schedule(database, table).run(schedule)
