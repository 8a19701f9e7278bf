"""quantize: a float model to a converted one in a call, with a measurement at its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantrain._C import Recipe
from quantrain.nn import QuantizedLayer, QuantLayer, as_recipe, calibrate, calibration, convert, prepare
from quantrain.nn.calibrate import check_batches, enable_fake_quant, evaluating, keeping_fake_quant, run_batch
from quantrain.nn.graph import copied
from quantrain.nn.int8_blocks import fuse_int8_blocks
from quantrain.nn.prepare import PrepareSummary, some
from quantrain.nn.schemes import handler_of

from .blocks import NoChain, block_names, captured_calls, run_block, without_cache
from .distill import LayerDistillation, distill_layers
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
    statistics_device: torch.device | str | None = None,
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
            before. None: where the recipe needs Hessians and the model has blocks, each of which runs once on what the
            one before gives. False: all layers from one pass of the float model.
        statistics_device: where calibration counts; None: beside the weights. ``"cpu"`` spares a GPU's memory (Hessians
            of all layers at once, with ``sequential=False``) and waits for the GPU at each layer and batch.
        forward: called as ``forward(model, batch)``.
        check_batch: what the predictions are compared on; None: the first of ``batches``. Better one that calibration
            does not see. False: nothing is compared.
        max_kl: nats; a larger mean KL(float || quantized) raises. None: anything goes.
        progress: called with (blocks done, blocks, name of the next).

    Returns:
        The model (a new module where ``model`` is itself such a layer), converted, in evaluation mode, with the attribute
        ``ptq_report`` (:class:`QuantizationReport`; None where nothing is compared) and ``ptq_distillation``
        (:class:`LayerDistillation` under recipes with ``distill_steps``, such as ``zeroquant-w4a8-lkd``, else None).

    Raises:
        ValueError: no batch where the recipe needs calibration or distils; NaN or Inf in a layer's input; a Hessian that no damping
            makes positive definite, naming the layer; a KL above ``max_kl`` (the model is converted then, and has its
            report); a recipe that makes a new network (``f8net``).

    Warns:
        UserWarning: layers that no batch reached, which stay in floating point; and as :func:`quantrain.nn.prepare` and
            :func:`quantrain.nn.convert`.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> quantize(model, "smoothquant-w8a8", [torch.randn(32, 64)], skip=["2"]).ptq_report.kl < 0.01
    True
    """
    recipe = as_recipe(recipe)
    if handler_of(recipe).rebuilds:
        raise ValueError(f"quantize: expected a recipe for layers, got {recipe.name!r}, which makes a new network")
    check_batches("quantize", batches)
    batches, forward = list(batches), forward or run_batch
    check_batch = batches[0] if check_batch is None and batches else check_batch
    steps = getattr(recipe.scheme, "distill_steps", 0)
    if steps and not batches:
        raise ValueError(f"quantize: expected batches to distill {recipe.name!r} on, got none")
    if steps and (wrong := {p.dtype for p in model.parameters()} - {torch.float32}):
        raise ValueError(f"quantize: expected parameters of float32 to distill {recipe.name!r} on, got {wrong.pop()}")
    compares = check_batch is not None and check_batch is not False
    exact = None if not compares else log_probabilities(model, check_batch, forward=forward)
    if exact is not None and not bool(torch.isfinite(exact).all()):
        raise ValueError("quantize: expected finite logits of the float model, got NaN or Inf")
    teacher = copied(model) if steps else None
    model = prepare(model, recipe, overrides=overrides, skip=skip)
    if statistics_device is not None:
        for layer in _prepared(model).values():
            if getattr(layer, "input_observer", None) is not None:
                layer.input_observer.to(statistics_device)
    blocks = block_names(model)
    waiting = _waiting(model)
    if waiting and not batches:
        raise ValueError(f"quantize: expected batches to calibrate {recipe.name!r} on, got none")
    chosen = sequential is None
    if chosen:
        sequential = bool(blocks) and any(_has_hessian(layer) for layer in waiting.values())
    if sequential and not blocks:
        raise ValueError("quantize: expected blocks (an nn.ModuleList of one class) with sequential=True, got none")
    unreached: list[str] = []
    if waiting and sequential:
        try:
            _convert_blocks(model, blocks, batches, forward, progress, unreached)
        except NoChain:  # raised before a block is converted
            if not chosen:
                raise
        waiting = _waiting(model)
    if waiting:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "calibrate: never reached", UserWarning)  # one at the end names them
            with without_cache(model):
                calibrate(model, batches, forward=forward)
        _check_statistics(waiting)
    distillation = None if teacher is None else _distilled(model, teacher, recipe, batches, forward, progress)
    del teacher
    if _prepared(model):
        model = _convert_layers(model, blocks, progress, unreached)
    _leave_float(model, unreached)
    model.eval()
    fuse_int8_blocks(model)  # those converted one by one are: it tells the summary
    model.ptq_report, model.ptq_distillation = None, distillation
    if exact is not None:
        model.ptq_report = quantization_report(model, check_batch, exact, forward=forward)
        _check_kl(model.ptq_report, recipe, max_kl)
    return model


def _distilled(
    model: nn.Module,
    teacher: nn.Module,
    recipe: Recipe,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    progress: Progress | None,
) -> LayerDistillation:
    """Trains the prepared model's blocks as the recipe says."""
    steps, lr = recipe.scheme.distill_steps, recipe.scheme.distill_lr
    model.requires_grad_(True)  # what is trained here is converted next
    tell = None if progress is None else lambda step, loss: progress(step, steps, f"distillation, loss {loss:.3g}")
    return distill_layers(model, teacher, batches, steps=steps, lr=lr, forward=forward, progress=tell)


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
    unreached: list[str],
) -> None:
    """Calibrates and converts one block after the other, on the outputs of the converted ones before."""
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in names]
    with evaluating(model), without_cache(model), torch.no_grad():
        with keeping_fake_quant(model):
            enable_fake_quant(model, False)
            hidden, calls = captured_calls(model, blocks, batches, forward)
        for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
            if progress is not None:
                progress(index, len(blocks), name)
            layers = _prepared(block)
            if layers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of layers not reached: one at the end
                    with calibration(block):
                        for x, call in zip(hidden, calls[index], strict=True):
                            run_block(block, x, call)
                _check_statistics({_path(name, key): layer for key, layer in layers.items()})
                block.__dict__.pop("calibration_report", None)
                block = _convert_part(model, name, unreached)
            hidden = [run_block(block, x, call) for x, call in zip(hidden, calls[index], strict=True)]
            calls[index] = []
    if progress is not None:
        progress(len(blocks), len(blocks), "")


def _convert_layers(
    model: nn.Module, blocks: Sequence[str], progress: Progress | None, unreached: list[str]
) -> nn.Module:
    """Converts what is left, a block at a time where there are blocks, so that progress can be told."""
    reached = any(layer.missing_range() is None for layer in _prepared(model).values())
    if not reached and not any(isinstance(module, QuantizedLayer) for module in model.modules()):
        return convert(model)  # raises
    modules = dict(model.named_modules())
    left = [name for name in blocks if _prepared(modules[name])] if progress is not None else []
    for index, name in enumerate(left):
        progress(index, len(left), name)
        _convert_part(model, name, unreached)
    if _prepared(model):
        model = _convert_part(model, "", unreached)
    if progress is not None and left:
        progress(len(left), len(left), "")
    return model


def _convert_part(model: nn.Module, name: str, unreached: list[str]) -> nn.Module:
    """Converts what calibration reached of the submodule ``name``, gives it, and adds the names of the rest."""
    part = model.get_submodule(name)
    missing = [key for key, layer in _prepared(part).items() if layer.missing_range() is not None]
    converted = _named(name, lambda: convert(part, skip=missing))
    if converted is not part and name:
        model.set_submodule(name, converted)
    unreached += [_path(name, key) for key in missing]
    return converted


def _leave_float(model: nn.Module, unreached: Sequence[str]) -> None:
    """Says which layers stay float as no batch reached them."""
    if not unreached:
        return
    warnings.warn(
        f"quantize: {len(unreached)} layers stay in floating point, as no batch reached them: {some(map(repr, unreached))}",
        stacklevel=3,
    )
    summary = model.quantization_summary
    rows = [row for row in summary.rows if row["layer"] not in unreached]
    left = summary.left_float | dict.fromkeys(unreached, "no range of it was observed")
    model.quantization_summary = PrepareSummary(rows, left, summary.recipe)


def _path(name: str, key: str) -> str:
    return ".".join(part for part in (name, key) if part)


def _named(name: str, run: Callable[[], Any]) -> Any:
    """Errors say which block."""
    try:
        return run()
    except ValueError as error:
        raise ValueError(f"quantize: block '{name}': {error}" if name else f"quantize: {error}") from error


def _check_kl(report: QuantizationReport, recipe: Recipe, max_kl: float | None) -> None:
    if max_kl is not None and not report.kl <= max_kl:
        raise ValueError(
            f"quantize: expected a KL of at most {max_kl:g} nats from the float model under {recipe.name!r}, got "
            f"{report.kl:.3g} (the model is converted; max_kl=None takes it as it is)"
        )
