"""Does training in int8 reach what bfloat16 and float32 reach? A GPT on two texts and MiniLM-L6 on SST-2, by one command.

    python benchmarks/studies/int8_training/study.py all            every part below, then the figures and tables
    python benchmarks/studies/int8_training/study.py curves         a GPT on tinyshakespeare and wikitext-2, bf16 and int8-training
    python benchmarks/studies/int8_training/study.py finetune       MiniLM-L6 on SST-2 by the job of quantrain finetune, float32 and int8-training
    python benchmarks/studies/int8_training/study.py figures        docs/figures/int8_*.png from the newest results, those of bench_int8 too
    python benchmarks/studies/int8_training/study.py tables         the measured parts of docs/measured/int8.md, likewise

Data are read from $QUANTRAIN_DATA (--data random: curves needs none). Results are JSON files in --out (benchmarks/results), written
after every row, so that a run stopped by --seconds keeps what it has. All three products of every layer are int8 here, also where
"auto" would choose floating point. On a GPU a GPT's training step is one CUDA graph. --quick: a tiny form, for a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.parts import draw_part, run_parts  # noqa: E402

PARTS = ("curves", "finetune")
NO_LIMIT = 1e6  # seconds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=["all", *PARTS, "figures", "tables"], metavar="PART", help="see above")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    add("--data", choices=["quantrain", "random"], default="quantrain", help="curves: $QUANTRAIN_DATA, or random bytes")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    add("--seconds", type=float, default=NO_LIMIT, help="limit of a part: nothing is begun that would end later")
    add("--quick", action="store_true", help="tiny models' worth of work, to see that it runs")
    add("--seeds", type=int, help="default: 3 on a GPU, 1 on a CPU")
    add("--steps", type=int, help="curves: steps of a run")
    add("--eager", action="store_true", help="curves: no CUDA graphs")
    add("--no-page", action="store_true", help="all: neither figures nor tables")
    add("--page", type=Path, default=ROOT / "docs" / "measured" / "int8.md", help="tables: the page they go into")
    add("--figures", type=Path, default=ROOT / "docs" / "figures", help="figures: their folder")
    options = parser.parse_args(arguments)
    if options.part not in ("figures", "tables"):
        import torch

        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def saver(options: argparse.Namespace, part: str, settings: dict) -> Callable[[dict], None]:
    """A function that adds a row to the part's result file."""
    from common.report import Results, slug

    results = Results(f"int8_training_study {part}", options.device, settings=settings)
    results.path = options.out / f"int8-{part}-{slug(results.head)}-{results.head['date']}.json"
    return results.keep


def chosen(options: argparse.Namespace, module):
    """The part's settings: those of the device or the tiny ones, changed as the flags say."""
    settings = module.QUICK if options.quick else module.GPU if options.device == "cuda" else module.CPU
    return replace(settings, seeds=options.seeds) if options.seeds else settings


def curves_part(options: argparse.Namespace) -> int:
    from common.captured import TrainingStep

    from studies.int8_training import curves

    TrainingStep.capturing = not options.eager
    settings = chosen(options, curves)
    settings = replace(settings, steps=options.steps) if options.steps else settings
    save = saver(options, "curves", settings.facts())
    deadline = time.monotonic() + options.seconds
    return curves.run(settings, options.device, options.data == "random", deadline, save)


def finetune_part(options: argparse.Namespace) -> int:
    from studies.int8_training import finetune

    settings = chosen(options, finetune)
    save = saver(options, "finetune", {**asdict(settings), "pretrained_weights": finetune.stored_type()})
    return finetune.run(settings, options.device, time.monotonic() + options.seconds, save)


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; one that fails prints its traceback and does not stop the others. The status is how many failed."""
    options = parse(arguments)
    if options.part in ("figures", "tables"):
        return draw_part("int8_training", options)
    parts = {"curves": curves_part, "finetune": finetune_part}
    chosen_parts = PARTS if options.part == "all" else (options.part,)
    failed = run_parts("int8_training_study", {part: lambda run=parts[part]: run(options) for part in chosen_parts})
    if options.part == "all" and not options.no_page:
        draw_part("int8_training", options)
    return failed


if __name__ == "__main__":
    sys.exit(main())
