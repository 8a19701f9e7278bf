"""Which convolutions feed which batch norms, read from a traced model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

__all__ = ["ModelGraph", "trace_model"]


@dataclass
class ModelGraph:
    """What tracing found.

    pairs: convolution name -> name of the batch norm that is its only user, both called once.
    order: names of the called modules, first call first; empty where the model was not traced.
    error: why tracing failed, or "".
    """

    pairs: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    error: str = ""


def trace_model(model: nn.Module, example_inputs: tuple | None = None) -> ModelGraph:
    """Traces ``model`` with torch.fx, else (given ``example_inputs``) with torch.export; never raises for the model's sake.

    Args:
        model: a float model; not changed.
        example_inputs: positional arguments of one call; lets a model whose control flow torch.fx cannot follow be traced.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # any Python in forward may raise anything on a proxy
        if example_inputs is None:
            return ModelGraph(error=_first_line(error))
    else:
        return _collect(model, graph.nodes, lambda node: str(node.target) if node.op == "call_module" else "")
    try:
        program = torch.export.export(model, example_inputs, strict=False)
    except Exception as error:
        return ModelGraph(error=_first_line(error))
    return _collect(model, program.graph.nodes, _exported_module)


def _exported_module(node: fx.Node) -> str:
    """The module whose convolution or batch norm an exported node is, "" for other nodes."""
    known = ("conv2d", "convolution", "batch_norm", "linear", "embedding")
    if node.op != "call_function" or not any(word in str(node.target) for word in known):
        return ""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _collect(model: nn.Module, nodes: Iterable[fx.Node], module_of: Callable[[fx.Node], str]) -> ModelGraph:
    modules = dict(model.named_modules(remove_duplicate=False))
    called = [(node, name) for node in nodes if (name := module_of(node)) in modules and name]
    calls = Counter(id(modules[name]) for _, name in called)
    names = dict(called)
    graph = ModelGraph(order=list(dict.fromkeys(name for _, name in called)))
    for node, name in called:
        conv = modules[name]
        if type(conv) is not nn.Conv2d or calls[id(conv)] > 1 or len(node.users) != 1:
            continue
        user = names.get(next(iter(node.users)), "")
        bn = modules.get(user)
        if type(bn) is nn.BatchNorm2d and calls[id(bn)] == 1 and bn.affine and bn.track_running_stats:
            graph.pairs[name] = user
    return graph


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
