"""Eight clients write both tables on ten hot pairs: no write fails, and naive triggers are left far behind."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

import psycopg

from academy import KEY, add_pairs, drain

CLIENTS = 8
HOT_PAIRS = 10

# As tutorials show it: each table's trigger updates the other where it differs.
NAIVE_TRIGGERS = """
create table specialization_progress (
  student_id bigint, specialization_id text, current_level integer not null,
  primary key (student_id, specialization_id));
create table user_licenses (
  user_id bigint, specialization_type text, current_level integer not null,
  primary key (user_id, specialization_type));
insert into specialization_progress select n, 'PLAYER', 1 from generate_series(1, 10) as n;
insert into user_licenses select n, 'PLAYER', 1 from generate_series(1, 10) as n;

create function follow_progress() returns trigger language plpgsql as $$
begin
  update user_licenses set current_level = new.current_level
   where user_id = new.student_id and specialization_type = new.specialization_id
     and current_level <> new.current_level;
  return null;
end $$;
create function follow_license() returns trigger language plpgsql as $$
begin
  update specialization_progress set current_level = new.current_level
   where student_id = new.user_id and specialization_id = new.specialization_type
     and current_level <> new.current_level;
  return null;
end $$;
create trigger follow after update on specialization_progress for each row execute function follow_progress();
create trigger follow after update on user_licenses for each row execute function follow_license();
"""


@dataclass
class Outcome:
    writes: int = 0
    failures: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.writes / self.seconds


def hammer(database, seconds: float) -> Outcome:
    """Every client writes a random level of a random hot pair on a random side, one write a transaction."""
    outcomes = [Outcome() for _ in range(CLIENTS)]
    started = threading.Barrier(CLIENTS + 1)

    def write(client: int) -> None:
        choice = random.Random(client)  # noqa: S311
        outcome = outcomes[client]
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            started.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                table = choice.choice(list(KEY))
                try:
                    connection.execute(
                        f"update {table} set current_level = %s where {KEY[table][0]} = %s",
                        [choice.randint(1, 8), choice.randint(1, HOT_PAIRS)],
                        prepare=True,
                    )
                    outcome.writes += 1
                except psycopg.Error:
                    outcome.failures += 1

    threads = [threading.Thread(target=write, args=[client]) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    started.wait()
    start = time.monotonic()
    for thread in threads:
        thread.join()
    return Outcome(
        sum(outcome.writes for outcome in outcomes),
        sum(outcome.failures for outcome in outcomes),
        time.monotonic() - start,
    )


def deadlocks(db) -> int:
    db.execute("select pg_stat_clear_snapshot()")
    return db.execute("select deadlocks from pg_stat_database where datname = current_database()").fetchone()[0]


def test_hot_pairs_written_on_both_sides_fail_no_write_and_leave_naive_triggers_behind(
    database, empty_database, db, request, record_property
):
    # How soon naive triggers collapse is chance: in a few seconds the ratio scatters, in ten it does not.
    seconds, times = (10.0, 50) if request.config.getoption("proof") else (3.0, 5)
    naive_db = empty_database.connect()
    naive_db.execute(NAIVE_TRIGGERS)
    add_pairs(db, HOT_PAIRS)

    naive = hammer(empty_database, max(seconds, 6.0))
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
    assert ours.per_second >= times * naive.per_second
