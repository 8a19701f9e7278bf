"""The largest values that reach the layers of a model, for the report's map of outliers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def input_maxima(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within it, the largest absolute values of the inputs of the layers ``names`` are noted: name -> float32
    ``[K]``."""
    maxima: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].detach().abs().flatten(0, -2).amax(0).float()
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        return model.get_submodule(name).register_forward_pre_hook(note)

    handles = [watch(name) for name in names]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()
