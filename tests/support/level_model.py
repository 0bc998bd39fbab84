"""What must have happened to the levels, in plain Python: no SQL, no trigger, one rule a method.

The model knows each pair's levels, follows what transactions write, and says what a commit must leave behind. Where the
promise leaves more than one end open (both sides written at once by two transactions, say) it says UNCERTAIN, and only
what holds for every pair is asked of that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Level = int | None
Pair = tuple[int, str]

LIMITS = {"PLAYER": 8, "COACH": 8, "INTERNSHIP": 3}
PAIRS: list[Pair] = [(1, "PLAYER"), (2, "PLAYER"), (2, "COACH"), (3, "INTERNSHIP")]
OTHER_SIDE = {"progress": "license", "license": "progress"}


class Refused(Exception):
    """The commit must fail with restrict_violation."""


@dataclass(frozen=True)
class Levels:
    """Both sides of a pair; None is a row that is not there."""

    progress: Level = None
    license: Level = None
    is_uncertain: bool = False
    deleted: frozenset[str] = frozenset()  # sides deleted in this transaction, judged at its commit

    def on(self, side: str) -> Level:
        return self.progress if side == "progress" else self.license

    def with_side(self, side: str, level: Level) -> Levels:
        return replace(self, progress=level) if side == "progress" else replace(self, license=level)

    @property
    def sides(self) -> tuple[Level, Level]:
        return self.progress, self.license

    @property
    def is_equal(self) -> bool:
        return self.progress == self.license

    @property
    def is_one_sided(self) -> bool:
        return (self.progress is None) != (self.license is None)


UNCERTAIN = Levels(is_uncertain=True)


def replay(levels: Levels, events: list[tuple[str, str, Level, Level, str]]) -> Levels:
    """Levels after events of (direction, action, old_level, new_level, source), each of which must fit those before."""
    for direction, action, old, new, source in events:
        target = direction.partition("_to_")[2]
        assert levels.on(target) == old, (
            f"{direction} {action} {old} -> {new}, but the {target} was {levels.on(target)}"
        )
        assert (old is None, new is None) == (action == "created", action == "deleted"), (action, old, new)
        levels = levels.with_side(target, new)
        if source != "undo":  # what is carried is there on the other side
            levels = levels.with_side(OTHER_SIDE[target], new)
    return levels


@dataclass
class Transaction:
    """What a transaction has written, with a copy for each of its savepoints."""

    written: dict[Pair, Levels] = field(default_factory=dict)
    touched: set[Pair] = field(default_factory=set)  # rows it holds, whatever became of the write
    deleted: set[Pair] = field(default_factory=set)  # their license may be another row afterwards
    sides: dict[Pair, str | None] = field(default_factory=dict)  # the side written last; None where that is open
    count: dict[Pair, int] = field(default_factory=dict)  # writes of each pair
    unexplained: set[Pair] = field(default_factory=set)  # written in a way that its events do not tell
    is_deferred: bool = False  # some of its pairs wait for the commit, and what comes in between can change the end
    isolation: str = "read committed"
    rules: dict[str, Any] | None = None  # the settings, faults and versions that its snapshot sees
    faults: set[tuple[str, int]] | None = None
    versions: dict[Pair, int] | None = None
    effect: str = ""  # what its commit does to rows whose other side is gone
    _savepoints: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def has_savepoint(self) -> bool:
        return bool(self._savepoints)

    def savepoint(self) -> None:
        self._savepoints.append((dict(self.written), set(self.touched), set(self.deleted), dict(self.sides)))

    def release_savepoint(self) -> None:
        self._savepoints.pop()

    def rollback_to_savepoint(self) -> None:
        written, touched, deleted, sides = self._savepoints[-1]
        self.written, self.touched, self.deleted, self.sides = dict(written), set(touched), set(deleted), dict(sides)


@dataclass
class Model:
    """All pairs as last committed."""

    levels: dict[Pair, Levels] = field(default_factory=lambda: {pair: Levels() for pair in PAIRS})

    def seen_by(self, transaction: Transaction, pair: Pair) -> Levels:
        return transaction.written.get(pair, self.levels[pair])

    def update(self, transaction: Transaction, pair: Pair, side: str, level: int, is_carried: bool) -> None:
        """The other side follows, if it can. A side deleted before in this transaction: the promise does not say."""
        now = self.seen_by(transaction, pair)
        if now.is_uncertain or now.deleted:
            transaction.written[pair] = UNCERTAIN
        else:
            transaction.written[pair] = Levels(level, level) if is_carried else now.with_side(side, level)

    def insert(self, transaction: Transaction, pair: Pair, side: str, level: int, is_carried: bool) -> None:
        """An insert never demotes: both get the higher level, if the other side can."""
        now = self.seen_by(transaction, pair)
        other = now.on(OTHER_SIDE[side]) or 0
        if now.is_uncertain or (transaction.is_deferred and pair in transaction.written):
            transaction.written[pair] = UNCERTAIN
        elif (
            other > level and not is_carried
        ):  # an INSERT that finds a row fires the other side's triggers all the same
            transaction.written[pair] = UNCERTAIN
        elif is_carried or other == level:
            transaction.written[pair] = replace(now, progress=max(level, other), license=max(level, other))
        else:
            transaction.written[pair] = UNCERTAIN if now.deleted else now.with_side(side, level)

    def delete(self, transaction: Transaction, pair: Pair, side: str) -> None:
        now = self.seen_by(transaction, pair)
        if now.is_uncertain or (transaction.is_deferred and pair in transaction.written and not now.deleted):
            transaction.written[pair] = UNCERTAIN
        else:
            transaction.written[pair] = replace(now.with_side(side, None), deleted=now.deleted | {side})

    def judge(self, transaction: Transaction, on_delete: str, broken: set[Pair]) -> set[Pair]:
        """What the commit makes of rows whose other side is gone; which those are, where the model can say."""
        judged, lone = {}, set()
        for pair, now in transaction.written.items():
            if not (now.deleted and now.is_one_sided) or now.is_uncertain:
                judged[pair] = replace(now, deleted=frozenset())
            elif on_delete == "restrict":
                raise Refused(f"{pair} lost one side")
            elif on_delete == "recreate" and pair in broken:
                judged[pair] = UNCERTAIN
            else:
                left = now.progress or now.license
                judged[pair] = Levels() if on_delete == "propagate" else Levels(left, left)
                lone.add(pair)
        transaction.written = judged
        return lone

    @staticmethod
    def drained(levels: Levels, side: str, change: str, on_delete: str) -> Levels:
        """What a drain makes of a pair whose last entry names this side and change."""
        if levels.is_equal:
            return levels
        if levels.is_one_sided:
            if change == "deleted" and levels.on(side) is None and on_delete == "propagate":
                return Levels()
            return Model.reconciled(levels, "report_only")
        level = max(levels.progress, levels.license) if change == "created" else levels.on(side)  # type: ignore[type-var]
        return Levels(level, level)

    def commit(self, transaction: Transaction) -> None:
        self.levels.update(transaction.written)

    @staticmethod
    def reconciled(levels: Levels, policy: str) -> Levels:
        """What a reconcile makes of a pair: a missing row is created, else the policy decides."""
        progress, license = levels.sides
        if levels.is_one_sided:
            there = progress or license
            return Levels(there, there)
        if levels.is_equal or policy == "report_only":
            return levels
        if policy in ("progress_wins", "progress_to_license"):
            return Levels(progress, progress)
        if policy in ("license_wins", "license_to_progress"):
            return Levels(license, license)
        if policy == "highest_wins":
            return Levels(max(progress, license), max(progress, license))  # type: ignore[type-var]
        return UNCERTAIN
