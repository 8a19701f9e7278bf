"""The four_bit family against bfloat16 products, a copy and bitsandbytes, all ratios within one run.

    python benchmarks/bench_four_bit.py [--device cpu|cuda] [--only SECTION,...] [--quick] [--json FILE]

Sections, in this order:
    passes    quantize_4bit and dequantize_4bit, as a share of the rate of a copy
    products  linear_4bit over torch.mm in bfloat16 and over bitsandbytes, by rows of the input; the share of the copy's rate that
              codes and scales are read at
    int8      linear_4bit with method "int8" (rows rounded to 8 bits at each call) over the product in bfloat16
    backward  the gradient of the input over the product in bfloat16

Every operator is checked first against float64, with fresh random operands. On CUDA, calls are captured in graphs, and weights rotate
through 250 MB and more; candidates take turns; medians. The last columns: the ratio, the ratio to reach, and figures in the units that
their names end in. bitsandbytes is compared with where it can be imported.
"""

from __future__ import annotations

import sys

import torch
from common.sections import SectionReport, run_sections
from common.timing import Captured, copy_rate, graph_seconds, kernel_seconds, sets_for, wall_seconds
from torch import Tensor

import quantrain

ROTATED_BYTES = 250 << 20  # of packed weights: more than a cache holds
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))  # N, K
QUICK = ((256, 512),)
# Over bfloat16 at 1, 16, 32, 64, 128 and 256 rows.
TARGETS = {
    (4096, 4096): {1: 2.8, 16: 2.8, 32: 2.7, 64: 2.2, 128: 1.25, 256: 0.95},
    (14336, 4096): {1: 3.0, 16: 3.0, 32: 2.8, 64: 2.2, 128: 1.25, 256: 0.95},
    (8192, 8192): {1: 3.0, 16: 3.0, 32: 2.8, 64: 2.2, 128: 1.25, 256: 0.95},
    (28672, 8192): {1: 3.3, 16: 3.2, 32: 3.0, 64: 2.2, 128: 1.25, 256: 0.95},
}


def packed_sets(count: int, n: int, k: int, device: str, *, nested: bool = False) -> list[tuple[Tensor, ...]]:
    """Packed NF4 weights: codes, scale, and with ``nested`` scale_scale and scale_offset."""
    sets = []
    for _ in range(count):
        codes, scale = quantrain.quantize_4bit(torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.05)
        sets.append((codes, *quantrain.compress_scale(scale)) if nested else (codes, scale))
    return sets


def product(x: Tensor, packed: tuple[Tensor, ...], method: str = "auto") -> Tensor:
    codes, scale, *nested = packed
    return quantrain.linear_4bit(x, codes, scale, None, None, *nested, method=method)


def decoded(packed: tuple[Tensor, ...], n: int, k: int) -> Tensor:
    codes, scale, *nested = packed
    return quantrain.dequantize_4bit(codes, scale, None, *nested, size=(n, k)).double()


def check_product(x: Tensor, packed: tuple[Tensor, ...], n: int) -> float:
    """The product's error over its norm, against float64."""
    exact = x.double() @ decoded(packed, n, x.shape[1]).t()
    error = ((product(x, packed).double() - exact).norm() / exact.norm()).item()
    if not error < 5e-3:
        raise AssertionError(f"linear_4bit: expected an error below 0.5 %, got {error}")
    return error


# ---- sections --------------------------------------------------------------------------------------------------------


def passes(report: SectionReport, device: str, quick: bool) -> None:
    """Bytes to move over time, as a share of a copy's: 2 bytes of bfloat16, half a byte of code, 4 / 64 of scale."""
    for n, k in QUICK if quick else SHAPES[:3]:
        for form in ("nf4", "fp4", "int4", "uint4"):
            sets = sets_for(2 * n * k, device)
            x = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(sets)]
            target = [torch.empty_like(t) for t in x]
            if form == "uint4":
                quantize = lambda i: quantrain.quantize_4bit_affine(x[i % sets])  # noqa: E731
            else:
                quantize = lambda i, form=form: quantrain.quantize_4bit(x[i % sets], format=form)  # noqa: E731
            packed = [quantize(i) for i in range(sets)]
            dequantize = lambda i, form=form: quantrain.dequantize_4bit(  # noqa: E731
                *packed[i % sets], size=(n, k), format=form, dtype=torch.bfloat16
            )
            copies = [  # a copy may go by the copy engine, which is the slower of the two
                lambda i: target[i % sets].copy_(x[i % sets]),
                lambda i: torch.add(x[i % sets], 1, out=target[i % sets]),
            ]
            copy, add, q, d = kernel_seconds([*copies, quantize, dequantize], device)
            moved, rate = n * k * (2.5625 + (0.0625 if form == "uint4" else 0.0)), 4 * n * k / min(copy, add)
            report.row(
                "passes", f"quantize {form} {n}x{k}", moved / q / rate, 0.85 if form == "nf4" else None, us=q * 1e6
            )
            report.row(
                "passes", f"dequantize {form} {n}x{k}", moved / d / rate, 0.9 if form == "nf4" else None, us=d * 1e6
            )


def seconds_of(runs: dict[str, tuple], device: str) -> dict[str, float]:
    """Seconds per call of each candidate: its run, and how many sets it goes through."""
    if device == "cpu":
        return dict(zip(runs, wall_seconds([run for run, _ in runs.values()], repeats=9), strict=True))
    graphs = {name: Captured(run, calls) for name, (run, calls) in runs.items()}
    return graph_seconds(graphs)


def products(report: SectionReport, device: str, quick: bool) -> None:
    """At each number of rows: over bfloat16, over bitsandbytes, and the rate that the weight is read at."""
    rate = copy_rate(device)
    report.say(f"copy {rate / 1e12:.3f} TB/s")
    for n, k in QUICK if quick else SHAPES:
        packed_bytes = n * k * 0.5625
        count = 2 if quick or device == "cpu" else max(3, -(-ROTATED_BYTES // int(packed_bytes)))
        flat, nested = packed_sets(count, n, k, device), packed_sets(count, n, k, device, nested=True)
        weights = [decoded(packed, n, k).bfloat16() for packed in flat]
        peers = [bitsandbytes_product(w) for w in weights]
        for m in (1, 3) if quick else ROWS:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            error = check_product(x, flat[0], n)
            check_product(x, nested[0], n)
            runs = {
                "bf16": (lambda i, x=x: torch.nn.functional.linear(x, weights[i % count]), count),
                "ours": (lambda i, x=x: product(x, flat[i % count]), count),
                "nested": (lambda i, x=x: product(x, nested[i % count]), count),
            }
            if peers[0] is not None:
                runs["bitsandbytes"] = (lambda i, x=x: peers[i % count](x), count)
            found = seconds_of(runs, device)
            figures = {
                "us": found["ours"] * 1e6,
                "bf16_us": found["bf16"] * 1e6,
                "nested_ratio": found["bf16"] / found["nested"],
                "read_share": packed_bytes / found["ours"] / rate,
                "error": error,
            }
            if "bitsandbytes" in found:
                figures["over_bitsandbytes"] = found["bitsandbytes"] / found["ours"]
            target = TARGETS.get((n, k), {}).get(m, 0.92 if m >= 512 else None) if device == "cuda" else None
            report.row("products", f"{m} rows {n}x{k}", found["bf16"] / found["ours"], target, **figures)
        del flat, nested, weights, peers
        if device == "cuda":
            torch.cuda.empty_cache()


def bitsandbytes_product(weight: Tensor):
    """linear by bitsandbytes with this weight in its NF4; None where it is not installed or has no such device."""
    try:
        import bitsandbytes.functional as bnb
        from bitsandbytes import matmul_4bit
    except Exception:  # a wheel without this machine's library raises what it likes
        return None
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: matmul_4bit(x, codes.t(), quant_state=state)


def int8(report: SectionReport, device: str, quick: bool) -> None:
    """int4 in blocks of 128 columns, by 8-bit products; the error is against float64 and holds the rounding of the rows."""
    for n, k in QUICK if quick else ((4096, 4096), (8192, 8192)):
        count = 2 if quick or device == "cpu" else max(3, -(-ROTATED_BYTES // (n * k // 2)))
        form = {"format": "int4", "block_size": 128}
        weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.05 for _ in range(count)]
        packed = [quantrain.quantize_4bit(w, **form) for w in weights]
        exact = quantrain.dequantize_4bit(*packed[0], size=(n, k), format="int4").double()
        for m in (1, 3) if quick else (128, 512, 2048, 8192):
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            ours = lambda i, x=x: quantrain.linear_4bit(  # noqa: E731
                x, *packed[i % count], format="int4", method="int8"
            )
            expected = x.double() @ exact.t()
            error = ((ours(0).double() - expected).norm() / expected.norm()).item()
            if not error < 2e-2:
                raise AssertionError(f"linear_4bit: expected an error of 8-bit rows below 2 %, got {error}")
            bf16 = lambda i, x=x: torch.nn.functional.linear(x, weights[i % count])  # noqa: E731
            found = seconds_of({"bf16": (bf16, count), "ours": (ours, count)}, device)
            target = 1.3 if device == "cuda" and (n, k) == (8192, 8192) and m >= 512 else None
            report.row("int8", f"{m} rows {n}x{k}", found["bf16"] / found["ours"], target, error=error)


def backward(report: SectionReport, device: str, quick: bool) -> None:
    """grad_input by the packed weight over grad_output times the bfloat16 weight."""
    op = torch.ops.quantrain._linear_4bit_grad_input
    for n, k in QUICK if quick else SHAPES[:3]:
        count = 2 if quick or device == "cpu" else max(3, -(-ROTATED_BYTES // int(n * k * 0.5625)))
        flat = packed_sets(count, n, k, device)
        weights = [decoded(packed, n, k).bfloat16() for packed in flat]
        for m in (1, 3) if quick else (1, 16, 32, 64, 128, 256, 512, 2048, 8192):
            gradient = torch.randn(m, n, device=device, dtype=torch.bfloat16)
            exact = gradient.double() @ weights[0].double()
            error = ((op(gradient, *flat[0], in_features=k).double() - exact).norm() / exact.norm()).item()
            if not error < 5e-3:
                raise AssertionError(f"_linear_4bit_grad_input: expected an error below 0.5 %, got {error}")
            found = seconds_of(
                {
                    "bf16": (lambda i, g=gradient: g @ weights[i % count], count),
                    "ours": (lambda i, g=gradient: op(g, *flat[i % count], in_features=k), count),
                },
                device,
            )
            forward = TARGETS.get((n, k), {}).get(m, 0.92 if m >= 512 else None) if device == "cuda" else None
            target = forward and 0.9 * forward
            report.row("backward", f"{m} rows {n}x{k}", found["bf16"] / found["ours"], target, us=found["ours"] * 1e6)


def main(arguments: list[str] | None = None) -> int:
    sections = {"passes": passes, "products": products, "int8": int8, "backward": backward}
    return run_sections("bench_four_bit", __doc__, sections, arguments)


if __name__ == "__main__":
    sys.exit(main())
