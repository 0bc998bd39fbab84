"""Breaks the SQL on purpose, one small change at a time, and sees whether the fast part of the tests notices.

    python tests/mutations.py [--count 60] [--seed 1] [--only 7 --only 9]

Each change is tried on a copy of the tree, against the embedded server, and what needs pg_cron against the system's
(tests/install_server_packages). Survivors are printed with where they stand.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent

# In the order of how much they notice in how little time. What compares the two mirror files is left out: it would
# notice a change of the text, not of what it does.
FAST_PART = [
    f"tests/test_{name}.py"
    for name in (
        "write_carries_the_level",
        "deletes_and_moves",
        "refused_levels",
        "failing_target",
        "armed_sets",
        "functions",
        "settings",
        "reconcile",
        "undo",
        "maintain",
        "health",
        "found_failures",
        "rights",
        "model",
        "adopt",
        "session_schedules",
        "two_reconciles",
        "two_sessions",
    )
]
# What needs pg_cron, but for the test that waits for real minutes.
CRON_PART = [f"tests/test_{name}.py" for name in ("schedule", "health", "maintain")]
PARTS = [["-k", "embedded", *FAST_PART], ["-k", "not embedded and not pg_cron_runs_the_job", *CRON_PART]]

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
    "a lock removed": [(r"\n *for (?:no key )?update[^\n;)]*", "")],
    "a greatest replaced": [(r"\bgreatest\(", "least("), (r"\bleast\(", "greatest(")],
    "a COMMIT removed": [(r"\n *commit;", "")],
    "a side swapped": [(r"'progress'", "'license'"), (r"'license'", "'progress'")],
    "a direction swapped": [
        (r"'progress_to_license'", "'license_to_progress'"),
        (r"'license_to_progress'", "'progress_to_license'"),
    ],
    "a handler emptied": [(r"\n      raise;", "\n      null;")],
    "an order turned": [(r" desc\b", " asc")],
    "an off by one": [(r" \+ 1\b", " + 2"), (r" - 1\b", " - 2")],
    "a conjunction loosened": [(r"\n( *)and (?!.* between)", r"\n\1or ")],
}


@dataclass(frozen=True)
class Mutation:
    """One change of one place."""

    file: str
    start: int
    end: int
    replacement: str
    what: str

    def applied_to(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def place(self) -> str:
        line = (ROOT / "sql" / self.file).read_text().count("\n", 0, self.start + 1) + 1
        return f"{self.file}:{line}"


def mutations() -> list[Mutation]:
    """Every change that could be made, in the code itself: not in comments, messages and hints."""
    found = []
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
                        found.append(Mutation(file.name, *match.span(), match.expand(replacement), what))
    return found


def killer_of(mutation: Mutation) -> str | None:
    """The first test of the fast part that fails, None where none does."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for part in ("sql", "migrations", "python", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, tree / part)
        broken = tree / "sql" / mutation.file
        broken.write_text(mutation.applied_to(broken.read_text()))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--numprocesses=2"]
        # A loop that no longer ends is noticed by then.
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree / "python"),
            "PGOPTIONS": "-c statement_timeout=60s",
        }
        for part in PARTS:
            try:
                done = subprocess.run(
                    [*command, *part],
                    cwd=tree,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=400,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return "it hangs"
            if done.returncode != 0:
                failed = re.search(r"(?m)^(?:FAILED|ERROR) tests/(\S+)", done.stdout)
                if failed is None:
                    raise RuntimeError(done.stdout + done.stderr)
                return failed[1]
        return None


def main(
    count: Annotated[int, typer.Option(help="How many changes to try.")] = 60,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 1,
    only: Annotated[list[int] | None, typer.Option(help="Just the one of this number; may be repeated.")] = None,
) -> None:
    everything = mutations()
    chosen = random.Random(seed).sample(everything, count)  # noqa: S311
    survivors = []
    for number, mutation in enumerate(chosen, start=1):
        if not only or number in only:
            killer = killer_of(mutation)
            verdict = f"killed by {killer}" if killer else "SURVIVED"
            print(f"{number:3} of {count}  {mutation.what}, {mutation.place()}: {verdict}", flush=True)
            survivors += [] if killer else [mutation]
    tried = len(only) if only else count
    print(f"{tried - len(survivors)} of {tried} killed; {len(everything)} changes are possible")
    raise typer.Exit(len(survivors) > tried * 0.05)


if __name__ == "__main__":
    typer.run(main)
