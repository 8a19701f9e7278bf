"""The blocks of a model: the members of its longest list of modules, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["block_names", "captured_calls", "run_block", "without_cache"]


def block_names(model: nn.Module) -> list[str]:
    """Paths of the members of the longest nn.ModuleList whose members share a class: BERT's ``encoder.layer``, Llama's
    ``model.layers``. Lists inside such a list (experts) do not count; none: []."""
    best: list[str] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        members = list(module) if isinstance(module, nn.ModuleList) else []
        if not members or len({type(member) for member in members}) > 1:
            continue
        if any(name.startswith(prefix) for prefix in inside):
            continue
        prefix = f"{name}." if name else ""
        inside.append(prefix)
        if len(members) > len(best):
            best = [f"{prefix}{key}" for key in range(len(members))]
    return best


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within it a transformers model keeps no keys and values: a block that runs twice would append them twice."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


def captured_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Any], forward: Callable[[nn.Module, Any], Any]
) -> tuple[list[Tensor], list[list[tuple[tuple, Mapping]]]]:
    """One pass of ``model`` over each batch.

    Returns:
        The first block's input for each batch, and for each block and batch its other arguments.
    """
    inputs: list[Tensor] = []
    calls: list[list[tuple[tuple, Mapping]]] = [[] for _ in blocks]

    def on_call(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not args:
                raise ValueError(f"quantize: expected blocks called with a tensor first, got only {sorted(kwargs)}")
            if index == 0:
                inputs.append(args[0].detach())
            calls[index].append((args[1:], kwargs))

        return hook

    handles = [block.register_forward_pre_hook(on_call(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    counts = {len(of_block) for of_block in calls} | {len(inputs)}
    if counts != {len(batches)}:
        raise ValueError(
            f"quantize: expected every block to run once per batch, got {sorted(counts)} runs of {len(batches)} batches "
            "(sequential=False calibrates all layers at once)"
        )
    return inputs, calls


def run_block(block: nn.Module, hidden: Tensor, call: tuple[tuple, Mapping]) -> Tensor:
    args, kwargs = call
    with torch.no_grad():
        output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, (tuple, list)) else output
