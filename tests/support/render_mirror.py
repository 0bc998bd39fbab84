"""Renders sql/30_license_to_progress.sql from sql/20_progress_to_license.sql: `make mirror`.

The two sides change places, word by word. Where they differ in more than names, the line says what it becomes:
`code  -- mirror: what the other file has there`; nothing after the colon drops the line.
"""

from __future__ import annotations

import re
from pathlib import Path

SQL = Path(__file__).resolve().parents[2] / "sql"
ORIGINAL = SQL / "20_progress_to_license.sql"
MIRROR = SQL / "30_license_to_progress.sql"

HEAD = """\
-- What is written to user_licenses is carried to specialization_progress, in the same transaction.
-- Rendered from 20_progress_to_license.sql by `make mirror`: change that file.
"""
SWAPPED = {
    "specialization_progress": "user_licenses",
    "user_licenses": "specialization_progress",
    "progress": "license",
    "license": "progress",
    "licenses": "progress",
    "new.student_id": "new.user_id",
    "old.student_id": "old.user_id",
    "new.specialization_id": "new.specialization_type",
    "old.specialization_id": "old.specialization_type",
}
# Whole names first, then each word that a name is made of.
WORD = re.compile(r"specialization_progress|user_licenses|(?:new|old)\.\w+_id|[a-z]+")


def mirrored(line: str) -> str | None:
    """The line with the sides swapped, or None where the other file has none."""
    code, marker, other = line.partition("  -- mirror:")
    if marker:
        return line[: len(code) - len(code.lstrip())] + other.strip() if other.strip() else None
    return WORD.sub(lambda word: SWAPPED.get(word[0], word[0]), line)


def rendered() -> str:
    """The mirror image of the original, with a head of its own."""
    _, _, body = ORIGINAL.read_text().partition("\n\n")
    lines = (mirrored(line) for line in body.splitlines())
    return HEAD + "\n" + "\n".join(line for line in lines if line is not None) + "\n"


if __name__ == "__main__":
    MIRROR.write_text(rendered())
