"""The fine-tuning job: tiny runs on scikit-learn's digits, resumption, errors, the SST-2 loader, the MiniLM encoder."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from samples.digits import arguments, tiny
from torch import nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra [data])")

import quantrain  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune import data as image_data  # noqa: E402
from quantrain.finetune import grids, job, metrics, minilm, models, plots, recipe_text, table, trainer  # noqa: E402
from quantrain.finetune.cli import build_parser, main, make_config  # noqa: E402
from quantrain.finetune.folder import BASELINE  # noqa: E402
from quantrain.finetune.results import StageResult, read_results  # noqa: E402

CPU = torch.device("cpu")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None or importlib.util.find_spec("tokenizers") is None,
    reason=f"needs {minilm.REQUIREMENT} and tokenizers",
)


def not_a_model() -> dict:
    """What --model must refuse."""
    return {}


@pytest.fixture(autouse=True)
def _model_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def no_plots(monkeypatch):
    """Leave the plots out of runs whose test is about something else: they take most of such a run's time."""
    monkeypatch.setattr(job.Job, "_plot_grids", lambda *_: None)
    monkeypatch.setattr(job.Job, "_write_report", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run with three recipes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        assert main(arguments(folder, "--recipes", "qat-w8a8", "qat-w4a4", "ptq-w8a8")) == 0
    return folder / "t"


class _Sources(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag, attrs):
        self.cells += tag == "td"
        self.sources += [value for key, value in attrs if key in ("src", "href")]


def test_run_leaves_every_file(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    expected = {"config.json", "results.json", "metrics.jsonl", "report.html", "table.txt", "float32.safetensors"}
    expected.add("files.json")
    for recipe in ("qat-w8a8", "qat-w4a4"):
        expected |= {f"{recipe}.{form}.safetensors" for form in ("prepared", "trained", "converted")}
    expected |= {f"ptq-w8a8.{form}.safetensors" for form in ("prepared", "converted")}
    expected |= {"plots/curves.png", "plots/sizes.png", "plots/sqnr.png"}
    expected |= {
        f"plots/{recipe}-{kind}.png"
        for recipe in ("qat-w8a8", "qat-w4a4", "ptq-w8a8")
        for kind in ("weights", "inputs")
    }
    assert names == expected
    for path in finished.glob("plots/*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_results_are_sound(finished):
    results = read_results(finished)
    assert list(results) == [BASELINE, "qat-w8a8", "qat-w4a4", "ptq-w8a8"]
    assert results[BASELINE].accuracy > 0.8
    for name in ("qat-w8a8", "ptq-w8a8"):
        assert results[name].accuracy > results[BASELINE].accuracy - 0.05
    assert all(0 < result.latency_seconds < 10 for result in results.values())
    sizes = [(finished / f"{name}.converted.safetensors").stat().st_size for name in ("qat-w8a8", "qat-w4a4")]
    assert [results[name].weight_bytes for name in ("qat-w8a8", "qat-w4a4")] == sizes
    assert results["qat-w8a8"].weight_bytes < results[BASELINE].weight_bytes
    assert results["ptq-w8a8"].steps == 0 and results["ptq-w8a8"].step_seconds is None
    for name in ("qat-w8a8", "qat-w4a4", "ptq-w8a8"):
        assert results[name].convert_difference < 1e-4
        assert {error.layer for error in results[name].layer_errors} == {"0", "4"}
        assert all(math.isfinite(error.sqnr_db) for error in results[name].layer_errors)


def test_metrics_file_has_every_step(finished):
    entries = metrics.Metrics(finished / "metrics.jsonl").read()
    for stage, steps in ((BASELINE, 46), ("qat-w8a8", 23), ("qat-w4a4", 23)):
        lines = [entry for entry in entries if entry["stage"] == stage and entry["event"] == "step"]
        assert [entry["step"] for entry in lines] == list(range(steps))
        assert set(lines[0]) == {"stage", "event", "step", "epoch", "loss", "lr", "seconds"}
    evaluations = [entry for entry in entries if entry["event"] == "eval"]
    assert [entry["stage"] for entry in evaluations] == [BASELINE, BASELINE, "qat-w8a8", "qat-w4a4", "ptq-w8a8"]


def test_report_stands_alone(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    parser = _Sources()
    parser.feed(page)
    assert len(parser.sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert parser.cells == 4 * len(table.HEADER) + 3 * 6  # no column of outputs and gradients: all are float32
    assert "http" not in page.replace("http-equiv", "")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "color-scheme: light dark" in page and "@media (prefers-color-scheme: dark)" in page
    assert "<td>4 bits, a scale per output channel, learned</td>" in page and "calibrated only" in page
    assert "granularity" not in page  # no raw JSON


def test_converted_checkpoint_gives_the_accuracy_of_the_table(finished):
    digits = image_data.load_digits_data()
    skeleton = qnn.convert(qnn.prepare(tiny(), "qat-w4a4"), check_observed=False)
    qnn.load_checkpoint(finished / "qat-w4a4.converted.safetensors", skeleton)
    accuracy, _ = trainer.evaluate(skeleton, digits, CPU)
    assert accuracy == read_results(finished)["qat-w4a4"].accuracy


def test_fixed_point_recipe_reports_the_integer_network(tmp_path):
    assert main(arguments(tmp_path, "--recipes", "f8net")) == 0
    folder = tmp_path / "t"
    result = read_results(folder)["f8net"]
    model = qnn.FixedPointNetwork.load(folder / "f8net.converted.safetensors")
    assert trainer.evaluate(model, image_data.load_digits_data(), CPU)[0] == result.accuracy
    assert result.convert_difference == 0
    assert [row.op for row in result.audit] == ["conv2d", "flatten", "linear"]
    assert all(row.bound is None or row.bound < 2**31 for row in result.audit)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "f8net: the integer-only network" in page and "int8 x int8" in page


def test_second_run_repeats_nothing_and_adds_a_recipe(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert main(arguments(finished.parent, "--recipes", "qat-w8a8", "ptq-w4a8")) == 0
    out = capsys.readouterr().out
    assert "float32: done by an earlier run" in out and "qat-w8a8: done by an earlier run" in out
    assert (finished / "metrics.jsonl").read_text().startswith(before)
    assert "ptq-w4a8" in (finished / "table.txt").read_text()


def _stop_after(monkeypatch, stage: str, step: int) -> None:
    """Ask for a stop, as Ctrl-C does, once ``stage`` has taken ``step + 1`` steps."""
    original = metrics.Metrics.step

    def record(self, at_stage, at_step, *rest):
        original(self, at_stage, at_step, *rest)
        if (at_stage, at_step) == (stage, step):
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(metrics.Metrics, "step", record)


def _losses(folder: Path) -> list[tuple[str, int, float]]:
    entries = metrics.Metrics(folder / "metrics.jsonl").read()
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in entries if entry["event"] == "step"]


@pytest.mark.parametrize("stage", [BASELINE, "qat-w4a4"])
def test_interrupted_run_goes_on_as_if_nothing_happened(tmp_path, monkeypatch, capsys, stage, no_plots):
    command = arguments(tmp_path, "--recipes", "qat-w4a4", "--epochs", "1")
    assert main([*command, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        _stop_after(patch, stage, 9)
        assert main([*command, "--name", "parts"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert _losses(tmp_path / "parts")[-1][:2] == (stage, 9)
    assert main([*command, "--name", "parts"]) == 0
    assert "resuming at step 10 of" in capsys.readouterr().out
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    whole, parts = read_results(tmp_path / "whole"), read_results(tmp_path / "parts")
    assert [whole[name].accuracy for name in whole] == [parts[name].accuracy for name in parts]
    assert not list((tmp_path / "parts" / "state").iterdir())


def test_resuming_with_other_settings_is_refused(tmp_path, capsys, no_plots):
    assert main(arguments(tmp_path, "--recipes", "ptq-w8a8", "--epochs", "1")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "t").glob("*.*")}
    assert main(arguments(tmp_path, "--recipes", "ptq-w8a8", "--epochs", "3")) == 2
    message = capsys.readouterr().err
    assert "expected epochs = 1.0 as in the run that is resumed, got 3.0" in message
    assert {path: path.read_bytes() for path in (tmp_path / "t").glob("*.*")} == before
    (tmp_path / "t" / "notes.txt").write_text("mine")
    assert main(arguments(tmp_path, "--recipes", "no-such-recipe", "--restart")) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "t").glob("*.*") if path.name != "notes.txt"} == before
    assert main(arguments(tmp_path, "--recipes", "ptq-w8a8", "--epochs", "0.5", "--restart")) == 0
    assert (tmp_path / "t" / "notes.txt").read_text() == "mine"
    assert read_results(tmp_path / "t")[BASELINE].steps == 12


def test_baseline_is_loaded_from_a_checkpoint(finished, tmp_path, no_plots):
    path = finished / "float32.safetensors"
    assert main(arguments(tmp_path, "--recipes", "ptq-w8a8", "--baseline", str(path))) == 0
    results = read_results(tmp_path / "t")
    assert results[BASELINE].accuracy == read_results(finished)[BASELINE].accuracy
    assert results[BASELINE].steps == 0


def test_max_steps_keeps_the_schedule(finished, tmp_path, no_plots):
    path = finished / "float32.safetensors"
    assert main(arguments(tmp_path, "--recipes", "qat-w8a8", "--baseline", str(path), "--max-steps", "5")) == 0
    assert _losses(tmp_path / "t") == [entry for entry in _losses(finished) if entry[0] == "qat-w8a8"][:5]


def test_bf16_training_reaches_the_same_accuracy(tmp_path, no_plots):
    assert main(arguments(tmp_path, "--recipes", "qat-w8a8", "--precision", "bf16")) == 0
    results = read_results(tmp_path / "t")
    assert results[BASELINE].accuracy > 0.8
    assert results["qat-w8a8"].accuracy > results[BASELINE].accuracy - 0.05


def _failing(folder: Path, capsys, *more: str) -> str:
    assert main(arguments(folder, *more)) == 2
    assert not list(folder.glob("t/*.safetensors"))
    return capsys.readouterr().err


def test_unknown_recipe_is_named(tmp_path, capsys):
    assert "qat-w3a3" in _failing(tmp_path, capsys, "--recipes", "qat-w3a3")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:f", "expected an importable module, got 'no_such_module'"),
        ("test_finetune:no_such_function", "expected a function in test_finetune, got 'no_such_function'"),
        ("resnet99", "expected resnet20, resnet56, mlp or module:function, got 'resnet99'"),
        ("test_finetune:not_a_model", "expected test_finetune:not_a_model() to return a torch.nn.Module, got dict"),
    ],
)
def test_bad_model_is_named(tmp_path, capsys, model, message):
    assert message in _failing(tmp_path, capsys, "--model", model)


def no_layers() -> nn.Module:
    """A model in which a recipe finds nothing to quantize."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.AdaptiveAvgPool1d(10))


def test_recipe_that_names_no_layer_is_refused(tmp_path, capsys):
    assert main(arguments(tmp_path, "--model", "test_finetune:no_layers", "--recipes", "ptq-w8a8")) == 2
    assert (
        "prepare: expected a Linear, Conv1d, Conv2d, ConvTranspose2d or Embedding in the model, got none"
        in capsys.readouterr().err
    )


def test_device_that_is_not_there_is_named(tmp_path, capsys):
    assert "--device: expected a device that this machine has, got 'cuda:99'" in _failing(
        tmp_path, capsys, "--device", "cuda:99"
    )
    assert "got 'abacus'" in _failing(tmp_path, capsys, "--device", "abacus")


def test_missing_data_folder_is_named(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert f"{missing}: expected a folder with train-images-idx3-ubyte" in _failing(
        tmp_path, capsys, "--data", str(missing)
    )


def test_missing_baseline_is_named(tmp_path, capsys):
    missing = tmp_path / "none.safetensors"
    assert main(arguments(tmp_path, "--recipes", "ptq-w8a8", "--baseline", str(missing))) == 2
    assert f"{missing}: expected a float32 checkpoint, got no such file" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other model"])
def test_bad_baseline_is_named(finished, tmp_path, capsys, damage):
    path = tmp_path / "bad.safetensors"
    if damage == "truncated":
        path.write_bytes((finished / "float32.safetensors").read_bytes()[:-100])
    elif damage == "foreign":
        path.write_bytes(b"not a checkpoint at all")
    else:
        qnn.save_checkpoint(path, models.resnet20())
    assert main(arguments(tmp_path, "--recipes", "ptq-w8a8", "--baseline", str(path))) == 2
    assert str(path) in capsys.readouterr().err


def test_damaged_state_file_is_named(tmp_path, capsys, monkeypatch, no_plots):
    command = arguments(tmp_path, "--recipes", "ptq-w8a8", "--epochs", "1")
    with monkeypatch.context() as patch:
        _stop_after(patch, BASELINE, 3)
        assert main(command) == 130
    (tmp_path / "t" / "state" / "float32.pt").write_bytes(b"rubbish")
    capsys.readouterr()
    assert main(command) == 2
    assert "float32.pt: expected the state of this training stage" in capsys.readouterr().err


# Command line, table, plots


def test_defaults_of_the_command_line():
    config = make_config(build_parser().parse_args(["finetune"]))
    assert (config.model, config.data, config.recipes) == (
        "resnet20",
        "fashion-mnist",
        ("qat-w8a8", "qat-w4a4", "ptq-w8a8"),
    )
    config = make_config(build_parser().parse_args(["finetune", "--job", "sst2", "--quick"]))
    assert (config.name, config.batch_size, config.recipes) == ("minilm-sst2-quick", 32, ("qat-w8a8", "qat-w4a8"))
    assert config.baseline_settings().optimizer == "adamw"


@pytest.mark.parametrize("bad", [["--epochs", "-1"], ["--batch-size", "1.5"], ["--lr", "nan"], ["--job", "audio"]])
def test_bad_arguments_end_with_usage(bad, capsys):
    with pytest.raises(SystemExit) as error:
        main(["finetune", *bad])
    assert error.value.code == 2 and bad[0] in capsys.readouterr().err


def test_table_aligns_and_subtracts():
    rows = [
        StageResult("float32", 0.92, 0.2, 1_100_000, 600_000_000, 10, 0.131, 61.4, latency_seconds=0.00216),
        StageResult("qat-w4a4", 0.9135, 0.3, 151_300, 2_610_000_000, 0, None, 185.2),
    ]
    assert table.format_table(rows).splitlines() == [
        "model     accuracy  change  size on disk  latency  peak memory  training step  total time",
        "--------  --------  ------  ------------  -------  -----------  -------------  ----------",
        "float32    92.00 %               1.10 MB   2.2 ms       600 MB         131 ms  1 min 01 s",
        "qat-w4a4   91.35 %   -0.65      151.3 kB               2610 MB    no training  3 min 05 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.000234, "0.23 ms"),
        (0.00994, "9.9 ms"),
        (0.0123, "12 ms"),
        (0.9996, "1.0 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (72, "1 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7510, "2 h 05 min"),
    ],
)
def test_times_are_in_units_that_suit_them(seconds, text):
    assert table.format_seconds(seconds) == text


def test_recipes_are_described_in_words():
    names = ("qat-w4a4", "ptq-w4a8", "fqt-bhq5", "int8-training", "f8net")
    header, rows = recipe_text.recipe_table({name: quantrain.Recipe.from_name(name) for name in names})
    assert "outputs of layers" not in header  # float32 under all of these
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert found["qat-w4a4"]["first and last layer"] == "8 bits" and found["qat-w4a4"]["training"] == "fine-tuned"
    assert found["ptq-w4a8"]["weights"] == "4 bits, a scale per 32 weights, range of least squared error"
    assert found["ptq-w4a8"]["training"] == "calibrated only" and found["ptq-w4a8"]["gradients"] == "float32"
    assert found["f8net"]["weights"] == "8 bits, one scale that is a power of two"
    assert found["fqt-bhq5"]["gradients"].startswith("grad_input from 5 bits householder")
    assert [found[name]["arithmetic"] for name in names[2:]] == [
        "rounded, computed in floating point", "int8 products", "integers throughout",
    ]  # fmt: skip
    for name in quantrain.Recipe.names():
        assert all(recipe_text.recipe_table({name: quantrain.Recipe.from_name(name)})[1][0])


def test_grids_are_in_units_of_codes():
    torch.manual_seed(0)
    model = qnn.prepare(tiny(), "qat-w4a4")
    images = torch.randn(16, 1, 8, 8)
    qnn.calibrate(model, [images])
    (conv, linear) = grids.weight_grids(model)
    assert (conv.layer, linear.layer, linear.quant_min, linear.quant_max, linear.bits) == ("0", "4", -128, 127, 8)
    fake_quant = model[4].weight_fake_quant
    scale, _ = fake_quant.calculate_qparams(model[4].weight)
    expected = (model[4].weight / scale).flatten()
    assert torch.allclose(linear.codes, expected, atol=1e-4)
    inputs = grids.input_grids(model, (images,))
    assert [grid.layer for grid in inputs] == ["0", "4"] and inputs[0].scale is not None
    values = (inputs[0].codes - inputs[0].zero_point) * inputs[0].scale
    assert torch.allclose(values, images.flatten(), atol=1e-4)


def test_choose_layers_takes_the_first_and_the_last():
    assert grids.choose_layers(["a", "b"], 3) == ["a", "b"]
    assert grids.choose_layers(list("abcdefg"), 3) == ["a", "d", "g"]


def test_smooth_is_a_running_mean():
    assert plots.smooth([1, 2, 3, 4], 2).tolist() == [1.0, 1.5, 2.5, 3.5]


def test_metrics_reader_leaves_out_a_broken_line(tmp_path):
    log = metrics.Metrics(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.step("a", step, 0, 1.0, 0.1, 0.0)
    log.evaluation("b", 2, 1, accuracy=0.5, loss=1.0)
    with log.path.open("a") as file:
        file.write('{"stage": "a", "ev')
    assert len(log.read()) == 5
    log.forget_after("a", 2)
    assert [(entry["stage"], entry["step"]) for entry in log.read()] == [("a", 0), ("a", 1), ("b", 2)]
    json.loads(log.path.read_text().splitlines()[-1])


@needs_minilm
def test_sst2_job_end_to_end(tmp_path, no_plots):
    path = tmp_path / "films.tsv"
    good, bad = ("a wonderful film", "i loved it"), ("a terrible film", "i hated it")
    rows = [
        f"{sentence} {number}\t{label}\n"
        for number in range(12)
        for label, group in ((1, good), (0, bad))
        for sentence in group
    ]
    path.write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    command = [
        "finetune",
        "--job",
        "sst2",
        "--data",
        str(path),
        "--runs",
        str(tmp_path),
        "--name",
        "t",
        "--recipes",
        "qat-w4a8",
    ]
    assert main([*command, "--batch-size", "8", "--calibration-batches", "2"]) == 0
    results = read_results(tmp_path / "t")
    assert results[BASELINE].accuracy == 1.0 and results["qat-w4a8"].accuracy >= 0.75
    assert results["qat-w4a8"].weight_bytes < 0.25 * results[BASELINE].weight_bytes


def test_job_api_without_the_command_line(tmp_path, no_plots):
    config = make_config(build_parser().parse_args(arguments(tmp_path, "--recipes", "ptq-w8a8", "--epochs", "0.5")))
    results = job.Job(config).run()
    assert [result.stage for result in results] == [BASELINE, "ptq-w8a8"]
    assert quantrain.Recipe.from_name("ptq-w8a8").training is False
