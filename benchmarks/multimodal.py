"""Where content pays: the rows of the table in docs/models.md, each one `polytower experiment`, into one JSON file.

`python -m benchmarks.multimodal DATA [--only hm-fashion] [--seeds 3]`: DATA holds the folders of the data sets. A row
that the results file has with as many seeds is not run again, and one that was killed goes on where it was.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "multimodal.json"
KEPT = ("questions", "seeds", "validation", "metrics", "controls", "differences", "segments", "baselines", "seconds")


@dataclass(frozen=True)
class Row:
    """One experiment. content: modalities; options: what differs from the preset; controls: trained too."""

    data: str
    preset: str
    content: tuple[str, ...] = ()
    split: str = "leave_one_out"
    options: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tells the row apart."""
        return " ".join([self.data, self.preset, self.split, "+".join(self.content) or "no content", *self.options])

    def command(self, data: Path, seeds: int, into: Path) -> list[str]:
        """Its command line."""
        return [
            "polytower", "experiment", str(data / self.data), "--preset", self.preset, "--seeds", str(seeds),
            *(["--split", self.split] if self.split != "leave_one_out" else []),
            *(part for name in self.content for part in ("--content", name)),
            *(["--images", str(data / IMAGES[self.data])] if "image" in self.content else []),
            *(part for option in self.options for part in ("--set", option)),
            *(part for control in self.controls for part in ("--control", control)),
            "--into", str(into), "--json",
        ]  # fmt: skip


IMAGES = {
    "hm-fashion": "hm-fashion/images",
    "movielens-1m": "movielens-posters",
    "movielens-100k": "movielens-posters",
    "movielens-latest-small": "movielens-posters",
}
WORDS, ALL = ("text", "attributes"), ("text", "attributes", "image")
# a catalogue of single buyers: an ID learned from one event says nothing, so it weighs by events, and is often left out
SPARSE = (
    "towers.dim=576", "towers.content_dim=512", 'towers.cold="content"', "towers.shrinkage=5.0",
    "towers.id_dropout=0.5", "towers.content_dropout=0.5", "learning_rate=0.0002", "epochs=3", "validate_every=1",
    "batch_rows=16",
)  # fmt: skip
BOTH, ENCODERS = ("equal_width", "permuted"), ("frozen", "permuted")
ROWS = (
    Row("hm-fashion", "short"),
    *(Row("hm-fashion", "multimodal", content) for content in (("text",), ("attributes",), ("image",))),
    Row("hm-fashion", "multimodal", WORDS, controls=BOTH),
    Row("hm-fashion", "multimodal", WORDS, options=SPARSE, controls=BOTH),
    Row("hm-fashion", "multimodal", ALL, options=SPARSE, controls=BOTH),
    Row("hm-fashion", "em3", WORDS, options=(*SPARSE, "encoder_rate=5.0"), controls=ENCODERS),
    Row("amazon-beauty", "multimodal", WORDS, controls=BOTH),
    Row("amazon-beauty", "multimodal", WORDS, options=("towers.dim=128", "towers.content_dim=64"), controls=BOTH),
    Row("amazon-beauty", "multimodal", WORDS, options=("towers.learn_id_share=true",)),
    Row("amazon-beauty", "multimodal", WORDS, options=("towers.shrinkage=1.0",)),
    *(
        Row("amazon-beauty", "multimodal", WORDS, options=(f'towers.fusion="{fusion}"',))
        for fusion in ("gated_sum", "qformer", "concat", "max", "mean")
    ),
    *(Row(data, "multimodal", WORDS, split="cold_items") for data in ("amazon-beauty", "hm-fashion")),
    Row("movielens-1m", "long", ALL, options=("towers.content_dim=48", "towers.linear=true", 'towers.fusion="none"',
        "towers.whiten=256", "content_weight=0"), controls=BOTH),
)  # fmt: skip


def main() -> None:
    """Runs the rows that are still missing, and writes after each."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("data", type=Path)
    asked.add_argument("--only", default="", help="rows whose name begins so")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--into", type=Path, default=Path("build/multimodal"), help="checkpoints, resumed from")
    given = asked.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for row in ROWS:
        if row.name.startswith(given.only) and len(found.get(row.name, {}).get("seeds", ())) < given.seeds:
            command = row.command(given.data, given.seeds, given.into / row.name.replace(" ", "_").replace('"', ""))
            found[row.name] = {"command": told(command), **run(command)}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def run(command: Sequence[str]) -> dict[str, Any]:
    """What the experiment reports, as far as the table needs it."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "polytower.cli", *command[1:]], stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    return {name: report[name] for name in KEPT}


def told(command: Sequence[str]) -> str:
    """The command as another machine would give it: data by name, no folder for checkpoints."""
    kept = list(command[: command.index("--into")])
    kept[2] = Path(kept[2]).name
    if "--images" in kept:
        place = kept.index("--images") + 1
        kept[place] = (
            "/".join(Path(kept[place]).parts[-2:]) if kept[place].endswith("/images") else Path(kept[place]).name
        )
    return shlex.join(kept)


if __name__ == "__main__":
    main()
