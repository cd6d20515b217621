"""`polytower retrieve` and `polytower similar`: one question, one answer, no server."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from feature_repo import schema
from feature_repo.modalities import MODALITIES
from polytower.commands.output import AS_JSON, answer, require_schema, say, table
from polytower.errors import UserError

if TYPE_CHECKING:
    from serving.question import Question


SPACES = [*schema.SPACES, *MODALITIES]


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


class ItemIds(click.ParamType[Any]):
    """An option whose value is a list of item ids."""

    name = "ITEMS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The ids, separated by commas; a JSON list is taken as one, since ids may hold commas."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except (ValueError, RecursionError) as error:
                self.fail(f"not JSON: {error}", param, ctx)
        return value.split(",") if value else []


class Numbers(click.ParamType[Any]):
    """An option whose value is a list of numbers."""

    name = "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers, separated by commas."""
        if not isinstance(value, str):
            return value
        try:
            return [float(number) for number in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not numbers separated by commas, such as 0.7,0.3", param, ctx)


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILTER = click.option(
    "--filter",
    type=JsonObject(),
    default={},
    help='Attribute filter, such as \'{"genres": "Comedy", "year": {"gte": 1990}}\'.',
)


@click.command()
@click.argument("user_id", required=False)
@click.option("--history", type=ItemIds(), help="Item ids, oldest first, for a user the platform has never seen.")
@click.option("--attributes", type=JsonObject(), help="What is known about that user, with or without --history.")
@click.option(
    "--vectors", type=FILE, help="Your own interest vectors, one per row: a .npy file, or JSON lists of numbers."
)
@click.option(
    "--weights",
    type=Numbers(),
    help="One weight per vector of --vectors [default: equal]; with --merge sum they may be negative.",
)
@click.option(
    "--text",
    help="Text to search for: finds the items whose content is nearest; with USER_ID or --history, what that user would"
    " take (preset seminar), or items that suit both (--mix).",
)
@click.option("--image", type=FILE, help="Picture to search for; with --text, both form one question.")
@click.option(
    "--space",
    type=click.Choice(SPACES),
    help="Space to search in [default: text for --text, image for --image, content for both; item for --vectors].",
)
@click.option(
    "--mix",
    type=click.FloatRange(0, 1),
    help="With a user or --history, share of --text or --image in the score [default: 0.5].",
)
@click.option("-k", "k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Number of candidates.")
@FILTER
@click.option(
    "--include-seen",
    "exclude_seen",
    flag_value=False,
    default=True,
    help="Include items the user has already interacted with.",
)
@click.option("--exclude", type=ItemIds(), default=[], help="Item ids to leave out.")
@click.option("--allow", type=ItemIds(), help="Return only these item ids.")
@click.option(
    "--merge",
    type=click.Choice(["max", "quota", "rrf", "soft", "diverse", "sum"]),
    default="max",
    show_default=True,
    help="How to merge the interests' lists: by best score, shares by weight, reciprocal ranks, soft maximum,"
    " diversity (with --diversity), or one question that is the vectors' weighted sum.",
)
@click.option(
    "--diversity",
    type=JsonObject(),
    help='For --merge diverse: \'{"attribute": "genres", "weight": 0.05}\'; each candidate already'
    " picked that shares no value of the attribute adds the weight.",
)
@click.option(
    "--found-by/--no-found-by",
    default=True,
    help="List all interests that found each candidate (with --json) [default: yes].",
)
@click.option(
    "--features", help="Feature service, such as ranker, whose values to add to every candidate (with --json)."
)
@click.option("--similarity", is_flag=True, help="Add each candidate's similarity to the user's history (with --json).")
@click.option(
    "--relevant",
    type=click.IntRange(1, 200),
    help="Add so many items of the user's long history that are most like each candidate (with --json).",
)
@AS_JSON
def retrieve(as_json: bool, vectors: Path | None, image: Path | None, **options: Any) -> None:
    """Retrieve candidates for USER_ID, a --history, --vectors, a --text or an --image: each interest's nearest, merged.

    Item ids are separated by commas; give ids that contain a comma as a JSON list.
    """
    from polytower.postgres import connect, database_url
    from serving.answering import ask

    if not as_json and (options["features"] or options["similarity"] or options["relevant"]):
        raise click.UsageError("--features, --similarity and --relevant do not fit into a table; add --json")
    # Every other option has the name of the question's field.
    question = _question(
        vectors=None if vectors is None else _vectors(vectors),
        image=None if image is None else image.read_bytes(),
        fields=["title"],
        **options,
    )
    with connect() as connection:
        require_schema(connection)
    ranked = ask(database_url(), question)
    found = ranked.answer
    if found.skipped:
        say(f"not in generation {found.generation}, skipped: {', '.join(found.skipped)}")
    if found.degraded:
        say(found.degraded)
    rows = [(c.rank, c.title, c.item_id, c.score, c.interest, c.interest_rank) for c in found.candidates]
    columns = ["rank", "title", "item", "score", "interest", "rank in it"]
    title = f"generation {found.generation}, interests {found.interests}"
    candidates = [asdict(candidate) for candidate in found.candidates]
    for name, values in ranked.further().items():
        for candidate, value in zip(candidates, values, strict=True):
            candidate[name] = value
    document = {**vars(found), "candidates": candidates}
    if question.features is not None:
        document["user_features"] = ranked.user_features()
    answer(document, as_json=as_json, text=table(rows, columns, title=title))


def _question(**fields: Any) -> "Question":
    """The question. Raises click.UsageError where it breaks a rule of serving/question.py."""
    from pydantic import ValidationError

    from serving.question import Question

    try:
        return Question(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise click.UsageError(where + first["msg"].removeprefix("Value error, ")) from error


def _vectors(path: Path) -> Any:
    """What the file holds, as lists of numbers. Raises UserError."""
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False) if path.suffix == ".npy" else json.loads(path.read_text())
        return np.atleast_2d(found).tolist() if isinstance(found, np.ndarray) else found
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as vectors ({error}); give a .npy file or JSON lists") from error


@click.command()
@click.argument("item_id")
@click.option("-k", "k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Neighbours to return.")
@click.option(
    "--space",
    type=click.Choice(SPACES),
    default="item",
    show_default=True,
    help="What nearness means: tower output, content alone, behaviour alone (id), or what an encoder makes of items.",
)
@FILTER
@AS_JSON
def similar(item_id: str, k: int, space: str, filter: dict[str, Any], as_json: bool) -> None:  # noqa: A002
    """Items nearest to ITEM_ID in one of the embedding spaces."""
    import psycopg

    from polytower.postgres import connect
    from serving import queries
    from serving.errors import user_error

    with connect() as connection:
        require_schema(connection)
        try:
            found = queries.similar(connection, item_id, k=k, space=space, filter=filter, titles=True)
        except psycopg.Error as error:
            raise user_error(error) from error
    rows = [(n.rank, n.title, n.item_id, n.score) for n in found]
    text = table(rows, ["rank", "title", "item", "score"])
    answer([asdict(neighbour) for neighbour in found], as_json=as_json, text=text)
