"""The wheel holds all that is needed: it installs level_sync where the source tree is not, and upgrades what another
wheel has installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from academy import (
    PROGRESS,
    add_pairs,
    bypass,
    configure,
    drain,
    levels,
    queued,
    reconcile,
    set_level,
)
from level_sync.setup import install
from level_sync.verify import verify
from tree import MIGRATIONS, ROOT

MIGRATE = """
import sys
from level_sync.database import shipped
from level_sync.setup import install
print(install.__file__)
print(shipped("sql"))
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


def build(tree: Path, folder: Path) -> Path:
    """A wheel of the tree, built from its source distribution, so that a file missing from either shows."""
    run(sys.executable, "-m", "build", "--outdir", folder, tree, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def unpack(wheel: Path, folder: Path) -> Path:
    """A folder with nothing but the wheel in it."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def last_release(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the newest tag before this commit, unpacked; of this tree, where nothing has been released yet."""
    tag = ["git", "describe", "--tags", "--abbrev=0", "--match=v*", "HEAD^"]
    described = subprocess.run(tag, cwd=ROOT, capture_output=True, text=True, check=False)
    if described.returncode != 0:
        return installed
    tree = tmp_path_factory.mktemp("tree")
    archive = tree.parent / "release.tar"
    run("git", "archive", f"--output={archive}", described.stdout.strip(), cwd=ROOT)
    shutil.unpack_archive(archive, tree, filter="data")
    release = build(tree, tmp_path_factory.mktemp("release_dist"))
    return unpack(release, tmp_path_factory.mktemp("release"))


def migrate_with(folder: Path, dsn: str, cwd: Path) -> list[str]:
    """Migrates with the level_sync in the folder; what it printed: its own file, its SQL, what it applied."""
    command = (sys.executable, "-c", MIGRATE, dsn)
    output = run(*command, cwd=cwd, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    return output.splitlines()[-3:]


def test_all_sql_and_migrations_are_inside(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("sql", "migrations"):
        shipped = {f"level_sync/{folder}/{file.name}" for file in (ROOT / folder).iterdir() if file.is_file()}
        assert shipped
        assert shipped - inside == set()


def test_all_of_the_package_is_inside_and_no_test(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "python" / "level_sync"
    shipped = {
        str(file.relative_to(package.parent))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert shipped - set(inside) == set()
    assert [name for name in inside if "test" in name or "__pycache__" in name] == []
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_migrate_works_from_the_wheel_alone(server, empty_database, installed, tmp_path):
    module, sql, applied = migrate_with(installed, empty_database.dsn, tmp_path)
    assert Path(module).is_relative_to(installed)
    assert Path(sql).is_relative_to(installed)
    assert applied == f"{len(MIGRATIONS)} applied"
    db = empty_database.connect()
    db.execute("insert into users (id) values (1)")
    db.execute("insert into user_licenses (user_id, specialization_type, current_level) values (1, 'PLAYER', 4)")
    assert db.execute("select current_level from specialization_progress").fetchone() == (4,)
    assert install.migrate(empty_database.dsn) == []


def test_a_database_of_the_last_release_is_upgraded_and_loses_nothing(server, empty_database, last_release, tmp_path):
    """With levels that agree, one that differs, a write that waits and settings of their own."""
    migrate_with(last_release, empty_database.dsn, tmp_path)
    db = empty_database.connect()
    add_pairs(db, 20)
    configure(db, batch_size=7)
    reconcile(db)
    somebody = empty_database.connect(autocommit=False)
    somebody.execute("select from user_licenses where user_id = 1 for update")
    set_level(db, PROGRESS, 1, 5)
    somebody.rollback()
    with bypass(db):
        set_level(db, PROGRESS, 2, 6)
    state = "table specialization_progress", "table user_licenses", "table level_sync.sync_log"
    before = [db.execute(statement).fetchall() for statement in state]
    install.migrate(empty_database.dsn)
    assert [db.execute(statement).fetchall() for statement in state] == before
    assert db.execute("select batch_size from level_sync.settings").fetchone() == (7,)
    assert len(queued(db)) == 1
    drain(db)
    reconcile(db)
    assert [levels(db, user) for user in (1, 2)] == [(5, 5), (6, 6)]
    failed = [check for check in verify(empty_database.dsn) if check.ok is False and "schedule" not in check.name]
    assert failed == []


def test_the_command_line_works_from_the_wheel_alone(server, empty_database, installed, tmp_path):
    program = installed / "bin" / "level-sync"
    environment = {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    run(sys.executable, program, "migrate", "--dsn", empty_database.dsn, cwd=tmp_path, **environment)
    status = run(sys.executable, program, "status", "--json", "--dsn", empty_database.dsn, cwd=tmp_path, **environment)
    assert '"progress_rows": 0' in status
