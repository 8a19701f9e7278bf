"""``quantrain quantize`` on a tiny random Llama: what it prints and writes, that the folder is the model, and the
folders of other programs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from samples.quantize_command import (  # noqa: E402
    HELD_OUT,
    LENGTH,
    RECIPE,
    SAMPLES,
    assert_refused,
    held_out_windows,
    kept_models,
    logits,
    settings,
    words,
)

import quantrain  # noqa: E402
from quantrain import Recipe, ptq  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune.arguments import EXIT_ERROR, EXIT_INTERRUPTED  # noqa: E402
from quantrain.finetune.cli import build_parser, main  # noqa: E402
from quantrain.finetune.lm import models  # noqa: E402
from quantrain.finetune.lm.data import read_tokens  # noqa: E402
from quantrain.finetune.quantize import job, plan, report  # noqa: E402
from quantrain.finetune.quantize.classifier import CLASSIFIER  # noqa: E402
from quantrain.finetune.quantize.job import run_quantize  # noqa: E402
from quantrain.finetune.quantize.language import LANGUAGE  # noqa: E402
from quantrain.finetune.quantize.models import load_any, load_quantized  # noqa: E402
from quantrain.finetune.quantize.writing import new_folder  # noqa: E402

CALIBRATED = ("llm-int8", "smoothquant-w8a8", "smoothquant-w8a8-static", "awq-w4a16", "awq-gptq-w4a8", "ptq-w8a8")
WITHOUT = ("zeroquant-w8a8", "zeroquant-w4a8", "llm-int8-threshold", "w8a16", "nf4")
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"model.safetensors", "quantrain.json", "report.html"}


@pytest.fixture
def no_picture(monkeypatch):
    """Leave the map of outliers out of runs whose test is about something else."""
    monkeypatch.setattr(report, "plot_outliers", lambda _, path: path.write_bytes(b""))


# What it leaves


def test_the_folder_has_every_file_and_nothing_stands_beside_it(quantized_llama):
    folder = quantized_llama.folder
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    plain = folder.parent / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode
    plain.rmdir()


def test_the_facts_are_those_of_the_run(quantized_llama, fox_text):
    folder, made = quantized_llama.folder, quantized_llama.model.ptq_report
    facts = json.loads((folder / "quantrain.json").read_text())
    ids = read_tokens(fox_text, models.load_language_model(models.TINY).tokenizer).tolist()
    used, end = SAMPLES * LENGTH, (SAMPLES + HELD_OUT) * LENGTH
    for part, tokens in (("calibration", ids[:used]), ("held_out", ids[used:end])):
        raw = b"".join(number.to_bytes(4, "little") for number in tokens)
        assert facts[part]["sha256"] == hashlib.sha256(raw).hexdigest()
        assert facts[part]["tokens"] == len(tokens) and facts[part]["file"] == fox_text.name
        assert facts[part]["windows"] == len(tokens) // LENGTH and facts[part]["length"] == LENGTH
    assert facts["held_out"]["after"] == SAMPLES and facts["task"] == "language model"
    assert facts["recipe"]["name"] == RECIPE and facts["target"] == "quantrain"
    assert facts["quantized"]["kl"] == pytest.approx(made.kl, rel=1e-4, abs=1e-7)
    assert facts["quantized"]["top1"] == pytest.approx(made.top1, abs=1e-6)
    assert 0 < facts["quantized"]["kl"] < 0.1 and 0.5 < facts["quantized"]["top1"] <= 1
    assert facts["float"]["perplexity"] == pytest.approx(facts["quantized"]["perplexity"], rel=0.05)
    assert facts["float"]["kl"] is None and facts["float"]["top1"] is None
    sizes = facts["sizes"]
    assert sizes["layers"] == 14 and sizes["float_bytes"] == 2 * 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 192)
    assert sizes["bytes"] < sizes["float_bytes"] / 3
    assert str(folder.parent) not in (folder / "quantrain.json").read_text()


def test_the_report_has_its_tables_and_one_picture(quantized_llama):
    page = (quantized_llama.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 and page.count("</table>") == 3
    assert all(row["layer"] in page for row in quantized_llama.model.ptq_report.rows)
    assert "top-1" in page and "sha256" in page and "<dt>command</dt>" in page
    assert f"calibrated on {SAMPLES} windows x {LENGTH} tokens of fox.txt" in page


def test_the_folder_is_the_model(quantized_llama, fox_text):
    lm = load_quantized(quantized_llama.folder, LANGUAGE)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    assert torch.equal(logits(LANGUAGE, lm.model, held_out_windows(fox_text)), quantized_llama.logits)
    for name, tensor in quantized_llama.model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], tensor), name


def test_a_source_folder_is_quantized_alike_and_its_files_are_kept(
    quantized_llama, tiny_llama, fox_text, tmp_path, capsys
):
    config = json.loads((tiny_llama / "config.json").read_text()) | {"_note": "of the source"}
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / "config.json").write_text(json.dumps(config))
    (source / "README.md").write_text("of the source")
    assert main(words(fox_text, tmp_path / "new" / "out", model=source)) == 0
    written = tmp_path / "new" / "out"
    assert {path.name for path in written.iterdir()} == FILES
    for name in FILES - {"model.safetensors", "quantrain.json", "report.html"}:
        assert (written / name).read_bytes() == (source / name).read_bytes(), name
    theirs = quantized_llama.folder / "model.safetensors"
    assert (written / "model.safetensors").read_bytes() == theirs.read_bytes()
    printed = capsys.readouterr().out
    assert RECIPE in printed and "top-1" in printed and "no BOS" in printed and "sha256" in printed
    assert f"calibrated on {SAMPLES} windows x {LENGTH} tokens of fox.txt; measured on" in printed


def test_skipped_layers_stay_in_floating_point(fox_text, tmp_path, no_picture):
    result = run_quantize(settings(fox_text, tmp_path / "out", skip=("*.down_proj", "*.o_proj")))
    assert result.sizes["layers"] == 10 and len(result.maxima) == 10
    model = load_quantized(tmp_path / "out", LANGUAGE).model
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)


@pytest.mark.parametrize("recipe", [*CALIBRATED, *WITHOUT])
def test_the_folder_of_every_recipe_is_the_model_and_says_what_calibrated(
    recipe, fox_text, tmp_path, monkeypatch, no_picture, capsys
):
    kept = kept_models(monkeypatch)
    result = run_quantize(settings(fox_text, tmp_path / "out", recipe=recipe))
    assert result.after.kl < 0.1 and result.sizes["bytes"] < result.sizes["float_bytes"]
    texts = held_out_windows(fox_text)
    found = load_quantized(tmp_path / "out", LANGUAGE).model
    assert torch.equal(logits(LANGUAGE, found, texts), logits(LANGUAGE, kept[0], texts))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    facts = json.loads((tmp_path / "out" / "quantrain.json").read_text())
    assert ("on the calibration text." in page) == bool(kept[0].ptq_report.absmax) and "<h2>Outliers</h2>" in page
    printed = capsys.readouterr().out
    assert facts["held_out"]["sha256"] == texts.sha256 and facts["held_out"]["after"] == SAMPLES
    if recipe in CALIBRATED:
        assert f"{recipe}: calibrated on" in printed and "calibrated on" in page
        assert facts["calibration"]["windows"] == SAMPLES and "since the recipe needs no" not in page
    else:
        assert "no calibration needed; measured on" in printed and "without calibration; measured on" in page
        assert facts["calibration"] is None and "calibrated on 3" not in page
        assert "since the recipe needs no calibration" in page


def test_texts_that_are_distilled_on_are_said_to_be(fox_text, tmp_path, no_picture, capsys):
    recipe = qnn.changed_recipe(Recipe.from_name("zeroquant-w8a8-lkd"), {"scheme": {"distill_steps": 2}})
    recipe.name = "short"
    (tmp_path / "short.json").write_text(recipe.to_json())
    run_quantize(settings(fox_text, tmp_path / "out", recipe=str(tmp_path / "short.json")))
    assert "short: distilled on 3 windows" in capsys.readouterr().out
    assert "distilled on 3 windows" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "quantrain.json").read_text())["calibration"]["windows"] == SAMPLES


def test_keys_and_values_alone_are_quantized(fox_text, tmp_path, no_picture):
    result = run_quantize(settings(fox_text, tmp_path / "out", recipe="kv-int8"))
    assert result.sizes["layers"] == 0 and 0 < result.after.kl < 0.1


def test_the_help_names_the_numbers_of_the_tasks(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["quantize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for task in (LANGUAGE, CLASSIFIER):
        assert f"calibrate ({task.normal.samples}; --quick: {task.quick.samples})" in text
    assert f"tokens of a window ({LANGUAGE.normal.length}; --quick: {LANGUAGE.quick.length})" in text
    assert f"a sentence at most ({CLASSIFIER.normal.length})" in text and CLASSIFIER.quick.length == 512


# What is known before any work


@pytest.mark.parametrize("recipe", ["gptq-w4a16", "zeroquant-w8a8", "w8a16", "nf4", "ptq-w8a8", "int8-static"])
def test_the_plan_is_what_prepare_does(recipe):
    lm = models.load_language_model(models.TINY)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    found = plan.plan_of(lm.model, Recipe.from_name(recipe), ("*.o_proj",))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    prepared = qnn.prepare(lm.model, recipe, skip=["*.o_proj"])
    rows = [row["layer"] for row in prepared.quantization_summary.rows]
    assert sorted([*found.linear, *found.others]) == sorted(rows)
    waiting = [m for m in prepared.modules() if isinstance(m, qnn.QuantLayer) and m.missing_range() is not None]
    assert found.calibrates == bool(waiting)
    assert found.linear["model.layers.1.mlp.down_proj"] == (64, 192)
    assert ("model.embed_tokens" in found.others) == (recipe in ("w8a16", "ptq-w8a8"))


def test_the_statistics_of_the_recipes_are_those_of_the_library():
    lm = models.load_language_model(models.TINY)
    for name in Recipe.names():
        recipe = Recipe.from_name(name)
        if recipe.scheme is not None and recipe.scheme.kind == "ptq" and recipe.weight is not None:
            stored = recipe.input is not None and recipe.input.observer != "dynamic"
            needed = quantrain._C.ptq_statistics(recipe)[0] or stored
            assert plan.plan_of(lm.model, recipe).calibrates == needed, name


# Other programs


def test_vllm_s_folder_is_written(fox_text, tmp_path):
    assert main(words(fox_text, tmp_path / "out", "--target", "vllm", recipe="zeroquant-w8a8")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_layers_that_are_not_linear_are_refused_before_any_work(fox_text, tmp_path, monkeypatch, capsys):
    quantize = ptq.quantize
    monkeypatch.setattr(job.ptq, "quantize", lambda *_, **__: pytest.fail("converted"))
    command = words(fox_text, tmp_path / "out", "--target", "vllm", recipe="w8a16")
    message = "--target vllm: expected Linear layers alone to be quantized, got 'model.embed_tokens' (Embedding); "
    assert_refused(command, message + "--skip model.embed_tokens leaves it in floating point", tmp_path, capsys)
    monkeypatch.setattr(job.ptq, "quantize", quantize)
    assert main([*command, "--skip", "model.embed_tokens"]) == 0


def test_layers_that_bitsandbytes_cannot_hold_are_named(fox_text, tmp_path, capsys):
    command = words(fox_text, tmp_path / "out", "--target", "bitsandbytes")
    assert_refused(command, "model.layers.0.self_attn.q_proj", tmp_path, capsys)


@pytest.mark.parametrize("name", ["vllm", "bitsandbytes"])
def test_another_target_is_checked_before_and_written_by_the_export(name, fox_text, tmp_path, monkeypatch, capsys):
    calls = []
    sizes = {}

    def check(layers, recipe, target):
        calls.append(("check", target))
        sizes.update(layers)

    monkeypatch.setattr(job.ptq, "check_target", check, raising=False)
    quantize = ptq.quantize
    monkeypatch.setattr(job.ptq, "quantize", lambda *a, **k: calls.append(("quantize",)) or quantize(*a, **k))

    def export(model, path, target):
        calls.append(("export", target))
        (Path(path) / "model.safetensors").write_bytes(b"theirs")

    monkeypatch.setattr(job.ptq, "export_model", export, raising=False)
    assert main(words(fox_text, tmp_path / "out", "--target", name, "--skip", "*.o_proj")) == 0
    assert len(sizes) == 12 and sizes["model.layers.1.mlp.down_proj"] == (64, 192)
    assert calls == [("check", name), ("quantize",), ("export", name)]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"theirs"
    assert main(["evaluate", str(tmp_path / "out"), "--text", str(fox_text)]) == EXIT_ERROR
    assert f"--target quantrain, got one for {name}" in capsys.readouterr().err


def test_a_target_that_cannot_express_the_layers_ends_the_run_before_calibration(
    fox_text, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise ValueError("check_target: expected layers that vllm has, got model.layers.0.mlp.down_proj")

    monkeypatch.setattr(job.ptq, "check_target", refuse, raising=False)
    monkeypatch.setattr(job.ptq, "quantize", lambda *_, **__: pytest.fail("calibrated"))
    assert_refused(words(fox_text, tmp_path / "out", "--target", "vllm"), "layers.0.mlp.down_proj", tmp_path, capsys)


# The folder, whole or not at all


def test_force_replaces_what_the_command_wrote(quantized_llama, fox_text, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(quantized_llama.folder, folder)
    (folder / "old").write_text("of an earlier run")
    assert main(words(fox_text, folder, "--force")) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(folder, force=False) as made:
        (made / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()  # an empty one is taken
    with new_folder(folder, force=False) as made:
        (made / "quantrain.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["quantrain.json"]
    with pytest.raises(OSError), new_folder(folder, force=True) as made:
        raise OSError("disk full")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "quantrain.json"]


def test_ctrl_c_leaves_nothing(fox_text, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job.ptq, "quantize", interrupt)
    assert main(words(fox_text, tmp_path / "out")) == EXIT_INTERRUPTED
    assert "nothing was written" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_models_are_loaded_by_what_they_are(quantized_llama, tiny_llama):
    assert load_any(str(quantized_llama.folder), LANGUAGE).title == f"tiny Llama (random), {RECIPE}"
    assert load_any(str(tiny_llama), LANGUAGE).title == "tiny"


# Rotations, and recipes for more than layers


def test_a_rotated_model_is_read_again(tiny_llama, fox_text, tmp_path, monkeypatch, no_picture):
    kept = kept_models(monkeypatch)
    folder = tmp_path / "rotated"
    run_quantize(settings(fox_text, folder, model=str(tiny_llama), recipe="zeroquant-w8a8", rotate=True))
    facts = json.loads((folder / "quantrain.json").read_text())
    assert facts["rotated"] and facts["quantized"]["kl"] < 0.05
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    (model,), again = kept, load_quantized(folder, LANGUAGE).model
    gain = again.model.layers[0].input_layernorm.weight
    assert torch.equal(gain, torch.ones_like(gain)) and again.lm_head.weight is not again.model.embed_tokens.weight
    windows = held_out_windows(fox_text)
    assert torch.equal(logits(LANGUAGE, again, windows), logits(LANGUAGE, model, windows))


def test_int8_keys_and_values_are_read_again(fox_text, tmp_path, monkeypatch, no_picture):
    kept = kept_models(monkeypatch)
    run_quantize(settings(fox_text, tmp_path / "kv", recipe="kv-int8"))
    facts = json.loads((tmp_path / "kv" / "quantrain.json").read_text())
    assert facts["calibration"] is None and facts["sizes"]["layers"] == 0 and 0 < facts["quantized"]["kl"] < 0.01
    (model,), windows = kept, held_out_windows(fox_text)
    again = load_quantized(tmp_path / "kv", LANGUAGE).model
    assert torch.equal(logits(LANGUAGE, again, windows), logits(LANGUAGE, model, windows))
    assert not torch.equal(
        logits(LANGUAGE, again, windows), logits(LANGUAGE, load_any(models.TINY, LANGUAGE).model, windows)
    )
