"""Everything that can be done to the two tables, on several connections, beside a plain model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import psycopg
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import internals
from academy import KEY, LICENSE, PROGRESS, bypass, configure, drain
from level_model import LIMITS, OTHER_SIDE, PAIRS, UNCERTAIN, Level, Levels, Pair
from sequence_choices import BYPASSES, HAPPENINGS, SIDES, TABLE, one_of_these, pairs, sides, writers
from sequence_state import STEPS, Run
from sequence_writes import SequenceWrites


class Academy(SequenceWrites):
    """What else happens to a database: faults, bypasses, settings, drains, runs, plans, undo, TRUNCATE."""

    @precondition(lambda self: self.settings)
    @rule(what=HAPPENINGS)
    def something_else(self, what: tuple[Any, ...]) -> None:
        self.happen(what)

    def happen(self, what: tuple[Any, ...]) -> None:
        note(f"{what}")
        getattr(self, what[0])(*what[1:])

    def bypass_the_triggers(self, those: list[tuple[Any, ...]]) -> None:
        for each in those:
            self.happen(each)

    def bypass(self, pair: Pair, side: str, level: Level, way: str) -> None:
        if self.holders(pair):
            return
        table = TABLE[side]
        user, specialization = KEY[table]
        if way == "disabled triggers" and self.open_transactions():
            way = "replica"
        with bypass(self.db) if way == "replica" else self.disabled(table):
            if level is None:
                self.db.execute(f"delete from {table} where {user} = %s and {specialization} = %s", pair)
            else:
                level = min(level, LIMITS[pair[1]])
                highest = ("max_achieved_level",) if side == "license" else ()
                columns = ("current_level", *highest)
                self.db.execute(
                    f"insert into {table} ({user}, {specialization}, {', '.join(columns)})"
                    f" values (%s, %s{', %s' * len(columns)}) on conflict ({user}, {specialization}) do update set"
                    " current_level = excluded.current_level"
                    + (
                        f", max_achieved_level = greatest({table}.max_achieved_level, excluded.max_achieved_level)"
                        if highest
                        else ""
                    ),
                    [*pair, *[level] * len(columns)],
                )
        self.written[pair] |= {level}
        self.model.levels[pair] = self.seen[pair].with_side(side, level)
        self.effects[f"bypass by {way}"] += self.model.levels[pair] != self.seen[pair]
        self.wrote_by_hand(pair)
        self.look()

    @contextmanager
    def disabled(self, table: str) -> Any:
        with self.db.transaction():
            self.db.execute(f"alter table {table} disable trigger user")
            yield
            self.db.execute(f"alter table {table} enable trigger user")

    def wrote_by_hand(self, pair: Pair) -> None:
        self.version[pair] += 1
        self.bypassed.add(pair)
        self.unexplained.add(pair)
        self.owed[pair] = None

    def break_or_mend(self, side: str, user: int) -> None:
        self.set_fault(side, user, (side, user) not in self.faults)

    def set_fault(self, side: str, user: int, is_broken: bool) -> None:
        if is_broken:
            self.faults.add((side, user))
            self.db.execute("insert into public.faults (side, user_id) values (%s, %s)", [side, user])
        else:
            self.faults.discard((side, user))
            self.db.execute("delete from public.faults where side = %s and user_id = %s", [side, user])
        for writer in self.writers:
            for pair in writer.transaction.written if writer.transaction else ():
                if pair[0] == user:
                    writer.transaction.written[pair] = UNCERTAIN

    @rule(
        number=writers,
        pair=pairs,
        side=sides,
        levels=st.lists(st.integers(1, 8), min_size=1, max_size=2),
        is_mended=st.booleans(),
        is_drained=st.booleans(),
    )
    def write_beside_a_fault(
        self, number: int, pair: Pair, side: str, levels: list[int], is_mended: bool, is_drained: bool
    ) -> None:
        writer = self.writers[number]
        self.set_fault(OTHER_SIDE[side], pair[0], True)
        for level in levels:
            self.do(writer, ("insert_a_row", pair, side, level, "upsert"))
            self.look()
        if is_mended:
            for each in SIDES:
                self.set_fault(each, pair[0], False)
        if is_drained:
            self.drain_the_queue()

    def change_a_setting(self, name: str, value: Any) -> None:
        configure(self.db, **{name: value})
        self.settings[name] = value

    @precondition(lambda self: self.queue)
    @rule()
    def drain_the_queue(self) -> None:
        foretold = self.foretell_drain()
        self.leave_open(set(self.queue))
        drain(self.db)
        self.look()
        self.assert_drained(foretold)

    def foretell_drain(self) -> dict[Pair, Levels]:
        """What becomes of the queued pairs that nothing keeps from being drained."""
        return {
            pair: self.model.drained(self.seen[pair], entry.side, entry.change, self.settings["on_delete"])
            for pair, entry in self.queue.items()
            if entry.is_alive and pair not in self.bypassed and not self.holders(pair) and not self.is_any_fault(pair)
        }

    def assert_drained(self, foretold: dict[Pair, Levels]) -> None:
        for pair, levels in foretold.items():
            assert pair not in self.queue, f"{pair} is free, and was not drained"
            assert self.seen[pair].sides == levels.sides, f"the drain made {self.seen[pair]} of {pair}, not {levels}"
            self.effects["drain foretold"] += 1

    @precondition(lambda self: any(not entry.is_alive for entry in self.queue.values()))
    @rule()
    def requeue_the_dead(self) -> None:
        self.db.execute("select level_sync.requeue()")

    def leave_open(self, pairs: set[Pair], run: Run | None = None) -> None:
        """Queued or held pairs come into step with one of their sides, or wait on."""
        for pair in pairs:
            if run:
                run.before[pair], run.after[pair], run.versions[pair] = self.model.levels[pair].sides, UNCERTAIN, -1
            self.model.levels[pair] = UNCERTAIN
            self.version[pair] += 1

    @rule(
        those=st.lists(one_of_these(BYPASSES), max_size=2),
        direction=st.sampled_from([None, None, "progress_to_license", "license_to_progress"]),
        is_approved=st.booleans(),
        is_undone=st.booleans(),
    )
    def reconcile(
        self, those: list[tuple[Any, ...]], direction: str | None, is_approved: bool, is_undone: bool
    ) -> None:
        self.bypass_the_triggers(those)
        foretold = self.foretell_drain()
        unforetold = {pair for pair in self.queue if pair not in foretold and not self.seen[pair].is_equal}
        before = dict(self.seen)
        policy = direction or self.settings["conflict_policy"]
        self.db.execute("update level_sync.sync_queue set next_attempt_at = '-infinity' where dead_at is null")
        self.call_reconcile(direction=direction, approve=is_approved)
        run_id, status = self.last_run()
        assert status in ("success", "partial", "needs_approval"), status
        run = Run(run_id)
        different = {pair: levels for pair, levels in before.items() if not levels.is_equal and pair not in self.queue}
        if not unforetold:
            planned = sum(levels.is_one_sided or policy != "report_only" for levels in different.values())
            is_too_many = not is_approved and planned > self.settings["repair_limit"]
            assert (status == "needs_approval") == is_too_many, (status, planned, self.settings["repair_limit"])
        self.leave_open(set(foretold))
        if status == "needs_approval":
            self.effects["run that waits for approval"] += 1
            for pair, levels in different.items():
                run.before[pair], run.after[pair] = levels.sides, self.model.reconciled(levels, policy)
            self.leave_open(unforetold)
            self.plans.append(run)
        else:
            self.repair(run, different, policy)
            self.leave_open(unforetold, run)
            if run.before:
                self.runs.append(run)
        self.look()
        self.assert_drained(foretold)
        if is_undone and self.runs and self.runs[-1] is run:
            self.undo_the_last_run()

    def call_reconcile(self, **arguments: Any) -> None:
        named = ", ".join(f"{name} => %s" for name in arguments)
        self.db.execute(f"call level_sync.reconcile({named})", list(arguments.values()))

    def repair(self, run: Run, different: dict[Pair, Levels], policy: str) -> None:
        for pair, levels in different.items():
            if self.holders(pair):
                self.leave_open({pair}, run)
            else:
                self.repaired(run, pair, levels, self.model.reconciled(levels, policy))

    def repaired(self, run: Run, pair: Pair, before: Levels, after: Levels) -> None:
        followers = {side for side in OTHER_SIDE if before.on(side) != after.on(side)}
        if after.is_uncertain or not any(self.is_faulty(side, pair) for side in followers):
            self.model.levels[pair] = after
            if after != before:
                self.version[pair] += 1
                run.before[pair], run.after[pair], run.versions[pair] = before.sides, after, self.version[pair]
                self.effects["pair brought into step by a run"] += 1

    @rule(those=st.lists(one_of_these(BYPASSES), max_size=2), is_applied=st.booleans(), is_undone=st.booleans())
    def plan(self, those: list[tuple[Any, ...]], is_applied: bool, is_undone: bool) -> None:
        self.bypass_the_triggers(those)
        before = dict(self.seen)
        self.call_reconcile(dry_run=True)
        plan = Run(self.last_run()[0])
        planned = self.db.execute(
            "select user_id, specialization from level_sync.sync_plan where run_id = %s", [plan.run_id]
        ).fetchall()
        assert set(planned) == {pair for pair, levels in before.items() if not levels.is_equal}
        self.look()
        assert self.seen == before, "a dry run changed a level"
        for pair in planned:
            plan.before[pair] = before[pair].sides
            plan.after[pair] = self.model.reconciled(before[pair], self.settings["conflict_policy"])
        self.plans.append(plan)
        if is_applied:
            self.apply_the_last_plan()
            self.look()
            if is_undone and self.runs:
                self.undo_the_last_run()

    @precondition(lambda self: any(plan.before for plan in self.plans))
    @rule()
    def apply_the_last_plan(self) -> None:
        plan = self.plans.pop()
        queued, before = set(self.queue), dict(self.seen)
        planned = {
            (user, specialization)
            for user, specialization in self.db.execute(
                "select user_id, specialization from level_sync.sync_plan"
                " where run_id = %s and outcome = 'planned' and action <> 'report_only'",
                [plan.run_id],
            )
        }
        if not planned:
            return
        self.call_reconcile(plan=plan.run_id, approve=True)
        run = Run(self.last_run()[0])
        for pair, levels in plan.before.items():
            if before[pair].sides != levels or pair in queued:
                continue
            if self.holders(pair):
                self.leave_open({pair}, run)
                continue
            self.effects["plan applied"] += 1
            self.repaired(run, pair, before[pair], plan.after[pair])
        # What waited in the queue when it was planned is applied too, if nothing of it waits there any more.
        self.leave_open(queued | (planned - set(plan.before)), run)
        self.runs.append(run)

    @precondition(lambda self: self.runs)
    @rule()
    def undo_the_last_run(self) -> None:
        run = self.runs.pop()
        self.db.execute("select level_sync.undo(%s)", [run.run_id])
        again = self.db.execute("select level_sync.undo(%s) ->> 'undone'", [run.run_id]).fetchone()
        assert again == ("0",), "an undo was done twice"
        now = self.levels_now()
        for pair, after in run.after.items():
            if (
                not after.is_uncertain
                and self.version[pair] == run.versions[pair]
                and not self.holders(pair)
                and not self.is_any_fault(pair)
            ):
                self.effects["undo foretold"] += 1
                assert now[pair].sides == run.before[pair], f"undo left {pair} at {now[pair]}"
            if now[pair].sides == run.before[pair]:
                self.model.levels[pair] = now[pair]
                self.version[pair] += 1
                self.bypassed.add(pair)
                self.owed[pair] = None

    def truncate(self, which: str, is_emptied: bool, level: int) -> None:
        """One table, alone or after the other was emptied by a way that triggers do not see; or both."""
        if self.open_transactions():
            return
        if which == "both":
            self.db.execute(f"truncate {PROGRESS}, {LICENSE}")
            self.effects["truncate of both tables"] += 1
            self.truncated()
        else:
            if is_emptied:
                with bypass(self.db):
                    self.db.execute(f"delete from {TABLE[OTHER_SIDE[which]]}")
                for pair in PAIRS:
                    self.model.levels[pair] = self.seen[pair].with_side(OTHER_SIDE[which], None)
                    self.wrote_by_hand(pair)
                self.look()
            is_allowed = all(levels.on(OTHER_SIDE[which]) is None for levels in self.seen.values())
            try:
                self.db.execute(f"truncate {TABLE[which]}")
            except psycopg.errors.RestrictViolation:
                assert not is_allowed
                self.effects["refused truncate"] += 1
            else:
                assert is_allowed, "one table alone was truncated"
                self.effects["truncate of one table"] += 1
                self.truncated()
        if which == "both" or is_emptied:
            self.look()
            self.fill((level,) * len(PAIRS))

    def truncated(self) -> None:
        for pair in PAIRS:
            self.model.levels[pair] = Levels()
            self.wrote_by_hand(pair)

    def teardown(self) -> None:
        """Once the faults are gone, a drain and a reconcile bring everything into step without another hand."""
        self.close_everything()
        self.db.execute("delete from public.faults")
        self.db.execute("select level_sync.requeue()")
        configure(self.db, conflict_policy="progress_wins", on_error="queue", max_attempts=100)
        drain(self.db)
        self.call_reconcile(approve=True)
        waiting = self.db.execute(
            "select user_id, specialization, side, change, sqlstate, message, attempts from level_sync.sync_queue"
        ).fetchall()
        different = self.db.execute("select * from level_sync.desync_issues").fetchall()
        assert (different, waiting) == ([], [])
        assert self.db.execute(f"select * from {internals.PENDING_PAIRS}").fetchall() == []
        assert self.last_run()[1] == "success"
        self.effects["step"] += self.steps
        self.effects["whole sequence"] += self.steps >= STEPS
        self.tell()
