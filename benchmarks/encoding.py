"""Encoding end to end against the bare model on the same batches; the aim is a ratio of at least .85.

    python benchmarks/encoding.py ../shared/data/movielens-100k --images ../shared/data/movielens-posters --limit 512

End to end is `encode_modality` into an embedded Postgres of its own: reading, tokenising or decoding, the model,
writing. Bare is the model alone over batches that were made before the clock started. Both run `--rounds` times in
turn, so that a busy machine disturbs both, and the best round of each counts; `cpu_ratio` compares the processor time
of both instead (workers included, Postgres not), which other programs disturb less. Prints one JSON object per
modality. Takes about a minute per 512 items and modality on two cores.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import psycopg
import pyarrow.parquet
import torch
from psycopg.types.json import Jsonb

import migrations
from encoders.content.registry import CONTENT_ENCODERS
from feature_repo.modalities import MODALITIES
from pipelines.content_embeddings import encode_modality
from polytower.postgres import EmbeddedPostgres, connect

_CONTRACT = ("item_id", "title", "description", "image", "available")
# The modalities whose encoder is a model that can be chosen.
MODELLED = tuple(record.name for record in MODALITIES.values() if record.setting)


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder in the input contract's format")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--limit", type=int, default=512, help="items")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--modality", choices=MODELLED, action="append")
    given = parser.parse_args()
    items = _items(given.folder, given.images, given.limit)
    with _database() as connection:
        _insert(connection, items)
        for modality in given.modality or MODELLED:
            print(json.dumps(_measure(connection, modality, items, given.device, given.rounds)), flush=True)


def _items(folder: Path, images: Path | None, limit: int) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = pyarrow.parquet.read_table(folder / "items.parquet").to_pylist()[:limit]
    for item in items:
        name = item.get("image")
        item["image_sha256"] = name
        item["image_path"] = str(images / name) if images and name and (images / name).is_file() else None
    return items


@contextmanager
def _database() -> Iterator[psycopg.Connection[Any]]:
    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(Path(home) / "postgres")
        url = server.acquire()
        try:
            migrations.upgrade(url)
            with connect(url) as connection:
                yield connection
        finally:
            server.release()


def _insert(connection: psycopg.Connection[Any], items: list[dict[str, Any]]) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into items (item_id, title, description, image_path, image_sha256, attributes)"
            " values (%(item_id)s, %(title)s, %(description)s, %(image_path)s, %(image_path)s, %(attributes)s)",
            [
                {
                    **{name: item.get(name) for name in ("item_id", "title", "description", "image_path")},
                    "attributes": Jsonb({name: value for name, value in item.items() if name not in _CONTRACT}),
                }
                for item in items
            ],
        )
    connection.commit()


def _measure(
    connection: psycopg.Connection[Any], modality: str, items: list[dict[str, Any]], device: str, rounds: int
) -> dict[str, Any]:
    encoder: Any = CONTENT_ENCODERS[modality](device=device)
    contents = [content for item in items if (content := MODALITIES[modality].content(item)) is not None]
    batches = encoder.prepare(contents)
    encoder.forward(batches[0])
    bare, whole, unchanged, bare_cpu, whole_cpu = [], [], [], [], []
    for _ in range(rounds):
        cpu = _cpu_seconds()
        bare.append(len(contents) / _bare_seconds(encoder, batches))
        bare_cpu.append(_cpu_seconds() - cpu)
        connection.execute("truncate content_embeddings")
        cpu = _cpu_seconds()
        report = encode_modality(connection, modality, encoder)
        whole_cpu.append(_cpu_seconds() - cpu)
        assert (report.encoded, report.failed) == (len(contents), 0), report
        whole.append(report.encoded / report.seconds)
        unchanged.append(encode_modality(connection, modality, encoder).seconds)
    return {
        "modality": modality,
        "model": encoder.model,
        "device": encoder.device,
        "threads": torch.get_num_threads(),
        "items": len(contents),
        "bare_items_per_second": round(max(bare), 1),
        "items_per_second": round(max(whole), 1),
        "ratio": round(max(whole) / max(bare), 3),
        "cpu_ratio": round(min(bare_cpu) / min(whole_cpu), 3),
        "unchanged_seconds": round(min(unchanged), 4),
        "rounds": [{"bare": round(b, 1), "end_to_end": round(w, 1)} for b, w in zip(bare, whole, strict=True)],
    }


def _bare_seconds(encoder: Any, batches: list[Any]) -> float:
    started = perf_counter()
    rows = [encoder.forward(batch) for batch in batches]
    torch.cat(rows).cpu()
    return perf_counter() - started


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
