"""Joins what lies between two convolutions: batch norm, addition, activation, fake-quantization of the next input.

A block (a module whose forward pass calls convolutions) is traced with torch.fx; in what it computes

    conv -> bn [-> + residual] [-> relu] [-> the input of other quantized layers]

becomes one call of the :class:`QuantConvBn2d`, with the residual and the activation's name, which then goes over its output in the
two passes of :func:`quantrain.batch_norm_act`. Layers of the block that read one tensor under one spec share its fake-quantized
form: the first's ``input_fake_quant`` is all of theirs. Nothing else of a block changes: its class, children and state dict stay,
``forward`` is what is replaced, and :func:`unfuse` puts the written one back.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .conv_bn import FoldedBatchNorm2d, QuantConvBn2d
from .fake_quantize import has_hooks
from .layers import QuantConv2d

__all__ = ["FusedForward", "fuse", "fused_rows", "unfuse"]

_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    "relu": "relu",
    "relu_": "relu",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class FusedForward:
    """The forward pass of a block with its calls joined; the written one where a module of what is joined has hooks.

    It holds the text that torch.fx made, and the names of what that reads, so that a model can be copied and pickled.
    """

    def __init__(self, block: nn.Module, source: str, names: dict[str, Any], watched: list[nn.Module], rows: list[str]):
        self.modules = {name for name, value in names.items() if isinstance(value, ModuleType)}
        self.block, self.source = block, source
        self.names = {name: value.__name__ if name in self.modules else value for name, value in names.items()}
        self.watched, self.rows = watched, rows
        self._function = self._made()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(has_hooks(module) for module in self.watched):
            return type(self.block).forward(self.block, *args, **kwargs)
        return self._function(self.block, *args, **kwargs)

    def _made(self) -> Callable:
        names = {k: importlib.import_module(v) if k in self.modules else v for k, v in self.names.items()}
        exec(compile(self.source, f"<joined forward of {type(self.block).__name__}>", "exec"), names)
        return names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._function = self._made()


def fuse(model: nn.Module) -> list[str]:
    """Joins what can be joined in every block of ``model``.

    Returns:
        A line for each call: what was joined, and where its result goes.
    """
    inlined: set[int] = set()
    for name, block in list(model.named_modules()):
        if id(block) in inlined or "forward" in block.__dict__ or not _may_be_block(block):
            continue
        try:
            graphs = [_Tracer().trace(_in_mode(block, training)) for training in (True, False)]
        except Exception:  # any Python in forward may raise anything on a proxy: the block stays as written
            continue
        if [str(node) for node in graphs[0].nodes] != [str(node) for node in graphs[1].nodes]:
            continue
        inlined |= {id(module) for _, module in _sequentials(block)}
        _fuse_block(name, block, graphs[0])
    return fused_rows(model)


def unfuse(model: nn.Module) -> None:
    """Every block's forward pass as it is written."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.__dict__["forward"]
        if isinstance(module, QuantConvBn2d):
            module.readers = ()


def fused_rows(model: nn.Module) -> list[str]:
    """The lines of :func:`fuse`."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return [row for forward in forwards if isinstance(forward, FusedForward) for row in forward.rows]


# ---- tracing --------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Calls of modules are calls, but for nn.Sequential's, whose modules are."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not _is_sequential(module)


def _is_sequential(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and not has_hooks(module) and "forward" not in module.__dict__


def _sequentials(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules under ``block`` that tracing it goes into."""
    for name, child in block.named_children():
        if _is_sequential(child):
            yield name, child
            yield from ((f"{name}.{below}", module) for below, module in _sequentials(child))


def _may_be_block(block: nn.Module) -> bool:
    within = [block, *(module for _, module in _sequentials(block))]
    return not isinstance(block, QuantConv2d) and any(
        isinstance(child, QuantConvBn2d) for module in within for child in module.children()
    )


class _in_mode:  # noqa: N801
    """``block`` for a trace in one mode: a shallow stand-in, since tracing calls no module."""

    def __new__(cls, block: nn.Module, training: bool) -> nn.Module:
        replica = block.__class__.__new__(block.__class__)
        replica.__dict__.update(block.__dict__)
        replica.__dict__["training"] = training
        return replica


# ---- one block ------------------------------------------------------------------------------------------------------


def _fuse_block(name: str, block: nn.Module, graph: fx.Graph) -> None:
    modules = dict(block.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {str(node.target) for node in calls if sum(modules[n.target] is modules[node.target] for n in calls) == 1}
    watched: list[nn.Module] = []
    joined: dict[fx.Node, list[str]] = {}
    for node in reversed(calls):  # of two branches that an addition joins, the later one takes it
        layer = modules[node.target]
        if node.target in once and type(layer) is QuantConvBn2d and not node.kwargs and len(node.args) == 1:
            new, parts = _join(graph, node, modules, watched)
            if new is not None:
                joined[new] = parts
    shared = [text for node in list(graph.nodes) if (text := _share(graph, node, modules, joined, once))]
    rows = [_row(name, node, joined[node], modules) for node in graph.nodes if node in joined] + [
        f"{name}.{text}" if name else text for text in shared
    ]
    if not rows:
        return
    graph.lint()
    code = graph.python_code("self")
    block.__dict__["forward"] = FusedForward(block, code.src, dict(code.globals), watched, rows)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _join(
    graph: fx.Graph, conv: fx.Node, modules: dict[str, nn.Module], watched: list[nn.Module]
) -> tuple[fx.Node | None, list[str]]:
    """The call that stands for the convolution's and what follows it, and the names of that; None where nothing follows."""
    layer, chain, parts, out = modules[conv.target], [conv], [], []
    following = _only_user(conv)
    if following is not None and _is_placeholder_of(following, modules, layer):
        chain.append(following)
        out.append(modules[following.target])
        following = _only_user(following)
    residual = None
    if following is not None and (other := _added(following, chain[-1])) is not None:
        after = _only_user(following)
        if after is None or _activation(after, modules) in (None, "relu", "relu6"):
            residual, following = other, after
            chain.append(next(iter(chain[-1].users)))
            parts.append("add")
    kind = None if following is None else _activation(following, modules)
    if kind is not None:
        if following.op == "call_module":
            out.append(modules[following.target])
        chain.append(following)
        parts.append(kind)
    if not parts:
        return None, []
    last = chain[-1]
    with graph.inserting_after(last):
        new = graph.call_module(conv.target, conv.args)
    new.kwargs = {} if residual is None else {"residual": residual}
    if kind is not None:
        new.kwargs = new.kwargs | {"activation": kind}
    last.replace_all_uses_with(new)
    for node in reversed(chain):
        graph.erase_node(node)
    watched += [layer, *out]
    return new, parts


def _is_placeholder_of(node: fx.Node, modules: dict[str, nn.Module], layer: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    module = modules[node.target]
    return isinstance(module, FoldedBatchNorm2d) and module.folded is layer.bn and not has_hooks(module)


def _added(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``one``, where it is an addition of two results."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS or node.kwargs:
        return None
    if len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    first, second = node.args
    return None if first is second else second if first is one else first


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        module = modules[node.target]
        return None if has_hooks(module) else _MODULES.get(type(module))
    if node.op in ("call_function", "call_method") and len(node.args) == 1:
        return _FUNCTIONS.get(node.target) if set(node.kwargs) <= {"inplace"} else None
    return None


# ---- who reads a result ---------------------------------------------------------------------------------------------


def _reads(node: fx.Node, value: fx.Node, modules: dict[str, nn.Module], once: set[str]) -> bool:
    """Whether ``node`` calls a layer that fake-quantizes ``value`` and does nothing else with it."""
    if node.op != "call_module" or node.target not in once or node.args != (value,) or value in node.kwargs.values():
        return False
    layer = modules[node.target]
    quantizes = isinstance(layer, QuantConv2d) and layer.input_fake_quant is not None
    return quantizes and not has_hooks(layer) and not has_hooks(layer.input_fake_quant)


def _share(
    graph: fx.Graph, value: fx.Node, modules: dict[str, nn.Module], joined: dict[fx.Node, list[str]], once: set[str]
) -> str:
    """Gives the readers of ``value`` one fake-quantized form of it; says so, or "". A joined call makes it itself."""
    readers = [node for node in graph.nodes if node in value.users and _reads(node, value, modules, once)]
    if not readers:
        return ""
    first = modules[readers[0].target].input_fake_quant
    readers = [node for node in readers if modules[node.target].input_fake_quant.spec == first.spec]
    alone = value in joined and len(readers) == len(value.users)
    if len(readers) < 2 and not alone:
        return ""
    for node in readers:
        modules[node.target].input_fake_quant = first
        node.kwargs = node.kwargs | {"quantized": True}
    names = ", ".join(str(node.target) for node in readers)
    if alone:
        modules[value.target].readers = (first,)
        value.kwargs = value.kwargs | {"quantize": True}
        joined[value] = [*joined[value], f"input of {names}"]
        return ""
    with graph.inserting_before(readers[0]):
        quantized = graph.call_module(f"{readers[0].target}.input_fake_quant", (value,), {"codes": True})
    for node in readers:
        node.args = (quantized,)
    return f"one fake-quantized input of {names}"


def _row(name: str, node: fx.Node, parts: list[str], modules: dict[str, nn.Module]) -> str:
    path = f"{name}.{node.target}" if name else str(node.target)
    return f"{path}: " + " + ".join(["batch norm", *parts])
