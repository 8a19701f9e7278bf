"""Float64 oracle of 8-bit AdamW: the maps, block-wise codes, and the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, float32: per decade the middles of equal parts of [0.1, 1], as bitsandbytes makes them."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        ends = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middles = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def nearest(r: Tensor, signed: bool) -> Tensor:
    """The number of midpoints below r; a midpoint itself is the lower code's."""
    table = dynamic_map(signed)
    return torch.searchsorted((table[:-1] + table[1:]) * 0.5, r.float().contiguous(), right=False)


def by_block(x: Tensor) -> Tensor:
    """[numel] as [blocks, 256], zeros at the end."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def scale_of(x: Tensor) -> Tensor:
    """Of [numel]: the largest magnitude of each block, not below 2^-126 but for 0; NaN where the block is not finite."""
    largest = by_block(x).abs().amax(1)
    scale = torch.where(largest > 0, largest.clamp_min(2.0**-126), 0.0)
    return torch.where(by_block(x).isfinite().all(1), scale, math.nan)


def spread(scale: Tensor, numel: int) -> Tensor:
    return scale.repeat_interleave(BLOCK)[:numel]


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (int64) and scales of a flat moment; positive second moments and negative first ones are never coded 0."""
    scale = scale_of(x)
    divisor = spread(scale, x.numel())
    r = torch.where(divisor > 0, x / divisor, 0.0)
    codes = nearest(r, signed)
    codes = torch.where((x < 0) & (codes == 127), 126, codes) if signed else torch.where(x > 0, codes.clamp_min(1), 0)
    return torch.where(divisor.isnan(), 127 if signed else 0, codes), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    return dynamic_map(signed).to(scale.dtype)[codes.long()] * spread(scale, codes.numel())


@dataclass
class Adam:
    """AdamW of one flat parameter in float64; ``bits`` 8 keeps the moments as codes between steps, 32 as they are."""

    param: Tensor
    bits: int = 8
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    steps: int = 0
    moved: Tensor | None = None  # by the last step, weight decay aside

    def __post_init__(self) -> None:
        self.param = self.param.double()
        self.m, self.v = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.m_codes, self.m_scale = encode(self.m, True)
        self.v_codes, self.v_scale = encode(self.v, False)

    def step(self, grad: Tensor) -> None:
        beta1, beta2 = self.betas
        self.steps += 1
        grad = grad.double()
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad**2
        correction = math.sqrt(1 - beta2**self.steps)
        self.param = self.param * (1 - self.lr * self.weight_decay)
        size = self.lr * correction / (1 - beta1**self.steps)
        self.moved = -size * self.m / (self.v.sqrt() + self.eps * correction)
        self.param = self.param + self.moved
        self.m_codes, self.m_scale = encode(self.m, True)
        self.v_codes, self.v_scale = encode(self.v, False)
        if self.bits == 8:
            self.m = decode(self.m_codes, self.m_scale, True)
            self.v = decode(self.v_codes, self.v_scale, False)
