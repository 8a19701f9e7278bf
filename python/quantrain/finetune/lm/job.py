"""The job of language models: a model as it is, then each recipe prepared, fine-tuned, evaluated and written.

A recipe with LoRA (``qlora``) trains an adapter beside weights of 4 bits, and writes the adapter in PEFT's format and
the merged model as transformers reads it. Any other recipe trains all weights and is converted, as in the other jobs.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantrain import Recipe
from quantrain import nn as qnn
from quantrain.finetune import memory, plots
from quantrain.finetune.base_job import BaseJob
from quantrain.finetune.config import trains_adapter
from quantrain.finetune.data import calibration_batches
from quantrain.finetune.distillation import Distilled
from quantrain.finetune.folder import BASELINE, model_files
from quantrain.finetune.lm.data import load_lm_data
from quantrain.finetune.lm.models import load_language_model, set_checkpointing
from quantrain.finetune.lm.results import (
    COLUMNS,
    HEADER,
    LmResult,
    Memory,
    base_name,
    memory_table,
    perplexity_text,
    rows,
)
from quantrain.finetune.lm.task import CausalLM
from quantrain.finetune.lm.writing import write_adapter, write_merged
from quantrain.finetune.recipe_text import recipe_table
from quantrain.finetune.recipes import raise_all
from quantrain.finetune.rehearsal import reason_of, rehearse
from quantrain.finetune.report import ReportTable, write_report
from quantrain.finetune.table import format_seconds
from quantrain.finetune.trainer import Task, TrainResult

SEQUENCE_LENGTH = 512
_TIMED_STEPS = 3  # of each recipe of a quick run, before it starts: the first warms up
_PERPLEXITY = plots.Measure("perplexity", "Perplexity (hollow: on the way)", "lower is better", 1.0, cut=False)


class LmJob(BaseJob):
    """A run that fine-tunes a causal language model; arguments, errors and attributes are BaseJob's."""

    result_type = LmResult
    packages = (*BaseJob.packages, "tokenizers", "transformers")

    def _load(self) -> None:
        config = self.config
        length = config.sequence_length or SEQUENCE_LENGTH
        if length < 2:
            raise ValueError(f"--sequence-length: expected at least 2 tokens, got {length}")
        self.task = CausalLM(config.precision, length)
        frozen = all(qnn.handler_of(recipe).packs for recipe in self.recipes.values())
        half = config.precision == "bf16" and frozen
        self._teacher: nn.Module | None = None
        if config.teacher_weights is not None:
            raise ValueError("--teacher-weights: expected none with --job lm, whose --teacher is a folder, got a file")
        self.lm = load_language_model(config.model, torch.bfloat16 if half else torch.float32, config.seed)
        if self.lm.context is not None and length > self.lm.context:
            raise ValueError(
                f"--sequence-length: expected at most the {self.lm.context} tokens that {config.model} has positions "
                f"for, got {length}"
            )
        data = load_lm_data(config.data, self.lm.tokenizer, length)
        data = data if config.holdout is None else data.hold_out(config.holdout)
        self.data = data.subset(config.train_rows, config.test_rows)
        self._check_tokens()
        self.calibration = calibration_batches(self.data, config.batch_size, config.calibration_batches, config.seed)
        self._check_recipes()

    def _task_of(self, stage: str) -> Task:
        """With --distill recipes learn from the model as it was given, or from --teacher."""
        if not self.config.distill:
            return self.task
        if self._teacher is None:
            half = self.config.precision == "bf16"
            named = self.config.teacher
            if named is None:
                model = copy.deepcopy(self.lm.model)
            else:
                model = load_language_model(named, torch.bfloat16 if half else torch.float32, self.config.seed).model
                self._check_vocabulary(named, model)
            self._teacher = (model.to(torch.bfloat16) if half else model).to(self.device)
        return Distilled(self.task, self._teacher, weight=0.5, temperature=2.0)

    def _check_vocabulary(self, named: str, model: nn.Module) -> None:
        found = model.get_output_embeddings().weight.shape[0]
        if found != self.lm.vocabulary:
            raise ValueError(
                f"--teacher: expected the vocabulary of {self.config.model}, {self.lm.vocabulary} ids, got {found} of {named}"
            )

    def _check_tokens(self) -> None:
        """Make sure that the tokenizer is the model's."""
        largest = max(int(ids.max()) for part in (self.data.train, self.data.test) for ids in part.ids)
        if largest >= self.lm.vocabulary:
            raise ValueError(
                f"--model: expected a tokenizer whose ids are below the {self.lm.vocabulary} of the model's embedding, "
                f"got {largest}: it is another model's"
            )
        unknown = self.lm.tokenizer.unk_token_id
        ids = self.data.train.ids[0]
        if unknown is not None and 2 * int((ids == unknown).sum()) > len(ids):
            raise ValueError(
                f"--model: expected a tokenizer that knows the text, got its token for the unknown ({unknown}) for "
                "more than half of the first sequence"
            )

    def _check_recipes(self) -> None:
        """Try every recipe that is not done by a step on a copy of the model, prepared on the CPU as in its stage."""
        started, config, faults, seconds = time.perf_counter(), self.config, [], 0.0
        self._say(f"model: {self.lm.title}; a step of each recipe is tried first, which may take a minute on a CPU")
        steps = _TIMED_STEPS if config.quick else 1
        trials = {name: recipe for name, recipe in self.recipes.items() if name not in self.results}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for name, recipe in trials.items():
                settings = config.recipe_settings(recipe)
                try:
                    step = rehearse(
                        self.lm.model,
                        recipe,
                        config.skip,
                        self.data,
                        settings,
                        self.device,
                        steps=steps,
                        task=self.task,
                    )
                except Exception as error:
                    faults.append(f"{name}: {reason_of(error)}")
                    continue
                if recipe.training:
                    seconds += step * settings.steps_to_take(self.data.train_size)
        raise_all(faults)
        took = format_seconds(time.perf_counter() - started)
        self._say(f"model: {self.lm.title}, tried with {len(trials)} recipe{'' if len(trials) == 1 else 's'} in {took}")
        if config.quick:
            self._say(f"training will take about {format_seconds(seconds)} here (measured on {steps} steps of each)")
        self._free()

    def _file_names(self) -> list[str]:
        adapters = [name for name, recipe in self.recipes.items() if trains_adapter(recipe)]
        return [*super()._file_names(), *(file for name in adapters for file in model_files(name))]

    # Stages

    def _run_baseline(self) -> None:
        if BASELINE in self.results:
            self._say(f"{BASELINE}: done by an earlier run")
            return
        started = time.perf_counter()
        memory.reset_peak(self.device)
        loss, values = None, {}
        try:
            values = self.task.evaluate(self.lm.model.to(self.device), self.data, self.device, self.stop)
            loss = values["loss"]
        except torch.cuda.OutOfMemoryError:
            self._say(f"{BASELINE}: the device has no room for the model before it is packed; not evaluated")
        result = LmResult(
            stage=BASELINE,
            loss=loss,
            memory=self._frozen(Memory.of(self.lm.model)),
            peak_memory_bytes=memory.peak_bytes(self.device),
            seconds=time.perf_counter() - started,
        )
        self.lm.model.to("cpu")
        self._free()
        self._keep(result, 0, f"perplexity {perplexity_text(loss)}", **values)

    @staticmethod
    def _frozen(held: Memory) -> Memory:
        return Memory(held.packed, held.frozen + held.trained, 0)

    def _run_recipe(self, name: str) -> None:
        recipe = self.recipes[name]
        started = time.perf_counter()
        self._free()
        memory.reset_peak(self.device)
        model = self._prepared(name, recipe)
        untrained = self.task.evaluate(model, self.data, self.device, self.stop)
        if not self._state_path(name).is_file():
            self.metrics.forget_after(name, -1)
            self.metrics.evaluation(name, 0, 0, **untrained)
        self._say(f"{name}: perplexity {perplexity_text(untrained['loss'])} before training")
        settings, trained = self.config.recipe_settings(recipe), None
        values = untrained
        if recipe.training:
            set_checkpointing(model, self._checkpoints())
            trained = self._train(model, name, settings)
            values = self.task.evaluate(model, self.data, self.device, self.stop)
        held = Memory.of(model, trained.optimizer_bytes if trained else 0)
        count = sum(value.numel() for value in model.parameters() if value.requires_grad) if trained else 0
        peak = memory.peak_bytes(self.device)
        model, update_error = self._write(name, recipe, model)
        stored = self.task.evaluate(model, self.data, self.device, self.stop)
        result = LmResult(
            stage=name,
            loss=values["loss"],
            memory=held if trained else self._frozen(held),
            peak_memory_bytes=peak,
            seconds=time.perf_counter() - started + (trained.earlier_seconds if trained else 0.0),
            untrained_loss=untrained["loss"],
            stored_loss=stored["loss"],
            trained_parameters=count,
            update_error=update_error,
            **self._speed(name, trained),
        )
        summary = f"perplexity {perplexity_text(result.loss)}, {perplexity_text(result.stored_loss)} as stored"
        self._keep(result, settings.epochs if trained else 0, summary, **values)

    def _prepared(self, name: str, recipe: Recipe) -> nn.Module:
        """The model prepared on the CPU, so that the device never holds the weights unpacked, moved and calibrated."""
        last = name == next(reversed(self.recipes)) and not self.config.distill  # whose stage needs no copy
        model = self.lm.model if last else copy.deepcopy(self.lm.model)
        torch.manual_seed(self.config.seed)  # of the adapter's first values
        model = qnn.prepare(model, recipe, skip=self.config.skip).to(self.device)
        return self._calibrated(name, recipe, model)

    def _checkpoints(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        wanted = self.config.checkpointing
        return self.device.type == "cuda" if wanted is None else wanted

    def _write(self, name: str, recipe: Recipe, model: Any) -> tuple[nn.Module, float | None]:
        """Write what the stage leaves; the result is the model as stored, and how far merging rounds its updates."""
        if recipe.training:
            set_checkpointing(model, False)
        if trains_adapter(recipe):
            write_adapter(self.folder / name / "adapter", model, self.lm)
            with tempfile.TemporaryDirectory(dir=self.folder / "state") as folder:
                model, errors = write_merged(Path(folder), model, self.lm)
                self.files.take(Path(folder), f"{name}/merged")
            if self.config.precision == "float32":
                model = model.float()  # the same weights; a CPU is slow in 16 bits
            return model, statistics.fmean(errors)
        if recipe.training:
            qnn.save_checkpoint(self.checkpoint(name, "trained"), model, recipe)
        model = qnn.convert(model.eval())
        qnn.save_checkpoint(self.checkpoint(name, "converted"), model, recipe)
        return model, None

    def _speed(self, name: str, trained: TrainResult | None) -> dict:
        if trained is None:
            return {}
        speeds = [
            entry["tokens_per_second"]
            for entry in self.metrics.read()
            if entry["stage"] == name and entry["event"] == "step"
        ]
        return {
            "steps": trained.steps,
            "step_seconds": trained.step_seconds,
            "tokens_per_second": statistics.median(speeds),
        }

    def _free(self) -> None:
        """Give back what the stage before held, so that the next one's peak is its own."""
        memory.give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # What it leaves

    def _data_line(self) -> str:
        data = self.data
        return (
            f"{data.name}, {data.train_size} sequences of {data.train.tokens:,} tokens to train on, "
            f"{data.test_size} of {data.test.tokens:,} held out"
        )

    def _title(self) -> str:
        return f"{self.lm.title} on {self.data.name}{' (quick run)' if self.config.quick else ''}"

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        return HEADER, rows(self._rows(), self.config.precision)

    def _own_facts(self, results: Sequence[LmResult]) -> list[tuple[str, str]]:
        import transformers

        config, data = self.config, self.data
        sequences = f"{config.batch_size} sequences of at most {self.task.length} tokens"
        if config.accumulate > 1:
            sequences += f" in {config.accumulate} parts"
        trained = [f"{result.stage}: {result.steps} steps of {sequences}" for result in results if result.steps > 0]
        merged = [f"{result.stage} {result.update_error:.2g}" for result in results if result.update_error is not None]
        optimizers = {config.recipe_settings(recipe).optimizer for recipe in self.recipes.values()}
        facts = [
            ("model", f"{self.lm.title} from {self.lm.source}"),
            ("data", f"{self._data_line()}; from {data.source}"),
            ("training", "; ".join(trained) or "none"),
            ("optimizer", ", ".join(sorted(optimizers))),
            ("transformers", transformers.__version__),
        ]
        if merged:
            facts.append(("rounding of the merged weights, over the update's norm", "; ".join(merged)))
        return facts

    def _lead(self, results: Sequence[LmResult]) -> str:
        total, count = format_seconds(sum(result.seconds for result in results)), len(results) - 1
        return (
            "A language model as it was given, and what becomes of it when it is fine-tuned in few bits: "
            f"{count} recipe{'' if count == 1 else 's'}, tested on the same {self.data.test.tokens:,} held-out tokens. "
            f"The whole run took {total}."
        )

    def _write_report(self, results: list[LmResult]) -> None:
        curves = self.folder / "plots" / "curves.png"
        shown = [result for result in results if math.isfinite(result.perplexity)]
        labels = {BASELINE: base_name(self.config.precision)}
        plots.plot_curves(self.metrics.read(), shown, curves, _PERPLEXITY, labels)
        report = self.folder / "report.html"
        write_report(
            report,
            self._title(),
            self._lead(results),
            ReportTable(*self._cells(), columns=COLUMNS),
            recipe_table(self.recipes),
            [("Loss and perplexity", "", curves)],
            self._facts(results),
            more=[memory_table(results, self.config.precision)],
        )
        self._say(f"report: {report}")
