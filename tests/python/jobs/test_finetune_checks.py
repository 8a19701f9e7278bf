"""What the fine-tuning job checks before it starts, and that one recipe's failure neither stops the others nor loses
the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra [data])")

from quantrain import Recipe  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune import job, plots, table  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.recipes import parse_overrides, resolve_recipes  # noqa: E402
from quantrain.finetune.results import FailedStage, StageResult, read_results  # noqa: E402


def tiny(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))


def thousand_classes(num_classes: int = 1000) -> nn.Module:
    return tiny(num_classes)


def hidden_behind_keywords(**kwargs) -> nn.Module:
    return thousand_classes(**kwargs)


def deaf_to_keywords(**_) -> nn.Module:
    return tiny(1000)


def deaf() -> nn.Module:
    return tiny(7)


def for_colour_images() -> nn.Module:
    return tiny(10, in_channels=3)


def returns_a_dict(num_classes: int) -> nn.Module:
    model = tiny(num_classes)
    model.register_forward_hook(lambda module, args, output: {"logits": output})
    return model


def raises(num_classes: int) -> nn.Module:
    raise RuntimeError("no weights here")


class OutOfIntegers(nn.Module):
    """A model with an operation that has no integer form: prepare under f8net refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.sin(images.flatten(1)))


class NoGradient(nn.Module):
    """A model that runs and cannot be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1)).detach()


def no_gradient() -> nn.Module:
    return NoGradient()


def out_of_integers() -> nn.Module:
    return OutOfIntegers()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(job.Job, "_plot_grids", lambda *_: None)
    monkeypatch.setattr(job.Job, "_write_report", lambda *_: None)


def run(runs: Path, *more: str, model: str = "tiny") -> int:
    words = f"finetune --data digits --model test_finetune_checks:{model} --epochs 0.2 --qat-epochs 0.2 --batch-size 64 --name t"
    return main([*words.split(), "--runs", str(runs), "--calibration-batches", "1", *more])


# Before the start


def test_every_fault_is_named_before_anything_is_trained(tmp_path, capsys):
    assert run(tmp_path, "--recipes", "no-such", "qat-w8a8", "none.json", model="out_of_integers") == 2
    error = capsys.readouterr().err
    assert "2 faults, nothing was started" in error
    assert "got 'no-such'" in error and "none.json: expected a file with a recipe's JSON, got none" in error
    assert run(tmp_path, "--recipes", "f8net", "qat-w8a8", "f8net-tiny", model="out_of_integers") == 2
    error = capsys.readouterr().err
    assert "f8net: " in error and "f8net-tiny: " in error and "sin" in error and "qat-w8a8" not in error
    assert not (tmp_path / "t").exists()


def test_a_recipe_that_cannot_convert_is_refused(tmp_path, capsys):
    assert run(tmp_path, "--recipes", "qat-w8a8", "--override", "weight.bits=12") == 2
    error = capsys.readouterr().err
    assert "qat-w8a8-custom: " in error and "12" in error
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--name", "x" * 300), "--name: expected a name of at most 200 bytes, got 300"),
        (("--runs", __file__), "--runs: expected a folder, got the file"),
    ],
)
def test_places_that_cannot_be_written_are_named(tmp_path, capsys, words, message):
    assert run(tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_trained_is_refused(tmp_path, capsys):
    assert run(tmp_path, "--recipes", "qat-w8a8", model="no_gradient") == 2
    error = capsys.readouterr().err
    assert "float32: RuntimeError: " in error and "qat-w8a8: RuntimeError: " in error and "grad" in error
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("deaf_to_keywords", "deaf_to_keywords(num_classes=10) to return [2, 10], a number for each of the data's 10 classes, got [2, 1000]"),
        ("deaf", "deaf() to return [2, 10], a number for each of the data's 10 classes, got [2, 7]"),
        ("returns_a_dict", "returns_a_dict(num_classes=10) to return [2, 10], a number for each of the data's 10 classes, got dict"),
        ("for_colour_images", "for_colour_images() to take inputs of shape [2, 1, 8, 8], got RuntimeError: "),
        ("raises", "raises(num_classes=10) to return a torch.nn.Module, got RuntimeError: no weights here"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_data_is_refused(tmp_path, capsys, model, message):
    assert run(tmp_path, model=model) == 2
    assert f"--model: expected test_finetune_checks:{message}" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_function_with_keywords_is_told_the_classes(tmp_path, capsys, no_plots):
    assert run(tmp_path, "--recipes", "ptq-w8a8", model="hidden_behind_keywords") == 0
    assert (
        "model: test_finetune_checks:hidden_behind_keywords(num_classes=10), tried with 1 recipe"
        in capsys.readouterr().out
    )


def test_a_baseline_is_read_before_the_folder_is_made(tmp_path, capsys):
    assert run(tmp_path, "--baseline", str(tmp_path / "none.safetensors")) == 2
    assert "none.safetensors: expected a float32 checkpoint, got no such file" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_missing_package_is_named_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path) == 2
    assert "expected the package matplotlib, got none" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_trying_changes_no_result(tmp_path, no_plots, monkeypatch):
    assert run(tmp_path / "a", "--recipes", "qat-w4a4", "fqt-psq8") == 0
    monkeypatch.setattr(job, "rehearse", lambda *_, **__: 0.0)
    assert run(tmp_path / "b", "--recipes", "qat-w4a4", "fqt-psq8") == 0
    tried, untried = read_results(tmp_path / "a" / "t"), read_results(tmp_path / "b" / "t")
    assert [(row.accuracy, row.loss) for row in tried.values()] == [
        (row.accuracy, row.loss) for row in untried.values()
    ]


def test_quick_says_how_long_it_takes(tmp_path, capsys, no_plots):
    assert run(tmp_path, "--quick", "--recipes", "qat-w8a8") == 0
    lines = capsys.readouterr().out.splitlines()
    (said,) = [place for place, line in enumerate(lines) if line.startswith("training and evaluation will take about ")]
    assert "here (measured on 3 steps of each)" in lines[said]
    assert said < next(place for place, line in enumerate(lines) if line.startswith("float32"))


# Recipes of the user


def test_recipe_files_and_overrides(tmp_path):
    recipe = Recipe.from_name("qat-w8a8")
    recipe.weight.bits = 6
    (tmp_path / "six.json").write_text(recipe.to_json())
    found = resolve_recipes([str(tmp_path / "six.json"), "qat-w4a4"])
    assert {name: found[name].weight.bits for name in found} == {"six": 6, "qat-w4a4": 4} and found["six"].name == "six"
    found = resolve_recipes(["qat-w8a8", "qat-w4a4"], ["weight.bits=5", "input=null", "edge_bits=0"])
    assert [(name, r.weight.bits, r.input, r.edge_bits) for name, r in found.items()] == [
        ("qat-w8a8-custom", 5, None, 0), ("qat-w4a4-custom", 5, None, 0),
    ]  # fmt: skip


def test_overrides_are_parsed():
    assert parse_overrides(["input=null", "input.bits=4", "weight.observer=mse", "training=false"]) == {
        "input": {"bits": 4}, "weight": {"observer": "mse"}, "training": False,
    }  # fmt: skip
    assert parse_overrides(["scheme.grad_input.bits=4", "scheme.grad_weight=null"]) == {
        "scheme": {"grad_input": {"bits": 4}, "grad_weight": None}
    }
    (recipe,) = resolve_recipes(["fqt-bhq5"], ["scheme.grad_input.bits=4"]).values()
    assert recipe.scheme.grad_input.bits == 4 and recipe.scheme.grad_input.quantizer == "householder"


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (["{folder}/bad.json"], [], "bad.json: expected what Recipe.to_json gives, got "),
        (["{folder}/none.json"], [], "none.json: expected a file with a recipe's JSON, got none"),
        (["{folder}/float32.json"], [], "got a second 'float32'"),
        (["{folder}/one/a.json", "{folder}/two/a.json"], [], "got a second 'a'"),
        (["qat-w8a8"], ["weight.bits"], "expected key=value such as weight.bits=4 or input=null, got 'weight.bits'"),
        (["qat-w8a8"], ["a.b.c=1"], "got a.b.c=1 (recipe: expected a field of Recipe"),
        (["fqt-bhq5"], ["grad_input.bits=4"], '(which is now in "scheme": '),
        (["qat-w8a8"], ["name=x"], "got 'name=x'"),
        (
            ["qat-w8a8"],
            ["weight.bits=99"],
            "settings that qat-w8a8 can have, got weight.bits=99 (QuantSpec: expected bits",
        ),
        (["qat-w8a8"], ["weigt.bits=4"], "expected a field of Recipe"),
        (["qat-w8a8"], ["weight.bits=four"], "expected values of the settings' types, got weight.bits=four"),
    ],
)
def test_bad_recipes_are_named(tmp_path, words, overrides, message):
    (tmp_path / "bad.json").write_text('{"weigt": 1}')
    for name in ("float32", "one/a", "two/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(Recipe.from_name("qat-w8a8").to_json())
    with pytest.raises(ValueError, match="expected") as error:
        resolve_recipes([word.format(folder=tmp_path) for word in words], overrides)
    assert message in str(error.value)


def test_skip_and_override_reach_the_model(tmp_path, no_plots, capsys):
    some = ("--recipes", "qat-w8a8", "--override", "weight.bits=6")
    assert run(tmp_path, *some, "--skip", "0") == 0
    folder = tmp_path / "t"
    model = qnn.from_checkpoint(folder / "qat-w8a8-custom.converted.safetensors", tiny())
    assert type(model[0]) is nn.Conv2d and type(model[3]) is qnn.QuantizedLinear
    assert int(model[3].weight.unique().numel()) > 16 and model[0].weight.unique().numel() == model[0].weight.numel()
    assert run(tmp_path, *some, "--skip", "0") == 0
    assert "qat-w8a8-custom: done by an earlier run" in capsys.readouterr().out
    assert run(tmp_path, "--recipes", "qat-w8a8", "--override", "weight.bits=5", "--skip", "0") == 2
    assert "expected the recipe qat-w8a8-custom as in the run that is resumed" in capsys.readouterr().err
    assert run(tmp_path, *some) == 2
    assert "expected skip = ['0'] as in the run that is resumed, got []" in capsys.readouterr().err
    assert run(tmp_path, *some, "--skip", "nowhere", "--restart") == 2
    assert "expected every pattern of skip to name a layer, got 'nowhere'" in capsys.readouterr().err


# Failures on the way


@pytest.fixture
def failing(monkeypatch):
    """Make the training of one stage fail."""

    def fail(stage: str) -> None:
        original = job.Job._train

        def train(self, model, at_stage, settings):
            if at_stage == stage:
                raise RuntimeError("the disk is full")
            return original(self, model, at_stage, settings)

        monkeypatch.setattr(job.Job, "_train", train)

    return fail


def test_a_recipe_that_fails_is_a_row_and_the_others_go_on(tmp_path, capsys, failing):
    failing("qat-w4a4")
    assert run(tmp_path, "--recipes", "qat-w4a4", "ptq-w8a8") == 1
    out = capsys.readouterr().out
    assert "qat-w4a4: failed after" in out and "ptq-w8a8: accuracy" in out
    folder = tmp_path / "t"
    lines = (folder / "table.txt").read_text().splitlines()
    assert "qat-w4a4  failed: RuntimeError: the disk is full" in lines
    assert [line.split()[0] for line in lines[3:6]] == ["float32", "qat-w4a4", "ptq-w8a8"]
    assert "failed: RuntimeError: the disk is full" in (folder / "report.html").read_text()
    assert "RuntimeError: the disk is full" in (folder / "qat-w4a4.error.txt").read_text()
    assert {"stage", "failed", "seconds"} in [
        entry.keys() for entry in json.loads((folder / "results.json").read_text())
    ]
    assert list(read_results(folder)) == ["float32", "ptq-w8a8"]


def test_a_failed_recipe_is_tried_again(tmp_path, capsys, failing, monkeypatch, no_plots):
    original = job.Job._train
    failing("qat-w8a8")
    assert run(tmp_path, "--recipes", "qat-w8a8") == 1
    monkeypatch.setattr(job.Job, "_train", original)
    assert run(tmp_path, "--recipes", "qat-w8a8") == 0
    assert list(read_results(tmp_path / "t")) == ["float32", "qat-w8a8"]
    assert "  failed: " not in (tmp_path / "t" / "table.txt").read_text()
    assert not (tmp_path / "t" / "qat-w8a8.error.txt").exists()


@pytest.mark.parametrize("what", ["plot_histograms", "plot_curves"])
def test_a_plot_that_fails_loses_no_result(tmp_path, capsys, monkeypatch, what):
    def fail(*_, **__):
        raise OSError("no fonts")

    monkeypatch.setattr(plots, what, fail)
    assert run(tmp_path, "--recipes", "ptq-w8a8") == 1
    assert "not made: no fonts" in capsys.readouterr().out
    assert "ptq-w8a8" in (tmp_path / "t" / "table.txt").read_text()
    assert read_results(tmp_path / "t")["ptq-w8a8"].layer_errors


def test_the_table_shows_failures():
    rows = [
        StageResult("float32", 0.92, 0.2, 1_100_000, 600_000_000, 10, 0.131, 61.4),
        FailedStage("qat-w4a4-custom", "OutOfMemoryError: CUDA out of memory\nmore", 3.0),
    ]
    assert table.format_table(rows).splitlines()[-1] == "qat-w4a4-custom  failed: OutOfMemoryError: CUDA out of memory"
