"""The flags of train_gpt.py; examples/cpp/gpt_options.h has the same ones with the same defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpt import PRESETS, GPTConfig

BATCH = {"small": 32, "gpt2": 8}
LEARNING_RATE = {"small": 1e-3, "gpt2": 6e-4}
# Checkpoints hold these: another value is another training, and resuming it is refused.
SETTINGS = (
    *("batch_size", "accumulate", "steps", "lr", "min_lr", "warmup", "weight_decay"),
    *("clip", "dropout", "precision", "seed", "text_bytes"),
)
LEAST = {
    **{"batch_size": 1, "accumulate": 1, "steps": 1, "max_steps": 0, "warmup": 0, "eval_every": 0, "eval_batches": 1},
    **{"save_every": 0, "calibration_batches": 1, "benchmark": 0, "growth_interval": 1, "threads": 0, "seed": 0},
    **{"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0, "clip": 0.0},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"expected arguments of --help, got another: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="train_gpt", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="small", help="small (0.8 M parameters) or gpt2 (124 M)")
    for name in ("layers", "heads", "width", "context", "vocab"):
        model.add_argument(f"--{name}", type=int, help=f"{name} in place of the preset's")
    model.add_argument("--dropout", type=float, default=0.0)
    model.add_argument(
        "--recipe",
        default="",
        help="quantization-aware training of every linear layer, e.g. qat-w8a8, or int8-training for integer matrix "
        "products; the embeddings and the output head, which is tied to one, stay in floating point",
    )
    model.add_argument("--calibration-batches", type=int, default=4, help="batches that set the recipe's ranges")
    add("--data", type=Path, help="text file (default: $QUANTRAIN_DATA/tinyshakespeare/input.txt)")
    add("--out", type=Path, default=Path("runs/gpt"), help="folder of checkpoint, metrics and TensorBoard events")
    add("--init", type=Path, help="start from this checkpoint's weights; either language's")
    add("--restart", action="store_true", help="begin again instead of resuming the run in --out")
    add("--precision", default="fp32", help="fp32, fp16 (with loss scaling) or bf16")
    add("--tf32", action="store_true", help="float32 products in TF32 on a GPU")
    add("--init-scale", type=float, default=65536.0, help="first loss scale")
    add("--growth-interval", type=int, default=2000, help="good steps in a row before the scale doubles")
    add("--scaler", default="quantrain", help="quantrain, or torch for torch.amp.GradScaler and clip_grad_norm_")
    add("--batch-size", type=int, help="sequences of a forward pass, over all ranks (small 32, gpt2 8)")
    add("--accumulate", type=int, default=1, help="forward passes a step")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--lr", type=float, help="largest learning rate (small 1e-3, gpt2 6e-4)")
    add("--min-lr", type=float, help="learning rate at the end (a tenth of --lr)")
    add("--warmup", type=int, default=100, help="steps of linear warm-up, before the cosine")
    add("--weight-decay", type=float, default=0.1, help="on weights of two or more dimensions")
    add("--steps", type=int, default=2000, help="length of the schedule")
    add("--max-steps", type=int, default=0, help="stop after this step of the schedule; 0: at its end")
    add("--eval-every", type=int, default=200, help="steps; 0: at the end only")
    add("--eval-batches", type=int, default=20)
    add("--save-every", type=int, default=200, help="steps between checkpoints; 0: at the end only")
    add("--no-tensorboard", action="store_true", help="no TensorBoard events")
    add("--benchmark", type=int, default=0, help="time this many steps, print one JSON line, write nothing")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    return parser


def _one_of(flag: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"expected {flag} {' or '.join(names)}, got '{value}'")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked, with defaults that depend on the preset filled in; ``config`` is the model's.

    Raises:
        ValueError: a flag or a value outside its rule.
    """
    options = _parser().parse_args(arguments)
    _one_of("--preset", options.preset, tuple(PRESETS))
    _one_of("--precision", options.precision, ("fp32", "fp16", "bf16"))
    _one_of("--scaler", options.scaler, ("quantrain", "torch"))
    _one_of("--device", options.device.split(":")[0], ("cpu", "cuda"))
    if options.batch_size is None:
        options.batch_size = BATCH[options.preset]
    if options.lr is None:
        options.lr = LEARNING_RATE[options.preset]
    if options.min_lr is None:
        options.min_lr = options.lr / 10
    for name, least in LEAST.items():
        value = getattr(options, name)
        if not value >= least:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least {least:g}, got {value:g}")
    if not options.init_scale > 0:
        raise ValueError(f"expected --init-scale above 0, got {options.init_scale:g}")
    given = {name: getattr(options, name) for name in PRESETS[options.preset].sizes()}
    sizes = {
        name: size if given[name] is None else given[name] for name, size in PRESETS[options.preset].sizes().items()
    }
    options.config = GPTConfig(**sizes, dropout=options.dropout)
    return options
