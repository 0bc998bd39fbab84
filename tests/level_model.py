"""What must have happened to the levels, in plain Python: no SQL, no trigger, one rule a method.

The model knows each pair's levels, follows what transactions write, and says what a commit must leave behind. Where the
promise leaves more than one end open (both sides written at once by two transactions, say) it says UNCERTAIN, and only
what holds for every pair is asked of that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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


@dataclass
class Transaction:
    """The pairs a transaction has written, with a copy for each of its savepoints."""

    written: dict[Pair, Levels] = field(default_factory=dict)
    savepoints: list[dict[Pair, Levels]] = field(default_factory=list)
    touched: set[Pair] = field(default_factory=set)  # rows it holds, whatever became of the write
    is_deferred: bool = False  # some of its pairs wait for the commit, and what comes in between can change the end

    def savepoint(self) -> None:
        self.savepoints.append(dict(self.written))

    def rollback_to_savepoint(self) -> None:
        self.written = dict(self.savepoints[-1])


@dataclass
class Model:
    """All pairs as last committed."""

    levels: dict[Pair, Levels] = field(default_factory=lambda: {pair: Levels() for pair in PAIRS})

    def seen_by(self, transaction: Transaction, pair: Pair) -> Levels:
        return transaction.written.get(pair, self.levels[pair])

    def update(self, transaction: Transaction, pair: Pair, level: int) -> None:
        """The other side follows. A side deleted before in this transaction: the promise does not say."""
        now = self.seen_by(transaction, pair)
        if now.is_uncertain or now.deleted:
            transaction.written[pair] = UNCERTAIN
        else:
            transaction.written[pair] = Levels(level, level)

    def insert(self, transaction: Transaction, pair: Pair, side: str, level: int) -> None:
        """An insert never demotes."""
        now = self.seen_by(transaction, pair)
        if now.is_uncertain or (transaction.is_deferred and pair in transaction.written):
            transaction.written[pair] = UNCERTAIN
        else:
            higher = max(level, now.on(OTHER_SIDE[side]) or 0)
            transaction.written[pair] = replace(now, progress=higher, license=higher)

    def delete(self, transaction: Transaction, pair: Pair, side: str) -> None:
        now = self.seen_by(transaction, pair)
        if now.is_uncertain or (transaction.is_deferred and pair in transaction.written and not now.deleted):
            transaction.written[pair] = UNCERTAIN
        else:
            transaction.written[pair] = replace(now.with_side(side, None), deleted=now.deleted | {side})

    def judge(self, transaction: Transaction, on_delete: str) -> None:
        """What the commit makes of rows whose other side is gone."""
        judged = {}
        for pair, now in transaction.written.items():
            if now.deleted and now.is_one_sided and not now.is_uncertain:
                if on_delete == "restrict":
                    raise Refused(f"{pair} lost one side")
                left = now.progress or now.license
                judged[pair] = Levels() if on_delete == "propagate" else Levels(left, left)
            else:
                judged[pair] = replace(now, deleted=frozenset())
        transaction.written = judged

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
