"""Clocks: kernels with the host's launches kept out, steps with them kept in. Candidates take turns; medians over repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 160 << 20  # rotating operands hold more than this: an H200's second-level cache has 60 MB
CYCLES_A_SECOND = 2e9  # of the spin kernel, at the highest clock

Run = Callable[[int], object]  # of the number of a set of operands


def sets_for(bytes_a_set: int, device: str) -> int:
    """How many sets of operands rotate, so that a call does not find what it reads in the cache."""
    return min(max(2, -(-CACHE_BYTES // max(bytes_a_set, 1))), 12) if device == "cuda" else 2


def kernel_seconds(runs: Sequence[Run], device: str, *, repeats: int = 15, batch_seconds: float = 2e-3) -> list[float]:
    """Seconds a call of each candidate on the device's clock.

    CUDA: a spin kernel runs while the calls of a batch are queued behind it, so the device never waits for the host.
    """
    if device == "cpu":
        return wall_seconds(runs, repeats=repeats)
    calls, spins = zip(*(_batch(run, batch_seconds) for run in runs), strict=True)
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats):
        for run, count, spin, found in zip(runs, calls, spins, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(spin)
            start.record()
            for call in range(count):
                run(repeat + call)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / count)
    return [statistics.median(found) for found in times]


def _batch(run: Run, batch_seconds: float) -> tuple[int, int]:
    """(calls of a batch, cycles to spin while the host queues them)."""
    for index in range(3):
        run(index)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for index in range(4):
        run(index)
    host = (time.perf_counter() - started) / 4
    torch.cuda.synchronize()
    whole = (time.perf_counter() - started) / 4
    calls = min(max(2, round(batch_seconds / whole)), 20)
    return calls, int(CYCLES_A_SECOND * (2 * host * calls + 2e-4))


def step_seconds(runs: Sequence[Run], device: str, *, repeats: int = 7, group_seconds: float = 0.03) -> list[float]:
    """Seconds a call of each candidate as a user has it: calls back to back from an idle device, launches included."""
    if device == "cpu":
        return wall_seconds(runs, repeats=repeats)
    counts = []
    for run in runs:
        for index in range(3):
            run(index)
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(0)
        torch.cuda.synchronize()
        counts.append(min(max(2, round(group_seconds / (time.perf_counter() - started))), 50))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, count, found in zip(runs, counts, times, strict=True):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for call in range(count):
                run(call)
            torch.cuda.synchronize()
            found.append((time.perf_counter() - started) / count)
    return [statistics.median(found) for found in times]


def wall_seconds(runs: Sequence[Run], *, repeats: int = 7) -> list[float]:
    """Seconds a call of each candidate on the CPU."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(0)
    for repeat in range(repeats):
        for run, found in zip(runs, times, strict=True):
            started = time.perf_counter()
            run(repeat)
            found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]


def captured(run: Callable[[], object]) -> Run:
    """The replay of ``run`` captured in a CUDA graph. It keeps ``run``: the graph uses memory that ``run`` may own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(index: int, run: Callable[[], object] = run) -> None:
        graph.replay()

    return replay


class Captured:
    """A graph of calls run(0), run(1), ...; results are kept, so that each call has memory of its own."""

    def __init__(self, run, calls: int) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for index in range(3):
                run(index % calls)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.calls, self.graph = calls, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [run(index) for index in range(calls)]

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls


def medians(graphs: dict[str, Captured], repeats: int = 15) -> dict[str, float]:
    for graph in graphs.values():
        graph.seconds()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            times[name].append(graph.seconds())
    return {name: statistics.median(found) for name, found in times.items()}


def copy_rate() -> float:
    """Bytes read and written a second by a device copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = Captured(lambda _: target.copy_(source), 4)
    return 2 * source.numel() / medians({"copy": graph})["copy"]
