"""Text of a database, made safe to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text, with escapes for characters that a terminal would act on or that would hide what it says.

    Line breaks stay.
    """
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
