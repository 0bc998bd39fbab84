"""Which of the four servers a test is run on.

`make test` runs a part on each: what a folder is about decides, and a file or a test that tells more, or less, says so
with `servers(15, 16, 17, 18)`. `make proof` runs everything on all of them, and `--servers=18` on no other. What needs
a library asks for it with `needs("pg_cron")`, and runs where the server has it; `lacks("pg_cron")` is the opposite.
"""

from __future__ import annotations

from typing import Any

import pytest

from servers import VERSIONS, has, installed, why_missing
from tree import TESTS

OLDEST = next((version for version in VERSIONS if installed(version)), VERSIONS[0])
NEWEST = VERSIONS[-1]
# What the database does is seen on the oldest and on the newest server; what is built around it, on one.
FOLDERS = {
    "writes": (OLDEST, NEWEST),
    "commit": (OLDEST, NEWEST),
    "drain": (OLDEST, NEWEST),
    "reconcile": (OLDEST, NEWEST),
    "adopt": (OLDEST,),
    "setup": (NEWEST,),
    "monitor": (NEWEST,),
    "rules": (NEWEST,),
    "proof": (NEWEST,),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", action="store_true", help="The long versions, on every server: make proof.")
    parser.addoption(
        "--servers",
        type=lambda text: tuple(int(version) for version in text.split(",")),
        help="Only on these servers: --servers=15,18.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "servers(version, ...): make test runs it on these, whatever its folder")
    config.addinivalue_line("markers", "needs(library): it is run where the server has the library")
    config.addinivalue_line("markers", "lacks(library): it is run where the server does not have it")
    config.addinivalue_line("markers", "on_no_server_of_these: for none of --servers")


def pytest_report_header() -> list[str]:
    """What a run is not made on, and why."""
    return [f"not on PostgreSQL {version}: {why_missing(version)}" for version in VERSIONS if not installed(version)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", chosen(metafunc), indirect=True, scope="session", ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("on_no_server_of_these")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def chosen(metafunc: pytest.Metafunc) -> list[Any]:
    """The versions for a test; those that cannot be had are skipped with the reason."""
    test = metafunc.definition
    needed = [library for marker in test.iter_markers("needs") for library in marker.args]
    unwanted = [library for marker in test.iter_markers("lacks") for library in marker.args]
    fit = [
        version
        for version in VERSIONS
        if all(has(version, library) for library in needed) and not any(has(version, library) for library in unwanted)
    ]
    if not fit:
        reason = f"no server here has {' and '.join(needed)}: install_server_packages gets it, as root on Debian"
        return [pytest.param(OLDEST, marks=pytest.mark.skip(reason=reason))]
    only = metafunc.config.getoption("servers")
    if only or metafunc.config.getoption("proof"):
        wanted = only or VERSIONS
    else:
        marker = test.get_closest_marker("servers")
        wanted = marker.args if marker else FOLDERS[test.path.relative_to(TESTS).parts[0]]
    versions = [version for version in fit if version in wanted]
    if not versions and only:
        return [pytest.param(only[0], marks=pytest.mark.on_no_server_of_these)]
    return [
        version if installed(version) else pytest.param(version, marks=pytest.mark.skip(reason=why_missing(version)))
        for version in versions or fit[:1]
    ]
