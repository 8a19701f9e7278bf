"""The gradient quantisers against a copy, against rounding to nearest and against PyTorch's own operators, all in one run.

    python benchmarks/bench_gradient_quant.py [--device cpu|cuda] [--profile] [--json FILE]

Every quantiser is checked before it is timed: on CUDA bit for bit against the CPU, everywhere that the error of a draw is within a step
and its mean within five standard errors of zero. Columns: time of one stochastic call; "floor": the time that the bytes it must move
would take at the rate of a copy measured in the same run, as per cent of the call's time; "copies": its time over a copy's;
"nearest": its time over that of the same call rounding to nearest; "PSQ": over per_sample's; "eager": the time of the same per_sample
arithmetic in PyTorch's operators over ours.
Floor bytes an element of size s: two readings and one writing, 3 s (householder three readings, 4 s); codes one byte in the place of the
writing. CUDA: events around batches of calls on rotating inputs larger than the second-level cache, median. CPU: two threads, wall clock,
interleaved with the copy, median; glibc is told to keep freed memory, as the trainers do, or results would pay for page faults that the
copy's target does not. --profile: time of each CUDA kernel instead.
"""

from __future__ import annotations

import argparse
import json

import torch
from bench_fake_quant import time_cpu, time_cuda

import quantrain
from quantrain.finetune.memory import keep_freed_memory

CUDA_SHAPES = (((128, 200704), torch.float32), ((16384, 4096), torch.bfloat16), ((16384, 4096), torch.float32))
CPU_SHAPES = (((128, 32768), torch.float32), ((4096, 1024), torch.float32))
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


def bench(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[dict]:
    sets = 3 if device == "cuda" else 2
    x = gradients(shape, dtype, device, sets)
    target = [torch.empty_like(t) for t in x]
    size, numel = x[0].element_size(), x[0].numel()

    def times(runs: list) -> list[float]:
        return [time_cuda(run, sets) for run in runs] if device == "cuda" else time_cpu(runs, sets)

    lines = []
    for quantizer in QUANTIZERS:
        check(quantizer, x[0])
        for codes in (False, True):
            call = quantrain.quantize_gradient_codes if codes else quantrain.quantize_gradient
            runs = [
                lambda i: target[i].copy_(x[i]),
                lambda i: call(x[i], BITS, quantizer),  # noqa: B023
                lambda i: call(x[i], BITS, quantizer, stochastic=False),  # noqa: B023
                lambda i: quantrain.quantize_gradient(x[i], BITS, "per_sample"),
            ]
            eager = quantizer == "per_sample" and not codes
            copy, seconds, nearest, per_sample, *peer = times(runs + [lambda i: eager_per_sample(x[i])] * eager)
            moved = (READINGS.get(quantizer, 2) * size + (1 if codes else size)) * numel
            floor = moved / (2 * size * numel / copy)
            line = {
                "op": "quantize_gradient" + ("_codes" if codes else ""),
                "quantizer": quantizer,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
                "microseconds": seconds * 1e6,
                "floor_per_cent": 100 * floor / seconds,
                "copies": seconds / copy,
                "over_nearest": seconds / nearest,
                "over_per_sample": seconds / per_sample,
                "eager_over_ours": peer[0] / seconds if peer else None,
                "copy_gb_s": 2 * size * numel / copy / 1e9,
            }
            lines.append(line)
            print(
                f"{line['op']:24} {quantizer:11} {line['dtype']:9} {shape!s:14}"
                + (f"{line['microseconds']:9.1f} us" if device == "cuda" else "")
                + f"  floor {line['floor_per_cent']:5.1f} %  copies {line['copies']:5.2f}  nearest {line['over_nearest']:5.2f}x"
                f"  PSQ {line['over_per_sample']:5.2f}x" + (f"  eager {line['eager_over_ours']:5.2f}x" if peer else ""),
                flush=True,
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="time of each CUDA kernel instead")
    parser.add_argument("--json", help="also write the lines to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(2)
        keep_freed_memory()
    lines = []
    for shape, dtype in CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES:
        if args.profile:
            profile(gradients(shape, dtype, args.device, 3))
        else:
            lines += bench(shape, dtype, args.device)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
