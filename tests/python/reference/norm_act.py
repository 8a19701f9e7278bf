"""What lies before a linear layer, and its rounding, in float64: the oracle of the norm_act family."""

import torch
import torch.nn.functional as F

FUNCTIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def norm_act(function, x, other=None, weight=None, bias=None, eps=1e-5):
    """z of a float64 ``x``."""
    if function == "silu_mul":
        return F.silu(x) * other
    if function == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if function == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return FUNCTIONS[function](x)


def straight_through(z, scale, zero_point, quant_min, quant_max):
    """(output, unclamped codes) of z on the given grid; the gradient passes where the code is not clipped."""
    codes = (z.detach() / scale).round() + zero_point
    inside = (codes >= quant_min) & (codes <= quant_max)
    rounded = (codes.clamp(quant_min, quant_max) - zero_point) * scale
    kept = torch.where(inside, z, torch.zeros_like(z))
    return kept + (rounded - kept).detach(), codes
