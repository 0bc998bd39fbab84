"""Tests speak of what level_sync promises: whoever renames what is private in sql/ changes internals.py and no test."""

from __future__ import annotations

import re

from tree import ROOT, SUPPORT, TESTS

# Objects of the schema level_sync that users may rely on, although nothing about their names says so.
PROMISED_TABLES = {
    "settings",
    "sync_log",
    "sync_events",
    "sync_queue",
    "sync_plan",
    "released_pairs",
    "quarantined_rows",
    "installed_triggers",
}
PROMISED_SETTINGS = {"actor", "reason"}
MAY_NAME_THEM = {
    SUPPORT / "internals.py",
    SUPPORT / "render_mirror.py",  # renders one file of sql/ from another
    TESTS / "proof" / "surviving_mutations.toml",  # describes changes by the text of the code
}


def found(pattern: str) -> set[str]:
    """What stands in the pattern's group, anywhere in sql/ and migrations/."""
    files = [*(ROOT / "sql").glob("*.sql"), *(ROOT / "migrations").glob("*.sql")]
    return {name for file in files for name in re.findall(pattern, file.read_text(), re.IGNORECASE)}


def private_names() -> set[str]:
    functions = found(r"create (?:or replace )?(?:function|procedure) level_sync\.(_\w+)")
    of_triggers = found(r"create (?:or replace )?function level_sync\.(\w+)\(\)\s+returns trigger")
    triggers = found(r"create (?:or replace )?(?:constraint )?trigger (\w+)\s+(?:before|after)")
    tables = found(r"create (?:unlogged )?table (?:if not exists )?level_sync\.(\w+)") - PROMISED_TABLES
    settings = found(r"(?:current_setting|set_config)\('level_sync\.(\w+)'") - PROMISED_SETTINGS
    migrations = {file.name.partition(".")[0] for file in (ROOT / "migrations").glob("0*")}
    files = {file.name for file in (ROOT / "sql").glob("*.sql")}
    assert all((functions, of_triggers, triggers, tables, settings, migrations, files))
    of_a_session = {f"level_sync.{name}" for name in settings}  # the word alone may mean anything
    return functions | of_triggers | triggers | tables | of_a_session | migrations | files


def test_no_test_names_what_is_private_to_the_sql():
    private = re.compile(rf"(?<![\w.])(?:level_sync\.)?({'|'.join(map(re.escape, sorted(private_names())))})(?!\w)")
    named = {
        (str(file.relative_to(TESTS)), name)
        for file in TESTS.rglob("*")
        if file.suffix in (".py", ".sql", ".toml") and file not in MAY_NAME_THEM
        for name in private.findall(file.read_text())
    }
    assert named == set()


def test_no_helper_for_private_names_is_left_without_a_user():
    code = "\n".join(file.read_text() for file in TESTS.rglob("*.py"))
    helpers = re.findall(r"^(?:def )?(\w+)(?:\(| = )", (SUPPORT / "internals.py").read_text(), re.MULTILINE)
    assert [name for name in helpers if len(re.findall(rf"\b{name}\b", code)) == 1] == []
