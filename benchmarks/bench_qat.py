"""A training step under quantization-aware training over that of the float model, and the passes it is made of.

    python benchmarks/bench_qat.py [--device cpu|cuda] [--only SECTION,...] [--quick] [--json FILE]
    QAT_MODELS=resnet50,llama python benchmarks/bench_qat.py    some of the models

Sections, in this order:
    passes    batch norm + relu + fake-quantization, 64 x 256 x 56 x 56 bfloat16, channels last: the share of the time that its bytes take
              at the copy rate of the same run, forward (6 bytes per element) and backward (10)
    step      torchvision's models, bfloat16 autocast, channels last, SGD, and transformers' Llama (2048 wide, 8 layers) in
              bfloat16 with fused AdamW: the float model's time over ours, eager, by whole steps on the host's clock; "memory":
              the peak of a step over the float model's (less is better)
    compiled  the same after torch.compile, by itself three minutes for a model: whoever's turn comes later is left out with a note
    captured  the same, forward, backward and update as one CUDA graph of each: no host in either
    launches  kernels of one step, by the profiler: ours over the float model's
    joined    no times: which patterns `prepare(fuse=True)` joined in each model, and how often

Beside ours, in step and compiled, stand the training steps of torchao, brevitas and torch.ao, those that are installed
(common/qat_peers.py says what each rounds, and how). Such a row's ratio is their time over ours, in "memory" our peak over theirs.
They run as ours do, under the same autocast or in bfloat16, but for torch.ao, whose observers take float32 alone. Before it is timed, the
values that a peer's products read are counted: it must round both. A step that fails is noted and does not stop the others; one of ours
counts in the exit status.

On the CPU: ResNet-20 of 32 x 32 images in float32, two threads; with --quick, of compiled models the traced graphs, run eagerly.
"""

from __future__ import annotations

import gc
import os
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common.qat_peers import PEERS, Peer, prepared_by, products_that_round
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
QUICK = {
    "resnet18": (2, 32, {"qat-w8a8": (None, None), "qat-w4a4": (None, None)}),
    "llama-tiny": (2, 32, {"qat-w8a8-token": (None, None), "qat-w4a8": (None, None), "fqt-psq8": (None, None)}),
}
ON_CPU = {"resnet20": (64, 32, {"qat-w8a8": (1.15, None), "qat-w4a4": (1.2, None), "fqt-bhq5": (1.6, None)})}
VOCABULARY, TINY_VOCABULARY = 32000, 512
COMPILE_SECONDS = 180.0  # for all of a model's steps in "compiled"


def models_of(device: str, quick: bool) -> dict[str, tuple[int, int, dict]]:
    return QUICK if quick else ON_CPU if device == "cpu" else MODELS


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


def llama(device: str, tiny: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, intermediate, layers, heads = (320, 640, 2, 4) if tiny else (2048, 5632, 8, 16)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=TINY_VOCABULARY if tiny else VOCABULARY, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def built(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("llama"):
        return llama(device, name == "llama-tiny")
    import torchvision

    model = ResNet20() if name == "resnet20" else getattr(torchvision.models, name)(weights=None)
    return model.to(device).to(memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)


def prepared(model: nn.Module, recipe: str | None, peer: Peer | None, size: int, device: str) -> nn.Module:
    """The float model, ours, or a peer's."""
    if peer is not None:
        return prepared_by(peer, model, torch.randn(1, 3, size, size, device=device)).to(device)
    if recipe is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a vision transformer's attention, which stays float
        return qnn.prepare(model, recipe, fuse=True)


def step_of(model: nn.Module, name: str, batch: int, size: int, device: str, autocast: bool = True) -> Callable:
    """A step of training by the same batch, of its number; gives the loss."""
    model.train()
    g = torch.Generator(device).manual_seed(1)
    if name.startswith("llama"):
        return language_step(model, batch, size, g)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
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
    on_gpu = g.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=on_gpu, capturable=on_gpu)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=g.device, generator=g)

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
    before = torch.cuda.memory_allocated() if device == "cuda" else 0  # what sections before left
    step, peak = make(), 0.0
    for number in range(4):
        loss = float(step(number))
    if not loss == loss:
        raise AssertionError("expected a finite loss, got NaN")
    if captured:  # the graph's memory is its own, and goes with it
        return {"ms": 1e3 * statistics.median(turns([Captured(step).seconds], 9)[0])}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(0)
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"ms": 1e3 * step_seconds([step], device)[0], "gib": peak}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer; again every 5 s, where something swallows it."""

    def over(*_: object) -> None:
        raise TimeoutError("no time is left for this model")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


Candidate = tuple[str, str | None, Peer | None]  # model, recipe (None: float), and who else runs it (None: we)


def plan_of(section: str, models: dict) -> list[Candidate]:
    """In the order of measuring: of each model float, our recipes, then their peers."""
    plan: list[Candidate] = []
    for name, (_, _, recipes) in models.items():
        plan.append((name, None, None))
        plan += [(name, recipe, None) for recipe in recipes]
        if section != "captured":  # their steps wait for the host, and a capture that fails spoils the random state
            plan += [(name, recipe, peer) for recipe in recipes for peer in PEERS.get(name, {}).get(recipe, ())]
    return plan


def case_of(name: str, recipe: str | None, peer: Peer | None) -> str:
    return f"{name} {recipe or 'float'}" + (f", {peer.name}" if peer else "")


def made(section: str, report: SectionReport, device: str, quick: bool, candidate: Candidate) -> Callable:
    """The step of a candidate, after its first ranges are set."""
    name, recipe, peer = candidate
    batch, size, _ = models_of(device, quick)[name]
    model = prepared(built(name, device), recipe, peer, size, device)
    rest = (name, batch, size, device, peer is None or peer.autocast)
    step = step_of(model, *rest)
    for number in range(2):  # ranges are set, brevitas' become parameters, outside of what is compiled
        step(number)
    if peer is not None and section == "step":
        report.note(f"{case_of(*candidate)}: {products_that_round(peer, lambda: step(0))}")
    if section == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager" if quick and device == "cpu" else "inductor")
        return step_of(compiled, *rest)
    return step


def steps(section: str, report: SectionReport, device: str, quick: bool) -> int:
    """Returns how many of our own steps failed."""
    if section == "captured" and device == "cpu":
        return 0
    models, found, failed = models_of(device, quick), {}, 0
    left = dict.fromkeys(models, (8.0 if quick else COMPILE_SECONDS) if section == "compiled" else 1e6)
    for candidate in plan_of(section, models):
        name, recipe, peer = candidate
        case, started = case_of(*candidate), time.monotonic()
        if peer is not None and not peer.installed:
            report.note(f"{section} {case}: left out, {peer.package} is not installed")
            continue
        if left[name] <= 0:
            report.note(f"{section} {case}: left out, no time is left for this model")
            continue
        try:
            with limited(left[name]):
                found[candidate] = measured(
                    lambda of=candidate: made(section, report, device, quick, of), device, section == "captured"
                )
        except Exception as error:
            if time.monotonic() - started >= left[name]:  # whatever became of the TimeoutError
                report.note(f"{section} {case}: stopped, no time is left for this model")
            else:
                report.note(f"{section} {case}: FAILED, {type(error).__name__}: {str(error).strip()[:300]}")
                failed += peer is None
        else:
            row_of(section, report, device, models[name][2].get(recipe), candidate, found)
        left[name] -= time.monotonic() - started
    return failed


def row_of(section: str, report: SectionReport, device: str, bars: tuple | None, of: Candidate, found: dict) -> None:
    """Ours against the float model, a peer against ours."""
    name, recipe, peer = of
    if recipe is None:
        return
    case, mine, base = case_of(*of), found[of], found.get((name, recipe if peer else None, None))
    if base is None:
        report.row(section, case, None, None, ms=mine["ms"])
        return
    has_peak = device == "cuda" and section != "captured"
    if peer is None:
        time_bar, peak_bar = bars
        against = {"float_ms": base["ms"]}, {"float_gib": base.get("gib")}
        ratio, peaks = base["ms"] / mine["ms"], (mine, base)
    else:
        time_bar, peak_bar = (1.0, None) if device == "cuda" else (None, None)
        against = {"ours_ms": base["ms"]}, {"ours_gib": base.get("gib")}
        ratio, peaks = mine["ms"] / base["ms"], (base, mine)
    report.row(section, case, ratio, time_bar and 1 / time_bar, ms=mine["ms"], **against[0])
    if has_peak:
        report.row("memory", case, peaks[0]["gib"] / peaks[1]["gib"], peak_bar, gib=mine["gib"], **against[1])


def launches(report: SectionReport, device: str, quick: bool) -> None:
    if device == "cpu":
        return
    for name, (batch, size, recipes) in models_of(device, quick).items():
        counts, seconds = {}, {}
        for recipe in (None, *recipes):
            step = step_of(prepared(built(name, device), recipe, None, size, device), name, batch, size, device)
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


def joined(report: SectionReport, device: str, quick: bool) -> None:
    for name, (_, size, recipes) in (QUICK if quick else {**ON_CPU, **MODELS}).items():
        recipe = next(iter(recipes))
        rows = prepared(built(name, "cpu"), recipe, None, size, "cpu").quantization_summary.fused
        report.say(f"joined     {name} {recipe}: {len(rows)} calls")
        for pattern, count in Counter(_pattern(row) for row in rows).most_common():
            report.say(f"           {count:4d} x {pattern}")


def _pattern(row: str) -> str:
    """A line of the summary without names: layers that read a result are counted."""
    text = row.partition(": ")[2] or row
    head, reads, names = text.partition("input of ")
    return f"{head}{reads}{len(names.split(','))} layers" if reads else text


def main(arguments: list[str] | None = None) -> int:
    sections = {
        "passes": passes,
        "step": lambda *rest: steps("step", *rest),
        "compiled": lambda *rest: steps("compiled", *rest),
        "captured": lambda *rest: steps("captured", *rest),
        "launches": launches,
        "joined": joined,
    }
    return run_sections("bench_qat", __doc__, sections, arguments)


if __name__ == "__main__":
    sys.exit(main())
