#!/usr/bin/env python3
"""Times a training step in fixed point (`f8net`) against the float step of the same network, in one run, alternating.

On a GPU both steps are CUDA graphs and the float one runs under bfloat16 autocast, as does the fixed-point one; on a CPU both are
float32. A step: forward, backward, SGD with momentum.

    python benchmarks/bench_fixed_point_step.py [--device cpu|cuda] [--rounds N] [--out FOLDER]

With --out writes fixed-point-step-<device>.json there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import torch
from common.models import mobilenet_v2, resnet18
from common.report import Results
from common.timing import Captured, Run, host_seconds, turns
from torch import nn
from torch.nn import functional

from quantrain import nn as qnn
from quantrain.finetune.models import resnet20

# name -> model, image size, batch sizes on a CPU (0: left out) and a GPU
CASES = {
    "ResNet-20": (resnet20, 32, 128, 512),
    "MobileNet-V2 blocks": (mobilenet_v2, 32, 32, 512),
    "ResNet-18": (resnet18, 224, 0, 64),
}


def make_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: bool) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(index: int) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


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
        steps[kind] = Captured(step) if on_gpu else step
    calls = 20 if on_gpu else 1
    timers = [lambda turn, step=step: 1e3 * host_seconds(step, calls, device.type) for step in steps.values()]
    found = [taken[1:] for taken in turns(timers, rounds + 1)]  # the first warms up
    times = dict(zip(steps, found, strict=True))
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
    path = arguments.out / f"fixed-point-step-{device.type}.json" if arguments.out else None
    results = Results("bench_fixed_point_step", device.type, path)
    for name in arguments.models:
        row = measure(name, device, arguments.rounds)
        if row is None:
            continue
        # Times of a CPU depend on the machine: there the ratio alone is printed and kept.
        times = f"{row['float_ms']:.2f} ms and {row['f8net_ms']:.2f} ms, " if device.type == "cuda" else ""
        print(f"{name} batch {row['batch']}: {row['float_type']} and f8net {times}{row['ratio']:.2f}x", flush=True)
        results.keep({k: v for k, v in row.items() if device.type == "cuda" or not k.endswith("_ms")})


if __name__ == "__main__":
    main()
