"""Pieces of Markdown whose lines are at most 120 columns."""

from collections.abc import Iterable
from textwrap import fill

WIDTH = 120


def paragraph(text: str) -> str:
    """One paragraph."""
    return _filled(" ".join(text.split()))


def bullets(entries: Iterable[tuple[str, str]]) -> str:
    """A list of names (as code, or marked up already) and what they are."""
    return "\n".join(_filled(f"- {name}: {text}" if text else f"- {name}", "  ") for name, text in entries)


def _filled(text: str, indent: str = "") -> str:
    return fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
