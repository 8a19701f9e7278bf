#!/usr/bin/env python3
"""The study of small models: distillation, pruning, few bits and their combinations, each over several seeds.

    python benchmarks/studies/small_models/study.py images --device cuda --workers 6
    python benchmarks/studies/small_models/study.py sentences --device cuda --workers 4
    python benchmarks/studies/small_models/study.py images --quick --random      seconds, to see that it runs

images: ResNet-20 on CIFAR-10-JPEG, from scratch with and without ResNet-56 as teacher, and from published weights tuned on
these images: pruned by a cubic schedule, trained in few bits with and without its float self as teacher, both. sentences:
MiniLM-L6 on SST-2 likewise, and of three layers. Data from $QUANTRAIN_DATA. Writes small-models-<part>-<device>-<date>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.report import environment, slug, write_json  # noqa: E402

from studies.small_models import images, sentences  # noqa: E402

PARTS = {"images": images.Cases, "sentences": sentences.Cases}


def work(part: str, device: str, quick: bool, random: bool, todo, done, ready) -> None:
    """A process: cases from one queue, results to the other."""
    torch.set_num_threads(1)
    cases = PARTS[part](device, quick, random)
    ready.wait()
    while (item := todo.get()) is not None:
        name, seed = item
        started = time.perf_counter()
        try:
            done.put((name, seed, cases(name, seed) | {"seconds": time.perf_counter() - started}))
        except Exception as error:
            done.put((name, seed, {"failed": f"{type(error).__name__}: {error}"}))


def run(part: str, arguments: argparse.Namespace) -> list[dict]:
    cases = PARTS[part](arguments.device, arguments.quick, arguments.random)
    if part == "images":  # once, and not in each process
        cases.adapted("resnet56"), cases.adapted("resnet20")
    else:
        cases.teacher()
    names = arguments.cases or cases.names()
    context = mp.get_context("spawn")
    todo, done, ready = context.Queue(), context.Queue(), context.Event()
    for seed in range(arguments.seeds):
        for name in names:
            todo.put((name, seed))
    for _ in range(arguments.workers):
        todo.put(None)
    options = (part, arguments.device, arguments.quick, arguments.random, todo, done, ready)
    workers = [context.Process(target=work, args=options) for _ in range(arguments.workers)]
    for worker in workers:
        worker.start()
    ready.set()
    rows = []
    for _ in range(arguments.seeds * len(names)):
        name, seed, found = done.get(timeout=arguments.seconds)
        rows.append({"case": name, "seed": seed, **found})
        print(rows[-1], flush=True)
    for worker in workers:
        worker.join()
    return rows


def summary(rows: list[dict]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        found = [row for row in rows if row["case"] == name and "failed" not in row]
        if not found:
            continue
        accuracies = [row["accuracy"] for row in found]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        held = f", {statistics.fmean(row['bytes'] for row in found):.0f} bytes" if "bytes" in found[0] else ""
        zeros = statistics.fmean(row["zeros"] for row in found)
        lines.append(
            f"{name:32s} {statistics.fmean(accuracies):6.2f} +- {spread:.2f} %, {100 * zeros:.0f} % zeros{held}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", metavar="CASE")
    parser.add_argument("--seconds", type=float, default=3600.0, help="at most between two results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--random", action="store_true", help="random images, without data")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    where = environment(arguments.device)
    rows = run(arguments.part, arguments)
    print("\n".join(summary(rows)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"small-models-{arguments.part}-{slug(where)}-{where['date']}.json"
    write_json(arguments.out / name, {"environment": where, "rows": sorted(rows, key=lambda r: (r["case"], r["seed"]))})


if __name__ == "__main__":
    main()
