"""Where things are in the source tree, and the program that it installs."""

from __future__ import annotations

import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
DOCKER = ROOT / "docker"
RUNBOOK = DOCKER / "RUNBOOK.md"
MIGRATIONS = sorted(path.stem for path in (ROOT / "migrations").glob("0*") if ".rollback." not in path.name)
LEVEL_SYNC = Path(sys.executable).with_name("level-sync")
