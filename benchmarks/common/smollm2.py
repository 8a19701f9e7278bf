"""SmolLM2 off its file's grid, and texts as token ids.

The file's weights are rounded to 4 bits already, so that rounding them again would cost nothing. An exact change of the function's
coordinates moves them off that grid: every input column of the linear layers of a block is multiplied by exp(0.2 n), n standard normal, and
what produces that input is divided by it. Query, key and value, and gate and up, share a norm's output; the columns of o_proj belong to
heads of v_proj (of several heads where queries share a value); those of down_proj to rows of up_proj.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from common.data import data_root
from quantrain.finetune.lm.models import SMOLLM2, TINY, LanguageModel, load_language_model

SPREAD = 0.2


@cache
def language_model(name: str) -> LanguageModel:
    return load_language_model(name)


def moved_model(name: str) -> nn.Module:
    """The model in float32 on the CPU, in other coordinates: a new one at each call."""
    import copy

    model = copy.deepcopy(language_model(name).model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp, config = block.self_attn, block.mlp, model.config
            head = attention.head_dim
            shared = config.num_attention_heads // config.num_key_value_heads
            factor = _factor(config.hidden_size, generator)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
                layer.weight.mul_(factor)
            block.input_layernorm.weight.div_(factor)
            factor = _factor(config.num_key_value_heads * head, generator)
            attention.v_proj.weight.div_(factor[:, None])
            attention.o_proj.weight.mul_(factor.view(-1, head).repeat_interleave(shared, 0).flatten())
            factor = _factor(config.hidden_size, generator)
            for layer in (mlp.gate_proj, mlp.up_proj):
                layer.weight.mul_(factor)
            block.post_attention_layernorm.weight.div_(factor)
            factor = _factor(config.intermediate_size, generator)
            mlp.up_proj.weight.div_(factor[:, None])
            mlp.down_proj.weight.mul_(factor)
    return model


def _factor(size: int, generator: torch.Generator) -> Tensor:
    return torch.exp(SPREAD * torch.randn(size, generator=generator))


def model_name(options) -> str:
    return options.model or (TINY if options.quick else SMOLLM2)


def ids_of(name: str, *path: str, characters: int | None = None) -> Tensor:
    """The token ids of a text under $QUANTRAIN_DATA, without a token for its beginning."""
    text = data_root().joinpath(*path).read_text(encoding="utf-8")[:characters]
    return torch.tensor(language_model(name).tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Of each window ``[T - 1, V]``."""
    return [torch.log_softmax(model(row[None], use_cache=False).logits[0, :-1].float(), -1) for row in ids]


def compared(found: list[Tensor], exact: list[Tensor], ids: Tensor) -> dict[str, float]:
    """Perplexity of the windows ``ids``, and KL(exact || found) and the share of equal likeliest tokens."""
    loss, kl, same, count = 0.0, 0.0, 0, 0
    for mine, reference, row in zip(found, exact, ids, strict=True):
        loss -= float(mine.gather(1, row[1:, None]).double().sum())
        kl += float((reference.exp() * (reference - mine)).double().sum())
        same += int((mine.argmax(-1) == reference.argmax(-1)).sum())
        count += len(mine)
    return {"perplexity": math.exp(loss / count), "kl": kl / count, "top1": same / count}
