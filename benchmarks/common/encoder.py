"""Encoder layers for inference: nn's operators in float16, and W8A8 in one call each.

Post-norm is BERT's (Devlin et al. 2018): x = norm(x + attention(x)), x = norm(x + feed_forward(x)). Pre-norm is GPT's:
x = x + attention(norm(x)), x = x + feed_forward(norm(x)), attention causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantrain


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a stack of encoder layers."""

    hidden: int = 1024
    heads: int = 16
    feed_forward: int = 4096
    layers: int = 4
    pre_norm: bool = False


def attend(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    """Attention of queries, keys and values ``[B, T, 3 hidden]``: ``[B, T, hidden]``."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(batch, length, width // 3)


class FloatLayer(nn.Module):
    """One layer in PyTorch's operators, ``[B, T, hidden]`` to the same."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.projection = nn.Linear(config.hidden, config.hidden)
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)

    def attention(self, x: Tensor) -> Tensor:
        return self.projection(attend(self.qkv(x), self.config.heads, self.config.pre_norm))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.config.pre_norm:
            x = x + self.attention(self.norm_1(x))
            return x + self.feed_forward(self.norm_2(x))
        x = self.norm_1(x + self.attention(x))
        return self.norm_2(x + self.feed_forward(x))


class Int8Layer(nn.Module):
    """One layer with int8 products, one call of quantrain.int8_transformer_layer."""

    def __init__(self, layer: FloatLayer) -> None:
        super().__init__()
        config = layer.config
        products = {"qkv": layer.qkv, "out": layer.projection, "up": layer.up, "down": layer.down}
        self.weights = {}
        for name, linear in products.items():
            codes, scale = quantrain.int8_quantize_rows(linear.weight.detach())
            self.weights |= {
                f"{name}_codes": codes,
                f"{name}_scale": scale,
                f"{name}_bias": linear.bias.detach().float(),
            }
        for name in ("norm_1", "norm_2"):
            norm = getattr(layer, name)
            self.weights |= {f"{name}_weight": norm.weight.detach(), f"{name}_bias": norm.bias.detach()}
        self.options = {"heads": config.heads, "pre_norm": config.pre_norm, "causal": config.pre_norm}

    def forward(self, x: Tensor, codes: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        return quantrain.int8_transformer_layer(
            x, self.weights, codes=codes, eps=1e-5, few_rows_float=False, **self.options
        )


class FloatEncoder(nn.Sequential):
    """The stack in floating point."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(*(FloatLayer(config) for _ in range(config.layers)))
        self.config = config


class Int8Encoder(nn.Module):
    """The stack with int8 products, made from one in floating point."""

    def __init__(self, encoder: FloatEncoder) -> None:
        super().__init__()
        self.config = encoder.config
        self.layers = nn.ModuleList(Int8Layer(layer) for layer in encoder)

    def forward(self, x: Tensor) -> Tensor:
        codes = None
        for layer in self.layers:
            x, codes = layer(x, codes)
        return x


def make_encoders(config: EncoderConfig, device: str, dtype: torch.dtype) -> tuple[FloatEncoder, Int8Encoder]:
    """Both stacks with the same random weights, for inference."""
    torch.manual_seed(0)
    with torch.device(device):
        encoder = FloatEncoder(config)
    # Branches as large as what they are added to: their errors show in the result.
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    encoder = encoder.to(dtype).eval().requires_grad_(False)
    return encoder, Int8Encoder(encoder).eval()
