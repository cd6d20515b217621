"""What a sentence-transformers folder says of the way from tokens to a vector: pooling, dense layers, prompt, length.

Its modules are read from modules.json, in the old notation and the new one; one that is not known here is refused by
name, since leaving it out gives another vector.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytower.errors import UserError

# Old notation → the mode's name today; several are concatenated in this order.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    each.__name__: each for each in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}


@dataclass(frozen=True)
class Sentences:
    """backbone: the folder of the transformer. pooling: modes, concatenated. head: what follows. prompt: before every
    text. lower: whether texts become lower case. max_length: tokens that it was trained with, if it says so."""

    backbone: Path
    pooling: tuple[str, ...]
    head: nn.Sequential
    prompt: str
    lower: bool
    max_length: int | None


def read_sentences(folder: Path) -> Sentences:
    """What the folder says; mean pooling alone where it says nothing. Raises UserError on what is not known here."""
    modules = _modules(folder)
    backbone = folder / modules[0][1]
    pooling: tuple[str, ...] = ("mean",)
    layers: list[nn.Module] = []
    told = _json(folder / "config_sentence_transformers.json")
    name = told.get("default_prompt_name")
    prompt = str((told.get("prompts") or {}).get(name) or "") if name else ""
    for kind, path in modules[1:]:
        if kind == "Pooling":
            pooling = _pooling(folder / path, prompt)
        elif kind == "Dense":
            layers.append(_Dense(folder / path))
        elif kind == "Normalize":
            layers.append(_Normalize())
    transformer: dict[str, Any] = next((_json(path) for path in sorted(backbone.glob("sentence_*_config.json"))), {})
    task = transformer.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UserError(f"{backbone}: the transformer's task {task!r} gives no text embeddings here; choose another")
    length = transformer.get("max_seq_length")
    return Sentences(
        backbone, pooling, nn.Sequential(*layers), prompt, bool(transformer.get("do_lower_case")),
        int(length) if length else None,
    )  # fmt: skip


def module_folders(folder: Path) -> list[str]:
    """Folders within the checkpoint whose files decide the vector too."""
    return [path for _, path in _modules(folder) if path]


def pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, modes: tuple[str, ...]) -> torch.Tensor:
    """Vectors [b, dim × modes] of tokens that are padded on the right."""
    mask_BT1 = mask_BT[..., None].float()
    count_B1 = mask_BT1.sum(1).clamp(min=1)
    found = []
    for mode in modes:
        if mode == "cls":
            found.append(hidden_BTD[:, 0])
        elif mode == "max":
            found.append(hidden_BTD.masked_fill(mask_BT1 == 0, float("-inf")).amax(1))
        elif mode == "lasttoken":
            last_B = (count_B1[:, 0] - 1).long()
            found.append(hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), last_B])
        elif mode == "weightedmean":
            weights_BT1 = mask_BT1.cumsum(1) * mask_BT1
            found.append((hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1))
        else:
            divisor = count_B1 if mode == "mean" else count_B1.sqrt()
            found.append((hidden_BTD * mask_BT1).sum(1) / divisor)
    return torch.cat(found, -1)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(kind, path) of each module, the transformer first."""
    if not (folder / "modules.json").is_file():
        pooled = (folder / "1_Pooling" / "config.json").is_file()
        return [("Transformer", ""), *([("Pooling", "1_Pooling")] if pooled else [])]
    listed = _json(folder / "modules.json")
    modules = []
    for number, module in enumerate(listed if isinstance(listed, list) else []):
        kind, path = str(module.get("type")), str(module.get("path", ""))
        name = kind.rpartition(".")[2]
        known = ("Transformer", "CLIPModel") if number == 0 else ("Pooling", "Dense", "Normalize", "Dropout")
        if not kind.startswith("sentence_transformers.") or name not in known:
            raise UserError(
                f"{folder / 'modules.json'} names the module {kind} ({path or 'the folder itself'}), which is not run"
                " here: its vectors would be others. Choose a checkpoint of a transformer with pooling, dense layers"
                " and normalisation"
            )
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{folder / 'modules.json'}: the path {path} leaves the checkpoint's folder")
        modules.append((name, path))
    if not modules:
        raise UserError(f"{folder / 'modules.json'} lists no modules")
    return modules


def _pooling(folder: Path, prompt: str) -> tuple[str, ...]:
    config = _json(folder / "config.json")
    mode = config.get("pooling_mode") or [new for old, new in _OLD_MODES.items() if config.get(old)] or "mean"
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    unknown = [each for each in modes if each not in _OLD_MODES.values()]
    if unknown:
        raise UserError(
            f"{folder}: the pooling {unknown[0]!r} is not known; known are {', '.join(_OLD_MODES.values())}"
        )
    if prompt and not config.get("include_prompt", True):
        raise UserError(f"{folder}: a pooling that leaves the prompt out is not run here; choose another checkpoint")
    return modes


class _Normalize(nn.Module):
    def forward(self, rows_BD: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(rows_BD, dim=-1)


class _Dense(nn.Module):
    """A linear layer with an activation, and what it was given added to it where the checkpoint says so."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        super().__init__()
        config = _json(folder / "config.json")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        places = {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
        activation = _ACTIVATIONS.get(name.rpartition(".")[2]) if name.startswith("torch.nn.") else None
        if activation is None or places != {"sentence_embedding"}:
            raise UserError(f"{folder}: a dense layer with {name} on {', '.join(sorted(places))} is not run here")
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder}: model.safetensors is missing (pickled weights are never loaded); convert them")
        weights = load_file(folder / "model.safetensors")
        try:
            self._linear = _linear(weights, "linear")
            self._residual = None
            if config.get("use_residual"):
                square = "residual.weight" not in weights
                self._residual = nn.Identity() if square else _linear(weights, "residual")
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{folder}/model.safetensors holds no dense layer: {error}") from error
        self._activation = activation()

    def forward(self, rows_BD: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._activation(self._linear(rows_BD))
        return made if self._residual is None else made + self._residual(rows_BD)


def _linear(weights: dict[str, torch.Tensor], name: str) -> nn.Linear:
    weight, bias = weights[f"{name}.weight"].float(), weights.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias.float()})})
    return layer.eval().requires_grad_(False)


def _json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
