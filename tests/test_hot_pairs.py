"""Eight clients write both tables on ten hot pairs: no write fails, and naive triggers are left far behind."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from academy import add_pairs, drain

CLIENTS = 8
HOT_PAIRS = 10

NAIVE_TRIGGERS = Path(__file__).with_name("naive_triggers.sql").read_bytes()


ONE_WRITE = Path(__file__).with_name("one_write_of_a_hot_pair.sql")


@dataclass
class Outcome:
    per_second: float
    failures: int


def hammer(database, seconds: int) -> Outcome:
    """Every client writes a random level of a random hot pair on a random side, one write a transaction."""
    command = [
        database.server.binaries / "pgbench",
        *("--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2", f"--time={seconds}"),
        f"--file={ONE_WRITE}",
        database.dsn,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "aborted" not in done.stderr, done.stderr
    per_second = re.search(r"tps = ([0-9.]+)", done.stdout)
    failures = re.search(r"number of failed transactions: (\d+)", done.stdout)
    assert per_second, done.stdout
    assert failures, done.stdout
    return Outcome(float(per_second[1]), int(failures[1]))


def deadlocks(db) -> int:
    db.execute("select pg_stat_clear_snapshot()")
    return db.execute("select deadlocks from pg_stat_database where datname = current_database()").fetchone()[0]


def test_hot_pairs_written_on_both_sides_fail_no_write_and_leave_naive_triggers_behind(
    database, empty_database, db, request, record_property
):
    # How soon naive triggers collapse is chance, and so is how many times faster we are: that is a figure, no claim.
    seconds, naive_seconds = (10, 40) if request.config.getoption("proof") else (3, 6)
    naive_db = empty_database.connect()
    naive_db.execute(NAIVE_TRIGGERS)
    add_pairs(db, HOT_PAIRS)

    naive = hammer(empty_database, naive_seconds)
    ours = hammer(database, seconds)

    record_property(
        "figure",
        f"{ours.per_second:.0f} writes/s, {ours.failures} failed, {deadlocks(db)} deadlocks; naive triggers"
        f" {naive.per_second:.1f} writes/s, {naive.failures} failed; {ours.per_second / naive.per_second:.0f} times",
    )
    assert ours.failures == 0
    assert deadlocks(db) == 0
    drain(db)
    equal = db.execute(
        "select count(*) from specialization_progress as p join user_licenses as l"
        " on l.user_id = p.student_id and l.current_level = p.current_level"
    ).fetchone()
    assert equal == (HOT_PAIRS,)
    assert ours.per_second > naive.per_second
