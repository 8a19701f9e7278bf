"""The job that classifies: a float32 baseline, then each recipe prepared, calibrated, fine-tuned, converted and
evaluated."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from quantrain import nn as qnn
from quantrain.finetune import memory, minilm, plots
from quantrain.finetune.base_job import BaseJob
from quantrain.finetune.config import JobConfig
from quantrain.finetune.data import Batch, calibration_batches, load_image_data
from quantrain.finetune.distillation import Distilled
from quantrain.finetune.folder import BASELINE
from quantrain.finetune.grids import input_grids, weight_grids
from quantrain.finetune.models import load_model, load_weights
from quantrain.finetune.recipe_text import recipe_table
from quantrain.finetune.recipes import raise_all
from quantrain.finetune.rehearsal import check_model, evaluation_seconds, reason_of, rehearse
from quantrain.finetune.report import COLUMNS, ReportTable, audit_tables, convert_note, write_report
from quantrain.finetune.results import AuditRow, LayerError, StageResult
from quantrain.finetune.table import HEADER, format_seconds, rows
from quantrain.finetune.text import load_text_data
from quantrain.finetune.trainer import EVAL_BATCH, Task, TrainResult, evaluate, latency_seconds, to_device
from quantrain.nn.recipes import rounds_nothing

_TIMED_STEPS = 3  # of each stage of a quick run, before it starts: the first warms up


def load_data(config: JobConfig):
    """The data that the job names: an ImageData or a TextData.

    Raises:
        FileNotFoundError: It is not there; the message says what was looked for.
        ValueError: A file of it is damaged, or more is held out than there is, or the job is no classification.
    """
    if config.job == "lm":
        raise ValueError("job: expected images or sst2, which classify, got lm")
    if config.job == "sst2":
        data = load_text_data(config.data, minilm.load_tokenizer())
    else:
        data = load_image_data(config.data, config.image_size)
    if config.holdout is not None:
        data = data.hold_out(config.holdout)
    return data.subset(config.train_rows, config.test_rows)


def new_model(config: JobConfig, data) -> nn.Module:
    """The job's float32 model with fresh (MiniLM: pretrained) weights drawn by the job's seed."""
    return _called_model(config, data)[0]


def _called_model(config: JobConfig, data) -> tuple[nn.Module, str]:
    torch.manual_seed(config.seed)
    if config.job == "sst2":
        return minilm.sentence_classifier(data.num_classes), "minilm"
    return load_model(config.model, num_classes=data.num_classes, **data.model_arguments)


class Job(BaseJob):
    """A run that classifies images, rows of numbers or sentences; arguments, errors and attributes are BaseJob's."""

    def _load(self) -> None:
        config = self.config
        self.data = load_data(config)
        model, self.call = _called_model(config, self.data)
        self.baseline = model.to(self.device)
        self.calibration = calibration_batches(self.data, config.batch_size, config.calibration_batches, config.seed)
        if config.teacher is not None:
            self.teacher = self._named_teacher()
        self._check_models()

    def _named_teacher(self) -> nn.Module:
        """The model of --teacher with the weights of --teacher-weights, tried on the data."""
        config = self.config
        if config.job == "sst2":
            raise ValueError(
                f"--teacher: expected none with --job sst2, whose teacher is its float32 model, got {config.teacher!r}"
            )
        model, call = load_model(
            config.teacher, option="--teacher", num_classes=self.data.num_classes, **self.data.model_arguments
        )
        if config.teacher_weights is not None:
            load_weights(model, config.teacher_weights)
        check_model(model, call, self.data, torch.device("cpu"), "--teacher")
        return model.to(self.device)

    def _task_of(self, stage: str) -> Task:
        """With --teacher all stages learn from it, with --distill alone the recipes from the float32 model."""
        if self.config.teacher is not None:
            return Distilled(self.task, self.teacher)
        return (
            Distilled(self.task, copy.deepcopy(self.baseline))
            if self.config.distill and stage != BASELINE
            else self.task
        )

    def _check_models(self) -> None:
        """Try the model on the data and every recipe that is not done on the model, and read the baseline's
        checkpoint."""
        started = time.perf_counter()
        config, steps = self.config, _TIMED_STEPS if self.config.quick else 1
        check_model(self.baseline, self.call, self.data, self.device)
        done = BASELINE in self.results
        path = self.checkpoint(BASELINE) if done else config.baseline
        if path is not None:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: expected a float32 checkpoint, got no such file")
            qnn.load_checkpoint(path, self.baseline)
        trials = {name: recipe for name, recipe in self.recipes.items() if name not in self.results}
        trials = trials if path is not None else {BASELINE: None, **trials}
        seconds, faults = 0.0, []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for name, recipe in trials.items():
                settings = config.baseline_settings() if recipe is None else config.recipe_settings(recipe)
                try:
                    step = rehearse(
                        self.baseline, recipe, config.skip, self.data, settings, self.device, steps=steps, fuse=True
                    )
                except Exception as error:
                    faults.append(f"{name}: {reason_of(error)}")
                    continue
                if recipe is None or recipe.training:
                    seconds += step * settings.steps_to_take(self.data.train_size)
                if recipe is not None:  # forward only, which is a third of a training step
                    seconds += (step / 3 if recipe.training else step) * len(self.calibration)
        raise_all(faults)
        took = format_seconds(time.perf_counter() - started)
        self._say(f"model: {self.call}, tried with {len(trials) - (path is None)} recipes in {took}")
        if config.quick:
            # a converted model takes up to 1.6 times the float one's time (ResNet-20, CPU), and its layers are compared
            evaluations = sum(1 if recipe is None else 2 for recipe in trials.values())
            seconds += evaluations * evaluation_seconds(self.baseline, self.data, self.device)
            self._say(
                f"training and evaluation will take about {format_seconds(seconds)} here "
                f"(measured on {steps} steps of each)"
            )
        memory.give_back()

    def _result(
        self, stage: str, accuracy: float, loss: float, path: Path, trained: TrainResult | None, started: float
    ) -> StageResult:
        """What every stage measures; ``path`` is its checkpoint, ``started`` the clock at its beginning."""
        return StageResult(
            stage=stage,
            accuracy=accuracy,
            loss=loss,
            weight_bytes=path.stat().st_size,
            peak_memory_bytes=memory.peak_bytes(self.device),
            steps=trained.steps if trained else 0,
            step_seconds=trained.step_seconds if trained else None,
            seconds=time.perf_counter() - started + (trained.earlier_seconds if trained else 0.0),
        )

    def _keep_stage(self, result: StageResult, epochs: float) -> None:
        summary = f"accuracy {100 * result.accuracy:.2f} %"
        self._keep(result, epochs, summary, accuracy=result.accuracy, loss=result.loss)

    def _run_baseline(self) -> None:
        path = self.checkpoint(BASELINE)
        if BASELINE in self.results:
            self._say(f"{BASELINE}: done by an earlier run")
            return
        started = time.perf_counter()
        memory.reset_peak(self.device)
        trained = None
        if self.config.baseline is not None:
            self._say(f"{BASELINE}: loaded from {self.config.baseline}")
        else:
            trained = self._train(self.baseline, BASELINE, self.config.baseline_settings())
        accuracy, loss = evaluate(self.baseline, self.data, self.device, self.stop)
        qnn.save_checkpoint(path, self.baseline)
        result = self._result(BASELINE, accuracy, loss, path, trained, started)
        self._keep_stage(result, self.config.epochs if trained else 0)
        with self._not_fatal(f"{BASELINE}: latency"):
            latency = latency_seconds(self.baseline, self.data, self.device)
            self.results[BASELINE] = replace(result, latency_seconds=latency)
            self._write_results()

    def _run_recipe(self, name: str) -> None:
        recipe = self.recipes[name]
        started = time.perf_counter()
        memory.reset_peak(self.device)
        plain = rounds_nothing(recipe)
        model = copy.deepcopy(self.baseline) if plain else self._prepared(name, recipe)
        trained = None
        settings = self.config.recipe_settings(recipe)
        if recipe.training:
            trained = self._train(model, name, settings)
            qnn.save_checkpoint(self.checkpoint(name, "trained"), model, None if plain else recipe)
        converted = copy.deepcopy(model).eval()
        path = self.checkpoint(name, "converted")
        if plain:
            qnn.save_checkpoint(path, converted)
        elif not qnn.handler_of(recipe).rebuilds:
            converted = qnn.convert(converted)
            qnn.save_checkpoint(path, converted, recipe)
        else:
            converted = qnn.convert(converted)
            converted.save(path)
        accuracy, loss = evaluate(converted, self.data, self.device, self.stop)
        result = self._result(name, accuracy, loss, path, trained, started)
        self._keep_stage(result, settings.epochs if trained else 0)
        if plain:
            with self._not_fatal(f"{name}: latency"):
                latency = latency_seconds(converted, self.data, self.device)
                self.results[name] = replace(result, latency_seconds=latency)
                self._write_results()
            return
        with self._not_fatal(f"{name}: latency and errors by layer"):
            self.results[name] = replace(result, **self._details(recipe, model, converted))
            self._write_results()
        if not qnn.handler_of(recipe).rebuilds:
            with self._not_fatal(f"{name}: histograms"):
                self._plot_grids(name, model)

    def _details(self, recipe, model: nn.Module, converted: nn.Module) -> dict:
        details = {
            "convert_difference": self._convert_difference(model, converted),
            "latency_seconds": latency_seconds(converted, self.data, self.device),
        }
        if not qnn.handler_of(recipe).rebuilds:
            return {**details, "layer_errors": self._layer_errors(model)}
        # no table of errors: tensors are rounded in units of their neighbors, which it does not know
        return {**details, "audit": tuple(AuditRow(**row) for row in converted.audit().rows)}

    def _prepared(self, name: str, recipe) -> nn.Module:
        """A copy of the baseline prepared with the recipe and calibrated."""
        model = qnn.prepare(copy.deepcopy(self.baseline), recipe, skip=self.config.skip, fuse=True)
        return self._calibrated(name, recipe, model)

    def _probe(self) -> Batch:
        return to_device(next(self.data.test_batches(EVAL_BATCH)), self.device)

    @torch.inference_mode()
    def _convert_difference(self, model: nn.Module, converted: nn.Module) -> float:
        inputs, _ = self._probe()
        return float((model.eval()(*inputs) - converted(*inputs)).abs().max())

    def _layer_errors(self, model: nn.Module) -> tuple[LayerError, ...]:
        inputs, _ = self._probe()
        table = qnn.quantization_error(model, inputs)
        return tuple(
            LayerError(row["layer"], tensor, row[f"{tensor}_sqnr_db"], row.get(f"{tensor}_saturation_pct"))
            for row in table.rows
            for tensor in ("weight", "input", "output")
            if row.get(f"{tensor}_sqnr_db") is not None
        )

    def _plot_grids(self, name: str, model: nn.Module) -> None:
        color = plots.stage_colors([BASELINE, *self.recipes])[name]
        inputs, _ = self._probe()
        for kind, grids in (("weights", weight_grids(model)), ("inputs", input_grids(model, inputs))):
            if grids:
                plots.plot_histograms(grids, name, color, self.folder / "plots" / f"{name}-{kind}.png")

    def _write_report(self, results: list[StageResult]) -> None:
        folder = self.folder / "plots"
        figures = [("Loss and accuracy", "", folder / "curves.png")]
        plots.plot_curves(self.metrics.read(), results, folder / "curves.png")
        if len(results) > 1:
            plots.plot_sizes(results, folder / "sizes.png")
            note = "Stages on the line are beaten by no other that is as small."
            figures.append(("Accuracy over bytes", note, folder / "sizes.png"))
        if any(result.layer_errors for result in results):
            plots.plot_sqnr(results, folder / "sqnr.png")
            note = (
                "How much larger each layer's numbers are than what rounding changes in them (signal to quantization "
                "noise): at 20 dB the change is a tenth of them, at 40 dB a hundredth. A layer far left of the others is "
                "where a few more bits help most."
            )
            figures.append(("What rounding changes, by layer", note, folder / "sqnr.png"))
        for name in self.recipes:
            for kind in ("weights", "inputs"):
                path = folder / f"{name}-{kind}.png"
                if path.is_file():
                    note = (
                        "Each gray line is a value that the quantized model can hold; what lies past the ends is cut."
                    )
                    figures.append((f"{name}: what is rounded, and the grid it is rounded to", note, path))
        report = self.folder / "report.html"
        write_report(
            report,
            self._title(),
            self._lead(results),
            ReportTable(*self._cells(), columns=COLUMNS),
            recipe_table(self.recipes),
            figures,
            self._facts(results),
            note=convert_note(results),
            more=audit_tables(results),
        )
        self._say(f"report: {report}")

    def _title(self) -> str:
        model = "MiniLM-L6" if self.config.job == "sst2" else self.config.model.replace("resnet20", "ResNet-20")
        return f"{model} on {self.data.name}{' (quick run)' if self.config.quick else ''}"

    def _lead(self, results: list[StageResult]) -> str:
        total = format_seconds(sum(result.seconds for result in results))
        return (
            "A model in ordinary 32-bit floating point (float32), and what becomes of it in few bits: "
            f"{len(results) - 1} quantized models, each made from it by a recipe and tested on the same "
            f"{self.data.test_size} samples. The whole run took {total}."
        )

    def _data_line(self) -> str:
        return f"{self.data.name}, {self.data.train_size} training and {self.data.test_size} test samples"

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        return HEADER, rows(self._rows())

    def _own_facts(self, results: Sequence[StageResult]) -> list[tuple[str, str]]:
        config, data = self.config, self.data
        trained = [
            f"{result.stage}: {result.steps} steps of {config.batch_size}" for result in results if result.steps > 0
        ]
        return [
            ("data", f"{data.name} from {data.source}, {data.train_size} + {data.test_size} samples"),
            ("training", "; ".join(trained) or "none"),
            ("calibration", f"{len(self.calibration)} batches of {config.batch_size}"),
            *([("teacher", config.teacher or "the float32 model")] if config.distill else []),
        ]
