"""A feature view is one declaration: every way to read, write and describe it is made of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from feature_repo import views
from feature_repo.columns import Kind
from feature_repo.copy_rows import FIELDS
from feature_repo.schema import SERVICES
from feature_repo.views import VIEWS
from feature_repo.views.view import Feature
from tests.feature_repo.toy_view import VIEW

ROOT = Path(__file__).parents[2]
# What is in the folder of the views and declares none.
OTHERS = {"__init__", "view", "windows", "online_reads", "online_writes"}


def test_every_declaration_is_in_use() -> None:
    files = {path.stem for path in Path(views.__file__).parent.glob("*.py")}
    assert files - OTHERS == set(VIEWS), "a view's file has the view's name, and views/__init__.py names it"
    assert [*VIEWS] == [view.name for view in VIEWS.values()]


def test_every_service_has_views() -> None:
    assert {service for view in VIEWS.values() for service in view.services} == set(SERVICES)


def test_every_kind_passes_all_doors() -> None:
    from feature_repo.definitions import DTYPES
    from feature_repo.stores.engine import VALUES
    from feature_repo.stores.online_response import PROTO

    for door in (DTYPES, PROTO, VALUES, FIELDS):
        assert set(door) == set(get_args(Kind))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"entity": "planet"}, "no entity 'planet'; there are user, item"),
        ({"services": ("rankr",)}, "no service 'rankr'; there are retrieval, ranker"),
        ({"features": (Feature("mood", "text", "lower(mood)"),)}, "mood is computed"),
        ({"features": (Feature("mood", "text"), Feature("mood", "text"))}, "two features"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(VIEW, **wrong)


@pytest.mark.slow
def test_a_declaration_and_a_table_are_enough(platform: str) -> None:
    program = [sys.executable, "-m", "tests.feature_repo.toy_view"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert "user_mood" in said["applied"]
    assert said["written"] == ["calm", "wild"]
    assert said["online"] == [["wild", None], [0.75, None]]
    assert said["historical"] == [None, "calm", "wild"], "a row is known from after its moment"
    assert said["http"] == [["wild", 0.75], [None, None]]
    assert said["materialised"], "materialising what is there rewrites no row"
    assert said["page"]


def test_contributing_counts_the_files_of_a_view() -> None:
    """The declaration, the migration, and the line that names it; a table is counted in a row of its own."""
    row = next(
        line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| a feature view")
    )
    assert "(3 files)" in row
    for file in ("feature_repo/views/", "views/__init__.py"):
        assert file in row
