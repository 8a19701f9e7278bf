"""A traced model as steps of a fixed-point network: what has an integer form, in which order, in whose units."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..graph import symbolic_graph
from ..weight_hooks import unknown_weight
from .layers import no_integer_convolution

__all__ = ["PASSES", "PRODUCTS", "Sharing", "Step", "maker_of", "read_steps"]


@dataclass
class Step:
    """One operation of a network, read from a traced model, with what follows it and belongs to it.

    op: "input", "conv2d", "linear", "add", "max_pool2d", "avg_pool2d", "slice_pad" or "flatten".
    inputs: names of the steps read; a second one of a conv2d or linear is the residual.
    relu: None (signed codes), or the largest value of the ReLU (inf, 6).
    quantizes: the output is codes; else accumulators.
    """

    name: str
    op: str
    inputs: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    bn: str = ""
    relu: float | None = None
    quantizes: bool = True
    users: int = 0


PASSES = ("max_pool2d", "slice_pad", "flatten")  # their output holds the codes of their input
PRODUCTS = ("conv2d", "linear")


def read_steps(model: nn.Module) -> list[Step]:
    """The operations of a float model in an order of evaluation, batch norms, activations and additions in their place.

    They are read in the mode that the model is in. The network has one graph, so another graph in the other mode is an
    error.
    """
    steps = _steps_of(model, model.training)
    try:
        other = _steps_of(model, not model.training)
    except ValueError:  # a model that is not made for the other mode
        return steps
    if other != steps:
        raise ValueError(
            "prepare: expected a model of the same layers in training and in evaluation (fixed point makes one network), got "
            f"{_difference(steps, other)} in one mode only"
        )
    return steps


def _difference(steps: list[Step], other: list[Step]) -> str:
    by_name = [
        s for s in (*steps, *other) if (s.name in {t.name for t in steps}) != (s.name in {t.name for t in other})
    ]
    one = next(s for s in (*by_name, *steps, *other) if s not in steps or s not in other)
    return f"'{one.name}' ({one.op} of {', '.join(one.inputs) or 'the input'})"


def _steps_of(model: nn.Module, training: bool) -> list[Step]:
    try:
        graph = symbolic_graph(model, training)
    except Exception as error:  # any Python in forward may raise anything on a proxy
        raise ValueError(
            f"prepare: expected a model that torch.fx can trace (fixed point needs its graph), got {type(error).__name__}: "
            f"{str(error).strip()[:200]}"
        ) from error
    graph.eliminate_dead_code()
    steps = _Reader(model, graph).read()
    _hold_additions(steps)
    _end_in_accumulators(steps)
    return _in_order(steps)


class _Reader:
    """Turns the nodes of a traced model into steps."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.graph = graph
        self.steps: dict[str, Step] = {}
        self.of: dict[fx.Node, Step] = {}
        self.shapes: set[fx.Node] = set()  # nodes that are sizes, not tensors
        self.called: dict[int, str] = {}

    def read(self) -> dict[str, Step]:
        for node in self.graph.nodes:
            if node.op == "output":
                self.finish(node)
            else:
                self.visit(node)
        return self.steps

    def fail(self, node: fx.Node, what: str) -> None:
        where = f"'{node.target}'" if node.op == "call_module" else f"'{node.name}'"
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = f" in '{stack[-1][0]}'" if node.op != "call_module" and stack and stack[-1][0] else ""
        raise ValueError(f"prepare: {where}{inside}: {what}")

    def finish(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node) or result not in self.of:
            raise ValueError(f"prepare: expected a model that returns one tensor, got {result}")
        self.steps["output"] = self.of[result]

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if any(step.op == "input" for step in self.steps.values()):
                self.fail(node, "expected a model of one input, got a second")
            self.add(node, Step("input", "input", [], module="input_activation"))
        elif node.op == "call_module":
            self.visit_module(node, self.modules[node.target])
        elif node.op == "get_attr":
            self.fail(node, f"expected layers only, got the tensor {node.target!r}")
        else:
            self.visit_function(node)

    def source(self, node: fx.Node, argument: Any = None) -> Step:
        argument = node.args[0] if argument is None and node.args else argument
        if argument is None:
            argument = node.kwargs.get("input")
        if not isinstance(argument, fx.Node) or argument not in self.of:
            self.fail(node, f"expected a tensor computed from the input, got {argument}")
        return self.of[argument]

    def add(self, node: fx.Node, step: Step) -> None:
        if step.name in self.steps:
            self.fail(node, "expected a layer that is called once, got a second call")
        for name in step.inputs:
            self.steps[name].users += 1
        self.steps[step.name] = self.of[node] = step

    def name(self, node: fx.Node, op: str = "") -> str:
        """A module's path; for a function, its own name or ``op`` under the path of the module that calls it."""
        if node.op == "call_module":
            return str(node.target)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = f"{stack[-1][0]}." if stack and stack[-1][0] else ""
        base = path + (op or re.sub(r"_\d+$", "", node.name))
        names = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1)))
        return next(name for name in names if name not in self.steps and name not in self.modules)

    def same(self, node: fx.Node) -> None:
        self.of[node] = self.source(node)

    def visit_module(self, node: fx.Node, module: nn.Module) -> None:
        if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
            self.same(node)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            self.product(node, module)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            self.batch_norm(node, module)
        elif type(module) is nn.ReLU:
            self.relu(node, math.inf)
        elif isinstance(module, nn.ReLU6) or (
            type(module) is nn.Hardtanh and module.min_val == 0 and module.max_val > 0
        ):
            self.relu(node, float(module.max_val))
        elif type(module) is nn.MaxPool2d:
            if module.return_indices:
                self.fail(node, "expected return_indices=False")
            self.max_pool(node, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        elif type(module) is nn.AvgPool2d:
            self.whole_pool(node, module.kernel_size, module.stride, module.padding, module.ceil_mode)
        elif type(module) is nn.AdaptiveAvgPool2d:
            self.adaptive_pool(node, module.output_size)
        elif type(module) is nn.Flatten:
            if module.start_dim != 1 or module.end_dim not in (-1, 3):
                self.fail(node, f"expected a Flatten from dimension 1 to the last, got {module}")
            self.flatten(node)
        else:
            self.fail(node, f"{type(module).__name__} has no integer form")

    def product(self, node: fx.Node, module: nn.Module) -> None:
        if type(module) not in (nn.Conv2d, nn.Linear):
            self.fail(node, f"{type(module).__name__}, a subclass, has no integer form")
        convolution = isinstance(module, nn.Conv2d)
        if reason := unknown_weight(module):
            self.fail(node, f"{reason}, which has no integer form")
        if convolution and (reason := no_integer_convolution(module)):
            self.fail(node, reason)
        if id(module) in self.called:
            self.fail(
                node, f"expected a layer that is called once, got a second call (also '{self.called[id(module)]}')"
            )
        self.called[id(module)] = str(node.target)
        source = self.source(node)
        op = "conv2d" if convolution else "linear"
        self.add(node, Step(str(node.target), op, [source.name], module=str(node.target)))

    def batch_norm(self, node: fx.Node, module: nn.Module) -> None:
        step = self.source(node)
        if step.op not in PRODUCTS or step.bn or step.relu is not None or len(node.args[0].users) != 1:
            self.fail(node, "expected a batch norm that is the only user of a convolution, got another place")
        if not (module.affine and module.track_running_stats):
            self.fail(node, "expected a batch norm with affine parameters and running statistics")
        step.bn = str(node.target)
        self.of[node] = step

    def relu(self, node: fx.Node, top: float) -> None:
        step = self.source(node)
        self.of[node] = step
        if top == math.inf and self.unsigned(step):
            return
        at, steps = node.args[0] if node.args else node.kwargs["input"], step
        while True:  # ReLU and max pool commute
            if len(at.users) != 1:
                self.fail(node, "expected a ReLU that is the only user of its input, got another user beside it")
            if steps.op != "max_pool2d":
                break
            if steps.users:
                self.fail(node, "expected a ReLU that is the only user of its input, got another user beside it")
            at = at.args[0] if at.args else at.kwargs["input"]
            steps = self.steps[steps.inputs[0]]
        if steps.op not in (*PRODUCTS, "add"):
            self.fail(node, f"a ReLU of '{steps.name}' ({steps.op}) has no integer form")
        steps.relu = top if steps.relu is None else min(top, steps.relu)

    def unsigned(self, step: Step) -> bool:
        while step.op in (*PASSES, "avg_pool2d"):
            step = self.steps[step.inputs[0]]
        return step.relu is not None

    def max_pool(self, node, kernel, stride=None, padding=0, dilation=1, ceil_mode=False) -> None:
        if _pair(dilation) != (1, 1) or ceil_mode:
            self.fail(node, "expected a max pool with dilation 1 and ceil_mode=False")
        kernel = _pair(kernel)
        arguments = {
            "kernel": kernel,
            "stride": kernel if stride in (None, (), []) else _pair(stride),
            "padding": _pair(padding),
        }
        source = self.source(node)
        self.add(node, Step(self.name(node), "max_pool2d", [source.name], arguments))

    def whole_pool(self, node, kernel, stride=None, padding=0, ceil_mode=False, *_, **__) -> None:
        if _pair(padding) != (0, 0):
            self.fail(node, "expected an average pool over the whole image, got padding")
        self.avg_pool(node, keepdim=True, kernel=_pair(kernel))

    def adaptive_pool(self, node, size) -> None:
        if _pair(size) != (1, 1):
            self.fail(node, f"expected an average pool over the whole image (output size 1), got output size {size}")
        self.avg_pool(node, keepdim=True)

    def avg_pool(self, node: fx.Node, keepdim: bool, kernel: tuple[int, int] | None = None) -> None:
        source = self.source(node)
        name = self.name(node)
        arguments = {"keepdim": True, "kernel": kernel}
        self.add(node, Step(name, "avg_pool2d", [source.name], arguments, module=name))
        if not keepdim:
            self.add(node, Step(f"{name}.flatten", "flatten", [name]))

    def flatten(self, node: fx.Node) -> None:
        source = self.source(node)
        if source.op in ("flatten", "linear"):
            self.of[node] = source
        else:
            self.add(node, Step(self.name(node), "flatten", [source.name]))

    def visit_function(self, node: fx.Node) -> None:
        kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        kind = kind.rstrip("_") if kind not in ("iadd",) else "add"
        handler = getattr(self, f"on_{kind}", None)
        if handler is None:
            self.fail(node, f"{kind} has no integer form")
        try:
            handler(node, *node.args[1:], **{k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")})
        except TypeError as error:
            self.fail(node, f"{kind} has no integer form with these arguments ({error})")

    def on_relu(self, node, inplace=False):
        self.relu(node, math.inf)

    def on_relu6(self, node, inplace=False):
        self.relu(node, 6.0)

    def on_hardtanh(self, node, min_val=-1.0, max_val=1.0, inplace=False):
        if min_val != 0 or max_val <= 0:
            self.fail(node, f"hardtanh from {min_val} to {max_val} has no integer form")
        self.relu(node, float(max_val))

    def on_clamp(self, node, min=None, max=None):
        if min != 0:
            self.fail(node, f"clamp from {min} to {max} has no integer form")
        self.relu(node, math.inf if max is None else float(max))

    def on_dropout(self, node, p=0.5, training=True):
        self.same(node)

    on_dropout2d = on_dropout

    def on_contiguous(self, node, **_):
        self.same(node)

    def on_add(self, node, other, alpha=1):
        if alpha != 1 or not isinstance(other, fx.Node):
            self.fail(node, f"expected an addition of two tensors, got {other}")
        a, b = self.source(node), self.source(node, other)
        self.add(node, Step(self.name(node), "add", [a.name, b.name]))

    def on_max_pool2d(
        self, node, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ):
        if return_indices:
            self.fail(node, "expected return_indices=False")
        self.max_pool(node, kernel_size, stride, padding, dilation, ceil_mode)

    def on_boolean_dispatch(self, node, *args, **kwargs):
        self.on_max_pool2d(node, *args, **kwargs)

    def on_avg_pool2d(self, node, kernel_size, stride=None, padding=0, ceil_mode=False, *rest, **more):
        self.whole_pool(node, kernel_size, stride, padding, ceil_mode)

    def on_adaptive_avg_pool2d(self, node, output_size):
        self.adaptive_pool(node, output_size)

    def on_mean(self, node, dim=None, keepdim=False, **more):
        dims = sorted(d % 4 for d in dim) if isinstance(dim, (tuple, list)) else dim
        if dims != [2, 3] or more:
            self.fail(node, f"expected a mean over the image's two dimensions (2, 3), got {dim}")
        self.avg_pool(node, keepdim=bool(keepdim))

    def on_flatten(self, node, start_dim=0, end_dim=-1):
        if start_dim != 1 or end_dim not in (-1, 3):
            self.fail(node, f"expected a flatten from dimension 1 to the last, got {start_dim} to {end_dim}")
        self.flatten(node)

    def on_view(self, node, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        batch = len(shape) == 2 and (shape[0] in self.shapes if isinstance(shape[0], fx.Node) else shape[0] == -1)
        if not batch or isinstance(shape[1], fx.Node):
            self.fail(node, f"expected a reshape to (N, -1), got {tuple(shape)}")
        self.flatten(node)

    on_reshape = on_view

    def on_squeeze(self, node, *dims):
        source = self.source(node)
        if source.op != "avg_pool2d":
            self.fail(node, "squeeze has no integer form except behind an average pool")
        self.of[node] = source

    def on_size(self, node, dim=None):
        self.shapes.add(node)

    def on_getattr(self, node, attribute, *_):
        if attribute != "shape":
            self.fail(node, f"attribute {attribute!r} has no integer form")
        self.shapes.add(node)

    def on_getitem(self, node, index):
        if node.args[0] in self.shapes:
            self.shapes.add(node)
            return
        index = index if isinstance(index, tuple) else (index,)
        if index and index[0] is Ellipsis:
            index = (slice(None),) * (5 - len(index)) + index[1:]
        plain = [i for i in index if isinstance(i, slice) and i.start in (None, 0) and i.stop is None]
        steps = [i.step or 1 for i in plain]
        if len(plain) != len(index) or len(index) > 4 or any(not isinstance(s, int) or s < 1 for s in steps):
            self.fail(node, f"expected every k-th row and column ([:, :, ::k, ::k]), got {index}")
        steps += [1] * (4 - len(steps))
        if steps[:2] != [1, 1]:
            self.fail(node, f"expected every k-th row and column ([:, :, ::k, ::k]), got {index}")
        source = self.source(node)
        self.add(
            node,
            Step(self.name(node, "shortcut"), "slice_pad", [source.name], {"stride": tuple(steps[2:]), "pad": (0, 0)}),
        )

    def on_pad(self, node, pad, mode="constant", value=None):
        pad = tuple(pad)
        if mode != "constant" or value not in (None, 0, 0.0) or len(pad) != 6 or any(pad[:4]) or min(pad) < 0:
            self.fail(
                node,
                f"expected zero channels added before and behind ((0, 0, 0, 0, b, a)), got {pad}, {mode!r}, {value}",
            )
        source = self.source(node)
        if source.op == "slice_pad" and source.users == 0 and len(node.args[0].users) == 1:
            source.arguments["pad"] = pad[4:]
            self.of[node] = source
            return
        self.add(
            node, Step(self.name(node, "shortcut"), "slice_pad", [source.name], {"stride": (1, 1), "pad": pad[4:]})
        )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        value = tuple(1 if v is None else v for v in value)
        return (value[0], value[0]) if len(value) == 1 else value
    return (value, value)


def _hold_additions(steps: dict[str, Step]) -> None:
    """An addition goes into the convolution whose only user it is; a second such convolution stays in accumulators."""
    output = steps["output"]
    for name, add in list(steps.items()):
        if add.op != "add" or name == "output":
            continue
        free = [
            i
            for i in (0, 1)
            if (s := steps[add.inputs[i]]).op == "conv2d"
            and s.relu is None
            and s.users == 1
            and s is not output
            and len(s.inputs) == 1
        ]
        if not free or add.inputs[0] == add.inputs[1]:
            continue
        holder, other = steps[add.inputs[free[0]]], steps[add.inputs[1 - free[0]]]
        if len(free) == 2:
            other.quantizes = False
        holder.inputs.append(other.name)
        holder.relu, holder.users = add.relu, add.users
        for step in steps.values():
            if step is not add and step is not holder:
                step.inputs = [holder.name if source == name else source for source in step.inputs]
        if output is add:
            steps["output"] = output = holder
        del steps[name]


def _end_in_accumulators(steps: dict[str, Step]) -> None:
    last = steps["output"]
    while last.op == "flatten":
        last = steps[last.inputs[0]]
    if (
        last.op not in PRODUCTS
        or last.relu is not None
        or len(last.inputs) > 1
        or last.users > (last is not steps["output"])
    ):
        raise ValueError(
            f"prepare: '{last.name}': expected the network to end in a Linear or Conv2d layer without activation, got {last.op}"
            f"{' with an addition' if len(last.inputs) > 1 else ''}{' with a ReLU' if last.relu is not None else ''}"
        )
    last.quantizes = False


def _in_order(steps: dict[str, Step]) -> list[Step]:
    """Steps that the output needs, each behind those it reads."""
    order: dict[str, Step] = {}
    pending = [(steps["output"], False)]
    while pending:
        step, ready = pending.pop()
        if ready:
            order[step.name] = step
        elif step.name not in order:
            pending.append((step, True))
            pending += [(steps[name], False) for name in reversed(step.inputs) if name not in order]
    if "input" not in order:
        raise ValueError("prepare: expected an output that depends on the input, got one that does not")
    return list(order.values())


def maker_of(steps: Mapping[str, Step], name: str) -> Step:
    """The step that rounds what the step ``name`` gives."""
    while steps[name].op in PASSES:
        name = steps[name].inputs[0]
    return steps[name]


class Sharing:
    """Which steps' codes are in the same units: a chain of identity shortcuts shares one activation."""

    def __init__(self, steps: list[Step]):
        self.steps = {step.name: step for step in steps}
        self.parent: dict[str, str] = {}
        for step in steps:
            if len(step.inputs) == 2:
                others = [maker_of(self.steps, name).name for name in step.inputs[1 if step.op in PRODUCTS else 0 :]]
                for other in others:
                    if self.steps[other].quantizes:
                        self.join(step, self.steps[other])

    def first(self, name: str) -> str:
        while name in self.parent:
            name = self.parent[name]
        return name

    def join(self, step: Step, other: Step) -> None:
        if other.op in ("input", "avg_pool2d"):
            raise ValueError(
                f"prepare: '{step.name}': expected an addition of outputs of convolutions, got one of '{other.name}' ({other.op})"
            )
        for member in (step, other):
            if (member.relu is None) != (step.relu is None):
                raise ValueError(
                    f"prepare: '{step.name}': expected both sides of a shortcut with a ReLU or both without, "
                    f"got one without ('{step.name if step.relu is None else other.name}')"
                )
        order = list(self.steps)
        a, b = sorted((self.first(step.name), self.first(other.name)), key=order.index)
        if a != b:
            self.parent[b] = a
