"""`polytower export`: a generation as Parquet files."""

from pathlib import Path
from typing import Any

import click

from polytower.commands.output import AS_JSON, answer, require_schema, table


class GenerationNumber(click.ParamType[Any]):
    """A generation's number, or `live`."""

    name = "GENERATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; None for the live one."""
        if value is None or value == "live":
            return None
        return click.INT.convert(value, param, ctx)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--generation", type=GenerationNumber(), help="A generation's number, or live [default: live].")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["parquet"]),
    default="parquet",
    show_default=True,
    help="Format of the files.",
)
@click.option(
    "-k",
    "k",
    type=click.IntRange(0, 1000),
    default=100,
    show_default=True,
    help="Candidates of every user; 0 leaves that file out.",
)
@AS_JSON
def export(folder: Path, generation: int | None, kind: str, k: int, as_json: bool) -> None:  # noqa: ARG001 there is one
    """Write a generation into FOLDER: item embeddings, interests and candidates of all users, as Parquet.

    Candidates are those of `retrieve`, by the stored interests, without what a user has seen.
    """
    from pipelines.export import export as write
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        found = write(connection, folder, generation=generation, k=k, progress=not as_json)
    document = {"folder": str(found.folder), "generation": found.generation, "rows": found.rows}
    text = table([*found.rows.items()], ["file", "rows"], title=f"generation {found.generation} in {found.folder}")
    answer(document, as_json=as_json, text=text)
