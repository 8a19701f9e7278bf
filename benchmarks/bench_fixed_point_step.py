#!/usr/bin/env python3
"""Times a training step in fixed point (`f8net`) against the float step of the same network, in one run, alternating.

On a GPU both steps are CUDA graphs and the float one runs under bfloat16 autocast, as does the fixed-point one; on a CPU both are
float32. A step: forward, backward, SGD with momentum.

Usage: bench_fixed_point_step.py [--device cpu|cuda] [--rounds N] [--out FOLDER]; with --out writes fixed-point-step-<device>.json there
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from common.models import mobilenet_v2
from common.timing import captured
from torch import nn
from torch.nn import functional

from quantrain import nn as qnn
from quantrain.finetune.models import resnet20


def resnet18(num_classes: int, in_channels: int) -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=num_classes)


# name -> model, image size, batch sizes on a CPU (0: left out) and a GPU
CASES = {
    "ResNet-20": (resnet20, 32, 128, 512),
    "MobileNet-V2 blocks": (mobilenet_v2, 32, 32, 512),
    "ResNet-18": (resnet18, 224, 0, 64),
}


def make_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / repeats


def measure(name: str, device: torch.device, rounds: int) -> dict | None:
    make, size, cpu_batch, gpu_batch = CASES[name]
    on_gpu = device.type == "cuda"
    batch = gpu_batch if on_gpu else cpu_batch
    if batch == 0:
        return None
    torch.manual_seed(0)
    model = make(10, 3).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    prepared = qnn.prepare(copy.deepcopy(model), "f8net")
    qnn.calibrate(prepared, [images[:32]])
    if on_gpu:
        images = images.to(memory_format=torch.channels_last)
        model, prepared = (m.to(memory_format=torch.channels_last) for m in (model, prepared))
    steps = {}
    for kind, module in (("float", model), ("f8net", prepared)):
        step = make_step(module.train(), images, labels, autocast=on_gpu)
        steps[kind] = partial(captured(step), 0) if on_gpu else step
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_number in range(rounds + 1):
        for kind, step in steps.items():
            taken = milliseconds(step, device, 20 if on_gpu else 1)
            if round_number:  # the first warms up
                times[kind].append(taken)
    row = {"model": name, "batch": batch, "size": size, "float_type": "bfloat16" if on_gpu else "float32"}
    for kind, values in times.items():
        row[f"{kind}_ms"], row[f"{kind}_best_ms"] = statistics.median(values), min(values)
    row["ratio"] = statistics.median(f / b for f, b in zip(times["f8net"], times["float"], strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    for name in arguments.models:
        row = measure(name, device, arguments.rounds)
        if row is None:
            continue
        rows.append(row)
        # Times of a CPU depend on the machine: there the ratio alone is printed.
        times = f"{row['float_ms']:.2f} ms and {row['f8net_ms']:.2f} ms, " if device.type == "cuda" else ""
        print(f"{name} batch {row['batch']}: {row['float_type']} and f8net {times}{row['ratio']:.2f}x", flush=True)
    if arguments.out is not None:
        if device.type == "cpu":
            rows = [{k: v for k, v in row.items() if not k.endswith("_ms")} for row in rows]
        command = " ".join(["benchmarks/bench_fixed_point_step.py", *sys.argv[1:]])
        result = {
            "device": where,
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "command": command,
            "rows": rows,
        }
        path = arguments.out / f"fixed-point-step-{device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
