"""The fake_quant family against a copy of the same bytes and against PyTorch's own operators, all in one run.

    python benchmarks/bench_fake_quant.py [--device cpu|cuda] [--quick] [--json FILE]

Every line is checked before it is timed: fresh random inputs, results against PyTorch's operator or the formula in float64.
Columns: time of one call; "floor": the time that the bytes the operation must move would take at the copy's rate, as per cent of the
call's time; "native": the time of PyTorch's own operator over ours.
Floor bytes per element of size s: forward 2 s; forward + backward 4 s + 2/8 (mask written and read); learnable forward + backward 5 s;
quantize s + 1; dequantize 1 + s; choose_qparams s.
CUDA: on the device's clock, rotating inputs larger than the second-level cache. CPU: two threads, wall clock. The candidates take turns;
medians. The last lines: host time of an eager call at 256 elements over the native operator's.
"""

from __future__ import annotations

import torch
from common.cases import Case, bench_cases, parser_of, report_of
from common.timing import host_seconds, medians, turns

import quantrain

CUDA_SHAPES = ((8192, 8192), (64, 256, 56, 56))
CPU_SHAPES = ((1024, 1024), (4096, 4096))


# ---- cases -----------------------------------------------------------------------------------------------------------------


def make_cases(shape, dtype, device, sets):
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


def make_cpu_cases(shape, dtype, device, sets):
    """Of the larger shape the forward passes alone."""
    x, cases = make_cases(shape, dtype, device, sets)
    return x, [case for case in cases if tuple(shape) != CPU_SHAPES[1] or case.op == "fake_quantize forward"]


def expand(scale, shape):
    if scale.numel() == 1:
        return scale
    for d, n in enumerate(shape):
        if scale.shape[d] not in (1, n):
            scale = scale.repeat_interleave(n // scale.shape[d], dim=d)
    return scale


# ---- launches --------------------------------------------------------------------------------------------------------


def bench_launch(report, *, quick=False):
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
    for name, runs in pairs.items():
        timers = [lambda turn, run=run: host_seconds(lambda _: run(), 100, device, wait=False) for run in runs]
        ours, native = medians(turns(timers, 2 if quick else 40))
        row = {"op": "launch overhead", "granularity": name, "native_time_ratio": round(ours / native, 2)}
        report.add(row, f"launch overhead {name:<14} {ours / native:.2f}x the native call")


def main() -> None:
    options = parser_of(__doc__).parse_args()
    report = report_of("bench_fake_quant", options)
    if options.device == "cuda":
        bench_cases(report, CUDA_SHAPES, make_cases, quick=options.quick)
    else:
        bench_cases(report, CPU_SHAPES, make_cpu_cases, quick=options.quick)
    bench_launch(report, quick=options.quick)


if __name__ == "__main__":
    main()
