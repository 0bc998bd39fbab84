"""Random sequences of everything that can be done to the two tables, on several connections, beside a plain model.

After each commit: a pair that nobody bypassed and that is not queued is equal, and has the levels the model says where
the promise leaves no choice; max_achieved_level never goes down; the events replayed give the present levels, each from
the level that was there before it; what waits in the queue is what the model says was written last, and a drain makes
that win; nothing of ours is left open. No write fails but for the reasons the contract names. And every one of these
things has really happened: EFFECTS counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, note, settings
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
from level_model import (
    LIMITS,
    OTHER_SIDE,
    PAIRS,
    UNCERTAIN,
    Level,
    Levels,
    Model,
    Pair,
    Refused,
    Transaction,
    replay,
)
from level_sync import install
from level_sync.servers import system_binaries

TABLE = {side: table for table, side in SIDE.items()}
SIDES = ["progress", "license"]
STEPS = 50
# Of 50 steps each; the long ones are shared by the servers there are.
SEQUENCES = {
    ("plain", False): 50,
    ("partitioned", False): 10,
    ("plain", True): 2150,
    ("partitioned", True): 300,
}

# What must have taken effect: twenty times each in the long version, once nearly each in the short one.
EFFECTS = [
    "deferred commit",
    "commit of a prepared write",
    "rollback of a prepared write",
    "refused commit",
    "propagated delete",
    "recreated row",
    "moved pair",
    "refused level",
    "write beside a holder",
    "write left to the queue",
    "write that a rollback to a savepoint undid",
    "released savepoint with a write",
    "repeatable read commit",
    "serializable commit",
    "serialization failure",
    "insert that kept the higher level",
    "copy",
    "cte",
    "merge",
    "upsert",
    "straight",
    "nested",
    "earned level",
    "advanced license",
    "sync by hand",
    "bypass by replica",
    "bypass by disabled triggers",
    "drain foretold",
    "pair brought into step by a run",
    "run that waits for approval",
    "plan applied",
    "undo foretold",
    "dead pair",
    "truncate of one table",
    "refused truncate",
    "truncate of both tables",
    "nothing left open",
]
RARE = 4  # of these the short version may miss

pairs = st.sampled_from(PAIRS)
sides = st.sampled_from(SIDES)
writers = st.integers(0, 1)
isolations = st.sampled_from(["read committed"] * 3 + ["repeatable read", "serializable"])
ENDS = st.sampled_from(["commit", "commit", "immediate", "prepare", "prepare for later", "rollback", "leave open"])
WAYS_IN = ["insert", "upsert", "merge", "copy", "cte", "nested", "straight"]
WAYS_OF_UPDATE = ["update", "cte", "nested", "straight", "merge"]

UPDATES = [
    ("update_a_level", pair, side, level, way)
    for level in range(1, 9)
    for way in WAYS_OF_UPDATE
    for pair in PAIRS
    for side in SIDES
]
INSERTS = [
    ("insert_a_row", pair, side, level, way)
    for level in range(1, 9)
    for way in WAYS_IN
    for pair in PAIRS
    for side in SIDES
]


def one_of_these(*kinds: list[Any]) -> st.SearchStrategy[Any]:
    """A kind, then one of it: two choices, because what Hypothesis draws for a sequence is bounded. By number, because
    the tables have no place in the strategy's name."""
    return st.integers(0, len(kinds) - 1).flatmap(
        lambda kind: st.integers(0, len(kinds[kind]) - 1).map(lambda number: kinds[kind][number])
    )


WRITES = one_of_these(
    UPDATES,
    UPDATES,
    UPDATES,
    [("update_a_level", pair, side, level, "update") for level in (9, 0, -1, None) for pair in PAIRS for side in SIDES],
    INSERTS,
    INSERTS,
    [("update_every_row", side, step) for side in SIDES for step in (1, -1)],
    [("update_without_a_level", pair, side) for pair in PAIRS for side in SIDES],
    [("delete_one_side", pair, side) for pair in PAIRS for side in SIDES],
    [("delete_both_sides", pair, side) for pair in PAIRS for side in SIDES],
    [
        ("move_to_another_key", pair, place, both, side)
        for both in (True, True, False)
        for pair in PAIRS
        for place in PAIRS
        for side in SIDES
        if pair != place
    ],
    [("advance_a_license", pair, level) for level in range(2, 10) for pair in PAIRS],
    [("earn", pair, xp, held) for xp, held in [(20_000, 60), (1_500, 12), (0, 1)] for pair in PAIRS],
    [("sync_by_hand", pair, side) for pair in PAIRS for side in SIDES],
)
SETTINGS: dict[str, list[Any]] = {
    "on_delete": ["restrict", "propagate", "recreate"],
    "on_error": ["queue", "queue", "queue", "raise"],
    "inline_limit": [32, 0, 1],
    "lock_wait": ["1 ms", "0", "5 ms"],
    "conflict_policy": ["progress_wins", "license_wins", "highest_wins", "latest_wins", "report_only"],
    "batch_size": [5000, 1, 2],
    "repair_limit": [10_000, 0, 1],
    "max_attempts": [3, 1],
    "retry_backoff": ["1 minute", "1 second"],
}
BYPASSES = [
    ("bypass", pair, side, level, way)
    for level in [*range(1, 9), None]
    for way in ("replica", "disabled triggers")
    for pair in PAIRS
    for side in SIDES
]
HAPPENINGS = one_of_these(
    BYPASSES,
    [("break_or_mend", side, user) for side in SIDES for user in (1, 2, 3)],
    [("change_a_setting", name, value) for name, values in SETTINGS.items() for value in dict.fromkeys(values)],
    [
        ("truncate", which, is_emptied, level)
        for which, is_emptied in [("both", False), ("license", True), ("progress", True), *[(s, False) for s in SIDES]]
        for level in (1, 3)
    ],
)

RESET = """
set session_replication_role = replica;
truncate specialization_progress, user_licenses, level_sync.sync_events, level_sync.sync_queue, level_sync.sync_log,
         level_sync.sync_plan, level_sync.pending_pairs, public.faults, public.exams;
reset session_replication_role;
"""
FAULTY = """
    if exists (select from public.faults where faults.side = tg_argv[0] and faults.user_id = {user})
    then raise 'the % of user % is broken', tg_argv[0], {user}; end if
"""
EXAMINED = """
    if new.side = 'progress' then
      insert into specialization_progress as row (student_id, specialization_id, current_level)
      values (new.user_id, new.specialization, new.level)
      on conflict (student_id, specialization_id) do update set current_level = excluded.current_level;
    else
      insert into user_licenses as row (user_id, specialization_type, current_level, max_achieved_level)
      values (new.user_id, new.specialization, new.level, new.level)
      on conflict (user_id, specialization_type) do update
         set current_level = excluded.current_level,
             max_achieved_level = greatest(row.max_achieved_level, excluded.current_level);
    end if
"""
LOOK = """
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
                  from level_sync.pending_pairs) as waiting),
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


class Academy(RuleBasedStateMachine):
    """The rules write; the invariant looks after each of them."""

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

    @initialize(
        at_first=st.tuples(*[st.one_of(st.none(), st.integers(1, 8), st.integers(1, 8))] * len(PAIRS)),
        chosen=st.tuples(*[st.sampled_from(values) for values in SETTINGS.values()]),
    )
    def begin_with_pairs(self, at_first: tuple[Level, ...], chosen: tuple[Any, ...]) -> None:
        self.settings = dict(zip(SETTINGS, chosen, strict=True))
        configure(self.db, **self.settings)
        self.fill(at_first)

    def fill(self, at_first: tuple[Level, ...]) -> None:
        for pair, level in zip(PAIRS, at_first, strict=True):
            if level is not None:
                self.insert_a_row(self.writers[0], pair, "progress", level, "insert")

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

    def execute(
        self,
        writer: Writer,
        statement: str,
        values: list[Any],
        touched: list[tuple[Pair, str]],
        refusals: set[str],
        *,
        is_copy: bool = False,
    ) -> tuple[Transaction, int] | None:
        """Executes a statement that writes sides of pairs; None where it failed as the contract allows."""
        transaction = writer.transaction or Transaction()
        allowed = set(refusals)
        rules = self.rules_of(transaction)
        for pair, side in touched:
            if self.holders(pair, transaction):
                allowed |= {"55P03", "23505"}
            if self.is_stale(transaction, pair):
                allowed |= {"40001", "23505"}
            if self.is_faulty(side, pair, transaction) or (
                rules["on_error"] == "raise" and self.is_faulty(OTHER_SIDE[side], pair, transaction)
            ):
                allowed.add("P0001")
        if transaction.isolation == "serializable":
            allowed.add("40001")
        is_guarded = writer.transaction is not None and bool(allowed)
        if is_guarded:
            writer.connection.execute("savepoint guard")
        try:
            cursor = writer.connection.cursor()
            if is_copy:
                with cursor.copy(statement) as copy:
                    copy.write_row(values)
            else:
                cursor.execute(statement, values)
        except psycopg.Error as error:
            if error.sqlstate not in allowed:
                raise
            if error.sqlstate in ("23514", "23502"):
                self.effects["refused level"] += 1
            if error.sqlstate == "40001":
                self.effects["serialization failure"] += 1
                writer.connection.execute("rollback")
                writer.transaction = None
            elif is_guarded:
                writer.connection.execute("rollback to savepoint guard")
                writer.connection.execute("release savepoint guard")
            return None
        if is_guarded:
            writer.connection.execute("release savepoint guard")
        assert not refusals & {"23514", "23502"}, f"{statement} {values} was to be refused"
        transaction.touched |= {pair for pair, _ in touched}
        if (
            writer.transaction is None and cursor.rowcount > 0
        ):  # a new version of the row, though its level may be the same
            for pair in transaction.touched:
                self.version[pair] += 1
        transaction.is_deferred |= rules["inline_limit"] < 32
        return transaction, cursor.rowcount

    def is_carried(self, transaction: Transaction, side: str, pair: Pair) -> bool:
        return not self.is_faulty(OTHER_SIDE[side], pair, transaction)

    def reckon(
        self, writer: Writer, transaction: Transaction, pair: Pair, side: str, level: Level, before: tuple[Level, Level]
    ) -> None:
        """Turns what the model says of a pair just written into what holds where a carry can fail or must wait."""
        now, other = before
        self.written[pair].add(level)
        transaction.count[pair] = transaction.count.get(pair, 0) + 1
        transaction.sides[pair] = side
        transaction.is_deferred |= sum(transaction.count.values()) > 20 or (now is not None and other is None)
        is_carried = self.is_carried(transaction, side, pair)
        if not is_carried:
            self.effects["write left to the queue"] += 1
        is_last = writer.transaction is None
        if (
            (transaction.is_deferred and transaction.count[pair] > 1)
            or (not is_last and (level == other or not is_carried))
            or (now is None and other is not None and (not is_last or level < other))
        ):
            transaction.unexplained.add(pair)
        if holders := self.holders(pair, transaction):
            self.effects["write beside a holder"] += 1
            for held in [*holders, transaction]:
                held.written[pair], held.sides[pair], held.is_deferred = UNCERTAIN, None, True
                held.unexplained.add(pair)
        elif self.is_stale(transaction, pair) or (self.rules_of(transaction)["on_error"] == "raise" and not is_carried):
            transaction.written[pair] = UNCERTAIN

    def finish(self, writer: Writer, transaction: Transaction) -> None:
        """After an autocommit statement: what its commit must have done."""
        if writer.transaction is None:
            self.adopt(transaction, self.judge(transaction))

    def judge(self, transaction: Transaction) -> str:
        broken = {pair for pair in transaction.written if self.is_any_fault(pair, transaction)}
        for pair, now in transaction.written.items():
            if (transaction.is_deferred or now.deleted) and self.holders(pair, transaction):
                transaction.written[pair] = UNCERTAIN  # its other row, locked without a level, cannot be reached
        on_delete = self.rules_of(transaction)["on_delete"]
        lone = self.model.judge(transaction, on_delete, broken)
        if on_delete == "propagate":
            transaction.unexplained -= {pair for pair in lone if transaction.count.get(pair) == 1}
        return {"propagate": "propagated delete", "recreate": "recreated row"}.get(on_delete, "") if lone else ""

    def adopt(self, transaction: Transaction, effect: str) -> None:
        self.model.commit(transaction)
        if effect:
            self.effects[effect] += 1
        for pair in transaction.touched:
            self.version[pair] += 1
        self.reborn |= transaction.deleted
        self.unexplained |= transaction.unexplained
        for pair, levels in transaction.written.items():
            if levels.is_uncertain:
                self.unexplained.add(pair)
            self.owed[pair] = None if levels.is_uncertain else transaction.sides.get(pair)

    # Writes

    def do(self, writer: Writer, write: tuple[Any, ...]) -> None:
        note(f"writer {self.writers.index(writer)}: {write}")
        try:
            getattr(self, write[0])(writer, *write[1:])
        except psycopg.errors.SerializationFailure:  # even a look can fail so
            if writer.transaction is None or writer.transaction.isolation != "serializable":
                raise
            self.effects["serialization failure"] += 1
            writer.connection.execute("rollback")
            writer.transaction = None

    def target(self, side: str, pair: Pair, way: str) -> str:
        return self.partitions.get((side, pair[0]), TABLE[side]) if way == "straight" else TABLE[side]

    def update_a_level(self, writer: Writer, pair: Pair, side: str, level: Level, way: str) -> None:
        before = now, _ = self.levels_for(writer, side, pair)
        if now is None and way in ("nested", "merge"):
            way = "update"
        if level is not None and level != 9:
            level = min(level, LIMITS[pair[1]])
        refusals = set()
        if now is not None and (level is None or not 1 <= level <= LIMITS[pair[1]]):
            refusals = {"23502", "23514"}
        highest = ", max_achieved_level = greatest(max_achieved_level, %s)" if side == "license" else ""
        user, specialization = KEY[TABLE[side]]
        statement = (
            f"update {self.target(side, pair, way)} set current_level = %s{highest}"
            f" where {user} = %s and {specialization} = %s"
        )
        values = [level, *([level] if highest else []), *pair]
        if way == "cte":
            statement = f"with written as ({statement} returning 1) select * from written"
        elif way == "nested":
            statement = "insert into public.exams (level, user_id, specialization, side) values (%s, %s, %s, %s)"
            values = [level, *pair, side]
        elif way == "merge":
            highest = ", max_achieved_level = greatest(max_achieved_level, level)" if side == "license" else ""
            statement = (
                f"merge into {TABLE[side]} using (values (%s::integer, %s::bigint, %s::text)) as new (level, id, kind)"
                f" on {user} = new.id and {specialization} = new.kind"
                f" when matched then update set current_level = level{highest}"
            )
            values = [level, *pair]
        done = self.execute(writer, statement, values, [(pair, side)], refusals)
        if done and done[1] and level != now:
            transaction, _ = done
            self.effects[way] += 1
            self.model.update(transaction, pair, side, level, self.is_carried(transaction, side, pair))
            self.reckon(writer, transaction, pair, side, level, before)
            self.finish(writer, transaction)

    def update_without_a_level(self, writer: Writer, pair: Pair, side: str) -> None:
        column = "total_xp = total_xp + 5" if side == "progress" else "started_at = clock_timestamp()"
        user, specialization = KEY[TABLE[side]]
        done = self.execute(
            writer,
            f"update {TABLE[side]} set {column} where {user} = %s and {specialization} = %s",
            list(pair),
            [(pair, side)],
            set(),
        )
        if done and writer.transaction is None:
            self.adopt(done[0], "")  # a created row that has earned something since is not taken back

    def insert_a_row(self, writer: Writer, pair: Pair, side: str, level: int, way: str) -> None:
        level = min(level, LIMITS[pair[1]])
        user, specialization = KEY[TABLE[side]]
        before = now, other = self.levels_for(writer, side, pair)
        if way == "copy" and now is not None:
            way = "insert"
        plain = (
            f"insert into {self.target(side, pair, way)} as row ({user}, {specialization}, current_level)"
            " values (%s, %s, %s)"
        )
        upsert = (
            f"{plain} on conflict ({user}, {specialization}) do update set current_level = excluded.current_level"
            + (", max_achieved_level = greatest(row.max_achieved_level, excluded.current_level)" * (side == "license"))
        )
        merged = ", max_achieved_level = greatest(row.max_achieved_level, new.level)" * (side == "license")
        statement = {
            "insert": f"{plain} on conflict do nothing",
            "straight": f"{plain} on conflict do nothing",
            "upsert": upsert,
            "copy": f"copy {TABLE[side]} ({user}, {specialization}, current_level) from stdin",
            "cte": f"with written as ({upsert} returning 1) select * from written",
            "nested": "insert into public.exams (user_id, specialization, level, side) values (%s, %s, %s, '"
            + side
            + "')",
            "merge": f"merge into {TABLE[side]} as row"
            " using (values (%s::bigint, %s::text, %s::integer)) as new (user_id, specialization, level)"
            f" on row.{user} = new.user_id and row.{specialization} = new.specialization"
            f" when matched then update set current_level = new.level{merged}"
            f" when not matched then insert ({user}, {specialization}, current_level)"
            " values (new.user_id, new.specialization, new.level)",
        }[way]
        done = self.execute(writer, statement, [*pair, level], [(pair, side)], set(), is_copy=way == "copy")
        is_written = done and done[1] and level != now and (now is None or way not in ("insert", "straight"))
        if is_written:
            transaction, _ = done
            self.effects[way] += 1
            if now is None and other is not None and other > level:
                self.effects["insert that kept the higher level"] += 1
            carried = self.is_carried(transaction, side, pair)
            if now is None:
                self.model.insert(transaction, pair, side, level, carried)
            else:
                self.model.update(transaction, pair, side, level, carried)
            self.reckon(writer, transaction, pair, side, level, before)
            self.finish(writer, transaction)

    def update_every_row(self, writer: Writer, side: str, step: int) -> None:
        """In bulk, up or down one level within the limits."""
        table = TABLE[side]
        before = {pair: self.levels_for(writer, side, pair) for pair in PAIRS}
        highest = ", max_achieved_level = greatest(max_achieved_level, current_level + 1)" * (side == "license")
        done = self.execute(
            writer,
            f"update {table} set current_level = least(greatest(current_level + %s, 1),"
            f" (select max_levels from specializations where id = {KEY[table][1]})){highest}",
            [step],
            [(pair, side) for pair in PAIRS],
            set(),
        )
        if done:
            transaction, _ = done
            for pair, (now, other) in before.items():
                if now is not None and (level := min(max(now + step, 1), LIMITS[pair[1]])) != now:
                    self.model.update(transaction, pair, side, level, self.is_carried(transaction, side, pair))
                    self.reckon(writer, transaction, pair, side, level, (now, other))
            self.finish(writer, transaction)

    def delete_one_side(self, writer: Writer, pair: Pair, side: str) -> None:
        before = now, other = self.levels_for(writer, side, pair)
        is_alone = writer.transaction is None and now is not None and other is not None
        refusals = {"23001"} if is_alone and self.settings["on_delete"] == "restrict" else set()
        if self.holders(pair, writer.transaction):
            refusals.add("23001")
        user, specialization = KEY[TABLE[side]]
        done = self.execute(
            writer,
            f"delete from {TABLE[side]} where {user} = %s and {specialization} = %s",
            list(pair),
            [(pair, side)],
            refusals,
        )
        if done is None and is_alone:
            self.effects["refused commit"] += 1
        if done and done[1]:
            transaction, _ = done
            self.model.delete(transaction, pair, side)
            transaction.deleted.add(pair)
            transaction.unexplained.add(pair)
            self.reckon(writer, transaction, pair, side, None, before)
            self.finish(writer, transaction)

    def delete_both_sides(self, writer: Writer, pair: Pair, first: str) -> None:
        tables = TABLE[first], TABLE[OTHER_SIDE[first]]
        keys = [f"{KEY[table][0]} = %s and {KEY[table][1]} = %s" for table in tables]
        before = {side: self.levels_for(writer, side, pair) for side in SIDES}
        done = self.execute(
            writer,
            f"with gone as (delete from {tables[0]} where {keys[0]}) delete from {tables[1]} where {keys[1]}",
            [*pair, *pair],
            [(pair, first), (pair, OTHER_SIDE[first])],
            {"23001"} if self.holders(pair, writer.transaction) else set(),
        )
        if done:
            transaction, _ = done
            for side in (first, OTHER_SIDE[first]):
                if before[side][0] is not None:
                    transaction.deleted.add(pair)
                    transaction.unexplained.add(pair)
                    self.model.delete(transaction, pair, side)
                    self.reckon(writer, transaction, pair, side, None, before[side])
            self.finish(writer, transaction)

    def move_to_another_key(self, writer: Writer, pair: Pair, place: Pair, both: bool, side: str) -> None:
        """Whoever moves both rows in one transaction moves the pair; one row alone is judged like a deletion."""
        held, there = self.levels_for(writer, side, place), self.levels_for(writer, side, pair)
        if held != (None, None) or there[0] is None or there[0] != there[1] or there[0] > LIMITS[place[1]]:
            return
        moves = [
            f"update {table} set {KEY[table][0]} = %s, {KEY[table][1]} = %s"
            f" where {KEY[table][0]} = %s and {KEY[table][1]} = %s"
            for table in (TABLE[side], OTHER[TABLE[side]])
        ]
        touched = [(each, on) for each in (pair, place) for on in SIDES]
        is_free = not any(
            self.holders(each, writer.transaction)
            or self.is_any_fault(each, writer.transaction)
            or (writer.transaction and self.is_stale(writer.transaction, each))
            for each in (pair, place)
        )
        refusals = set() if is_free else {"23505", "23001"}
        if not both and writer.transaction is None and self.settings["on_delete"] != "propagate":
            refusals.add("23001")
        is_known = not self.model.seen_by(writer.transaction or Transaction(), pair).is_uncertain
        statement = f"with moved as ({moves[0]}) {moves[1]}" if both else moves[0]
        done = self.execute(writer, statement, [*place, *pair] * (2 if both else 1), touched, refusals)
        if done:
            transaction, _ = done
            for each in (pair, place):
                self.written[each] |= {there[0]}
                transaction.count[each] = transaction.count.get(each, 0) + 2
                transaction.sides[each] = None
                transaction.written[each] = UNCERTAIN
                transaction.deleted.add(each)
                transaction.unexplained.add(each)
                for holder in self.holders(each, transaction):
                    holder.written[each], holder.sides[each], holder.is_deferred = UNCERTAIN, None, True
                    holder.unexplained.add(each)
            if both and is_free and is_known and (not transaction.is_deferred or writer.transaction is None):
                self.effects["moved pair"] += 1
                transaction.written[pair] = Levels()
                transaction.written[place] = Levels(there[0], there[0])
            self.finish(writer, transaction)

    def advance_a_license(self, writer: Writer, pair: Pair, level: int) -> None:
        before = now, _ = self.levels_for(writer, "license", pair)
        done = self.execute(
            writer,
            "select level_sync.advance_license(%s, %s, %s, 'the dean', 'june') ->> 'success'",
            [*pair, level],
            [(pair, "license")],
            {"P0002"} if now is None else set(),
        )
        if done and now is not None and now < level <= LIMITS[pair[1]]:
            transaction, _ = done
            self.effects["advanced license"] += 1
            self.model.update(transaction, pair, "license", level, self.is_carried(transaction, "license", pair))
            self.reckon(writer, transaction, pair, "license", level, before)
            self.finish(writer, transaction)

    def earn(self, writer: Writer, pair: Pair, xp: int, held: int) -> None:
        """A student with a progress row earns XP, and every level whose steps are all reached."""
        before = now, _ = self.levels_for(writer, "progress", pair)
        if now is None:
            return
        total_xp, sessions = writer.connection.execute(
            "select coalesce(total_xp, 0), coalesce(completed_sessions, 0) from specialization_progress"
            " where student_id = %s and specialization_id = %s",
            pair,
        ).fetchone()
        level = now
        while level + 1 in self.ladder[pair[1]]:
            needed_xp, needed_sessions = self.ladder[pair[1]][level + 1]
            if total_xp + xp < needed_xp or sessions + held < needed_sessions:
                break
            level += 1
        done = self.execute(
            writer, "select level_sync.update_progress(%s, %s, %s, %s)", [*pair, xp, held], [(pair, "progress")], set()
        )
        if done and level == now and writer.transaction is None:
            self.adopt(done[0], "")
        elif done and level != now:
            transaction, _ = done
            self.effects["earned level"] += 1
            self.model.update(transaction, pair, "progress", level, self.is_carried(transaction, "progress", pair))
            self.reckon(writer, transaction, pair, "progress", level, before)
            self.finish(writer, transaction)

    def sync_by_hand(self, writer: Writer, pair: Pair, side: str) -> None:
        """Only where nobody holds the pair: it would be waited for."""
        if self.holders(pair, writer.transaction) or self.is_any_fault(pair, writer.transaction):
            return
        before = now, other = self.levels_for(writer, side, pair)
        done = self.execute(
            writer,
            f"select level_sync.sync_{side}_to_{OTHER_SIDE[side]}(%s, %s)",
            list(pair),
            [(pair, side), (pair, OTHER_SIDE[side])],
            set(),
        )
        if done and now is not None and now != other:
            transaction, _ = done
            self.effects["sync by hand"] += 1
            self.model.update(transaction, pair, side, now, True)
            self.reckon(writer, transaction, pair, side, now, before)
            self.finish(writer, transaction)

    @rule(number=writers, writes=st.lists(WRITES, min_size=1, max_size=3))
    def write(self, number: int, writes: list[tuple[Any, ...]]) -> None:
        """Statements by themselves, or in the transaction that is open; every other one by the other writer."""
        for count, write in enumerate(writes):
            self.do(self.writers[(number + count) % 2], write)
            self.look()

    # Transactions

    @rule(
        number=writers,
        isolation=isolations,
        writes=st.lists(WRITES, min_size=1, max_size=4),
        trial=st.sampled_from(["", "", "keep", "release", "rollback"]),
        end=ENDS,
    )
    def transact(self, number: int, isolation: str, writes: list[tuple[Any, ...]], trial: str, end: str) -> None:
        """Writes in one transaction, the last of them behind a savepoint in some."""
        writer = self.writers[number]
        if writer.transaction is None:
            self.begin(writer, isolation)
        for write in writes[:-1]:
            self.do(writer, write)
            if writer.transaction is None:
                return
        is_written = False
        if trial:
            writer.connection.execute("savepoint trial")
            writer.transaction.savepoint()
            known = dict(writer.transaction.written)
        self.do(writer, writes[-1])
        if writer.transaction is None:
            return
        if trial:
            is_written = writer.transaction.written != known
        if trial == "release":
            writer.connection.execute("release savepoint trial")
            writer.transaction.release_savepoint()
            self.effects["released savepoint with a write"] += is_written
        elif trial == "rollback":
            writer.connection.execute("rollback to savepoint trial")
            writer.transaction.rollback_to_savepoint()
            self.effects["write that a rollback to a savepoint undid"] += is_written
        self.end(writer, end)

    @rule(number=writers, pair=pairs, side=sides, then=WRITES, end=ENDS)
    def lose_one_side(self, number: int, pair: Pair, side: str, then: tuple[Any, ...], end: str) -> None:
        """What most often decides how a commit ends: a deletion that on_delete has to judge."""
        writer = self.writers[number]
        if writer.transaction is None:
            self.begin(writer, "read committed")
        self.do(writer, ("delete_one_side", pair, side))
        if writer.transaction is not None and then[1] != pair:
            self.do(writer, then)
        if writer.transaction is not None:
            self.end(writer, end)

    def begin(self, writer: Writer, isolation: str) -> None:
        writer.connection.execute(f"begin isolation level {isolation}")
        writer.transaction = Transaction(isolation=isolation)
        if isolation != "read committed":
            writer.connection.execute("select from users limit 0")  # takes the snapshot
            writer.transaction.rules = dict(self.settings)
            writer.transaction.faults = set(self.faults)
            writer.transaction.versions = dict(self.version)

    def end(self, writer: Writer, way: str) -> None:
        if way == "leave open":
            return
        transaction = writer.transaction
        assert transaction is not None
        if way == "rollback":
            writer.connection.execute("rollback")
            writer.transaction = None
            return
        gid = f"ours {self.writers.index(writer)}"
        if gid in self.prepared:
            way = "commit"
        is_stale = any(self.is_stale(transaction, pair) for pair in transaction.touched)
        is_refused, effect = False, ""
        try:
            effect = self.judge(transaction)
        except Refused:
            is_refused = True
        is_uncertain = any(now.is_uncertain for now in transaction.written.values())
        allowed = {"23001"} if is_refused or is_uncertain else set()
        if is_uncertain and self.rules_of(transaction)["on_error"] == "raise":
            allowed |= {"P0001", "55P03", "55000", "23505"}
        if is_stale or transaction.isolation == "serializable":
            allowed.add("40001")
        try:
            if way.startswith("prepare"):
                writer.connection.execute(f"prepare transaction '{gid}'")
            else:
                if way == "immediate":
                    writer.connection.execute("set constraints all immediate")
                writer.connection.execute("commit")
        except psycopg.Error as error:
            if error.sqlstate not in allowed:
                raise
            self.effects["refused commit"] += is_refused
            self.effects["serialization failure"] += error.sqlstate == "40001"
            writer.connection.execute("rollback")
            writer.transaction = None
            return
        writer.transaction = None
        if way.startswith("prepare"):
            self.prepared[gid] = transaction
        assert not is_refused, "a commit that leaves one side was to be refused"
        if way == "prepare for later":
            transaction.effect = effect
        elif way == "prepare":
            self.finish_one(gid, True)
        else:
            self.commit(transaction)
        if effect and way != "prepare for later":
            self.effects[effect] += 1

    def commit(self, transaction: Transaction) -> None:
        self.effects["deferred commit"] += bool(transaction.written) and self.rules_of(transaction)["inline_limit"] < 32
        if transaction.written and transaction.isolation != "read committed":
            self.effects[f"{transaction.isolation} commit"] += 1
        self.adopt(transaction, "")

    def finish_one(self, gid: str, is_committed: bool) -> None:
        self.db.execute(f"{'commit' if is_committed else 'rollback'} prepared '{gid}'")
        transaction = self.prepared.pop(gid)
        self.effects[f"{'commit' if is_committed else 'rollback'} of a prepared write"] += bool(transaction.written)
        if is_committed:
            self.commit(transaction)

    @precondition(lambda self: any(writer.transaction for writer in self.writers))
    @rule(end=ENDS)
    def end_what_is_open(self, end: str) -> None:
        self.end(next(writer for writer in self.writers if writer.transaction), end)

    @precondition(lambda self: self.prepared)
    @rule(is_committed=st.booleans())
    def finish_what_is_prepared(self, is_committed: bool) -> None:
        self.finish_one(next(iter(self.prepared)), is_committed)

    # What else happens to a database

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
            told = writer.connection.execute(
                "select current_setting('level_sync.own_depth', true), current_setting('level_sync.pending', true),"
                " current_setting('level_sync.subtransactions', true), current_setting('lock_timeout')"
            ).fetchone()
            assert {*told[:3]} <= {None, ""}, told
            assert told[3] == "10ms"

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
        assert self.db.execute("select * from level_sync.pending_pairs").fetchall() == []
        assert self.last_run()[1] == "success"
        self.effects["step"] += self.steps
        self.effects["whole sequence"] += self.steps >= STEPS
        self.tell()


def partitioned(empty_database) -> dict[tuple[str, int], str]:
    """Both tables hash-partitioned, as an application made them; the partition that each user's rows are in."""
    db = empty_database.connect()
    for table, (user, specialization) in KEY.items():
        extra = ", max_achieved_level integer not null default 1" if table == LICENSE else ""
        db.execute(
            f"create table {table} ({user} bigint not null, {specialization} text not null,"
            f" current_level integer not null{extra}, primary key ({user}, {specialization}))"
            f" partition by hash ({user})"
        )
        for part in range(2):
            db.execute(
                f"create table {table}_{part} partition of {table} for values with (modulus 2, remainder {part})"
            )
    install.migrate(empty_database.dsn)
    return {
        (side, user): f"{table}_{part}"
        for side, table in TABLE.items()
        for user in range(1, 4)
        for part in range(2)
        if db.execute(f"select satisfies_hash_partition('{table}'::regclass, 2, {part}, {user}::bigint)").fetchone()[0]
    }


def prepare_the_academy(database, partitions: dict[tuple[str, int], str]) -> None:
    db = database.connect()
    db.execute("insert into users (id) values (1), (2), (3)")
    db.execute("create table public.faults (side text, user_id bigint)")
    db.execute("create table public.exams (side text, user_id bigint, specialization text, level integer)")
    for side, table in TABLE.items():
        event = f"before insert or update on {table}"
        user_trigger(db, event, FAULTY.format(user=f"new.{KEY[table][0]}"), name=f"{side}_may_be_broken", argument=side)
    user_trigger(db, "after insert on public.exams", EXAMINED, name="examined")
    Academy.sessions = [database.connect(options="-c lock_timeout=10ms") for _ in range(2)] + [db]
    Academy.partitions = partitions
    Academy.ladder = {specialization: {} for specialization in LIMITS}
    for specialization, *rung in db.execute(
        "select specialization_id, level, required_xp, required_sessions from specialization_levels"
    ):
        Academy.ladder[specialization][rung[0]] = (rung[1], rung[2])
    Academy.effects = Counter()


def run_sequences(count: int, *, is_random: bool) -> None:
    run_state_machine_as_test(
        Academy,
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            derandomize=not is_random,
            deadline=None,
            report_multiple_bugs=False,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        ),
        _min_steps=STEPS,  # Hypothesis ends half of the sequences early without it
    )


@pytest.mark.leftovers
@pytest.mark.parametrize("tables", ["plain", "partitioned"])
def test_random_sequences_keep_every_promise(server, tables, request, record_property, progress):
    is_long = request.config.getoption("proof")
    if tables == "plain":
        prepare_the_academy(request.getfixturevalue("database"), {})
    else:
        database = request.getfixturevalue("empty_database")
        prepare_the_academy(database, partitioned(database))
    servers = 2 if is_long and system_binaries() else 1
    count = SEQUENCES[tables, is_long] // servers
    Academy.tell = staticmethod(
        lambda: progress(f"{Academy.effects['sequence']} of {count} sequences, {Academy.effects['step']} steps")
    )
    run_sequences(count, is_random=is_long)

    counts = Academy.effects
    record_property("figure", ", ".join(f"{effect} {count}" for effect, count in sorted(counts.items())))
    rare = {effect: counts[effect] for effect in EFFECTS if counts[effect] < (10 if is_long else 1)}
    if tables == "plain":
        assert len(rare) <= (0 if is_long else RARE), rare
    if is_long and tables == "plain":
        assert counts["whole sequence"] >= 2000 / servers
