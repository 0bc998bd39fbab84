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

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from academy import KEY, LICENSE, user_trigger
from level_model import LIMITS
from level_sync.setup import install
from random_sequence import Academy
from sequence_choices import TABLE
from sequence_state import STEPS
from servers import VERSIONS
from versions import OLDEST

# How many, of 50 steps each; the servers share the long version's.
SHORT, LONG = 50, 2150


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


def run_sequences(count: int, progress: Callable[[str], None], *, is_random: bool) -> None:
    Academy.tell = staticmethod(
        lambda: progress(f"{Academy.effects['sequence']} of {count} sequences, {Academy.effects['step']} steps")
    )
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


@pytest.mark.long
@pytest.mark.leftovers
def test_random_sequences_keep_every_promise(database, request, record_property, progress):
    is_long = request.config.getoption("proof")
    prepare_the_academy(database, {})
    run_sequences(SHORT if not is_long else LONG // len(VERSIONS), progress, is_random=is_long)
    counts = Academy.effects
    record_property("figure", figure(counts))
    wanted = 20 // len(VERSIONS) if is_long else 1
    rare = {effect: counts[effect] for effect in EFFECTS if counts[effect] < wanted}
    assert len(rare) <= (0 if is_long else RARE), rare
    if is_long:
        assert counts["whole sequence"] >= 2000 / len(VERSIONS)


@pytest.mark.leftovers
@pytest.mark.servers(OLDEST)
def test_random_sequences_of_partitioned_tables_do_so_too(empty_database, request, record_property, progress):
    is_long = request.config.getoption("proof")
    prepare_the_academy(empty_database, partitioned(empty_database))
    run_sequences(SHORT // 5 if not is_long else LONG // 7 // len(VERSIONS), progress, is_random=is_long)
    record_property("figure", figure(Academy.effects))


def figure(counts: Counter[str]) -> str:
    return ", ".join(f"{effect} {count}" for effect, count in sorted(counts.items()))
