"""Inference as CUDA graphs, of inputs whose shapes vary."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Captured"]

_WARMUPS = 2  # lazy initialisation may not be captured


class _Graph:
    """One capture: its own inputs, which calls copy theirs into, and its result."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any], pool: Any) -> None:
        self.args, self.kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        self.inputs = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARMUPS):
                function(*self.args, **self.kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = function(*self.args, **self.kwargs)

    def replay(self, tensors: list[Tensor]) -> Any:
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result


class Captured:
    """``function`` as a CUDA graph of its own for each combination of shapes, types and other arguments.

    A graph is captured where a combination is first met (after two runs) and replayed from then on; the least recently
    used is dropped beyond ``most``. Where no argument is a CUDA tensor the function is called as it is. Gradients are
    off. C++: ``quantrain::nn::Captured``.

    Args:
        function: a model in evaluation mode, or another callable of tensors without effects but its result. It launches
            the same kernels whenever shapes are the same, and waits for nothing.
        most: graphs to hold; each keeps what the function allocates, in one pool.

    Returns:
        What the function returns, in memory that all graphs share: the next call, of whatever shapes, may overwrite it.
        Clone what is to be kept.

    Raises:
        ValueError: ``most`` below 1.

    >>> fast = Captured(torch.nn.Linear(4, 2))
    >>> fast(torch.randn(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, function: Callable, most: int = 16) -> None:
        if most < 1:
            raise ValueError(f"Captured: expected most of at least 1, got {most}")
        self.function, self.most = function, most
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(tensor.is_cuda for tensor in tensors):
            return self.function(*args, **kwargs)
        key = (str(structure), *(_key(leaf) for leaf in leaves))
        if key not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            made = _Graph(self.function, args, kwargs, pool)
            if len(self._graphs) >= self.most:
                self._graphs.popitem(last=False)
            self._graphs[key] = made
        self._graphs.move_to_end(key)
        return self._graphs[key].replay(tensors)

    @property
    def graphs(self) -> int:
        """Graphs held now."""
        return len(self._graphs)


def _key(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
