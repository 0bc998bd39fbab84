"""What every test can use: databases on the servers it is run on, a mail server, and a word about its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest_plugins = ["versions", "databases", "orm_tables", "mail_server"]
PROGRESS_INTERVAL = 10  # seconds


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leftovers: this test leaves a desync, a queued pair or a changed schema behind on purpose"
    )
    config.addinivalue_line("markers", "long: this test takes more than half a minute, and is begun first")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Two workers begin with what takes long, most of it waiting, while the others steal the rest of their shares: each
    begins with its share of the list as it is."""
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in long]
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    half = len(others) // workers
    items[:] = [*long[::2], *others[:half], *long[1::2], *others[half:]]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests measured: record_property("figure", "...")."""
    figures = [
        f"{report.nodeid}: {value}"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(figures))


@pytest.fixture
def progress(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """progress("3 of 200 kills") is seen while the test runs: in the long versions, every 10 seconds at most."""
    is_long = request.config.getoption("proof")
    told_at = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told_at
        if is_long and time.monotonic() - told_at >= PROGRESS_INTERVAL:
            told_at = time.monotonic()
            with capsys.disabled():
                print(f"\n  {text}", end="", flush=True, file=sys.stderr)  # of a worker, stdout is not seen

    return tell
