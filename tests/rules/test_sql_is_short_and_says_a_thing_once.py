"""sql/ says each thing once, of one type of pair, in functions that fit on a screen and a half."""

from __future__ import annotations

import re
from pathlib import Path

import internals
import render_mirror
from tree import ROOT

BY_HAND = [file for file in sorted((ROOT / "sql").glob("*.sql")) if file != render_mirror.MIRROR]
ROW_TRIGGERS = {name.removeprefix("level_sync.") for name in internals.CARRY.values()}
FUNCTION = re.compile(
    r"^create or replace (?:function|procedure) level_sync\.(?P<name>\w+)(?P<header>.*?)\nas \$\$\n(?P<body>.*?)^\$\$;",
    re.DOTALL | re.MULTILINE,
)
# Of plain values: arrays of pairs are what functions should speak of.
ARRAY = re.compile(r"\b(?!returns\b)(\w+)\s+(?:constant\s+)?(?!level_sync\.)[\w.]+\[\]")


def functions(files: list[Path]) -> list[re.Match[str]]:
    found = [function for file in files for function in FUNCTION.finditer(file.read_text())]
    assert len(found) > 100
    return found


def test_no_function_but_the_row_triggers_is_much_longer_than_80_lines():
    """A row trigger is one function, because each call of another would cost every write of a level."""
    everything = functions([*BY_HAND, render_mirror.MIRROR])
    long = {function["name"] for function in everything if function[0].count("\n") >= 90}
    assert long <= ROW_TRIGGERS
    assert len(ROW_TRIGGERS) == 2


def test_no_function_takes_or_returns_parallel_arrays():
    of_headers = {function["name"]: ARRAY.findall(function["header"]) for function in functions(BY_HAND)}
    assert {name: arrays for name, arrays in of_headers.items() if len(arrays) > 1} == {}


def test_few_lines_name_two_arrays_of_values():
    lines = [
        line
        for function in functions(BY_HAND)
        for line in re.sub(r"--.*", "", function[0]).splitlines()
        if sum(bool(re.search(rf"(?<![\w.]){name}\b", line)) for name in set(ARRAY.findall(function[0]))) > 1
    ]
    assert len(lines) <= 20, "\n".join(lines)


def test_at_most_4500_lines_are_written_by_hand():
    assert sum(file.read_text().count("\n") for file in BY_HAND) <= 4500


def test_the_second_direction_is_the_first_one_rendered():
    """Whoever changes one of them runs `make mirror`."""
    assert render_mirror.MIRROR.read_text() == render_mirror.rendered()
