"""The registry of content encoders and the identity of content."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders.content.registry import CONTENT_ENCODERS
from feature_repo.modalities import BLANK, MODALITIES, content_hash, item_text
from polytower.errors import UserError


def _contents(modality: str, tmp_path: Any) -> list[Any]:
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    return {
        "vector": [[3.0, 4.0], [-1e-30, 0.0], [1e38, 1e38]],
        "text": ["Toy Story", "鞋 für den Winter", "x"],
        "image": [str(picture), str(picture), picture.read_bytes()],
        "attributes": [{"year": 1995}, {"genres": ["Comedy", "Noir"]}, {"a": None}],
    }[modality]


def _encoder(modality: str) -> Any:
    # Own vectors have no default: the load names their column.
    return CONTENT_ENCODERS[modality](device="cpu", model="embedding/2" if modality == "vector" else "default")


def test_every_modality_has_an_encoder() -> None:
    assert set(CONTENT_ENCODERS) == set(MODALITIES)


@pytest.mark.parametrize("modality", CONTENT_ENCODERS)
def test_an_encoder_keeps_the_protocol(modality: str, tmp_path: Any) -> None:
    encoder = _encoder(modality)
    contents = _contents(modality, tmp_path)
    rows = np.concatenate(list(encoder.encode(contents, 2)))
    assert (encoder.modality, encoder.device) == (modality, "cpu")
    assert rows.shape == (3, encoder.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    chunks = [each.embeddings for each in encoder.encode_chunks(iter([contents[:1], contents[1:]]))]
    np.testing.assert_allclose(np.concatenate(chunks), rows, atol=1e-5)
    assert _encoder(modality).revision == encoder.revision
    assert len(encoder.revision) == 12


@pytest.mark.parametrize("modality", CONTENT_ENCODERS)
def test_a_model_that_does_not_exist_is_refused(modality: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="default"):
        CONTENT_ENCODERS[modality](model=str(tmp_path / "absent"), device="cpu")


def test_nothing_heavy_is_imported_before_an_encoder_is_built() -> None:
    code = (
        "import sys, encoders.content.encoder, pipelines.content_embeddings;"
        "print([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("title", "description", "text"),
    [
        ("Heat", "A heist.", "Heat. A heist."),
        (" Heat\n", None, "Heat"),
        (None, "A heist.", "A heist."),
        ("", " \u00a0\u200b", ""),
        (None, None, ""),
    ],
)
def test_the_text_of_an_item(title: str | None, description: str | None, text: str) -> None:
    assert item_text(title, description) == text
    assert (content_hash("text", {"title": title, "description": description}) is None) == (text == "")


def test_blank_holds_all_that_python_calls_space() -> None:
    assert {chr(code) for code in range(sys.maxunicode) if chr(code).isspace()} <= set(BLANK)


def test_an_item_lacks_what_says_nothing() -> None:
    assert content_hash("image", {"image_path": None, "image_sha256": None}) is None
    assert content_hash("image", {"image_path": "a.jpg", "image_sha256": "00"}) == "00"
    assert content_hash("attributes", {"attributes": {}}) is None
    assert content_hash("attributes", {"attributes": {"a": None, "b": [], "c": "", "d": {}}}) is None
    assert content_hash("attributes", {"attributes": {"a": 0}}) is not None
    assert content_hash("attributes", {"attributes": {"a": False}}) is not None


def test_the_hash_of_attributes_ignores_their_order_and_nothing_else() -> None:
    first = content_hash("attributes", {"attributes": {"a": 1, "b": [1, 2]}})
    assert first == content_hash("attributes", {"attributes": {"b": [1, 2], "a": 1}})
    assert first != content_hash("attributes", {"attributes": {"a": 1, "b": [2, 1]}})
    assert first != content_hash("attributes", {"attributes": {"a": "1", "b": [1, 2]}})
