"""Does a title find its own item? Asked as a person would, through the stored vectors and indexes of a generation.

Titles of sampled items go through the text encoder, and for the space `content` through the generation's own content
tower, as a question by text does. An item of the same title is as good as the item itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector

from encoders.content.encoder import ContentEncoder
from feature_repo.modalities import item_text
from pipelines.generation.embedding_gates import Gate

SAMPLE = 200
K = 10
TITLE_GATES = ("title_recall_text", "title_recall_content")
# R@10 in the encoder's own space; and what the towers' space keeps of it, as a share. Both are told and block nothing:
# titles may be codes, and training for behaviour gives topics up.
FINDS, KEEPS = 0.8, 0.9

_TITLES = """
select i.item_id, i.title from items i
join item_embeddings e on e.generation = %(generation)s and e.item_id = i.item_id and e.content_embedding is not null
join content_embeddings c on c.item_id = i.item_id and c.modality = 'text' and c.revision = %(revision)s
where i.available and i.title ~ '\\S' order by md5(i.item_id) limit %(sample)s
"""
_FOUND = """
select i.title from retrieve_vectors(array[%(vector)s], k => %(k)s, space => %(space)s, generation => %(generation)s) r
join items i using (item_id) order by r.rank limit %(k)s
"""
_TOWER = "select weights, config from towers where generation = %(generation)s and part = 'content' limit 1"

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class TitleRecall:
    """Of `titles` titles, the shares that found their item first, and among the first K."""

    space: str
    titles: int
    at_1: float
    at_10: float


def title_recall(
    connection: psycopg.Connection[Any], generation: int, encoder: ContentEncoder[Any], sample: int = SAMPLE
) -> list[TitleRecall]:
    """In each space that the generation has; empty without titles. encoder: that filled the generation."""
    asked = {"generation": generation, "revision": encoder.revision, "sample": sample}
    titles = [title for _, title in connection.execute(_TITLES, asked)]
    if not titles:
        return []
    texts = np.concatenate(list(encoder.encode([item_text(title, None) for title in titles])))
    vectors = {"text": texts, "content": _projected(connection, generation, texts)}
    return [
        _recall(connection, generation, space, titles, found) for space, found in vectors.items() if found is not None
    ]


def title_gates(recalls: Sequence[TitleRecall]) -> dict[str, tuple[Gate, TitleRecall | None]]:
    """R@10 held against its bound, with what was measured, in the order of TITLE_GATES."""
    text, content = ({recall.space: recall for recall in recalls}.get(space) for space in ("text", "content"))
    bounds = (FINDS, KEEPS * text.at_10 if text is not None else 0.0)
    return {
        name: (Gate(name, None if found is None else found.at_10, bound, "at least", "warn"), found)
        for name, bound, found in zip(TITLE_GATES, bounds, (text, content), strict=True)
    }


def _recall(
    connection: psycopg.Connection[Any], generation: int, space: str, titles: Sequence[str], vectors: Rows
) -> TitleRecall:
    places = []
    for title, vector in zip(titles, vectors, strict=True):
        asked = {"vector": HalfVector(vector), "k": K, "space": space, "generation": generation}
        found = [other for (other,) in connection.execute(_FOUND, asked)]
        places.append(found.index(title) if title in found else K)
    ranks = np.array(places)
    return TitleRecall(space, len(titles), float((ranks == 0).mean()), float((ranks < K).mean()))


def _projected(connection: psycopg.Connection[Any], generation: int, texts: Rows) -> Rows | None:
    """The texts [N, E] in the generation's content space [N, D]; None for a generation without a content tower."""
    row = connection.execute(_TOWER, {"generation": generation}).fetchone()
    if row is None:
        return None
    import torch

    from encoders.training.checkpoint import load_content_tower

    tower = load_content_tower(bytes(row[0]), row[1])
    there = {name: name == "text" for name in tower.widths}
    content = {
        name: torch.from_numpy(texts) if there[name] else torch.zeros(len(texts), width)
        for name, width in tower.widths.items()
    }
    with torch.inference_mode():
        found: Rows = tower(content, {name: torch.full((len(texts),), is_) for name, is_ in there.items()}).numpy()
    return found
