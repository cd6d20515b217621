"""Text and pictures as questions: through the encoder that filled the generation, and its content tower.

Where training adapted that encoder, the adapter comes from Postgres, and is put into an encoder of its own. The content
tower's output lies in the space of content embeddings, and so in that of cold items' item embeddings. torch and the
encoders are loaded in the background from the first such question on.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from psycopg.rows import dict_row

from encoders.content.encoder import ContentEncoder
from encoders.content.registry import encoder_of
from feature_repo.modalities import MODALITIES, item_text
from polytower.errors import UserError
from polytower.settings import settings
from serving import queries
from serving.database import Database
from serving.errors import (
    ENCODER_MISMATCH,
    INVALID,
    NO_CONTENT,
    NO_CONTENT_TOWER,
    NO_ENCODER,
    NO_QUERIES,
    PROBLEMS,
    TOO_MANY,
    UNREADABLE_IMAGE,
    Problem,
)
from serving.loaded.batching import Batcher
from serving.loaded.loader import Loader
from serving.metrics import ServerMetrics
from serving.question import Question

if TYPE_CHECKING:
    from encoders.content.image import ImageEncoder, PixelBatch
    from encoders.towers.model import Asked

KEPT = 2
# Pictures are decoded in threads of their own, so that no text waits behind one: so many at once, so many in all, and
# so many seconds of computing each.
DECODING, PICTURES, PICTURE_SECONDS = 2, 8, 2
WINDOW = 0.002
BATCH = 16
NOT_MERGED = (
    "the towers of generation {} read no queries: a user with a text is answered by merge = max alone, as a mix of both"
    " (or by a generation that reads them: `polytower materialize --preset seminar`, on interactions with queries)"
)
ASKED = tuple(record.name for record in MODALITIES.values() if record.asked)

ContentRows = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class ContentVector:
    """vector: float32, unit length, in the space that the question is asked in: [D] of this generation's content space,
    or [E] of an encoder's own."""

    generation: int
    vector: NDArray[np.float32]


@dataclass(frozen=True)
class QueryVector:
    """vector: float32 [W], what a user searches for as the text encoder of this generation has it."""

    generation: int
    vector: NDArray[np.float32]


Embedded = ContentVector | QueryVector


class Live(NamedTuple):
    """The live generation, the revision of each modality's encoder that it was built from, that encoder's name, and
    whether its user tower reads what users search for.
    """

    generation: int
    encoders: dict[str, str]
    models: dict[str, str]
    reads_queries: bool


class Projection(NamedTuple):
    """One question for the content tower: its generation, and a row per modality that was asked with."""

    generation: int
    rows: ContentRows


class Wanted(NamedTuple):
    """A text, and the encoder of the generation that it was asked of."""

    encoder: ContentEncoder[Any]
    text: str


class ContentQueries:
    """Encoders by modality, content towers of the newest generations, one thread for both; pictures decoded beside."""

    def __init__(self, database: Database, metrics: ServerMetrics, loader: Loader) -> None:
        self._database = database
        self._metrics = metrics
        self._loader = loader
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="content")
        self._decoding = ThreadPoolExecutor(max_workers=DECODING, thread_name_prefix="decode")
        self._pictures = 0
        self._adapters: OrderedDict[tuple[int, str], bytes | None] = OrderedDict()
        self._adapted: dict[str, str] = {}  # modality -> the name that its adapted encoder is loaded under
        self._towers: OrderedDict[int, Asked] = OrderedDict()
        self._texts: Batcher[Wanted, NDArray[np.float32]] = Batcher(
            _encode_texts, self._thread, window=WINDOW, size=BATCH,
            observe=lambda size: metrics.batch("text", size),
        )  # fmt: skip

    async def embed(self, question: Question) -> Embedded:
        """The question's text and picture as one vector of the space that it is asked in. Raises Problem.

        A user's text goes to the user tower, as the encoder has it, where that reads queries. An encoder's own space
        needs no content tower. Holds no connection while it encodes.
        """
        with self._metrics.stage("encode"):
            live = await self._live()
            if question.may_search and not live.reads_queries and question.merge != "max":
                raise Problem(NO_QUERIES, NOT_MERGED.format(live.generation))
            for modality in ASKED:
                if getattr(question, modality) is not None:
                    _check_has(live, modality)
                    self._loader.start(*await self._load_of(live, modality))
            if question.may_search and question.text is not None and live.reads_queries:
                return QueryVector(live.generation, await self._text(live, question.text))
            raw = question.searched_space in ASKED
            if not raw:
                await self._load_tower(live.generation)
            rows: ContentRows = {}
            if question.text is not None:
                rows["text"] = await self._text(live, question.text)
            if question.image is not None:
                rows["image"] = await self._image(live, question.image)
            if raw:
                return ContentVector(live.generation, rows[question.searched_space])
            return ContentVector(live.generation, await self._project(Projection(live.generation, rows)))

    async def warm(self) -> None:
        """Loads what questions by content to the live generation need. Raises Problem, UserError."""
        live = await self._live()
        modalities = [modality for modality in ASKED if modality in live.encoders]
        if modalities:
            await self._loader.start_torch()
            await self._load_tower(live.generation)
        for modality in modalities:
            await self._loader.start(*await self._load_of(live, modality))

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._decoding.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)

    async def _live(self) -> Live:
        async with self._database.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            row = await (await cursor.execute(queries.LIVE_ENCODERS)).fetchone()
        if row is None:
            raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
        return Live(row["generation"], row["encoders"], row["models"], row["reads_queries"])

    async def _text(self, live: Live, text: str) -> NDArray[np.float32]:
        wanted = item_text(text, None)
        if not wanted:
            raise Problem(INVALID, "body.text: holds nothing but blanks")
        return await self._texts.ask(Wanted(await self._encoder(live, "text"), wanted))

    async def _image(self, live: Live, image: bytes) -> NDArray[np.float32]:
        encoder = cast("ImageEncoder", await self._encoder(live, "image"))
        batch = await self._decode(encoder, image)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _encode_picture, encoder, batch)

    async def _decode(self, encoder: "ImageEncoder", image: bytes) -> "PixelBatch":
        if self._pictures >= PICTURES:
            raise Problem(TOO_MANY, f"{PICTURES} pictures are being decoded; try again")
        self._pictures += 1
        loop = asyncio.get_running_loop()
        try:
            (batch,) = await loop.run_in_executor(
                self._decoding, partial(encoder.prepare, [image], seconds=PICTURE_SECONDS)
            )
        finally:
            self._pictures -= 1
        if batch.failures:
            raise Problem(UNREADABLE_IMAGE, f"body.image: {batch.failures[0]}; send a whole JPEG, PNG or WebP file")
        return batch

    async def _encoder(self, live: Live, modality: str) -> ContentEncoder[Any]:
        """The encoder that this server is set to, if it is the one that filled the generation. Raises Problem.

        With the generation's adapter, where it has one.
        """
        try:
            encoder = await self._loader.get(*await self._load_of(live, modality))
        except UserError as error:
            raise Problem(NO_ENCODER, str(error)) from error
        if encoder.revision != live.encoders[modality]:
            name = live.models.get(modality, "of another revision")
            raise Problem(
                ENCODER_MISMATCH,
                f"generation {live.generation} was filled by the {modality} encoder {name}, revision"
                f" {live.encoders[modality]}; this server runs {encoder.model}, revision {encoder.revision}: set"
                f" {MODALITIES[modality].variable} and start it again, or build a generation with the encoder that is"
                " set",
            )
        return encoder

    async def _load_of(self, live: Live, modality: str) -> tuple[str, Callable[[], ContentEncoder[Any]]]:
        """Name and load of what encodes a modality for this generation. One adapted encoder is kept by modality."""
        adapter = await self._adapter(live.generation, modality)
        if adapter is None:
            return f"the {modality} encoder", lambda: encoder_of(modality, settings())
        name = f"the {modality} encoder with the adapter {live.encoders[modality]}"
        former = self._adapted.get(modality, name)
        self._adapted[modality] = name
        if former != name:
            self._loader.forget(former)
        return name, lambda: _adapted(modality, adapter)

    async def _adapter(self, generation: int, modality: str) -> bytes | None:
        key = (generation, modality)
        if key not in self._adapters:
            wanted = {"generation": generation, "modality": modality}
            async with self._database.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
                row = await (await cursor.execute(queries.ADAPTER, wanted)).fetchone()
            self._adapters[key] = None if row is None else bytes(row["weights"])
            while len(self._adapters) > KEPT * len(ASKED):
                self._adapters.popitem(last=False)
        return self._adapters[key]

    async def _load_tower(self, generation: int) -> None:
        if generation in self._towers:
            return
        async with self._database.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            row = await (await cursor.execute(queries.CONTENT_TOWER, {"generation": generation})).fetchone()
        if row is None:
            detail = f"generation {generation} was built before content towers were kept; build and promote another"
            raise Problem(NO_CONTENT_TOWER, detail)
        await self._loader.torch()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._keep, generation, bytes(row["weights"]), row["config"])
        except UserError as error:
            raise Problem(NO_CONTENT_TOWER, f"the one of generation {generation} cannot be read") from error

    def _keep(self, generation: int, weights: bytes, config: dict[str, Any]) -> None:
        from encoders.training.checkpoint import load_content_tower

        self._towers[generation] = load_content_tower(weights, config)
        while len(self._towers) > KEPT:
            self._towers.popitem(last=False)

    async def _project(self, question: Projection) -> NDArray[np.float32]:
        tower = self._towers.get(question.generation)
        if tower is None:
            raise Problem(PROBLEMS["PT013"], f"generation {question.generation} was replaced meanwhile; try again")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _forward, tower, question.rows)


def _check_has(live: Live, modality: str) -> None:
    if modality not in live.encoders:
        known = ", ".join(live.encoders) or "none"
        raise Problem(NO_CONTENT, f"generation {live.generation} knows no {modality}; its content is: {known}")


def _adapted(modality: str, adapter: bytes) -> ContentEncoder[Any]:
    """The encoder that this server is set to, with the adapter if it was trained in that one."""
    from encoders.content.adapters import describe, wear

    encoder = encoder_of(modality, settings())
    if describe(adapter)["base"] == encoder.revision:
        wear(encoder, adapter)
    return encoder


def _encode_texts(asked: Sequence[Wanted]) -> Sequence[NDArray[np.float32]]:
    """Texts asked of one generation, which nearly always are all, go through its encoder together."""
    rows: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(asked)
    for encoder in {id(one.encoder): one.encoder for one in asked}.values():
        places = [place for place, one in enumerate(asked) if one.encoder is encoder]
        found = np.concatenate(list(encoder.encode([asked[place].text for place in places])))
        for place, row in zip(places, found, strict=True):
            rows[place] = row
    return rows


def _encode_picture(encoder: "ImageEncoder", batch: "PixelBatch") -> NDArray[np.float32]:
    vector: NDArray[np.float32] = encoder.forward(batch)[0].cpu().numpy()
    return vector


def _forward(tower: "Asked", rows: ContentRows) -> NDArray[np.float32]:
    """One question through the content tower; the modalities that it was not asked with are missing ones."""
    import torch

    with torch.inference_mode():
        content = {
            name: torch.from_numpy(rows[name])[None] if name in rows else torch.zeros(1, width)
            for name, width in tower.widths.items()
        }
        present = {name: torch.tensor([name in rows]) for name in tower.widths}
        vector: NDArray[np.float32] = tower(content, present)[0].numpy()
    return vector
