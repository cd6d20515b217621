"""sentence-transformers checkpoints: every module that is run, in both notations, and every refusal.

The expected vectors are written out token by token; sentence-transformers 6.2 gave the same ones (cosine 1).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from encoders.content.text import TextEncoder
from polytower.errors import UserError
from tests.encoders import checkpoints

TEXTS = ["red shoe for the winter", "hat", "", "a blue running shoe"]
MODES: dict[str, Any] = {
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.max(0).values,
    "mean": lambda hidden: hidden.mean(0),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean": lambda hidden: sum((n + 1) * row for n, row in enumerate(hidden)) / sum(range(len(hidden) + 1)),
    "lasttoken": lambda hidden: hidden[-1],
}
ST = "sentence_transformers.models"
OLD = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "weightedmean": "weightedmean_tokens"}


def _write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def _modules(folder: Path, *names: str) -> None:
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names[1:], 1))]
    kinds = zip(names, paths, strict=True)
    listed = [{"idx": n, "path": path, "type": f"{ST}.{k}"} for n, (k, path) in enumerate(kinds)]
    _write(folder, "modules.json", listed)


def _hidden(folder: Path, text: str) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
    with torch.inference_mode():
        hidden: torch.Tensor = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]
    return hidden


def _same(folder: Path, expected: list[torch.Tensor]) -> None:
    rows = next(TextEncoder(str(folder), device="cpu").encode(TEXTS))
    wanted = torch.nn.functional.normalize(torch.stack(expected), dim=-1).numpy()
    np.testing.assert_allclose(rows, wanted, atol=1e-5)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("mode", MODES)
def test_pooling(tmp_path: Path, mode: str, old: bool) -> None:
    folder = checkpoints.bert(tmp_path)
    _modules(folder, "Transformer", "Pooling", "Normalize")
    said = {f"pooling_mode_{OLD.get(mode, mode)}": True, "pooling_mode_x": False} if old else {"pooling_mode": mode}
    _write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 16, **said})
    _same(folder, [MODES[mode](_hidden(folder, text)) for text in TEXTS])


def test_poolings_side_by_side_a_dense_layer_and_the_default_prompt(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    _modules(folder, "Transformer", "Pooling", "Dense", "Normalize")
    _write(folder, "1_Pooling/config.json", {"pooling_mode": ["mean", "max"], "include_prompt": True})
    dense = torch.nn.Linear(32, 5)
    _write(folder, "2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"})
    save_file({"linear.weight": dense.weight, "linear.bias": dense.bias}, folder / "2_Dense" / "model.safetensors")
    prompts = {"prompts": {"query": "a hat ", "document": "x"}, "default_prompt_name": "query"}
    _write(folder, "config_sentence_transformers.json", prompts)
    hidden = [_hidden(folder, "a hat " + text) for text in TEXTS]
    with torch.inference_mode():
        _same(folder, [torch.tanh(dense(torch.cat([each.mean(0), each.max(0).values]))) for each in hidden])


def test_what_decides_the_vector_decides_the_revision(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    _modules(folder, "Transformer", "Pooling", "Dense")
    _write(folder, "1_Pooling/config.json", {"pooling_mode": "mean"})
    _write(folder, "2_Dense/config.json", {"activation_function": "torch.nn.modules.linear.Identity"})
    save_file({"linear.weight": torch.eye(16)}, folder / "2_Dense" / "model.safetensors")
    revisions = [TextEncoder(str(folder), device="cpu").revision]
    for change in (
        lambda: save_file({"linear.weight": 2 * torch.eye(16)}, folder / "2_Dense" / "model.safetensors"),
        lambda: _write(folder, "2_Dense/config.json", {"activation_function": "torch.nn.Tanh"}),
        lambda: _write(folder, "1_Pooling/config.json", {"pooling_mode": "lasttoken"}),
        lambda: _write(
            folder, "config_sentence_transformers.json", {"prompts": {"a": "b"}, "default_prompt_name": "a"}
        ),
        lambda: _write(folder, "sentence_bert_config.json", {"max_seq_length": 8, "do_lower_case": True}),
    ):
        change()
        revisions.append(TextEncoder(str(folder), device="cpu").revision)
    assert len(set(revisions)) == 6


def test_length_and_case_are_those_of_the_training(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    _modules(folder, "Transformer", "Pooling")
    _write(folder, "1_Pooling/config.json", {"pooling_mode": "mean"})
    _write(folder, "sentence_bert_config.json", {"max_seq_length": 6, "do_lower_case": True})
    rows = next(TextEncoder(str(folder), device="cpu").encode(["RED " * 4, "red " * 20]))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"modules.json": [{"type": f"{ST}.Transformer"}, {"type": f"{ST}.LSTM", "path": "1_LSTM"}]}, "LSTM .1_LSTM"),
        ({"modules.json": [{"type": f"{ST}.StaticEmbedding"}]}, "StaticEmbedding"),
        ({"modules.json": [{"type": "custom_st.Transformer"}]}, "custom_st.Transformer"),
        ({"modules.json": []}, "no modules"),
        ({"1_Pooling/config.json": {"pooling_mode": "attention"}}, "'attention' is not known"),
        ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "fill-mask"),
        ({"config.json": {"auto_map": {"AutoModel": "code.Model"}}}, r"auto_map in config\.json.*never run"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.T", None]}}}, r"auto_map in tokenizer_config"),
    ],
)  # fmt: skip
def test_what_is_not_run_is_refused_by_name(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    folder = checkpoints.bert(tmp_path)
    for name, content in files.items():
        before = json.loads((folder / name).read_text()) if (folder / name).is_file() else None
        _write(folder, name, {**before, **content} if isinstance(before, dict) else content)
    with pytest.raises(UserError, match=reason):
        TextEncoder(str(folder), device="cpu")


def test_a_processor_that_brings_code_is_refused(tmp_path: Path) -> None:
    from encoders.content.image import ImageEncoder

    folder = checkpoints.vit(tmp_path)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    _write(folder, "preprocessor_config.json", {**config, "auto_map": {"AutoImageProcessor": "code.P"}})
    with pytest.raises(UserError, match=r"auto_map in preprocessor_config\.json"):
        ImageEncoder(str(folder), device="cpu")


def test_pickled_dense_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    _modules(folder, "Transformer", "Pooling", "Dense")
    _write(folder, "2_Dense/config.json", {"activation_function": "torch.nn.Tanh"})
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"2_Dense: model\.safetensors is missing"):
        TextEncoder(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["x" * 5_000, "a/" + "x" * 5_000, "/" + "x" * 5_000, "~nobody-here/x"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(UserError, match="no checkpoint") as caught:
        TextEncoder(name, device="cpu")
    assert len(str(caught.value)) < 400
