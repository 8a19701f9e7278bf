"""Dynamic quantization, one scale per token: the scale of each row comes from the row itself, nothing is calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fake_quantize_per_token", "quantize_per_token"]


def fake_quantize_per_token(input: Tensor, *, bits: int = 8, symmetric: bool = True) -> Tensor:
    """``input`` rounded to ``bits`` with one scale for each row of the last dimension.

    ``fake_quantize_dynamic`` with scale shape ``[..., 1]``: scale = max|row| / (2^(bits-1) - 1) symmetric,
    (max - min) / (2^bits - 1) affine with the range widened to hold 0.

    Args:
        input: ``[..., K]``, float32, float16 or bfloat16.
        bits: 1 to 16.
        symmetric: zero point 0.

    Returns:
        The shape and dtype of ``input``. Gradient: straight through (nothing saturates). A NaN makes its row NaN.

    Raises:
        ValueError: ``bits`` outside 1 to 16.

    Source: Yao et al. 2022 (ZeroQuant, arXiv:2206.01861), section 4.1.

    >>> fake_quantize_per_token(torch.tensor([[1.0, -7.0], [0.1, 0.7]]), bits=4)
    tensor([[ 1.0000, -7.0000],
            [ 0.1000,  0.7000]])
    """
    quant_min, quant_max = _codes(bits, symmetric)
    return torch.ops.quantrain.fake_quantize_dynamic(
        input, _token_shape(input), quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
    )


def quantize_per_token(input: Tensor, *, bits: int = 8, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``input`` with one scale for each row of the last dimension.

    Args: as :func:`fake_quantize_per_token`, with ``bits`` 1 to 8.

    Returns:
        ``(codes, scale, zero_point)``: int8 (symmetric) or uint8 (affine) of the input's shape, float32 ``[..., 1]``,
        int32 ``[..., 1]``; ``dequantize(codes, scale, zero_point)`` equals ``fake_quantize_per_token(input)``. No
        gradient.

    Raises:
        ValueError: ``bits`` outside 1 to 8; on CPU a NaN in ``input``.

    >>> codes, scale, zero_point = quantize_per_token(torch.tensor([[1.0, -7.0]]), bits=4)
    >>> codes, scale
    (tensor([[ 1, -7]], dtype=torch.int8), tensor([[1.]]))
    """
    if bits > 8:
        raise ValueError(f"quantize_per_token: expected bits in 1 to 8, got {bits}")
    quant_min, quant_max = _codes(bits, symmetric)
    scale, zero_point = torch.ops.quantrain.choose_qparams(
        input, _token_shape(input), quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
    )
    dtype = "int8" if symmetric else "uint8"
    codes = torch.ops.quantrain.quantize.nearest(
        input, scale, zero_point, quant_min=quant_min, quant_max=quant_max, dtype=dtype
    )
    return codes, scale, zero_point


def _token_shape(input: Tensor) -> tuple[int, ...]:
    return (*input.shape[:-1], 1) if input.dim() else ()


def _codes(bits: int, symmetric: bool) -> tuple[int, int]:
    if not 1 <= bits <= 16:
        raise ValueError(f"per token: expected bits in 1 to 16, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
