"""Weights of 4 bits: codes in blocks that share a scale, and products whose weight is decoded inside.

A code q stands for ``value(q) * scale``; the format says which values:

- ``nf4``: 16 quantiles of a normal distribution in [-1, 1] (Dettmers et al. 2023, arXiv:2305.14314, appendix E);
- ``fp4``: bitsandbytes' 4-bit float, magnitudes {0, 1/16, 2, 3, 4, 6, 8, 12} / 12;
- ``e2m1``: the OCP float of 2 exponent bits and 1 mantissa bit, magnitudes {0, 0.5, 1, 1.5, 2, 3, 4, 6} / 6;
- ``int4``: integers -8..7; ``uint4``: integers 0..15 less the block's zero point;
- ``table``: 16 values of one's own.

Blocks are runs of ``block_size`` elements in row-major order. Where block_size divides the last dimension K, and K is
even, codes are uint8 ``[..., K / 2]`` and scales float32 ``[..., K / block_size]``; else both are flat,
``[(numel + 1) / 2]`` and ``[ceil(numel / block_size)]``, with a short last block. A byte holds two codes, the first in
its high nibble as in bitsandbytes' files, for ``int4`` and ``uint4`` in its low nibble as in ``pack_int4``.

Scales may be compressed ("double quantization", ibid. section 3): uint8 codes with one float32 ``scale_scale`` per 256 of
them and one ``scale_offset``, 0.13 bits per weight instead of 0.5 at blocks of 64.

A block with NaN or Inf has scale NaN and decodes to NaN. A block of zeros, or of nothing larger than 2^-126, has scale 0.
Codes and scales are the same bits on CPU and CUDA. Errors are ``ValueError`` (values and shapes) and ``TypeError``
(element types and devices).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def quantize_4bit(
    input: Tensor,
    *,
    block_size: int = 64,
    format: str = "nf4",
    table: Tensor | None = None,
    scale_rule: str = "absmax",
) -> tuple[Tensor, Tensor]:
    """Codes and scales of 4 bits, each element to the nearest value.

    Args:
        input: float32, float16 or bfloat16, ``[..., K]``.
        block_size: elements that share a scale: 32, 64, ..., 4096; for int4 and a matrix also any even divisor of K.
        format: "nf4", "fp4", "e2m1", "int4" or "table".
        table: the 16 values of format "table", float32.
        scale_rule: "absmax", max |x| (int4: / 7); "signed", int4 alone: the element of largest magnitude / -8, which is
            1.1 dB better on normal weights; "search": the multiple 0.8, 0.8125, ..., 1.1 of absmax with the least squared
            error (+0.7 dB), which any reader of the format decodes.

    Returns:
        codes, uint8, and scale, float32, of the shapes above. Not differentiable.

    >>> codes, scale = quantize_4bit(torch.tensor([1.0, -0.5, 0.25, 0.0]).repeat(16))
    >>> codes[:2].tolist(), scale.tolist()
    ([242, 167], [1.0])
    """
    _arguments.tensor("quantize_4bit", "input", input)
    block_size = _arguments.integer("quantize_4bit", "block_size", block_size)
    return _ops.quantize_4bit(input, block_size=block_size, format=format, table=table, scale_rule=scale_rule)


def quantize_4bit_affine(input: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 with a scale and a zero point per block (format "uint4").

    scale = (max - min) / 15, 0 being in the range; zero_point = rint(-min / scale), int32 of scale's shape.

    >>> codes, scale, zero_point = quantize_4bit_affine(torch.linspace(-1, 2, 64))
    >>> round(scale.item(), 6), zero_point.item()
    (0.2, 5)
    """
    _arguments.tensor("quantize_4bit_affine", "input", input)
    block_size = _arguments.integer("quantize_4bit_affine", "block_size", block_size)
    return _ops.quantize_4bit_affine(input, block_size=block_size)


def dequantize_4bit(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    scale_scale: Tensor | None = None,
    scale_offset: Tensor | None = None,
    *,
    size: Sequence[int],
    format: str = "nf4",
    table: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The tensor of shape ``size`` that codes and scales stand for, rounded once from float32.

    >>> x = torch.tensor([1.0, -0.5, 0.25, 0.0]).repeat(16)
    >>> dequantize_4bit(*quantize_4bit(x), size=x.shape)[:4]
    tensor([ 1.0000, -0.5251,  0.2461,  0.0000])
    """
    name = _arguments.type_name("dequantize_4bit", "dtype", dtype, _arguments.FLOATS)
    return _ops.dequantize_4bit(
        codes, scale, zero_point, scale_scale, scale_offset, size=size, format=format, table=table, dtype=name
    )


def compress_scale(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: codes (uint8, of scale's shape), scale_scale ``[ceil(numel / 256)]`` and scale_offset ``[]``.

    The offset is the mean of all scales; what is left is rounded, in blocks of 256, to the nearest value of the signed
    dynamic map (Dettmers et al. 2022, arXiv:2110.02861, section 2.2). One scale of NaN makes all of them NaN.

    >>> codes, scale_scale, offset = compress_scale(torch.tensor([1.0, 1.5, 2.0]))
    >>> decompress_scale(codes, scale_scale, offset).tolist()
    [1.003515601158142, 1.5, 2.0]
    """
    return _ops.compress_scale(scale)


def decompress_scale(codes: Tensor, scale_scale: Tensor, scale_offset: Tensor) -> Tensor:
    """The float32 scales that :func:`compress_scale`'s results stand for; what the other functions do inside."""
    return _ops.decompress_scale(codes, scale_scale, scale_offset)


def linear_4bit(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    scale_scale: Tensor | None = None,
    scale_offset: Tensor | None = None,
    *,
    format: str = "nf4",
    table: Tensor | None = None,
    method: str = "auto",
    out_features: int | None = None,
) -> Tensor:
    """Product with a packed weight: y = x W^T + bias, where W ``[N, K]`` is what codes and scales stand for.

    Args:
        input: ``[..., K]``, float32, float16 or bfloat16; under autocast it is cast.
        codes, scale, zero_point, scale_scale, scale_offset, format, table: the packed weight.
        bias: ``[N]`` of a floating type.
        method: "fused" decodes inside the product: on the CPU always, on CUDA for float16 and bfloat16 input of at most
            32 rows, K and blocks of whole 64 elements and integer zero points (ValueError otherwise); "dequantize"
            decodes first and takes the float product; "auto" takes the faster one. "int8" (W4A8) computes something else,
            for many rows: input is rounded to int8 codes with one scale per row, so are the weight's rows, from their 4
            bits, and :func:`quantrain.int8_mm` multiplies. Its gradient is that of the unrounded product.
        out_features: N, where a flat weight does not say (K of 1, N odd).

    Returns:
        ``[..., N]`` of input's type. Differentiable in input and bias, any number of times; the backward pass uses the
        packed weight, and nothing else is saved.

    >>> weight = torch.eye(64)
    >>> linear_4bit(torch.ones(2, 64), *quantize_4bit(weight)).shape
    torch.Size([2, 64])
    """
    _arguments.tensor("linear_4bit", "input", input)
    return _ops.linear_4bit(
        input,
        codes,
        scale,
        zero_point,
        bias,
        scale_scale,
        scale_offset,
        format=format,
        table=table,
        method=method,
        out_features=out_features,
    )


def linear_4bit_lora(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    scale_scale: Tensor | None = None,
    scale_offset: Tensor | None = None,
    *,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    format: str = "nf4",
    table: Tensor | None = None,
    method: str = "auto",
    out_features: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Product with a packed weight and a low-rank update, y = x W^T + scaling D(x) A^T B^T + bias, in one node.

    D is dropout (QLoRA, arXiv:2305.14314, eq. 5).

    Args:
        input: ``[..., K]``.
        lora_a, lora_b: ``[r, K]`` and ``[N, r]`` of any float type.
        dropout: share of x that A does not see, in [0, 1); random numbers by ``generator``, else the device's own.
        the others: as :func:`linear_4bit`.

    Returns:
        ``[..., N]``. Differentiable once, in input, lora_a, lora_b and bias. Saved are input, D(x) A^T and the packed
        weight; the mask of D is computed again from its random numbers.

    >>> a, b = torch.randn(8, 64), torch.zeros(32, 8)
    >>> linear_4bit_lora(torch.ones(2, 64), *quantize_4bit(torch.randn(32, 64)), lora_a=a, lora_b=b, scaling=2.0).shape
    torch.Size([2, 32])
    """
    _arguments.tensor("linear_4bit_lora", "input", input)
    return _ops.linear_4bit_lora(
        input,
        codes,
        scale,
        zero_point,
        bias,
        scale_scale,
        scale_offset,
        lora_a=lora_a,
        lora_b=lora_b,
        scaling=scaling,
        dropout=dropout,
        format=format,
        table=table,
        method=method,
        out_features=out_features,
        generator=generator,
    )
