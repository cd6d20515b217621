"""The registry of content encoders: one builder per modality; nothing heavy is imported before one is called."""

from collections.abc import Callable
from typing import Any

from encoders.content.encoder import ContentEncoder
from feature_repo.schema import Modality
from polytower.errors import UserError


def _text(*, model: str = "default", device: str = "auto") -> ContentEncoder[Any]:
    from encoders.content.text import TextEncoder

    return TextEncoder(model, device=device)


def _image(*, model: str = "default", device: str = "auto") -> ContentEncoder[Any]:
    from encoders.content.image import ImageEncoder

    return ImageEncoder(model, device=device)


def _attributes(*, model: str = "default", device: str = "auto") -> ContentEncoder[Any]:  # noqa: ARG001 hashing needs no device
    from encoders.content.attributes import AttributesEncoder

    if model != "default":
        raise UserError(f"attributes have one encoder, default (feature hashing); {model!r} is none")
    return AttributesEncoder()


# modality → builder(model="default" | a checkpoint's name or path, device="auto" | …)
CONTENT_ENCODERS: dict[Modality, Callable[..., ContentEncoder[Any]]] = {
    "text": _text,
    "image": _image,
    "attributes": _attributes,
}
