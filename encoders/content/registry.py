"""The registry of content encoders: one builder per modality; nothing heavy is imported before one is called."""

from collections.abc import Callable
from typing import Any, Protocol

from encoders.content.encoder import ContentEncoder
from feature_repo.modalities import modality
from polytower.errors import UserError

DEFAULT = "default"


def _text(*, model: str = DEFAULT, device: str = "auto") -> ContentEncoder[Any]:
    from encoders.content.text import TextEncoder

    return TextEncoder(model, device=device)


def _image(*, model: str = DEFAULT, device: str = "auto") -> ContentEncoder[Any]:
    from encoders.content.image import ImageEncoder

    return ImageEncoder(model, device=device)


def _attributes(*, model: str = DEFAULT, device: str = "auto") -> ContentEncoder[Any]:  # noqa: ARG001 hashing needs no device
    from encoders.content.attributes import AttributesEncoder

    if model != DEFAULT:
        raise UserError(f"attributes have one encoder, default (feature hashing); {model!r} is none")
    return AttributesEncoder()


def _vector(*, model: str = DEFAULT, device: str = "auto") -> ContentEncoder[Any]:  # noqa: ARG001 nothing is computed
    from encoders.content.own_vectors import OwnVectors

    return OwnVectors(model)


# modality → builder(model="default" | a checkpoint's name or path, device="auto" | …)
CONTENT_ENCODERS: dict[str, Callable[..., ContentEncoder[Any]]] = {
    "text": _text,
    "image": _image,
    "attributes": _attributes,
    "vector": _vector,
}


class Chosen(Protocol):
    """Settings: where encoders run, and in the fields that records name (`Modality.setting`), which ones."""

    @property
    def device(self) -> str: ...


def encoder_of(name: str, config: Chosen, model: str | None = None) -> ContentEncoder[Any]:
    """The encoder that the settings, or else the items themselves (model), name for a modality.

    Raises UserError when it cannot be loaded.
    """
    record = modality(name)
    model = model or (getattr(config, record.setting) if record.setting else DEFAULT)
    return CONTENT_ENCODERS[name](model=model, device=config.device)
