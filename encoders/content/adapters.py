"""Low-rank adapters (LoRA, arXiv 2106.09685; `peft`) inside an encoder's backbone: what training changes of an encoder.

The backbone itself stays as it was loaded. An adapter is kilobytes, travels as safetensors, and names the revision of
the encoder that it belongs to; the adapted encoder has a revision of its own.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from encoders.content.encoder import ContentEncoder
from encoders.content.pretrained import revision
from polytower.errors import UserError

SCHEME = "lora-v1"
# What queries and values of attention are called in the architectures of transformers; keys stay (LoRA, §4.2).
ATTENTION = (
    "query", "value", "q_proj", "v_proj", "query_proj", "value_proj", "q", "v", "q_lin", "v_lin", "qkv", "qkv_proj",
    "query_key_value", "Wqkv", "in_proj",
)  # fmt: skip
_DOCUMENT = "adapter"
_NAME = "default"  # peft's own for a network's only adapter


class Adaptable(ContentEncoder[Any], Protocol):
    """An encoder that a loss can reach into. What it says of itself changes with the adapter that it takes."""

    revision: str
    model: str
    config: dict[str, Any]

    @property
    def backbone(self) -> nn.Module | None:
        """The network that content passes through; None where nothing in it can be adapted."""
        ...

    def trained_rows(self, contents: Sequence[Any]) -> tuple[list[int], Tensor]:
        """(places, unit rows [places, dim], with gradients) of the contents that can be read."""
        ...


def is_adaptable(encoder: ContentEncoder[Any]) -> TypeGuard[Adaptable]:
    """Whether an adapter can be put into this encoder."""
    backbone = getattr(encoder, "backbone", None)
    return isinstance(backbone, nn.Module) and bool(targets(backbone))


def targets(backbone: nn.Module, layers: int = 0) -> list[str]:
    """The linear maps that are adapted: queries and values of attention; all, where none goes by such a name.

    layers: of the last so many layers alone, which shortens the way back; 0 takes all.
    """
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if name.rpartition(".")[2] in ATTENTION] or linear
    if not layers:
        return chosen
    numbers = {name: int(found[1]) for name in chosen if (found := re.search(r"\.(\d+)\.", f".{name}."))}
    return [name for name in chosen if numbers.get(name, 0) > max(numbers.values(), default=0) - layers]


def attach(encoder: Adaptable, *, rank: int, layers: int = 0) -> dict[str, nn.Parameter]:
    """Puts a fresh adapter, which changes nothing yet, into the encoder; its parameters by name.

    What an earlier call put there is begun anew. rank: of each map; its output is scaled by α/rank = 2.
    """
    from peft.tuners.lora import LoraLayer

    backbone = encoder.backbone
    assert backbone is not None
    if not parameters(encoder):
        with torch.random.fork_rng():
            _inject(backbone, {"rank": rank, "alpha": 2 * rank, "targets": targets(backbone, layers)})
    for module in backbone.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters(_NAME, init_lora_weights=True)  # type: ignore[no-untyped-call]
    return parameters(encoder)


def parameters(encoder: Adaptable) -> dict[str, nn.Parameter]:
    """The parameters of the adapter inside, by name; {} without one."""
    assert encoder.backbone is not None
    return {name: value for name, value in encoder.backbone.named_parameters() if ".lora_" in name}


def adapter_bytes(encoder: Adaptable) -> bytes:
    """The adapter inside as safetensors, with what it takes to put it into the same encoder again."""
    from peft.tuners.lora import LoraLayer

    backbone = encoder.backbone
    assert backbone is not None
    inside = {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)}
    first = next(iter(inside.values()))
    document = {
        "scheme": SCHEME,
        "modality": encoder.modality,
        "base": encoder.revision,
        "rank": first.r[_NAME],
        "alpha": first.lora_alpha[_NAME],
        "targets": sorted(inside),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in parameters(encoder).items()}
    return safetensors.torch.save(tensors, {_DOCUMENT: json.dumps(document, sort_keys=True)})


def adapted_revision(adapter: bytes) -> str:
    """The revision of the encoder with this adapter."""
    base = str(describe(adapter)["base"])
    return revision({"base": base, "adapter": hashlib.sha256(adapter).hexdigest()})


def describe(adapter: bytes) -> dict[str, Any]:
    """modality, base (the encoder's own revision), rank, alpha, targets. Raises UserError for what is no adapter."""
    try:
        length = int.from_bytes(adapter[:8], "little")
        document = json.loads(json.loads(adapter[8 : 8 + length])["__metadata__"][_DOCUMENT])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter: damaged ({type(error).__name__}: {error}); train again") from error
    if document.get("scheme") != SCHEME:
        raise UserError(f"adapter: of the scheme {document.get('scheme')!r}; this version reads {SCHEME}")
    return dict(document)


def wear(encoder: ContentEncoder[Any], adapter: bytes) -> None:
    """Puts an adapter into the encoder, in place: its vectors, revision, configuration and name change.

    The low-rank maps are added to the weights, so that encoding costs what it cost before. Raises UserError when the
    adapter was trained in another encoder.
    """
    from peft.tuners.lora import LoraLayer

    document = describe(adapter)
    if document["base"] != encoder.revision or not is_adaptable(encoder):
        raise UserError(
            f"the {document['modality']} encoder was adapted in revision {document['base']}; {encoder.model} is"
            f" revision {encoder.revision}: set the encoder that it was trained with"
        )
    backbone = encoder.backbone
    assert backbone is not None
    _inject(backbone, document)
    inside = parameters(encoder)
    try:
        tensors = safetensors.torch.load(adapter)
        with torch.no_grad():
            for name, value in inside.items():
                value.copy_(tensors[name])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"adapter: does not fit {encoder.model} ({error}); train again") from error
    for module in list(backbone.modules()):
        if isinstance(module, LoraLayer):
            module.merge()
    backbone.requires_grad_(False)
    encoder.revision = adapted_revision(adapter)
    encoder.config = {**encoder.config, **_told(document)}
    encoder.model = f"{encoder.model} + LoRA"


def _told(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"adapter": {name: document[name] for name in ("scheme", "base", "rank", "alpha")}}


def _inject(backbone: nn.Module, document: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=document["rank"], lora_alpha=document["alpha"], target_modules=list(document["targets"]), lora_dropout=0.0
    )
    inject_adapter_in_model(config, backbone)
    backbone.eval()  # no dropout: an item's vector is one, in training as in serving
