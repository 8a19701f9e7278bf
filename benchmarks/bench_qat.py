"""A training step under quantization-aware training over that of the float model, and the passes it is made of.

    python benchmarks/bench_qat.py [--device cpu|cuda] [--only SECTION,...] [--quick] [--json FILE]
    QAT_MODELS=resnet50,llama python benchmarks/bench_qat.py    some of the models

Sections, in this order:
    passes    batch norm + relu + fake-quantization, 64 x 256 x 56 x 56 bfloat16, channels last: the share of the time that its bytes take
              at the copy rate of the same run, forward (6 bytes per element) and backward (10)
    step      torchvision's models, bfloat16 autocast, channels last, SGD, and transformers' Llama (2048 wide, 8 layers) in
              bfloat16 with fused AdamW: the float model's time over ours, eager, by whole steps on the host's clock; "memory":
              the peak of a step over the float model's (less is better). PyTorch's own QAT (torch.ao, float32, as it comes)
              stands beside ResNet-50
    compiled  the same after torch.compile
    captured  the same, forward, backward and update as one CUDA graph of each: no host in either
    launches  kernels of one step, by the profiler: ours over the float model's

On the CPU: ResNet-20 of 32 x 32 images in float32, two threads.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common.sections import SectionReport, run_sections
from common.timing import Captured, copy_rate, kernel_seconds, step_seconds, turns
from torch import Tensor, nn

import quantrain.nn as qnn

# model -> batch, image size, recipe -> (time over float to stay under, memory likewise)
MODELS = {
    "resnet50": (64, 224, {"qat-w8a8": (1.0, 0.9), "qat-w4a4": (1.05, 0.8), "fqt-bhq5": (1.5, 1.0)}),
    "mobilenet_v2": (128, 224, {"qat-w8a8": (1.15, 1.0)}),
    "efficientnet_b0": (128, 224, {"qat-w8a8": (1.15, 1.0)}),
    "convnext_tiny": (128, 224, {"qat-w8a8": (1.15, 1.0)}),
    "vit_b_16": (64, 224, {"qat-w8a8": (1.05, 0.95), "qat-w4a8": (1.05, 0.95)}),
    "llama": (4, 2048, {"qat-w8a8-token": (1.04, 0.9), "qat-w4a8": (1.04, 0.9), "fqt-psq8": (1.35, 1.0)}),
}
if "QAT_MODELS" in os.environ:
    MODELS = {name: MODELS[name] for name in os.environ["QAT_MODELS"].split(",")}
QUICK = {"resnet18": (2, 32, {"qat-w8a8": (None, None)})}
VOCABULARY = 32000
ON_CPU = {"resnet20": (64, 32, {"qat-w8a8": (1.15, None), "qat-w4a4": (1.2, None), "fqt-bhq5": (1.6, None)})}


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, of basic blocks of 16, 32 and 64 channels."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.shortcut = nn.Sequential()
            if stride > 1:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        sizes = [(16, 16, 1)] * 3 + [(16, 32, 2), (32, 32, 1), (32, 32, 1)] + [(32, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.blocks = nn.Sequential(*(self.Block(*size) for size in sizes))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def llama(device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=VOCABULARY, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def built(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        return llama(device)
    import torchvision

    model = ResNet20() if name == "resnet20" else getattr(torchvision.models, name)(weights=None)
    return model.to(device).to(memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)


def prepared(model: nn.Module, recipe: str | None) -> nn.Module:
    if recipe is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a vision transformer's attention, which stays float
        return qnn.prepare(model, recipe, fuse=True)


def step_of(model: nn.Module, batch: int, size: int, device: str, autocast: bool = True) -> Callable[[int], Tensor]:
    model.train()
    g = torch.Generator(device).manual_seed(1)
    if "Llama" in type(model).__name__ or hasattr(model, "_orig_mod") and "Llama" in type(model._orig_mod).__name__:
        return language_step(model, batch, size, g)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device, generator=g)
    x = x.contiguous(memory_format=torch.channels_last) if device == "cuda" else x
    labels = torch.randint(10, (batch,), device=device, generator=g)

    def step(_: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast and device == "cuda"):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def language_step(model: nn.Module, batch: int, tokens: int, g: torch.Generator) -> Callable[[int], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, capturable=True)
    ids = torch.randint(VOCABULARY, (batch, tokens), device=g.device, generator=g)

    def step(_: int) -> Tensor:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measured(make: Callable[[], Callable], device: str, captured: bool = False) -> dict[str, float]:
    """ms of a step, and its peak in GiB where it is not captured, of one model at a time."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    step, peak = make(), 0.0
    for number in range(4):
        loss = float(step(number))
    if not loss == loss:
        raise AssertionError("expected a finite loss, got NaN")
    if captured:
        return {"ms": 1e3 * statistics.median(turns([Captured(step).seconds], 9)[0])}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": 1e3 * step_seconds([step], device)[0], "gib": peak}


def torch_qat(model: nn.Module, size: int) -> nn.Module:
    """PyTorch's own, by tracing, with its default settings."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_qat_fx(
            model.train(), get_default_qat_qconfig_mapping("fbgemm"), (torch.randn(1, 3, size, size),)
        )


# ---- sections --------------------------------------------------------------------------------------------------------


def passes(report: SectionReport, device: str, quick: bool) -> None:
    shape = (2, 16, 8, 8) if quick or device == "cpu" else (64, 256, 56, 56)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    y = [torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    grad = [torch.randn_like(t) for t in y]
    c = shape[1]
    weight, bias, scale = (torch.rand(c, device=device) + 0.5 for _ in range(3))
    running = torch.zeros(c, device=device), torch.ones(c, device=device)
    ops, step = torch.ops.quantrain, torch.tensor([0.02], device=device)
    limits = {"quant_min": 0, "quant_max": 255}

    def forward(i: int, mask: bool = True) -> tuple[Tensor, ...]:
        t = y[i % 3]
        statistics = ops._batch_norm_statistics(t)
        ops._batch_norm_update_(
            statistics, weight, bias, scale, *running, count=1000, momentum=0.1, eps=1e-5, activation="relu", range=True
        )
        return statistics, ops._batch_norm_forward(
            t, statistics[0], statistics[1], weight, bias, scale, None, step, None, "relu", 1e-5, *limits.values(), mask
        )

    kept = [forward(i) for i in range(3)]

    def backward(i: int) -> tuple[Tensor, ...]:
        statistics, (_, _, mask) = kept[i % 3]
        return ops._batch_norm_backward(
            grad[i % 3], y[i % 3], mask, statistics[0], statistics[1], weight, bias, scale, "relu", 1e-5, True, False
        )

    rate = copy_rate(device)
    width = y[0].element_size()
    elements = y[0].numel()
    ahead, back = kernel_seconds([forward, backward], device)
    bars = (0.85, 0.80) if device == "cuda" and not quick else (None, None)
    codes = elements * (3 * width + 1 + 1 / 8)  # y twice, the result, its codes, the mask
    report.row("passes", "forward, with codes and mask", codes / rate / ahead, bars[0], us=ahead * 1e6)
    report.row("passes", "backward", elements * (5 * width + 2 / 8) / rate / back, bars[1], us=back * 1e6)


def steps(section: str, report: SectionReport, device: str, quick: bool) -> None:
    models = QUICK if quick else ON_CPU if device == "cpu" else MODELS
    for name, (batch, size, recipes) in models.items():
        found = {}
        for recipe in (None, *recipes):

            def make(recipe: str | None = recipe) -> Callable:
                model = prepared(built(name, device), recipe)
                step_of(model, batch, size, device)(0)  # first ranges are set outside of what is compiled
                if section == "compiled":
                    model = torch.compile(model)
                return step_of(model, batch, size, device)

            found[recipe] = measured(make, device, section == "captured")
        plain = found.pop(None)
        for recipe, ours in found.items():
            time, memory = recipes[recipe]
            case = f"{name} {recipe}"
            report.row(section, case, plain["ms"] / ours["ms"], time and 1 / time, ms=ours["ms"], float_ms=plain["ms"])
            if device == "cuda" and section != "captured":
                report.row("memory", case, ours["gib"] / plain["gib"], memory, gib=ours["gib"], float_gib=plain["gib"])
        if section == "step" and name == "resnet50":
            theirs = measured(
                lambda: step_of(torch_qat(built(name, "cpu"), 224).to(device), batch, size, device, False), device
            )
            report.row("step", f"{name}, PyTorch's QAT", plain["ms"] / theirs["ms"], None, ms=theirs["ms"])
            report.row("memory", f"{name}, PyTorch's QAT", theirs["gib"] / plain["gib"], None, gib=theirs["gib"])


def launches(report: SectionReport, device: str, quick: bool) -> None:
    if device == "cpu":
        return
    for name, (batch, size, recipes) in (QUICK if quick else MODELS).items():
        counts, seconds = {}, {}
        for recipe in (None, *recipes):
            step = step_of(prepared(built(name, device), recipe), batch, size, device)
            for number in range(3):
                step(number)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                step(0)
                torch.cuda.synchronize()
            events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            counts[recipe], seconds[recipe] = len(events), sum(e.device_time for e in events) / 1e3
            if recipe in (None, next(iter(recipes))):
                table = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:24]
                for event in table:
                    report.say(f"    {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d} x {event.key[:110]}")
        for recipe in recipes:
            ratio = counts[recipe] / counts[None]
            report.row(
                "launches", f"{name} {recipe}", ratio, None, kernels=counts[recipe], device_ms=seconds[recipe],
                float_device_ms=seconds[None],
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    sections = {
        "passes": passes,
        "step": lambda *rest: steps("step", *rest),
        "compiled": lambda *rest: steps("compiled", *rest),
        "captured": lambda *rest: steps("captured", *rest),
        "launches": launches,
    }
    return run_sections("bench_qat", __doc__, sections, arguments)


if __name__ == "__main__":
    sys.exit(main())
