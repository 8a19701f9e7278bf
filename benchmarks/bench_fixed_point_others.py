"""The layers in fixed point beside the convolutions, on one GPU, over torch's float16 in the same run.

    python benchmarks/bench_fixed_point_others.py [--device cuda] [--output FILE]

Shapes of ResNet-50 at batch 64: sums of a convolution, linear, add, max pool, average pool's sum. First each result is checked against float64 (linear:
int64 on the CPU). Times are medians of CUDA graphs of calls that rotate through more than the cache holds. Columns: time of one call; the bytes
that it must move, per second; what they take at the rate of a copy in this run, as per cent of the call's time; float16 over ours. On a CPU nothing is measured (bench_fixed_point_conv.py has the convolutions).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common.operands import codes
from common.report import Measured, Report
from common.timing import CACHE_BYTES, Captured, copy_rate, graph_seconds

import quantrain

BATCH = 64


def sets(nbytes: int) -> int:
    return max(4, min(32, -(-CACHE_BYTES // nbytes)))


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half() / 64


def conv2d() -> tuple:
    n = sets(BATCH * 28 * 28 * (128 + 512 * 4))
    x = [codes((BATCH, 128, 28, 28), torch.uint8) for _ in range(n)]
    weight = codes((512, 128, 1, 1), torch.int8)
    x16, weight16 = [half(t) for t in x], half(weight)
    expected = F.conv2d(x[0].double(), weight.double())
    assert torch.equal(quantrain.fixed_point_conv2d(x[0], weight).double(), expected)
    moved = x[0].numel() + weight.numel() + expected.numel() * 4
    return n, moved, lambda i: quantrain.fixed_point_conv2d(x[i], weight), lambda i: F.conv2d(x16[i], weight16)


def linear() -> tuple:
    n = sets(2048 * 1000)
    x = [codes((BATCH, 2048), torch.uint8) for _ in range(n)]
    weights = [codes((1000, 2048), torch.int8) for _ in range(n)]
    x16, weights16 = [half(t) for t in x], [half(t) for t in weights]
    expected = x[0].cpu().long() @ weights[0].cpu().long().T
    assert torch.equal(quantrain.fixed_point_linear(x[0], weights[0]).cpu().long(), expected)
    moved = x[0].numel() + weights[0].numel() + expected.numel() * 4
    return n, moved, lambda i: quantrain.fixed_point_linear(x[i], weights[i]), lambda i: F.linear(x16[i], weights16[i])


def add() -> tuple:
    shape = (BATCH, 256, 56, 56)
    n = sets(2 * BATCH * 256 * 56 * 56)
    a, b = ([codes(shape, torch.uint8) for _ in range(n)] for _ in range(2))
    a_length, b_length = (torch.tensor([value], dtype=torch.int32, device="cuda") for value in (4, 6))
    a16, b16 = [half(t) for t in a], [half(t) for t in b]
    expected = a[0].double() * 4 + b[0].double()
    assert torch.equal(quantrain.fixed_point_add(a[0], b[0], a_length, b_length).double(), expected)
    moved = 2 * a[0].numel() + 4 * a[0].numel()
    return n, moved, lambda i: quantrain.fixed_point_add(a[i], b[i], a_length, b_length), lambda i: a16[i] + b16[i]


def max_pool2d() -> tuple:
    n = sets(BATCH * 64 * 112 * 112)
    x = [codes((BATCH, 64, 112, 112), torch.uint8) for _ in range(n)]
    x16 = [half(t) for t in x]
    expected = F.max_pool2d(x[0].double(), 3, 2, 1)
    assert torch.equal(quantrain.fixed_point_max_pool2d(x[0], [3, 3], [2, 2], [1, 1]).double(), expected)
    moved = x[0].numel() + expected.numel()
    return (
        n,
        moved,
        lambda i: quantrain.fixed_point_max_pool2d(x[i], [3, 3], [2, 2], [1, 1]),
        lambda i: F.max_pool2d(x16[i], 3, 2, 1),
    )


def sum_pool2d() -> tuple:
    n = sets(BATCH * 2048 * 7 * 7)
    x = [codes((BATCH, 2048, 7, 7), torch.uint8) for _ in range(n)]
    x16 = [half(t) for t in x]
    expected = x[0].double().sum((2, 3), keepdim=True)
    assert torch.equal(quantrain.fixed_point_sum_pool2d(x[0]).double(), expected)
    moved = x[0].numel() + expected.numel() * 4
    return n, moved, lambda i: quantrain.fixed_point_sum_pool2d(x[i]), lambda i: x16[i].mean((2, 3), keepdim=True)


# op, case, element type, shape of the input
CASES: dict[tuple, Callable[[], tuple]] = {
    ("fixed_point_conv2d", "to 512, 1x1", torch.uint8, (BATCH, 128, 28, 28)): conv2d,
    ("fixed_point_linear", "to 1000", torch.uint8, (BATCH, 2048)): linear,
    ("fixed_point_add", "", torch.uint8, (BATCH, 256, 56, 56)): add,
    ("fixed_point_max_pool2d", "3x3, stride 2", torch.uint8, (BATCH, 64, 112, 112)): max_pool2d,
    ("fixed_point_sum_pool2d", "", torch.uint8, (BATCH, 2048, 7, 7)): sum_pool2d,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="a text file; the rows go to the same with .json")
    options = parser.parse_args()
    if options.device != "cuda":
        print("bench_fixed_point_others: measured on a GPU only")
        return
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    path = options.output.with_suffix(".json") if options.output else None
    report = Report("bench_fixed_point_others", "cuda", path, text=options.output)
    rate = copy_rate("cuda")
    report.say(f"copy of 1 GiB: {rate / 1e12:.2f} TB/s read and written; the peer is torch's float16, channels-last")
    for what, make in CASES.items():
        n, moved, ours, theirs = make()
        found = graph_seconds({"ours": Captured(ours, n), "theirs": Captured(theirs, n)})
        report.measured(Measured(*what, found["ours"], moved, rate, found["theirs"]))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
