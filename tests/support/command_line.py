"""level-sync as its users call it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from typer.testing import CliRunner

from level_sync import cli


@dataclass
class Done:
    """What one call of level-sync printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: str, env: dict[str, str] | None = None, columns: int = 80, stdin: str = "") -> Done:
    """Runs level-sync as on a terminal without colours. No connection setting of the tests' own reaches it."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith(("PG", "DATABASE_URL"))}
    cli.console.width = cli.error_console.width = columns  # rich would ask the terminal the tests were started from
    result = CliRunner().invoke(cli.app, arguments, env={**clean, **(env or {})}, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a user would see a traceback
    return Done(result.exit_code, result.stdout, result.stderr)
