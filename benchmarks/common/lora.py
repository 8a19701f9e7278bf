"""LoRA as modules of their own beside bfloat16 weights, as PEFT makes it: what QLoRA is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LoraBeside(nn.Module):
    """y = base(x) + scaling * B(A(x)), three products and an addition; base is frozen.

    Args:
        base: the float layer.
        rank, alpha: scaling = alpha / rank.
        dtype: of A and B.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, math.sqrt(5))
        self.lora_a.data = self.lora_a.data.to(dtype)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        low = nn.functional.linear(x.to(self.lora_a.dtype), self.lora_a)
        return y + (nn.functional.linear(low, self.lora_b) * self.scaling).to(y.dtype)


def add_lora(
    model: nn.Module, rank: int, alpha: float, dtype: torch.dtype, skip: tuple[str, ...] = ("lm_head",)
) -> list[nn.Parameter]:
    """Freezes the model and puts LoRA beside its linear layers; returns what is trained."""
    model.requires_grad_(False)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in skip]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraBeside(layer, rank, alpha, dtype))
    return [p for p in model.parameters() if p.requires_grad]
