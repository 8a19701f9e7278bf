"""The fixed_point family against a copy of the same bytes and against PyTorch's own operators, all in one run.

    python benchmarks/bench_fixed_point.py [--device cpu|cuda] [--quick] [--json FILE]

Every line is checked before it is timed. Columns: time of one call; "floor": the time that the bytes the operation must move would take
at the copy's rate, as per cent of the call's time; "native": the time of the shortest composition of PyTorch's operators over ours (for
the quantizer PyTorch's fused fake_quantize, whose gradient lets the end codes pass; for a fraction length torch.std and the logarithm).
Floor bytes per element of size s: forward 2 s; forward + backward 4 s + 2/8; fraction_length s; requantize 5.
CUDA and CPU timing as in bench_fake_quant.py.
"""

from __future__ import annotations

import torch
from common.cases import Case, bench_cases, parser_of, report_of

import quantrain

CUDA_SHAPES = ((8192, 8192), (64, 256, 56, 56), (512, 512, 3, 3))
CPU_SHAPES = ((1024, 1024), (512, 512, 3, 3))


def native_length(x, dims=None):
    deviation = x.float().std() if dims is None else x.float().std(dim=dims, keepdim=True)
    return torch.floor(torch.log2(40.0 / deviation)).clamp(0, 7).int()


def native_requantize(accumulator, shift):
    return torch.round(accumulator.float() * 2.0**-shift).clamp(-127, 127).to(torch.int8)


def native_errors(x):
    errors = [(torch.fake_quantize_per_tensor_affine(x, 2.0**-f, 0, -127, 127) - x).square().sum() for f in range(8)]
    return torch.stack(errors).argmin()


def make_cases(shape, dtype, device, sets):
    x = [torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)]
    leaf = [t.detach().clone().requires_grad_() for t in x]
    grad = [torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)]
    accumulator = [torch.randint(-100000, 100000, shape, device=device, dtype=torch.int32) for _ in range(sets)]
    numel, size = x[0].numel(), x[0].element_size()
    axis = 1 if shape[0] == 64 else 0
    others = [d for d in range(len(shape)) if d != axis]
    one = torch.full((1,), 5, dtype=torch.int32, device=device)
    channels = [shape[axis] if d == axis else 1 for d in range(len(shape))]
    each = torch.arange(shape[axis], device=device, dtype=torch.int32).remainder(8).view(channels)
    acc_length = torch.full((1,), 14, dtype=torch.int32, device=device)
    acc_each = each + 8
    zero = torch.zeros(shape[axis], dtype=torch.int32, device=device)
    scale, zeros = torch.exp2(-each.float()).flatten(), zero[:1]
    fraction_length, quantize, requantize = (
        quantrain.fixed_point_fraction_length,
        quantrain.fixed_point_quantize,
        quantrain.fixed_point_requantize,
    )

    def native_tensor(t):
        return torch.fake_quantize_per_tensor_affine(t, scale[5:6], zeros, -127, 127)

    def native_channel(t):
        return torch.fake_quantize_per_channel_affine(t, scale, zero, axis, -127, 127)

    def same(actual, expected):
        assert torch.equal(actual, expected), "wrong values"

    def both(function):
        return lambda i: torch.autograd.grad(function(leaf[i]), leaf[i], grad[i])

    cases = []
    for name, length, native in (("tensor", one, native_tensor), ("channel", each, native_channel)):
        cases.append(
            Case(
                "fixed_point_quantize forward",
                name,
                lambda i, f=length: quantize(x[i], f),
                2 * size * numel,
                lambda i, n=native: n(x[i]),
                lambda f=length, n=native: same(quantize(x[0], f), n(x[0])),
            )
        )
        cases.append(
            Case(
                "fixed_point_quantize forward+backward",
                name,
                both(lambda t, f=length: quantize(t, f)),
                (4 * size + 0.25) * numel,
                both(native),
            )
        )
    for name, at, dims in (("tensor", None, None), ("channel", axis, others)):
        cases.append(
            Case(
                "fixed_point_fraction_length std",
                name,
                lambda i, a=at: fraction_length(x[i], axis=a),
                size * numel,
                lambda i, d=dims: native_length(x[i], d),
                lambda a=at, d=dims: same(fraction_length(x[0], axis=a).flatten(), native_length(x[0], d).flatten()),
            )
        )
        cases.append(
            Case(
                "fixed_point_fraction_length mse",
                name,
                lambda i, a=at: fraction_length(x[i], axis=a, method="mse"),
                size * numel,
                (lambda i: native_errors(x[i])) if at is None else None,
                (lambda: same(fraction_length(x[0], method="mse")[0].long(), native_errors(x[0])))
                if at is None and dtype == torch.float32
                else None,
            )
        )
    for name, length in (("tensor", acc_length), ("channel", acc_each)):
        shift = length - 5
        cases.append(
            Case(
                "fixed_point_requantize",
                name,
                lambda i, f=length: requantize(accumulator[i], f, 5),
                5 * numel,
                lambda i, n=shift: native_requantize(accumulator[i], n),
                lambda f=length, n=shift: same(requantize(accumulator[0], f, 5), native_requantize(accumulator[0], n)),
            )
        )
    return x, cases


def main() -> None:
    options = parser_of(__doc__).parse_args()
    report = report_of("bench_fixed_point", options)
    bench_cases(report, CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES, make_cases, quick=options.quick)


if __name__ == "__main__":
    main()
