"""The wheel holds all that is needed: it installs level_sync where the source tree is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from level_sync import install

ROOT = Path(__file__).resolve().parents[1]

MIGRATE = """
import sys
from level_sync import install
print(install.__file__)
print(install.shipped("sql"))
print(len(install.migrate(sys.argv[1])), "applied")
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, so that a file missing from either shows."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_all_sql_and_migrations_are_inside(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("sql", "migrations"):
        shipped = {f"level_sync/{folder}/{file.name}" for file in (ROOT / folder).iterdir() if file.is_file()}
        assert shipped
        assert shipped - inside == set()


def test_all_of_the_package_is_inside_and_no_test(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "python" / "level_sync"
    shipped = {f"level_sync/{file.name}" for file in package.iterdir() if file.suffix in (".py", ".sql", ".typed")}
    assert shipped - set(inside) == set()
    assert [name for name in inside if "test" in name or "__pycache__" in name] == []
    assert any(name.endswith("licenses/LICENSE") for name in inside)


@pytest.mark.parametrize("server", ["embedded"], indirect=True)
def test_migrate_works_from_the_wheel_alone(server, empty_database, installed, tmp_path):
    output = run(
        *(sys.executable, "-c", MIGRATE, empty_database.dsn),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
        PYTHONDONTWRITEBYTECODE="1",
    )
    module, sql, applied = output.splitlines()[-3:]
    assert Path(module).is_relative_to(installed)
    assert Path(sql).is_relative_to(installed)
    migrations = [file for file in (ROOT / "migrations").glob("0*") if ".rollback." not in file.name]
    assert applied == f"{len(migrations)} applied"
    db = empty_database.connect()
    db.execute("insert into users (id) values (1)")
    db.execute("insert into user_licenses (user_id, specialization_type, current_level) values (1, 'PLAYER', 4)")
    assert db.execute("select current_level from specialization_progress").fetchone() == (4,)
    assert install.migrate(empty_database.dsn) == []


@pytest.mark.parametrize("server", ["embedded"], indirect=True)
def test_the_command_line_works_from_the_wheel_alone(server, empty_database, installed, tmp_path):
    program = installed / "bin" / "level-sync"
    environment = {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    run(sys.executable, program, "migrate", "--dsn", empty_database.dsn, cwd=tmp_path, **environment)
    status = run(sys.executable, program, "status", "--json", "--dsn", empty_database.dsn, cwd=tmp_path, **environment)
    assert '"progress_rows": 0' in status
