"""transformers' BERT in its two sizes, with random weights, in floating point and with int8 blocks."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import quantrain.nn as qnn

SIZES = {
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "BERT-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "quick": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
VOCABULARY = 30522


@dataclass
class Models:
    """The same weights three times."""

    wide: BertModel
    fused: BertModel
    separate: BertModel | None

    @property
    def layers(self) -> int:
        return self.wide.config.num_hidden_layers


def bert_model(size: str, attention: str = "sdpa") -> BertModel:
    """Weights as large as a trained model's: branches as large as what they are added to."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCABULARY, attn_implementation=attention, **SIZES[size])).eval()
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.requires_grad_(False)


def make_models(
    size: str, device: str, dtype: torch.dtype, recipe: str = "int8-training", separate: bool = True
) -> Models:
    wide = bert_model(size).to(dtype).to(device)
    fused = qnn.convert(qnn.prepare(copy.deepcopy(wide), recipe))
    found = sum(isinstance(module, qnn.Int8Block) for module in fused.modules())
    if found != wide.config.num_hidden_layers:
        raise RuntimeError(f"{size}: expected {wide.config.num_hidden_layers} fused blocks, got {found}")
    apart = qnn.unfuse_int8_blocks(copy.deepcopy(fused)) if separate else None
    gc.collect()
    return Models(wide, fused, apart)


def tokens(batch: int, length: int, device: str) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), device=device)


def hidden(model: BertModel, ids: Tensor) -> Tensor:
    return model(ids).last_hidden_state
