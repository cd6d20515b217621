"""`polytower retrieve` and `polytower similar`: one question, one answer, no server."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from polytower.commands.output import AS_JSON, answer, require_schema, say, table


class JsonObject(click.ParamType[Any]):
    """An option whose value is a JSON object."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parsed object; a usage error for anything else."""
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail("a JSON object is needed", param, ctx)
        return parsed


FILTER = click.option(
    "--filter",
    "where",
    type=JsonObject(),
    default={},
    help='Attribute filter, such as \'{"genres": "Comedy", "year": {"gte": 1990}}\'.',
)


@click.command()
@click.argument("user_id", required=False)
@click.option("--history", help="Item ids, oldest first, separated by commas: retrieve for a user nobody has seen.")
@click.option("--attributes", type=JsonObject(), help="What is known of that user, with --history or without one.")
@click.option("--text", help="What to look for: the items whose content is nearest to this text.")
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A picture to look for; with --text, both are one question.",
)
@click.option("-k", "k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Candidates to return.")
@FILTER
@click.option("--include-seen", is_flag=True, help="Keep items that the user has already interacted with.")
@click.option(
    "--merge",
    type=click.Choice(["max", "quota", "rrf", "soft"]),
    default="max",
    show_default=True,
    help="How the interests' lists become one: best score, shares by weight, reciprocal ranks.",
)
@AS_JSON
def retrieve(
    user_id: str | None,
    history: str | None,
    attributes: dict[str, Any] | None,
    text: str | None,
    image: Path | None,
    k: int,
    where: dict[str, Any],
    include_seen: bool,
    merge: str,
    as_json: bool,
) -> None:
    """Candidates for USER_ID (or a raw --history, a --text or --image): the nearest items of each interest, merged."""
    from base64 import b64encode

    from pydantic import ValidationError

    from polytower.postgres import connect, database_url
    from serving.models import RetrieveRequest
    from serving.retrieve.ask import ask

    sources = (
        user_id is not None,
        history is not None or attributes is not None,
        text is not None or image is not None,
    )
    if sum(sources) != 1:
        raise click.UsageError(
            "give one of USER_ID, --history or --attributes, and --text or --image (or both of a pair)"
        )
    with connect() as connection:
        require_schema(connection)
    try:
        question = RetrieveRequest.model_validate(
            {"user_id": user_id, "history": history.split(",") if history else None, "attributes": attributes,
             "text": text, "image": b64encode(image.read_bytes()).decode() if image else None, "k": k, "filter": where,
             "exclude_seen": not include_seen, "merge": merge, "fields": ["title"]}
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    found = ask(database_url(), question)
    if found.skipped:
        say(f"unknown to generation {found.generation}, left out: {', '.join(found.skipped)}")
    rows = [(c.rank, c.title, c.item_id, c.score, c.interest, c.interest_rank) for c in found.candidates]
    columns = ["rank", "title", "item", "score", "interest", "rank in it"]
    title = f"generation {found.generation}, interests {found.interests}"
    document = {**vars(found), "candidates": [asdict(candidate) for candidate in found.candidates]}
    answer(document, as_json=as_json, text=table(rows, columns, title=title))


@click.command()
@click.argument("item_id")
@click.option("-k", "k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Neighbours to return.")
@click.option(
    "--space",
    type=click.Choice(["item", "content", "id"]),
    default="item",
    show_default=True,
    help="What nearness means: tower output, content alone, or behaviour alone.",
)
@FILTER
@AS_JSON
def similar(item_id: str, k: int, space: str, where: dict[str, Any], as_json: bool) -> None:
    """Items nearest to ITEM_ID in one of the three embedding spaces."""
    import psycopg

    from polytower.postgres import connect
    from serving import queries
    from serving.errors import user_error

    with connect() as connection:
        require_schema(connection)
        try:
            found = queries.similar(connection, item_id, k=k, space=space, filter=where, titles=True)
        except psycopg.Error as error:
            raise user_error(error) from error
    rows = [(n.rank, n.title, n.item_id, n.score) for n in found]
    text = table(rows, ["rank", "title", "item", "score"])
    answer([asdict(neighbour) for neighbour in found], as_json=as_json, text=text)
