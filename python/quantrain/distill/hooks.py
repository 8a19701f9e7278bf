"""What modules gave in a model's last forward pass, kept by hooks that leave no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Capture", "floating_tensors", "unwrapped"]

# (module's name, "hidden" or "attention") -> the tensors of its calls, in order
Kept = dict[tuple[str, str], list[Tensor]]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel or torch.compile was given; any other module itself.

    >>> unwrapped(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile's OptimizedModule
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


class _Hook:
    """A forward hook that copies and pickles of its module do not have: there stands a function that does nothing.

    That function is of Python's library, so the pickle of a module does not need this package.
    """

    def __init__(self, function: Callable[..., None]):
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class Capture:
    """Keeps what the named modules of a model give, while attached.

    Only within a forward pass of the whole model: what gradient checkpointing computes again in the backward pass is
    not seen. Each pass begins anew, so that no more than one pass's tensors are held.

    Args:
        model: as it is trained, perhaps wrapped. Names are those of the module within.
        wanted: names of modules -> which of their tensors, "hidden" and "attention".
        trains: passes without gradients (evaluation between steps) are not seen, unless ``every_pass`` is set.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[str, Sequence[str]], *, whose: str, trains: bool):
        self.root, self.wanted, self.whose, self.trains = unwrapped(model), wanted, whose, trains
        self.kept: Kept = {}
        self.versions: dict[tuple[str, str], list[int]] = {}
        self.without_graph: set[str] = set()
        self.open = self.every_pass = False

    def attach(self, stack: ExitStack) -> None:
        """Registers the hooks; ``stack`` removes them."""
        if not self.wanted:
            return
        stack.callback(self.clear)
        stack.callback(self.root.register_forward_pre_hook(_Hook(self._begin)).remove)
        for name, kinds in self.wanted.items():
            hook = _Hook(self._keeper(name, tuple(kinds)))
            stack.callback(self.root.get_submodule(name).register_forward_hook(hook).remove)
        stack.callback(self.root.register_forward_hook(_Hook(self._end)).remove)

    def clear(self) -> None:
        self.open = False
        self.kept, self.versions, self.without_graph = {}, {}, set()

    def take(self) -> Kept:
        """What was kept, which is then forgotten.

        Raises:
            ValueError: a module that was not called, or whose result was written in place since.
        """
        kept, versions, without_graph = self.kept, self.versions, self.without_graph
        self.clear()
        for name, kinds in self.wanted.items():
            for kind in kinds:
                if (name, kind) not in kept:
                    raise ValueError(self._missing(name, name in without_graph))
                for tensor, version in zip(kept[name, kind], versions.get((name, kind), ()), strict=False):
                    if tensor._version != version:
                        raise ValueError(
                            f"Distiller: expected what {name!r} of the {self.whose} gives to stay as it is, got it "
                            "written in place (pair the module that writes it, or make that module not in place)"
                        )
        return kept

    def _missing(self, name: str, without_graph: bool) -> str:
        if without_graph:
            return (
                f"Distiller: expected {name!r} of the {self.whose} to run with gradients, got it without within a pass "
                "that has them (checkpointing: use_reentrant=False)"
            )
        return (
            f"Distiller: expected {name!r} of the {self.whose} to be called in a forward pass of the {self.whose} "
            "before each loss, got no call (a compiled model is to be compiled, or run first, after the hooks are "
            "there)"
        )

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.every_pass or not self.trains or torch.is_grad_enabled():
            self.kept, self.versions, self.without_graph = {}, {}, set()
            self.open = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open = False

    def _keeper(self, name: str, kinds: tuple[str, ...]) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not self.open:
                return
            if self.trains and not self.every_pass and not torch.is_grad_enabled():
                self.without_graph.add(name)
                return
            for kind in kinds:
                tensor = _tensor_of(name, kind, output, self.whose)
                tensor = tensor if self.trains else tensor.detach()
                self.kept.setdefault((name, kind), []).append(tensor)
                if not torch.compiler.is_compiling() and not tensor.is_inference():
                    self.versions.setdefault((name, kind), []).append(tensor._version)

        return keep


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a module's result, in order.

    >>> [t.shape for t in floating_tensors((None, {"states": torch.zeros(2, 3)}, torch.arange(2)))]
    [torch.Size([2, 3])]
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from floating_tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from floating_tensors(inner)


def _tensor_of(name: str, kind: str, output: Any, whose: str) -> Tensor:
    """The first floating-point tensor of a result; attention probabilities come second where there are several."""
    found = list(floating_tensors(output))
    if kind == "attention":
        best = found[1] if len(found) > 1 else found[0] if isinstance(output, Tensor) else None
        if best is None or best.dim() < 3:
            raise ValueError(
                f"Distiller: expected {name!r} of the {whose} to give attention probabilities [.., T, K] beside its "
                "result, got none (transformers: attn_implementation='eager'; nn.MultiheadAttention: need_weights=True)"
            )
        return best
    if not found or found[0].dim() < 2:
        got = f"one of shape {list(found[0].shape)}" if found else "none"
        raise ValueError(f"Distiller: expected {name!r} of the {whose} to give a tensor [.., D], got {got}")
    return found[0]
