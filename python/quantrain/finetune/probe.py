"""``quantrain probe``: a GradientProbe over training batches of a run of ``quantrain finetune``."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import quantrain
from quantrain import nn as qnn
from quantrain.finetune.base_job import find_device
from quantrain.finetune.config import JobConfig
from quantrain.finetune.data import calibration_batches
from quantrain.finetune.folder import BASELINE
from quantrain.finetune.job import load_data, new_model
from quantrain.finetune.models import names_code
from quantrain.finetune.trainer import to_device
from quantrain.nn.gradient_probe import DEFAULT_QUANTIZERS


@dataclass(frozen=True)
class ProbeSettings:
    """What ``quantrain probe`` is asked for.

    Attributes:
        target: A run's folder, or a checkpoint in one.
        recipe: The recipe whose checkpoint is taken; where the run has none of it, the float32 model is prepared with
            it.
        quantizers: As GradientProbe takes them; empty: the recipe's grad_input, else GradientProbe's own.
        batches: Training batches.
        draws: Per gradient and quantizer.
        fraction: What quantization may add to the batch variance.
        model: The ``module:function`` of the run's model; needed where its config.json names one, since that is code
            that runs.
        data: The ``module:function`` of the run's data, likewise.
        network: Repeats per layer and quantizer of measure_network on the last batch; 0 leaves it out.
        batch_size: Samples per batch; None takes the run's.
        out: The folder of probe.json and probe.png; None: ``probe`` in the run's folder.
        device: ``"cpu"``, ``"cuda"``, ...
        threads: CPU threads; None leaves PyTorch's number.
        seed: Of the choice of batches and of the draws.
    """

    target: Path
    recipe: str | None = None
    quantizers: tuple[str, ...] = ()
    batches: int = 8
    draws: int = 8
    fraction: float = 0.1
    model: str | None = None
    data: str | None = None
    network: int = 0
    batch_size: int | None = None
    out: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0


def read_config(folder: Path) -> JobConfig:
    """The run's config.json.

    Raises:
        FileNotFoundError: The folder is no run's.
        ValueError: The file is not what a run writes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the config.json of a run of quantrain finetune, got no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: found[field.name] for field in fields(JobConfig) if field.name in found}
        known |= {key: tuple(known.get(key, ())) for key in ("recipes", "overrides", "skip")}
        config = JobConfig(**{**known, "runs": Path(known["runs"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the config.json of a run of quantrain finetune, got {error!r}") from error
    return replace(config, baseline=None)


def check_named(settings: ProbeSettings, config: JobConfig) -> None:
    """Make sure that code which the run's config.json names is named by the user too: a folder alone makes nothing run.

    Raises:
        ValueError: It is not, or the user names something else than the run.
    """
    for option in ("model", "data"):
        found, named = getattr(config, option), getattr(settings, option)
        if named is None and names_code(found):
            raise ValueError(
                f"--{option}: expected it to repeat {found!r}, code that the run's config.json names and that probe "
                "would run, got none"
            )
        if named is not None and named != found:
            raise ValueError(f"--{option}: expected {found!r} as in the run's config.json, got {named!r}")


def find_checkpoint(target: Path, recipe: str | None, config: JobConfig) -> Path:
    """The checkpoint that ``target`` means: itself, or in a run's folder the recipe's trained or prepared one.

    Without ``recipe`` the first of the run's recipes counts that has one; float32 is the last resort.

    Raises:
        FileNotFoundError: There is none.
    """
    if target.is_file():
        return target
    stages = (recipe,) if recipe is not None else config.recipes
    names = [f"{stage}.{form}.safetensors" for stage in stages for form in ("trained", "prepared")]
    for name in [*names, f"{BASELINE}.safetensors"]:
        if (target / name).is_file():
            return target / name
    raise FileNotFoundError(f"{target}: expected one of {', '.join(names)} or {BASELINE}.safetensors, got none")


def checkpoint_recipe(path: Path) -> quantrain.Recipe | None:
    """The recipe in a checkpoint's metadata; None for a float32 one.

    Raises:
        ValueError: A converted checkpoint, or no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a checkpoint, got {error}") from error
    if metadata.get("converted") == "true":
        raise ValueError(f"{path}: expected a trained, prepared or float32 checkpoint, got a converted one")
    return quantrain.Recipe.from_json(metadata["recipe"]) if metadata.get("recipe") else None


def load_probed_model(settings: ProbeSettings, config: JobConfig, data) -> tuple[nn.Module, Path]:
    """The run's model, its ranges fixed and its gradients not quantized, and the checkpoint it comes from."""
    path = find_checkpoint(settings.target, settings.recipe, config)
    model, recipe = new_model(config, data), checkpoint_recipe(path)
    if recipe is not None:
        model = qnn.prepare(model, recipe, skip=config.skip)
    qnn.load_checkpoint(path, model)
    model = model.to(find_device(settings.device))
    if recipe is None and settings.recipe is not None:
        model = qnn.prepare(model, settings.recipe, skip=config.skip)
        batches = calibration_batches(data, config.batch_size, config.calibration_batches, config.seed)
        moved = [to_device(batch, find_device(settings.device)) for batch in batches]
        qnn.calibrate(model, moved, forward=lambda module, batch: module(*batch[0]))
    qnn.enable_observer(model, False)
    qnn.enable_gradient_quant(model, False)
    return model, path


def default_quantizers(model: nn.Module) -> list:
    """How the model's recipe quantizes gradients, else the probe's own quantizers."""
    if not hasattr(model, "quantization_summary"):
        return list(DEFAULT_QUANTIZERS)
    recipe = model.quantization_summary.recipe
    return qnn.handler_of(recipe).gradient_specs(recipe) or list(DEFAULT_QUANTIZERS)


def run_probe(settings: ProbeSettings) -> qnn.GradientProbe:
    """Probe the run's model, print the table, and write probe.json and probe.png.

    Raises:
        FileNotFoundError: No run, checkpoint or data where the settings say.
        ValueError: A checkpoint, recipe, quantizer or number outside its rule, or a model that the user did not name.
    """
    folder = settings.target if settings.target.is_dir() else settings.target.parent
    config = read_config(folder)
    check_named(settings, config)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = load_data(config)
    model, path = load_probed_model(settings, config, data)
    quantizers = settings.quantizers or default_quantizers(model)
    probe = qnn.GradientProbe(model, quantizers, draws=settings.draws, fraction=settings.fraction, seed=settings.seed)
    size = settings.batch_size or config.batch_size
    _measure(probe, model, config, calibration_batches(data, size, settings.batches, settings.seed + 1), settings)
    out = settings.out or folder / "probe"
    out.mkdir(parents=True, exist_ok=True)
    print(f"{path}: {settings.batches} batches of {size}, {settings.draws} draws\n{probe.table}")
    (out / "probe.json").write_text(probe.to_json() + "\n", encoding="utf-8")
    probe.plot(out / "probe.png")
    print(f"written: {out / 'probe.json'}, {out / 'probe.png'}")
    return probe


def _measure(probe: qnn.GradientProbe, model: nn.Module, config: JobConfig, batches, settings: ProbeSettings) -> None:
    device = find_device(settings.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def loss_of(batch) -> torch.Tensor:
        inputs, labels = batch
        with autocast:
            return functional.cross_entropy(model(*inputs).float(), labels)

    model.train()
    with probe:
        for batch in batches:
            moved = to_device(batch, device)
            model.zero_grad(set_to_none=True)
            loss_of(moved).backward()
            probe.end_batch()
        if settings.network:
            probe.measure_network(lambda: loss_of(moved), settings.network)
