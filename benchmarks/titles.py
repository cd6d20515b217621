"""Titles as questions: R@1 and R@10 of the item itself, in the text encoder's own space and in the towers' content.

    polytower load DATA && polytower materialize --preset PRESET     # a home of its own for each
    python -m benchmarks.titles DATA --sample 1000                   # → a row of benchmarks/results/titles.json

Asked of the live generation through its stored vectors and indexes, as Dagster's `title_recall_…` ask, for more titles.
An item of the same title counts as found.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoders.content.registry import encoder_of
from pipelines.generation.lifecycle import live
from pipelines.generation.title_recall import title_recall
from polytower.errors import UserError
from polytower.postgres import connect
from polytower.settings import settings

RESULTS = Path(__file__).parent / "results" / "titles.json"


def main() -> None:
    """Reads the arguments, measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the row is called: the data's name")
    parser.add_argument("--sample", type=int, default=1000, help="titles")
    given = parser.parse_args()
    row = measure(given.sample)
    print(json.dumps(row))
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**kept, given.name: row}, indent=1, sort_keys=True) + "\n")


def measure(sample: int) -> dict[str, Any]:
    """Recalls by space, with what was asked."""
    encoder = encoder_of("text", settings())
    with connect() as connection:
        generation = live(connection)
        if generation is None:
            raise UserError("no generation is live: `polytower load`, then `polytower materialize`")
        found = title_recall(connection, generation.generation, encoder, sample)
    return {
        "machine": f"{platform.machine()}, CPU",
        "preset": generation.config.get("preset"),
        "encoder": encoder.model,
        "spaces": [asdict(each) for each in found],
    }


if __name__ == "__main__":
    main()
