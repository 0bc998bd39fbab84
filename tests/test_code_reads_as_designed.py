"""Promises about the code that can be read off it."""

from __future__ import annotations

import csv
import difflib
import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
SQL = sorted((TOP / "sql").glob("*.sql"))


def code_of(file: Path) -> str:
    """A file's SQL without comments."""
    return re.sub(r"^\s*--.*\n", "", file.read_text(), flags=re.MULTILINE)


SWAPPED = {
    "specialization_progress": "user_licenses",
    "user_licenses": "specialization_progress",
    "student_id": "user_id",
    "specialization_id": "specialization_type",
    "specialization_type": "specialization_id",
}


def mirrored(text: str) -> list[str]:
    """Lines with the two sides' names swapped; user_id is swapped only where it is a license's, not a pair's."""
    of_a_license = re.compile(
        r"(\b(?:created|deleted|doomed|carried|inserted)\.|\b(?:license|user_licenses)\.|\()user_id"
        r"(?=(?<=d\.user_id)|, specialization_type| = | between |, (?:license|user_licenses)\.|\n)"
    )
    text = of_a_license.sub(r"\1STUDENT", text)

    def swap(word: re.Match[str]) -> str:
        return SWAPPED.get(word[0]) or re.sub(
            "progress|licenses?", lambda side: "license" if side[0] == "progress" else "progress", word[0]
        )

    return re.sub(r"\b\w+\b", swap, text).replace("STUDENT", "student_id").splitlines()


def function_names(file: Path) -> list[str]:
    return re.findall(r"create or replace (?:function|procedure) level_sync\.(\w+)", file.read_text())


def test_the_two_directions_are_mirror_images():
    """Beyond the names they differ in the columns that one side has and the other has not, and in the plural."""
    there = mirrored(code_of(TOP / "sql" / "20_progress_to_license.sql"))
    back = code_of(TOP / "sql" / "30_license_to_progress.sql").splitlines()
    allowed = re.compile(
        r"^(---|\+\+\+|@@)|max_achieved_level|last_advanced_at|last_activity|total_xp|= held.new_level"
        r"|= license.current_level|^.\s+written_at, written_at|(?:current|new)_level, 0, 0, 0"  # columns
        r"|^.\s+'|^.\$trigger\$, '"  # what is told to people
        r"|licenses?_(to_progress|truncated)|truncated_licenses?|^.$"
        r"|select license.user_id, license.specialization_type, license.current_level, license.current_level,$"
        r"|select missing.user_id, missing.specialization, missing.new_level, missing.new_level,$"
    )
    differing = [line for line in difflib.unified_diff(there, back, n=0, lineterm="") if not allowed.search(line)]
    assert differing == []


def test_every_function_is_explained():
    for file in SQL:
        text = file.read_text()
        for name in function_names(file):
            assert re.search(rf"comment on (function|procedure) level_sync\.{name}\(", text), f"{name} in {file.name}"


def test_every_file_begins_with_what_it_promises():
    for file in SQL:
        assert file.read_text().startswith("-- "), file.name


def test_no_function_is_written_twice():
    names = [name for file in SQL for name in function_names(file)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("number", [8, 10, 15, 20, 30, 35])
def test_a_write_notifies_nobody_locks_no_advice_and_makes_no_temporary_table(number):
    (file,) = (TOP / "sql").glob(f"{number:02}_*.sql")
    code = code_of(file).lower()
    for word in ("notify", "advisory", "create temp", "now()", "dblink"):
        assert word not in code, (file.name, word)


def test_no_logic_asks_for_the_name_of_the_table():
    """Triggers of partitions have other names; refuse_statement only names the table in its message."""
    for file in SQL:
        uses = code_of(file).count("tg_table_name")
        assert uses == (1 if file.name == "08_guarded_tables.sql" else 0), file.name


def test_a_search_path_is_pinned_or_the_reason_stands_beside_it():
    for file in SQL:
        for match in re.finditer(
            r"create or replace (function|procedure) level_sync\.(\w+)\((.*?)\nas \$\$", file.read_text(), re.DOTALL
        ):
            kind, name, header = match.groups()
            if "set search_path = pg_catalog, pg_temp" in header:
                continue
            assert kind == "procedure" or name in INLINED | SETTERS, f"{name} in {file.name}"


# SQL functions that the planner sees through, which it does only without a SET clause; each names every object in full
# and is called by functions only that pin the path.
INLINED = {"_desync_issues_between", "_lock_timeout", "_session_actor", "_session_reason", "_as_utc"}
# They set the path of whoever calls them, which a SET clause would take back; they name every object in full.
SETTERS = {"_as_the_application", "_as_ourselves"}


def test_dynamic_sql_takes_names_through_format_only():
    """Every EXECUTE, with what it runs: values go in as parameters."""
    for file in SQL:
        for statement in re.findall(r"^\s*execute (?!function)(.*?);", code_of(file), re.DOTALL | re.MULTILINE):
            assert "||" not in statement.replace("|| _", ""), (file.name, statement)


def test_python_sends_no_sql_of_its_own():
    """What it sends stands in queries.sql, check.sql, demo.sql and sql/."""
    for file in (TOP / "python" / "level_sync").glob("*.py"):
        assert re.findall(r"execute\w*\(\s*[rf]*[\"'].*", file.read_text()) == [], file.name


def test_levels_are_those_of_the_academy(db):
    """Against the academy's own list, which stands beside this tree."""
    facts = TOP.parent / "shared" / "data" / "specialization_levels.csv"
    if not facts.exists():
        pytest.skip("the academy's own list of levels is not beside this tree")
    with facts.open() as file:
        wanted = sorted(tuple(row.values()) for row in csv.DictReader(file))
    loaded = db.execute(
        "select specialization_id, level::text, name, required_xp::text, required_sessions::text"
        " from specialization_levels"
    ).fetchall()
    assert sorted(loaded) == wanted
    assert db.execute("select id, max_levels from specializations order by id").fetchall() == [
        ("COACH", 8),
        ("INTERNSHIP", 3),
        ("PLAYER", 8),
    ]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False)
    return [TOP / name for name in listed.stdout.splitlines()]


def test_no_file_names_a_registry_or_holds_a_password():
    registries = re.compile(
        "|".join(("pypi" + r"\.org", "python" + "hosted", "deb" + r"\.debian\.org", "npm" + "js", "ghcr" + r"\.io"))
    )
    # Not psql's interpolation: password :'variable'.
    password = re.compile(r"password(?:\s*=|:)\s*['\"]?\w{4,}", re.IGNORECASE)
    for file in tracked_files():
        if file.suffix in (".py", ".sql", ".toml", ".yml", ".md", ".sh", ".ini", ".conf", "") and file.is_file():
            text = file.read_text()
            assert not registries.search(text), file
            if "tests" not in file.parts:
                assert not password.search(text), file
