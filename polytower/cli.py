"""The command line: parse, call one function, print. Heavy libraries are imported by the command that needs them."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from polytower import __version__, signals
from polytower.commands.generations import generations
from polytower.commands.modalities import CONTENT, own_columns
from polytower.commands.output import AS_JSON, answer, experiment_table, metrics_table, require_schema, say, table
from polytower.commands.serve import keys, serve
from polytower.commands.tools import bench, dagster, db, env, feast
from polytower.failures import explained


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


ROWS_PUT_ASIDE = 3
SHOWN = 20  # rejected rows that `experiment` names
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILTER = click.option(
    "--filter",
    "where",
    type=JsonObject(),
    default={},
    help='Attribute filter, such as \'{"genres": "Comedy", "year": {"gte": 1990}}\'.',
)
OPTIONS = click.option(
    "--set",
    "--option",
    "options",
    multiple=True,
    metavar="NAME=JSON",
    help="Change one option of the preset, such as epochs=40 or towers.interests=1 (repeatable).",
)


TAKE_OVER = click.option(
    "--take-over", is_flag=True, help="End another process's session that is at the same work, in place of waiting."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """polytower: multimodal embeddings, several interests per user, and retrieval in your own Postgres.

    Start with `polytower load DIR`, then `polytower materialize`, then `polytower retrieve USER`.
    State lies in $POLYTOWER_HOME (.polytower); $POLYTOWER_DATABASE_URL names a Postgres other than the embedded one.
    """


@cli.command()
@AS_JSON
def init(as_json: bool) -> None:
    """Create or upgrade the database (starts the embedded Postgres when no URL is set)."""
    revision = _initialise()
    answer({"revision": revision}, as_json=as_json, text=f"the database is at revision {revision}")


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--images", type=FOLDER, help="Folder that the items' `image` column names files in.")
@click.option(
    "--max-rejected",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Refuse the whole load when a larger share of a file's rows is bad.",
)
@TAKE_OVER
@AS_JSON
@own_columns
def load(
    folder: Path, images: Path | None, max_rejected: float, take_over: bool, as_json: bool, own: dict[str, str]
) -> None:
    """Load interactions, items and users from FOLDER (Parquet, CSV or JSON lines). Loading twice changes nothing.

    Exit status: 0 when every row was taken, 3 when the rest was loaded but some rows were put aside (they are listed
    and kept in the table rejected_rows), 1 when the whole load was refused and nothing changed.
    """
    from pipelines.load.folder import load_folder
    from polytower.postgres import connect

    _initialise()
    with connect() as connection:
        report = load_folder(
            connection, folder, images, own=own, max_rejected=max_rejected, progress=True, take_over=take_over
        )
    answer(report.as_json(), as_json=as_json, text="\n".join(report.lines()))
    if report.rejected:
        raise SystemExit(ROWS_PUT_ASIDE)


@cli.command()
@click.option("--preset", default="demo", show_default=True, help="Training preset; docs/models.md lists them.")
@OPTIONS
@click.option(
    "--until",
    type=click.Choice(["sequences", "content", "generation", "live"]),
    default="live",
    show_default=True,
    help="Stop after this step.",
)
@TAKE_OVER
@AS_JSON
def materialize(preset: str, options: tuple[str, ...], until: Any, take_over: bool, as_json: bool) -> None:
    """Run the Dagster assets in process: checks, sequences, content, towers, generation, promotion."""
    from pipelines.orchestration.materialize import materialize as run

    _initialise()
    result = run(preset=preset, options=_options(options), until=until, progress=True, take_over=take_over)
    rows = [(step, f"{seconds:.1f}") for step, seconds in result["seconds"].items()]
    title = (
        f"generation {result['generation']} is {'live' if until == 'live' else 'ready'}" if result["generation"] else ""
    )
    text = table(rows, ["step", "seconds"], title=title)
    answer(result, as_json=as_json, text=text)


@cli.command()
@click.option("--generation", type=int, help="Generation to evaluate (default: the live one).")
@AS_JSON
def evaluate(generation: int | None, as_json: bool) -> None:
    """Leave-one-out evaluation of a generation's towers beside popularity and item-kNN on the same split."""
    from pipelines.generation.evaluation import evaluate_generation
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        report = evaluate_generation(connection, generation, progress=True)
    answer(report.as_json(), as_json=as_json, text=metrics_table(report))


@cli.command()
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


@cli.command()
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


@cli.command()
@click.option("--images", type=FOLDER, help="Folder of posters named by item id (1.jpg …): adds the image modality.")
@click.option("--preset", default="demo", show_default=True, help="Training preset; docs/models.md lists them.")
@AS_JSON
def demo(images: Path | None, preset: str, as_json: bool) -> None:
    """The main job on MovieLens-100k: load, check, encode, train, build, promote, evaluate, retrieve."""
    from polytower.commands.demo import run

    _initialise()
    report = run(images=images, preset=preset)
    answer(report.as_json(), as_json=as_json, text=report.text())


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--preset", default="demo", show_default=True, help="Training preset; docs/models.md lists them.")
@click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Runs, seeded 0, 1, 2 …")
@click.option(
    "--split",
    default="leave_one_out",
    show_default=True,
    type=click.Choice(["leave_one_out", "refit", "temporal", "strong_generalisation", "cold_items", "cold_users"]),
    help="How the test items are held out.",
)
@CONTENT
@click.option("--images", type=FOLDER, help="Folder of the pictures that the items name, for --content image.")
@OPTIONS
@click.option(
    "--distributed",
    is_flag=True,
    help="One of several processes: torchrun --nproc-per-node N -m polytower.cli experiment … --distributed.",
)
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for checkpoints, resumed from when run again [default: below $POLYTOWER_HOME].",
)
@AS_JSON
@own_columns
def experiment(
    folder: Path,
    preset: str,
    seeds: int,
    split: str,
    content: tuple[Any, ...],
    images: Path | None,
    options: tuple[str, ...],
    distributed: bool,
    into: Path | None,
    as_json: bool,
    own: dict[str, str],
) -> None:
    """Train and evaluate a preset straight from FOLDER, without a database, beside the baselines."""
    from encoders.experiments.experiment import run_experiment
    from encoders.training.distributed import ALONE, processes
    from pipelines.load.dataset import read_folder
    from polytower.settings import settings

    config = settings()
    # Runs that differ in anything keep apart, so that each finds its own state when it goes on.
    name = "-".join([folder.resolve().name, preset, split, *content, *options]).replace("/", "_")
    data, rejections = read_folder(folder, own=own)
    with processes() if distributed else nullcontext(ALONE) as world:
        for rejection in rejections.kept[:SHOWN] if world.first else ():
            say(f"left out: {rejection}")
        report = run_experiment(
            data, preset, range(seeds), directory=into or config.home / "experiments" / name,
            modalities=content, split=split, options=_options(options), device=config.device, progress=world.first,
            images=images, world=world,
        )  # fmt: skip
    if world.first:
        answer(report, as_json=as_json, text=experiment_table(report))


@cli.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Look at everything the platform needs, and say how to get what is missing."""
    from polytower.commands.doctor import examine

    findings = examine()
    rows = [("ok" if f.ok else "MISSING", f.name, f.detail, "" if f.ok else f.remedy) for f in findings]
    answer([vars(f) for f in findings], as_json=as_json, text=table(rows, ["", "what", "found", "way out"]))
    if not all(finding.ok for finding in findings):
        raise SystemExit(1)


def _initialise() -> str:
    import migrations

    migrations.upgrade()
    return migrations.head()


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
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


for command in (generations, keys, serve, db, env, feast, dagster, bench):
    cli.add_command(command)


def main() -> None:
    """Entry point: what a user can mend is one message and exit status 1; Ctrl-C ends with 130, SIGTERM with 143."""
    # Checkpoints, snapshots and histories hold who did what: they are nobody else's to read.
    os.umask(0o077)
    signals.heed()
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        word, status = ("terminated", 143) if signals.terminated() else ("interrupted", 130)
        say(f"{word}; run the same command again to continue")
        raise SystemExit(status) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        if "--json" in sys.argv:
            answer({"error": message}, as_json=True)
        say(f"error: {message}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
