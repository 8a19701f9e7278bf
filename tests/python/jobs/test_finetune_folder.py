"""The folder of a fine-tuning run: its name, which files are the run's own, and that no other is replaced or
deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra [data])")

from quantrain.finetune import job  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.folder import RunFolder, stage_files  # noqa: E402


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(job.Job, "_plot_grids", lambda *_: None)
    monkeypatch.setattr(job.Job, "_write_report", lambda *_: None)


def arguments(runs: Path, *more: str, name: str = "t") -> list[str]:
    words = "finetune --data digits --model test_finetune:tiny --epochs 1 --max-steps 2 --recipes ptq-w8a8"
    return [*words.split(), "--runs", str(runs), "--name", name, "--calibration-batches", "1", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../other", "{parent}/other", "", ".", "..", "a/b", "a\\b", "a\0b"])
def test_a_name_is_one_entry_of_the_folder_of_runs(tmp_path, capsys, name):
    other, runs = tmp_path / "other", tmp_path / "runs"
    (other / "plots").mkdir(parents=True)
    for file in ("float32.safetensors", "precious.safetensors", "config.json", "plots/mine.png"):
        (other / file).write_text("precious")
    before = contents(other)
    assert main(arguments(runs, "--restart", name=name.format(parent=tmp_path))) == 2
    assert "--name: expected a name without / and \\" in capsys.readouterr().err
    assert contents(other) == before and not runs.exists()


def test_restart_deletes_what_the_run_recorded_and_nothing_else(tmp_path):
    assert main(arguments(tmp_path, "--tensorboard")) == 0
    run = tmp_path / "t"
    assert list((run / "tensorboard").iterdir())
    assert contents(run).keys() <= {"files.json", *json.loads((run / "files.json").read_text())}
    for name in ("mine.safetensors", "plots/mine.png", "notes.txt"):
        (run / name).write_text("mine")
    assert main(arguments(tmp_path, "--restart", "--recipes", "ptq-w4a8")) == 0
    assert all((run / name).read_text() == "mine" for name in ("mine.safetensors", "plots/mine.png", "notes.txt"))
    assert (run / "ptq-w4a8.converted.safetensors").is_file()
    assert not (run / "ptq-w8a8.converted.safetensors").exists() and not (run / "tensorboard").exists()


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_a_file_that_no_run_recorded_is_not_replaced(tmp_path, capsys, more):
    run = tmp_path / "t"
    run.mkdir()
    (run / "float32.safetensors").write_text("precious")
    before = contents(run)
    assert main(arguments(tmp_path, *more)) == 2
    assert "t/float32.safetensors: expected no such file or one that a run recorded" in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_without_a_list_owns_what_its_config_names(tmp_path):
    assert main(arguments(tmp_path)) == 0
    run = tmp_path / "t"
    (run / "files.json").unlink()
    (run / "mine.safetensors").write_text("mine")
    assert main(arguments(tmp_path)) == 0
    (run / "files.json").unlink()
    assert main(arguments(tmp_path, "--restart", "--recipes", "ptq-w4a8")) == 0
    assert (run / "mine.safetensors").read_text() == "mine"
    assert not (run / "ptq-w8a8.converted.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["../precious", "{parent}/precious", "plots/../../precious", "deep/er/precious", "..", ""]
)
def test_a_list_that_names_files_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    run = tmp_path / "t"
    run.mkdir()
    (run / "files.json").write_text(json.dumps(["config.json", name.format(parent=tmp_path)]))
    with pytest.raises(ValueError, match=r"t/files\.json: expected names of files in the run's folder, got"):
        RunFolder(run)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_behind_a_link_is_not_cleared(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "t"
    elsewhere.mkdir()
    (elsewhere / "curves.png").write_text("precious")
    run.mkdir()
    (run / "plots").symlink_to(elsewhere)
    (run / "files.json").write_text(json.dumps(["plots/curves.png"]))
    with pytest.raises(ValueError, match="got 'plots/curves.png' behind a link"):
        RunFolder(run)
    assert (elsewhere / "curves.png").read_text() == "precious"


def test_files_are_recorded_before_they_are_written(tmp_path):
    folder = RunFolder(tmp_path / "t")
    folder.claim(stage_files("float32"))
    assert RunFolder(tmp_path / "t").files == set(stage_files("float32"))
