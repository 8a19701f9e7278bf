"""The fake_quant family against a copy of the same bytes and against PyTorch's own operators, all in one run.

    python benchmarks/bench_fake_quant.py [--device cpu|cuda] [--json FILE]

Every line is checked before it is timed: fresh random inputs, results against PyTorch's operator or the formula in float64.
Columns: time of one call; "floor": the time that the bytes the operation must move would take at the copy's rate, as per cent of the
call's time; "native": the time of PyTorch's own operator over ours.
Floor bytes an element of size s: forward 2 s; forward + backward 4 s + 2/8 (mask written and read); learnable forward + backward 5 s;
quantize s + 1; dequantize 1 + s; choose_qparams s.
CUDA: events around batches of calls on rotating inputs larger than the second-level cache, median. CPU: two threads, wall clock, the
candidates interleaved, median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch

import quantrain

CUDA_SHAPES = {"8192x8192": (8192, 8192), "64x256x56x56": (64, 256, 56, 56)}
CPU_SHAPES = {"1024x1024": (1024, 1024), "4096x4096": (4096, 4096)}


@dataclass
class Case:
    op: str
    granularity: str
    run: object  # call(set index)
    floor_bytes: float
    native: object = None
    check: object = None


# ---- timing ----------------------------------------------------------------------------------------------------------------


def time_cuda(run, sets: int, batches: int = 15, calls: int = 6) -> float:
    """Seconds a call, median over batches."""
    for i in range(3):
        run(i % sets)
    times = []
    for batch in range(batches):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # about 2 ms in which the queue fills: launch time stays out
        start.record()
        for i in range(calls):
            run((batch + i) % sets)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def time_cpu(runs: list, sets: int, seconds: float = 1.5) -> list[float]:
    """Seconds a call of each candidate, interleaved so that a disturbance strikes all of them; median."""
    times = [[] for _ in runs]
    for run in runs:
        run(0)
    stop = time.perf_counter() + seconds * len(runs)
    index = 0
    while time.perf_counter() < stop or index < 7:
        for k, run in enumerate(runs):
            start = time.perf_counter()
            run(index % sets)
            times[k].append(time.perf_counter() - start)
        index += 1
    return [statistics.median(t) for t in times]


# ---- cases -----------------------------------------------------------------------------------------------------------------


def make_cases(shape, dtype, device, sets, copy_only=False):
    x = [torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)]
    leaf = [t.detach().clone().requires_grad_() for t in x]
    grad = [torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)]
    numel, size, last = x[0].numel(), x[0].element_size(), shape[-1]
    is_activation = len(shape) == 4
    axis = 1 if is_activation else 0
    channel_shape = [1] * len(shape)
    channel_shape[axis] = shape[axis]
    shapes = {"tensor": [1], "channel": channel_shape, "token": [*shape[:-1], 1]}
    if last % 128 == 0:
        shapes["group 128"] = [*shape[:-1], last // 128]
    if not is_activation:
        shapes["channel last dim"] = [1, last]

    def scale_of(scale_shape):
        return torch.rand(scale_shape, device=device) * 0.01 + 0.02

    def check_forward(name, scale):
        def check():
            y = quantrain.fake_quantize(x[0], scale)
            code = torch.round(x[0].float() * (1 / expand(scale, shape))).clamp(-128, 127)
            expected = (code * expand(scale, shape)).to(dtype)
            assert torch.equal(y, expected), f"{name}: wrong values"
            y = quantrain.fake_quantize(leaf[0], scale)
            assert torch.equal(y, expected), f"{name}: wrong values with a mask"

        return check

    cases = []
    for name, scale_shape in shapes.items():
        scale = scale_of(scale_shape)
        native_forward = native_both = None
        if name == "tensor":
            zero = torch.zeros(1, dtype=torch.int32, device=device)
            native_forward = lambda i, s=scale, z=zero: torch.fake_quantize_per_tensor_affine(x[i], s, z, -128, 127)  # noqa: E731
            native_both = lambda i, s=scale, z=zero: torch.autograd.grad(  # noqa: E731
                torch.fake_quantize_per_tensor_affine(leaf[i], s, z, -128, 127), leaf[i], grad[i]
            )
        elif name == "channel":
            flat, zero = scale.flatten(), torch.zeros(shape[axis], dtype=torch.int32, device=device)
            native_forward = lambda i, s=flat, z=zero: torch.fake_quantize_per_channel_affine(
                x[i], s, z, axis, -128, 127
            )  # noqa: E731
            native_both = lambda i, s=flat, z=zero: torch.autograd.grad(  # noqa: E731
                torch.fake_quantize_per_channel_affine(leaf[i], s, z, axis, -128, 127), leaf[i], grad[i]
            )
        cases.append(
            Case(
                "fake_quantize forward",
                name,
                lambda i, s=scale: quantrain.fake_quantize(x[i], s),
                2 * size * numel,
                native_forward,
                check_forward(name, scale),
            )
        )
        cases.append(
            Case(
                "fake_quantize forward+backward",
                name,
                lambda i, s=scale: torch.autograd.grad(quantrain.fake_quantize(leaf[i], s), leaf[i], grad[i]),
                (4 * size + 0.25) * numel,
                native_both,
            )
        )
    for name in ("tensor", "channel"):
        scale = scale_of(shapes[name]).requires_grad_()
        native = None
        # PyTorch has no learnable half-precision backward.
        if dtype == torch.float32:
            flat = scale.detach().flatten().requires_grad_()
            zero = torch.zeros(flat.shape, device=device, requires_grad=True)
            native_op = torch._fake_quantize_learnable_per_tensor_affine
            extra = ()
            if name == "channel":
                native_op, extra = torch._fake_quantize_learnable_per_channel_affine, (axis,)
            native = lambda i, s=flat, z=zero, op=native_op, e=extra: torch.autograd.grad(  # noqa: E731
                op(leaf[i], s, z, *e, -128, 127, 1.0), (leaf[i], s, z), grad[i]
            )
        cases.append(
            Case(
                "fake_quantize_learnable forward+backward",
                name,
                lambda i, s=scale: torch.autograd.grad(
                    quantrain.fake_quantize_learnable(leaf[i], s), (leaf[i], s), grad[i]
                ),
                5 * size * numel,
                native,
            )
        )
    for name in ("tensor", "channel", "token"):
        scale, scale_shape = scale_of(shapes[name]), shapes[name]
        codes = [quantrain.quantize(t, scale) for t in x]
        cases.append(
            Case("choose_qparams", name, lambda i, s=scale_shape: quantrain.choose_qparams(x[i], s), size * numel)
        )
        cases.append(Case("quantize", name, lambda i, s=scale: quantrain.quantize(x[i], s), (size + 1) * numel))
        cases.append(
            Case(
                "quantize stochastic",
                name,
                lambda i, s=scale: quantrain.quantize(x[i], s, stochastic=True),
                (size + 1) * numel,
            )
        )
        cases.append(
            Case(
                "dequantize",
                name,
                lambda i, s=scale, c=codes: quantrain.dequantize(c[i], s, dtype=dtype),
                (size + 1) * numel,
            )
        )
        cases.append(
            Case(
                "fake_quantize_dynamic forward",
                name,
                lambda i, s=scale_shape: quantrain.fake_quantize_dynamic(x[i], s),
                3 * size * numel,
            )
        )
    return x, cases


def expand(scale, shape):
    if scale.numel() == 1:
        return scale
    for d, n in enumerate(shape):
        if scale.shape[d] not in (1, n):
            scale = scale.repeat_interleave(n // scale.shape[d], dim=d)
    return scale


# ---- report ----------------------------------------------------------------------------------------------------------------


class Report:
    def __init__(self, device):
        self.device, self.rows = device, []

    def add(self, case, dtype, shape, seconds, rate, native_seconds, **more):
        row = {
            "op": case.op,
            "granularity": case.granularity,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": shape,
            "microseconds": round(seconds * 1e6, 2),
            "gigabytes_per_second": round(case.floor_bytes / seconds / 1e9, 1),
            "percent_of_floor": round(100 * case.floor_bytes / rate / seconds, 1),
            "native_ratio": round(native_seconds / seconds, 2) if native_seconds else None,
            **more,
        }
        self.rows.append(row)
        native = f"{row['native_ratio']:8.2f}x" if native_seconds else f"{'-':>9}"
        extra = "".join(f"  {k} {v}" for k, v in more.items())
        # CPU times are ratios only: a shared machine's seconds say nothing.
        absolute = (
            f"{row['microseconds']:10.1f} us {row['gigabytes_per_second']:8.0f} GB/s" if self.device == "cuda" else ""
        )
        print(
            f"{row['op']:<41} {row['granularity']:<17} {row['dtype']:<9} {shape:<13} {absolute} {row['percent_of_floor']:6.1f} %{native}{extra}",
            flush=True,
        )


def bench_cuda(report, shapes=CUDA_SHAPES, make_cases=make_cases):
    for label, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            sets = 3
            x, cases = make_cases(shape, dtype, "cuda", sets)
            y = torch.empty_like(x[0])
            copy = time_cuda(lambda i: y.copy_(x[i]), sets)  # noqa: B023
            rate = 2 * x[0].numel() * x[0].element_size() / copy
            print(
                f"\ncopy {dtype} {label}: {copy * 1e6:.1f} us, {rate / 1e9:.0f} GB/s; floor and native below are ratios to this run"
            )
            for case in cases:
                if case.check:
                    case.check()
                native = time_cuda(case.native, sets, batches=7, calls=3) if case.native else None
                report.add(case, dtype, label, time_cuda(case.run, sets), rate, native)
            del x, cases, y
            torch.cuda.empty_cache()


def bench_cpu(report):
    torch.set_num_threads(2)
    for label, shape in CPU_SHAPES.items():
        small = shape[0] == 1024
        sets = 1 if small else 2
        x, cases = make_cases(shape, torch.float32, "cpu", sets)
        cases = [c for c in cases if small or c.op.startswith("fake_quantize forward")]
        for case in cases:
            if case.check:
                case.check()
            runs = [case.run, lambda i: torch.empty_like(x[i]).copy_(x[i]), lambda i: x[i].clone()]  # noqa: B023
            times = time_cpu(runs + ([case.native] if case.native else []), sets, 0.8)
            rate = 2 * x[0].numel() * 4 / times[1]
            report.add(
                case,
                torch.float32,
                label,
                times[0],
                rate,
                times[3] if case.native else None,
                times_of_copy=round(times[0] / times[1], 2),
                times_of_clone=round(times[0] / times[2], 2),
            )


def bench_launch(report):
    """Host time of an eager call at 256 elements, ours over the native operator's."""
    device = report.device
    x, scale = torch.randn(256, device=device), torch.tensor([0.05], device=device)
    zero, leaf = torch.zeros(1, dtype=torch.int32, device=device), torch.randn(256, device=device, requires_grad=True)
    rows, rows_scale = torch.randn(16, 16, device=device), torch.full((16,), 0.05, device=device)
    column, zeros = rows_scale.view(16, 1), torch.zeros(16, dtype=torch.int32, device=device)
    pairs = {
        "tensor": (
            lambda: quantrain.fake_quantize(x, scale),
            lambda: torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127),
        ),
        "tensor, grad": (
            lambda: quantrain.fake_quantize(leaf, scale),
            lambda: torch.fake_quantize_per_tensor_affine(leaf, scale, zero, -128, 127),
        ),
        "channel": (
            lambda: quantrain.fake_quantize(rows, column),
            lambda: torch.fake_quantize_per_channel_affine(rows, rows_scale, zeros, 0, -128, 127),
        ),
    }
    print("\nhost time of an eager call at 256 elements, over the native operator's")
    for name, (ours, native) in pairs.items():
        times = [[], []]
        for _ in range(40):
            for k, run in enumerate((ours, native)):
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    run()
                times[k].append(time.perf_counter() - start)
        ratio = statistics.median(times[0]) / statistics.median(times[1])
        report.rows.append({"op": "launch overhead", "granularity": name, "native_time_ratio": round(ratio, 2)})
        print(f"launch overhead {name:<14} {ratio:.2f}x the native call")


def run_benchmark(name, description, bench):
    """The command line of a benchmark: ``bench(report)`` on the device asked for, rows to a file where one is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, 2 threads"
    print(f"{name} on {where}, torch {torch.__version__}, quantrain {quantrain.__version__}")
    report = Report(options.device)
    bench(report)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"benchmark": name, "on": where, "torch": torch.__version__, "rows": report.rows}, file, indent=1)


def bench_all(report):
    (bench_cuda if report.device == "cuda" else bench_cpu)(report)
    bench_launch(report)


if __name__ == "__main__":
    run_benchmark("bench_fake_quant", __doc__.splitlines()[0], bench_all)
