"""Encoders trained with the towers: what gradients reach, what a step costs, and that what was learned comes back."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig
from encoders.content import adapters
from encoders.content.attributes import AttributesEncoder
from encoders.content.image import ImageEncoder
from encoders.content.text import TextEncoder
from encoders.evaluation.splits import leave_one_out
from encoders.towers.adapted import Adapted, Live, live_of
from encoders.training import checkpoint
from encoders.training.objective import batch_loss
from encoders.training.packing import Batch, batches, pack
from encoders.training.train import Epoch, Run, train
from polytower.errors import UserError
from tests.encoders.checkpoints import WORDS, bert, clip, resnet, vit
from tests.encoders.data import ITEMS, tiny_catalogue, tiny_histories

SHAPE = TowersConfig(
    dim=24, content_dim=12, history=8, dropout=0.1, interests=1, content_width=16, fusion="qformer", linear=True,
    cold="ridge", contrast_dim=8,
)  # fmt: skip
CONFIG = TrainConfig(
    towers=SHAPE, epochs=3, batch_rows=4, negatives=0, validate_every=1, threads=1, device="cpu", content_weight=0,
    contrast_weight=0.01, lora_rank=2, encoder_budget=6, encoder_rate=5.0, kappa=0.5,
)  # fmt: skip
TEXTS = [f"{WORDS[item % 3]} {WORDS[3 + item % 8]} {WORDS[(item * 5) % 11]}" for item in range(ITEMS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> Catalogue:
    """Every fifth item lacks its text, the last lacks everything; attributes are not the encoder's."""
    found = tiny_catalogue()
    present = np.arange(ITEMS) % 5 != 4
    rows = next(iter(TextEncoder(str(folder), device="cpu").encode(TEXTS))) * present[:, None]
    return Catalogue(found.item_ids, {**found.content, "text": rows}, {**found.present, "text": present})


@pytest.fixture
def live(folder: Path, catalogue: Catalogue) -> dict[str, Live]:
    encoder = TextEncoder(str(folder), device="cpu")
    contents = [text if there else None for text, there in zip(TEXTS, catalogue.present["text"].tolist(), strict=True)]
    return live_of({"text": encoder, "attributes": AttributesEncoder()}, {"text": contents, "attributes": []})


def run_of(catalogue: Catalogue, live: dict[str, Live], directory: Path, config: TrainConfig = CONFIG) -> Run:
    return Run(catalogue, leave_one_out(tiny_histories()), config, directory, live=live)


def batch_of(run: Run, rows: int = 4) -> Batch:
    packed = pack(run.split.train, run.config.towers.history, np.random.default_rng(0))
    return next(iter(batches(packed, rows, torch.device("cpu"))))


def losses_of(curves: list[Epoch]) -> list[dict[str, Any]]:
    return [{**asdict(point), "seconds": 0} for point in curves]


def test_gradients_reach_every_part_that_learns_and_no_frozen_weight(
    catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    run = run_of(catalogue, live, tmp_path)
    run.towers.train()
    for step in range(2):  # maps that start at zero hide those before them for one step
        torch.manual_seed(step)
        run.step(batch_of(run), 0.05, "a test")
    _, total = batch_loss(run.towers, batch_of(run), run.config, run.warm, run.frequency)
    total.backward()
    reached = {name for name, value in run.towers.named_parameters() if value.grad is not None and value.grad.any()}
    kinds = ("lora_A", "lora_B", "delta.text.down", "delta.text.up", "fusion", "contrast", "table", "user_tower")
    for kind in kinds:
        wanted = {name for name, _ in run.towers.named_parameters() if kind in name}
        # a weight towards one extractor's unused output, and biases that a softmax takes out, move nothing
        assert wanted & reached, kind
    learned = {name for name, _ in run.towers.named_parameters() if "lora" in name or "delta" in name}
    assert learned <= reached
    backbone = live["text"].encoder.backbone
    assert backbone is not None
    for name, value in backbone.named_parameters():
        assert value.requires_grad == (".lora_" in name)
        assert (value.grad is not None) == (".lora_" in name), name


def test_a_frozen_encoder_is_no_parameter_of_the_towers(
    catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    run = run_of(catalogue, live, tmp_path)
    own = [name for name in run.towers.state_dict() if name.startswith("source.")]
    assert own
    assert all(name.startswith(("source.lora.text.", "source.delta.text.")) for name in own)


def test_only_adapters_and_no_backbone_change_in_training(
    folder: Path, catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    result = train(catalogue, tiny_histories(), CONFIG, directory=tmp_path, live=live)
    untouched = TextEncoder(str(folder), device="cpu").backbone.state_dict()
    backbone = live["text"].encoder.backbone
    assert backbone is not None
    now = {name.replace(".base_layer", ""): value for name, value in backbone.state_dict().items()}
    for name, value in untouched.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0)
    assert any(value.abs().max() > 0 for name, value in now.items() if "lora_B" in name)
    assert set(result.towers.adapters) == {"text"}
    assert not any(name.startswith("source.") for name in result.towers.state_dict())


def test_adapters_come_back_with_the_same_embeddings_and_a_revision_of_their_own(
    folder: Path, catalogue: Catalogue, live: dict[str, Live], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoders.towers.adapted._CHUNK", 7)
    result = train(catalogue, tiny_histories(), CONFIG, directory=tmp_path, live=live)
    kept = checkpoint.read_adapters(tmp_path)
    encoder, frozen = TextEncoder(str(folder), device="cpu"), TextEncoder(str(folder), device="cpu")
    adapters.wear(encoder, kept["text"])
    assert encoder.revision == checkpoint.adapters(tmp_path)["text"] != frozen.revision
    assert encoder.config["adapter"]["base"] == frozen.revision
    rows = next(iter(encoder.encode(TEXTS)))
    there = catalogue.present["text"]
    content, present = result.towers.source.read(torch.arange(ITEMS))
    np.testing.assert_allclose(content["text"].numpy()[there], rows[there], atol=1e-5)
    assert np.abs(rows - next(iter(frozen.encode(TEXTS)))).max() > 1e-3
    assert present["text"].tolist() == there.tolist()
    # a checkpoint read over the adapted content answers as the towers did
    adapted = Catalogue(
        catalogue.item_ids, {**catalogue.content, "text": rows * there[:, None]}, dict(catalogue.present)
    )
    loaded, _, metrics = checkpoint.load(tmp_path, adapted)
    assert loaded.adapters == result.towers.adapters
    assert metrics == result.metrics
    for one, other in zip(loaded.item_embeddings(), result.towers.item_embeddings(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_an_adapter_is_refused_by_another_encoder_and_when_damaged(
    catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    train(catalogue, tiny_histories(), replace(CONFIG, epochs=1), directory=tmp_path, live=live)
    adapter = checkpoint.read_adapters(tmp_path)["text"]
    other = TextEncoder(str(bert(tmp_path / "other", seed=1)), device="cpu")
    with pytest.raises(UserError, match=r"adapted in revision \w+; .* set the encoder that it was trained with"):
        adapters.wear(other, adapter)
    with pytest.raises(UserError, match="damaged"):
        adapters.describe(adapter[:50])
    (tmp_path / "adapter-text.safetensors").write_bytes(adapter[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match="is not the adapter that the checkpoint was written with"):
        checkpoint.read_adapters(tmp_path)


def test_a_killed_run_goes_on_to_the_same_loss_and_the_same_adapter(
    folder: Path, catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    def kill_after(epoch: int) -> Callable[[Epoch], None]:
        def act(point: Epoch) -> None:
            if point.epoch == epoch:
                raise KeyboardInterrupt

        return act

    whole = train(catalogue, tiny_histories(), CONFIG, directory=tmp_path / "whole", live=live)
    with pytest.raises(KeyboardInterrupt):
        train(catalogue, tiny_histories(), CONFIG, directory=tmp_path / "cut", live=live, on_epoch=kill_after(1))
    fresh = {"text": replace(live["text"], encoder=TextEncoder(str(folder), device="cpu"))}  # a new process
    resumed = train(catalogue, tiny_histories(), CONFIG, directory=tmp_path / "cut", live=fresh)
    assert losses_of(resumed.curves) == losses_of(whole.curves)
    assert resumed.towers.adapters == whole.towers.adapters


def test_a_masked_and_an_absent_modality_are_the_same(
    catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    run = run_of(catalogue, live, tmp_path)
    for value in run.towers.parameters():
        nn.init.normal_(value, std=0.3)
    run.towers.eval()
    absent = torch.nonzero(~torch.from_numpy(catalogue.present["text"])).squeeze(1)
    before = run.towers.embed(absent)
    source = run.towers.source
    assert isinstance(source, Adapted)
    source.frozen.get_buffer("content_text")[absent] = 7.0
    for one, other in zip(run.towers.embed(absent), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Counted(TextEncoder):
    """Notes how many texts it encoded with gradients, and how many numbers autograd kept for them."""

    asked: list[int]

    def trained_rows(self, contents: Any) -> tuple[list[int], torch.Tensor]:
        self.asked.append(len(contents))
        return super().trained_rows(contents)


@pytest.mark.parametrize("history", [4, 8, 64])
def test_a_step_encodes_its_budget_whatever_histories_are(
    history: int, folder: Path, catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    encoder = Counted(str(folder), device="cpu")
    encoder.asked = []
    shape = replace(SHAPE, history=history)
    config = replace(CONFIG, towers=shape, encoder_budget=5)
    run = run_of(catalogue, {"text": replace(live["text"], encoder=encoder)}, tmp_path, config)
    run.towers.train()
    batch = batch_of(run, rows=64)
    assert len(torch.unique(batch.targets)) > 5
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    source = run.towers.source
    assert isinstance(source, Adapted)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), source.step(batch.targets):
        pass
    assert encoder.asked == [5]
    assert sum(kept) < 60_000  # numbers that autograd keeps of five texts


def test_live_items_have_their_own_vector_and_the_others_the_delta(
    catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    run = run_of(catalogue, live, tmp_path)
    source = run.towers.source
    assert isinstance(source, Adapted)
    for value in source.parameters():
        nn.init.normal_(value, std=0.3)
    everything, targets = torch.arange(ITEMS), torch.tensor([3, 3, 7, 4, 9])  # 4 and 9 lack their text
    outside = source.read(everything)[0]["text"]
    with source.step(targets):
        inside = source.read(everything)[0]["text"]
    changed = (inside - outside).abs().amax(dim=1) > 1e-4
    assert changed.nonzero().squeeze(1).tolist() == [3, 7]
    _, rows = live["text"].encoder.trained_rows([TEXTS[3], TEXTS[7]])
    torch.testing.assert_close(inside[[3, 7]].norm(dim=1), torch.ones(2))
    assert sorted(inside[[3, 7]].sum(dim=1).tolist()) == pytest.approx(sorted(rows.sum(dim=1).tolist()), abs=1e-5)
    assert torch.equal(source.read(everything)[0]["text"], outside)
    assert source.teaching_loss() is None


def test_the_delta_learns_to_do_what_the_adapter_does(
    catalogue: Catalogue, live: dict[str, Live], tmp_path: Path
) -> None:
    run = run_of(catalogue, live, tmp_path, replace(CONFIG, delta_rank=8))
    source = run.towers.source
    assert isinstance(source, Adapted)
    with torch.no_grad():
        for value in source.lora.parameters():
            value.normal_(std=0.2)
    targets = torch.arange(ITEMS)
    optimiser = torch.optim.Adam(source.delta.parameters(), 0.02)
    source.budget, found = ITEMS, []
    for _ in range(60):
        with source.step(targets):
            loss = source.teaching_loss()
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    assert found[-1] < found[0] / 4


def test_what_cannot_be_adapted_stays_frozen_and_nothing_at_all_is_refused(tmp_path: Path) -> None:
    bundled, convolutions = (
        ImageEncoder(device="cpu", workers=1),
        ImageEncoder(str(resnet(tmp_path / "resnet")), device="cpu"),
    )
    for encoder in (bundled, convolutions, AttributesEncoder()):
        assert not adapters.is_adaptable(encoder)
    with pytest.raises(UserError, match=r"image \(efficientnet-lite0\).*LoRA needs a transformer"):
        live_of({"image": bundled, "attributes": AttributesEncoder()}, {"image": [], "attributes": []})
    with pytest.raises(UserError, match="none was given that can be"):
        train(tiny_catalogue(), tiny_histories(), CONFIG, directory=tmp_path)


@pytest.mark.parametrize("make", [vit, clip])
def test_pictures_are_adapted_as_texts_are(make: Callable[[Path], Path], tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 40), (60 * number, 200, 90)).save(paths[-1])
    (tmp_path / "none.png").write_text("no picture")
    folder = str(make(tmp_path / "encoder"))
    encoder = ImageEncoder(folder, device="cpu", workers=1)
    inside = adapters.attach(encoder, rank=2)
    assert inside
    places, rows = encoder.trained_rows([paths[0], tmp_path / "none.png", paths[2]])
    assert places == [0, 2]
    np.testing.assert_allclose(
        rows.detach().numpy(),
        np.concatenate(list(ImageEncoder(folder, device="cpu").encode([paths[0], paths[2]]))),
        atol=1e-5,
    )
    rows[:, 0].sum().backward()
    assert all(value.grad is not None for value in inside.values())
    assert any(value.grad is not None and value.grad.any() for name, value in inside.items() if "lora_B" in name)


def test_the_last_layers_alone_can_be_adapted(folder: Path) -> None:
    backbone = TextEncoder(str(folder), device="cpu").backbone
    assert [name for name in adapters.targets(backbone) if ".0." in name]
    last = adapters.targets(backbone, 1)
    assert last
    assert all(".1." in name for name in last)
