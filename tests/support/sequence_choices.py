"""What may be done in a random sequence, and how often: strategies for Hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from academy import SIDE
from level_model import PAIRS

TABLE = {side: table for table, side in SIDE.items()}

SIDES = ["progress", "license"]

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
