"""``quantrain quantize`` and ``quantrain evaluate`` on a tiny random Llama: what they print and write, that the folder
is the model, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from quantrain import ptq  # noqa: E402
from quantrain.finetune.arguments import EXIT_ERROR, EXIT_INTERRUPTED  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.lm import models  # noqa: E402
from quantrain.finetune.lm.data import read_tokens  # noqa: E402
from quantrain.finetune.quantize import job, measure, report  # noqa: E402
from quantrain.finetune.quantize.evaluate import EvaluateSettings, run_evaluate  # noqa: E402
from quantrain.finetune.quantize.job import QuantizeSettings, run_quantize  # noqa: E402
from quantrain.finetune.quantize.models import load_any, load_quantized  # noqa: E402
from quantrain.finetune.quantize.writing import new_folder  # noqa: E402

SENTENCE = "The quick brown fox jumps over the lazy dog, number {}. "
SAMPLES, LENGTH, HELD_OUT = 3, 32, 2
RECIPE = "gptq-w4a16"
RECIPES = ("zeroquant-w8a8", "zeroquant-w4a8", "llm-int8", "llm-int8-threshold", "smoothquant-w8a8")
RECIPES += ("smoothquant-w8a8-static", "awq-w4a16", "awq-gptq-w4a8", "w8a16", "nf4")
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"model.safetensors", "quantrain.json", "report.html"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(SENTENCE.format(number) for number in range(40)))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of transformers with the tiny model in several files."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    lm = models.load_language_model(models.TINY)
    lm.model.save_pretrained(folder, max_shard_size="200KB")
    lm.tokenizer.save_pretrained(folder)
    return folder


def settings(text: Path, output: Path, **changes) -> QuantizeSettings:
    values = {"model": models.TINY, "recipe": RECIPE, "calibration": text, "output": output, "target": "quantrain"}
    return QuantizeSettings(**values | {"samples": SAMPLES, "length": LENGTH, "held_out": HELD_OUT} | changes)


def words(
    text: Path | str, output: Path, *more: str, model: Path | str = models.TINY, recipe: str = RECIPE
) -> list[str]:
    named = ["quantize", str(model), "--recipe", recipe, "--calibration", str(text), "--output", str(output)]
    return [*named, "--samples", str(SAMPLES), "--length", str(LENGTH), "--quick", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text) -> tuple[Path, object, torch.Tensor]:
    """A folder, the model that was written to it, still in memory, and that model's logits of the held-out windows."""
    folder = tmp_path_factory.mktemp("out") / "tiny-w4"
    kept = []
    quantize = ptq.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.ptq, "quantize", lambda *args, **options: kept.append(quantize(*args, **options)) or kept[0])
        assert main(words(text, folder)) == 0
    lm = models.load_language_model(models.TINY)
    ids = read_tokens(text, lm.tokenizer)[SAMPLES * LENGTH :][: HELD_OUT * LENGTH].view(HELD_OUT, LENGTH)
    with torch.no_grad():
        return folder, kept[0], measure.predictions(kept[0], ids)


# What quantize leaves


def test_the_folder_has_every_file_and_nothing_stands_beside_it(finished):
    folder, _, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    plain = folder.parent / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode
    plain.rmdir()


def test_the_facts_are_those_of_the_run(finished, text):
    folder, model, _ = finished
    facts = json.loads((folder / "quantrain.json").read_text())
    ids = read_tokens(text, models.load_language_model(models.TINY).tokenizer).tolist()
    used, end = SAMPLES * LENGTH, (SAMPLES + HELD_OUT) * LENGTH
    for part, tokens in (("calibration", ids[:used]), ("held_out", ids[used:end])):
        raw = b"".join(number.to_bytes(4, "little") for number in tokens)
        assert facts[part]["sha256"] == hashlib.sha256(raw).hexdigest()
        assert facts[part]["tokens"] == len(tokens) and facts[part]["file"] == text.name
    assert facts["recipe"]["name"] == RECIPE and facts["target"] == "quantrain"
    assert facts["quantized"]["kl"] == pytest.approx(model.ptq_report.kl, rel=1e-4, abs=1e-7)
    assert facts["quantized"]["top1"] == pytest.approx(model.ptq_report.top1, abs=1e-6)
    assert 0 < facts["quantized"]["kl"] < 0.1 and 0.5 < facts["quantized"]["top1"] <= 1
    assert facts["float"]["perplexity"] == pytest.approx(facts["quantized"]["perplexity"], rel=0.05)
    sizes = facts["sizes"]
    assert sizes["layers"] == 14 and sizes["float_bytes"] == 2 * 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 192)
    assert sizes["bytes"] < sizes["float_bytes"] / 3
    assert str(folder.parent) not in (folder / "quantrain.json").read_text()


def test_the_report_has_its_tables_and_one_picture(finished):
    folder, model, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 and page.count("</table>") == 3
    assert all(row["layer"] in page for row in model.ptq_report.rows)
    assert "top-1" in page and "sha256" in page and "<dt>command</dt>" in page


def test_the_folder_is_the_model(finished, text, capsys):
    folder, model, logits = finished
    lm = load_quantized(folder)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    ids = read_tokens(text, lm.tokenizer)[SAMPLES * LENGTH :][: HELD_OUT * LENGTH].view(HELD_OUT, LENGTH)
    with torch.no_grad():
        assert torch.equal(measure.predictions(lm.model, ids), logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], tensor), name


def test_a_source_folder_is_quantized_alike_and_its_files_are_kept(finished, saved, text, tmp_path, capsys):
    folder, _, _ = finished
    config = json.loads((saved / "config.json").read_text()) | {"_note": "of the source"}
    source = tmp_path / "source"
    shutil.copytree(saved, source)
    (source / "config.json").write_text(json.dumps(config))
    (source / "README.md").write_text("of the source")
    assert main(words(text, tmp_path / "new" / "out", model=source)) == 0
    written = tmp_path / "new" / "out"
    assert {path.name for path in written.iterdir()} == FILES
    for name in FILES - {"model.safetensors", "quantrain.json", "report.html"}:
        assert (written / name).read_bytes() == (source / name).read_bytes(), name
    assert (written / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    printed = capsys.readouterr().out
    assert RECIPE in printed and "top-1" in printed and "no BOS" in printed and "sha256" in printed


def test_skipped_layers_stay_in_floating_point(text, tmp_path):
    result = run_quantize(settings(text, tmp_path / "out", skip=("*.down_proj", "*.o_proj")))
    assert result.sizes["layers"] == 10
    assert isinstance(load_quantized(tmp_path / "out").model.model.layers[0].mlp.down_proj, torch.nn.Linear)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_of_every_recipe_is_the_model(recipe, text, tmp_path, monkeypatch):
    kept = []
    quantize = ptq.quantize
    monkeypatch.setattr(
        job.ptq, "quantize", lambda *args, **options: kept.append(quantize(*args, **options)) or kept[0]
    )
    monkeypatch.setattr(report, "plot_outliers", lambda _, path: path.write_bytes(b""))
    result = run_quantize(settings(text, tmp_path / "out", recipe=recipe))
    assert result.after.kl < 0.1 and result.sizes["bytes"] < result.sizes["float_bytes"]
    ids = read_tokens(text, models.load_language_model(models.TINY).tokenizer, LENGTH)[None]
    with torch.no_grad():
        expected = measure.predictions(kept[0], ids)
        assert torch.equal(measure.predictions(load_quantized(tmp_path / "out").model, ids), expected)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ("on the calibration text." in page) == bool(kept[0].ptq_report.absmax) and "<h2>Outliers</h2>" in page


def test_vllm_s_folder_is_written(text, tmp_path):
    assert main(words(text, tmp_path / "out", "--target", "vllm", recipe="zeroquant-w8a8")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_layers_that_bitsandbytes_cannot_hold_are_named(text, tmp_path, capsys):
    command = words(text, tmp_path / "out", "--target", "bitsandbytes")
    assert_refused(command, "model.layers.0.self_attn.q_proj", tmp_path, capsys)


@pytest.mark.parametrize("name", ["vllm", "bitsandbytes"])
def test_another_target_is_checked_before_and_written_by_the_export(name, text, tmp_path, monkeypatch, capsys):
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
    assert main(words(text, tmp_path / "out", "--target", name, "--skip", "*.o_proj")) == 0
    assert len(sizes) == 12 and sizes["model.layers.1.mlp.down_proj"] == (64, 192)
    assert calls == [("check", name), ("quantize",), ("export", name)]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"theirs"
    assert main(["evaluate", str(tmp_path / "out"), "--text", str(text)]) == EXIT_ERROR
    assert f"--target quantrain, got one for {name}" in capsys.readouterr().err


def test_a_target_that_cannot_express_the_layers_ends_the_run_before_calibration(text, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("check_target: expected layers that vllm has, got model.layers.0.mlp.down_proj")

    monkeypatch.setattr(job.ptq, "check_target", refuse, raising=False)
    monkeypatch.setattr(job.ptq, "quantize", lambda *_, **__: pytest.fail("calibrated"))
    assert_refused(words(text, tmp_path / "out", "--target", "vllm"), "model.layers.0.mlp.down_proj", tmp_path, capsys)


# What evaluate finds


def test_evaluate_gives_the_figures_of_the_folder(finished, saved, text, tmp_path, capsys):
    folder, _, _ = finished
    facts = json.loads((folder / "quantrain.json").read_text())
    lm = models.load_language_model(models.TINY)
    ids = read_tokens(text, lm.tokenizer)[SAMPLES * LENGTH :]
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(lm.tokenizer.decode(ids))
    numbers = ["--windows", str(HELD_OUT), "--length", str(LENGTH)]
    assert main(["evaluate", str(folder), "--text", str(held_out), *numbers, "--against", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert f"{facts['quantized']['perplexity']:.3f}" in printed and facts["held_out"]["sha256"] in printed
    assert f"{facts['quantized']['kl']:.5f} nats" in printed and f"{facts['quantized']['top1']:.4f}" in printed
    assert f"{HELD_OUT} windows x {LENGTH} tokens of held_out.txt" in printed and "no BOS" in printed
    measured = run_evaluate(EvaluateSettings(str(folder), held_out, LENGTH, HELD_OUT, str(saved)))
    for name in ("perplexity", "kl", "top1"):
        assert getattr(measured, name) == facts["quantized"][name], name


def test_the_measures_are_the_formulas():
    generator = torch.Generator().manual_seed(0)
    mine, other = (torch.randn(2, 4, 7, generator=generator).double().log_softmax(-1) for _ in range(2))
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    measured = measure.compare(mine, ids, other)
    loss = -sum(mine[row, place, ids[row, place + 1]] for row in range(2) for place in range(4)) / 8
    kl = (
        sum(other[row, place].exp() @ (other[row, place] - mine[row, place]) for row in range(2) for place in range(4))
        / 8
    )
    assert measured.perplexity == pytest.approx(math.exp(loss)) and measured.kl == pytest.approx(float(kl))
    assert measured.top1 == pytest.approx(float((mine.argmax(-1) == other.argmax(-1)).double().mean()))
    same = measure.compare(mine, ids, iter(mine))
    assert (same.kl, same.top1) == (0.0, 1.0)
    assert measure.compare(mine, ids).kl is None


def test_evaluate_takes_all_windows_of_the_text(text, capsys):
    tokens = len(read_tokens(text, models.load_language_model(models.TINY).tokenizer))
    assert main(["evaluate", models.TINY, "--text", str(text)]) == 0
    assert f"{tokens // 512} windows x 512 tokens of fox.txt" in capsys.readouterr().out


def test_the_first_tokens_of_a_text_are_those_of_the_whole(text, tmp_path):
    tokenizer = models.load_language_model(models.TINY).tokenizer
    whole = read_tokens(text, tokenizer)
    assert whole.tolist() == tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert torch.equal(read_tokens(text, tokenizer, 5), whole[:5])
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "ab"}\n\n{"prompt": "c", "completion": "d"}\n')
    assert tokenizer.decode(read_tokens(lines, tokenizer)) == "ab<|end|>cd<|end|>"
    assert tokenizer.decode(read_tokens(lines, tokenizer, 4)) == "ab<|end|>c"


# The map of outliers


def test_layers_that_share_their_input_share_a_panel():
    x, y = torch.rand(2, 6), torch.rand(2, 6)
    absmax = {f"blocks.{block}.{name}": x[block] for block in range(2) for name in ("q", "k")}
    absmax |= {f"blocks.{block}.down": y[block] for block in range(2)} | {"blocks.1.down.extra": torch.zeros(3)}
    panels = report.outlier_panels(absmax)
    assert list(panels) == ["q, k", "down", "extra"]
    assert torch.equal(panels["q, k"], x.T) and torch.equal(panels["down"], y.T)


def test_a_single_channel_survives_in_the_map(tmp_path):
    values = torch.full((1000, 3), 0.1)
    values[777, 1] = 50
    shown = report._largest_of_neighbors(values)
    assert shown.shape == (250, 3) and shown[777 // 4, 1] == 50 and (shown == 50).sum() == 1
    report.plot_outliers({"a.0": values[:, 0], "a.1": torch.zeros(5)}, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


# What is refused: one line, exit status 2, nothing written


def assert_refused(command: list[str], message: str, tmp_path: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command) == EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"quantrain {command[0]}: error: ") and error.count("\n") == 1, error
    assert message in error, error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.txt", "expected a .txt or .jsonl file, got none"),
        ("", "empty.txt", "expected text, got an empty file"),
        ("too short", "short.txt", "expected 160 tokens, 3 windows of 32 to calibrate and 2 held out, got 9"),
        ("a,b", "table.csv", "expected a .txt or .jsonl file, got one that ends in '.csv'"),
        ('{"text": 3}', "rows.jsonl", "expected text in the field text in line 1, got 3"),
    ],
)
def test_a_bad_text_is_refused(content, name, message, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert_refused(words(path, tmp_path / "out"), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", "tensorrt"), "--target: expected quantrain, vllm or bitsandbytes, got 'tensorrt'"),
        (("--length", "1"), "--length: expected at least 2 tokens, got 1"),
        (("--device", "nowhere"), "--device: expected a device that this machine has"),
        (("--skip", "no.such.layer"), "no.such.layer"),
        (("--max-kl", "1e-9"), "1e-09"),
    ],
)
def test_a_bad_option_is_refused(more, message, text, tmp_path, capsys):
    assert_refused(words(text, tmp_path / "out", *more), message, tmp_path, capsys)


def test_an_unknown_recipe_is_refused_with_the_names(text, tmp_path, capsys):
    command = words(text, tmp_path / "out", recipe="gptq-w9")
    assert_refused(command, "gptq-w4a16", tmp_path, capsys)


def test_a_length_beyond_the_model_is_refused(text, tmp_path, capsys):
    command = words(text, tmp_path / "out", "--length", "1025", "--samples", "1")
    path = tmp_path / "long.txt"
    path.write_text(text.read_text() * 3)
    command[command.index(str(text))] = str(path)
    assert_refused(command, "expected at most the 1024 tokens that tiny Llama (random) has positions", tmp_path, capsys)


def test_an_output_with_files_is_refused(text, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert_refused(words(text, folder), "which has files; --force replaces it", tmp_path, capsys)
    assert_refused(words(text, folder, "--force"), "which has files and no quantrain.json", tmp_path, capsys)
    (tmp_path / "file").write_text("mine")
    assert_refused(words(text, tmp_path / "file"), "which is a file or a link", tmp_path, capsys)


def test_force_replaces_what_the_command_wrote(finished, text, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    (folder / "old").write_text("of an earlier run")
    assert main(words(text, folder, "--force")) == 0
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


def test_ctrl_c_leaves_nothing(text, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job.ptq, "quantize", interrupt)
    assert main(words(text, tmp_path / "out")) == EXIT_INTERRUPTED
    assert "nothing was written" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def _edit_config(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def _remove(pattern: str):
    def edit(folder: Path) -> None:
        for path in sorted(folder.glob(pattern))[:1]:
            path.unlink()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_remove("model-*.safetensors"), "model-00001-of-"),
        (_remove("config.json"), "a folder without config.json"),
        (_remove("tokenizer.json"), "a tokenizer (tokenizer.json)"),
        (_edit_config(model_type="nothing"), "a config.json that transformers knows"),
        (_edit_config(intermediate_size=100), "of shape [64, 100], as config.json says, got [64, 192]"),
        (_edit_config(num_hidden_layers=3), "every weight of LlamaForCausalLM, got none for model.layers.2."),
        (_edit_config(num_hidden_layers=1), "no block beyond config.json's, got model.layers.1."),
        (_edit_config(quantization_config={"quant_method": "gptq"}), "weights in floating point, got them quantized"),
    ],
)
def test_a_bad_model_folder_is_refused(edit, message, saved, text, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(saved, source)
    edit(source)
    assert_refused(words(text, tmp_path / "out", model=source), message, tmp_path, capsys)
    assert_refused(["evaluate", str(source), "--text", str(text)], message, tmp_path, capsys)


def test_a_file_that_is_no_gguf_is_refused(text, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    command = words(text, tmp_path / "out", model=tmp_path / "model.gguf")
    assert_refused(command, "model.gguf", tmp_path, capsys)
    command = words(text, tmp_path / "out", model=tmp_path / "none.gguf")
    assert_refused(command, "MODEL: expected a GGUF file, got ", tmp_path, capsys)


def test_a_disk_that_is_full_leaves_nothing(text, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(job.qnn, "save_checkpoint", fail)
    assert_refused(words(text, tmp_path / "out"), "no space left on device", tmp_path, capsys)


def test_a_quantized_folder_is_not_quantized_again(finished, text, tmp_path, capsys):
    message = "expected a model in floating point"
    assert_refused(words(text, tmp_path / "out", model=finished[0]), message, tmp_path, capsys)


def _write(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_remove("model.safetensors"), "expected a file model.safetensors, got none"),
        (_write("model.safetensors", "x"), "expected a whole safetensors file"),
        (_write("quantrain.json", "{"), "expected what quantrain quantize writes"),
        (_write("config.json", "{"), "expected config.json and tokenizer.json of the model"),
        (_edit_config(intermediate_size=128), "model.safetensors: expected"),
        (_edit_config(num_hidden_layers=1), "model.safetensors: expected"),
    ],
)
def test_a_damaged_folder_is_refused(edit, message, finished, text, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(finished[0], folder)
    edit(folder)
    assert_refused(["evaluate", str(folder), "--text", str(text)], message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--windows", "99"), "--text: expected at least 50688 tokens, 99 windows of 512, got "),
        (("--length", "1"), "--length: expected at least 2 tokens, got 1"),
        (("--against", "nope"), "--against: expected smollm2-135m, tiny-llama"),
    ],
)
def test_bad_options_of_evaluate_are_refused(more, message, text, tmp_path, capsys):
    assert_refused(["evaluate", models.TINY, "--text", str(text), *more], message, tmp_path, capsys)


def test_a_second_model_with_other_tokens_is_refused(saved, text, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["evaluate", models.TINY, "--text", str(text), "--against", str(other)]
    assert_refused(command, "--against: expected a model with the tokens of tiny Llama", tmp_path, capsys)


def test_models_are_loaded_by_what_they_are(finished, saved):
    assert load_any(str(finished[0])).title == f"tiny Llama (random), {RECIPE}"
    assert load_any(str(saved)).title == "tiny"
