"""Batch norm in training with what surrounds it, in float64: the oracle of the batch_norm family."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}


def batch_norm(y, weight, bias, conv_scale, residual, activation, eps, statistics=None):
    """The batch norm of y / conv_scale (of its batch, or with ``statistics`` = (mean, variance) of y), then the rest."""
    shape = [1, -1] + [1] * (y.dim() - 2)
    s = 1.0 if conv_scale is None else conv_scale.view(shape)
    x = y / s
    if statistics is None:
        over = [d for d in range(y.dim()) if d != 1]
        mean = x.mean(over, keepdim=True)
        variance = x.var(over, unbiased=False, keepdim=True)
    else:
        mean, variance = statistics[0].view(shape) / s, statistics[1].view(shape) / s**2
    z = (x - mean) / torch.sqrt(variance + eps)
    z = z if weight is None else z * weight.view(shape)
    z = z if bias is None else z + bias.view(shape)
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation](z)
