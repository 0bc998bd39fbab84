"""A random sequence so far: what the model says of it, and what must hold after each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
from hypothesis.stateful import RuleBasedStateMachine, invariant

import internals
from academy import KEY, LICENSE, PROGRESS
from level_model import PAIRS, Level, Levels, Model, Pair, Transaction, replay
from sequence_choices import SIDES, TABLE

STEPS = 50
RESET = f"""
set session_replication_role = replica;
truncate specialization_progress, user_licenses, level_sync.sync_events, level_sync.sync_queue, level_sync.sync_log,
         level_sync.sync_plan, {internals.PENDING_PAIRS}, public.faults, public.exams;
reset session_replication_role;
"""
LOOK = f"""
select (select coalesce(jsonb_agg(jsonb_build_array(student_id, specialization_id, current_level)), '[]')
          from specialization_progress),
       (select coalesce(jsonb_agg(jsonb_build_array(user_id, specialization_type, current_level, max_achieved_level)),
                        '[]')
          from user_licenses),
       (select coalesce(jsonb_agg(jsonb_build_array(user_id, specialization, side, change, is_dead)
                                  order by queued_at, id), '[]')
          from (select user_id, specialization, side, change, dead_at is not null as is_dead,
                       queued_at, queue_id as id from level_sync.sync_queue
                 union all
                select user_id, specialization, side, change, false, queued_at, pending_id
                  from {internals.PENDING_PAIRS}) as waiting),
       (select coalesce(jsonb_agg(jsonb_build_array(event_id, user_id, specialization, direction, action, old_level,
                                                    new_level, source) order by event_id), '[]')
          from level_sync.sync_events),
       (select count(*) from level_sync.sync_log where status = 'running')
       + (select count(*) from pg_locks where locktype = 'advisory'
             and database = (select oid from pg_database where datname = current_database())),
       (select count(*) from pg_prepared_xacts where database = current_database())
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


@dataclass
class Queued:
    """A pair that waits: its newest entry."""

    side: str
    change: str
    is_alive: bool  # some entry of it is not dead


class SequenceState(RuleBasedStateMachine):
    """Looks after each step of whoever writes."""

    sessions: list[psycopg.Connection[Any]]  # two writers, and the one that looks
    partitions: dict[tuple[str, int], str]  # the partition of each side that a user's rows are in; else the table
    ladder: dict[str, dict[int, tuple[int, int]]]  # XP and sessions each level asks for
    effects: Counter[str]
    tell: Callable[[], None]

    def __init__(self) -> None:
        super().__init__()
        *connections, self.db = self.sessions
        self.writers = [Writer(connection) for connection in connections]
        self.prepared: dict[str, Transaction] = {}
        self.close_everything()
        self.db.execute(RESET)
        self.settings: dict[str, Any] = {}
        self.model = Model()
        self.faults: set[tuple[str, int]] = set()
        self.bypassed: set[Pair] = set()
        self.unexplained: set[Pair] = set()  # changed since the last look in a way that events do not tell
        self.seen = {pair: Levels() for pair in PAIRS}  # at the last look
        self.seen_events: set[int] = set()
        self.queue: dict[Pair, Queued] = {}
        self.written: dict[Pair, set[Level]] = {pair: {None} for pair in PAIRS}
        self.highest: dict[Pair, int] = {}
        self.reborn: set[Pair] = set()  # whose license was deleted since the last look, and may be another row now
        self.owed: dict[Pair, str | None] = {}  # the side written last, where that is certain
        self.version: dict[Pair, int] = dict.fromkeys(PAIRS, 0)
        self.runs: list[Run] = []
        self.plans: list[Run] = []
        self.steps = 0
        self.effects["sequence"] += 1

    def close_everything(self) -> None:
        for writer in self.writers:
            writer.connection.execute("rollback")
            writer.transaction = None
        self.prepared.clear()
        for (gid,) in self.db.execute(
            "select gid from pg_prepared_xacts where database = current_database()"
        ).fetchall():
            self.db.execute(f"rollback prepared '{gid}'")

    # What a write touches

    def open_transactions(self) -> list[Transaction]:
        return [*(writer.transaction for writer in self.writers if writer.transaction), *self.prepared.values()]

    def holders(self, pair: Pair, but: Transaction | None = None) -> list[Transaction]:
        return [held for held in self.open_transactions() if held is not but and pair in held.touched]

    def is_faulty(self, side: str, pair: Pair, transaction: Transaction | None = None) -> bool:
        faults = self.faults if transaction is None or transaction.faults is None else transaction.faults
        return (side, pair[0]) in faults

    def is_any_fault(self, pair: Pair, transaction: Transaction | None = None) -> bool:
        return any(self.is_faulty(side, pair, transaction) for side in SIDES)

    def rules_of(self, transaction: Transaction) -> dict[str, Any]:
        return self.settings if transaction.rules is None else transaction.rules

    def is_stale(self, transaction: Transaction, pair: Pair) -> bool:
        """Whether a snapshot is older than what others have done to the pair."""
        return transaction.versions is not None and transaction.versions[pair] != self.version[pair]

    def levels_for(self, writer: Writer, side: str, pair: Pair) -> tuple[Level, Level]:
        """The levels on a side and on the other one, as a session sees them. A snapshot older than a row that was
        deleted and made anew sees both."""
        found = writer.connection.execute(
            f"select (select max(current_level) from {PROGRESS} where student_id = %s and specialization_id = %s),"
            f" (select max(current_level) from {LICENSE} where user_id = %s and specialization_type = %s)",
            [*pair, *pair],
        ).fetchone()
        return (found[0], found[1]) if side == "progress" else (found[1], found[0])

    # What must hold

    def last_run(self) -> tuple[int, str]:
        return self.db.execute("select run_id, status from level_sync.sync_log order by run_id desc limit 1").fetchone()

    def levels_now(self) -> dict[Pair, Levels]:
        now = {pair: Levels() for pair in PAIRS}
        for side, table in TABLE.items():
            user, specialization = KEY[table]
            for *pair, level in self.db.execute(f"select {user}, {specialization}, current_level from {table}"):
                now[tuple(pair)] = now[tuple(pair)].with_side(side, level)
        return now

    @invariant()
    def the_promises_hold(self) -> None:
        self.steps += 1
        if self.settings:
            self.look()
            self.nothing_is_left_open()

    def look(self) -> None:
        """Compares the database with the model, and takes from it what the model left open."""
        progress, licenses, queue, events, self.open_count, self.prepared_count = self.db.execute(LOOK).fetchone()
        now = {pair: Levels() for pair in PAIRS}
        highest: dict[Pair, int] = {}
        for user, specialization, level in progress:
            now[user, specialization] = now[user, specialization].with_side("progress", level)
        for user, specialization, level, achieved in licenses:
            now[user, specialization] = now[user, specialization].with_side("license", level)
            highest[user, specialization] = achieved
        self.take_queue(queue)
        news: dict[Pair, list[Any]] = {}
        for event_id, user, specialization, *event in events:
            if event_id not in self.seen_events:
                self.seen_events.add(event_id)
                news.setdefault((user, specialization), []).append(event)
        for pair, levels in now.items():
            self.compare_levels(pair, levels)
            self.compare_events(pair, levels, news.get(pair, []))
            if levels.license is None or pair in self.reborn:
                self.highest.pop(pair, None)
            if levels.license is not None:
                assert highest[pair] >= max(levels.license, self.highest.get(pair, 0)), f"{pair} lost its highest level"
                self.highest[pair] = highest[pair]
            self.model.levels[pair] = self.seen[pair] = levels
        self.reborn.clear()
        self.unexplained.clear()

    def take_queue(self, queue: list[list[Any]]) -> None:
        was_dead = {pair for pair, entry in self.queue.items() if not entry.is_alive}
        self.queue = {}
        for user, specialization, side, change, is_dead in queue:
            pair = (user, specialization)
            is_alive = not is_dead or (pair in self.queue and self.queue[pair].is_alive)
            self.queue[pair] = Queued(side, change, is_alive)
        self.effects["dead pair"] += sum(
            not entry.is_alive and pair not in was_dead for pair, entry in self.queue.items()
        )

    def compare_levels(self, pair: Pair, levels: Levels) -> None:
        expected = self.model.levels[pair]
        if expected.is_uncertain:
            self.effects["level left open"] += 1
            assert set(levels.sides) <= self.written[pair], f"{pair} has {levels}, which nobody wrote"
        else:
            self.effects["level foretold"] += 1
            assert levels.sides == expected.sides, f"{pair} has {levels}, not {expected}"
        if levels.is_equal:
            self.bypassed.discard(pair)
        else:
            assert pair in self.bypassed or pair in self.queue, f"{pair} has {levels} and nobody will mend it"
        side = self.owed.get(pair)
        if side and pair in self.queue and not levels.is_equal:
            assert self.queue[pair].side == side, f"{pair} was written last on the {side}, not {self.queue[pair]}"

    def compare_events(self, pair: Pair, levels: Levels, events: list[Any]) -> None:
        if pair in self.unexplained:
            return
        seen = self.seen[pair]
        try:
            replayed = replay(seen, events)
        except AssertionError as wrong:
            raise AssertionError(f"the events of {pair} do not fit: {events} on {seen}: {wrong}") from wrong
        if events and levels.is_equal:
            assert levels.sides == replayed.sides, f"the events of {pair} end at {replayed}, not {levels}: {events}"
        elif not events:
            assert levels.progress == seen.progress or levels.license == seen.license, f"{pair} changed without events"

    def nothing_is_left_open(self) -> None:
        assert self.prepared_count == len(self.prepared)
        if self.open_transactions():
            return
        assert self.open_count == 0
        self.effects["nothing left open"] += 1
        for writer in self.writers:
            assert internals.is_clean(writer.connection)
            assert writer.connection.execute("show lock_timeout").fetchone() == ("10ms",)
