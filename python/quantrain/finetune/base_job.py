"""What the jobs share: the run's folder, what an earlier run left, recipes that fail, the table and the facts."""

from __future__ import annotations

import importlib
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import quantrain
from quantrain import Recipe
from quantrain import nn as qnn
from quantrain.finetune.config import JobConfig, check_config, record_config
from quantrain.finetune.folder import BASELINE, RUN_FILES, RunFolder, stage_files
from quantrain.finetune.metrics import Metrics
from quantrain.finetune.recipe_text import recipe_line
from quantrain.finetune.recipes import pruned, resolve_recipes
from quantrain.finetune.rehearsal import reason_of
from quantrain.finetune.results import FailedStage, StageResult, read_results, write_results
from quantrain.finetune.table import format_cells, format_seconds
from quantrain.finetune.trainer import CLASSIFICATION, Interrupted, StopRequest, Task, TrainResult, to_device, train


def check_packages(packages: Sequence[str]) -> None:
    """Import what a run needs at its end, so that it fails now where that is not installed.

    Raises:
        ModuleNotFoundError: A package is missing.
    """
    for package in packages:
        importlib.import_module(package)


def find_device(name: str) -> torch.device:
    """The device ``name``.

    Raises:
        ValueError: PyTorch knows no such device, or this machine has none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected a device that this machine has, got {name!r} ({reason})") from error


class BaseJob:
    """One run of a JobConfig, resumed from what its folder holds. A job says what is loaded, what a recipe does, and what
    the table has.

    Args:
        config: What to do.
        stop: Asked between steps whether the user wants to stop.
        restart: Whether to delete the files that an earlier run of this name recorded as its own.
        command: The command line, for the report.

    Raises:
        ValueError: A recipe, a model or a device that does not exist, a model that does not fit the data, recipes that
            do not fit the model (all are named), or a folder of another run. Nothing is written or deleted then.
        FileNotFoundError: Data or a baseline that is not there.
        ModuleNotFoundError: A package that is missing.

    Attributes:
        failures: After ``run``: the recipes that failed, by name.
        problems: What else went wrong without ending the run, such as a plot.
    """

    result_type: ClassVar[type] = StageResult
    packages: ClassVar[tuple[str, ...]] = ("matplotlib", "safetensors", "tqdm")
    task: Task = CLASSIFICATION

    def __init__(
        self, config: JobConfig, stop: StopRequest | None = None, *, restart: bool = False, command: str = ""
    ) -> None:
        self.config, self.command = config, command
        self.stop = stop or StopRequest()
        self.folder = config.folder
        self.recipes = resolve_recipes(config.recipes, config.overrides)
        if config.prune is not None:
            self.recipes = {
                name: pruned(recipe, config.prune, config.schedule) for name, recipe in self.recipes.items()
            }
        self.failures: dict[str, FailedStage] = {}
        self.problems: list[str] = []
        self.files = self._check_folder(restart)
        self.results = {} if restart else read_results(self.folder, self.result_type)
        check_packages([*self.packages, *(["tensorboard"] if config.tensorboard else [])])
        self.device = find_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._load()
        self.metrics = self._open_folder(restart)

    # What a job says

    def _load(self) -> None:
        """Read data and model, and try what can be tried."""
        raise NotImplementedError

    def _run_baseline(self) -> None:
        raise NotImplementedError

    def _run_recipe(self, name: str) -> None:
        raise NotImplementedError

    def _data_line(self) -> str:
        raise NotImplementedError

    def _title(self) -> str:
        raise NotImplementedError

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Header and rows of the table, one row per stage of ``_rows``."""
        raise NotImplementedError

    def _own_facts(self, results: Sequence[Any]) -> list[tuple[str, str]]:
        """How the run was made, beyond what every run says."""
        raise NotImplementedError

    def _write_report(self, results: list[Any]) -> None:
        raise NotImplementedError

    # The folder

    def _file_names(self) -> list[str]:
        return [*RUN_FILES, *(name for stage in (BASELINE, *self.recipes) for name in stage_files(stage))]

    def _check_folder(self, restart: bool) -> RunFolder:
        files = RunFolder(self.folder)
        files.check(self._file_names())
        if not restart:
            check_config(self.config, self.recipes)
        return files

    def _open_folder(self, restart: bool) -> Metrics:
        """Take the run's folder, or go on in it."""
        if restart:
            self.files.delete()
        self.files.claim(self._file_names())
        record_config(self.config, self.recipes)
        events = self.folder / "tensorboard"
        before = set(events.glob("*"))
        metrics = Metrics(self.folder / "metrics.jsonl", events if self.config.tensorboard else None)
        self.files.claim(f"tensorboard/{path.name}" for path in set(events.glob("*")) - before)
        return metrics

    def checkpoint(self, stage: str, form: str = "") -> Path:
        """The path of a stage's checkpoint; ``form`` is prepared, trained or converted, or empty for the baseline."""
        return self.folder / (f"{stage}.{form}.safetensors" if form else f"{stage}.safetensors")

    # The run

    def run(self) -> list[Any]:
        """Do what is not done yet, print and write the table and the report; the result is the table's rows.

        Raises:
            Interrupted: The user asked to stop; finished stages and the state of the current one are kept.
        """
        self._say(f"data: {self._data_line()}")
        self._run_baseline()
        for name in self.recipes:
            if name in self.results:
                self._say(f"{name}: done by an earlier run")
            else:
                self._try_recipe(name)
        return self._finish()

    def _try_recipe(self, name: str) -> None:
        """Run a recipe; where it fails, note why and let the others go on."""
        started = time.perf_counter()
        try:
            self._run_recipe(name)
        except Interrupted:
            raise
        except Exception as error:
            failed = FailedStage(name, reason_of(error), time.perf_counter() - started)
            self.failures[name] = failed
            trace = self.folder / f"{name}.error.txt"
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            self._say(f"{name}: failed after {format_seconds(failed.seconds)}: {failed.failed} (traceback: {trace})")
            self._write_results()
        else:
            self.folder.joinpath(f"{name}.error.txt").unlink(missing_ok=True)

    @contextmanager
    def _not_fatal(self, what: str) -> Iterator[None]:
        """Note an error in ``what`` and go on: results are kept already."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what}: {reason_of(error)}")
            self._say(f"{what}: not made: {reason_of(error)}")

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _task_of(self, stage: str) -> Task:
        """What the stage is trained on: the job's task, or that and a teacher's answers."""
        return self.task

    def _train(self, model: nn.Module, stage: str, settings) -> TrainResult:
        recipe = self.recipes.get(stage)
        return train(
            model,
            self.data,
            settings,
            stage=stage,
            metrics=self.metrics,
            state_path=self._state_path(stage),
            device=self.device,
            stop=self.stop,
            task=self._task_of(stage),
            prune=None if recipe is None else recipe.prune,
        )

    def _calibrated(self, name: str, recipe: Recipe, model: nn.Module) -> nn.Module:
        """A prepared model calibrated on ``self.calibration`` and saved so; an interrupted stage keeps its calibration.
        Weights that prepare packed have nothing to calibrate."""
        if qnn.handler_of(recipe).packs:
            return model
        path = self.checkpoint(name, "prepared")
        if self._state_path(name).is_file():
            qnn.load_checkpoint(path, model)
            return model
        batches = [to_device(batch, self.device) for batch in self.calibration]
        qnn.calibrate(model, batches, forward=self.task.loss)
        qnn.save_checkpoint(path, model, recipe)
        return model

    def _state_path(self, stage: str) -> Path:
        return self.folder / "state" / f"{stage}.pt"

    def _keep(self, result: Any, epochs: float, summary: str, **values: float) -> None:
        """Keep a stage's result; ``values`` are its last evaluation, ``summary`` what is said of it."""
        self.metrics.evaluation(result.stage, result.steps, epochs, **values)
        self.results[result.stage] = result
        self._write_results()
        self._state_path(result.stage).unlink(missing_ok=True)
        self._say(f"{result.stage}: {summary} in {format_seconds(result.seconds)}")

    # What it leaves

    def _rows(self) -> list[Any]:
        """What the table shows: the baseline and this run's recipes as far as they are done."""
        known = {**self.failures, **self.results}
        return [known[stage] for stage in (BASELINE, *self.recipes) if stage in known]

    def _table(self) -> str:
        return format_cells(*self._cells())

    def _write_results(self) -> None:
        write_results(self.folder, [*self.results.values(), *self.failures.values()])
        (self.folder / "table.txt").write_text(f"{self._title()}\n{self._table()}\n", encoding="utf-8")

    def _finish(self) -> list[Any]:
        results = [row for row in self._rows() if not isinstance(row, FailedStage)]
        table = self._table()
        self._say("\n" + self._title() + "\n" + table + "\n")
        lines = [*self._facts(results), *((f"recipe {name}", recipe_line(r)) for name, r in self.recipes.items())]
        facts = "\n".join(f"{name}: {value}" for name, value in lines)
        (self.folder / "table.txt").write_text(f"{self._title()}\n{table}\n\n{facts}\n", encoding="utf-8")
        with self._not_fatal("report.html"):
            self._write_report(results)
        return results

    def _facts(self, results: Sequence[Any]) -> list[tuple[str, str]]:
        facts = [
            ("date", date.today().isoformat()),
            *self._own_facts(results),
            ("precision of training", self.config.precision),
            ("seed", str(self.config.seed)),
            ("device", device_text(self.device)),
            ("torch", torch.__version__),
            ("quantrain", quantrain.__version__),
            ("whole run", format_seconds(sum(result.seconds for result in results))),
        ]
        if self.command:
            facts.append(("command", self.command))
        return facts


def device_text(device: torch.device) -> str:
    """What the device is, and of a CPU how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
