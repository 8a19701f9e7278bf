"""The parameters that preparing adds to a model, and the optimizers that were made before it and lack them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

__all__ = ["new_parameters"]

_SHOWN = 4


def new_parameters(model: nn.Module, known: Iterable[nn.Parameter]) -> tuple[str, ...]:
    """Names of the trainable parameters of ``model`` that are not among ``known``: learned scales and clip levels.

    Warns:
        UserWarning: there are some, and an optimizer holds parameters of ``known``: it would never move the new ones.
    """
    before = {id(parameter) for parameter in known}
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad and id(p) not in before)
    if names and any(_holds(optimizer, before) for optimizer in _optimizers()):
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        warnings.warn(
            f"prepare: {len(names)} new parameters ({shown}) are in no optimizer that was made before: make it after prepare, "
            "or call its add_param_group with those that model.quantization_summary.new_parameters names",
            stacklevel=3,
        )
    return names


def _optimizers() -> list[Optimizer]:
    # By type and not isinstance, which would ask proxies for their class.
    return [item for item in gc.get_objects() if issubclass(type(item), Optimizer)]


def _holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])
