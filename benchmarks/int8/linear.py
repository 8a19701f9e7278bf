"""Sections linear, one layer's forward and backward pass against nn.Linear in bfloat16, and torchao, the same of a peer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from common.checks import poisoned, relative_error, require
from common.sections import SectionReport
from common.timing import kernel_seconds, step_seconds
from torch import Tensor, nn

import quantrain

# (tokens, in, out), the ratio to reach over bfloat16
SHAPES = (
    ((16384, 4096, 14336), 1.6),
    ((8192, 4096, 4096), 1.4),
    ((16384, 2048, 8192), 1.4),
    ((16384, 1024, 4096), 1.1),
    ((16384, 768, 3072), 1.0),
)
QUICK = (((256, 128, 192), None),)
SETS = 2

Layer = Callable[[Tensor, Tensor], Tensor]  # (input, weight) -> output


def int8_layer(choice: str) -> Layer:
    """int8_linear with ``choice`` for its three products."""
    return lambda x, w: quantrain.int8_linear(x, w, output=choice, grad_input=choice, grad_weight=choice)


class Pass:
    """Forward and backward of one layer, on operands that take turns.

    Calling it with a number runs once; gradients are new at each call, as after ``zero_grad(set_to_none=True)``.
    """

    def __init__(self, layer: Layer, shape: tuple[int, int, int], device: str) -> None:
        tokens, inputs, outputs = shape
        bf16 = torch.bfloat16
        self.layers = [layer] * SETS
        self.x = [torch.randn(tokens, inputs, device=device).to(bf16).requires_grad_() for _ in range(SETS)]
        self.w = [(0.03 * torch.randn(outputs, inputs, device=device)).to(bf16).requires_grad_() for _ in range(SETS)]
        self.dy = [torch.randn(tokens, outputs, device=device).to(bf16) for _ in range(SETS)]

    def __call__(self, index: int) -> None:
        x, w = self.x[index % SETS], self.w[index % SETS]
        x.grad = w.grad = None
        self.layers[index % SETS](x, w).backward(self.dy[index % SETS])

    def check(self, name: str, limit: float = 0.03, poison: bool = True) -> dict[str, float]:
        """Relative errors of y, dx, dw against float32."""
        x, w, dy = self.x[0], self.w[0], self.dy[0]
        with poisoned() if poison else nullcontext():
            y = self.layers[0](x, w)
            x.grad = w.grad = None
            y.backward(dy)
        with torch.no_grad():
            exact = {
                "y": (y, x.float() @ w.float().t()),
                "dx": (x.grad, dy.float() @ w.float()),
                "dw": (w.grad, dy.float().t() @ x.float()),
            }
            errors = {key: relative_error(*pair) for key, pair in exact.items()}
        for key, error in errors.items():
            require(error < limit, f"{name}: relative error of {key} {error:.4f}")
        return errors


def linear(report: SectionReport, device: str, quick: bool) -> None:
    """int8 in all three products, and "auto", over nn.Linear: launches included (ratio) and on the device's clock alone."""
    for shape, target in QUICK if quick else SHAPES:
        passes = [Pass(layer, shape, device) for layer in (F.linear, int8_layer("int8"), int8_layer("auto"))]
        errors = passes[1].check("int8_linear")
        passes[2].check('int8_linear "auto"')
        eager = step_seconds(passes, device)
        alone = kernel_seconds(passes, device, repeats=9)
        name = "x".join(map(str, shape))
        for kind, index in (("int8", 1), ("auto", 2)):
            figures = {"bf16_ms": 1e3 * eager[0], "int8_ms": 1e3 * eager[index]}
            figures |= {"device_ratio": alone[0] / alone[index], "device_bf16_ms": 1e3 * alone[0]}
            if kind == "int8":
                figures |= {f"error_{key}": error for key, error in errors.items()}
            report.row("linear", f"{name} {kind}", eager[0] / eager[index], target, **figures)
        del passes
        gc.collect()
    gemms(report, device, quick)


def gemms(report: SectionReport, device: str, quick: bool) -> None:
    """One product in int8 at a time, the others in floating point: which of them pays at the smallest and the largest shape."""
    for shape, _ in QUICK if quick else (SHAPES[0], SHAPES[-1]):
        choices = ("output", "grad_input", "grad_weight")
        layers = [F.linear] + [
            (lambda x, w, chosen=chosen: quantrain.int8_linear(x, w, **chosen))
            for chosen in ({name: "int8" if name == one else "none" for name in choices} for one in choices)
        ]
        passes = [Pass(layer, shape, device) for layer in layers]
        for one, found in zip(choices, passes[1:], strict=True):
            found.check(f"int8_linear {one}")
        base, *times = kernel_seconds(passes, device, repeats=7)
        for one, seconds in zip(choices, times, strict=True):
            report.row(
                "linear", f"{'x'.join(map(str, shape))} only {one}", base / seconds, None, device_ms=1e3 * seconds
            )


# ---- torchao ---------------------------------------------------------------------------------------------------------------


def torchao(report: SectionReport, device: str, quick: bool, seconds: float) -> None:
    """torchao's compiled int8 mixed precision at the same shapes, with ours in the same turns; skipped where it is absent.

    Its Triton kernel tries some thirty configurations a shape at its first call, so no shape is begun after ``seconds``.
    """
    try:
        import torchao as package
        from torchao.prototype.quantized_training import int8_mixed_precision_training  # noqa: F401
    except Exception as error:
        report.note(f"torchao: skipped, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    report.note(f"torchao {package.__version__}")
    deadline = time.monotonic() + seconds
    for shape, _ in QUICK if quick else reversed(SHAPES):
        if time.monotonic() > deadline:
            report.note(f"torchao: out of time before {shape}")
            break
        torch._dynamo.reset()
        passes = [Pass(F.linear, shape, device), TorchaoPass(shape, device), Pass(int8_layer("int8"), shape, device)]
        errors = passes[1].check("torchao", 0.05, poison=False)  # poisoned, it would be compiled twice
        require(min(errors.values()) > 0.004, f"torchao: too exact for int8: {errors}")
        bf16, theirs, ours = step_seconds(passes, device)
        alone = kernel_seconds(passes, device, repeats=7)
        figures = {"bf16_ms": 1e3 * bf16, "torchao_ms": 1e3 * theirs, "int8_ms": 1e3 * ours}
        figures |= {"device_ratio": alone[0] / alone[1], "ours_over_torchao": theirs / ours, "error_dw": errors["dw"]}
        report.row("torchao", "x".join(map(str, shape)), bf16 / theirs, None, **figures)
        del passes
        gc.collect()


class TorchaoPass(Pass):
    """A Pass of compiled layers whose weights are torchao's, with int8 products in all three places."""

    def __init__(self, shape: tuple[int, int, int], device: str) -> None:
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_

        super().__init__(F.linear, shape, device)
        for index, weight in enumerate(self.w):
            linear = nn.Linear(shape[1], shape[2], bias=False, device=device, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.detach())
            model = nn.Sequential(linear)
            # torchao 0.17 on torch 2.11: the other way, by a tensor subclass, multiplies in bfloat16.
            quantize_(model, int8_mixed_precision_training(module_swap=True))
            self.w[index] = model[0].weight
            compiled = torch.compile(model)
            self.layers[index] = lambda x, w, compiled=compiled: compiled(x)
