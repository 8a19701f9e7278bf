"""``quantrain evaluate`` on a tiny random Llama, and the measures and the map of outliers behind both commands."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from samples.quantize_command import HELD_OUT, LENGTH, SAMPLES  # noqa: E402

from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.lm import models  # noqa: E402
from quantrain.finetune.lm.data import read_tokens  # noqa: E402
from quantrain.finetune.quantize import report  # noqa: E402
from quantrain.finetune.quantize.evaluate import EvaluateSettings, run_evaluate  # noqa: E402
from quantrain.finetune.quantize.language import LANGUAGE, Windows  # noqa: E402


def test_evaluate_gives_the_figures_of_the_folder(quantized_llama, tiny_llama, fox_text, tmp_path, capsys):
    folder = quantized_llama.folder
    facts = json.loads((folder / "quantrain.json").read_text())
    lm = models.load_language_model(models.TINY)
    ids = read_tokens(fox_text, lm.tokenizer)[SAMPLES * LENGTH :]
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(lm.tokenizer.decode(ids))
    numbers = ["--windows", str(HELD_OUT), "--length", str(LENGTH)]
    assert main(["evaluate", str(folder), "--text", str(held_out), *numbers, "--against", str(tiny_llama)]) == 0
    printed = capsys.readouterr().out
    assert f"{facts['quantized']['perplexity']:.3f}" in printed and facts["held_out"]["sha256"] in printed
    assert f"{facts['quantized']['kl']:.5f} nats" in printed and f"{facts['quantized']['top1']:.4f}" in printed
    assert f"{HELD_OUT} windows x {LENGTH} tokens of held_out.txt" in printed and "no BOS" in printed
    measured = run_evaluate(EvaluateSettings(str(folder), held_out, LENGTH, HELD_OUT, str(tiny_llama)))
    assert LANGUAGE.named(measured) == facts["quantized"]


def test_the_measures_are_the_formulas():
    generator = torch.Generator().manual_seed(0)
    mine, other = (torch.randn(2, 4, 7, generator=generator).double().log_softmax(-1) for _ in range(2))
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    windows = Windows("x.txt", ids)
    measured = LANGUAGE.compare(mine, windows, other)
    loss = -sum(mine[row, place, ids[row, place + 1]] for row in range(2) for place in range(4)) / 8
    kl = (
        sum(other[row, place].exp() @ (other[row, place] - mine[row, place]) for row in range(2) for place in range(4))
        / 8
    )
    assert measured.score == pytest.approx(math.exp(loss)) and measured.kl == pytest.approx(float(kl))
    assert measured.agreement == pytest.approx(float((mine.argmax(-1) == other.argmax(-1)).double().mean()))
    same = LANGUAGE.compare(mine, windows, iter(mine))
    assert (same.kl, same.agreement) == (0.0, 1.0)
    assert LANGUAGE.compare(mine, windows).kl is None


def test_evaluate_takes_all_windows_of_the_text(fox_text, capsys):
    tokens = len(read_tokens(fox_text, models.load_language_model(models.TINY).tokenizer))
    assert main(["evaluate", models.TINY, "--text", str(fox_text)]) == 0
    assert f"{tokens // 512} windows x 512 tokens of fox.txt" in capsys.readouterr().out


def test_the_first_tokens_of_a_text_are_those_of_the_whole(fox_text, tmp_path):
    tokenizer = models.load_language_model(models.TINY).tokenizer
    whole = read_tokens(fox_text, tokenizer)
    assert whole.tolist() == tokenizer(fox_text.read_text(), add_special_tokens=False)["input_ids"]
    assert torch.equal(read_tokens(fox_text, tokenizer, 5), whole[:5])
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
