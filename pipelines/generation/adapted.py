"""The catalogue as the encoders embed it that a training adapted: beside the frozen embeddings, in the same table.

An adapted encoder is one more revision of its modality, never the one in force: whatever asks for content in general
reads the frozen embeddings, and a generation those that its towers were trained to read.
"""

from pathlib import Path
from typing import Any

import psycopg

from encoders.content.adapters import wear
from encoders.training import checkpoint
from pipelines.content_embeddings import EncodeReport, encode_modality
from pipelines.generation.training import EVALUATED, Load


def encode_adapted(
    connection: psycopg.Connection[Any],
    directory: Path,
    load: Load,
    *,
    progress: bool = False,
    take_over: bool = False,
) -> list[EncodeReport]:
    """Encodes today's items by the adapted encoders of a checkpoint folder; what is done already is left alone.

    Nothing where training left all encoders frozen. Raises UserError when an encoder is not the one that was adapted.
    """
    reports = []
    for folder in (directory, directory / EVALUATED):
        for name, adapter in (checkpoint.read_adapters(folder) if folder.is_dir() else {}).items():
            encoder = load(name)
            wear(encoder, adapter)
            reports.append(
                encode_modality(connection, name, encoder, progress=progress, take_over=take_over, in_force=False)
            )
    return reports
