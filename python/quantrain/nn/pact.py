"""PACT: activations clipped at a learned level, then quantized (Choi et al. 2018, arXiv:1805.06085)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fake_quantize import kMinScale
from .observers import Float32State

__all__ = ["PACT", "pact"]


def pact(input: Tensor, alpha: Tensor, bits: int = 4) -> Tensor:
    """Clipped and quantized activation: y = clip(x, 0, alpha), y_q = rint(y * n / alpha) * alpha / n, n = 2^bits - 1.

    A composition of ``torch.where`` and ``fake_quantize`` with scale alpha / (2^bits - 1) and codes 0 .. 2^bits - 1.

    Args:
        input: any shape; float32, float16 or bfloat16.
        alpha: float32, one element (or the rank of ``input`` with sizes 1 or the input's), positive.
        bits: 1 to 16.

    Returns:
        The shape and dtype of ``input``; values in [0, alpha]. NaN stays NaN.

    Gradient: dy/dx = 1 for 0 < x < alpha, else 0; dy/dalpha = 1 for x >= alpha, else 0, summed over x (eq. 3, the
    straight-through estimator of the rounding).

    Raises:
        ValueError: ``bits`` outside 1 to 16; on CPU an alpha that is not positive.

    Source: Choi et al. 2018, eq. 1 to 3.

    >>> pact(torch.tensor([-1.0, 0.5, 9.0]), torch.tensor([1.5]), bits=2)
    tensor([0.0000, 0.5000, 1.5000])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"pact: expected bits in 1 to 16, got {bits}")
    levels = 2**bits - 1
    clipped = torch.where(input >= alpha, alpha, torch.relu(input)).to(input.dtype)
    return torch.ops.quantrain.fake_quantize(clipped, alpha.detach() / levels, quant_min=0, quant_max=levels)


class PACT(Float32State):
    """:func:`pact` with its own ``alpha`` (Parameter, float32, shape ``[1]``), in place of a ReLU.

    Args:
        bits: 1 to 16.
        alpha: first clipping level, positive. The paper regularizes alpha with L2; give it weight decay in the
            optimizer.

    Raises:
        ValueError: ``bits`` outside 1 to 16, ``alpha`` not positive.

    >>> activation = PACT(bits=4)
    >>> activation(torch.tensor([-1.0, 3.0, 7.0]))
    tensor([0.0000, 3.2000, 6.0000], grad_fn=<...>)
    """

    def __init__(self, bits: int = 4, alpha: float = 6.0, *, device: torch.device | str | None = None):
        super().__init__()
        if not 1 <= bits <= 16:
            raise ValueError(f"PACT: expected bits in 1 to 16, got {bits}")
        if not alpha > 0:
            raise ValueError(f"PACT: expected alpha > 0, got {alpha}")
        self.bits = bits
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), device=device))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.alpha.data.clamp_(
                min=kMinScale
            )  # in place, so that a level the optimizer pushed below 0 can grow again
        return pact(input, self.alpha, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
