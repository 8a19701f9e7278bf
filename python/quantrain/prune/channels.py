"""Channels of a traced model: who makes them, who reads them, and which of them have to go together.

torch.fx gives the graph, one run of it the shapes. A value's layout says which of its dimension holds channels, and of
which groups, one after the other, each channel as ``width`` neighbours (a flattened image has as many as pixels). A
group that something else depends on, the model's output, a norm over channels, an operation that is not known here, is
fixed, with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantrain.nn.calibrate import evaluating
from quantrain.nn.graph import symbolic_graph
from quantrain.nn.prepare import some

from .cuts import Group, Part

__all__ = ["Channels", "trace_channels"]

_LINEAR = (nn.Linear,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NOT_BY_ELEMENT = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention, nn.PReLU)
_BY_CHANNEL_MODULES = ("activation", "dropout", "pooling", "padding", "upsampling")  # of torch.nn.modules
_NAMES_BY_CHANNEL = """
    relu relu_ relu6 gelu silu mish elu selu celu leaky_relu leaky_relu_ sigmoid sigmoid_ tanh tanh_ hardtanh hardswish
    hardsigmoid softplus logsigmoid softsign clamp clamp_ clip clamp_min clamp_max exp log sqrt rsqrt abs neg square pow sign
    dropout dropout2d dropout3d feature_dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d interpolate upsample contiguous clone detach to float half bfloat16 double type type_as cpu cuda
    stochastic_depth
"""
_NAMES_OF_JOINS = "add add_ iadd sub sub_ isub mul mul_ imul div div_ truediv itruediv maximum minimum"
_BY_CHANNEL = frozenset(_NAMES_BY_CHANNEL.split())  # functions and methods that leave each channel to itself
_JOINS = frozenset(_NAMES_OF_JOINS.split())
_RESHAPES = {"flatten", "view", "reshape", "view_as", "reshape_as", "squeeze", "unsqueeze"}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_READS_SIZES = {"size", "dim", "getattr", "numel", "stride"}


@dataclass(eq=False)
class Space:
    """Channels that were found to be one another's; ``fixed``: why they stay, or ""; ``joins``: what joined them."""

    group: Group
    fixed: str = ""
    joins: list[str] = field(default_factory=list)
    merged: Space | None = None

    def root(self) -> Space:
        space = self
        while space.merged is not None:
            space = space.merged
        return space


@dataclass(frozen=True)
class Layout:
    """``parts``: (channels, neighbours per channel), one after the other along dimension ``dim``."""

    dim: int
    parts: tuple[tuple[Space, int], ...]

    def widened(self, factor: int) -> Layout:
        return replace(self, parts=tuple((space, width * factor) for space, width in self.parts))

    def places(self, module: nn.Module, name: str, dim: int, factor: int = 1) -> list[tuple[Space, Part]]:
        """Where a tensor with an entry (or ``factor``) per element of this dimension has each space's."""
        found, start = [], 0
        for space, width in self.parts:
            found.append((space, Part(module, name, dim, start, width * factor)))
            start += space.root().group.size * width * factor
        return found


@dataclass
class Channels:
    """``free``: groups that can be cut; ``fixed``: producer's name -> why its channels stay."""

    free: list[Group] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)


def trace_channels(op: str, model: nn.Module, arguments: Sequence[Any] | Mapping[str, Any]) -> Channels:
    """The groups of a model, traced in evaluation mode, or in training where that calls more modules (auxiliary heads).

    Raises:
        ValueError: a model that torch.fx cannot trace.
    """
    try:
        graph = symbolic_graph(model, training=False)
    except Exception as error:  # forward may raise anything on a proxy
        raise ValueError(
            f"{op}: expected a model that torch.fx can trace, got {type(error).__name__}: {_first_line(error)}"
        ) from error
    with contextlib.suppress(Exception):  # as above; evaluation is what counts then
        wider = symbolic_graph(model, training=True)
        graph = wider if _called(wider) > _called(graph) else graph
    with evaluating(model), torch.no_grad():
        shapes = _shapes(model, graph, arguments)
    return _Walk(model, graph, shapes).channels()


def _shapes(
    model: nn.Module, graph: fx.Graph, arguments: Sequence[Any] | Mapping[str, Any]
) -> dict[fx.Node, torch.Size]:
    """The shape of every tensor that a run of the graph makes."""
    found: dict[fx.Node, torch.Size] = {}

    class Run(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, Tensor):
                found[node] = value.shape
            return value

    places = [node for node in graph.nodes if node.op == "placeholder"]
    if isinstance(arguments, Mapping):
        defaults = {str(node.target): node.args[0] if node.args else None for node in places}
        given = [arguments.get(name, default) for name, default in defaults.items()]
    else:
        given = list(arguments)[: len(places)]
    Run(fx.GraphModule(model, graph)).run(*given)
    return found


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else ""


class _Walk:
    """Goes through a graph once, in order."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: Mapping[fx.Node, torch.Size]):
        self.graph, self.shapes = graph, shapes
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.layouts: dict[fx.Node, Layout | None] = {}
        self.spaces: list[Space] = []
        self.made_in_order: list[str] = []  # names of the layers that make channels
        self.made: dict[int, Space] = {}  # a module's output
        self.read: dict[int, Layout | None] = {}  # its input
        for node in graph.nodes:
            self.layouts[node] = self._layout(node)

    def channels(self) -> Channels:
        found = Channels()
        order = {name: place for place, name in enumerate(self.made_in_order)}
        for space in self.spaces:
            if space.merged is not None:
                continue
            group = space.group
            group.names.sort(key=order.__getitem__)
            reason = space.fixed or ("" if group.consumers else "nothing reads them by columns")
            if reason:
                found.fixed |= {name: self._told(name, reason, space) for name in group.names}
            else:
                found.free.append(group)
        return found

    def _told(self, name: str, reason: str, space: Space) -> str:
        others = [repr(other) for other in space.group.names if other != name]
        if not others:
            return reason
        return f"{reason}; {space.joins[0]} joins them with those of {some(others)}"

    # ---- nodes ----

    def _layout(self, node: fx.Node) -> Layout | None:
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            self._fix_all(node, "they are the model's output")
            return None
        if node.op == "call_module":
            return self._of_module(node, self.modules[str(node.target)])
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
        return self._of_function(node, str(name))

    def _of_module(self, node: fx.Node, module: nn.Module) -> Layout | None:
        layout = self._first(node)
        if node not in self.shapes:  # several tensors
            return self._unknown(node, f"{type(module).__name__} '{node.target}' reads them")
        if isinstance(module, _LINEAR):
            return self._product(node, module, layout, columns=1, rows=0, dim=len(self._shape(node)) - 1)
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
            return self._convolution(node, module, layout)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return self._norm(node, module, layout)
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            self._follow(layout, module, ("weight",))
            return self._same(node, layout)
        if isinstance(module, (nn.Identity, nn.Flatten)):
            return self._reshaped(node, layout)
        kind = type(module).__module__.rpartition(".")[2]
        if kind in _BY_CHANNEL_MODULES and not isinstance(module, _NOT_BY_ELEMENT) or isinstance(module, nn.PReLU):
            return self._same(node, layout)
        return self._unknown(node, f"{type(module).__name__} '{node.target}' reads them")

    def _of_function(self, node: fx.Node, name: str) -> Layout | None:
        layout = self._first(node)
        if name in _READS_SIZES:
            return None
        if node not in self.shapes:  # several tensors, or none
            return self._unknown(node, f"{self._where(node, name)} reads them")
        if name in _BY_CHANNEL:
            return self._same(node, layout)
        if name in _JOINS:
            return self._joined(node)
        if name in _RESHAPES:
            return self._reshaped(node, layout)
        if name in _REDUCTIONS:
            return self._reduced(node, layout)
        if name in ("cat", "concat", "concatenate"):
            return self._concatenated(node)
        if name in ("permute", "transpose"):
            return self._permuted(node, name, layout)
        if name == "getitem":
            return self._item(node, layout)
        if name == "pad":
            return self._padded(node, layout)
        return self._unknown(node, f"{self._where(node, name)} reads them")

    # ---- layers ----

    def _product(
        self, node: fx.Node, module: nn.Module, layout: Layout | None, *, columns: int, rows: int, dim: int
    ) -> Layout | None:
        """A layer that reads channels by columns and makes new ones by rows."""
        where = f"{type(module).__name__} '{node.target}'"
        if layout is not None and layout.dim != dim:
            self._fix(layout, f"{where} reads them along another dimension")
            layout = None
        if not _plain(module):
            self._fix(layout, f"the weight of {where} is computed")
        self._read_by(node, module, layout, columns)
        return self._made_by(node, module, rows, dim)

    def _read_by(self, node: fx.Node, module: nn.Module, layout: Layout | None, columns: int) -> None:
        if id(module) in self.read:  # called again
            self._unify(self.read[id(module)], layout, f"a second call of '{node.target}'")
            return
        self.read[id(module)] = layout
        if layout is not None:
            for space, part in layout.places(module, "weight", columns):
                space.root().group.consumers.append(part)

    def _made_by(self, node: fx.Node, module: nn.Module, rows: int, dim: int) -> Layout:
        space = self.made.get(id(module))
        if space is None:
            size = module.weight.shape[rows] * (getattr(module, "groups", 1) if rows == 1 else 1)
            group = Group([str(node.target)], size, producers=[Part(module, "weight", rows)])
            if module.bias is not None:
                group.followers.append(Part(module, "bias", 0))
            space = self.made[id(module)] = Space(group)
            self.spaces.append(space)
            self.made_in_order.append(str(node.target))
            if not _plain(module):
                space.fixed = f"the weight of '{node.target}' is computed"
        return Layout(dim, ((space, 1),))

    def _convolution(self, node: fx.Node, module: nn.Module, layout: Layout | None) -> Layout | None:
        spatial = len(module.kernel_size)
        if len(self._shape(node)) != spatial + 2:
            return self._unknown(node, f"'{node.target}' is called without a batch")
        transposed = isinstance(module, _TRANSPOSED)
        if module.groups == 1:
            columns, rows = (0, 1) if transposed else (1, 0)
            return self._product(node, module, layout, columns=columns, rows=rows, dim=1)
        if module.groups == module.in_channels and not transposed and _plain(module):
            if layout is None or layout.dim != 1:  # depthwise on what cannot be cut
                self._fix(layout, f"'{node.target}' reads them along another dimension")
                return None
            multiplier = module.out_channels // module.groups
            names = ("weight", "bias") if id(module) not in self.read else ()
            if not names:
                self._unify(self.read[id(module)], layout, f"a second call of '{node.target}'")
            self.read[id(module)] = layout
            self._follow(layout, module, names, multiplier)
            return layout.widened(multiplier)
        self._fix(layout, f"the grouped convolution '{node.target}' reads them")
        made = self._made_by(node, module, 1 if transposed else 0, 1)
        self._fix(made, "a grouped convolution makes them")
        return made

    def _norm(self, node: fx.Node, module: nn.Module, layout: Layout | None) -> Layout | None:
        if layout is not None and layout.dim != 1:
            return self._unknown(node, f"{type(module).__name__} '{node.target}' reads them along another dimension")
        if id(module) in self.read:
            self._unify(self.read[id(module)], layout, f"a second call of '{node.target}'")
        else:
            self._follow(layout, module, ("weight", "bias", "running_mean", "running_var"))
        self.read[id(module)] = layout
        return self._same(node, layout)

    def _follow(self, layout: Layout | None, module: nn.Module, names: Sequence[str], factor: int = 1) -> None:
        """An entry per channel goes with it."""
        for name in names if layout is not None else ():
            if getattr(module, name, None) is not None:
                for space, part in layout.places(module, name, 0, factor):
                    space.root().group.followers.append(part)

    # ---- operations ----

    def _same(self, node: fx.Node, layout: Layout | None) -> Layout | None:
        """What keeps every channel where it is."""
        if layout is None:
            return None
        source, shape = self._shape(self._tensors(node)[0]), self._shape(node)
        if len(shape) != len(source) or shape[layout.dim] != source[layout.dim]:
            return self._unknown(node, f"{self._where(node)} changes how many there are")
        return layout

    def _joined(self, node: fx.Node) -> Layout | None:
        """Element by element: channels of both go together; a single one, or a number, is for all."""
        tensors = [argument for argument in self._tensors(node) if argument in self.shapes]
        shape = self._shape(node)
        result: Layout | None = None
        others = False  # has channels that cannot be cut
        for tensor in tensors:
            layout, own = self.layouts.get(tensor), self._shape(tensor)
            if layout is not None:
                layout = replace(layout, dim=layout.dim + len(shape) - len(own))
                if result is None:
                    result = layout
                else:
                    self._unify(result, layout, self._where(node))
            elif any(size != 1 for size in own):
                others = True
        if result is None:
            return None
        if others:
            for tensor in tensors:
                own = self._shape(tensor)
                place = result.dim - len(shape) + len(own)
                if self.layouts.get(tensor) is None and place >= 0 and own[place] != 1:
                    self._fix_all(node, f"{self._where(node)} joins them with what cannot be cut")
        if shape[result.dim] != sum(space.root().group.size * width for space, width in result.parts):
            return self._unknown(node, f"{self._where(node)} spreads them")
        return result

    def _reshaped(self, node: fx.Node, layout: Layout | None) -> Layout | None:
        """Flattened, or dimensions of other things changed: told from the shapes."""
        if layout is None:
            return None
        old, new, dim = self._shape(self._tensors(node)[0]), self._shape(node), layout.dim
        if old == new:
            return layout
        behind = old[dim + 1 :].numel()
        if new[:dim] == old[:dim] and len(new) == dim + 1 and new[dim] == old[dim] * behind:
            return layout.widened(behind)
        if new[: dim + 1] == old[: dim + 1]:
            return layout
        if len(new) > 0 and new[-1] == old[dim] and dim == len(old) - 1:  # what lies before was reshaped
            return replace(layout, dim=len(new) - 1)
        return self._unknown(node, f"{self._where(node)} reshapes them")

    def _reduced(self, node: fx.Node, layout: Layout | None) -> Layout | None:
        if layout is None:
            return None
        old, new = self._shape(self._tensors(node)[0]), self._shape(node)
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
            return self._unknown(node, f"{self._where(node)} sums over them")
        gone = {dim % len(old) for dim in dims}
        if layout.dim in gone:
            return self._unknown(node, f"{self._where(node)} sums over them")
        if len(new) == len(old):
            return layout
        return replace(layout, dim=layout.dim - sum(dim < layout.dim for dim in gone))

    def _concatenated(self, node: fx.Node) -> Layout | None:
        tensors = self._tensors(node)
        layouts = [self.layouts.get(tensor) for tensor in tensors]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        known = [layout for layout in layouts if layout is not None]
        if not known:
            return None
        if not isinstance(dim, int) or len(known) != len(layouts) or len({layout.dim for layout in known}) > 1:
            return self._unknown(node, f"{self._where(node)} puts them beside what cannot be cut")
        if dim % len(self._shape(node)) == known[0].dim:
            return Layout(known[0].dim, tuple(part for layout in known for part in layout.parts))
        for layout in known[1:]:
            self._unify(known[0], layout, self._where(node))
        return known[0]

    def _permuted(self, node: fx.Node, name: str, layout: Layout | None) -> Layout | None:
        if layout is None:
            return None
        rank = len(self._shape(node))
        given = node.args[1:] if len(node.args) > 1 else tuple(node.kwargs.values())
        order = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
        if not all(isinstance(dim, int) for dim in order):
            return self._unknown(node, f"{self._where(node)} reorders them")
        if name == "transpose":
            first, second = (dim % rank for dim in order)
            order = list(range(rank))
            order[first], order[second] = second, first
        return replace(layout, dim=[dim % rank for dim in order].index(layout.dim))

    def _item(self, node: fx.Node, layout: Layout | None) -> Layout | None:
        if node.args[0] not in self.shapes:
            return None
        if layout is None:
            return None
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        rank = len(self._shape(node.args[0]))
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = (*index[:at], *[slice(None)] * (rank + 1 - len(index)), *index[at + 1 :])
        plain = all(isinstance(item, (int, slice)) for item in index)
        if not plain or (layout.dim < len(index) and index[layout.dim] != slice(None)):
            return self._unknown(node, f"{self._where(node)} picks some of them")
        return replace(layout, dim=layout.dim - sum(isinstance(item, int) for item in index[: layout.dim]))

    def _padded(self, node: fx.Node, layout: Layout | None) -> Layout | None:
        if layout is None:
            return None
        shape, source = self._shape(node), self._shape(self._tensors(node)[0])
        if shape[layout.dim] != source[layout.dim]:
            return self._unknown(node, f"{self._where(node)} pads them with others")
        return layout

    def _unknown(self, node: fx.Node, reason: str) -> None:
        self._fix_all(node, reason)
        return None

    # ---- groups ----

    def _fix_all(self, node: fx.Node, reason: str) -> None:
        for argument in node.all_input_nodes:
            self._fix(self.layouts.get(argument), reason)

    def _fix(self, layout: Layout | None, reason: str) -> None:
        for space, _ in layout.parts if layout is not None else ():
            space.root().fixed = space.root().fixed or reason

    def _unify(self, one: Layout | None, other: Layout | None, where: str) -> None:
        """Both go together: merged where they are laid out alike, else fixed."""
        if one is None or other is None:
            self._fix(one, f"{where} joins them with what cannot be cut")
            self._fix(other, f"{where} joins them with what cannot be cut")
            return
        alike = one.dim == other.dim and [(s.root().group.size, w) for s, w in one.parts] == [
            (s.root().group.size, w) for s, w in other.parts
        ]
        if not alike:
            self._fix(one, f"{where} joins them with channels that lie otherwise")
            self._fix(other, f"{where} joins them with channels that lie otherwise")
            return
        for (first, _), (second, _) in zip(one.parts, other.parts, strict=True):
            self._merge(first.root(), second.root(), where)

    def _merge(self, one: Space, other: Space, where: str) -> None:
        if one is other:
            return
        for name in ("names", "producers", "followers", "consumers"):
            getattr(one.group, name).extend(getattr(other.group, name))
        one.fixed = one.fixed or other.fixed
        one.joins = [*other.joins, *one.joins, where]
        other.merged = one

    # ---- helpers ----

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        return [argument for argument in node.all_input_nodes if argument in self.shapes]

    def _first(self, node: fx.Node) -> Layout | None:
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        return self.layouts.get(first) if isinstance(first, fx.Node) else None

    def _shape(self, node: fx.Node) -> torch.Size:
        return self.shapes[node]

    def _where(self, node: fx.Node, name: str = "") -> str:
        """An operation and the module whose forward pass it is in."""
        kind = name or (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = str(stack[-1][0]) if stack else ""
        operation = {"add": "the addition", "iadd": "the addition", "add_": "the addition"}.get(kind, f"'{kind}'")
        return f"{operation} in '{inside}'" if inside else operation


def _plain(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)
