"""Pages written from the code are current, links lead somewhere, and no path or host of one machine is in them."""

import re
from pathlib import Path

import pytest

from polytower.commands import document

PAGES = sorted([document.README, *document.ROOT.glob("*.md"), *(document.ROOT / "docs").rglob("*.md")])


def test_the_page_about_the_tables_is_current() -> None:
    assert document.SCHEMA_PAGE.read_text() == document.schema_page(), "run python -m polytower.commands.document"


def test_the_map_of_the_files_is_current() -> None:
    assert document.README.read_text() == document.readme(), "run python -m polytower.commands.document"


def test_every_module_says_what_it_is_for() -> None:
    silent = [line for line in document.readme().splitlines() if re.fullmatch(r"- `\w+\.py` ", line)]
    assert not silent


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
