"""Losses of a student against its teacher, and what keeps pruned weights at zero, beside PyTorch's operators, all in one run.

    python benchmarks/bench_distillation.py [--device cpu|cuda] [--quick] [--json FILE]

distillation_kl: 4,096 rows of 49,152 logits, forward and backward together. Beside it what PyTorch has: log_softmax of both over
the temperature and kl_div, in the logits' type and, as users do it for its rounding, in float32. Each is held against float64 on
a few rows before it is timed. Bytes: both read twice, the gradient written once. Memory: the most that a call holds beside its
inputs, over a gradient. hidden_mse and hidden_cosine likewise. Masks: adamw_8bit_ with moments of 32 and of 8 bits with a mask
of half of the weights beside the same step without one, and apply_masks_ beside a multiplication. Products of 2:4 weights: int8
through cuSPARSELt with scales of output channels beside int8_mm of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common.cases import parser_of, report_of
from common.report import Measured, Report
from common.timing import Run, copy_rate, kernel_seconds
from torch import Tensor

import quantrain
from quantrain.optim import AdamW8bit

SHAPES = [(4096, 49152), (4096, 50257), (16384, 32000)]
TEMPERATURE = 2.0


def pytorch_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher))
    return F.kl_div(s, t, log_target=True, reduction="batchmean") * TEMPERATURE**2


def pytorch_kl_float(student: Tensor, teacher: Tensor) -> Tensor:
    return pytorch_kl(student.float(), teacher.float())


def ours_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return quantrain.distillation_kl(student, teacher, temperature=TEMPERATURE)


def step(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    student.grad = None
    loss(student, teacher).backward()
    return student.grad


def verify(device: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(8, 5001, device=device).mul(3).to(dtype) for _ in range(2))
    exact = student.double().requires_grad_()
    grad = step(ours_kl, student.requires_grad_(), teacher)
    loss = pytorch_kl(exact, teacher.double())
    loss.backward()
    assert abs(float(ours_kl(student, teacher)) - float(loss)) < 1e-4 * float(loss)
    assert (grad.double() - exact.grad).abs().max() < 2e-2 * exact.grad.abs().max()


def peak_over_gradient(loss: Callable, student: Tensor, teacher: Tensor) -> float:
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, student, teacher)
    return (torch.cuda.max_memory_allocated() - before) / (student.numel() * student.element_size())


def bench_losses(report: Report, rate: float, quick: bool) -> None:
    device = report.device
    for shape in [(64, 1000)] if quick else SHAPES if device == "cuda" else [(128, 49152)]:
        for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
            verify(device, dtype)
            student = torch.randn(shape, device=device, dtype=dtype).mul_(3).requires_grad_()
            teacher = (student.detach() + torch.randn_like(student)).contiguous()
            losses = {"distillation_kl": ours_kl, "torch": pytorch_kl, "torch float32": pytorch_kl_float}
            runs: list[Run] = [lambda _, f=f: step(f, student, teacher) for f in losses.values()]
            ours, native, wide = kernel_seconds(runs, device, repeats=5 if quick else 9)
            moved = 5 * student.numel() * student.element_size()
            more = {"float32": wide / ours}
            if device == "cuda":
                more |= {f"memory, {name}": peak_over_gradient(f, student, teacher) for name, f in losses.items()}
            what = ("distillation_kl, both ways", "rows", dtype, shape)
            report.measured(Measured(*what, ours, moved, rate, native, more))
            del student, teacher
    for name, native in (
        ("hidden_mse", F.mse_loss),
        ("hidden_cosine", lambda s, t: 1 - F.cosine_similarity(s, t, -1).mean()),
    ):
        shape = (64, 256) if quick else (16384, 4096) if device == "cuda" else (2048, 768)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        student = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        teacher = torch.randn(shape, device=device, dtype=dtype)
        both = [getattr(quantrain, name), native]
        ours, theirs = kernel_seconds([lambda _, f=f: step(f, student, teacher) for f in both], device)
        moved = 5 * student.numel() * student.element_size()
        report.measured(Measured(f"{name}, both ways", "rows", dtype, shape, ours, moved, rate, theirs))


def masked_step(parameters: list[Tensor], bits: int, masks: list[Tensor]) -> Run:
    optimizer = AdamW8bit(parameters, bits=bits, lr=1e-4)
    optimizer.step()
    states = [optimizer.state[p] for p in parameters]
    none = parameters[0].new_empty(0, dtype=torch.float32)
    lists = [
        [p.detach() for p in parameters],
        [p.grad for p in parameters],
        [s["exp_avg"] for s in states],
        [s.get("exp_avg_scale", none) for s in states],
        [s["exp_avg_sq"] for s in states],
        [s.get("exp_avg_sq_scale", none) for s in states],
        [s["step"] for s in states],
    ]
    lr = torch.tensor(1e-4, device=none.device)
    return lambda _: torch.ops.quantrain.adamw_8bit_(*lists, lr=lr, masks=masks)


def bench_masks(report: Report, rate: float, quick: bool) -> None:
    device = report.device
    count, size = (2, 1000) if quick else (100, 4_000_000) if device == "cuda" else (4, 1_000_000)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator(device).manual_seed(0)
        parameters = [
            torch.randn(size, device=device, generator=generator).to(dtype).requires_grad_() for _ in range(count)
        ]
        masks = []
        for p in parameters:
            p.grad = torch.randn(size, device=device, generator=generator).to(dtype)
            masks.append(quantrain.prune_mask(p, sparsity=0.5))
        width = torch.finfo(dtype).bits // 8
        for bits in (32, 8):
            runs = [masked_step(parameters, bits, masks), masked_step(parameters, bits, [])]
            ours, plain = kernel_seconds(runs, device, repeats=9)
            moved = (3 * width + (16 if bits == 32 else 4 + 16 / 256) + 1 / 8) * size * count
            what = (f"adamw_8bit_, {bits} bits, masked", "half", dtype, (count, size))
            report.measured(Measured(*what, ours, moved, rate, plain, {"of bytes": (moved - size * count / 8) / moved}))
        weights = [p.detach() for p in parameters]
        dense = [quantrain.unpack_mask(m, w.shape) for m, w in zip(masks, weights, strict=True)]
        both: list[Run] = [
            lambda _: quantrain.apply_masks_(weights, masks),
            lambda _: torch._foreach_mul_(weights, dense),
        ]
        ours, native = kernel_seconds(both, device)
        report.measured(
            Measured("apply_masks_", "half", dtype, (count, size), ours, size * count * (width + 1 / 8), rate, native)
        )
        del parameters, masks, weights, dense


def bench_sparse_products(report: Report) -> None:
    """us of int8 2:4 products with bfloat16 results against int8_mm and bfloat16; a line per shape."""
    lines = []
    for rows, out, inner in ((16384, 4096, 1024), (16384, 1024, 4096), (8192, 4096, 4096), (8192, 14336, 4096)):
        weight = torch.randint(-127, 128, (out, inner), device="cuda", dtype=torch.int8)
        mask = quantrain.prune_mask(weight.float(), pattern="2:4")
        quantrain.apply_masks_([weight], [mask])
        inputs = [torch.randint(-127, 128, (rows, inner), device="cuda", dtype=torch.int8) for _ in range(4)]
        scale, row_scale = torch.rand(out, 1, device="cuda") * 1e-3, torch.rand(rows, 1, device="cuda")
        packed = torch._cslt_compress(weight)

        def sparse(i, packed=packed, inputs=inputs, scale=scale):
            return torch._cslt_sparse_mm(packed, inputs[i % 4].t(), alpha=scale.flatten(), out_dtype=torch.bfloat16)

        def dense(i, weight=weight, inputs=inputs, scale=scale, row_scale=row_scale):
            return quantrain.int8_mm(inputs[i % 4], weight, row_scale, scale, out_dtype=torch.bfloat16)

        exact = (weight[:64].double() @ inputs[0].double().t()) * scale[:64].double()
        assert (sparse(0)[:64].double() - exact).abs().max() <= 1e-2 * exact.abs().max()
        half = [x.bfloat16() for x in inputs]
        weight_half = weight.bfloat16()
        runs = [sparse, dense, lambda i, h=half, w=weight_half: h[i % 4] @ w.t()]
        found, ours, bf16 = kernel_seconds(runs, "cuda")
        lines.append(
            f"int8 2:4 {rows} x {out} x {inner}: {found * 1e6:.1f} us, int8_mm {ours * 1e6:.1f} ({ours / found:.2f}x), "
            f"bfloat16 {bf16 * 1e6:.1f} ({bf16 / found:.2f}x)"
        )
    print("\n".join(lines), flush=True)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    report = report_of("bench_distillation", options)
    rate = copy_rate(report.device)
    bench_losses(report, rate, options.quick)
    bench_masks(report, rate, options.quick)
    if report.device == "cuda" and not options.quick:
        bench_sparse_products(report)


if __name__ == "__main__":
    main()
