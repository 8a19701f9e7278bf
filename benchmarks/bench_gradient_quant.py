"""The gradient quantizers against a copy, against rounding to nearest and against PyTorch's own operators, all in one run.

    python benchmarks/bench_gradient_quant.py [--device cpu|cuda] [--quick] [--profile] [--json FILE]

Every quantizer is checked before it is timed: on CUDA bit for bit against the CPU, everywhere that the error of a draw is within a step
and its mean within five standard errors of zero. Columns: time of one stochastic call; the bytes that it must move, per second; the time
that they would take at the rate of a copy measured in the same run, as per cent of the call's time; the time of the same per_sample
arithmetic in PyTorch's operators over ours; "copies": its time over a copy's; "over_nearest": over that of the same call rounding to
nearest; "over_per_sample": over per_sample's.
Floor bytes per element of size s: two readings and one writing, 3 s (householder three readings, 4 s); codes one byte in the place of the
writing. CUDA and CPU timing as in bench_fake_quant.py; on a CPU glibc is told to keep freed memory, as the trainers do, or results would pay for page faults that the
copy's target does not. --profile: time of each CUDA kernel instead.
"""

from __future__ import annotations

import torch
from common.cases import parser_of, report_of, seconds_of
from common.report import Measured, Report

import quantrain
from quantrain.finetune.memory import keep_freed_memory

CUDA_SHAPES = (((128, 200704), torch.float32), ((16384, 4096), torch.bfloat16), ((16384, 4096), torch.float32))
CPU_SHAPES = (((128, 32768), torch.float32), ((4096, 1024), torch.float32))
QUICK = (((48, 160), torch.float32),)
BITS = 5
QUANTIZERS = ("per_tensor", "per_sample", "per_channel", "householder")
READINGS = {"householder": 3}


def gradients(shape: tuple[int, int], dtype: torch.dtype, device: str, sets: int) -> list[torch.Tensor]:
    """Rows of very different sizes, as gradients have them."""
    return [
        (torch.randn(shape, device=device) * torch.randn(shape[0], 1, device=device).exp()).to(dtype)
        for _ in range(sets)
    ]


def eager_per_sample(grad: torch.Tensor) -> torch.Tensor:
    """per_sample in PyTorch's operators."""
    x = grad.float()
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    scale = (high - low) / (2**BITS - 1)
    return (torch.floor((x - low) / scale + torch.rand_like(x)).clamp_(0, 2**BITS - 1) * scale + low).to(grad.dtype)


def check(quantizer: str, grad: torch.Tensor) -> None:
    seeded = torch.ops.quantrain.quantize_gradient.seeded
    small = grad[:300, :777]
    on_cpu = seeded(small.cpu(), BITS, quantizer, seed=1, offset=2)
    assert torch.equal(seeded(small, BITS, quantizer, seed=1, offset=2).cpu(), on_cpu), (
        f"{quantizer}: not the CPU's bits"
    )
    error = (quantrain.quantize_gradient(grad, BITS, quantizer).float() - grad.float()).double()
    rows = error / grad.float().square().mean(1, keepdim=True).sqrt()
    z = rows.mean() / (rows.std() / rows.numel() ** 0.5)
    assert error.abs().sum() > 0 and abs(z.item()) < 5, f"{quantizer}: mean error {z.item():.1f} standard errors from 0"


def profile(grads: list[torch.Tensor]) -> None:
    for quantizer in QUANTIZERS:
        with torch.profiler.profile() as profiler:
            for grad in grads * 4:
                quantrain.quantize_gradient(grad, BITS, quantizer)
            torch.cuda.synchronize()
        print(f"{quantizer} {tuple(grads[0].shape)} {grads[0].dtype}")
        for event in sorted(profiler.key_averages(), key=lambda e: -e.device_time_total):
            if event.device_time_total > 0 and "::" in event.key or "kernel" in event.key:
                print(
                    f"  {event.device_time_total / 4 / len(grads):9.1f} us  {event.count // (4 * len(grads))}x  {event.key[:150]}"
                )


def bench(report: Report, shape: tuple[int, int], dtype: torch.dtype, *, quick: bool) -> None:
    """A line for each quantizer, dequantized and as codes; the peer is the same arithmetic in PyTorch's operators."""
    sets = 3 if report.device == "cuda" else 2
    x = gradients(shape, dtype, report.device, sets)
    target = [torch.empty_like(t) for t in x]
    size, numel = x[0].element_size(), x[0].numel()
    for quantizer in QUANTIZERS:
        check(quantizer, x[0])
        for codes in (False, True):
            call = quantrain.quantize_gradient_codes if codes else quantrain.quantize_gradient
            runs = [
                lambda i: target[i].copy_(x[i]),
                lambda i: call(x[i], BITS, quantizer),
                lambda i: call(x[i], BITS, quantizer, stochastic=False),
                lambda i: quantrain.quantize_gradient(x[i], BITS, "per_sample"),
            ]
            if quantizer == "per_sample" and not codes:
                runs.append(lambda i: eager_per_sample(x[i]))
            copy, ours, nearest, per_sample, *eager = seconds_of(runs, report.device, sets, quick=quick)
            moved = (READINGS.get(quantizer, 2) * size + (1 if codes else size)) * numel
            more = {"copies": ours / copy, "over_nearest": ours / nearest, "over_per_sample": ours / per_sample}
            what = ("quantize_gradient" + ("_codes" if codes else ""), quantizer, dtype, shape)
            rate = 2 * size * numel / copy
            report.measured(Measured(*what, ours, moved, rate, eager[0] if eager else None, more))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--profile", action="store_true", help="time of each CUDA kernel instead")
    options = parser.parse_args()
    report = report_of("bench_gradient_quant", options)
    if options.device == "cpu":
        keep_freed_memory()
    cases = CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES
    for shape, dtype in QUICK if options.quick else cases:
        if options.profile:
            profile(gradients(shape, dtype, options.device, 3))
        else:
            bench(report, shape, dtype, quick=options.quick)


if __name__ == "__main__":
    main()
