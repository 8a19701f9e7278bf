"""A pass for torch.compile: a norm or an activation and the rounding behind it become the operator that does both.

Of models whose blocks keep separate layers: those of a fused block are one operator to the compiler.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

__all__ = ["enable_inductor_pass", "fuse_roundings"]

_ops = torch.ops.quantrain
_ROUNDING = _ops.int8_quantize_rows.nearest
_MULTIPLY = (operator.mul, torch.mul, torch.Tensor.mul, "mul")

Made = tuple[Callable, tuple, dict[str, Any]]  # an operator with its arguments


def _argument(node: fx.Node, place: int, name: str, otherwise: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, otherwise)


def _last_dimension(node: fx.Node) -> bool:
    shape = _argument(node, 1, "normalized_shape")
    return isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 1


def _of_norm(node: fx.Node, factor: Any) -> Made | None:
    if not _last_dimension(node):
        return None
    x, weight = node.args[0], _argument(node, 2, "weight")
    if node.target is F.layer_norm:
        bias, eps = _argument(node, 3, "bias"), _argument(node, 4, "eps", 1e-5)
        return _ops.int8_layer_norm.default, (x, weight, bias, eps), {"column_factor": factor}
    eps = _argument(node, 3, "eps")
    return None if eps is None else (_ops.int8_rms_norm.default, (x, weight, eps), {"column_factor": factor})


def _of_activation(node: fx.Node, factor: Any) -> Made | None:
    if node.target is F.relu:
        return _ops.int8_relu.default, (node.args[0],), {"column_factor": factor}
    approximate = node.kwargs.get("approximate", "none")
    return _ops.int8_gelu.default, (node.args[0],), {"approximate": approximate, "column_factor": factor}


def _of_product(node: fx.Node, factor: Any) -> Made | None:
    """silu(gate) times up, either way round."""
    if len(node.args) != 2:
        return None
    for gate, up in (node.args, node.args[::-1]):
        if isinstance(gate, fx.Node) and gate.target is F.silu and isinstance(up, fx.Node) and len(gate.users) == 1:
            return _ops.int8_silu_mul.default, (gate.args[0], up), {"column_factor": factor}
    return None


def _replacement(source: Any, factor: Any) -> Made | None:
    if not isinstance(source, fx.Node):
        return None
    if source.op == "call_function" and source.target in (F.layer_norm, F.rms_norm):
        return _of_norm(source, factor)
    if source.op == "call_function" and source.target in (F.gelu, F.relu):
        return _of_activation(source, factor)
    if source.op in ("call_function", "call_method") and source.target in _MULTIPLY:
        return _of_product(source, factor)
    return None


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _keeps_type(source: fx.Node, arguments: tuple) -> bool:
    """Whether the operator reads what it gives: under autocast a norm is in float32."""
    given, first = _value(source), _value(arguments[0])
    return isinstance(given, torch.Tensor) and isinstance(first, torch.Tensor) and given.dtype == first.dtype


def fuse_roundings(graph: fx.Graph) -> int:
    """Changes a graph of PyTorch's functions as dynamo records it; how many roundings are left out or joined.

    Layers that round one tensor share its codes. A norm or an activation that nothing but roundings reads goes into them.

    >>> fuse_roundings(fx.symbolic_trace(torch.nn.Linear(2, 2)).graph)
    0
    """
    changed, first_of = 0, {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _ROUNDING:
            continue
        factor = node.kwargs.get("column_factor")
        key = (node.args[0], factor)
        if key in first_of:
            node.replace_all_uses_with(first_of[key])
            graph.erase_node(node)
            changed += 1
        else:
            first_of[key] = node
    for (source, factor), node in first_of.items():
        made = _replacement(source, factor)
        if made is None or len(source.users) > 1 or not _keeps_type(source, made[1]):
            continue
        with graph.inserting_before(node):
            fused = graph.call_function(*made)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        changed += 1
    if changed:
        graph.eliminate_dead_code()
        graph.lint()
    return changed


def enable_inductor_pass(enabled: bool = True) -> None:
    """Lets ``torch.compile`` call :func:`fuse_roundings` on what it compiles from now on, before its own passes.

    A pass that is registered there already runs first and stays.

    >>> enable_inductor_pass()
    >>> enable_inductor_pass(False)
    """
    from torch._inductor import config

    present = config.pre_grad_custom_pass
    if isinstance(present, _Chained):
        present = present.first
    config.pre_grad_custom_pass = _Chained(present) if enabled else present


class _Chained:
    """Another's pass, then ours."""

    def __init__(self, first: Callable[[fx.Graph], Any] | None) -> None:
        self.first = first

    def __call__(self, graph: fx.Graph) -> None:
        if self.first is not None:
            self.first(graph)
        fuse_roundings(graph)

    def uuid(self) -> str:
        """Of the cache of compiled programs."""
        return "quantrain.fuse_roundings.1"
