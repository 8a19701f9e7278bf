"""What a fine-tuning job is asked to do, and the defaults that go with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from quantrain import Recipe
from quantrain.finetune.folder import check_name
from quantrain.finetune.results import write_json
from quantrain.finetune.trainer import TrainSettings

IMAGE_RECIPES = ("qat-w8a8", "qat-w4a4", "ptq-w8a8")
TEXT_RECIPES = ("qat-w8a8", "qat-w4a8")
LM_RECIPES = ("qlora",)

# What may differ between a run and the one that resumes it: where and how fast it runs, and which recipes it adds (a
# recipe that is done is compared itself).
_FREE_TO_CHANGE = {"recipes", "overrides", "name", "runs", "device", "threads", "tensorboard"}


@dataclass(frozen=True)
class JobConfig:
    """One fine-tuning job, as the command line states it.

    Attributes:
        job: ``"images"``, ``"sst2"`` or ``"lm"``.
        model: ``"resnet20"``, ``"mlp"``, ``"minilm"`` or ``"module:function"``; for lm a folder, or a name that
            ``lm.models`` knows.
        data: ``"fashion-mnist"``, ``"digits"``, ``"sst2"``, ``"tinyshakespeare"``, ``"wikitext-2"``, a path, or
            ``"module:function"``.
        recipes: Names of recipes or JSON files with one, run in this order.
        overrides: Settings that every recipe gets, such as ``"weight.bits=4"``.
        skip: Patterns of layers that stay in float32 under every recipe.
        name: The run's name; its files go to ``runs / name``.
        runs: The folder of all runs.
        baseline: A float32 checkpoint to start from; None trains one.
        epochs: Of the float32 training; for lm, whose model is trained already, of the fine-tuning.
        lr: Its largest learning rate; None, for lm alone, takes the recipe's default.
        qat_epochs: Of the fine-tuning of a recipe; None takes the recipe's default.
        qat_lr: Its largest learning rate; None takes the recipe's default.
        batch_size: Samples per training step.
        calibration_batches: Training batches that the observers see.
        holdout: Test on this many training samples, which are then not trained on, instead of the test set.
        image_size: Images in subfolders are resized to this many pixels either way; None takes them as they are.
        train_rows: Use only this many training samples; None uses all.
        test_rows: Use only this many test samples; None uses all.
        max_steps: Stop each training stage after this many steps of its schedule; None takes them all.
        precision: ``"float32"`` or ``"bf16"``: autocast in training, and for lm everywhere, with a frozen base model
            in bfloat16. The other jobs always evaluate in float32.
        device: ``"cpu"``, ``"cuda"``, ...
        threads: CPU threads; None leaves PyTorch's number.
        seed: Seeds the weights and the order of the data.
        quick: Whether the defaults are the short ones.
        tensorboard: Whether to write TensorBoard events too.
        optimizer: A name of ``trainer.OPTIMIZERS``; None takes the job's.
        accumulate: Parts that a step's samples are split into, for less memory. For lm alone, as are the next two.
        sequence_length: Tokens of a training sequence; None takes the job's default.
        checkpointing: Whether activations are computed again in the backward pass; None: on CUDA.
        prune: The share of the weights that every recipe prunes on the way, in [0, 1); None leaves it to the recipes.
        schedule: ``"cubic"`` or ``"one-shot"``: how ``prune`` gets there.
        distill: Whether recipes also learn the answers of the float32 model, or of ``teacher``.
        teacher: A larger model to learn from, in the baseline's training too: ``"resnet56"``, ``"module:function"``; for
            lm what ``model`` may be. None: the float32 model itself.
        teacher_weights: Its checkpoint: safetensors, or a file of torch.save with a state dict.
    """

    job: str
    model: str
    data: str
    recipes: tuple[str, ...]
    name: str
    overrides: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    runs: Path = Path("runs")
    baseline: Path | None = None
    epochs: float = 2.5
    lr: float | None = 0.2
    qat_epochs: float | None = None
    qat_lr: float | None = None
    batch_size: int = 128
    calibration_batches: int = 8
    holdout: int | None = None
    image_size: int | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    max_steps: int | None = None
    precision: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    quick: bool = False
    tensorboard: bool = False
    optimizer: str | None = None
    accumulate: int = 1
    sequence_length: int | None = None
    checkpointing: bool | None = None
    prune: float | None = None
    schedule: str = "cubic"
    distill: bool = False
    teacher: str | None = None
    teacher_weights: Path | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "--name")
        self._check_options()
        if self.runs.exists() and not self.runs.is_dir():
            raise ValueError(f"--runs: expected a folder, got the file {self.runs}")

    def _check_options(self) -> None:
        """Refuse what the job would not look at."""
        if self.prune is not None and not 0 <= self.prune < 1:
            raise ValueError(f"--prune: expected a share in [0, 1), got {self.prune}")
        if self.teacher is not None and not self.distill:
            raise ValueError(f"--teacher: expected it with --distill, got {self.teacher!r} without")
        if self.teacher_weights is not None and self.teacher is None:
            raise ValueError(f"--teacher-weights: expected them with --teacher, got {self.teacher_weights} without")
        if self.job == "lm":
            refused = {"image-size": self.image_size, "baseline": self.baseline}
            others = "images or sst2"
        else:
            refused = {"sequence-length": self.sequence_length, "checkpointing": self.checkpointing}
            refused["accumulate"] = None if self.accumulate == 1 else self.accumulate
            others = "lm"
        for option, value in refused.items():
            if value is not None:
                raise ValueError(f"--{option}: expected it with --job {others} alone, got --job {self.job}")

    @property
    def folder(self) -> Path:
        """The folder of this run's files."""
        return self.runs / self.name

    def baseline_settings(self) -> TrainSettings:
        """How the float32 baseline is trained."""
        return self._settings(self.epochs, self.lr)

    def recipe_settings(self, recipe) -> TrainSettings:
        """How a model prepared with ``recipe`` is fine-tuned: fewer bits get more steps and a larger learning rate."""
        if self.job == "lm":
            lr = _ADAPTER_LR if trains_adapter(recipe) else _MODEL_LR
            return self._settings(self.qat_epochs or self.epochs, self.qat_lr or self.lr or lr)
        few_bits = min((spec.bits for spec in (recipe.weight, recipe.input) if spec is not None), default=32) <= 4
        epochs, lr = _RECIPE_DEFAULTS[self.job, few_bits]
        if self.quick:
            epochs *= _QUICK_FACTOR[self.job]
        return self._settings(self.qat_epochs or epochs, self.qat_lr or lr)

    def _settings(self, epochs: float, lr: float) -> TrainSettings:
        defaults = _TRAIN_DEFAULTS[self.job]
        return TrainSettings(
            epochs=epochs,
            lr=lr,
            batch_size=self.batch_size,
            precision=self.precision,
            seed=self.seed,
            max_steps=self.max_steps,
            accumulate=self.accumulate,
            **{**defaults, "optimizer": self.optimizer or defaults["optimizer"]},
        )

    def to_json(self) -> dict:
        """The fields, as JSON takes them."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


# (job, some tensor has 4 bits or fewer) -> (epochs, largest learning rate) of the fine-tuning after calibration. For images
# chosen on held-out training images over four seeds: benchmarks/results/finetune-settings-h200-2026-11-22.txt.
_RECIPE_DEFAULTS = {
    ("images", False): (0.25, 0.005),
    ("images", True): (0.5, 0.005),
    ("sst2", False): (0.25, 2e-5),
    ("sst2", True): (0.5, 3e-5),
}
_QUICK_FACTOR = {"images": 0.2, "sst2": 1.0}
_ADAPTER_LR, _MODEL_LR = 2e-4, 2e-5  # of adapters: arXiv:2305.14314, table 9
_TRAIN_DEFAULTS = {
    "images": {"optimizer": "sgd", "weight_decay": 5e-4, "warmup": 0.25},
    "sst2": {"optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.1},
    # norm of gradients and warm-up as in QLoRA's published scripts; adapters do not decay, having no parameter "weight"
    "lm": {"optimizer": "adamw8bit", "weight_decay": 0.01, "warmup": 0.03, "max_norm": 0.3},
}


def trains_adapter(recipe: Recipe) -> bool:
    """Whether a model under ``recipe`` keeps its weights and trains an adapter beside them."""
    return getattr(recipe.scheme, "lora_rank", 0) > 0


def check_config(config: JobConfig, recipes: Mapping[str, Recipe]) -> None:
    """Make sure that the run's config.json, where there is one, asks for the same, and means the same by the recipes'
    names.

    Raises:
        ValueError: An earlier run of this name was asked for something else; nothing is changed.
    """
    path = config.folder / "config.json"
    if not path.is_file():
        return
    wanted = json.loads(json.dumps(config.to_json()))
    found = _read(path)
    for field in fields(config):
        key = field.name
        default = [] if field.default == () else None if field.default is MISSING else field.default
        before = found.get(
            key, default
        )  # an older run's file lacks what was added since, which it did as the default says
        if key not in _FREE_TO_CHANGE and before != wanted[key]:
            raise ValueError(
                f"{path}: expected {key} = {before!r} as in the run that is resumed, got {wanted[key]!r}; "
                "take another --name, or --restart to begin again"
            )
    for name, text in found.get("recipe_settings", {}).items():
        if name in recipes and Recipe.from_json(text).to_json() != recipes[name].to_json():
            raise ValueError(
                f"{path}: expected the recipe {name} as in the run that is resumed, got one of other settings; "
                "take another --name, or --restart to begin again"
            )


def record_config(config: JobConfig, recipes: Mapping[str, Recipe]) -> None:
    """Write the run's config.json: what it was asked for, and what each recipe's name means."""
    path = config.folder / "config.json"
    earlier = _read(path).get("recipe_settings", {}) if path.is_file() else {}
    settings = {**earlier, **{name: recipe.to_json() for name, recipe in recipes.items()}}
    write_json(path, {**config.to_json(), "recipes": list(recipes), "recipe_settings": settings})


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected the JSON of an earlier run, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected the JSON of an earlier run, got {type(found).__name__}")
    return found
