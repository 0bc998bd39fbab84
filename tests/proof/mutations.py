"""Breaks the SQL on purpose, one small change at a time, and sees whether the fast part of the tests notices.

    make mutations MUTATIONS='[--count 60] [--seed 1] [--only 7 --only 9]'

First the fast part must pass on the SQL as it is. Then each change is tried on a copy of the tree, as many at once as
there are processors, against the newest server, and what needs pg_cron against the one that has it. Of every kind of
change as many are tried as of any other, while there are any. One that does not even load is no try: another takes its
place. A test counts as a killer only if it passes once more without the change. Why a survivor is let live stands in
surviving_mutations.toml; one without a reason is a failure.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psycopg
import typer

import internals
from level_sync.setup import install
from servers import running_server
from tree import ROOT
from versions import NEWEST, OLDEST

REASONS = Path(__file__).with_name("surviving_mutations.toml")

# In the order of how much they notice in how little time. What compares the two mirror files is left out: it would
# notice a change of the text, not of what it does.
FAST_PART = (
    "writes/test_write_carries_the_level",
    "writes/test_one_side_goes_only_with_the_other",
    "proof/test_random_sequences_keep_every_promise",
    "commit/test_deletions_beside_a_set_are_judged",
    "writes/test_a_failed_sync_fails_no_write",
    "drain/test_the_drain_reads_the_live_rows",
    "reconcile/test_every_desync_is_repaired",
    "reconcile/test_plans_are_applied_as_recorded",
    "reconcile/test_each_batch_is_a_transaction",
    "drain/test_many_pairs_are_done_at_once",
    "reconcile/test_undo_puts_back_what_a_run_changed",
    "drain/test_maintenance_does_what_is_due",
    "reconcile/test_one_run_at_a_time",
    "setup/test_settings_take_effect_at_once",
    "writes/test_level_ups_are_carried",
    "reconcile/test_sync_by_hand_says_what_it_did",
    "reconcile/test_desync_issues_are_shown_once",
    "writes/test_levels_out_of_range_are_refused",
    "writes/test_partitions_are_carried",
    "writes/test_row_level_security_hides_nothing",
    "writes/test_sessions_that_write_at_once",
    "drain/test_sessions_beside_a_drain",
    "reconcile/test_sessions_beside_a_run",
    "setup/test_sessions_beside_a_migrate",
    "monitor/test_every_silent_stop_is_noticed",
    "writes/test_a_writer_needs_no_right_on_the_other_side",
    "setup/test_grants_allow_no_more_than_they_say",
    "adopt",
    "setup/test_pg_cron_runs_the_jobs",
    "reconcile/test_ranges_leave_no_user_out",
    "commit/test_bulk_is_carried_as_a_set",
    "commit/test_sets_of_two_sessions_do_not_deadlock",
    "writes/test_a_write_stands_though_nothing_can_be_queued",
    "writes/test_a_write_waits_no_longer_than_told",
    "drain/test_a_drain_beside_writers",
    "setup/test_migrate_gives_the_whole_of_level_sync",
    "setup/test_migrate_survives_any_accident",
    "setup/test_migrate_beside_writers",
    "setup/test_rollback_takes_all_of_it_away",
)
# What needs pg_cron, but for the test that waits for real minutes.
CRON_PART = (
    "setup/test_pg_cron_runs_the_jobs",
    "monitor/test_jobs_that_stopped_are_noticed",
    "monitor/test_every_silent_stop_is_noticed",
    "drain/test_maintenance_does_what_is_due",
)

SILENCE = 150  # seconds without a word from pytest after which a test hangs
AT_LEAST_KILLED = 0.95

CHANGES: dict[str, list[tuple[str, str]]] = {
    "a comparison turned": [
        (r" is distinct from ", " is not distinct from "),
        (r" is not null\b", " is null"),
        (r" is null\b", " is not null"),
        (r" <= ", " > "),
        (r" < ", " >= "),
        (r" > ", " <= "),
        (r" <> ", " = "),
        (r"\bnot exists\b", "exists"),
        (r"\bif not found\b", "if found"),
        (r"\bif found\b", "if not found"),
    ],
    "a WHEN dropped": [(r"\n *when \((?:[^;]*?)\)(?=\n *execute function)", "")],
    "a lock removed": [
        (r"\s+for (?:no key )?update\b[^\n;)]*", ""),
        (r"\n *lock table [^;]*;", ""),
        (internals.TRY_RUN_LOCK, "true"),
    ],
    "a lock that waits": [(r" (?:skip locked|nowait)\b", "")],
    "a greatest replaced": [(r"\bgreatest\(", "least("), (r"\bleast\(", "greatest(")],
    "a COMMIT removed": [(r"\n *commit;", ""), (rf"\n *{internals.CALL_OF_BEGIN_BATCH}", "")],
    "a COMMIT moved": [
        (r"\n( *)commit;\n(.*\S.*)", r"\n\2\n\1commit;"),
        (rf"\n( *)({internals.CALL_OF_BEGIN_BATCH})\n(.*\S.*)", r"\n\3\n\1\2"),
    ],
    "a side swapped": [(r"'progress'", "'license'"), (r"'license'", "'progress'")],
    "a direction swapped": [
        (r"'progress_to_license'", "'license_to_progress'"),
        (r"'license_to_progress'", "'progress_to_license'"),
    ],
    "a handler emptied": [
        # All that is indented below `exception when ... then`, or below a further `when ... then` of a handler.
        (
            r"\n( *)((?:exception )?when [\w ]*(?:others|_failure|_available|_table)[\w ]* then)\n(?:\1 .*\n)+",
            r"\n\1\2\n\1  null;\n",
        ),
        (r"\n( *)raise;", r"\n\1null;"),
        (rf"\n( *){internals.QUEUE_A_PAIR}", r"\n\1null;"),
    ],
    "an order turned": [(r" desc\b", " asc")],
    "an off by one": [(r" \+ 1\b", " + 2"), (r" - 1\b", " - 2")],
    "a conjunction loosened": [(r"\n( *)and (?!.* between)", r"\n\1or ")],
}


# Its file, the function or trigger it is in, its lines before and after, and which of those that are equal so far.
Identity = tuple[str, str, str, str, int]


@dataclass(frozen=True)
class Mutation:
    """One change of one place. It is known by what stands there, wherever the lines around it move to."""

    file: str
    start: int
    end: int
    replacement: str
    what: str
    line: int
    inside: str
    was: str
    becomes: str
    which: int = 1

    def __str__(self) -> str:
        return f"{self.what}, {self.file}:{self.line}"

    def applied_to(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def identity(self) -> Identity:
        return self.file, self.inside, self.was, self.becomes, self.which


def change_of(text: str, file: str, what: str, start: int, end: int, replacement: str) -> Mutation:
    first = text.rfind("\n", 0, start) + 1
    last = (text.find("\n", end - 1) + len(text)) % len(text)
    changed = text[first:start] + replacement + text[end:last]
    inside = re.findall(
        r"(?m)^ *create (?:or replace (?:function|procedure|view) level_sync\.|(?:constraint )?trigger )(\w+)",
        text[: start + 1],
    )
    return Mutation(
        file,
        start,
        end,
        replacement,
        what,
        text.count("\n", 0, start + 1) + 1,
        inside[-1] if inside else "",
        " ".join(text[first:last].split()),
        " ".join(changed.split()),
    )


def mutations() -> list[Mutation]:
    """Every change that could be made, in the code itself: not in comments, messages and hints."""
    found = []
    alike: Counter[Identity] = Counter()
    for file in sorted((ROOT / "sql").glob("*.sql")):
        text = file.read_text()
        prose = [
            match.span()
            for match in re.finditer(r"(?m)^ *--.*$|^comment on [^;]*;|(?:message|hint|detail) *=.*$", text)
        ]
        for what, patterns in CHANGES.items():
            for pattern, replacement in patterns:
                for match in re.finditer(pattern, text):
                    if not any(start <= match.start() < end for start, end in prose):
                        change = change_of(text, file.name, what, *match.span(), match.expand(replacement))
                        alike[change.identity()] += 1
                        found.append(replace(change, which=alike[change.identity()]))
    return found


def in_turn(everything: list[Mutation], seed: int) -> list[Mutation]:
    """All of them in a random order in which no kind is more frequent than another that still has some."""
    shuffled = random.Random(seed).sample(everything, len(everything))  # noqa: S311
    kinds = [[mutation for mutation in shuffled if mutation.what == what] for what in CHANGES]
    rounds = itertools.zip_longest(*kinds)
    return [mutation for one_of_each in rounds for mutation in one_of_each if mutation]


class Trees:
    """Copies of the tree, one for each change that is tried at the same time."""

    def __init__(self, directory: Path, count: int) -> None:
        self.free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(count):
            tree = directory / str(number)
            for part in ("sql", "migrations", "python", "tests"):
                shutil.copytree(ROOT / part, tree / part)
            for part in ("pyproject.toml", "README.md"):
                shutil.copy(ROOT / part, tree / part)
            # Nobody reads the sequence that kills: it need not be made shorter, which takes longer than finding it.
            model = tree / "tests" / "proof" / "test_random_sequences_keep_every_promise.py"
            model.write_text(re.sub(r", *Phase\.shrink\b", "", model.read_text()))
            self.free.put(tree)

    @contextmanager
    def with_(self, mutation: Mutation | None) -> Iterator[Path]:
        """A tree with the change in it, or without any."""
        tree = self.free.get()
        try:
            if mutation is None:
                yield tree
            else:
                file = tree / "sql" / mutation.file
                whole = file.read_text()
                file.write_text(mutation.applied_to(whole))
                try:
                    yield tree
                finally:
                    file.write_text(whole)
        finally:
            self.free.put(tree)


def parts_for(file: str | None) -> list[list[str]]:
    """pytest's arguments for each part of the tests, those first that know the file best."""
    first = internals.FIRST_TO_NOTICE.get(file or "", ())
    newest = [f"--servers={NEWEST}", *paths(dict.fromkeys((*first, *FAST_PART)))]
    cron = [f"--servers={OLDEST}", "-k", "not pg_cron_runs_the_job", *paths(CRON_PART)]
    return [cron, newest] if file in internals.ABOUT_CRON else [newest, cron]


def paths(names: Iterable[str]) -> list[str]:
    return [f"tests/{name}" if (ROOT / "tests" / name).is_dir() else f"tests/{name}.py" for name in names]


def failures(tree: Path, arguments: list[str]) -> list[str]:
    """The tests that fail, by their ids; a test that hangs is one of them. Without --maxfail no test is left out."""
    command = [sys.executable, "-m", "pytest", "--verbose", "--tb=no", "-p", "no:cacheprovider", "--numprocesses=0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "python"),
        "PGOPTIONS": "-c statement_timeout=30s",  # a loop that no longer ends is noticed by then
        "COLUMNS": "300",
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, *arguments], cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        size, heard_at, hangs = 0, time.monotonic(), False
        while process.poll() is None:
            time.sleep(0.05)
            if (now := os.fstat(output.fileno()).st_size) > size:
                size, heard_at = now, time.monotonic()
            elif time.monotonic() > heard_at + SILENCE:
                hangs = True
                process.send_signal(signal.SIGINT)  # pytest then stops the server
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
        output.seek(0)
        text = output.read()
    progress = text.split("short test summary info")[0]
    failed = re.findall(r"(?m)^(tests/.+?) (?:FAILED|ERROR)", progress)
    if hangs:
        begun = re.findall(r"(?m)^(tests/\S+::.+?) ?(?:$|PASSED|FAILED|ERROR|SKIPPED)", progress)
        failed += begun[-1:]
    if not failed and process.returncode != 0:
        raise RuntimeError(text)
    return failed


def killer_of(mutation: Mutation, trees: Trees, unreliable: set[str]) -> str | None:
    """The first test of the fast part that fails, None where none does."""
    with trees.with_(mutation) as tree:
        for part in parts_for(mutation.file):
            left_out = [argument for test in sorted(unreliable) for argument in ("--deselect", test)]
            if failed := failures(tree, ["-x", *left_out, *part]):
                return failed[0]
    return None


def does_load(tree: Path, dsn: str) -> bool:
    """Whether the SQL of the tree can be loaded into a migrated database, which stays as it was."""
    with psycopg.connect(dsn) as connection:
        try:
            connection.execute("set local search_path = pg_catalog, pg_temp")
            for file in sorted((tree / "sql").glob("*.sql")):
                connection.execute(file.read_bytes())
        except psycopg.Error:
            return False
        finally:
            connection.rollback()
    return True


def those_that_load(trees: Trees, candidates: list[Mutation], count: int) -> dict[int, Mutation]:
    """The first of the candidates that load, by their numbers."""
    chosen: dict[int, Mutation] = {}
    with running_server(NEWEST) as server:
        dsn = server.dsn("postgres")
        install.migrate(dsn)
        for number, mutation in enumerate(candidates, start=1):
            with trees.with_(mutation) as tree:
                if does_load(tree, dsn):
                    chosen[number] = mutation
                else:
                    print(f"{number:3}  {mutation}: does not load", flush=True)
            if len(chosen) == count:
                break
    return chosen


def reasons() -> dict[Identity, str]:
    """Why a change need not be noticed, by what it is."""
    listed = tomllib.loads(REASONS.read_text()).get("survivor", [])
    return {
        (entry["file"], entry["inside"], entry["was"], entry["becomes"], entry["which"]): entry["why"]
        for entry in listed
    }


def as_entry(mutation: Mutation) -> str:
    """A survivor as it is written into surviving_mutations.toml."""
    texts = {
        "file": mutation.file,
        "inside": mutation.inside,
        "was": mutation.was,
        "becomes": mutation.becomes,
        "why": "",
    }
    return "\n".join(
        ["[[survivor]]", *(f"{name} = '''{text}'''" for name, text in texts.items()), f"which = {mutation.which}"]
    )


def main(
    count: Annotated[int, typer.Option(help="How many changes to try.")] = 60,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 1,
    only: Annotated[list[int] | None, typer.Option(help="Just the one of this number; may be repeated.")] = None,
    at_once: Annotated[int, typer.Option(help="How many at the same time.")] = os.cpu_count() or 1,
) -> None:
    """Tries changes and exits with 0 where the tests notice at least 95 % of them and each survivor has a reason."""
    began_at = time.monotonic()
    everything = mutations()
    let_live = reasons()
    if unknown := set(let_live) - {mutation.identity() for mutation in everything}:
        raise SystemExit(f"{REASONS.name} names what is no change any more: {unknown}")
    with ExitStack() as stack:
        trees = Trees(Path(stack.enter_context(tempfile.TemporaryDirectory())), at_once)
        executor = stack.enter_context(ThreadPoolExecutor(at_once))

        def without_change(part: list[str]) -> list[str]:
            with trees.with_(None) as tree:
                return failures(tree, part)

        if failed := list(itertools.chain(*executor.map(without_change, parts_for(None)))):
            raise SystemExit(f"These tests fail without any change: {failed}")
        print(f"The tests pass without a change ({time.monotonic() - began_at:.0f} s)", flush=True)

        chosen = those_that_load(trees, in_turn(everything, seed), max(only) if only else count)
        pending = {number: mutation for number, mutation in chosen.items() if not only or number in only}
        tried = len(pending)
        killers: dict[int, str | None] = {}
        unreliable: set[str] = set()

        def tried_on(number: int, mutation: Mutation) -> tuple[int, str | None, float]:
            tried_at = time.monotonic()
            return number, killer_of(mutation, trees, unreliable), time.monotonic() - tried_at

        while pending:
            tries = [executor.submit(tried_on, number, mutation) for number, mutation in pending.items()]
            for done, result in enumerate(as_completed(tries), start=1):
                number, killer, seconds = result.result()
                killers[number] = killer
                verdict = f"killed by {killer.removeprefix('tests/')}" if killer else "SURVIVED"
                progress = f"{done} of {len(tries)}, {time.monotonic() - began_at:.0f} s"
                print(f"[{progress}] {number}, {seconds:.0f} s: {chosen[number]}: {verdict}", flush=True)
            found = sorted({killer for killer in killers.values() if killer})
            unproven = set(without_change([f"--servers={OLDEST},{NEWEST}", *found])) if found else set()
            for test in unproven:
                print(f"{test} fails without a change as well: what it killed is tried without it", flush=True)
            unreliable |= unproven
            pending = {number: chosen[number] for number, killer in killers.items() if killer in unproven}

    survivors = [chosen[number] for number, killer in killers.items() if not killer]
    without_reason = [mutation for mutation in survivors if mutation.identity() not in let_live]
    wrongly_let_live = [
        chosen[number] for number, killer in killers.items() if killer and chosen[number].identity() in let_live
    ]
    for mutation in survivors:
        print(f"Survived: {mutation}: {let_live.get(mutation.identity(), 'NO REASON IS GIVEN')}")
    for mutation in wrongly_let_live:
        print(f"{mutation}: is killed, though {REASONS.name} gives a reason why it is not")
    for mutation in without_reason:
        print(as_entry(mutation))
    kinds = Counter(chosen[number].what for number in killers)
    killed_kinds = Counter(chosen[number].what for number, killer in killers.items() if killer)
    print("; ".join(f"{what}: {killed_kinds[what]} of {kinds[what]}" for what in kinds))
    killed = tried - len(survivors)
    print(f"{killed} of {tried} killed in {time.monotonic() - began_at:.0f} s; {len(everything)} changes are possible")
    raise typer.Exit(bool(without_reason or wrongly_let_live or killed < AT_LEAST_KILLED * tried))


if __name__ == "__main__":
    typer.run(main)
