"""Part `variance`: noise that quantized gradients add to the weight gradient, against the noise of the batch.

For a batch with the QAT gradient g (all quantized layers' weights as one vector) and draws q_1 .. q_K of the gradient under an
fqt recipe, on the same batch and weights:
    quantization variance   mean over k and batches of ||q_k - g||^2
    bias                    K ||mean_k(q_k - g)||^2 / mean_k ||q_k - g||^2, expected 1 where E[q_k] = g and draws are independent
    batch variance          sum over batches of ||g_b - gbar||^2 / (batches - 1)
"""

from __future__ import annotations

import itertools
import time
import traceback
from dataclasses import dataclass

import torch
from common.captured import TrainingStep, learning_rate
from torch import Tensor, nn

from .recipes import QUANTIZERS, prepared, recipe_of

QAT = "qat-w8a8"


@dataclass(frozen=True)
class VarianceSettings:
    """What the part measures: ``train_steps`` of QAT first, then ``draws`` on each of ``batches``."""

    train_steps: int = 400
    lr: float = 0.01
    batches: int = 3
    draws: int = 4
    batch_variance_from: int = 32
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    modes: tuple[str, ...] = ("hardware", "paper")


def quantized_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the layers under a recipe."""
    return [module.weight for module in model.modules() if getattr(module, "recipe", None) is not None]


def freeze_statistics(model: nn.Module) -> nn.Module:
    """Running statistics no longer move, so that every draw sees the same network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


def gradients(task, model: nn.Module, batch: tuple[Tensor, Tensor], draws: int) -> list[Tensor]:
    """``draws`` flattened weight gradients of one forward pass."""
    weights = quantized_weights(model)
    loss = task.loss(model, *batch)
    found = []
    for draw in range(draws):
        grads = torch.autograd.grad(loss, weights, retain_graph=draw + 1 < draws)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return found


def trained_weights(task, settings: VarianceSettings, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The float state dict after some steps of QAT."""
    model = prepared(task, task.model(0, weights), QAT)
    step = TrainingStep(task, model, "fp32")
    for number, index in enumerate(task.indices(0, settings.train_steps)):
        step(index, learning_rate(number, settings.train_steps, settings.lr))
    print(
        f"variance: {task.name}: {task.measure} {task.evaluate(model):.3f} after {settings.train_steps} steps",
        flush=True,
    )
    names = task.model(0).state_dict()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name in names}


def noise_of(task, model: nn.Module, batches, exact: list[Tensor], draws: int) -> tuple[float, float]:
    """(quantization variance, bias ratio) of a prepared model."""
    total, ratios = 0.0, []
    for batch, g in zip(batches, exact, strict=False):
        errors = torch.stack(gradients(task, model, batch, draws)) - g
        variance = float(errors.double().square().sum(dim=1).mean())
        ratios.append(draws * float(errors.double().mean(dim=0).square().sum()) / max(variance, 1e-300))
        total += variance
    return total / len(exact), sum(ratios) / len(ratios)


def measure(task, settings: VarianceSettings, weights: dict[str, Tensor] | None, deadline: float, save) -> int:
    """Every quantizer, width and mode on one network; ``save`` gets each row as it is known. Returns how many failed."""
    state = trained_weights(task, settings, weights) if settings.train_steps else weights
    exact_model = freeze_statistics(prepared(task, task.model(0, state), QAT))
    batches = [task.batch(index, augment=False) for index in task.indices(1, settings.batch_variance_from)]
    every = torch.stack([gradients(task, exact_model, batch, 1)[0] for batch in batches]).double()
    gbar = every.mean(dim=0)
    batch_variance = float((every - gbar).square().sum()) / (len(batches) - 1)
    exact = [g.float() for g in every[: settings.batches]]
    common = {"model": task.name, "batch_variance": batch_variance, "squared_norm": float(gbar.square().sum())}
    del every
    failed = 0
    for mode, bits, quantizer in itertools.product(settings.modes, settings.bits, QUANTIZERS):
        if time.monotonic() > deadline:
            print(f"variance: out of time before {task.name} {mode} {quantizer} {bits} bits", flush=True)
            break
        try:
            recipe = recipe_of(quantizer, bits, paper=mode == "paper")
            model = freeze_statistics(prepared(task, task.model(0, state), recipe))
            variance, bias = noise_of(task, model, batches, exact, settings.draws)
        except Exception:  # the other quantizers are still worth measuring
            failed += 1
            print(f"variance: FAILED {task.name} {mode} {quantizer} {bits} bits", flush=True)
            traceback.print_exc()
            continue
        save({**common, "mode": mode, "quantizer": quantizer, "bits": bits, "variance": variance, "bias": bias})
        print(
            f"{task.name:<9} {mode:<9} {quantizer:<22} {bits} bits"
            f"  quantization / batch {variance / batch_variance:9.3g}  bias {bias:5.2f}",
            flush=True,
        )
    return failed
