"""Joins what lies between two convolutions: batch norm, addition, activation, fake-quantization of the next input.

A block (a module whose forward pass calls convolutions) is traced with torch.fx; in what it computes

    conv -> bn [-> + residual] [-> relu] [-> the input of other quantized layers]

becomes one call of the :class:`QuantConvBn2d`, with the residual and the activation's name, which then goes over its output in the
two passes of :func:`quantrain.batch_norm_act`. Layers of the block that read one tensor under one spec share its fake-quantized
form: the first's ``input_fake_quant`` is all of theirs, and so is its scale where it is learned. Nothing else of a block changes: its
class, children and state dict stay, ``forward`` is what is replaced, and :func:`unfuse` puts the written one back.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .conv_bn import FoldedBatchNorm2d, QuantConvBn2d
from .fake_quantize import FakeQuantize, has_hooks, transforms_active
from .fuse_linear import (
    RmsNormForward,
    alike,
    fuse_norms,
    join_before,
    reads_rows,
    tie,
    tie_inputs,
    what_traces_rest_on,
)
from .fuse_source import attributes_read
from .layers import QuantConv2d

__all__ = ["FusedForward", "differing_shares", "fuse", "fused_rows", "unfuse"]

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
    """The forward pass of a block with its calls joined; the written one where the block is no longer what was traced.

    That is: where an argument is None, which no stand-in for a tensor is, where a module that it calls or leaves out, or the
    input's fake-quantizer of one, was replaced or has hooks, where a layer is to have second derivatives, under torch.func, where a container has other children, or where an attribute that the written forward pass reads has another
    value. It holds the text that torch.fx made, and the names of what that reads, so that a model can be copied and pickled.
    """

    def __init__(self, block: nn.Module, source: str, names: dict[str, Any], traced: Traced, rows: list[str]):
        self.modules = {name for name, value in names.items() if isinstance(value, ModuleType)}
        self.block, self.source = block, source
        self.names = {name: value.__name__ if name in self.modules else value for name, value in names.items()}
        self.traced, self.rows = traced, rows
        self._function = self._made()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = not any(value is None for value in (*args, *kwargs.values()))
        if not given or transforms_active() or not self.traced.stands():
            return type(self.block).forward(self.block, *args, **kwargs)
        return self._function(self.block, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:  # torch.export reads the arguments' names
        return type(self.block).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:  # calibrate and torch.export ask what forward takes
        return inspect.signature(type(self.block).forward.__get__(self.block))

    def _made(self) -> Callable:
        names = {k: importlib.import_module(v) if k in self.modules else v for k, v in self.names.items()}
        exec(compile(self.source, f"<joined forward of {type(self.block).__name__}>", "exec"), names)
        return names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._function = self._made()


class Traced:
    """What a trace rested on: modules in their places, the children of containers, values of attributes."""

    def __init__(self, block: nn.Module, paths: list[str]):
        self.block = block
        self.places: list[tuple[nn.Module, str, nn.Module]] = []
        children = [f"{path}.input_fake_quant" for path in paths]
        for path in dict.fromkeys([*paths, *(path for path in children if _module_at(block, path) is not None)]):
            parent, _, name = path.rpartition(".")
            self.places.append((block.get_submodule(parent), name, block.get_submodule(path)))
        self.containers = [(module, list(module._modules)) for module in _containers(block)]
        if _is_sequential(block):
            self.containers.append((block, list(block._modules)))
        for container, names in self.containers:
            self.places += [(container, name, container._modules[name]) for name in names]
        read = () if _is_sequential(block) else attributes_read(block)
        self.places += [(block, name, module) for name, module in block.named_children() if name in read]
        self.settings = what_traces_rest_on(dict(block.named_modules(remove_duplicate=False)), paths)
        self.values = {name: getattr(block, name) for name in read if not isinstance(getattr(block, name), nn.Module)}

    def stands(self) -> bool:
        if any(getattr(self.block, name, None) != value for name, value in self.values.items()):
            return False
        if any(getattr(module, name, None) != value for module, name, value in self.settings):
            return False
        if any(list(container._modules) != names for container, names in self.containers):
            return False
        return not any(
            parent._modules.get(name) is not module or has_hooks(module) for parent, name, module in self.places
        )


def _module_at(block: nn.Module, path: str) -> nn.Module | None:
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent)._modules.get(name)


def fuse(model: nn.Module) -> list[str]:
    """Joins what can be joined in every block of ``model``.

    Returns:
        A line for each call: what was joined, and where its result goes.
    """
    inlined: set[int] = set()
    children = [id(child) for module in model.modules() for child in module._modules.values() if child is not None]
    shared = {child for child, places in Counter(children).items() if places > 1}
    for name, block in list(model.named_modules()):
        if id(block) in inlined or "forward" in block.__dict__ or not _may_be_block(block):
            continue
        if not _may_be_traced(block):
            continue
        try:
            graphs = [_Tracer().trace(_in_mode(block, training)) for training in (True, False)]
        except Exception:  # any Python in forward may raise anything on a proxy: the block stays as written
            continue
        sources = [graph.python_code("self").src for graph in graphs]
        if sources[0] != sources[1] or any(node.op == "get_attr" for node in graphs[0].nodes):
            continue
        _fuse_block(name, block, graphs[0], shared)
        if "forward" in block.__dict__:
            inlined |= {id(module) for module in _containers(block)}
    others = tie_inputs(model, shared, _refuse_differing_shares) + fuse_norms(model)
    return fused_rows(model) + others


def unfuse(model: nn.Module) -> None:
    """Every block's forward pass as it is written."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), (FusedForward, RmsNormForward)):
            del module.__dict__["forward"]
        if isinstance(module, QuantConvBn2d):
            module.readers = ()


def fused_rows(model: nn.Module) -> list[str]:
    """The lines of :func:`fuse`."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return [row for forward in forwards if isinstance(forward, FusedForward) for row in forward.rows]


# ---- tracing --------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Writes down an operation in place as what it is; torch.fx takes ``x += y`` for ``x = x + y``."""

    def _in_place(self, function: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    """Calls of modules are calls, but for nn.Sequential's, whose modules are."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not _is_sequential(module)


def _is_sequential(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and not has_hooks(module) and "forward" not in module.__dict__


def _is_container(module: nn.Module) -> bool:
    """Whether what it holds is called by the block around it."""
    uncalled = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward
    return uncalled or _is_sequential(module)


def _containers(block: nn.Module) -> Iterator[nn.Module]:
    """The modules under ``block`` whose children it calls itself."""
    for child in block.children():
        if _is_container(child):
            yield child
            yield from _containers(child)


def _may_be_block(block: nn.Module) -> bool:
    within = [block, *_containers(block)]
    return not isinstance(block, QuantConv2d) and any(
        isinstance(child, QuantConvBn2d) or reads_rows(child) for module in within for child in module.children()
    )


def _in_mode(block: nn.Module, training: bool) -> nn.Module:
    """``block`` for a trace in one mode: a shallow stand-in, since tracing calls no module."""
    replica = block.__class__.__new__(block.__class__)
    replica.__dict__.update(block.__dict__)
    replica.__dict__["training"] = training
    return replica


# ---- which blocks ---------------------------------------------------------------------------------------------------


def _may_be_traced(block: nn.Module) -> bool:
    """Whether the written forward pass does only what a graph shows: takes tensors, reads attributes, calls."""
    if _is_sequential(block):
        return True
    read = attributes_read(block)
    plain = (nn.Module, bool, int, float, str, tuple, type(None))
    return read is not None and "training" not in read and all(isinstance(getattr(block, n), plain) for n in read)


# In place: what reads the tensor later sees the change, wherever a call was moved to.
def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
    return in_place or node.target in operators or bool(node.kwargs.get("inplace"))


# ---- one block ------------------------------------------------------------------------------------------------------


def _fuse_block(name: str, block: nn.Module, graph: fx.Graph, elsewhere: set[int]) -> None:
    """Joins the calls of ``graph``; ``elsewhere``: ids of modules with several places in the model."""
    modules = dict(block.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {str(node.target) for node in calls if sum(modules[n.target] is modules[node.target] for n in calls) == 1}
    paths = [str(node.target) for node in calls]
    joined: dict[fx.Node, list[str]] = {}
    for node in reversed(calls):  # of two branches that an addition joins, the later one takes it
        layer = modules[node.target]
        if node.target in once and type(layer) is QuantConvBn2d and not node.kwargs and len(node.args) == 1:
            new, parts = _join(graph, node, modules)
            if new is not None:
                joined[new] = parts
    if any(_writes(node, modules) for node in graph.nodes if node.op.startswith("call")):
        return
    alone = {path for path in once if id(modules[path]) not in elsewhere and _of_block(path, modules)}
    shared = [text for node in list(graph.nodes) if (text := _share(graph, node, modules, joined, alone))]
    shared += [text for node in list(graph.nodes) if (text := join_before(graph, node, modules, alone))]
    rows = [_row(name, node, joined[node], modules) for node in graph.nodes if node in joined] + [
        f"{name}: {text}" if name else text for text in shared
    ]
    if not rows:
        return
    graph.lint()
    code = graph.python_code("self")
    block.register_load_state_dict_pre_hook(_refuse_differing_shares)
    block.__dict__["forward"] = FusedForward(block, code.src, dict(code.globals), Traced(block, paths), rows)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _join(graph: fx.Graph, conv: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node | None, list[str]]:
    """The call that stands for the convolution's and what follows it, and the names of that; None where nothing follows."""
    layer, chain, parts = modules[conv.target], [conv], []
    following = _only_user(conv)
    if following is not None and _is_placeholder_of(following, modules, layer):
        chain.append(following)
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
    if node.target in (operator.iadd, "add_") and first is not one:  # the other is what is written
        return None
    return None if first is second else second if first is one else first


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        module = modules[node.target]
        return None if has_hooks(module) else _MODULES.get(type(module))
    if node.op in ("call_function", "call_method") and len(node.args) == 1:
        return _FUNCTIONS.get(node.target) if set(node.kwargs) <= {"inplace"} else None
    return None


# ---- who reads a result ---------------------------------------------------------------------------------------------


def _of_block(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the block alone calls a module of this path, and no block between the two."""
    parts = path.split(".")
    return all(_is_container(modules[".".join(parts[:end])]) for end in range(1, len(parts)))


def _reads(node: fx.Node, value: fx.Node, modules: dict[str, nn.Module], alone: set[str]) -> bool:
    """Whether ``node`` calls a layer that fake-quantizes ``value`` and does nothing else with it."""
    if node.op != "call_module" or node.target not in alone or node.args != (value,) or value in node.kwargs.values():
        return False
    layer = modules[node.target]
    quantizes = isinstance(layer, QuantConv2d) and layer.input_fake_quant is not None
    return quantizes and not has_hooks(layer) and not has_hooks(layer.input_fake_quant)


def _share(
    graph: fx.Graph, value: fx.Node, modules: dict[str, nn.Module], joined: dict[fx.Node, list[str]], alone: set[str]
) -> str:
    """Gives the readers of ``value`` one fake-quantized form of it; says so, or "". A joined call makes it itself."""
    readers = [node for node in graph.nodes if node in value.users and _reads(node, value, modules, alone)]
    if not readers:
        return ""
    first = modules[readers[0].target].input_fake_quant
    readers = [node for node in readers if alike(first, modules[node.target].input_fake_quant)]
    by_call = value in joined and len(readers) == len(value.users)
    if len(readers) < 2 and not by_call:
        return ""
    if by_call and modules[value.target].readers:  # of another block that calls the layer too
        return ""
    tie([modules[node.target] for node in readers])
    for node in readers:
        node.kwargs = node.kwargs | {"quantized": True}
    names = ", ".join(str(node.target) for node in readers)
    learned = ", with one learned scale" if first.learnable and len(readers) > 1 else ""
    if by_call:
        modules[value.target].readers = (first,)
        value.kwargs = value.kwargs | {"quantize": True}
        joined[value] = [*joined[value], f"input of {names}{learned}"]
        return ""
    with graph.inserting_before(readers[0]):
        quantized = graph.call_module(f"{readers[0].target}.input_fake_quant", (value,), {"codes": True})
    for node in readers:
        node.args = (quantized,)
    return f"one fake-quantized input of {names}{learned}"


def _row(name: str, node: fx.Node, parts: list[str], modules: dict[str, nn.Module]) -> str:
    path = f"{name}.{node.target}" if name else str(node.target)
    return f"{path}: " + " + ".join(["batch norm", *parts])


# ---- loading what is shared -----------------------------------------------------------------------------------------


def differing_shares(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Lines on fake-quantizers that layers of ``model`` share and to which ``state`` gives two values."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FakeQuantize):
            places.setdefault(id(module), []).append(prefix + name)
    lines = []
    for first, *others in places.values():
        for other in others:
            pairs = [(state.get(f"{first}.{name}"), state.get(f"{other}.{name}")) for name in ("scale", "zero_point")]
            pairs = [(a, b) for a, b in pairs if a is not None and b is not None and not a.is_meta]
            if any(a.shape == b.shape and not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                lines.append(
                    f"{other}: expected the values of {first}, as prepare(fuse=True) made one fake-quantizer of both, got "
                    f"scale {pairs[0][1].flatten().tolist()} beside {pairs[0][0].flatten().tolist()} "
                    "(a model prepared without fuse takes them)"
                )
    return lines


def _refuse_differing_shares(
    block: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *names_and_errors: list[str]
) -> None:
    """Of load_state_dict: of two values for one scale the last would win."""
    names_and_errors[-1].extend(differing_shares(block, state, prefix))
