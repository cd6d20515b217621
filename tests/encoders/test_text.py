"""Text encoders from checkpoints by path: order, padding, pooling, identity, refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from encoders.content.text import TextEncoder
from encoders.device import autocast, resolve_device
from polytower.errors import UserError
from tests.encoders import checkpoints

KINDS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "bert": (checkpoints.bert, 16),
    "t5": (checkpoints.t5, 16),
    "clip": (checkpoints.clip, 12),
    "siglip": (checkpoints.siglip, 16),
}
texts = st.lists(st.lists(st.sampled_from(checkpoints.WORDS), max_size=40).map(" ".join), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    build, dim = KINDS[request.param]
    made = TextEncoder(str(build(tmp_path_factory.mktemp(request.param))), device="cpu", batch_size=4)
    assert made.dim == dim
    return made


@given(drawn=texts, batch_size=st.integers(1, 13))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_batch_order_nor_padding_changes_an_embedding(
    encoder: TextEncoder, drawn: list[str], batch_size: int
) -> None:
    together = np.concatenate(list(encoder.encode(drawn, batch_size)))
    alone = np.concatenate([next(encoder.encode([text])) for text in drawn])
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_chunks_keep_their_lengths_and_order(encoder: TextEncoder) -> None:
    chunks = [["a red hat", "", "shoe"], [], ["blue"], ["naïve 鞋 \U0001f45f", "the winter"]]
    encoded = list(encoder.encode_chunks(iter(chunks)))
    assert [len(each.embeddings) for each in encoded] == [3, 0, 1, 2]
    expected = np.concatenate(list(encoder.encode([text for chunk in chunks for text in chunk])))
    np.testing.assert_allclose(np.concatenate([each.embeddings for each in encoded]), expected, atol=2e-6)


def test_different_texts_differ(encoder: TextEncoder) -> None:
    rows = next(encoder.encode(["red hat", "blue shoe for running"]))
    assert float(rows[0] @ rows[1]) < 0.9999


def test_mean_pooling_is_the_mean_over_the_tokens(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    tokens = AutoTokenizer.from_pretrained(folder)(["red shoe"], return_tensors="pt")
    with torch.inference_mode():
        mean = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0].mean(0).numpy()
    row = next(TextEncoder(str(folder), device="cpu").encode(["red shoe"]))[0]
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_first_token_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    mean = TextEncoder(str(folder), device="cpu")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first = TextEncoder(str(folder), device="cpu")
    assert first.revision != mean.revision
    assert not np.allclose(next(first.encode(["red shoe"])), next(mean.encode(["red shoe"])), atol=1e-3)


def test_a_long_text_is_cut_at_the_length_that_it_can_read(tmp_path: Path) -> None:
    encoder = TextEncoder(str(checkpoints.bert(tmp_path)), device="cpu", max_length=8)
    cut, whole = next(encoder.encode(["red " * 6, "red " * 6 + "hat " * 500]))
    np.testing.assert_allclose(cut, whole, atol=2e-6)


def test_the_revision_names_the_weights_and_not_the_place(tmp_path: Path) -> None:
    first = TextEncoder(str(checkpoints.bert(tmp_path / "first")), device="cpu")
    moved = TextEncoder(str(shutil.copytree(tmp_path / "first", tmp_path / "moved")), device="cpu")
    other = TextEncoder(str(checkpoints.bert(tmp_path / "other", seed=1)), device="cpu")
    shorter = TextEncoder(str(tmp_path / "first"), device="cpu", max_length=8)
    assert first.revision == moved.revision
    assert len({first.revision, other.revision, shorter.revision}) == 3


def test_default_is_minilm_and_knows_what_is_alike() -> None:
    encoder = TextEncoder(device="cpu")
    rows = next(encoder.encode(["a space opera with robots", "robots at war in space", "a cooking show"]))
    assert (encoder.dim, rows.shape) == (384, (3, 384))
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.1


def test_what_cannot_be_loaded_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing.*give\s+the folder"):
        TextEncoder("nobody/nothing", device="cpu")
    with pytest.raises(UserError, match="no checkpoint folder"):
        TextEncoder(str(tmp_path / "absent"), device="cpu")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        TextEncoder(str(tmp_path), device="cpu")


def test_a_checkpoint_with_lost_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = checkpoints.bert(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        TextEncoder(str(tmp_path), device="cpu")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load a model"):
        TextEncoder(str(tmp_path), device="cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="is no device"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="not supported"):
        resolve_device("meta")
    with autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="POLYTOWER_DEVICE=cuda:0"):
        resolve_device("cuda:0")
