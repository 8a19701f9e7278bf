"""Joins what lies before linear layers: a norm, an activation or a gate and the rounding of their input.

In blocks that torch.fx shows whole (:mod:`quantrain.nn.fuse`)

    layer norm | rms norm | gelu | silu | relu | silu(a) * b  ->  the input of linear layers, and of nothing else

is one call of the first layer's ``input_fake_quant``, which goes over memory once (:func:`quantrain.norm_act_fake_quantize`).

In all others, attention above all, layers that a forward pass calls with one name, as ``self.q_proj(x)`` and ``self.k_proj(x)``, share
one ``input_fake_quant``: the tensor is rounded for the first and handed to the others, where it is the same tensor when they run. And
modules that are an RMS norm run PyTorch's fused one.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .fake_quantize import Before, FakeQuantize, has_hooks
from .layers import QuantLayer, QuantLinear, QuantTransposedLinear

__all__ = ["RmsNormForward", "fuse_norms", "join_before", "reads_rows", "tie_inputs"]

_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", "relu": "relu"}
# Activations of transformers, which are modules of their own.
_BY_NAME = {
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}
_PRODUCTS = (operator.mul, torch.mul, "mul")


def reads_rows(layer: nn.Module) -> bool:
    """Whether it is a linear layer that rounds its input by its own fake-quantizer."""
    if type(layer) not in (QuantLinear, QuantTransposedLinear) or layer.input_fake_quant is None:
        return False
    return not has_hooks(layer) and not has_hooks(layer.input_fake_quant)


# ---- blocks that a graph shows --------------------------------------------------------------------------------------


def join_before(graph: fx.Graph, value: fx.Node, modules: dict[str, nn.Module], once: set[str]) -> str:
    """Rounds ``value`` once for the linear layers that read it, together with what makes it where they are all that do.

    Returns:
        What was joined, or "".
    """
    users = list(value.users)
    readers = [n for n in users if n.op == "call_module" and n.target in once and n.args == (value,) and not n.kwargs]
    readers = [n for n in graph.nodes if n in readers and reads_rows(modules[n.target])]
    if not readers:
        return ""
    first = modules[readers[0].target].input_fake_quant
    readers = [n for n in readers if alike(first, modules[n.target].input_fake_quant)]
    if first.learnable:  # its gradient needs the unrounded tensor; and two parameters stay two
        return ""
    source = _source(value, modules) if len(readers) == len(users) else None
    if source is None and len(readers) < 2:
        return ""
    tie([modules[n.target] for n in readers])
    names = ", ".join(str(n.target) for n in readers)
    function, x, other, norm, chain = source or ("identity", value, None, None, [])
    with graph.inserting_before(readers[0]):
        options = {} if other is None else {"other": other}
        if norm is not None:
            options["norm"] = graph.get_attr(norm)
        before = graph.call_function(Before, (function,), options)
        rounded = graph.call_module(f"{readers[0].target}.input_fake_quant", (x,), {"before": before})
    for node in readers:
        node.args, node.kwargs = (rounded,), {"quantized": True}
    for node in chain:
        graph.erase_node(node)
    return f"{function.replace('_', ' ')} + input of {names}" if source else f"one fake-quantized input of {names}"


def _source(
    value: fx.Node, modules: dict[str, nn.Module]
) -> tuple[str, fx.Node, fx.Node | None, str | None, list[fx.Node]] | None:
    """What makes ``value`` and can be joined: its function, input, second factor, norm's path, and the nodes it replaces."""
    chain = [value]
    while _passes(chain[-1], modules):
        below = chain[-1].args[0]
        if len(below.users) > 1:
            return None
        chain.append(below)
    node = chain[-1]
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        module = modules[node.target]
        kind = None if has_hooks(module) else _norm_kind(module)
        if kind is not None:
            return kind, node.args[0], None, str(node.target), chain
    kind = _function(node, modules)
    if kind is not None:
        return kind, node.args[0], None, None, chain
    if (
        node.op in ("call_function", "call_method")
        and node.target in _PRODUCTS
        and len(node.args) == 2
        and not node.kwargs
    ):
        for gate, other in (node.args, node.args[::-1]):
            both = isinstance(gate, fx.Node) and isinstance(other, fx.Node) and gate is not other
            if both and len(gate.users) == 1 and _function(gate, modules) == "silu":
                return "silu_mul", gate.args[0], other, None, [*chain, gate]
    return None


def _passes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A dropout of probability 0."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = modules[node.target]
    return type(module) is nn.Dropout and module.p == 0 and not has_hooks(module)


def _function(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        module = modules[node.target]
        if has_hooks(module) or len(node.args) != 1 or node.kwargs:
            return None
        if type(module) is nn.GELU:
            return "gelu_tanh" if module.approximate == "tanh" else "gelu"
        if type(module).__name__ == "GELUActivation" and type(module).__module__.startswith("transformers."):
            return "gelu" if getattr(module, "act", None) is F.gelu else None
        ours = type(module).__module__.startswith("transformers.")
        return _MODULES.get(type(module)) or (_BY_NAME.get(type(module).__name__) if ours else None)
    if node.op not in ("call_function", "call_method") or len(node.args) != 1:
        return None
    if node.target is F.gelu and set(node.kwargs) <= {"approximate"}:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    return _FUNCTIONS.get(node.target) if set(node.kwargs) <= {"inplace"} else None


def _norm_kind(module: nn.Module) -> str | None:
    if "forward" in module.__dict__ and not isinstance(module.forward, RmsNormForward):
        return None
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return "layer_norm"
    if type(module) is nn.RMSNorm and len(module.normalized_shape) == 1 and module.eps is not None:
        return "rms_norm"
    return None


def what_traces_rest_on(modules: dict[str, nn.Module], paths: list[str]) -> list[tuple[nn.Module, str, Any]]:
    """Attributes of called modules that decided what was joined, and their values."""
    found: list[tuple[nn.Module, str, Any]] = []
    for path in paths:
        module = modules[path]
        for name in ("p", "approximate", "normalized_shape", "act"):
            if name in module.__dict__:
                found.append((module, name, module.__dict__[name]))
        if isinstance(module, QuantLayer):
            found.append((module, "second_derivatives", False))
    return found


# ---- others ---------------------------------------------------------------------------------------------------------


def tie(layers: list[nn.Module]) -> None:
    """Gives the layers the first one's ``input_fake_quant``; it knows them."""
    first = layers[0].input_fake_quant
    if len(layers) > 1:
        first.readers = len(layers)
        for place, layer in enumerate(layers):
            layer.input_fake_quant, layer.reader = first, place


def alike(one: FakeQuantize, other: FakeQuantize) -> bool:
    """Whether one may stand for both: the same spec and the same state, learned by both or by neither."""
    if one.spec != other.spec or one.fake_quant_enabled != other.fake_quant_enabled:
        return False
    if one.learnable and one.scale.requires_grad != other.scale.requires_grad:
        return False
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def tie_inputs(model: nn.Module, elsewhere: set[int], check_load: Callable) -> list[str]:
    """Ties the inputs of layers that a written forward pass calls with one name.

    Args:
        elsewhere: ids of modules with several places in the model.
        check_load: a pre-hook of load_state_dict for the modules that hold them.
    """
    rows: list[str] = []
    for path, module in model.named_modules():
        if "forward" in module.__dict__ or isinstance(module, (QuantLinear, QuantTransposedLinear)):
            continue
        children = module.named_children()
        layers = {name: child for name, child in children if reads_rows(child) and id(child) not in elsewhere}
        for names in _called_alike(type(module), layers) if len(layers) > 1 else ():
            group = [layers[name] for name in names]
            first = group[0].input_fake_quant
            tied = [layer for layer in group if alike(first, layer.input_fake_quant)]
            if len(tied) < 2 or first.learnable or any(layer.input_fake_quant.readers for layer in tied):
                continue
            tie(tied)
            module.register_load_state_dict_pre_hook(check_load)
            shown = ", ".join(name for name in names if layers[name] in tied)
            rows.append(f"{path + ': ' if path else ''}one fake-quantized input of {shown}")
    return rows


def _called_alike(cls: type[nn.Module], layers: dict[str, nn.Module]) -> list[list[str]]:
    """Names of layers that ``cls.forward`` calls, as ``self.name(x)``, with one variable that is not assigned in between.

    All of them or none run: they stand in the same branches.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return []
    if not isinstance(tree.body[0], ast.FunctionDef) or not tree.body[0].args.args:
        return []
    self_name = tree.body[0].args.args[0].arg
    groups: list[list[str]] = []
    open_groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for node, branches in _in_order(tree.body[0], ()):
        changed = _changed(node)
        open_groups = {key: group for key, group in open_groups.items() if key[0] != changed}
        if not isinstance(node, ast.Call):
            continue
        called, argument = node.func, node.args[0] if len(node.args) == 1 and not node.keywords else None
        of_self = (
            isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == self_name
        )
        if of_self and isinstance(argument, ast.Name) and called.attr in layers:
            key = (argument.id, branches)
            if key not in open_groups:
                groups.append(open_groups.setdefault(key, []))
            open_groups[key].append(called.attr)
    once = [name for group in groups for name in group]
    return [group for group in groups if len(group) > 1 and all(once.count(name) == 1 for name in group)]


def _changed(node: ast.AST) -> str | None:
    """The variable that ``node`` assigns or writes into: ``x = ...``, ``x[i] = ...``, ``x.add_(...)``."""
    if isinstance(node, ast.Name):
        return None if isinstance(node.ctx, ast.Load) else node.id
    if isinstance(node, ast.Subscript):
        of = node.value if not isinstance(node.ctx, ast.Load) else None
    else:
        in_place = isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_")
        of = node.func.value if in_place else None
    return of.id if isinstance(of, ast.Name) else None


# Of what need not run, or not once, the parts that do whenever the whole does.
_BRANCHES = {
    ast.If: ("test",),
    ast.IfExp: ("test",),
    ast.For: ("iter",),
    ast.While: (),
    ast.Try: (),
    ast.Match: ("subject",),
    ast.BoolOp: (),
    ast.Lambda: (),
    ast.FunctionDef: (),
    ast.ListComp: (),
    ast.SetComp: (),
    ast.DictComp: (),
    ast.GeneratorExp: (),
}


def _in_order(
    node: ast.AST, branches: tuple[int, ...]
) -> Iterator[tuple[ast.Name | ast.Subscript | ast.Call, tuple[int, ...]]]:
    """The names, subscripts and calls under ``node`` as they are evaluated, an assignment's targets after its value, each with the
    branches that it stands in."""
    always = _BRANCHES.get(type(node))
    fields = list(ast.iter_fields(node))
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For)):
        fields.sort(key=lambda field: field[0] in ("target", "targets", "body", "orelse"))
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        fields.reverse()
    if isinstance(node, ast.IfExp):
        fields.sort(key=lambda field: field[0] != "test")
    for name, value in fields:
        inside = branches if always is None or name in always else (*branches, hash((id(node), name)))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _in_order(child, inside)
    if isinstance(node, (ast.Name, ast.Subscript, ast.Call)):
        yield node, branches


class RmsNormForward:
    """The forward pass of a module that is an RMS norm, by PyTorch's fused operator; the written one where types are mixed."""

    def __init__(self, norm: nn.Module, eps: float):
        self.norm, self.eps = norm, eps

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self.norm.weight
        if hidden_states.dtype != weight.dtype or getattr(self.norm, _eps_name(self.norm)) != self.eps:
            return type(self.norm).forward(self.norm, hidden_states)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps)

    @property
    def __code__(self) -> CodeType:  # torch.export reads the arguments' names
        return type(self.norm).forward.__code__


def fuse_norms(model: nn.Module) -> list[str]:
    """Lets modules that compute x weight / sqrt(mean(x^2) + eps) run PyTorch's fused operator. Which do is tried out."""
    rows: list[str] = []
    verdicts: dict[tuple[type, float], bool] = {}
    for path, module in model.named_modules():
        eps = getattr(module, _eps_name(module), None)
        if "RMSNorm" not in type(module).__name__ or isinstance(module, nn.RMSNorm) or not isinstance(eps, float):
            continue
        alone = list(module._parameters) == ["weight"] and not module._buffers and not module._modules
        if not alone or module.weight is None or module.weight.dim() != 1 or "forward" in module.__dict__:
            continue
        if list(inspect.signature(type(module).forward).parameters)[1:] != ["hidden_states"]:
            continue
        key = (type(module), eps)
        if key not in verdicts:
            verdicts[key] = _is_rms_norm(module, eps)
        if verdicts[key]:
            module.__dict__["forward"] = RmsNormForward(module, eps)
            rows.append(f"{path}: rms norm as one operator")
    return rows


def _eps_name(module: nn.Module) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


@torch.no_grad()
def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    """Compares on drawn input and weight, in float32 on the CPU; the random state stays as it was."""
    replica = type(module).__new__(type(module))
    replica.__dict__.update(module.__dict__)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(module.weight.shape, generator=generator) + 0.5
    replica._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    x = torch.randn(4, weight.shape[0], generator=generator) * torch.tensor([[1e-3], [1.0], [30.0], [0.0]])
    try:
        found = replica.forward(x)
    except Exception:  # a forward pass may raise anything here: the module stays as it is
        return False
    same = isinstance(found, Tensor) and found.shape == x.shape and found.dtype == x.dtype
    return same and torch.allclose(found, F.rms_norm(x, weight.shape, weight, eps), rtol=1e-5, atol=1e-6)
