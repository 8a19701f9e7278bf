"""The blocks of a model: the members of its longest list of modules, run one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NoChain", "block_names", "captured_calls", "run_block", "without_cache"]


class NoChain(ValueError):
    """Blocks that do not run one after the other, each once a batch on what the one before gives."""


def block_names(model: nn.Module) -> list[str]:
    """Paths of the members of the longest nn.ModuleList whose members share a class: BERT's ``encoder.layer``, Llama's
    ``model.layers``. Lists inside such a list (experts) do not count, nor do those that hold a module twice; none: []."""
    best: list[str] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        members = list(module) if isinstance(module, nn.ModuleList) else []
        if not members or len({type(member) for member in members}) > 1 or len(set(members)) < len(members):
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
    hooks = [getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_pre_hooks.values()]
    hooks = [hook for hook in hooks if getattr(hook, "gives_int8_cache", False)]
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules()) if c is not None}
    keeping = [config for config in configs.values() if getattr(config, "use_cache", None)]
    before = [config.use_cache for config in keeping]
    for config in keeping:  # a model of models has one for each
        config.use_cache = False
    for hook in hooks:
        hook.off += 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.off -= 1
        for config, value in zip(keeping, before, strict=True):
            config.use_cache = value


def captured_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Any], forward: Callable[[nn.Module, Any], Any]
) -> tuple[list[Tensor], list[list[tuple[tuple, Mapping]]]]:
    """One pass of ``model`` over each batch.

    Returns:
        The first block's input for each batch, and for each block and batch its other arguments.

    Raises:
        NoChain: a block that does not run once a batch, or not on what the block before it gives.
    """
    inputs: list[Tensor] = []
    calls: list[list[tuple[tuple, Mapping]]] = [[] for _ in blocks]
    given: list[Tensor] = []  # by the block that ran last

    def before(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, args, kwargs = _split_call(module, args, kwargs)
            if index == 0:
                inputs.append(hidden.detach().clone())  # the block may change it in place
            elif not (given and _same(given.pop(), hidden)):
                raise NoChain(
                    f"quantize: expected blocks that run one after the other on what the one before gives, got block {index} "
                    f"on something else {_ADVICE}"
                )
            calls[index].append((args, kwargs))

        return hook

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        given[:] = [_hidden_of(output)]

    handles = [
        block.register_forward_pre_hook(before(index), with_kwargs=True) for index, block in enumerate(blocks)
    ] + [block.register_forward_hook(after) for block in blocks]
    try:
        for count, batch in enumerate(batches, 1):
            forward(model, batch)
            counts = {len(of_block) for of_block in calls}
            if counts != {count}:
                raise NoChain(
                    f"quantize: expected every block to run once per batch, got {sorted(counts)} runs of {count} batches "
                    f"{_ADVICE}"
                )
    finally:
        for handle in handles:
            handle.remove()
    return inputs, calls


_ADVICE = "(sequential=False calibrates all layers at once)"


def _split_call(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """A block's input, which is its first argument, by place or by name, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    first = next(iter(inspect.signature(module.forward).parameters), "")
    if not isinstance(kwargs.get(first), Tensor):
        raise NoChain(f"quantize: expected blocks called with a tensor first, got {sorted(kwargs)} {_ADVICE}")
    return kwargs[first], (), {key: value for key, value in kwargs.items() if key != first}


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _same(a: Any, b: Tensor) -> bool:
    """Whether two tensors are one, or equal; NaN equals NaN."""
    if a is b:
        return True
    return isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype and bool(a.isclose(b, 0, 0, True).all())


def run_block(block: nn.Module, hidden: Tensor, call: tuple[tuple, Mapping]) -> Tensor:
    args, kwargs = call
    with torch.no_grad():
        return _hidden_of(block(hidden.clone(), *args, **kwargs))  # which it may change in place
