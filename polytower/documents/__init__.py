"""Pages written from the code; `python -m polytower.documents` writes them, and a test holds them current."""

from collections.abc import Callable
from pathlib import Path

from polytower.documents import commands, features, files, functions, http, settings, tables

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
CODE = ROOT / "docs" / "code"

# A page and what makes it.
PAGES: dict[Path, Callable[[], str]] = {
    REFERENCE / "commands.md": commands.page,
    REFERENCE / "features.md": features.page,
    REFERENCE / "functions.md": functions.page,
    REFERENCE / "http.md": http.page,
    REFERENCE / "settings.md": settings.page,
    REFERENCE / "tables.md": tables.page,
    **{CODE / f"{folder}.md": files.page(ROOT / folder) for folder in files.FOLDERS},
}


def text_of(path: Path) -> str:
    """The page as it should be."""
    return PAGES[path]().rstrip() + "\n\n<!-- Written by `python -m polytower.documents`. -->\n"
