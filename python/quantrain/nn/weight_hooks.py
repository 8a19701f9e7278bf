"""Layers whose weight torch.nn.utils' weight_norm, spectral_norm or prune computes before each call.

Such a hook leaves the weight that the last forward pass used, so whoever reads a weight without calling the layer (a
copy, convert) runs the hooks first.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["computes_weight", "run_weight_hooks", "unknown_weight"]

_KNOWN = (WeightNorm, SpectralNorm, BasePruningMethod)


def computes_weight(hook: object) -> bool:
    """Whether it is one of those hooks."""
    return isinstance(hook, _KNOWN)


def run_weight_hooks(model: nn.Module) -> None:
    """Computes every weight that a known hook computes, from the parameters as they are, as a leaf that may be copied.

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
            name = _computed(hook)
            getattr(module, name).requires_grad_(module._parameters[_source(module, name)].requires_grad)


def _computed(hook: object) -> str:
    """The attribute that a known hook computes."""
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


def _source(module: nn.Module, name: str) -> str:
    """The parameter that it is computed from."""
    return next(key for key in (f"{name}_v", f"{name}_orig") if key in module._parameters)


def unknown_weight(module: nn.Module) -> str:
    """Why ``module.weight`` cannot be read at any time, or ""."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        return ""
    computed = {_computed(hook) for hook in module._forward_pre_hooks.values() if isinstance(hook, _KNOWN)}
    return "" if "weight" in computed else "its weight is computed by a hook, or is no parameter"
