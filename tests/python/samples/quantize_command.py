"""Runs of ``quantrain quantize`` and ``quantrain evaluate`` on tiny models: their arguments, and what a refusal is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quantrain import ptq
from quantrain.finetune.arguments import EXIT_ERROR
from quantrain.finetune.cli import main
from quantrain.finetune.lm.data import read_tokens
from quantrain.finetune.lm.models import TINY, load_language_model
from quantrain.finetune.quantize import job
from quantrain.finetune.quantize.job import QuantizeSettings
from quantrain.finetune.quantize.language import Windows

SENTENCE = "The quick brown fox jumps over the lazy dog, number {}. "
SAMPLES, LENGTH, HELD_OUT = 3, 32, 2
RECIPE = "gptq-w4a16"


def settings(text: Path, output: Path, **changes) -> QuantizeSettings:
    """Of a run on the tiny Llama."""
    values = {"model": TINY, "recipe": RECIPE, "calibration": text, "output": output}
    return QuantizeSettings(**values | {"samples": SAMPLES, "length": LENGTH, "held_out": HELD_OUT} | changes)


def words(text: Path | str, output: Path, *more: str, model: Path | str = TINY, recipe: str = RECIPE) -> list[str]:
    """The command line of such a run."""
    named = ["quantize", str(model), "--recipe", recipe, "--calibration", str(text), "--output", str(output)]
    return [*named, "--samples", str(SAMPLES), "--length", str(LENGTH), "--quick", *more]


def held_out_windows(text: Path) -> Windows:
    """The windows that such a run measures on."""
    ids = read_tokens(text, load_language_model(TINY).tokenizer)[SAMPLES * LENGTH :][: HELD_OUT * LENGTH]
    return Windows(text.name, ids.view(HELD_OUT, LENGTH))


def kept_models(monkeypatch) -> list:
    """A list to which each run from now on adds the model that it converts."""
    kept: list = []
    quantize = ptq.quantize

    def keep(*arguments, **options):
        kept.append(quantize(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(job.ptq, "quantize", keep)
    return kept


@torch.no_grad()
def logits(task, model, texts) -> torch.Tensor:
    """A model's logits of all calls of ``texts``."""
    return task.forward(model, texts.calls)


def edit_config(**changes):
    """What changes fields of a folder's config.json."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def remove(pattern: str):
    """What removes the first file of a name from a folder."""

    def edit(folder: Path) -> None:
        for path in sorted(folder.glob(pattern))[:1]:
            path.unlink()

    return edit


def write(name: str, content: str):
    """What writes a file into a folder."""
    return lambda folder: (folder / name).write_text(content)


def assert_refused(command: list[str], message: str, tmp_path: Path, capsys) -> None:
    """One line on stderr that has ``message``, exit status 2, and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command) == EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"quantrain {command[0]}: error: ") and error.count("\n") == 1, error
    assert message in error, error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
