"""What a random sequence does to the two tables: writes of every kind, alone and in transactions."""

from __future__ import annotations

from typing import Any

import psycopg
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from academy import KEY, OTHER, configure
from level_model import LIMITS, OTHER_SIDE, PAIRS, UNCERTAIN, Level, Levels, Pair, Refused, Transaction
from sequence_choices import ENDS, SETTINGS, SIDES, TABLE, WRITES, isolations, pairs, sides, writers
from sequence_state import SequenceState, Writer


class SequenceWrites(SequenceState):
    """The rules write, and tell the model what they wrote."""

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
