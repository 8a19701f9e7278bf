"""Loss scaling: the fused gradient steps against PyTorch's, and training in every precision, all in one run.

    python benchmarks/bench_amp.py [--device cpu|cuda] [--quick] [--part clip|train|all] [--cpp PROGRAM] [--curves FILE] [--json FILE]

clip: unscale, check for Inf and NaN, and clip by norm the gradients of GPT-2 124M (148 tensors). Results are checked against float64
before they are timed. Columns: time of one call; the bytes that it must move, per second; the time that they (12 bytes per float32
element: one reading, then one reading and writing) would take at the rate of a copy measured in the same run, as per cent of the call's
time; GradScaler.unscale_ and clip_grad_norm_(foreach=True) over ours.
train (CUDA): GPT-2 124M, in Python and, with --cpp (the built examples/cpp/train_gpt), in C++, eager and captured; and a network of
ResNet-50's convolutions. Time per step, the host's part of it, peak memory, loss after the steps. --curves: also trains the small preset
on tinyshakespeare in float32, float16 and bfloat16 and writes the losses, which scripts/make_figures.py draws.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common.cases import parser_of, report_of
from common.models import gpt2_shapes
from common.report import Measured, Report
from common.timing import copy_rate, host_seconds, kernel_seconds, turns
from torch import nn

from quantrain.amp import GradScaler

ROOT = Path(__file__).resolve().parent.parent
SCALE, MAX_NORM = 2.0**16, 1.0
TINY = {"width": 64, "vocabulary": 256, "context": 32}
# How often a gradient is read or written: the check reads, unscaling and clipping reads and writes. What an optimizer that takes the
# scale needs is the check alone; with the scaler's overflow report and update it is the third.
CLIPS = (("clip_grad_norm_", 3), ("clip_grad_norm_, check alone", 1), ("clip_grad_norm_, check and update", 1))

# ---- unscale, check and clip ------------------------------------------------------------------------------------------------


class Setup:
    """Parameters with gradients, an optimizer that holds them, and both scalers."""

    def __init__(self, device: str, dtype: torch.dtype, layers: int, **sizes: int) -> None:
        self.device = device
        self.parameters = [
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in gpt2_shapes(layers, **sizes)
        ]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)
        self.fused = torch.optim.AdamW(self.parameters, fused=True)
        self.fused_scaler = GradScaler(device, growth_interval=2**30)
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter)
        self.numel = sum(parameter.numel() for parameter in self.parameters)
        self.scale = torch.tensor(SCALE, device=device)
        self.fused_scaler.scale(self.scale)

    def ours(self, scale: float = 1.0) -> torch.Tensor:
        """The scaler's own call, its host work included. Timed with a scale of 1: the same gradients divided again and again
        by a large one would be zeros after a few calls, and subnormal before, which CPUs handle slowly."""
        scaler = GradScaler(self.device, init_scale=scale)
        scaler.scale(self.scale)
        return scaler.clip_grad_norm_(self.optimizer, MAX_NORM)

    def check_only(self) -> None:
        torch.ops.quantrain._amp_check_norm(
            [parameter.grad for parameter in self.parameters], self.scale, max_norm=MAX_NORM
        )

    def takes_scale(self) -> None:
        """The call for an optimizer that takes the scale: the check, and the counters of the overflow report."""
        self.fused_scaler.clip_grad_norm_(self.fused, MAX_NORM)
        self.fused_scaler.update()

    def pytorch(self) -> torch.Tensor:
        scaler = torch.amp.GradScaler(self.device, init_scale=1.0)
        scaler.scale(self.scale)
        scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=True)

    def refill(self, seed: int) -> None:
        """Fresh scaled gradients."""
        torch.manual_seed(seed)
        for parameter in self.parameters:
            parameter.grad.normal_(0.0, 3.0)

    def verify(self) -> None:
        """Against float64, on fresh gradients."""
        self.refill(1)
        before = [parameter.grad.clone() for parameter in self.parameters]
        expected = sum((grad.double() / SCALE).square().sum() for grad in before).sqrt()
        norm = self.ours(SCALE)
        assert abs(float(norm / expected) - 1) < 1e-5, f"norm {float(norm)}, expected {float(expected)}"
        coefficient = min(1.0, MAX_NORM / (float(expected) + 1e-6)) / SCALE
        for parameter, grad in zip(self.parameters, before, strict=True):
            wanted = (grad.double() * coefficient).to(parameter.dtype)
            assert torch.allclose(
                parameter.grad.float(), wanted.float(), rtol=2e-5 if grad.dtype == torch.float32 else 1e-2, atol=0
            )


def bench_clip(report: Report, *, quick: bool) -> None:
    device = report.device
    rate = copy_rate(device)
    for dtype in (torch.float32, torch.bfloat16):
        setup = Setup(device, dtype, 12 if device == "cuda" else 2, **TINY if quick else {})
        setup.verify()
        setup.refill(2)
        # PyTorch's unscale_ has no bfloat16 on CUDA.
        native = setup.pytorch if dtype == torch.float32 or device == "cpu" else None
        calls = [setup.ours, setup.check_only, setup.takes_scale, *([native] if native else [])]
        seconds = [kernel_seconds([lambda _, call=call: call()], device, repeats=9)[0] for call in calls]
        element = float(setup.parameters[0].grad.float().std()) / (MAX_NORM / setup.numel**0.5)
        assert 0.5 < element < 2, f"expected clipped gradients to be timed, got {element} of their size"
        size, what = torch.finfo(dtype).bits // 8, (f"{len(setup.parameters)} tensors", dtype, (setup.numel,))
        for (name, accesses), value in zip(CLIPS, seconds, strict=False):
            moved = accesses * size * setup.numel
            report.measured(Measured(name, *what, value, moved, rate, seconds[3] if native else None))
        del setup
        gc.collect()


# ---- training ---------------------------------------------------------------------------------------------------------------

PRECISIONS = {
    "fp32": ["--precision", "fp32"],
    "tf32": ["--precision", "fp32", "--tf32"],
    "fp16": ["--precision", "fp16"],
    "bf16": ["--precision", "bf16"],
}


def run_gpt(command: list[str], flags: list[str], text: Path) -> dict | None:
    """One benchmark run of a train_gpt program; None, and its message, where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--preset",
            "gpt2",
            "--device",
            "cuda",
            "--data",
            str(text),
            "--out",
            folder,
            "--dropout",
            "0",
            *flags,
        ]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"FAILED {' '.join(command)} {' '.join(flags)}: {done.stderr.strip()[-400:]}")
        return None
    return json.loads(lines[-1])


def bench_gpt(cpp: str | None, report: Report) -> None:
    text = Path(tempfile.gettempdir()) / "bench_amp_text.txt"
    torch.manual_seed(0)
    text.write_bytes(bytes(torch.randint(97, 123, (2_000_000,), dtype=torch.uint8).tolist()))
    programs = {"Python": [sys.executable, str(ROOT / "examples/python/train_gpt.py")]}
    if cpp:
        programs["C++"] = [cpp]
    header = ["GPT-2 124M", "batch", "precision", "ms/step", "host ms", "memory GB", "loss", "against Python"]
    report.say("\n" + "{:<22}{:>9}{:>10}{:>9}{:>9}{:>11}{:>8}{:>16}".format(*header))
    for batch, context in ((8, 1024), (1, 256)):
        sizes = ["--batch-size", str(batch), "--context", str(context), "--benchmark", "20"]
        for precision, flags in PRECISIONS.items():
            python = None
            for name, command in programs.items():
                variants = {"": []}
                if name == "Python" and precision == "fp16":
                    variants[", torch.amp"] = ["--scaler", "torch"]
                if name == "C++" and precision in ("fp16", "bf16"):
                    variants[", captured"] = ["--captured"]
                for variant, extra in variants.items():
                    result = run_gpt(command, [*flags, *sizes, *extra], text)
                    if result is None:
                        continue
                    python = python or result["step_ms_median"]
                    label = name + variant
                    report.add(
                        {"op": "train_gpt", "batch": f"{batch}x{context}", **result},
                        f"{label:<22}{f'{batch}x{context}':>9}{precision:>10}{result['step_ms_median']:>9.2f}"
                        f"{result['host_ms_median']:>9.2f}{result['peak_memory_bytes'] / 1e9:>11.2f}"
                        f"{result['final_loss']:>8.3f}{python / result['step_ms_median']:>15.2f}x",
                    )


def train_curves(path: Path) -> None:
    """Train the small preset in each precision; evaluation losses as lines of ``precision,step,loss``."""
    lines = ["precision,step,loss"]
    for precision in ("fp32", "fp16", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [
                    *(sys.executable, str(ROOT / "examples/python/train_gpt.py"), "--device", "cuda", "--out", folder),
                    *("--precision", precision, "--steps", "1500", "--eval-every", "50", "--no-tensorboard"),
                    *("--batch-size", "64", "--growth-interval", "200", "--save-every", "0"),
                ],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        lines += [f"{precision},{entry['step']},{entry['loss']}" for entry in entries if entry["event"] == "eval"]
        print(f"tinyshakespeare, small preset, {precision}: evaluation loss {lines[-1].rsplit(',', 1)[1]}")
    path.write_text("\n".join(lines) + "\n")


class Bottleneck(nn.Module):
    """ResNet-50's block (He et al., arXiv:1512.03385): 1x1, 3x3, 1x1 convolutions with a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int, entry: int) -> None:
        super().__init__()

        def conv(a: int, b: int, size: int, step: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, size, step, size // 2, bias=False), nn.BatchNorm2d(b)]

        self.body = nn.Sequential(
            *conv(entry, inner, 1, 1), nn.ReLU(), *conv(inner, inner, 3, stride), nn.ReLU(), *conv(inner, outer, 1, 1)
        )
        self.shortcut = nn.Sequential(*conv(entry, outer, 1, stride)) if entry != outer or stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    entry = 64
    for inner, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            layers.append(Bottleneck(inner, 4 * inner, stride if block == 0 else 1, entry))
            entry = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entry, 1000))


def bench_convolutions(report: Report) -> None:
    report.say(
        "\n"
        + f"{'ResNet-50, 64x3x224x224':<22}{'precision':>14}{'ms/step':>9}{'memory GB':>11}{'loss':>8}{'against fp32':>14}"
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 3, 224, 224, generator=generator).cuda().to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (64,), generator=generator).cuda()
    baseline = None
    for precision in PRECISIONS:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.manual_seed(0)
        model = resnet50().cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = GradScaler(enabled=precision == "fp16")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        losses = []

        def step(_, optimizer=optimizer, model=model, scaler=scaler, dtype=dtype, precision=precision, losses=losses):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype, enabled=precision in ("fp16", "bf16")):
                loss = nn.functional.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())

        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):
            step(0)
        (times,) = turns([lambda turn, step=step: host_seconds(step, 1, "cuda")], 20)
        seconds = statistics.median(times)
        baseline = baseline or seconds
        memory = torch.cuda.max_memory_allocated() / 1e9
        report.add(
            {"op": "resnet50", "precision": precision, "ms": round(seconds * 1e3, 2), "memory_gb": round(memory, 2)},
            f"{'':<22}{precision:>14}{seconds * 1e3:>9.2f}{memory:>11.2f}{float(losses[-1]):>8.3f}{baseline / seconds:>13.2f}x",
        )
        del model, optimizer
        gc.collect()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=["clip", "train", "all"], default="all")
    parser.add_argument("--cpp", default=os.environ.get("QUANTRAIN_TRAIN_GPT"), help="the built examples/cpp/train_gpt")
    parser.add_argument("--curves", type=Path, help="also train in three precisions and write the losses to this file")
    options = parser.parse_args()
    report = report_of("bench_amp", options)
    if options.part in ("clip", "all"):
        bench_clip(report, quick=options.quick)
    if options.part in ("train", "all") and options.device == "cuda" and not options.quick:
        bench_gpt(options.cpp, report)
        bench_convolutions(report)
    if options.curves:
        train_curves(options.curves)


if __name__ == "__main__":
    main()
