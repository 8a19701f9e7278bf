#!/usr/bin/env python3
"""Draws cases for every operator and holds the results against the oracles.

    python tests/fuzz/run.py [--device cuda] [--seconds N | --cases N] [--seed S] [--op NAME] [--case N] [--workers N]

Prints one line for each failure, which ends in the command that repeats it, then cases and mismatches of each operator
and one line of totals. Cases run in child processes, so that a crash or a hang is a failure like any other: the case
that was running is known, and the rest goes on.
"""

import argparse
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import draw
import hostile
import known
import modules
import torch

import quantrain  # noqa: F401

HANG = 120  # seconds after which a case is taken to hang
SLICE = 0.05  # seconds of one operator's turn
PRINTED = 5  # failures of an operator that one worker prints; all are counted
CRASHES = 25  # of a worker, after which it is given up
MEMORY = (
    3 << 30
)  # bytes that a worker may take beyond its start: a size that was not checked is an error, and the machine goes on
RESTART = 3  # exit status of a worker whose device is lost

# What workers and their parent share, for each worker and operator.
CASES, WRONG, KNOWN, CRASHED, NEXT, FIELDS = 0, 1, 2, 3, 4, 5


class Board:
    """Counts in memory that outlives a crash, and what each worker is doing."""

    def __init__(self, workers, names):
        self.names = names
        self.width = len(names) * FIELDS + 3
        self.numbers = memoryview(mmap.mmap(-1, 8 * self.width * workers)).cast("q")
        for worker in range(workers):
            self.numbers[worker * self.width] = -1

    def at(self, worker, name, field):
        return worker * self.width + 3 + self.names.index(name) * FIELDS + field

    def add(self, worker, name, field):
        self.numbers[self.at(worker, name, field)] += 1

    def total(self, name, field):
        return sum(self.numbers[self.at(worker, name, field)] for worker in range(len(self.numbers) // self.width))

    def start(self, worker, name, case):
        place = worker * self.width
        self.numbers[place], self.numbers[place + 1] = -1 if name is None else self.names.index(name), case
        self.numbers[place + 2] = int(time.monotonic())

    def running(self, worker):
        """(name or None, case, when it began)."""
        index, case, began = self.numbers[worker * self.width : worker * self.width + 3]
        return None if index < 0 else self.names[index], case, began


def repeat(name, seed, case, device):
    return f"python tests/fuzz/run.py --op {name} --seed {seed} --case {case}" + (
        "" if device == "cpu" else f" --device {device}"
    )


def report(name, message, seed, case, device, notes=None):
    texts = {key: draw.describe(n) if isinstance(n, torch.Tensor) else str(n) for key, n in (notes or {}).items()}
    told = "".join(f", {key} {text}" for key, text in texts.items())
    line = " ".join(f"{message}{told}".split())
    print(f"FAILED {name}: {line[:900]} | {repeat(name, seed, case, device)}", flush=True)


def run_case(name, seed, case, device):
    """None, or (message, Draw) of what went wrong."""
    torch.set_num_threads(3 if case // 8 % 4 == 3 else 1)
    d = draw.Draw(name, seed, case, device)
    try:
        if name.startswith("hostile."):
            hostile.run(name.removeprefix("hostile."), d)
        else:
            draw.DRAWN[name][0](d)
    except draw.Mismatch as mismatch:
        return str(mismatch), d
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {text[0]}", d
    return None


class Worker:
    """The loop of one child process."""

    def __init__(self, board, number, arguments, names):
        self.board, self.number, self.arguments, self.names = board, number, arguments, names
        self.printed = dict.fromkeys(names, 0)

    def one(self, name, case):
        arguments = self.arguments
        self.board.start(self.number, name, case)
        failure = run_case(name, arguments.seed, case, arguments.device)
        self.board.add(self.number, name, CASES)
        if failure is None:
            return
        message, d = failure
        if known.expected(name, arguments.device, d.tags, message):
            self.board.add(self.number, name, KNOWN)
            return
        self.board.add(self.number, name, WRONG)
        self.printed[name] += 1
        if self.printed[name] <= PRINTED:
            report(name, message, arguments.seed, case, arguments.device, d.notes)
        if "CUDA error" in message:
            os._exit(RESTART)  # nothing works any more in this process

    def turn(self, name, until):
        """Cases of one operator for a while; False where it has none left."""
        place = self.board.at(self.number, name, NEXT)
        while True:
            index = self.board.numbers[place]
            if self.arguments.case is not None:
                if index or self.number:
                    return False
                case = self.arguments.case
            else:
                case = index * self.arguments.workers + self.number
                if self.arguments.cases is not None and case >= self.arguments.each:
                    return False
            self.board.numbers[place] += 1
            self.one(name, case)
            if time.monotonic() > until:
                return True

    def run(self):
        # The oracles of products are float32 and better: no TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        end = time.monotonic() + 1e9 if self.arguments.seconds is None else self.arguments.end
        live = list(self.names)
        first = self.number * 7 % max(len(live), 1)  # workers start at different operators
        live = live[first:] + live[:first]
        while live and time.monotonic() < end:
            for name in list(live):
                if not self.turn(name, min(time.monotonic() + SLICE, end)):
                    live.remove(name)
                if time.monotonic() > end:
                    break
        self.board.start(self.number, None, 0)


def spawn(worker):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if worker.arguments.device == "cpu":
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        worker.run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def supervise(board, arguments, names):
    """Runs the workers to their end; the number of those that were given up."""
    children = {
        spawn(worker): worker for worker in (Worker(board, n, arguments, names) for n in range(arguments.workers))
    }
    crashes, given_up = [0] * arguments.workers, 0
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.02)
            for child, worker in children.items():
                name, _, began = board.running(worker.number)
                if name is not None and time.monotonic() - began > HANG:
                    os.kill(child, signal.SIGKILL)
            continue
        worker = children.pop(pid)
        if status == 0:
            continue
        name, case, began = board.running(worker.number)
        restart = os.WIFEXITED(status) and os.WEXITSTATUS(status) == RESTART
        if name is not None and not restart:
            hung = os.WIFSIGNALED(status) and time.monotonic() - began > HANG - 1
            how = f"hangs for {HANG} s" if hung else _how(status)
            board.add(worker.number, name, CASES)
            board.add(worker.number, name, CRASHED)
            if known.expected(name, arguments.device, set(), how):
                board.add(worker.number, name, KNOWN)
            else:
                board.add(worker.number, name, WRONG)
                report(name, how, arguments.seed, case, arguments.device)
        crashes[worker.number] += 1
        if name is None or crashes[worker.number] > CRASHES or arguments.case is not None:
            given_up += arguments.case is None
            continue
        children[spawn(worker)] = worker
    return given_up


def _how(status):
    if os.WIFSIGNALED(status):
        return f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the process ended with status {os.WEXITSTATUS(status)}"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, help="how long to draw (default 60)")
    parser.add_argument("--cases", type=int, help="how many cases to draw instead, shared by all operators")
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--op", action="append", help="only this one, or those that begin with it; may be repeated")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--list", action="store_true", help="print the names that --op takes")
    return parser.parse_args(argv)


def select(wanted):
    names = [*draw.DRAWN, *(f"hostile.{name}" for name in hostile.operators())]
    if not wanted:
        return names
    chosen = [n for n in names if any(n == w or n not in wanted and w not in names and n.startswith(w) for w in wanted)]
    if not chosen:
        sys.exit(f"run.py: expected --op to name one of {', '.join(names)}, got {', '.join(wanted)}")
    return chosen


def main(argv=None):
    arguments = parse(argv)
    modules.load()
    names = select(arguments.op)
    left_out = {} if arguments.case is not None else {name: known.crash(name) for name in names if known.crash(name)}
    names = [name for name in names if name not in left_out]
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        sys.exit(f"run.py: left out, {reasons}; --case runs one all the same")
    if arguments.list:
        print("\n".join(names))
        return 0
    if arguments.cases is None and arguments.seconds is None and arguments.case is None:
        arguments.seconds = 60.0
    arguments.each = -(-(arguments.cases or 0) // len(names))
    began = time.monotonic()
    arguments.end = began + (arguments.seconds or 0)
    print(
        f"fuzz: seed {arguments.seed}, {arguments.device}, {arguments.workers} workers, torch {torch.__version__}",
        flush=True,
    )
    board = Board(arguments.workers, names)
    given_up = supervise(board, arguments, names)
    seconds = time.monotonic() - began
    print(f"{'operator':44s} {'cases':>8s} {'mismatches':>10s} {'crashes':>8s} {'known':>6s}")
    for name in names:
        cases, wrong, crashed, expected = (board.total(name, field) for field in (CASES, WRONG, CRASHED, KNOWN))
        print(f"{name:44s} {cases:8d} {wrong:10d} {crashed:8d} {expected:6d}")
    for name, reason in left_out.items():
        print(f"{name:44s} left out, known to crash: {reason}")
    cases, wrong, crashed, expected = (sum(board.total(n, f) for n in names) for f in (CASES, WRONG, CRASHED, KNOWN))
    never = [name for name in names if board.total(name, CASES) == 0]
    print(
        f"fuzz: {cases} cases of {len(names)} tests in {seconds:.0f} s on {arguments.device}, seed {arguments.seed}: "
        f"{wrong} mismatches, {crashed} crashes, {expected} of known faults"
        + (f", {given_up} workers given up" if given_up else "")
        + (f", NO CASE of {', '.join(never)}" if never else "")
    )
    return 1 if wrong or given_up or never else 0


if __name__ == "__main__":
    sys.exit(main())
