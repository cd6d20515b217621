"""Options of commands that are made of the modalities' records."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from feature_repo.modalities import MODALITIES

CONTENT = click.option(
    "--content",
    "--modalities",
    "content",
    multiple=True,
    type=click.Choice(list(MODALITIES)),
    help="Content to encode and learn from (repeatable); none by default.",
)


def own_columns(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the command an option per modality of the user's own (--vectors COLUMN).

    It takes them as `own`: modality → column, of those named.
    """
    records = [record for record in MODALITIES.values() if record.option]

    @wraps(command)
    def collected(**options: Any) -> Any:
        named = {record.name: options.pop(f"own_{record.name}") for record in records}
        return command(own={name: column for name, column in named.items() if column}, **options)

    for record in reversed(records):
        option = click.option(f"--{record.option}", f"own_{record.name}", metavar="COLUMN", help=record.option_help)
        collected = option(collected)
    return collected
