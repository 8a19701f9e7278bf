"""The job with pruning and distillation: what --prune, --schedule, --distill and --teacher leave behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from samples.digits import arguments, tiny
from torch import nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra [data])")

from safetensors.torch import load_file  # noqa: E402

from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune import job, metrics, plots  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.folder import BASELINE  # noqa: E402
from quantrain.finetune.results import StageResult, read_results  # noqa: E402


def wide(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A teacher of another width."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 32), nn.ReLU(), nn.Linear(32, num_classes))


def other_classes(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes + 1))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(job.Job, "_plot_grids", lambda *_: None)
    monkeypatch.setattr(job.Job, "_write_report", lambda *_: None)


def run(folder: Path, *more: str) -> int:
    return main(arguments(folder, *more))


def losses(folder: Path, stage: str) -> list[float]:
    entries = [json.loads(line) for line in (folder / "t" / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["stage"] == stage and entry["event"] == "step"]


@pytest.mark.parametrize("schedule", ["cubic", "one-shot"])
def test_prune_leaves_that_share_of_zeros(tmp_path, schedule):
    assert run(tmp_path, "--prune", "0.5", "--schedule", schedule, "--recipes", "prune-magnitude", "qat-w8a8") == 0
    dense = load_file(tmp_path / "t" / f"{BASELINE}.safetensors")
    assert all(bool((value != 0).all()) for name, value in dense.items() if name in ("0.weight", "4.weight"))
    results = read_results(tmp_path / "t")
    for recipe in ("prune-magnitude", "qat-w8a8"):
        trained = load_file(tmp_path / "t" / f"{recipe}.trained.safetensors")
        masks = {name: value for name, value in trained.items() if name.endswith("weight_mask")}
        assert sorted(masks) == ["0.weight_mask", "4.weight_mask"]
        for layer in ("0", "4"):
            weight = trained[f"{layer}.weight"]
            assert int((weight == 0).sum()) == weight.numel() // 2
        assert results[recipe].accuracy > results[BASELINE].accuracy - 0.1
    whole = (tmp_path / "t" / "qat-w8a8.converted.safetensors").stat().st_size
    assert whole == results["qat-w8a8"].weight_bytes
    read = qnn.from_checkpoint(tmp_path / "t" / "qat-w8a8.converted.safetensors", tiny())
    codes = read[4].weight_codes
    assert codes.shape == (10, 512) and int((codes == 0).sum()) >= codes.numel() // 2


def test_pruned_codes_are_stored_in_less(tmp_path):
    assert run(tmp_path, "--prune", "0.8", "--recipes", "qat-w8a8") == 0
    pruned = read_results(tmp_path / "t")["qat-w8a8"].weight_bytes
    assert run(tmp_path / "dense", "--recipes", "qat-w8a8") == 0
    dense = read_results(tmp_path / "dense" / "t")["qat-w8a8"].weight_bytes
    weights = 8 * 9 + 10 * 512
    # A byte for a code that is kept and a bit for each, instead of a byte for each; a header that names the masks.
    assert dense - pruned > weights * (0.8 - 0.125) - 600


def test_a_pruned_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ("--prune", "0.6", "--recipes", "prune-magnitude")
    assert run(whole, *arguments) == 0
    record = metrics.Metrics.step

    def stop(self, stage, step, *rest):
        record(self, stage, step, *rest)
        if (stage, step) == ("prune-magnitude", 12):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "step", stop)
        assert run(broken, *arguments) == 130
    assert run(broken, *arguments) == 0
    a, b = (load_file(of / "t" / "prune-magnitude.trained.safetensors") for of in (whole, broken))
    assert sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_distill_changes_the_recipes_alone(tmp_path):
    assert run(tmp_path / "plain", "--recipes", "qat-w4a4") == 0
    assert run(tmp_path / "taught", "--recipes", "qat-w4a4", "--distill") == 0
    assert losses(tmp_path / "plain", BASELINE) == losses(tmp_path / "taught", BASELINE)
    plain, taught = (losses(tmp_path / of, "qat-w4a4") for of in ("plain", "taught"))
    assert len(plain) == len(taught) > 10 and plain[0] != taught[0]
    result = read_results(tmp_path / "taught" / "t")
    assert result["qat-w4a4"].accuracy > result[BASELINE].accuracy - 0.1


def test_a_teacher_teaches_the_baseline_too(tmp_path):
    torch.manual_seed(0)
    teacher = wide()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    named = ("--distill", "--teacher", "test_small_models:wide", "--teacher-weights", str(tmp_path / "teacher.pt"))
    assert run(tmp_path / "plain", "--recipes", "qat-w8a8") == 0
    assert run(tmp_path / "taught", "--recipes", "qat-w8a8", *named) == 0
    assert losses(tmp_path / "plain", BASELINE)[0] != losses(tmp_path / "taught", BASELINE)[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prune", "1.0"), "--prune: expected a share in [0, 1), got 1.0"),
        (("--prune", "-0.1"), "--prune: expected a share in [0, 1), got -0.1"),
        (("--teacher", "test_small_models:wide"), "--teacher: expected it with --distill"),
        (("--teacher-weights", "x.pt"), "--teacher-weights: expected them with --teacher"),
        (("--distill", "--teacher", "test_small_models:other_classes"), "--teacher: expected"),
        (("--distill", "--teacher", "test_small_models:missing"), "missing"),
        (
            ("--distill", "--teacher", "test_small_models:wide", "--teacher-weights", "/nonexistent.pt"),
            "/nonexistent.pt",
        ),
    ],
)
def test_what_is_wrong_is_named_before_anything_trains(tmp_path, capsys, arguments, message):
    try:
        code = run(tmp_path, "--recipes", "qat-w8a8", *arguments)
    except SystemExit as end:
        code = end.code
    assert code not in (0, None) and message in capsys.readouterr().err
    assert not (tmp_path / "t" / "metrics.jsonl").exists() or not losses(tmp_path, BASELINE)


def test_the_front_is_what_none_beats():
    def stage(accuracy, size):
        return StageResult("s", accuracy, 0.0, size, 0, 0, None, 0.0)

    small, large, beaten, tied = stage(0.8, 10), stage(0.9, 40), stage(0.79, 20), stage(0.8, 30)
    assert plots.pareto_front([large, beaten, tied, small]) == [small, large]
    assert plots.pareto_front([beaten, stage(0.9, 20)]) == [stage(0.9, 20)]
