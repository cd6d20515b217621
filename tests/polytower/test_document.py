"""Pages written from the code are current, links lead somewhere, and lines of Markdown are short enough to read."""

import re
from pathlib import Path

import pytest

from polytower.documents import PAGES, ROOT, text_of

WIDTH = 120
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_written_from_the_code_are_current(page: Path) -> None:
    assert page.read_text() == text_of(page), "run python -m polytower.documents"


def test_every_module_says_what_it_is_for() -> None:
    silent = [line for page in PAGES for line in text_of(page).splitlines() if re.fullmatch(r"- `\w+\.py`:? ?", line)]
    assert not silent


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: path.name)
def test_no_line_of_markdown_is_too_long(page: Path) -> None:
    assert not [line for line in page.read_text().splitlines() if len(line) > WIDTH]
