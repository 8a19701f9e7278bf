"""Clocks: kernels with the host's launches kept out, steps with them kept in. Candidates take turns; medians over repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 200 << 20  # rotating operands hold more than this: an H200's second-level cache has 60 MB
CYCLES_A_SECOND = 2e9  # of the spin kernel, at the highest clock
SPIN_SECONDS = 2e-4  # beyond what the host needs to queue a batch

Run = Callable[[int], object]  # of the number of a set of operands
Timer = Callable[[int], float]  # of the number of the turn: seconds


# ---- one batch of calls ----------------------------------------------------------------------------------------------


def device_seconds(run: Run, calls: int, *, first: int = 0, spin: float = 0.0) -> float:
    """Seconds per call on the device's clock.

    Args:
        run: called with ``first``, ``first + 1``, ...
        calls: how often.
        first: number of the first call.
        spin: seconds of a kernel that spins before them while the host queues them, so that the device never waits for it.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if spin:
        torch.cuda._sleep(int(CYCLES_A_SECOND * spin))
    start.record()
    for call in range(first, first + calls):
        run(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def host_seconds(run: Run, calls: int, device: str = "cpu", *, wait: bool = True) -> float:
    """Seconds per call on the host's clock, back to back from an idle device; without ``wait`` the host's part alone."""
    synchronize(device)
    started = time.perf_counter()
    for call in range(calls):
        run(call)
    if wait:
        synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: str) -> None:
    """Waits for the device where it is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---- candidates ------------------------------------------------------------------------------------------------------


def turns(timers: Sequence[Timer], repeats: int, seconds: float = 0.0) -> list[list[float]]:
    """What each timer gives, ``repeats`` times and on until ``seconds`` are over; in turns: a disturbance strikes all alike."""
    times: list[list[float]] = [[] for _ in timers]
    stop, turn = time.perf_counter() + seconds, 0
    while turn < repeats or time.perf_counter() < stop:
        for timer, found in zip(timers, times, strict=True):
            found.append(timer(turn))
        turn += 1
    return times


def medians(times: list[list[float]]) -> list[float]:
    return [statistics.median(found) for found in times]


def sets_for(bytes_a_set: int, device: str) -> int:
    """How many sets of operands rotate, so that a call does not find what it reads in the cache."""
    return min(max(2, -(-CACHE_BYTES // max(bytes_a_set, 1))), 12) if device == "cuda" else 2


def kernel_seconds(runs: Sequence[Run], device: str, *, repeats: int = 15, batch_seconds: float = 2e-3) -> list[float]:
    """Seconds per call of each candidate on the device's clock."""
    if device == "cpu":
        return wall_seconds(runs, repeats=repeats)
    return medians(turns([_kernel_timer(run, batch_seconds) for run in runs], repeats))


def _kernel_timer(run: Run, batch_seconds: float) -> Timer:
    """Of batches of so many calls as take ``batch_seconds``, queued behind a spin kernel."""
    for index in range(3):
        run(index)
    host, whole = host_seconds(run, 4, "cuda", wait=False), host_seconds(run, 4, "cuda")
    calls = min(max(2, round(batch_seconds / whole)), 20)
    return lambda turn: device_seconds(run, calls, first=turn, spin=2 * host * calls + SPIN_SECONDS)


def step_seconds(runs: Sequence[Run], device: str, *, repeats: int = 7, group_seconds: float = 0.03) -> list[float]:
    """Seconds per call of each candidate as a user has it: calls back to back from an idle device, launches included."""
    if device == "cpu":
        return wall_seconds(runs, repeats=repeats)
    return medians(turns([_step_timer(run, group_seconds) for run in runs], repeats))


def _step_timer(run: Run, group_seconds: float) -> Timer:
    for index in range(3):
        run(index)
    calls = min(max(2, round(group_seconds / host_seconds(run, 1, "cuda"))), 50)
    return lambda turn: host_seconds(run, calls, "cuda")


def wall_seconds(runs: Sequence[Run], *, repeats: int = 7, seconds: float = 0.0) -> list[float]:
    """Seconds per call of each candidate on the CPU; ``seconds`` for each at least."""
    for run in runs:
        run(0)
    timers = [lambda turn, run=run: host_seconds(lambda _: run(turn), 1) for run in runs]
    return medians(turns(timers, repeats, seconds * len(runs)))


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Captured:
    """A CUDA graph of ``run(0)``, ``run(1)``, ...: calling it replays them.

    It keeps ``run``, whose memory the graph may use, and the results, so that each call has memory of its own.
    """

    def __init__(self, run: Run, calls: int = 1) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for index in range(3):
                run(index % calls)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.run, self.calls, self.graph = run, calls, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [run(index) for index in range(calls)]

    def __call__(self, index: int = 0) -> None:
        self.graph.replay()

    def seconds(self, turn: int = 0) -> float:
        """Per call of ``run``, of one replay on the device's clock."""
        return device_seconds(self, 1) / self.calls


def graph_seconds(graphs: dict[str, Captured], repeats: int = 15) -> dict[str, float]:
    """Seconds per call in each graph."""
    for graph in graphs.values():
        graph.seconds()
    times = turns([graph.seconds for graph in graphs.values()], repeats)
    return dict(zip(graphs, medians(times), strict=True))


# ---- the ceiling -----------------------------------------------------------------------------------------------------


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy of 1 GiB on a GPU, of 64 MiB on a CPU."""
    source = torch.ones((1 << 30) if device == "cuda" else (64 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(index: int) -> None:
        target.copy_(source)

    if device == "cuda":
        seconds = graph_seconds({"copy": Captured(copy, 4)})["copy"]
    else:
        (seconds,) = wall_seconds([copy], repeats=9)
    return 2 * source.numel() / seconds
