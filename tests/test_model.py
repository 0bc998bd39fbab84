"""Random sequences of everything that can be done to the two tables, on several connections, beside a plain model.

After each commit: a pair that nobody bypassed and that is not queued is equal, and has the levels the model says where
the promise leaves no choice; max_achieved_level never goes down; the events replayed give the present levels (but where
both sides were written alike, so that nothing was carried); nothing of ours is left open. And no write fails but for
the reasons the contract names.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from academy import KEY, LICENSE, OTHER, PROGRESS, SIDE, bypass, configure, drain, user_trigger
from level_model import LIMITS, OTHER_SIDE, PAIRS, UNCERTAIN, Level, Levels, Model, Pair, Refused, Transaction

TABLE = {side: table for table, side in SIDE.items()}

pairs = st.sampled_from(PAIRS)
sides = st.sampled_from(["progress", "license"])
levels = st.integers(1, 8)
writers = st.integers(0, 1)

RESET = """
set session_replication_role = replica;
truncate specialization_progress, user_licenses, level_sync.sync_events, level_sync.sync_queue, level_sync.sync_log,
         level_sync.sync_plan, level_sync.pending_pairs, public.faults;
reset session_replication_role;
"""
DEFAULTS: dict[str, Any] = {
    "on_error": "queue",
    "on_delete": "restrict",
    "inline_limit": 32,
    "lock_wait": "5 ms",
    "conflict_policy": "progress_wins",
}
FAULTY = """
    if exists (select from public.faults where faults.side = tg_argv[0] and faults.user_id = {user})
    then raise 'the % of user % is broken', tg_argv[0], {user}; end if
"""


@dataclass
class Writer:
    """One session of the application."""

    connection: psycopg.Connection[Any]
    transaction: Transaction | None = None


@dataclass
class Run:
    """A reconcile that changed something, or a plan that may yet be applied: each pair's levels before and after."""

    run_id: int
    before: dict[Pair, tuple[Level, Level]] = field(default_factory=dict)
    after: dict[Pair, Levels] = field(default_factory=dict)
    versions: dict[Pair, int] = field(default_factory=dict)


class Academy(RuleBasedStateMachine):
    """The rules write; the invariant looks after each of them."""

    sessions: list[psycopg.Connection[Any]]  # two writers, and the one that looks
    sequences = steps = certain = uncertain = 0

    def __init__(self) -> None:
        super().__init__()
        *connections, self.db = self.sessions
        for connection in connections:
            connection.execute("rollback")
        self.db.execute(RESET)
        configure(self.db, **DEFAULTS)
        self.settings = dict(DEFAULTS)
        self.writers = [Writer(connection) for connection in connections]
        self.model = Model()
        self.faults: set[tuple[str, int]] = set()
        self.bypassed: set[Pair] = set()
        self.silent: dict[Pair, int] = {}  # the last event before the pair was written without one
        self.written: dict[Pair, set[Level]] = {pair: {None} for pair in PAIRS}
        self.highest: dict[Pair, int] = {}
        self.reborn: set[Pair] = set()  # whose license was deleted, and may be another row now
        self.version: dict[Pair, int] = dict.fromkeys(PAIRS, 0)
        self.runs: list[Run] = []
        self.plans: list[Run] = []
        type(self).sequences += 1

    @initialize(at_first=st.tuples(*[st.one_of(st.none(), levels, levels)] * len(PAIRS)))
    def begin_with_pairs(self, at_first: tuple[Level, ...]) -> None:
        for pair, level in zip(PAIRS, at_first, strict=True):
            if level is not None:
                self.insert_a_row(0, pair, "progress", level, "insert")

    # What a write touches

    def others_hold(self, writer: Writer | None, pair: Pair) -> bool:
        return any(
            other.transaction is not None and pair in other.transaction.touched
            for other in self.writers
            if other is not writer
        )

    def is_faulty(self, side: str, pair: Pair) -> bool:
        return (side, pair[0]) in self.faults

    def last_event(self) -> int:
        return self.db.execute("select coalesce(max(event_id), 0) from level_sync.sync_events").fetchone()[0]

    def level(self, connection: psycopg.Connection[Any], side: str, pair: Pair) -> Level:
        user, specialization = KEY[TABLE[side]]
        row = connection.execute(
            f"select current_level from {TABLE[side]} where {user} = %s and {specialization} = %s", pair
        ).fetchone()
        return row[0] if row else None

    def write(
        self, number: int, statement: str, values: list[Any], touched: list[tuple[Pair, str]], refusals: set[str]
    ) -> tuple[Writer, Transaction, int] | None:
        """Executes a statement that writes sides of pairs; None where it failed as the contract allows."""
        writer = self.writers[number]
        allowed = set(refusals)
        for pair, side in touched:
            if self.others_hold(writer, pair):
                allowed.add("55P03")
            if self.is_faulty(side, pair) or (
                self.settings["on_error"] == "raise" and self.is_faulty(OTHER_SIDE[side], pair)
            ):
                allowed.add("P0001")
        transaction = writer.transaction or Transaction()
        transaction.touched |= {pair for pair, _ in touched}
        transaction.is_deferred |= self.settings["inline_limit"] < 32
        try:
            count = writer.connection.execute(statement, values).rowcount
        except psycopg.Error as error:
            if error.sqlstate not in allowed:
                raise
            self.fail_statement(writer)
            return None
        assert not refusals & {"23514", "23502"}, f"{statement} {values} was to be refused"
        return writer, transaction, count

    def fail_statement(self, writer: Writer) -> None:
        if writer.transaction is None:
            return
        if writer.transaction.savepoints:
            writer.connection.execute("rollback to savepoint trial")
            writer.transaction.rollback_to_savepoint()
        else:
            writer.connection.execute("rollback")
            writer.transaction = None

    def note(self, pair: Pair, level: Level, other: Level) -> None:
        """A level was written beside that of the other side; where they are alike, nothing is carried."""
        self.written[pair].add(level)
        if level == other:
            self.silent[pair] = self.last_event()

    def expect(self, writer: Writer, transaction: Transaction, pair: Pair) -> None:
        """Turns what the model says of a pair just written into what holds where a carry can fail or must wait."""
        wanted = transaction.written[pair]
        if transaction.is_deferred and (writer.transaction or wanted.is_uncertain):
            self.silent[pair] = self.last_event() + 1_000_000  # both sides may be written alike: nothing to carry
        if self.others_hold(writer, pair):
            for other in self.writers:
                if other is not writer and other.transaction and pair in other.transaction.touched:
                    other.transaction.written[pair] = UNCERTAIN
            transaction.written[pair] = UNCERTAIN
        elif self.is_faulty("progress", pair) or self.is_faulty("license", pair):
            transaction.written[pair] = UNCERTAIN

    def finish(self, writer: Writer, transaction: Transaction) -> None:
        """After an autocommit statement: what its commit must have done."""
        if writer.transaction is None:
            self.model.judge(transaction, self.settings["on_delete"])
            self.adopt(transaction)

    def adopt(self, transaction: Transaction) -> None:
        self.model.commit(transaction)
        for pair in transaction.written:
            self.version[pair] += 1

    # Writes

    @rule(number=writers, pair=pairs, side=sides, level=st.one_of(levels, st.sampled_from([None, 0, -1, 9, 4])))
    def update_a_level(self, number: int, pair: Pair, side: str, level: Level) -> None:
        table, limit = TABLE[side], LIMITS[pair[1]]
        now = self.level(self.writers[number].connection, side, pair)
        other = self.level(self.writers[number].connection, OTHER_SIDE[side], pair)
        refusals = set()
        if now is not None and (level is None or not 1 <= level <= limit):
            refusals = {"23502", "23514"}
        highest = ", max_achieved_level = greatest(max_achieved_level, %s)" if side == "license" else ""
        user, specialization = KEY[table]
        done = self.write(
            number,
            f"update {table} set current_level = %s{highest} where {user} = %s and {specialization} = %s",
            [level, *([level] if highest else []), *pair],
            [(pair, side)],
            refusals,
        )
        if done and done[2] and level != now:
            writer, transaction, _ = done
            self.note(pair, level, other)
            self.model.update(transaction, pair, level)
            self.expect(writer, transaction, pair)
            self.finish(writer, transaction)

    @rule(number=writers, pair=pairs, side=sides)
    def update_without_a_level(self, number: int, pair: Pair, side: str) -> None:
        column = "total_xp = total_xp + 5" if side == "progress" else "started_at = clock_timestamp()"
        user, specialization = KEY[TABLE[side]]
        self.write(
            number,
            f"update {TABLE[side]} set {column} where {user} = %s and {specialization} = %s",
            list(pair),
            [(pair, side)],
            set(),
        )
        self.version[pair] += 1  # a created row that has earned something since is not taken back

    @rule(number=writers, pair=pairs, side=sides, level=levels, way=st.sampled_from(["insert", "upsert", "merge"]))
    def insert_a_row(self, number: int, pair: Pair, side: str, level: int, way: str) -> None:
        level = min(level, LIMITS[pair[1]])
        user, specialization = KEY[TABLE[side]]
        now = self.level(self.writers[number].connection, side, pair)
        other = self.level(self.writers[number].connection, OTHER_SIDE[side], pair)
        plain = f"insert into {TABLE[side]} ({user}, {specialization}, current_level) values (%s, %s, %s)"
        statement = {
            "insert": f"{plain} on conflict do nothing",
            "upsert": f"{plain} on conflict ({user}, {specialization})"
            " do update set current_level = excluded.current_level",
            "merge": f"merge into {TABLE[side]} as row"
            " using (values (%s::bigint, %s::text, %s::integer)) as new (user_id, specialization, level)"
            f" on row.{user} = new.user_id and row.{specialization} = new.specialization"
            " when matched then update set current_level = new.level"
            f" when not matched then insert ({user}, {specialization}, current_level)"
            " values (new.user_id, new.specialization, new.level)",
        }[way]
        # Whoever else has inserted the pair and not committed: MERGE fails where ON CONFLICT would wait.
        refusals = {"23505"} if way == "merge" and self.others_hold(self.writers[number], pair) else set()
        done = self.write(number, statement, [*pair, level], [(pair, side)], refusals)
        if done and done[2] and level != now:
            writer, transaction, _ = done
            self.note(pair, level, other)
            if now is None:
                self.model.insert(transaction, pair, side, level)
            else:
                self.model.update(transaction, pair, level)
            self.expect(writer, transaction, pair)
            self.finish(writer, transaction)

    @rule(number=writers, step=st.sampled_from([1, -1]), side=sides)
    def update_every_row(self, number: int, step: int, side: str) -> None:
        """In bulk, up or down one level within the limits."""
        connection, table = self.writers[number].connection, TABLE[side]
        before = {pair: self.level(connection, side, pair) for pair in PAIRS}
        others = {pair: self.level(connection, OTHER_SIDE[side], pair) for pair in PAIRS}
        done = self.write(
            number,
            f"update {table} set current_level = least(greatest(current_level + %s, 1),"
            f" (select max_levels from specializations where id = {KEY[table][1]}))",
            [step],
            [(pair, side) for pair in PAIRS],
            set(),
        )
        if done:
            writer, transaction, _ = done
            for pair, now in before.items():
                if now is not None and (level := min(max(now + step, 1), LIMITS[pair[1]])) != now:
                    self.note(pair, level, others[pair])
                    self.model.update(transaction, pair, level)
                    self.expect(writer, transaction, pair)
            self.finish(writer, transaction)

    @rule(number=writers, pair=pairs, side=sides)
    def delete_one_side(self, number: int, pair: Pair, side: str) -> None:
        now = self.model.seen_by(self.writers[number].transaction or Transaction(), pair)
        is_last = now.on(OTHER_SIDE[side]) is None and not now.is_uncertain
        refusals = set() if is_last or self.writers[number].transaction else {"23001"}
        user, specialization = KEY[TABLE[side]]
        done = self.write(
            number,
            f"delete from {TABLE[side]} where {user} = %s and {specialization} = %s",
            list(pair),
            [(pair, side)],
            refusals,
        )
        if done and done[2]:
            writer, transaction, _ = done
            self.reborn.add(pair)
            self.model.delete(transaction, pair, side)
            self.expect(writer, transaction, pair)
            self.finish(writer, transaction)

    @rule(number=writers, pair=pairs, first=sides)
    def delete_both_sides(self, number: int, pair: Pair, first: str) -> None:
        with_both = (
            f"with gone as (delete from {PROGRESS} where student_id = %s and specialization_id = %s)"
            f" delete from {LICENSE} where user_id = %s and specialization_type = %s"
        )
        done = self.write(number, with_both, [*pair, *pair], [(pair, first), (pair, OTHER_SIDE[first])], set())
        if done:
            writer, transaction, _ = done
            self.reborn.add(pair)
            for side in (first, OTHER_SIDE[first]):
                if transaction.written.get(pair, self.model.levels[pair]).on(side) is not None:
                    self.model.delete(transaction, pair, side)
                    self.expect(writer, transaction, pair)
            self.finish(writer, transaction)

    @rule(number=writers, pair=pairs, place=pairs, both=st.booleans(), side=sides)
    def move_to_another_key(self, number: int, pair: Pair, place: Pair, both: bool, side: str) -> None:
        """Whoever moves both rows in one transaction moves the pair; one row alone is judged like a deletion."""
        writer = self.writers[number]
        connection = writer.connection
        held = [self.level(connection, each, place) for each in ("progress", "license")]
        there = [self.level(connection, each, pair) for each in ("progress", "license")]
        now = self.model.seen_by(writer.transaction or Transaction(), pair)
        if pair == place or held != [None, None] or None in there or now.is_uncertain or there[0] != there[1]:
            return
        if there[0] > LIMITS[place[1]]:
            return
        mine = f"update {TABLE[side]} set {KEY[TABLE[side]][0]} = %s, {KEY[TABLE[side]][1]} = %s" + (
            f" where {KEY[TABLE[side]][0]} = %s and {KEY[TABLE[side]][1]} = %s"
        )
        table = OTHER[TABLE[side]]
        other = f"update {table} set {KEY[table][0]} = %s, {KEY[table][1]} = %s" + (
            f" where {KEY[table][0]} = %s and {KEY[table][1]} = %s"
        )
        touched = [(each, on) for each in (pair, place) for on in ("progress", "license")]
        refusals = {"23505"} if self.others_hold(writer, place) else set()
        if not both and writer.transaction is None and self.settings["on_delete"] != "propagate":
            refusals.add("23001")
        statement = f"with moved as ({mine}) {other}" if both else mine
        done = self.write(number, statement, [*place, *pair] * (2 if both else 1), touched, refusals)
        if done:
            _, transaction, _ = done
            self.reborn |= {pair, place}
            for each in (pair, place):
                transaction.written[each] = UNCERTAIN
                self.written[each] |= {there[0]}
                self.silent[each] = self.last_event() + 1_000_000
            if both and not any(self.others_hold(writer, each) or self.is_any_fault(each) for each in (pair, place)):
                if not transaction.is_deferred or writer.transaction is None:
                    transaction.written[pair] = Levels()
                    transaction.written[place] = Levels(there[0], there[0])
            else:
                for other_writer in self.writers:
                    if other_writer is not writer and other_writer.transaction:
                        for each in {pair, place} & other_writer.transaction.touched:
                            other_writer.transaction.written[each] = UNCERTAIN
            self.finish(writer, transaction)

    def is_any_fault(self, pair: Pair) -> bool:
        return self.is_faulty("progress", pair) or self.is_faulty("license", pair)

    @rule(number=writers, pair=pairs, level=st.integers(0, 9))
    def advance_a_license(self, number: int, pair: Pair, level: int) -> None:
        now = self.level(self.writers[number].connection, "license", pair)
        other = self.level(self.writers[number].connection, "progress", pair)
        done = self.write(
            number,
            "select level_sync.advance_license(%s, %s, %s, 'the dean', 'june') ->> 'success'",
            [*pair, level],
            [(pair, "license")],
            {"P0002"} if now is None else set(),
        )
        if done and now is not None and now < level <= LIMITS[pair[1]]:
            writer, transaction, _ = done
            self.note(pair, level, other)
            self.model.update(transaction, pair, level)
            self.expect(writer, transaction, pair)
            self.finish(writer, transaction)

    # Transactions

    @precondition(lambda self: any(writer.transaction is None for writer in self.writers))
    @rule(number=writers)
    def begin(self, number: int) -> None:
        writer = self.writers[number]
        if writer.transaction is None:
            writer.connection.execute("begin")
            writer.transaction = Transaction()

    @rule(number=writers)
    def savepoint(self, number: int) -> None:
        writer = self.writers[number]
        if writer.transaction:
            writer.connection.execute("savepoint trial")
            writer.transaction.savepoint()

    @rule(number=writers)
    def rollback_to_savepoint(self, number: int) -> None:
        writer = self.writers[number]
        if writer.transaction and writer.transaction.savepoints:
            self.fail_statement(writer)

    @rule(number=writers)
    def rollback(self, number: int) -> None:
        writer = self.writers[number]
        writer.connection.execute("rollback")
        writer.transaction = None

    @rule(number=writers, way=st.sampled_from(["commit", "commit", "prepare", "immediate"]))
    def commit(self, number: int, way: str) -> None:
        writer = self.writers[number]
        transaction = writer.transaction
        if transaction is None:
            return
        is_refused = False
        expected = Transaction(dict(transaction.written))
        try:
            self.model.judge(expected, self.settings["on_delete"])
        except Refused:
            is_refused = True
        may_be_refused = is_refused or any(now.is_uncertain for now in transaction.written.values())
        try:
            if way == "prepare":
                writer.connection.execute("prepare transaction 'ours'")
                writer.connection.execute("commit prepared 'ours'")
            elif way == "immediate":
                writer.connection.execute("set constraints all immediate")
                writer.connection.execute("commit")
            else:
                writer.connection.execute("commit")
        except psycopg.Error as error:
            if not may_be_refused or (error.sqlstate != "23001" and self.settings["on_error"] == "queue"):
                raise
            with suppress(psycopg.Error):
                writer.connection.execute("rollback")
            writer.transaction = None
            return
        writer.transaction = None
        assert not is_refused, "a commit that leaves one side was to be refused"
        self.adopt(expected)

    # What else happens to a database

    @rule(pair=pairs, side=sides, level=st.one_of(st.none(), levels))
    def bypass_the_triggers(self, pair: Pair, side: str, level: Level) -> None:
        if self.others_hold(None, pair):
            return
        table = TABLE[side]
        user, specialization = KEY[table]
        with bypass(self.db):
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
        now = self.levels_now()[pair]
        self.written[pair] |= {level}
        self.model.levels[pair] = now
        self.version[pair] += 1
        self.bypassed.add(pair)
        self.silent[pair] = self.last_event()

    @rule(side=sides, user=st.integers(1, 3))
    def break_or_mend_a_table_for_a_user(self, side: str, user: int) -> None:
        if (side, user) in self.faults:
            self.faults.remove((side, user))
            self.db.execute("delete from public.faults where side = %s and user_id = %s", [side, user])
        else:
            self.faults.add((side, user))
            self.db.execute("insert into public.faults (side, user_id) values (%s, %s)", [side, user])
        for writer in self.writers:
            for pair in writer.transaction.written if writer.transaction else ():
                if pair[0] == user:
                    writer.transaction.written[pair] = UNCERTAIN

    @rule(
        change=st.one_of(
            st.tuples(st.just("on_error"), st.sampled_from(["queue", "queue", "raise"])),
            st.tuples(st.just("on_delete"), st.sampled_from(["restrict", "propagate", "recreate"])),
            st.tuples(st.just("inline_limit"), st.sampled_from([0, 1, 32])),
            st.tuples(st.just("lock_wait"), st.sampled_from(["0", "1 ms", "5 ms"])),
            st.tuples(
                st.just("conflict_policy"),
                st.sampled_from(["progress_wins", "license_wins", "highest_wins", "latest_wins", "report_only"]),
            ),
        )
    )
    def change_a_setting(self, change: tuple[str, Any]) -> None:
        name, value = change
        configure(self.db, **{name: value})
        self.settings[name] = value

    @rule()
    def drain_the_queue(self) -> None:
        queued = self.queued()
        drain(self.db)
        self.leave_open(queued)

    def leave_open(self, pairs: set[Pair], run: Run | None = None) -> None:
        """Queued or held pairs come into step with one of their sides, or wait on."""
        for pair in pairs:
            if run:
                run.before[pair], run.after[pair], run.versions[pair] = self.model.levels[pair].sides, UNCERTAIN, -1
            self.model.levels[pair] = UNCERTAIN
            self.version[pair] += 1

    @rule(direction=st.sampled_from([None, None, "progress_to_license", "license_to_progress"]))
    def reconcile(self, direction: str | None) -> None:
        queued = self.queued()
        before = dict(self.model.levels)
        self.db.execute("call level_sync.reconcile(direction => %s, approve => true)", [direction])
        run = Run(self.last_run_id())
        for pair, levels in before.items():
            if pair in queued or levels.is_equal:
                continue
            if self.others_hold(None, pair):
                self.leave_open({pair}, run)
                continue
            after = self.model.reconciled(levels, direction or self.settings["conflict_policy"])
            self.repaired(run, pair, levels, after)
        self.leave_open({pair for pair in queued if not before[pair].is_equal}, run)
        self.runs.append(run)

    def repaired(self, run: Run, pair: Pair, before: Levels, after: Levels) -> None:
        followers = {side for side in OTHER_SIDE if before.on(side) != after.on(side)}
        if after.is_uncertain or not any(self.is_faulty(side, pair) for side in followers):
            self.model.levels[pair] = after
            if after != before:
                self.version[pair] += 1
                run.before[pair], run.after[pair], run.versions[pair] = before.sides, after, self.version[pair]

    @rule()
    def dry_run(self) -> None:
        before = self.levels_now()
        self.db.execute("call level_sync.reconcile(dry_run => true)")
        assert self.levels_now() == before, "a dry run changed a level"
        plan = Run(self.last_run_id())
        planned = self.db.execute(
            "select user_id, specialization from level_sync.sync_plan where run_id = %s", [plan.run_id]
        ).fetchall()
        assert set(planned) == {pair for pair, levels in before.items() if not levels.is_equal}
        for pair in planned:
            plan.before[pair] = before[pair].sides
            plan.after[pair] = self.model.reconciled(before[pair], self.settings["conflict_policy"])
        self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule()
    def apply_the_last_plan(self) -> None:
        plan = self.plans.pop()
        queued, before = self.queued(), self.levels_now()
        applicable = self.db.execute("select level_sync._count_planned(%s)", [plan.run_id]).fetchone()[0]
        if not applicable:
            return
        self.db.execute("call level_sync.reconcile(plan => %s, approve => true)", [plan.run_id])
        run = Run(self.last_run_id())
        for pair, levels in plan.before.items():
            if before[pair].sides != levels or pair in queued:
                continue
            if self.others_hold(None, pair):
                self.leave_open({pair}, run)
                continue
            self.repaired(run, pair, before[pair], plan.after[pair])
        self.leave_open(queued, run)
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
            is_foretold = (
                not after.is_uncertain
                and self.version[pair] == run.versions[pair]
                and not self.others_hold(None, pair)
                and not self.is_any_fault(pair)
            )
            if is_foretold:
                assert now[pair].sides == run.before[pair], f"undo left {pair} at {now[pair]}"
            if now[pair].sides == run.before[pair]:
                self.put_back(pair, now[pair])

    def put_back(self, pair: Pair, now: Levels) -> None:
        self.model.levels[pair] = now
        self.version[pair] += 1
        self.bypassed.add(pair)
        self.silent[pair] = self.last_event()

    @rule(side=sides)
    def truncate_one_table(self, side: str) -> None:
        if any(writer.transaction for writer in self.writers):
            return
        is_allowed = all(levels.on(OTHER_SIDE[side]) is None for levels in self.levels_now().values())
        try:
            self.db.execute(f"truncate {TABLE[side]}")
        except psycopg.errors.RestrictViolation:
            assert not is_allowed
        else:
            assert is_allowed, "one table alone was truncated"
            self.leave_open(set(PAIRS))

    # What must hold

    def last_run_id(self) -> int:
        return self.db.execute("select max(run_id) from level_sync.sync_log").fetchone()[0]

    def levels_now(self) -> dict[Pair, Levels]:
        return {
            pair: Levels(self.level(self.db, "progress", pair), self.level(self.db, "license", pair)) for pair in PAIRS
        }

    def queued(self) -> set[Pair]:
        return set(
            self.db.execute(
                "select user_id, specialization from level_sync.sync_queue"
                " union select user_id, specialization from level_sync.pending_pairs"
            ).fetchall()
        )

    @invariant()
    def the_promises_hold(self) -> None:
        type(self).steps += 1
        now, queued = self.levels_now(), self.queued()
        replayed = {
            (user, specialization): (event, level)
            for user, specialization, event, level in self.db.execute(
                "select user_id, specialization, event_id, new_level from level_sync.sync_events order by event_id"
            )
        }
        highest = {
            (user, specialization): level
            for user, specialization, level in self.db.execute(
                "select user_id, specialization_type, max_achieved_level from user_licenses"
            )
        }
        for pair, levels in now.items():
            expected = self.model.levels[pair]
            if expected.is_uncertain:
                type(self).uncertain += 1
                assert set(levels.sides) <= self.written[pair], f"{pair} has {levels}, which nobody wrote"
            else:
                type(self).certain += 1
                assert levels.sides == expected.sides, f"{pair} has {levels}, not {expected}"
            if levels.is_equal:
                self.bypassed.discard(pair)
            else:
                assert pair in self.bypassed | queued, f"{pair} has {levels} and nobody will mend it"
            self.model.levels[pair] = levels

            if levels.license is None or pair in self.reborn:
                self.highest.pop(pair, None)
            else:
                assert highest[pair] >= max(levels.license, self.highest.get(pair, 0)), f"{pair} lost its highest level"
                self.highest[pair] = highest[pair]

            event, level = replayed.get(pair, (0, None))
            if event > self.silent.get(pair, -1) and levels.is_equal and levels.license is not None:
                assert level == levels.license, f"the events of {pair} end at {level}, not {levels}"

        if not any(writer.transaction for writer in self.writers):
            self.reborn.clear()
            self.nothing_is_left_open()

    def nothing_is_left_open(self) -> None:
        (left,) = self.db.execute(
            "select (select count(*) from level_sync.sync_log where status = 'running')"
            "     + (select count(*) from pg_locks where locktype = 'advisory'"
            "           and database = (select oid from pg_database where datname = current_database()))"
            "     + (select count(*) from pg_prepared_xacts where database = current_database())"
        ).fetchone()
        assert left == 0
        for writer in self.writers:
            told = writer.connection.execute(
                "select current_setting('level_sync.own_depth', true), current_setting('level_sync.pending', true),"
                " current_setting('level_sync.subtransactions', true), current_setting('lock_timeout')"
            ).fetchone()
            assert {*told[:3]} <= {None, ""}, told
            assert told[3] == "50ms"

    def teardown(self) -> None:
        """Once the faults are gone, a drain and a reconcile bring everything into step without another hand."""
        for writer in self.writers:
            writer.connection.execute("rollback")
            writer.transaction = None
        self.db.execute("delete from public.faults")
        self.db.execute("select level_sync.requeue()")
        configure(self.db, conflict_policy="progress_wins", on_error="queue")
        drain(self.db)
        self.db.execute("call level_sync.reconcile(approve => true)")
        assert self.db.execute("select * from level_sync.desync_issues").fetchall() == []
        assert self.queued() == set()
        assert self.db.execute("select status from level_sync.sync_log order by run_id desc limit 1").fetchone() == (
            "success",
        )


@pytest.mark.leftovers
def test_random_sequences_keep_every_promise(database, request, record_property):
    is_long = request.config.getoption("proof")
    db = database.connect()
    db.execute("insert into users (id) values (1), (2), (3)")
    db.execute("create table public.faults (side text, user_id bigint)")
    for side, table in TABLE.items():
        event = f"before insert or update on {table}"
        user_trigger(db, event, FAULTY.format(user=f"new.{KEY[table][0]}"), name=f"{side}_may_be_broken", argument=side)
    Academy.sessions = [database.connect(options="-c lock_timeout=50ms") for _ in range(2)] + [db]
    Academy.sequences = Academy.steps = Academy.certain = Academy.uncertain = 0
    run_state_machine_as_test(
        Academy,
        settings=settings(
            max_examples=2000 if is_long else 25,
            stateful_step_count=50 if is_long else 40,
            derandomize=not is_long,
            deadline=None,
            report_multiple_bugs=False,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        ),
    )
    record_property(
        "figure",
        f"{Academy.sequences} sequences, {Academy.steps} steps; levels foretold {Academy.certain} times,"
        f" left open {Academy.uncertain} times",
    )
