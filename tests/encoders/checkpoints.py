"""Tiny transformers checkpoints with random weights, written by the tests that load them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WORDS = ("red", "blue", "shoe", "hat", "the", "a", "for", "running", "winter", "naïve", "鞋")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SIZE = {"height": 32, "width": 32}


def _tokenizer(folder: Path) -> None:
    vocabulary = {word: place for place, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=24
    ).save_pretrained(folder)


def _text_body() -> dict[str, object]:
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return {**_BODY, **special, "vocab_size": len(WORDS) + 4, "max_position_embeddings": 24}


def bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of 16 dimensions."""
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(WORDS) + 4, max_position_embeddings=24, **_BODY)).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def t5(folder: Path) -> Path:
    """An encoder-decoder: only its encoder is of use."""
    torch.manual_seed(0)
    T5Model(
        T5Config(vocab_size=len(WORDS) + 4, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    ).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def clip(folder: Path) -> Path:
    """A CLIP with a joint space of 12 dimensions."""
    torch.manual_seed(0)
    vision = {**_BODY, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=_text_body(), vision_config=vision, projection_dim=12)).save_pretrained(folder)
    _tokenizer(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIZE).save_pretrained(folder)
    return folder


def siglip(folder: Path) -> Path:
    """A SigLIP: its text is padded to one length, without a mask."""
    torch.manual_seed(0)
    vision = {**_BODY, "image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=_text_body(), vision_config=vision)).save_pretrained(folder)
    _tokenizer(folder)
    ViTImageProcessor(size=_SIZE).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """A ViT without its pooler's weights, as most are shipped."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **_BODY), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size=_SIZE).save_pretrained(folder)
    return folder


def resnet(folder: Path) -> Path:
    """A convolutional network: its pooled output has four axes."""
    torch.manual_seed(0)
    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(folder)
    ViTImageProcessor(size=_SIZE).save_pretrained(folder)
    return folder
