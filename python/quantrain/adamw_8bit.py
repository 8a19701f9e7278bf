"""AdamW's step with moments of 8 bits a number, and the block-wise codes that they are kept in.

Blocks are runs of 256 elements with one float32 scale, their largest magnitude. A code is the nearest of the 256 values
of a dynamic map (Dettmers et al., arXiv:2110.02861), those of bitsandbytes; on a midpoint it is the lower code. A
positive second moment never takes the code of 0, nor does a negative first moment. A block of zeros has scale 0; a
block that holds NaN or Inf has scale NaN and is all NaN. No gradients. Errors are ``ValueError`` (values and shapes)
and ``TypeError`` (element types and devices).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from quantrain import _arguments

_ops = torch.ops.quantrain


def adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_scale: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_sq_scale: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masks: Sequence[Tensor] = (),
    stochastic: bool = False,
    generator: Generator | None = None,
) -> None:
    """One step of AdamW for all parameters in place, with moments in block-wise 8-bit codes or in float32.

    :class:`quantrain.optim.AdamW8bit` is this with its state. Each list has an entry for every parameter:

    - params, grads: float32, float16 or bfloat16, on one device; a gradient may have another of these types;
    - exp_avg, exp_avg_sq: uint8 of the parameter's shape; or float32, where the moments are kept in 32 bits;
    - exp_avg_scale, exp_avg_sq_scale: float32, one element for 256 of the parameter; none beside float32 moments;
    - steps: float32 of one element, the steps made before; counted here.

    lr, grad_scale and found_inf are float32 of one element on that device. Gradients are divided by grad_scale and stay
    as they are; where found_inf is not 0, nothing changes. masks: none, or one per parameter as
    :func:`quantrain.pack_mask` gives it, of no elements where all is kept: what a mask drops is 0 after the step, with
    its moments, whatever its gradient. stochastic rounds bfloat16 parameters up or down at random,
    with Philox's numbers by (seed, offset, element): the same on CPU and CUDA.

    >>> p, g = torch.ones(300), torch.full((300,), 0.5)
    >>> m, v = torch.full((300,), 127, dtype=torch.uint8), torch.zeros(300, dtype=torch.uint8)
    >>> scales, t = [torch.zeros(2), torch.zeros(2)], torch.zeros(())
    >>> adamw_8bit_([p], [g], [m], scales[:1], [v], scales[1:], [t], lr=torch.tensor(0.1), weight_decay=0.0)
    >>> round(p[0].item(), 4), m[0].item(), scales[0].tolist(), t.item()
    (0.9, 255, [0.05000000074505806, 0.05000000074505806], 1.0)
    """
    _ops.adamw_8bit_(
        params,
        grads,
        exp_avg,
        exp_avg_scale,
        exp_avg_sq,
        exp_avg_sq_scale,
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        found_inf=found_inf,
        masks=list(masks) or None,
        stochastic=stochastic,
        generator=generator,
    )


def quantize_8bit_blockwise(input: Tensor, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """8-bit codes of a dynamic map and one scale per 256 elements in row-major order.

    Shapes: input of any shape, float32, float16 or bfloat16 -> codes uint8 of that shape, scale float32
    ``[ceil(numel / 256)]``. ``signed=False`` is the map of second moments: what is not positive has the code of 0.

    >>> codes, scale = quantize_8bit_blockwise(torch.tensor([1.0, -0.5, 0.0]))
    >>> codes.tolist(), scale.tolist()
    ([255, 35, 127], [1.0])
    """
    _arguments.tensor("quantize_8bit_blockwise", "input", input)
    return _ops.quantize_8bit_blockwise(input, signed=signed)


def dequantize_8bit_blockwise(codes: Tensor, scale: Tensor, *, signed: bool = True) -> Tensor:
    """The values of 8-bit codes of a dynamic map, one scale per 256 elements in row-major order.

    Shapes: codes uint8 of any shape, scale float32 of ``ceil(numel / 256)`` elements -> float32 of codes' shape. Codes
    0 to 255 with scale 1 give the map itself.

    >>> table = dequantize_8bit_blockwise(torch.arange(256).byte(), torch.ones(1))
    >>> table[127].item(), table[255].item(), round(table[0].item(), 6)
    (0.0, 1.0, -0.992969)
    """
    _arguments.tensor("dequantize_8bit_blockwise", "codes", codes)
    return _ops.dequantize_8bit_blockwise(codes, scale, signed=signed)
