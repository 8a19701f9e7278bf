"""What calls what in a traced float model: which convolutions feed which batch norms, which layers are bypassed."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from .weight_hooks import run_weight_hooks

__all__ = ["ModelGraph", "symbolic_graph", "trace_model"]


@dataclass
class ModelGraph:
    """What tracing found, in training and in evaluation.

    pairs: convolution name -> name of the batch norm that is its only user in both modes, both called once.
    order: names of the called modules, first call first: those of training, then those that evaluation alone calls;
        empty where the model was not traced.
    bypassed: names of modules that are never called while a function reads their weight.
    read_too: names of modules that are called and whose weight a function also reads.
    error: why tracing failed, or "".
    """

    pairs: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    bypassed: set[str] = field(default_factory=set)
    read_too: set[str] = field(default_factory=set)
    error: str = ""


def trace_model(model: nn.Module, example_inputs: tuple | None = None) -> ModelGraph:
    """Traces a copy of ``model`` with torch.fx, else (given ``example_inputs``) torch.export; failures do not raise.

    Both modes are traced; where only one can be, that one counts.

    Args:
        model: a float model; it and the random states are left as they are.
        example_inputs: positional arguments of one call; lets a model whose control flow torch.fx cannot follow be
            traced.
    """
    found, errors = [], []
    for training in (True, False):
        try:
            found.append(_traced(model, training, example_inputs))
        except Exception as error:  # any Python in forward may raise anything on a proxy
            errors.append(_first_line(error))
    if not found:
        return ModelGraph(error=errors[0])
    first, last = found[0], found[-1]
    pairs = {conv: bn for conv, bn in first.pairs.items() if last.pairs.get(conv) == bn}
    for one, other in ((first, last), (last, first)):  # a mode that calls neither has no say
        pairs |= {c: b for c, b in one.pairs.items() if c not in other.order and b not in other.order}
    order = list(dict.fromkeys(first.order + last.order))
    read = first.bypassed | last.bypassed
    return ModelGraph(pairs, order, read - set(order), first.read_too | last.read_too | (read & set(order)))


def symbolic_graph(model: nn.Module, training: bool | None = None) -> fx.Graph:
    """The graph that torch.fx reads from a copy of ``model`` in a given mode; raises what forward raises on proxies."""
    with _undisturbed(model) as replica:
        if training is not None:
            replica.train(training)
        graph = fx.Tracer().trace(replica)
        graph.owning_module = model  # without it dead code cannot be found
        return graph


def _traced(model: nn.Module, training: bool, example_inputs: tuple | None) -> ModelGraph:
    try:
        graph = symbolic_graph(model, training)
    except Exception:
        if example_inputs is None:
            raise
    else:
        return _collect(model, graph.nodes, lambda node: str(node.target) if node.op == "call_module" else "")
    with _undisturbed(model) as replica:
        program = torch.export.export(replica.train(training), example_inputs, strict=False)
    return _collect(model, program.graph.nodes, _exported_module)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of ``model`` to run, which shares its Parameters alone; the random states are afterwards what they were.

    A model that cannot be copied is lent itself, its attributes and buffers restored afterwards.
    """
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    states = random.getstate(), (sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None)
    try:
        with torch.random.fork_rng(devices):
            try:
                replica = copied(model, share_parameters=True)
            except Exception:  # what a model holds may refuse to be copied: locks, open files, generators
                with _restored(model):
                    yield model
            else:
                yield replica
    finally:
        random.setstate(states[0])
        if states[1] is not None:
            sys.modules["numpy"].random.set_state(states[1])


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy; weights that hooks compute are computed anew first, since a tensor with history cannot be copied."""
    run_weight_hooks(model)
    memo = {id(p): p for p in model.parameters()} if share_parameters else {}
    return copy.deepcopy(model, memo)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every module's attributes, containers and buffers hold what they held."""
    saved = []
    for module in model.modules():
        attributes = {k: (v, copy.copy(v)) for k, v in module.__dict__.items() if isinstance(v, (dict, list, set))}
        buffers = [(buffer, buffer.clone()) for buffer in module._buffers.values() if buffer is not None]
        saved.append((module, dict(module.__dict__), attributes, buffers))
    try:
        yield
    finally:
        for module, attributes, containers, buffers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers.values():
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
            with torch.no_grad():
                for buffer, content in buffers:
                    buffer.copy_(content)


def _exported_module(node: fx.Node) -> str:
    """The module whose convolution or batch norm an exported node is, "" for other nodes."""
    known = ("conv", "convolution", "batch_norm", "linear", "embedding")
    if node.op != "call_function" or not any(word in str(node.target) for word in known):
        return ""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _collect(model: nn.Module, nodes: Iterable[fx.Node], module_of: Callable[[fx.Node], str]) -> ModelGraph:
    nodes = list(nodes)
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
        plain = type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm) and bn.affine and bn.track_running_stats
        # A hook may change what lies between the two, or behind.
        if plain and calls[id(bn)] == 1 and not (conv._forward_hooks or bn._forward_hooks or bn._forward_pre_hooks):
            graph.pairs[name] = user
    targets = (str(node.target).rpartition(".") for node in nodes if node.op == "get_attr" and node.users)
    read = {owner for owner, _, name in targets if owner and name == "weight"}
    graph.bypassed = {owner for owner in read if calls[id(modules.get(owner))] == 0}
    graph.read_too = read - graph.bypassed
    return graph


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
