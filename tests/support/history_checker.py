"""Judges a recorded history of writes by its end. It knows the contract and nothing of how it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Level = int | None  # None: the pair is gone


@dataclass(frozen=True)
class Write:
    """The last write of a pair in one transaction; seconds on one clock. ended is None where no answer came back."""

    pair: int
    level: Level
    began: float
    ended: float | None
    kind: Literal["update", "insert", "delete"] = "update"

    def overwrites(self, earlier: Write) -> bool:
        """Whether nothing of the earlier write may be left once this one was acknowledged: an insert never demotes."""
        came_after = self.ended is not None and earlier.ended is not None and self.began > earlier.ended
        return came_after and not (self.kind == "insert" and (earlier.level or 0) > (self.level or 0))


def faults(history: Iterable[Write], ends: Mapping[int, tuple[Level, Level]]) -> list[str]:
    """What is wrong with how the pairs ended, (progress, license) each: split sides, or a level that is not that of a
    write which no later acknowledged write of the pair overwrote. Writes that failed do not belong into the history."""
    by_pair: dict[int, list[Write]] = {}
    for write in history:
        by_pair.setdefault(write.pair, []).append(write)
    found = []
    for pair, (progress, license) in ends.items():
        if progress != license:
            found.append(f"pair {pair} is split: {progress} and {license}")
            continue
        writes = by_pair.get(pair, [])
        candidates = [write for write in writes if write.level == progress]
        if not any(not any(other.overwrites(write) for other in writes) for write in candidates):
            last = max(
                (write for write in writes if write.ended is not None), key=lambda write: write.began, default=None
            )
            found.append(f"pair {pair} ended at {progress}; a write of {last.level if last else None} is lost")
    return found
