"""convert: prepared layers to those that store integer codes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from .calibrate import is_packed
from .conv_bn import FoldedBatchNorm2d, QuantConvBn2d
from .fuse import unfuse
from .graph import copied
from .int8_blocks import fuse_int8_blocks
from .layers import QuantEmbedding, QuantLayer
from .prepare import PrepareSummary, check_model, check_patterns, matching, some, swapped
from .quantized import QuantizedLayer, check_convertible, quantized_layer
from .schemes import SchemeHandler, handler_of, handlers

__all__ = ["convert", "is_converted"]


def convert(
    model: nn.Module,
    *,
    skip: Iterable[str] = (),
    inplace: bool = True,
    check_observed: bool = True,
    fuse_blocks: bool = True,
) -> nn.Module:
    """Swaps every prepared layer for one that stores integer codes: the same outputs as in evaluation, bit for bit.

    Where some layers have their ranges and others were never reached (experts without a token, auxiliary heads that
    evaluation does not call, layers whose weight a function reads), the others become float layers again, under their
    float names, with a warning that names them; ``quantization_summary.left_float`` lists them from then on.

    Transformer blocks whose linear layers have int8 products then run as one call each, where their structure is known and
    a trial gives what the layers give (:mod:`quantrain.nn.int8_blocks`): outputs are within the layers' own rounding, not
    bit for bit. ``quantization_summary`` says which, and why others keep separate layers.

    Args:
        model: a prepared (calibrated or trained) model.
        skip: patterns of layer names (fnmatch) to make float layers again. A file of a model with layers left float
            loads into ``convert(prepare(model, recipe), skip=[those names], check_observed=False)``.
        inplace: False works on a deep copy.
        check_observed: False converts a model whose ranges were never set: a skeleton for ``load_checkpoint``, whose
            outputs mean nothing until then.
        fuse_blocks: False keeps every block's separate layers.

    Returns:
        The model (a new module where ``model`` is itself a prepared layer). One whose layers ``prepare`` packed in 4 bits
        is returned as it is. For one in fixed point, a new
        :class:`FixedPointNetwork`, whose ``network`` is integers throughout; ``model`` stays as it is.

    Raises:
        ValueError: no prepared layer; in fixed point an accumulator that 32 bits may not hold; a layer without weight
            spec or with weights of more than 8 bits; no layer that needs ranges has them; a pattern of ``skip`` that
            names no layer. The model is then unchanged.

    Warns:
        UserWarning: layers left in floating point because no range of theirs was observed, and embeddings that were
            never called while other layers were; other layers that were never called.

    >>> import quantrain.nn as qnn
    >>> model = qnn.prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w8a8-token")
    >>> convert(model)[0].weight_codes.dtype
    torch.int8
    """
    check_model("convert", model)
    check_patterns("convert", "skip", skip)
    skip = list(skip)
    if rebuilder := next((handler for handler in handlers() if handler.is_prepared(model)), None):
        if skip:
            raise ValueError(f"convert: expected no skip for a network of integers throughout, got {skip}")
        return _convert_network(model, rebuilder, check_observed)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    if not layers:
        converted = is_converted(model)
        if not skip and is_packed(model):
            return model if inplace else copied(model)
        state = (
            "one that is converted already" if converted else "one without quantized layers (use what prepare returned)"
        )
        raise ValueError(f"convert: expected a prepared model, got {state}")
    skipped = {name for pattern in skip for name in matching("skip", pattern, layers, layers, "convert")}
    for name, layer in layers.items():
        if name not in skipped:
            check_convertible(layer, name)
    unseen = _unseen(layers, skipped) if check_observed else {}
    left = dict.fromkeys(skipped, "skip of convert") | dict.fromkeys(unseen, "no range of it was observed")
    uncalled = _uncalled(layers)
    left |= {name: "never called: a function may read its weight" for name in uncalled if _is_table(layers[name])}
    if not inplace:
        return convert(copied(model), skip=skip, check_observed=check_observed, fuse_blocks=fuse_blocks)
    if unreached := [repr(name) for name in left if name not in skipped]:
        warnings.warn(
            f"convert: {len(unreached)} of {len(layers)} layers stay in floating point, as no batch reached them: {some(unreached)}",
            stacklevel=2,
        )
    if uncalled := [name for name in uncalled if name not in left]:
        warnings.warn(
            f"convert: {len(uncalled)} of {len(layers)} layers were not called since they were prepared or loaded: "
            f"{some(map(repr, uncalled))}. If a function reads their weight, it was not rounded before and is now; "
            "convert(model, skip=[...]) leaves them in floating point",
            stacklevel=2,
        )
    twins = {id(layer): _stored(name, layer, check_observed) for name, layer in layers.items() if name not in left}
    twins |= _float_twins(model, {name: layers[name] for name in left})
    summary = getattr(model, "quantization_summary", None)
    unfuse(model)
    model = swapped(model, twins)
    if summary is not None:
        rows = [row for row in summary.rows if row["layer"] not in left]
        model.quantization_summary = PrepareSummary(rows, summary.left_float | left, summary.recipe)
    if fuse_blocks:
        fuse_int8_blocks(model)
    return model


def _stored(name: str, layer: QuantLayer, check_observed: bool) -> QuantizedLayer:
    """The converted layer; errors say which."""
    try:
        return quantized_layer(layer, check_observed=check_observed)
    except ValueError as error:
        raise ValueError(f"convert: '{name}': {error}" if name else str(error)) from error


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` holds converted layers. Layers that ``prepare`` packed count where none is left to convert."""
    modules = list(model.modules())
    stored = [module for module in modules if isinstance(module, QuantizedLayer)]
    prepared = any(isinstance(module, QuantLayer) for module in modules)
    return any(not (handler_of(layer.recipe).packs and prepared) for layer in stored) or any(
        handler.is_converted(module) for handler in handlers() for module in modules
    )


def _uncalled(layers: Mapping[str, QuantLayer]) -> list[str]:
    """Layers that were never called, and neither was one that shares their weight, while others were."""
    called = {id(layer.weight) for layer in layers.values() if layer.called}
    return [name for name, layer in layers.items() if called and id(layer.weight) not in called]


def _is_table(layer: QuantLayer) -> bool:
    """Whether the layer can only be called or read whole: an embedding, unlike an expert that waits for its tokens."""
    return isinstance(layer, QuantEmbedding)


def _unseen(layers: Mapping[str, QuantLayer], skipped: set[str]) -> dict[str, str]:
    """Layers with a range never observed -> the range's name; an error where no layer that needs one has it."""
    unseen, seen = {}, False
    for name, layer in layers.items():
        missing = layer.missing_range()
        if missing is not None and name not in skipped:
            unseen[name] = missing or name
        elif layer.needs_range:
            seen = True
    if unseen and not seen:
        raise ValueError(
            f"convert: expected observed ranges at '{next(iter(unseen.values()))}', got none "
            "(calibrate or train first; check_observed=False makes a skeleton to load a checkpoint into)"
        )
    return unseen


def _float_twins(model: nn.Module, layers: Mapping[str, QuantLayer]) -> dict[int, nn.Module]:
    """What replaces prepared layers that stay float, and the placeholders of their batch norms and of all others'."""
    twins: dict[int, nn.Module] = {}
    unfolded: dict[int, nn.BatchNorm2d] = {}
    for layer in layers.values():
        if isinstance(layer, QuantConvBn2d):
            twins[id(layer)], bn = layer.to_float_pair()
            unfolded[id(bn)] = bn
        else:
            twins[id(layer)] = layer.to_float()
    for module in model.modules():
        if isinstance(module, FoldedBatchNorm2d):
            bn = unfolded.pop(id(module.folded), None)
            twins[id(module)] = nn.Identity().train(module.training) if bn is None else bn
    if unfolded:  # a QuantConvBn2d that prepare did not make has no place for its batch norm
        for name, layer in layers.items():
            if isinstance(layer, QuantConvBn2d) and id(layer.bn) in unfolded:
                raise ValueError(f"convert: '{name}': expected observed ranges of a QuantConvBn2d, got none")
    return twins


def _convert_network(model: nn.Module, handler: SchemeHandler, check_observed: bool) -> nn.Module:
    if not check_observed:
        raise ValueError(
            "convert: expected check_observed=True for a fixed-point model, got False (FixedPointNetwork.load reads one from its file)"
        )
    summary = getattr(model, "quantization_summary", None)
    converted = handler.convert_network(model)
    if summary is not None:
        converted.quantization_summary = PrepareSummary(handler.summary_rows(model), {}, summary.recipe)
    return converted
