"""Options that several commands take."""

import json
from pathlib import Path
from typing import Any

import click

SHOWN = 20  # rejected rows that are named
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OPTIONS = click.option(
    "--set",
    "--option",
    "options",
    multiple=True,
    metavar="NAME=JSON",
    help="Change one option of the preset, such as epochs=40 or towers.interests=1 (repeatable).",
)


START = click.option(
    "--start",
    type=click.Path(file_okay=False, path_type=Path),
    help="Go on from this pretrained model (`polytower pretrain`), or serve it as it is with --option epochs=0.",
)


def parsed(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=JSON pairs as a dict; a value that is no JSON is taken as a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--set")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
