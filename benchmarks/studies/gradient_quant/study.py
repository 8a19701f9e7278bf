"""The study of gradient quantizers on ResNet-20 (CIFAR-10-JPEG) and a small GPT (tinyshakespeare), by command.

    python benchmarks/studies/gradient_quant/study.py all                     every part below, then the figures and tables
    python benchmarks/studies/gradient_quant/study.py variance                noise of quantized gradients against the batch's, 2 to 8 bits
    python benchmarks/studies/gradient_quant/study.py accuracy [--epochs N]   QAT against per_tensor, per_sample, householder, 8, 5, 4 bits
    python benchmarks/studies/gradient_quant/study.py step                    time of the captured step, float, QAT and FQT, in bf16
    python benchmarks/studies/gradient_quant/study.py figures                 docs/figures/gradient_quant_*.png from the newest results
    python benchmarks/studies/gradient_quant/study.py tables                  the measured part of docs/gradient_quant.md, likewise

Data are read from $QUANTRAIN_DATA (--data random: none needed). Results are JSON files in --out (benchmarks/results), written
after every row, so that a run stopped by --seconds keeps what it has. On a GPU a training step is one CUDA graph. --quick: a
tiny form of everything, for a CPU. accuracy trains from fresh weights in TF32, whose products keep 11 bits of the 8-bit codes:
its rounding is the same in all recipes and far below theirs; variance is measured in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.parts import draw_part, run_parts  # noqa: E402

PARTS = ("variance", "step", "accuracy")
TEXT_STEPS = 1000
NO_LIMIT = 1e6  # seconds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=["all", *PARTS, "figures", "tables", "worker"], metavar="PART", help="see above")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    add("--data", choices=["quantrain", "random"], default="quantrain", help="$QUANTRAIN_DATA, or random data")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    add("--seconds", type=float, default=NO_LIMIT, help="limit of a part: nothing is begun that would end later")
    add("--quick", action="store_true", help="tiny models' worth of work, to see that it runs")
    add("--recipes", help="accuracy: comma-separated names; float is the model without a recipe")
    add("--seeds", type=int, default=3, help="accuracy")
    add("--epochs", type=int, help="accuracy; default: what --seconds leaves time for, at most 30")
    add("--batch-size", type=int, default=256, help="accuracy: images per step")
    add("--jobs", type=int, default=4, help="accuracy: processes that share the device")
    add(
        "--eager", action="store_true", help="no CUDA graphs; accuracy turns to it where a trial run cannot be captured"
    )
    add("--precision", choices=["fp32", "tf32", "bf16"], default="tf32", help="accuracy")
    add("--no-page", action="store_true", help="all: neither figures nor tables")
    add("--page", type=Path, default=ROOT / "docs" / "gradient_quant.md", help="tables: the page they go into")
    add("--figures", type=Path, default=ROOT / "docs" / "figures", help="figures: their folder")
    add("--run", help=argparse.SUPPRESS)  # worker: JSON of recipe, seed and steps
    return parser.parse_args(arguments)


class Study:
    """What the parts share: the tasks and where results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from common.captured import TrainingStep

        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        TrainingStep.capturing = not options.eager
        self.options, self.quick = options, options.quick

    def image_task(self, batch_size: int, **layout):
        from common import data, tasks

        images = data.random_images() if self.options.data == "random" else data.cifar10_jpeg()
        if self.quick:
            images = data.Images(*(tensor[:: max(1, len(tensor) // 256)] for tensor in asdict(images).values()))
            batch_size = 16
        return tasks.ImageTask(images, batch_size, self.options.device, **layout)

    def text_task(self, batch_size: int, **sizes):
        from common import data, tasks

        text = data.random_text() if self.options.data == "random" else data.tinyshakespeare()
        config = tasks.GPTConfig(**{"layers": 4, "heads": 4, "width": 128, "context": 128, "vocab": 256, **sizes})
        if self.quick:
            config, batch_size = tasks.GPTConfig(layers=1, heads=2, width=32, context=16, vocab=256), 8
        return tasks.TextTask(text, config, batch_size, self.options.device)

    def accuracy_tasks(self) -> Iterator:
        yield self.image_task(self.options.batch_size)
        yield self.text_task(32)

    def saver(self, part: str, settings: dict) -> Callable[[dict], None]:
        """A function that adds a row to the part's result file."""
        from common.report import Results, slug

        results = Results(f"gradient_quant_study {part}", self.options.device, settings=settings)
        results.path = self.options.out / f"gradient-quant-{part}-{slug(results.head)}-{results.head['date']}.json"
        return results.keep


def variance_part(study: Study) -> int:
    from common import data
    from common.captured import set_precision

    from studies.gradient_quant import variance

    set_precision("fp32")
    settings = variance.VarianceSettings()
    if study.quick:
        settings = replace(settings, train_steps=3, batches=2, draws=2, batch_variance_from=4, bits=(4, 8))
    text_steps = settings.train_steps if study.quick else 1500
    weights = data.pretrained_resnet20() if study.options.data == "quantrain" else None
    save = study.saver(
        "variance",
        {**asdict(settings), "text_train_steps": text_steps, "precision": "fp32", "image_batch": 128, "text_batch": 32},
    )
    started, failed = time.monotonic(), 0
    measured = (
        (study.image_task(128), settings, weights),
        (study.text_task(32), replace(settings, lr=1e-3, train_steps=text_steps), None),
    )
    for place, (task, chosen, start) in enumerate(measured, start=1):
        deadline = started + study.options.seconds * place / len(measured)
        failed += variance.measure(task, chosen, start, deadline, save)
    return failed


def step_part(study: Study) -> int:
    import torch
    from common.captured import set_precision

    from studies.gradient_quant import step

    set_precision("bf16")
    save = study.saver("step", {"image_batches": [256, 1024], "precision": "bf16 autocast"})
    deadline = time.monotonic() + study.options.seconds
    recipes = ("float", "qat-w8a8", "fqt-bhq5") if study.quick else step.RECIPES
    fewer = tuple(recipe for recipe in recipes if recipe in ("float", "qat-w8a8", "fqt-psq5", "fqt-bhq5"))
    wide = {"width": 768, "heads": 12, "context": 1024}
    cases: list[tuple] = [
        ("ResNet-20, batch 256", lambda: study.image_task(256), recipes),
        ("GPT, 4 layers, 768 wide, 8 x 1024", lambda: study.text_task(8, **wide), recipes),
        ("ResNet-20, batch 1024", lambda: study.image_task(1024), fewer),
        ("GPT, 4 layers, 128 wide, 64 x 128", lambda: study.text_task(64), fewer),
        ("ResNet-20, batch 256, channels_last", lambda: study.image_task(256, layout=torch.channels_last), fewer),
    ]
    cases = cases[:2] if study.quick else cases
    return sum(step.measure(label, task(), chosen, "bf16", deadline, save) for label, task, chosen in cases)


def accuracy_part(study: Study) -> int:
    from studies.gradient_quant import accuracy

    options = study.options
    recipes = tuple(options.recipes.split(",")) if options.recipes else (*accuracy.RECIPES, "float")
    seeds, jobs, text_steps = options.seeds, options.jobs, TEXT_STEPS
    if study.quick:
        seeds, text_steps, options.epochs = 1, 4, options.epochs or 1
    deadline = time.monotonic() + options.seconds
    steps_per_epoch = study.image_task(options.batch_size).steps_per_epoch  # decodes the archive, once for all workers
    runs = accuracy.runs_of(recipes, seeds)
    epochs = options.epochs or accuracy.EPOCHS[1]
    if not options.epochs and options.seconds < NO_LIMIT:
        trial = trial_run(study, {"resnet20": 300, "gpt": 200}, deadline)
        left = deadline - time.monotonic()
        epochs = accuracy.chosen_epochs(trial, left, len(runs), jobs, steps_per_epoch, text_steps)
    steps = {"resnet20": epochs * steps_per_epoch, "gpt": text_steps}
    settings = {"epochs": epochs, "batch_size": options.batch_size, "precision": options.precision, "seeds": seeds}
    settings |= {"steps": steps, "peak_lr": accuracy.PEAK, "recipes": recipes}
    settings["captured"] = options.device == "cuda" and not options.eager
    save = study.saver("accuracy", settings)
    return accuracy.run_all(runs, lambda run: worker_command(study, run, steps), jobs, deadline, save)


def trial_run(study: Study, steps: dict[str, int], deadline: float) -> dict:
    """A short run with the device for itself, with its wall time; the study goes on eagerly where only that works."""
    from studies.gradient_quant import accuracy

    run = accuracy.Run("fqt-bhq5", 0)
    started = time.monotonic()
    try:
        trial = accuracy.run_worker(worker_command(study, run, steps), min(60.0, deadline - started))
    except RuntimeError as error:
        if study.options.eager:
            raise
        print(f"accuracy: the trial run FAILED captured, going on without CUDA graphs: {error}", flush=True)
        study.options.eager = True
        started = time.monotonic()
        trial = accuracy.run_worker(worker_command(study, run, steps), min(60.0, deadline - started))
    trial["wall"] = time.monotonic() - started
    return trial


def worker_command(study: Study, run, steps: dict[str, int]) -> list[str]:
    """The command of one run's process."""
    options = study.options
    return [
        *(sys.executable, str(Path(__file__).resolve()), "worker", "--device", options.device, "--data", options.data),
        *("--batch-size", str(options.batch_size), "--precision", options.precision),
        *["--quick"] * study.quick,
        *["--eager"] * options.eager,
        *("--run", json.dumps({"recipe": run.recipe, "seed": run.seed, "steps": steps})),
    ]


def worker_part(study: Study) -> int:
    from studies.gradient_quant import accuracy

    run = json.loads(study.options.run)
    accuracy.worker(study.accuracy_tasks, run["recipe"], run["seed"], run["steps"], study.options.precision)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; one that fails prints its traceback and does not stop the others. The status is how many failed."""
    options = parse(arguments)
    if options.part in ("figures", "tables"):
        return draw_part("gradient_quant", options)
    study = Study(options)
    if options.part == "worker":
        return worker_part(study)
    parts = {"variance": variance_part, "step": step_part, "accuracy": accuracy_part}
    chosen = PARTS if options.part == "all" else (options.part,)
    failed = run_parts("gradient_quant_study", {part: lambda run=parts[part]: run(study) for part in chosen})
    if options.part == "all" and not options.no_page:
        draw_part("gradient_quant", options)
    return failed


if __name__ == "__main__":
    sys.exit(main())
