"""Promises about the code that can be read off it."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

import internals
from tree import ROOT

SQL = sorted((ROOT / "sql").glob("*.sql"))


def code_of(file: Path) -> str:
    """A file's SQL without comments."""
    return re.sub(r"^\s*--.*\n", "", file.read_text(), flags=re.MULTILINE)


def function_names(file: Path) -> list[str]:
    return re.findall(r"create or replace (?:function|procedure) level_sync\.(\w+)", file.read_text())


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


@pytest.mark.parametrize("file", internals.FILES_OF_A_WRITE)
def test_a_write_notifies_nobody_locks_no_advice_and_makes_no_temporary_table(file):
    code = code_of(ROOT / "sql" / file).lower()
    for word in ("notify", "advisory", "create temp", "now()", "dblink"):
        assert word not in code, word


def test_no_logic_asks_for_the_name_of_the_table():
    """Triggers of partitions have other names; one function only names its table in a message."""
    for file in SQL:
        uses = code_of(file).count("tg_table_name")
        assert uses == (1 if file.name == internals.NAMES_ITS_TABLE else 0), file.name


def test_a_search_path_is_pinned_or_the_reason_stands_beside_it():
    for file in SQL:
        for match in re.finditer(
            r"create or replace (function|procedure) level_sync\.(\w+)\((.*?)\nas \$\$", file.read_text(), re.DOTALL
        ):
            kind, name, header = match.groups()
            if "set search_path = pg_catalog, pg_temp" in header:
                continue
            assert kind == "procedure" or name in internals.INLINED | internals.SETTERS, f"{name} in {file.name}"


def test_dynamic_sql_takes_names_through_format_only():
    """Every EXECUTE, with what it runs: values go in as parameters."""
    for file in SQL:
        for statement in re.findall(r"^\s*execute (?!function)(.*?);", code_of(file), re.DOTALL | re.MULTILINE):
            assert "||" not in statement.replace("|| _", ""), (file.name, statement)


def test_python_sends_no_sql_of_its_own():
    """What it sends stands in queries.sql, check.sql, demo.sql and sql/."""
    for file in (ROOT / "python" / "level_sync").rglob("*.py"):
        assert re.findall(r"execute\w*\(\s*[rf]*[\"'].*", file.read_text()) == [], file.name


def modules(*inside: str) -> list[str]:
    """The modules of the package, or those whose names begin like these."""
    files = (ROOT / "python" / "level_sync").rglob("*.py")
    parts = [file.relative_to(ROOT / "python").with_suffix("").parts for file in files]
    names = [".".join(part for part in path if part != "__init__") for path in parts]
    return sorted(name for name in names if name.startswith(inside or "level_sync"))


def import_in_a_fresh_process(code: str, names: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_module_can_be_imported_before_all_others():
    """So no import goes round in a circle."""
    import_in_a_fresh_process(
        """if True:
        import importlib, sys
        for module in sys.argv[1:]:
            for name in [name for name in sys.modules if name.partition(".")[0] == "level_sync"]:
                del sys.modules[name]
            importlib.import_module(module)
        """,
        modules(),
    )


def test_verify_and_monitor_do_not_import_yoyo():
    """Who only reads a database needs no code that migrates it."""
    readers = modules("level_sync.verify", "level_sync.monitor")
    assert len(readers) > 5
    import_in_a_fresh_process(
        """if True:
        import importlib, sys
        for module in sys.argv[1:]:
            importlib.import_module(module)
            assert "yoyo" not in sys.modules, module
        """,
        readers,
    )


def test_levels_are_those_of_the_academy(db):
    """Against the academy's own list, which stands beside this tree."""
    facts = ROOT.parent / "shared" / "data" / "specialization_levels.csv"
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
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in listed.stdout.splitlines()]


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
