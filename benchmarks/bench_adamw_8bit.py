"""AdamW's step with moments of 8 bits against PyTorch's fused AdamW, against bitsandbytes and against a copy, all in one run.

    python benchmarks/bench_adamw_8bit.py [--device cpu|cuda] [--quick] [--json FILE]

GPT-2 124M's parameters (148 tensors), and on CUDA 1.05e9 in 100 tensors; float32 and bfloat16, gradients of the same type. Our step is
held against PyTorch's before either is timed. Lines: the operator alone with the kernels' time on the device (host kept out), to nearest,
with stochastic rounding, with moments of 32 bits; then whole calls of ``optimizer.step()`` as a user has them, host included, and on CUDA
one replay of a graph of it. Columns: time of a step; the bytes that it must move, per second; what those would take at the rate of a copy
in the same run, as per cent of that time; the time of PyTorch's fused AdamW over ours. Its moments have the parameter's type: it moves 28
bytes per element in float32, 14 in bfloat16. "bitsandbytes": its AdamW8bit's time over ours, where it can be imported.
Bytes per element of size s: parameter 2 s, gradient s, two codes read and written 4, scales 16 / 256; with 32 bits 16 in place of those.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable

import torch
from common.cases import parser_of, report_of
from common.models import gpt2_shapes
from common.report import Measured, Report
from common.timing import Captured, Run, copy_rate, graph_seconds, kernel_seconds, step_seconds
from torch import Tensor, nn

from quantrain.optim import AdamW8bit

LARGE = [(10_500_000,)] * 100
TINY = {"width": 64, "vocabulary": 256, "context": 32}
STATE_BYTES = {8: 4 + 16 / 256, 32: 16}
OPTIONS = {"lr": 1e-4, "weight_decay": 0.01}


def parameters_of(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(1)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    parameters = [nn.Parameter(draw(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = draw(tuple(parameter.shape))
    return parameters


def verify(device: str) -> None:
    """Three steps beside PyTorch's, on the first tensors: their difference is a small part of the way."""
    shapes = [(257, 96), (768,), (64, 4096)]
    ours, theirs = (parameters_of(shapes, torch.float32, device) for _ in range(2))
    start = [p.detach().clone() for p in ours]
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            torch.manual_seed(step)
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        if step == 0:
            both = AdamW8bit(ours, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
        for optimizer in both:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        way = float((other - before).detach().square().mean().sqrt())
        off = float((mine - other).detach().square().mean().sqrt())
        assert off < 0.03 * way, f"expected steps near those of PyTorch, got {off / way:.3f} of the way off"


def operator_run(parameters: list[nn.Parameter], *, bits: int = 8, stochastic: bool = False) -> Run:
    """The operator alone: what an optimizer calls, its lists made once."""
    optimizer = AdamW8bit(parameters, bits=bits, stochastic_rounding=stochastic, **OPTIONS)
    optimizer.step()
    states = [optimizer.state[p] for p in parameters]
    none = parameters[0].new_empty(0, dtype=torch.float32)
    lists = [
        [p.detach() for p in parameters],
        [p.grad for p in parameters],
        [s["exp_avg"] for s in states],
        [s.get("exp_avg_scale", none) for s in states],
        [s["exp_avg_sq"] for s in states],
        [s.get("exp_avg_sq_scale", none) for s in states],
        [s["step"] for s in states],
    ]
    lr = torch.tensor(OPTIONS["lr"], device=none.device)
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": OPTIONS["weight_decay"]}
    return lambda _: torch.ops.quantrain.adamw_8bit_(*lists, lr=lr, stochastic=stochastic, **numbers)


def optimizer_run(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], parameters: list[nn.Parameter]) -> Run:
    optimizer = make(parameters)
    optimizer.step()
    return lambda _: optimizer.step()


def bitsandbytes_optimizer() -> Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes

    return lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, **OPTIONS)


def bench_list(report: Report, shapes: list[tuple[int, ...]], dtype: torch.dtype, rate: float) -> None:
    device, size = report.device, torch.finfo(dtype).bits // 8
    numel = sum(math.prod(shape) for shape in shapes)
    what = (f"{len(shapes)} tensors", dtype, (numel,))
    parameters = parameters_of(shapes, dtype, device)
    rounding = (False, True) if dtype == torch.bfloat16 else (False,)
    cases = [(f"adamw_8bit_{', stochastic' if s else ''}", 8, operator_run(parameters, stochastic=s)) for s in rounding]
    cases += [("adamw_8bit_, 32 bits", 32, operator_run(parameters, bits=32))]

    def fused(of: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(of, fused=True, capturable=device == "cuda", **OPTIONS)

    torch_step = optimizer_run(fused, parameters)
    seconds = kernel_seconds([run for _, _, run in cases] + [torch_step], device, repeats=9)
    for (name, bits, _), value in zip(cases, seconds, strict=False):
        moved = (3 * size + STATE_BYTES[bits]) * numel
        report.measured(Measured(name, *what, value, moved, rate, seconds[-1]))
    del cases
    gc.collect()

    whole = {"AdamW8bit.step": optimizer_run(lambda of: AdamW8bit(of, **OPTIONS), parameters), "torch": torch_step}
    peer = bitsandbytes_optimizer() if device == "cuda" else None
    if peer:
        whole["bitsandbytes"] = optimizer_run(peer, parameters)
    times = dict(zip(whole, step_seconds(list(whole.values()), device), strict=True))
    moved = (3 * size + STATE_BYTES[8]) * numel
    ours = times["AdamW8bit.step"]
    more = {"bitsandbytes": times["bitsandbytes"] / ours} if peer else {}
    report.measured(Measured("AdamW8bit.step, host too", *what, ours, moved, rate, times["torch"], more))
    if device == "cuda":
        graphs = {name: Captured(whole[name]) for name in ("AdamW8bit.step", "torch")}
        replays = graph_seconds(graphs, repeats=9)
        value = replays["AdamW8bit.step"]
        report.measured(Measured("AdamW8bit.step, in a graph", *what, value, moved, rate, replays["torch"]))


def main() -> None:
    options = parser_of(__doc__).parse_args()
    report = report_of("bench_adamw_8bit", options)
    device = report.device
    verify(device)
    rate = copy_rate(device)
    lists = [gpt2_shapes(**TINY) if options.quick else gpt2_shapes(12 if device == "cuda" else 2)]
    if device == "cuda" and not options.quick:
        lists.append(LARGE)
    for shapes in lists:
        for dtype in (torch.float32, torch.bfloat16):
            bench_list(report, shapes, dtype, rate)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
