"""quantize: a float model to a converted one in a call, with a measurement at its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantrain._C import Recipe
from quantrain.nn import QuantLayer, as_recipe, calibrate, calibration, convert, prepare
from quantrain.nn.calibrate import evaluating, run_batch

from .blocks import block_names, captured_calls, run_block, without_cache
from .report import QuantizationReport, log_probabilities, quantization_report

__all__ = ["quantize"]

Progress = Callable[[int, int, str], None]


def quantize(
    model: nn.Module,
    recipe: Recipe | str,
    batches: Iterable[Any] = (),
    *,
    overrides: Mapping[str, Recipe | str | Mapping] | None = None,
    skip: Iterable[str] = (),
    sequential: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    check_batch: Any = None,
    max_kl: float | None = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """Prepares, calibrates and converts ``model`` in place, and compares its predictions with the float model's.

    Args:
        model: a float model whose output is logits or has them (``.logits``).
        recipe: a recipe for layers that need no training: ``zeroquant-w8a8``, ``llm-int8``, ``smoothquant-w8a8``,
            ``gptq-w4a16``, ``awq-w4a16``, ``w8a16``, ``nf4``, ..., or a :class:`quantrain.Recipe`.
        batches: calibration data, each as :func:`quantrain.nn.calibrate` takes it. Recipes that need none (zeroquant,
            nf4, w8a16) take the first to compare on, if there is one.
        overrides, skip: as :func:`quantrain.nn.prepare`.
        sequential: calibrate and convert block by block, each on what the converted blocks before it give: statistics of
            one block are held at a time (a Hessian has K x K numbers), and a block makes up for the error of those
            before. None: where the recipe needs Hessians and the model has blocks. False: all layers from one pass of
            the float model.
        forward: called as ``forward(model, batch)``.
        check_batch: what the predictions are compared on; None: the first of ``batches``. Better one that calibration
            does not see. False: nothing is compared.
        max_kl: nats; a larger mean KL(float || quantized) raises. None: anything goes.
        progress: called with (blocks done, blocks, name of the next).

    Returns:
        The model, converted, in evaluation mode, with the attribute ``ptq_report`` (:class:`QuantizationReport`; None
        where nothing is compared).

    Raises:
        ValueError: no batch where the recipe needs calibration; NaN or Inf in a layer's input; a Hessian that no damping
            makes positive definite, naming the layer; a KL above ``max_kl`` (the model is converted then, and has its
            report).

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> quantize(model, "smoothquant-w8a8", [torch.randn(32, 64)], skip=["2"]).ptq_report.kl < 0.01
    True
    """
    recipe = as_recipe(recipe)
    if isinstance(batches, (torch.Tensor, Mapping, str)):
        raise TypeError(f"quantize: expected batches to be an iterable of batches, got one {type(batches).__name__}")
    batches, forward = list(batches), forward or run_batch
    check_batch = batches[0] if check_batch is None and batches else check_batch
    compares = check_batch is not None and check_batch is not False
    exact = None if not compares else log_probabilities(model, check_batch, forward=forward)
    if exact is not None and not bool(torch.isfinite(exact).all()):
        raise ValueError("quantize: expected finite logits of the float model, got NaN or Inf")
    prepare(model, recipe, overrides=overrides, skip=skip)
    blocks = block_names(model)
    waiting = _waiting(model)
    if waiting and not batches:
        raise ValueError(f"quantize: expected batches to calibrate {recipe.name!r} on, got none")
    if sequential is None:
        sequential = bool(blocks) and any(_has_hessian(layer) for layer in waiting.values())
    if sequential and not blocks:
        raise ValueError("quantize: expected blocks (an nn.ModuleList of one class) with sequential=True, got none")
    if waiting and sequential:
        _convert_blocks(model, blocks, batches, forward, progress)
        waiting = _waiting(model)
    if waiting:
        with without_cache(model):
            calibrate(model, batches, forward=forward)
        _check_statistics(waiting)
    if _prepared(model):
        _convert_layers(model, blocks, progress)
    model.eval()
    model.ptq_report = None
    if exact is not None:
        model.ptq_report = quantization_report(model, check_batch, exact, forward=forward)
        _check_kl(model.ptq_report, recipe, max_kl)
    return model


def _prepared(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def _waiting(model: nn.Module) -> dict[str, QuantLayer]:
    """Prepared layers that have to be shown tensors first."""
    return {name: layer for name, layer in _prepared(model).items() if layer.missing_range() is not None}


def _has_hessian(layer: QuantLayer) -> bool:
    observer = getattr(layer, "input_observer", None)
    return observer is not None and observer.hessian is not None


def _check_statistics(layers: Mapping[str, QuantLayer]) -> None:
    for name, layer in layers.items():
        observer = getattr(layer, "input_observer", None)
        if observer is not None and not bool(torch.isfinite(observer.absmax).all()):
            raise ValueError(f"quantize: layer '{name}': expected finite inputs in calibration, got NaN or Inf")


def _convert_blocks(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    progress: Progress | None,
) -> None:
    """Calibrates and converts one block after the other, on the outputs of the converted ones before."""
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in names]
    with evaluating(model), without_cache(model), torch.no_grad():
        with _float_products(model):
            hidden, calls = captured_calls(model, blocks, batches, forward)
        for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
            if progress is not None:
                progress(index, len(blocks), name)
            layers = _prepared(block)
            if layers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of layers not reached: an error below
                    with calibration(block):
                        for x, call in zip(hidden, calls[index], strict=True):
                            run_block(block, x, call)
                    _check_statistics({f"{name}.{key}": layer for key, layer in layers.items()})
                    _named(name, lambda block=block: convert(block))
                block.__dict__.pop("calibration_report", None)
            hidden = [run_block(block, x, call) for x, call in zip(hidden, calls[index], strict=True)]
            calls[index] = []
    if progress is not None:
        progress(len(blocks), len(blocks), "")


def _float_products(model: nn.Module):
    """Within it prepared layers compute in floating point."""
    from contextlib import contextmanager

    from quantrain.nn import FakeQuantize, enable_fake_quant

    @contextmanager
    def context():
        switches = [(m, m.fake_quant_enabled) for m in model.modules() if isinstance(m, FakeQuantize)]
        enable_fake_quant(model, False)
        try:
            yield
        finally:
            for module, enabled in switches:
                module.enable_fake_quant(enabled)

    return context()


def _convert_layers(model: nn.Module, blocks: Sequence[str], progress: Progress | None) -> None:
    """Converts what is left, a block at a time where there are blocks, so that progress can be told."""
    modules = dict(model.named_modules())
    left = [name for name in blocks if _prepared(modules[name])] if progress is not None else []
    for index, name in enumerate(left):
        progress(index, len(left), name)
        _named(name, lambda name=name: convert(modules[name]))
    if _prepared(model):
        convert(model)
    if progress is not None and left:
        progress(len(left), len(left), "")


def _named(name: str, run: Callable[[], Any]) -> Any:
    """Errors say which block."""
    try:
        return run()
    except ValueError as error:
        raise ValueError(f"quantize: block '{name}': {error}") from error


def _check_kl(report: QuantizationReport, recipe: Recipe, max_kl: float | None) -> None:
    if max_kl is not None and not report.kl <= max_kl:
        raise ValueError(
            f"quantize: expected a KL of at most {max_kl:g} nats from the float model under {recipe.name!r}, got "
            f"{report.kl:.3g} (the model is converted; max_kl=None takes it as it is)"
        )
