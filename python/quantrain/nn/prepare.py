"""prepare: float layers to quantization-aware ones."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.utils import parametrize

from quantrain._C import Recipe
from quantrain.tables import Table

from .conv_bn import FoldedBatchNorm2d, QuantConvBn2d
from .convolutions import QuantConv1d, QuantConvTranspose2d
from .fuse import fuse as fuse_blocks
from .graph import ModelGraph, copied, trace_model
from .layers import QuantConv2d, QuantEmbedding, QuantLayer, QuantLinear, QuantTransposedLinear
from .new_parameters import new_parameters
from .quantized import QuantizedLayer
from .recipes import as_recipe, changed_recipe, rounds_nothing
from .schemes import SchemeHandler, handler_of, handlers
from .weight_hooks import unknown_weight

__all__ = ["PrepareSummary", "linear_layers", "matching", "prepare", "quantizable", "some", "swapped"]

logger = logging.getLogger("quantrain")

_TWINS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Embedding: QuantEmbedding,
}
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
kWarnedShare = 0.1  # of the parameters left in floating point for want of a twin


class PrepareSummary(Table):
    """What ``prepare`` did: one row per quantized layer, and ``left_float``: name -> why a module stayed float.

    ``recipe`` is the model's recipe; ``new_parameters`` names the parameters that the float model does not have
    (learned scales, clip levels), ``fused`` says what was joined (:mod:`quantrain.nn.fuse`, of converted models
    :mod:`quantrain.nn.int8_blocks`), ``separate`` why a block was not. A scheme's columns (grad_input, grad_weight, ...) appear where a layer has a value.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        left_float: Mapping[str, str],
        recipe: Recipe,
        fused: Sequence[str] = (),
        separate: Mapping[str, str] = MappingProxyType({}),
    ):
        columns = {"layer": "layer", "type": "type", "weight": "weight", "input": "input", "output": "output"}
        for handler in handlers():
            columns |= {
                key: header for key, header in handler.summary_columns.items() if any(row.get(key) for row in rows)
            }
        notes = [f"left float: {name} ({reason})" for name, reason in left_float.items()]
        notes += [f"joined: {line}" for line in fused]
        notes += [f"separate layers: {name} ({reason})" for name, reason in separate.items()]
        super().__init__(columns, rows, title=f"recipe {recipe.name or '(unnamed)'}: {len(rows)} layers", notes=notes)
        self.left_float, self.recipe, self.fused = dict(left_float), recipe, tuple(fused)
        self.separate = dict(separate)
        self.new_parameters: tuple[str, ...] = ()

    def with_blocks(self, fused: Sequence[str], separate: Mapping[str, str]) -> PrepareSummary:
        """The same of a converted model whose blocks run so (:mod:`quantrain.nn.int8_blocks`)."""
        return PrepareSummary(list(self.rows), self.left_float, self.recipe, fused, separate)


def prepare(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    overrides: Mapping[str, Recipe | str | Mapping] | None = None,
    skip: Iterable[str] = (),
    example_inputs: tuple | None = None,
    inplace: bool = True,
    fuse: bool = False,
) -> nn.Module:
    """Swaps every nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d and nn.Embedding, and transformers' Conv1D (a
    linear layer), for its quantized twin, at any depth, keeping the weights.

    Parameters stay the same objects (tied weights stay tied, an optimizer made before keeps training them; one that
    lacks learned scales, which are new, is warned of) and a module that appears twice is swapped once. Where a layer's
    weight is frozen (``requires_grad`` False), so are its learned scales. A convolution whose only user is an
    nn.BatchNorm2d or nn.SyncBatchNorm (found by torch.fx, else by torch.export when ``example_inputs`` are given, in
    training and in evaluation) becomes a :class:`QuantConvBn2d` under the convolution's name, the batch norm a
    :class:`FoldedBatchNorm2d` that stands for it; other batch norms stay in floating point. What is traced is a copy:
    the model's buffers and attributes and the random states stay as they are. Subclasses of the layers are left alone,
    and so are layers whose weight a parametrization computes and those that tracing shows to be read by a function and
    never called (``F.linear(x, self.fc.weight)``). Weights of ``torch.nn.utils``' weight_norm, spectral_norm and prune
    hooks are computed in training as before. Under a recipe of integer products (``int8-training``, ``int8-static``)
    only linear layers are swapped, in the first for :class:`Int8Linear`.

    Under a recipe of 4-bit weights (``nf4``, ``int4-g128``, ...) linear layers become :class:`Linear4bit`, their weights
    packed at once; under ``qlora`` :class:`LoraLinear`, and nothing else is trained (``requires_grad``). Embeddings, norms
    and the head stay: the layer of the model's ``get_output_embeddings()``, layers tied to an embedding, else the last
    linear layer. Of transformers' classifiers the layers beside the backbone stay, which are new and trained under
    ``qlora``; so is the last layer of any other model, but for a language model's.

    Under a recipe of fixed-point arithmetic (``f8net``, ``f8net-tiny``) the whole network becomes integers, so it is
    traced with torch.fx and rebuilt: a NEW module (:class:`FixedPointGraph`) is returned, in the mode of ``model``,
    with the same Parameter objects under the same names (a batch norm's under its convolution, ``<conv>.bn.*``) and the
    same batch-norm modules; ``model`` itself keeps its structure, and with ``inplace=False`` shares nothing.
    ``overrides`` and ``skip`` are refused.

    Args:
        model: a float model.
        recipe: a :class:`quantrain.Recipe` or the name of one (``quantrain.Recipe.names()``).
        overrides: layer-name pattern (fnmatch, e.g. ``"layer1.*"``) -> a Recipe, a name, or a mapping of changed fields
            such as ``{"weight": {"bits": 8}, "scheme": None}``. Where several patterns match, the last one wins. An
            override also wins over the recipe's ``edge_bits`` (bits of the first and last layer, in order of call where
            the model could be traced, else of registration).
        skip: layer-name patterns to leave in floating point; one that names a batch norm keeps it unfolded.
        example_inputs: positional arguments of one call of the model, for torch.export.
        inplace: False works on a deep copy.
        fuse: True joins, in blocks that torch.fx shows whole, what lies between two convolutions (:mod:`quantrain.nn.fuse`), and
            lets layers that read one tensor under one spec share its range, a learned scale too; the summary lists what was joined.

    Returns:
        The model, with the attribute ``quantization_summary`` (:class:`PrepareSummary`; also logged to "quantrain"). A
        model that is itself such a layer is returned as a new module.

    Raises:
        ValueError: a model without such layers, a pattern that names none, an invalid recipe; under fixed point a model
            that torch.fx cannot trace, or an operation without integer form, named with its path. The model is then
            unchanged.

    Warns:
        UserWarning: a model with batch norms that could not be traced; more than a tenth of the parameters left in
            floating point though neither ``skip`` nor the recipe says so (``quantization_summary.left_float`` has every
            module and why). Also a layer that is called and whose weight a function reads too (a tied head by
            ``F.linear``), a model that was prepared before, and an optimizer made before that lacks new parameters.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> print(prepare(model, "qat-w8a8").quantization_summary)
    recipe qat-w8a8: 2 layers
    layer  type           weight                      input                              output
    0      QuantConvBn2d  int8 per_channel (dynamic)  uint8 per_tensor (moving_average)  -
    3      QuantLinear    int8 per_channel (dynamic)  uint8 per_tensor (moving_average)  -
    """
    check_model("prepare", model)
    base = as_recipe(recipe)
    if rounds_nothing(base):
        raise ValueError(
            f"prepare: expected a recipe that rounds something, got {base.name!r}, which prunes alone "
            "(quantrain.prune.Pruner.from_spec does that to a float model)"
        )
    overrides = dict(overrides or {})
    check_patterns("prepare", "skip", skip)
    if handler_of(base).rebuilds:
        return _prepare_network(model, base, overrides, skip, inplace)
    if not inplace:
        model = copied(model)
    known = _twins()
    layers = {name: module for name, module in model.named_modules() if type(module) in known}
    if not layers:
        raise ValueError(_no_layers(model))
    if done := sum(isinstance(module, (QuantLayer, QuantizedLayer)) for module in model.modules()):
        warnings.warn(f"prepare: {done} layers are quantized already and stay as they are", stacklevel=2)
    parameters = list(model.parameters())
    batch_norms = {name: module for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)}
    skipped = {name for p in skip for name in matching("skip", p, [*layers, *batch_norms], layers)}
    matches = {pattern: matching("overrides", pattern, layers, layers) for pattern in overrides}

    graph = trace_model(model, example_inputs)
    if graph.error and batch_norms:
        hint = "" if example_inputs is not None else "; example_inputs=(...) may help"
        warnings.warn(
            f"prepare: the model could not be traced, batch norms stay float ({graph.error}){hint}", stacklevel=2
        )
    names = [name for name in layers if name not in skipped]
    if read_too := [repr(name) for name in names if name in graph.read_too]:
        warnings.warn(
            f"prepare: {len(read_too)} layers are called and their weight is read by a function too: {some(read_too)}. What the "
            "function computes is not rounded until convert, which rounds it; skip=[...] leaves such a layer in floating point",
            stacklevel=2,
        )
    unable = {name: reason for name in names if (reason := _unable(name, layers[name], graph))}
    names = [name for name in names if name not in unable]
    order = _call_order(model, graph, names)
    recipes = _layer_recipes(base, names, order, overrides, matches)
    without = {name: reason for name in names if (reason := _no_effect(layers[name], recipes[name]))}
    for handler, mine in _by_handler(recipes, [name for name in names if name not in without]).items():
        every = _called_last(model, graph, linear_layers(model))
        without |= handler.left_layers(model, {name: layers[name] for name in mine}, recipes, every)
    unable |= {name: reason for name in names if (reason := _no_twin(layers[name], recipes[name]))}
    without |= unable
    names = [name for name in names if name not in without]
    for name in names:
        _check_dtype(name, layers[name].weight.dtype, recipes[name])
    if not names and not handler_of(base).leaves_layers(base):
        raise ValueError(
            f"prepare: expected at least one layer to quantize under {base.name!r}, got none after skip={list(skip)}"
            + "".join(f"; {name!r} stays float ({reason})" for name, reason in list(without.items())[:3])
        )

    by_handler = {handler_of(base): []} | _by_handler(recipes, names)
    for handler, mine in by_handler.items():
        for checked in [base, *(recipes[name] for name in mine)]:
            handler.check_model(model, checked)
    twins: dict[int, nn.Module] = {}
    for name in names:
        pair = graph.pairs.get(name)
        if pair is None or pair in skipped:
            twin = known[type(layers[name])]
            twin = handler_of(recipes[name]).layer_class(twin, recipes[name])
            twins[id(layers[name])] = twin.from_float(layers[name], recipes[name], name=name)
        else:
            bn = batch_norms[pair]
            twin = QuantConvBn2d.from_float_pair(layers[name], bn, recipes[name], name=name)
            twins[id(layers[name])], twins[id(bn)] = twin, FoldedBatchNorm2d(twin)
    left = _left_float(model, twins, skipped, without, graph)
    _warn_of_share(model, [name for name in left if name not in skipped and (name in unable or name not in without)])
    rows = [_summary_row(name, twins[id(layers[name])]) for name in names]
    model = swapped(model, twins)
    _leave_fast_path(model)
    for handler, mine in by_handler.items():
        handler.prepared(model, {name: twins[id(layers[name])] for name in mine}, left, base)
    fused = fuse_blocks(model) if fuse else []
    model.quantization_summary = PrepareSummary(rows, left, base, fused)
    model.quantization_summary.new_parameters = new_parameters(model, parameters)
    logger.info("%s", model.quantization_summary)
    return model


def quantizable(model: nn.Module) -> list[str]:
    """Names of the float layers that :func:`prepare` has twins of."""
    twins = _twins()
    return [name for name, module in model.named_modules() if type(module) in twins]


def _prepare_network(
    model: nn.Module, recipe: Recipe, overrides: Mapping, skip: Iterable[str], inplace: bool
) -> nn.Module:
    """A new network of the whole model, under a scheme that rebuilds."""
    name = recipe.name or "(unnamed)"
    for argument, value in (("overrides", dict(overrides)), ("skip", list(skip))):
        if value:
            raise ValueError(
                f"prepare: expected no {argument} under {name!r}, whose network is of integers throughout, got {value}"
            )
    handler = handler_of(recipe)
    if handler.is_prepared(model) or any(isinstance(m, (QuantLayer, QuantizedLayer)) for m in model.modules()):
        raise ValueError("prepare: expected a float model, got one with layers that are quantized already")
    model = model if inplace else copied(model)
    known = list(model.parameters())
    prepared = handler.prepare_network(model, recipe)
    prepared.quantization_summary = PrepareSummary(handler.summary_rows(prepared), {}, recipe)
    prepared.quantization_summary.new_parameters = new_parameters(prepared, known)
    logger.info("%s", prepared.quantization_summary)
    return prepared


def _twins() -> dict[type[nn.Module], type[QuantLayer]]:
    """The quantized twin of each class of float layers; that of transformers where the program has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    transposed = getattr(module, "Conv1D", None)
    return _TWINS if transposed is None else _TWINS | {transposed: QuantTransposedLinear}


def check_model(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")


def check_patterns(op: str, argument: str, patterns: object) -> None:
    if isinstance(patterns, str):  # whose characters would be patterns
        raise TypeError(f"{op}: expected {argument} to be a list of patterns, got the str {patterns!r}")


def matching(
    argument: str, pattern: str, names: Iterable[str], layers: Mapping[str, nn.Module], op: str = "prepare"
) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        first = ", ".join(repr(name) for name in list(layers)[:5])
        raise ValueError(
            f"{op}: expected every pattern of {argument} to name a layer, got {pattern!r} "
            f"(of {len(layers)} layers the first are {first})"
        )
    return found


def _no_layers(model: nn.Module) -> str:
    prepared = sum(isinstance(module, (QuantLayer, QuantizedLayer)) for module in model.modules())
    if prepared:
        return f"prepare: expected a float model, got one with {prepared} layers that are quantized already"
    first = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in list(model.named_modules())[:5])
    return (
        "prepare: expected a Linear, Conv1d, Conv2d, ConvTranspose2d or Embedding in the model, got none "
        f"(first modules: {first})"
    )


def _call_order(model: nn.Module, graph: ModelGraph, names: Sequence[str]) -> list[str]:
    """``names`` in order of first call where tracing saw them all, else of registration."""
    called = _in_order_of_call(model, graph, names)
    return called if len(called) == len(names) else list(names)


def _in_order_of_call(model: nn.Module, graph: ModelGraph, names: Sequence[str]) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    first_name = {id(modules[name]): name for name in reversed(names)}
    called = [first_name[id(modules[name])] for name in graph.order if id(modules[name]) in first_name]
    return list(dict.fromkeys(called))


def _called_last(model: nn.Module, graph: ModelGraph, names: Sequence[str]) -> list[str]:
    """``names`` in order of first call behind those that tracing did not see: what is never called gives no output.
    Calls of a subclass are not seen; where there is one, all are in order of registration."""
    called, modules = _in_order_of_call(model, graph, names), dict(model.named_modules())
    unseen = [name for name in names if name not in called]
    return unseen + called if all(type(modules[name]) in _twins() for name in unseen) else list(names)


def _layer_recipes(
    base: Recipe,
    names: Sequence[str],
    order: Sequence[str],
    overrides: Mapping[str, Recipe | str | Mapping],
    matches: Mapping[str, Sequence[str]],
) -> dict[str, Recipe]:
    edges = {order[0], order[-1]} if order else set()
    handler = handler_of(base)
    recipes = {name: handler.layer_recipe(name, base.edge() if name in edges else base) for name in names}
    for pattern, change in overrides.items():
        for name in matches[pattern]:
            if name in recipes:
                start = base.edge() if name in edges else base
                recipes[name] = changed_recipe(start, change)
    return recipes


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers of a float model, subclasses too."""
    kinds = tuple(kind for kind, twin in _twins().items() if twin in (QuantLinear, QuantTransposedLinear))
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _by_handler(recipes: Mapping[str, Recipe], names: Sequence[str]) -> dict[SchemeHandler, list[str]]:
    """The scheme's handler -> which of ``names`` it is of."""
    found: dict[SchemeHandler, list[str]] = {}
    for name in names:
        found.setdefault(handler_of(recipes[name]), []).append(name)
    return found


def _no_effect(layer: nn.Module, recipe: Recipe) -> str:
    """Why the recipe means nothing for the layer, or "". An embedding has no input to quantize."""
    if reason := handler_of(recipe).left_float(_twins()[type(layer)], recipe):
        return reason
    if isinstance(layer, nn.Embedding) and recipe.weight is None and recipe.output is None:
        return "nothing to quantize under its recipe"
    return ""


def _unable(name: str, layer: nn.Module, graph: ModelGraph) -> str:
    """Why the layer cannot be quantized though its class has a twin, or ""."""
    return "never called: a function reads its weight" if name in graph.bypassed else unknown_weight(layer)


def _no_twin(layer: nn.Module, recipe: Recipe) -> str:
    """Why the layer has no twin under this recipe though its class has one, or ""."""
    return handler_of(recipe).no_twin(_twins()[type(layer)], recipe)


def _check_dtype(name: str, dtype: torch.dtype, recipe: Recipe) -> None:
    """The operators that quantize gradients or multiply integers take no float64, which fake-quantization does."""
    if dtype == torch.float64 and not handler_of(recipe).takes_float64(recipe):
        raise ValueError(
            f"prepare: expected float32, float16 or bfloat16 weights under {recipe.name!r}, got float64 in '{name}'"
        )


def _warn_of_share(model: nn.Module, left: Sequence[str]) -> None:
    """A warning where more than a tenth of the parameters stay float because no layer here takes their modules."""
    modules = dict(model.named_modules())
    sizes = {id(p): p.numel() for p in model.parameters()}
    kept: Counter[str] = Counter()
    for name in left:
        if all(p.dim() < 2 for p in _own_parameters(modules[name])):  # norms
            continue
        for parameter in _own_parameters(modules[name]):
            kept[name] += sizes.pop(id(parameter), 0)
    total = sum(sizes.values()) + kept.total()
    if kept.total() > kWarnedShare * total:
        largest = [f"{name!r} ({type(modules[name]).__name__})" for name, _ in kept.most_common()]
        warnings.warn(
            f"prepare: {100 * kept.total() / total:.0f} % of the parameters stay in floating point: {some(largest)} "
            "(quantization_summary.left_float says why)",
            stacklevel=3,
        )


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of the module itself and of its parametrizations."""
    own = list(module.parameters(recurse=False))
    return own + (list(module.parametrizations.parameters()) if parametrize.is_parametrized(module) else [])


def some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _left_float(
    model: nn.Module,
    twins: Mapping[int, nn.Module],
    skipped: set[str],
    without: Mapping[str, str],
    graph: ModelGraph,
) -> dict[str, str]:
    left = {}
    for name, module in model.named_modules():
        done = isinstance(module, (QuantLayer, QuantizedLayer, parametrize.ParametrizationList))
        if id(module) in twins or done or not _own_parameters(module):
            continue
        if name in skipped:
            left[name] = "skip"
        elif isinstance(module, _BATCH_NORMS):
            left[name] = "model not traced" if graph.error else "not the only user of a quantized convolution"
        elif isinstance(module, tuple(_twins())):
            subclass = unknown_weight(module) or f"{type(module).__name__} is a subclass"
            left[name] = without.get(name, subclass)
        elif any(p.dim() > 1 for p in _own_parameters(module)):
            left[name] = f"{type(module).__name__} has no quantized twin"
    return left


def _summary_row(name: str, layer: QuantLayer) -> dict[str, str | None]:
    row: dict[str, str | None] = {"layer": name, "type": type(layer).__name__}
    for tensor in ("weight", "input", "output"):
        fake_quant = getattr(layer, f"{tensor}_fake_quant", None)
        row[tensor] = None
        if fake_quant is not None:
            spec = fake_quant.spec
            source = f"{spec.observer}, learned" if spec.learnable else spec.observer
            kind = "int" if spec.symmetric else "uint"
            grouped = spec.granularity == "per_group" and any(size > 1 for size in fake_quant.scale_shape[1:])
            granularity = "per_channel" if spec.granularity == "per_group" and not grouped else spec.granularity
            row[tensor] = f"{kind}{spec.bits} {granularity} ({source})"
    return row | handler_of(layer.recipe).summary_cells(layer)


def swapped(model: nn.Module, twins: Mapping[int, nn.Module]) -> nn.Module:
    """``model`` with every module that has a twin (by identity) replaced, wherever it is registered."""
    for module in [model, *model.modules()]:  # a pruned weight's mask goes with it
        mask, twin = module._buffers.get("weight_mask"), twins.get(id(module))
        packed = getattr(twin, "packed", False)  # two codes to a byte: their zeros say it, and take less than the mask
        if mask is not None and twin is not None and not packed and "weight_mask" not in twin._buffers:
            twin.register_buffer("weight_mask", mask)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in twins:
                parent._modules[key] = twins[id(child)]
    return twins.get(id(model), model)


def _leave_fast_path(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer's fused inference path reads ``linear1.weight`` itself, past the quantized layer.

    The encoder hands its layers nested tensors for that path alone.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
