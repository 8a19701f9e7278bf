"""Encoder layers for inference: nn's operators in float16, and W8A8 with every quantization fused into the operator before.

Post-norm is BERT's (Devlin et al. 2018): x = norm(x + attention(x)), x = norm(x + feed_forward(x)). Pre-norm is GPT's:
x = x + attention(norm(x)), x = x + feed_forward(norm(x)), attention causal. The fusion is token-wise, as in ZeroQuant (Yao et al.,
NeurIPS 2022): a layer's int8 rows come out of the norm or the GELU before it; only attention's output has a pass of its own.
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


class Int8Weight(nn.Module):
    """A linear layer's int8 codes ``[out, in]``, their scales and the bias; called with int8 rows and their scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = quantrain.int8_quantize_rows(linear.weight.detach())
        self.dtype = linear.weight.dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return quantrain.int8_mm(codes, self.codes, scale, self.scale, self.bias, out_dtype=self.dtype)


class Int8Layer(nn.Module):
    """One layer with int8 products; ``branch`` is what is still to be added to the residual ``x``, or None."""

    def __init__(self, layer: FloatLayer) -> None:
        super().__init__()
        self.config = layer.config
        self.qkv, self.projection = Int8Weight(layer.qkv), Int8Weight(layer.projection)
        self.up, self.down = Int8Weight(layer.up), Int8Weight(layer.down)
        self.norm_1, self.norm_2 = layer.norm_1, layer.norm_2

    def attention(self, codes: Tensor, scale: Tensor) -> Tensor:
        mixed = attend(self.qkv(codes, scale), self.config.heads, self.config.pre_norm)
        return self.projection(*quantrain.int8_quantize_rows(mixed))

    def feed_forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return self.down(*quantrain.int8_gelu(self.up(codes, scale)))

    @staticmethod
    def add_norm(branch: Tensor, x: Tensor, norm: nn.LayerNorm, post_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        return quantrain.int8_add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, post_norm=post_norm)

    def pre_norm(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual, branch) of the next layer."""
        if branch is None:
            codes, scale = quantrain.int8_layer_norm(x, self.norm_1.weight, self.norm_1.bias, self.norm_1.eps)
        else:
            codes, scale, x = self.add_norm(branch, x, self.norm_1, False)
        codes, scale, x = self.add_norm(self.attention(codes, scale), x, self.norm_2, False)
        return x, self.feed_forward(codes, scale)

    def post_norm(self, x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output, its codes, their scales)."""
        codes, scale, x = self.add_norm(self.attention(codes, scale), x, self.norm_1, True)
        codes, scale, x = self.add_norm(self.feed_forward(codes, scale), x, self.norm_2, True)
        return x, codes, scale


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
        if self.config.pre_norm:
            branch = None
            for layer in self.layers:
                x, branch = layer.pre_norm(x, branch)
            return x + branch
        codes, scale = quantrain.int8_quantize_rows(x)
        for layer in self.layers:
            x, codes, scale = layer.post_norm(x, codes, scale)
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
