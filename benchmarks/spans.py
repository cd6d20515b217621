"""`polytower` with a clock at the functions that its steps consist of.

    python -m benchmarks.spans LOG COMMAND [ARGUMENT …]        # polytower COMMAND …; one JSON line a step in LOG

The command is the product's own: what is watched is only wrapped. benchmarks/flow.py reads the log.
"""

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Command → step → the functions, as module:attribute of where they are called from. Steps may nest.
WATCHED: dict[str, dict[str, tuple[str, ...]]] = {
    "load": {"load": ("pipelines.load.folder:load_folder",)},
    "materialize": {
        "expectations": ("pipelines.expectations:validate",),
        "sequences, statistics": ("pipelines.orchestration.data_assets:refresh_sequences",),
        "content": ("pipelines.orchestration.data_assets:encode_modality",),
        "content gates": ("pipelines.orchestration.checks:content_gates",),
        "training set": (
            "pipelines.generation.training_folder:save",
            "pipelines.generation.training_folder:load",
            "pipelines.generation.build:read_training_set",
        ),
        "checkpoint": ("pipelines.orchestration.model_assets:train_checkpoint",),
        "generation": ("pipelines.generation.build:_fill_from",),
        "index": ("pipelines.generation.partitions:_index",),
        "gates": ("pipelines.generation.quality:generation_gates",),
        "search width": ("pipelines.generation.build:tune",),
        "promotion": ("pipelines.generation.lifecycle:promote",),
    },
    "evaluate": {"evaluate": ("pipelines.generation.evaluation:evaluate_generation",)},
    "feast": {"feast materialize": ("benchmarks.spans:feast_materialize",)},
}


def main() -> None:
    log, command = Path(sys.argv[1]), sys.argv[2]
    for step, places in WATCHED.get(command, {}).items():
        for place in places:
            module, _, name = place.partition(":")
            owner = importlib.import_module(module)
            setattr(owner, name, _watched(getattr(owner, name), step, log))
    sys.argv = ["polytower", *sys.argv[2:]]
    if command == "feast":
        # `polytower feast` hands over to a process of Feast's own, which this one could not watch.
        importlib.import_module("benchmarks.spans").feast_materialize()
        return
    from polytower.cli import main as polytower

    polytower()


def feast_materialize() -> None:
    """What `polytower feast materialize 2000-01-01T00:00:00 NOW` does: every view, from its source to its table."""
    from feature_repo.store import close, feature_store
    from polytower.postgres import database_url

    store = feature_store(database_url())
    try:
        store.materialize(datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC))
    finally:
        close(store)


def _watched(function: Callable[..., Any], step: str, log: Path) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        begun = time.time()
        try:
            return function(*arguments, **options)
        finally:
            with log.open("a") as file:
                file.write(json.dumps({"step": step, "begun": begun, "ended": time.time()}) + "\n")

    return wrapper


if __name__ == "__main__":
    main()
