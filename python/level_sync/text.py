"""Text from a database, as a person may see it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with its lines, and escapes for what would hide what it says or be obeyed by a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
