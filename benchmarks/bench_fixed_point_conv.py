"""Convolutions of codes on the CPU or a GPU: quantrain's, against float32 and oneDNN's int8 in the same run.

    python benchmarks/bench_fixed_point_conv.py [--device cpu] [--threads 2] [--repeats 15] [--json FILE]

One line per layer shape of ResNet-20 (32 x 32) and ResNet-18 (224 x 224): milliseconds, GMAC/s, and how many times as long the others take. The last
lines are sums over all the network's convolutions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common.report import Report
from common.timing import host_seconds

import quantrain

# channels, outputs, size, kernel, stride, how many in the network
RESNET20 = [
    (3, 16, 32, 3, 1, 1),
    (16, 16, 32, 3, 1, 6),
    (16, 32, 32, 3, 2, 1),
    (32, 32, 16, 3, 1, 5),
    (32, 64, 16, 3, 2, 1),
    (64, 64, 8, 3, 1, 5),
]
RESNET18 = [
    (3, 64, 224, 7, 2, 1),
    (64, 64, 56, 3, 1, 4),
    (64, 128, 56, 3, 2, 1),
    (64, 128, 56, 1, 2, 1),
    (128, 128, 28, 3, 1, 3),
    (128, 256, 28, 3, 2, 1),
    (128, 256, 28, 1, 2, 1),
    (256, 256, 14, 3, 1, 3),
    (256, 512, 14, 3, 2, 1),
    (256, 512, 14, 1, 2, 1),
    (512, 512, 7, 3, 1, 3),
]


def milliseconds(run, repeats: int, device: str) -> float:
    """The least of `repeats` timings, each of enough calls for a millisecond: other programs only add to it."""

    def call(index: int) -> None:
        run()

    host_seconds(call, 3, device)
    calls = max(1, int(1e-3 / max(host_seconds(call, 3, device), 1e-9)))
    return 1e3 * min(host_seconds(call, calls, device) for _ in range(repeats))


def onednn(x, w, stride: int, padding: int):
    """oneDNN's convolution with powers of two as scales: the same codes where sums stay below 2^24."""
    scales, zeros = torch.full((w.shape[0],), 2.0**-7), torch.zeros(w.shape[0], dtype=torch.int64)
    stride, padding, ones = [stride] * 2, [padding] * 2, [1, 1]
    packed = torch.ops.onednn.qconv_prepack(w, scales, 2.0**-4, 0, stride, padding, ones, 1, x.shape)
    return lambda: torch.ops.onednn.qconv_pointwise(
        x, 2.0**-4, 0, packed, scales, zeros, None, stride, padding, ones, 1, 4.0, 0, torch.uint8, "relu", [None], ""
    )


def layer(batch: int, c: int, o: int, size: int, kernel: int, stride: int, args) -> dict[str, float]:
    padding = kernel // 2
    x = torch.randint(0, 256, (batch, c, size, size), dtype=torch.uint8, device=args.device)
    x = x.to(memory_format=torch.channels_last)
    w = torch.randint(-127, 128, (o, c, kernel, kernel), dtype=torch.int8, device=args.device)
    bias = torch.zeros(o, dtype=torch.int32, device=args.device)
    shift = torch.full((o,), 9, dtype=torch.int32, device=args.device)
    xf, wf = x.float(), w.float().contiguous(memory_format=torch.channels_last)
    runs = {"float32": lambda: torch.nn.functional.conv2d(xf, wf, stride=stride, padding=padding)}
    if args.device == "cpu":
        runs["onednn"] = onednn(x, w, stride, padding)
        conv = quantrain._C._FixedPointConv(w, bias, [stride] * 2, [padding] * 2, 1, False)
        output = torch.empty(conv.output_size(x.shape), dtype=torch.uint8, memory_format=torch.channels_last)
        runs["quantrain"] = lambda: conv.run(x, output, shift)
    else:
        runs["quantrain"] = lambda: quantrain.fixed_point_conv2d_requantize(
            x, w, bias, shift, stride=stride, padding=padding
        )
    return {name: milliseconds(run, args.repeats, args.device) for name, run in runs.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", default="", help="a network and batch, as in the output: 'resnet20 64'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("bench_fixed_point_conv", args.device, args.json)
    for name, shapes, batches in (("resnet20", RESNET20, (64, 1)), ("resnet18", RESNET18, (16, 1))):
        for batch in batches:
            if args.only and args.only != f"{name} {batch}":
                continue
            total: dict[str, float] = {}
            for c, o, size, kernel, stride, count in shapes:
                times = layer(batch, c, o, size, kernel, stride, args)
                ours = times["quantrain"]
                macs = batch * (size // stride) ** 2 * o * c * kernel**2
                ratios = "  ".join(f"{other} {t / ours:5.2f}x" for other, t in times.items() if other != "quantrain")
                case = f"{c:3d}->{o:3d} {size:3d}px {kernel}x{kernel}/{stride}"
                report.add(
                    {"network": name, "batch": batch, "layer": case, "count": count, "ms": times},
                    f"{name} batch {batch:2d}  {case}  {ours:8.4f} ms {macs / ours / 1e6:6.0f} GMAC/s  {ratios}",
                )
                for other, t in times.items():
                    total[other] = total.get(other, 0.0) + count * t
            sums = "  ".join(f"{other} {t:.3f} ms" for other, t in total.items())
            report.say(f"{name} batch {batch:2d}  all convolutions: {sums}")


if __name__ == "__main__":
    main()
