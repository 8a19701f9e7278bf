"""Adapters of models with LoRA layers: parameters, files, merging (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain._C import LoraAdapter, LoraWeight, Recipe
from quantrain.tables import Table

from .four_bit import FourBitLayer, Linear4bit, LoraLinear
from .prepare import check_model, swapped
from .quantized import with_hooks_of
from .recipes import changed_recipe

__all__ = [
    "MergeTable",
    "adapter_recipe",
    "enable_lora",
    "lora_adapter",
    "lora_parameters",
    "merge",
    "set_lora_adapter",
]


def _layers(op: str, model: nn.Module) -> dict[str, LoraLinear]:
    check_model(op, model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not layers:
        raise ValueError(f"{op}: expected a model with LoraLinear layers (prepare(model, 'qlora')), got none")
    return layers


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_a and lora_b of every :class:`LoraLinear`, for an optimizer.

    Raises:
        ValueError: a model without such layers.

    >>> len(lora_parameters(LoraLinear(64, 8)))
    2
    """
    return [
        parameter for layer in _layers("lora_parameters", model).values() for parameter in (layer.lora_a, layer.lora_b)
    ]


def enable_lora(model: nn.Module, enabled: bool = True) -> None:
    """Off: every :class:`LoraLinear` gives what its base layer gives, as the model did before it was trained."""
    for layer in _layers("enable_lora", model).values():
        layer.lora_enabled = enabled


def lora_adapter(model: nn.Module) -> LoraAdapter:
    """The adapter that the model's layers make up, for :func:`quantrain.nn.save_lora_adapter`: copies on the CPU.

    Parameters outside of LoRA that are trained (``requires_grad``), such as a new classification head, are its
    ``others``.

    Raises:
        ValueError: no :class:`LoraLinear`; layers of different lora_alpha, which the file cannot say.

    >>> list(lora_adapter(nn.Sequential(LoraLinear(64, 8))).layers)
    ['0']
    """
    layers = _layers("lora_adapter", model)
    alphas = {layer.recipe.scheme.lora_alpha: name for name, layer in layers.items()}
    if len(alphas) > 1:
        raise ValueError(f"lora_adapter: expected one lora_alpha, got {sorted(alphas)}")
    first = next(iter(layers.values())).recipe.scheme
    others = _others(model, layers)
    adapter = LoraAdapter(
        {name: LoraWeight(_copy(layer.lora_a), _copy(layer.lora_b)) for name, layer in layers.items()},
        r=first.lora_rank,
        lora_alpha=first.lora_alpha,
        lora_dropout=first.lora_dropout,
    )
    targets = _suffixes(model, list(layers))
    if targets == sorted(layers) and any("." in name for name, _ in model.named_modules()):
        # A name in PEFT's list also means the modules whose paths end so; a pattern means what it says.
        adapter.target_pattern = "|".join(map(re.escape, targets))
    else:
        adapter.target_modules = targets
    adapter.others = {name: _copy(parameter) for name, parameter in others.items()}
    adapter.modules_to_save = _suffixes(model, {name.rpartition(".")[0] for name in others} - {""})
    return adapter


def _suffixes(model: nn.Module, names: Collection[str]) -> list[str]:
    """How PEFT names modules: by the last part of their paths, or by the paths where another module has such a part."""
    last = {name.rpartition(".")[2] for name in names}
    known = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if known <= set(names) else names)


def _others(model: nn.Module, layers: dict[str, LoraLinear]) -> dict[str, nn.Parameter]:
    own = {id(parameter) for layer in layers.values() for parameter in (layer.lora_a, layer.lora_b)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def adapter_recipe(adapter: LoraAdapter, base: Recipe | str = "qlora") -> Recipe:
    """The recipe whose layers take an adapter of another's training: ``base`` with its rank, scaling and dropout.

    Layers that the adapter lacks are for ``overrides``: ``{"*.mlp.*": "nf4-dq"}`` packs them without LoRA.

    Raises:
        ValueError: layers of different ranks or scalings, which ``overrides`` would have to say.

    >>> adapter = LoraAdapter({"up": LoraWeight(torch.ones(2, 8), torch.zeros(4, 2))}, r=2, lora_alpha=4)
    >>> adapter_recipe(adapter).scheme.lora_rank, adapter_recipe(adapter).scheme.lora_alpha
    (2, 4.0)
    """
    kinds = {(weight.a.shape[0], adapter.scaling(name)) for name, weight in adapter.layers.items()}
    if len(kinds) != 1:
        raise ValueError(f"adapter_recipe: expected layers of one rank and scaling, got {sorted(kinds)}")
    ((rank, scaling),) = kinds
    change = {"lora_rank": rank, "lora_alpha": scaling * rank, "lora_dropout": adapter.lora_dropout}
    return changed_recipe(base, {"scheme": change})


@torch.no_grad()
def set_lora_adapter(model: nn.Module, adapter: LoraAdapter) -> None:
    """Copies an adapter's matrices, and what else it trained, into the model: all or nothing.

    Args:
        model: prepared with the adapter's rank and scaling: ``prepare(model, adapter_recipe(adapter))``.
        adapter: of :func:`quantrain.nn.load_lora_adapter`.

    Raises:
        ValueError: a layer that is no :class:`LoraLinear` of the model, one that the adapter lacks, another rank, shape
            or scaling.

    >>> model = nn.Sequential(LoraLinear(64, 8))
    >>> set_lora_adapter(model, lora_adapter(model))
    """
    layers = _layers("set_lora_adapter", model)
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(
            f"set_lora_adapter: expected a LoraAdapter (load_lora_adapter reads a folder), got {type(adapter).__name__}"
        )
    copies: list[tuple[Tensor, Tensor]] = []

    def add(name: str, to: Tensor, given: Tensor) -> None:
        if to.shape != given.shape:
            raise ValueError(f"set_lora_adapter: expected {name} of shape {list(to.shape)}, got {list(given.shape)}")
        copies.append((to, given))

    for name, given in adapter.layers.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(
                f"set_lora_adapter: expected a LoraLinear for every layer of the adapter, got none for {name!r}"
            )
        add(f"lora_a of {name!r}", layer.lora_a, given.a)
        add(f"lora_b of {name!r}", layer.lora_b, given.b)
        scaling = adapter.scaling(name)
        if abs(layer.scaling - scaling) > 1e-6 * abs(scaling):
            raise ValueError(
                f"set_lora_adapter: expected the adapter's scaling {scaling:g} at {name!r} (lora_alpha of "
                f"{scaling * given.a.shape[0]:g} in the recipe), got {layer.scaling:g}"
            )
    if missing := [name for name in layers if name not in adapter.layers]:
        raise ValueError(
            f"set_lora_adapter: expected a layer of the adapter for every LoraLinear, got none for {missing[0]!r}"
        )
    parameters = dict(model.named_parameters())
    for name, given in adapter.others.items():
        if name not in parameters:
            raise ValueError(
                "set_lora_adapter: expected a parameter of the model for every other tensor of the adapter, got none "
                f"for {name!r}"
            )
        add(repr(name), parameters[name], given)
    for to, given in copies:
        to.copy_(given)


class MergeTable(Table):
    """What merging cost: per layer ``weight_error``, |round(W + s B A) - (W + s B A)| / |W + s B A|, and
    ``update_error``, the same over |s B A| (None without LoRA). Norms are Frobenius norms; both are printed in percent.
    An update_error near 1 means that rounding swallowed what was trained."""

    def __init__(self, rows: Sequence[dict]):
        errors = {"weight_error": "weight error %", "update_error": "update error %"}
        percent = [{f"{key}_pct": None if row[key] is None else 100 * row[key] for key in errors} for row in rows]
        columns = {"layer": "layer", **{f"{key}_pct": header for key, header in errors.items()}}
        rows = [{**row, **shown} for row, shown in zip(rows, percent, strict=True)]
        super().__init__(columns, rows, title=f"merged: {len(rows)} layers")


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes packed layers float layers again, LoRA merged: W + scaling B A, rounded once to ``dtype``.

    Never back into 4 bits: rounding W + scaling B A to the 4-bit grid would lose most of the update.

    Args:
        model: with :class:`Linear4bit`, :class:`LoraLinear` or :class:`Embedding4bit` layers; changed in place.
        dtype: float32, float16 or bfloat16; by default each layer's weight's own type before it was packed.

    Returns:
        The model (a new module where it is itself such a layer), whose float layers are of the classes that ``prepare``
        found, frozen; its attribute ``merge_report`` (:class:`MergeTable`) says what rounding cost. Another dtype than the
        model's is for all of it: ``merge(model, torch.bfloat16).to(torch.bfloat16)``. Adapters that are off are left out.

    Raises:
        ValueError: no such layer, or another dtype.

    >>> model = merge(nn.Sequential(LoraLinear(64, 8)), torch.bfloat16)
    >>> model[0].weight.dtype, model.merge_report.rows[0]["weight_error"] < 2**-8
    (torch.bfloat16, True)
    """
    check_model("merge", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FourBitLayer)}
    if not layers:
        raise ValueError("merge: expected a model with layers of 4 bits, got none")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"merge: expected dtype float32, float16 or bfloat16, got {dtype}")
    rows, twins = [], {}
    for name, layer in layers.items():
        twins[id(layer)], row = _merged(layer, dtype or layer.weight_dtype)
        rows.append({"layer": name or "(model)", **row})
    model = swapped(model, twins)
    model.merge_report = MergeTable(rows)
    return model


@torch.no_grad()
def _merged(layer: FourBitLayer, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    lora = isinstance(layer, LoraLinear) and layer.lora_enabled
    weight, weight_error, update_error = _C.merged_weight(
        layer.packed_weight(),
        layer.lora_a.detach() if lora else None,
        layer.lora_b.detach() if lora else None,
        layer.scaling if lora else 0.0,
        dtype,
    )
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if not isinstance(layer, Linear4bit):
        twin = nn.Embedding(*weight.shape, padding_idx=layer.padding_idx, device="meta")
    elif layer.transposed:
        twin = layer.kept_class(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        twin = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    twin.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        twin.bias = nn.Parameter(bias, requires_grad=False)
    row = {"weight_error": weight_error, "update_error": update_error if lora else None}
    return with_hooks_of(layer, twin).train(layer.training), row
