"""What a run without options trains: the model that serves, again; and what does not exist is told before any work."""

from collections.abc import Mapping
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pipelines.generation import lifecycle, recipe
from polytower.errors import UserError
from tests.pipelines.test_generations import build

WIDE = {"towers.dim": 16}


def _go_live(connection: psycopg.Connection[Any], config: Mapping[str, Any]) -> None:
    generation = build(connection)
    connection.execute("update generations set config = %s", [Jsonb(config)])
    lifecycle.promote(connection, generation)


@pytest.mark.parametrize(
    ("live", "preset", "options", "trained"),
    [
        (None, "", {}, ("demo", {})),
        (None, "", WIDE, ("demo", WIDE)),
        ({"preset": "short", "options": WIDE}, "", {}, ("short", WIDE)),
        ({"preset": "short"}, "", {}, ("short", {})),
        ({"preset": "short", "options": WIDE}, "", {"epochs": 2}, ("short", {**WIDE, "epochs": 2})),
        ({"preset": "short", "options": WIDE}, "long", {}, ("long", {})),
        ({"preset": "gone"}, "long", {}, ("long", {})),
    ],
    ids=str,
)
def test_a_run_renews_the_live_model(
    connection: psycopg.Connection[Any],
    live: Mapping[str, Any] | None,
    preset: str,
    options: Mapping[str, Any],
    trained: tuple[str, Mapping[str, Any]],
) -> None:
    if live is not None:
        _go_live(connection, live)
    found = recipe.chosen(connection, preset, options)
    assert (found.preset, found.options) == trained
    assert str(found).startswith(f"preset {trained[0]}")
    assert ("generation 1, which is live" in found.source) == (live is not None and not preset)


@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        ("tinny", {}, "no preset 'tinny'"),
        ("tiny", {"epoch": 3}, "unknown option epoch"),
        ("tiny", {"epochs": "many"}, "'many' is not a number"),
        ("tiny", {"epochs": -1}, "out of range for epochs"),
        ("tiny", {"towers.fusion": "magic"}, "no fusion 'magic'"),
    ],
)
def test_what_does_not_exist_is_told(
    connection: psycopg.Connection[Any], preset: str, options: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        recipe.chosen(connection, preset, options)


def test_a_live_recipe_that_this_version_does_not_know_says_the_way_out(connection: psycopg.Connection[Any]) -> None:
    _go_live(connection, {"preset": "gone"})
    with pytest.raises(UserError, match=r"no preset 'gone'.*generation 1, which is live.*--preset NAME takes another"):
        recipe.chosen(connection, "", {})
