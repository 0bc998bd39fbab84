"""Eight clients write both tables on ten hot pairs: no write fails, and none is lost."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from academy import add_pairs, drain
from tree import SUPPORT

CLIENTS = 8
HOT_PAIRS = 10

NAIVE_TRIGGERS = (SUPPORT / "naive_triggers.sql").read_bytes()
ONE_WRITE = SUPPORT / "one_write_of_a_hot_pair.sql"


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


def test_hot_pairs_written_on_both_sides_fail_no_write(database, empty_database, db, request, record_property):
    is_long = request.config.getoption("proof")
    add_pairs(db, HOT_PAIRS)

    ours = hammer(database, 10 if is_long else 3)

    figure = f"{ours.per_second:.0f} writes/s, {ours.failures} failed, {deadlocks(db)} deadlocks"
    if is_long:
        # When naive triggers collapse is chance, and so is how many times faster we are: that is a figure, no claim.
        empty_database.connect().execute(NAIVE_TRIGGERS)
        naive = hammer(empty_database, 40)
        figure += (
            f"; naive triggers {naive.per_second:.1f} writes/s, {naive.failures} failed;"
            f" {ours.per_second / naive.per_second:.0f} times"
        )
    record_property("figure", figure)
    assert ours.failures == 0
    assert deadlocks(db) == 0
    drain(db)
    equal = db.execute(
        "select count(*) from specialization_progress as p join user_licenses as l"
        " on l.user_id = p.student_id and l.current_level = p.current_level"
    ).fetchone()
    assert equal == (HOT_PAIRS,)
