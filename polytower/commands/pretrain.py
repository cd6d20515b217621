"""`polytower pretrain`: a model of items that belongs to none of them."""

from pathlib import Path
from typing import Any

import click

from polytower.commands.modalities import CONTENT, own_columns
from polytower.commands.options import FOLDER, OPTIONS, SHOWN, parsed
from polytower.commands.output import AS_JSON, answer, say


@click.command()
@click.argument("folders", type=FOLDER, nargs=-1, required=True)
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the model.")
@click.option("--preset", default="mmsrec", show_default=True, help="Training preset; docs/models.md lists them.")
@CONTENT
@click.option(
    "--images",
    type=FOLDER,
    multiple=True,
    help="Folder of the items' pictures, for --content image: one for all folders, or one each, in their order.",
)
@click.option("--sequences", is_flag=True, help="Learn from the folders' histories as well, after the items.")
@OPTIONS
@AS_JSON
@own_columns
def pretrain(
    folders: tuple[Path, ...],
    into: Path,
    preset: str,
    content: tuple[str, ...],
    images: tuple[Path, ...],
    sequences: bool,
    options: tuple[str, ...],
    as_json: bool,
    own: dict[str, str],
) -> None:
    """Pretrain a model on the items of FOLDERS, without a database: for `materialize --start` and `experiment --start`.

    It learns from what items are made of (--content; text and attributes by default), and can go on to any catalogue
    that is encoded by the same encoders. Run it again to go on after an interruption.
    """
    from encoders.experiments.pretrain import pretrain as run
    from pipelines.load.dataset import read_folder
    from polytower.settings import settings

    if len(images) not in (0, 1, len(folders)):
        raise click.BadParameter(f"{len(images)} for {len(folders)} folders", param_hint="--images")
    sets = []
    for folder in folders:
        data, rejections = read_folder(folder, own=own)
        for rejection in rejections.kept[:SHOWN]:
            say(f"skipped: {rejection}")
        sets.append(data)
    config = settings()
    report = run(
        sets, preset, into, modalities=content or ("text", "attributes"),
        images=images if len(images) == len(folders) else images * len(folders), sequences=sequences,
        options=parsed(options), device=config.device, cache=config.home / "experiments" / "content", progress=True,
    )  # fmt: skip
    for told in report["told"]:
        say(told)
    answer(report, as_json=as_json, text=_text(report))


def _text(report: dict[str, Any]) -> str:
    found = (
        "found, not trained again" if report["reused"] else f"loss {report['losses'][0]:.3f} to {report['loss']:.3f}"
    )
    return (
        f"{report['directory']}: {report['preset']} pretrained on {report['items']:,} items of "
        f"{', '.join(report['data'])} ({', '.join(report['encoders'])}): {found}"
    )
