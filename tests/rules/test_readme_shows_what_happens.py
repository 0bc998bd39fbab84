"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess

import pytest
from rich.console import Console

from level_sync.demo import demo
from tree import ROOT

README = ROOT / "README.md"
SHOWN = re.compile(r"```sql\n(?P<statements>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL)
DEMO = re.compile(r"for example:\n\n```text\n(?P<output>.*?)```", re.DOTALL)


def test_every_sql_block_prints_what_the_readme_shows(database):
    blocks = list(SHOWN.finditer(README.read_text(encoding="utf-8")))
    assert len(blocks) >= 3
    for block in blocks:
        shown = subprocess.run(
            [database.server.binaries / "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", database.dsn],
            input=block["statements"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.stderr == ""
        assert shown.stdout == block["output"]


@pytest.mark.leftovers
def test_the_demo_prints_what_the_readme_shows(empty_database):
    console = Console(record=True, width=120, quiet=False)
    demo.run(empty_database.dsn, console)
    printed = {line.rstrip() for line in console.export_text().splitlines()}
    excerpt = DEMO.search(README.read_text(encoding="utf-8"))["output"]
    assert [line for line in excerpt.splitlines() if line.rstrip() not in printed] == []
