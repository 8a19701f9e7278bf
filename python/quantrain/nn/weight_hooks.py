"""Layers whose weight is no Parameter of their own: torch.nn.utils' weight_norm, spectral_norm and prune compute it before each call.

Such a hook leaves the weight that the last forward pass used, so whoever reads a weight without calling the layer (a copy, convert)
runs the hooks first.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["run_weight_hooks", "unknown_weight"]

_KNOWN = (WeightNorm, SpectralNorm, BasePruningMethod)


def run_weight_hooks(model: nn.Module) -> None:
    """Computes every weight that a known hook computes, from the parameters as they are, without gradient.

    A spectral norm takes no step of its power iteration.
    """
    for module in model.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _KNOWN)]
        for hook in hooks:
            with torch.no_grad():
                if isinstance(hook, SpectralNorm):
                    setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
                else:
                    hook(module, ())


def unknown_weight(module: nn.Module) -> str:
    """Why ``module.weight`` cannot be read at any time, or ""."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        return ""
    computed = {
        getattr(h, "name", getattr(h, "_tensor_name", ""))
        for h in module._forward_pre_hooks.values()
        if isinstance(h, _KNOWN)
    }
    return "" if "weight" in computed else "its weight is computed by a hook, or is no parameter"
