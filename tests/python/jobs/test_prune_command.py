"""``quantrain prune`` on tiny random models: the zeros of each method, the folder that transformers reads, what other
commands do with it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from samples.quantize_command import (  # noqa: E402
    HELD_OUT,
    LENGTH,
    SAMPLES,
    assert_refused,
    edit_config,
    held_out_windows,
    logits,
)

import quantrain.prune as qprune  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune.arguments import EXIT_INTERRUPTED  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.lm.data import read_tokens  # noqa: E402
from quantrain.finetune.lm.models import TINY, load_language_model  # noqa: E402
from quantrain.finetune.prune import job  # noqa: E402
from quantrain.finetune.prune.job import PruneSettings, run_prune  # noqa: E402
from quantrain.finetune.quantize.language import LANGUAGE  # noqa: E402
from quantrain.finetune.quantize.models import load_quantized  # noqa: E402

FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"model.safetensors", "quantrain.json"}
SHARES = (("magnitude", 0.3), ("global", 0.5), ("wanda", 0.5), ("sparsegpt", 0.5))
LAYERS = ["model.layers.*"]


def words(text: Path | None, output: Path, *more: str, model: Path | str = TINY, method: str = "wanda") -> list[str]:
    """The command line of a run, in which ``more`` has the sparsity."""
    named = ["prune", str(model), "--method", method, "--output", str(output)]
    file = [] if text is None else ["--calibration", str(text)]
    return [*named, *file, "--samples", str(SAMPLES), "--length", str(LENGTH), "--quick", *more]


def read_back(folder: Path, auto_class: str = "AutoModelForCausalLM", **options):
    return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, **options).eval()


def pruned_in_process(method: str, text: Path, share: float, pattern: str | None):
    """The tiny Llama, pruned by the package's own functions."""
    lm = load_language_model(TINY)
    if method in ("magnitude", "global"):
        scope = "global" if method == "global" else "layer"
        qprune.magnitude(lm.model, share, scope=scope, pattern=pattern, layers=LAYERS)
        return lm.model
    ids = read_tokens(text, lm.tokenizer)[: SAMPLES * LENGTH].view(SAMPLES, 1, LENGTH)
    chosen = {} if pattern is None else {"pattern": pattern}
    getattr(qprune, method)(lm.model, share, list(ids), layers=LAYERS, forward=LANGUAGE.forward, **chosen)
    return lm.model


def linear_weights(model) -> dict[str, torch.Tensor]:
    """Of the blocks."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def shares(model) -> dict[str, float]:
    return {name: float((weight == 0).double().mean()) for name, weight in linear_weights(model).items()}


@pytest.fixture(scope="module")
def half(tmp_path_factory, fox_text) -> Path:
    """What a run of Wanda wrote."""
    folder = tmp_path_factory.mktemp("out") / "half"
    assert main(words(fox_text, folder, "--sparsity", "0.5")) == 0
    return folder


# What it leaves


@pytest.mark.parametrize(
    ("method", "share", "pattern"),
    [*((method, share, None) for method, share in SHARES)]
    + [(method, 0.5, "2:4") for method in ("magnitude", "wanda", "sparsegpt")],
)
def test_every_method_writes_its_zeros(method, share, pattern, fox_text, tmp_path, capsys):
    asked = ("--pattern", pattern) if pattern else ("--sparsity", str(share))
    assert main(words(fox_text, tmp_path / "out", *asked, method=method)) == 0
    assert "perplexity" in capsys.readouterr().out
    model = read_back(tmp_path / "out")
    weights = linear_weights(model)
    assert len(weights) == 14
    elements = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    if method == "magnitude":
        assert zeros == sum(round(share * weight.numel()) for weight in weights.values())
    else:
        assert zeros == round(share * elements)
    if method != "global":
        assert all(int((w == 0).sum()) == round(share * w.numel()) for w in weights.values())
    if pattern:
        assert all(bool((w.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()) for w in weights.values())
    if method == "wanda" and not pattern:
        assert all(bool(((w == 0).sum(1) == w.shape[1] // 2).all()) for w in weights.values())
    expected = pruned_in_process(method, fox_text, share, pattern)
    texts = held_out_windows(fox_text)
    assert torch.equal(logits(LANGUAGE, model, texts), logits(LANGUAGE, expected, texts))
    dense = load_language_model(TINY).model
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_folder_and_its_facts(half):
    assert {path.name for path in half.iterdir()} == FILES
    assert [path.name for path in half.parent.iterdir()] == [half.name]
    facts = json.loads((half / "quantrain.json").read_text())
    assert (facts["method"], facts["sparsity"], facts["pattern"]) == ("wanda", 0.5, None)
    assert facts["total"] == {"number": 14, "elements": 98304, "zeros": 49152, "sparsity": 0.5}
    assert [row["layers"] for row in facts["layers"]][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert facts["calibration"]["windows"] == SAMPLES and facts["held_out"]["windows"] == HELD_OUT
    assert facts["held_out"]["after"] == SAMPLES and facts["dense"]["kl"] is None
    assert facts["pruned"]["kl"] > 0 and facts["pruned"]["perplexity"] != facts["dense"]["perplexity"]
    assert str(half.parent) not in json.dumps(facts)


def test_without_a_file_nothing_is_measured(tmp_path, capsys):
    assert main(words(None, tmp_path / "out", "--sparsity", "0.5", method="magnitude")) == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed and "perplexity" not in printed and "49,152  50.00 %" in printed
    facts = json.loads((tmp_path / "out" / "quantrain.json").read_text())
    assert facts["held_out"] is facts["dense"] is facts["pruned"] is facts["calibration"] is None


def test_magnitude_is_measured_on_the_same_windows(half, fox_text, tmp_path):
    assert main(words(fox_text, tmp_path / "out", "--sparsity", "0.5", method="magnitude")) == 0
    theirs, mine = (json.loads((path / "quantrain.json").read_text()) for path in (half, tmp_path / "out"))
    assert mine["held_out"] == theirs["held_out"] and mine["dense"] == theirs["dense"]
    assert mine["calibration"] is None


def test_skipped_layers_stay_dense(fox_text, tmp_path):
    settings = PruneSettings(
        TINY, "sparsegpt", tmp_path / "out", 0.5, None, fox_text, SAMPLES, LENGTH, HELD_OUT, skip=("*.down_proj",)
    )
    assert run_prune(settings).total["number"] == 12
    for name, share in shares(read_back(tmp_path / "out")).items():
        assert share == (0 if name.endswith("down_proj") else 0.5), name


def test_a_source_in_bfloat16_stays_in_it_and_its_files_are_kept(tiny_llama, fox_text, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_llama, source)
    read_back(source, dtype=torch.bfloat16).save_pretrained(source)
    for shard in source.glob("model-0*"):
        shard.unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    edit_config(_note="of the source")(source)
    command = words(fox_text, out, "--sparsity", "0.5", model=source, method="sparsegpt")
    assert main(command) == 0
    for name in FILES - {"model.safetensors", "quantrain.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    model = read_back(out, dtype="auto")
    assert model.dtype == torch.bfloat16 and set(shares(model).values()) == {0.5}
    facts = json.loads((out / "quantrain.json").read_text())
    found = LANGUAGE.log_probabilities(model.float(), held_out_windows(fox_text), torch.device("cpu"))
    measured = LANGUAGE.compare(found, held_out_windows(fox_text))
    assert facts["dtype"] == "bfloat16" and facts["pruned"]["perplexity"] == pytest.approx(measured.score, rel=1e-6)


def test_a_classifier_is_pruned_in_its_blocks_alone(tmp_path, capsys):
    source, out, text = tmp_path / "bert", tmp_path / "out", tmp_path / "dev.tsv"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]) + "\n")
    transformers.BertTokenizerFast.from_pretrained(source).save_pretrained(source)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    dense = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=7, num_labels=2, **sizes))
    dense.save_pretrained(source)
    text.write_text("sentence\tlabel\n" + "".join(f"{'good ' * (n % 3 + 1)}bad\t{n % 2}\n" for n in range(12)))
    assert main(words(text, out, "--pattern", "2:4", model=source)) == 0
    assert "accuracy" in capsys.readouterr().out
    model = read_back(out, "AutoModelForSequenceClassification")
    for name, tensor in model.state_dict().items():
        if ".layer." in name and name.endswith(".weight") and tensor.dim() == 2:
            assert bool((tensor.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()), name
        else:
            assert torch.equal(tensor, dense.state_dict()[name]), name
    assert main(["evaluate", str(out), "--text", str(text), "--against", str(source)]) == 0


# What the other commands do with it


def test_quantize_keeps_the_zeros_as_codes_of_zero(half, fox_text, tmp_path):
    out = tmp_path / "w8"
    command = ["quantize", str(half), "--recipe", "w8a16", "--calibration", str(fox_text), "--output", str(out)]
    assert main([*command, "--samples", str(SAMPLES), "--length", str(LENGTH), "--quick"]) == 0
    model = load_quantized(out, LANGUAGE).model
    quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, qnn.QuantizedLayer)}
    for name, weight in linear_weights(read_back(half)).items():
        codes = quantized[name].weight_codes
        assert codes.dtype == torch.int8 and bool((codes[weight == 0] == 0).all()), name


def test_evaluate_compares_it_with_its_source(half, fox_text, capsys):
    text = ["--text", str(fox_text), "--length", str(LENGTH), "--windows", "2"]
    assert main(["evaluate", str(half), *text, "--against", TINY]) == 0
    printed = capsys.readouterr().out
    assert "half" in printed and "tiny Llama (random)" in printed
    assert main(["evaluate", TINY, *text, "--against", str(half)]) == 0


def test_force_replaces_the_folder_and_pruning_goes_on_from_it(half, fox_text, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(half, out)
    assert_refused(words(fox_text, out, "--sparsity", "0.75"), "which has files; --force", tmp_path, capsys)
    assert main(words(fox_text, out, "--sparsity", "0.75", "--force", model=out)) == 0
    assert set(shares(read_back(out)).values()) == {0.75}
    before = linear_weights(read_back(half))
    assert all(bool((w[before[name] == 0] == 0).all()) for name, w in linear_weights(read_back(out)).items())


# What is refused


@pytest.mark.parametrize(
    ("more", "method", "message"),
    [
        (("--sparsity", "1.5"), "wanda", "--sparsity: expected a share in [0, 1), got 1.5"),
        (("--sparsity", "1"), "wanda", "--sparsity: expected a share in [0, 1), got 1"),
        (("--sparsity", "-0.1"), "wanda", "--sparsity: expected a share in [0, 1), got -0.1"),
        (("--sparsity", "nan"), "wanda", "--sparsity: expected a share in [0, 1), got nan"),
        ((), "wanda", "--sparsity: expected one of --sparsity and --pattern, got neither"),
        (("--sparsity", "0.5", "--pattern", "2:4"), "wanda", "expected one of --sparsity and --pattern, got both"),
        (("--pattern", "4:2"), "wanda", "--pattern: expected N:M with N below M, such as 2:4, got '4:2'"),
        (("--pattern", "half"), "wanda", "--pattern: expected N:M with N below M, such as 2:4, got 'half'"),
        (("--pattern", "2:4"), "global", "--pattern: expected --sparsity with global"),
        (("--pattern", "2:6"), "sparsegpt", "--pattern: expected an M that divides 128 with sparsegpt, got '2:6'"),
        (("--sparsity", "0.5"), "random", "--method: expected magnitude, global, wanda or sparsegpt, got 'random'"),
        (("--sparsity", "0.5", "--length", "1"), "wanda", "--length: expected at least 2 tokens, got 1"),
        (("--sparsity", "0.5", "--device", "nowhere"), "wanda", "--device: expected a device that this machine has"),
    ],
)
def test_a_bad_option_is_refused_before_the_model_is_opened(
    more, method, message, fox_text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(job, "load_float", lambda *_: pytest.fail("opened"))
    assert_refused(words(fox_text, tmp_path / "out", *more, method=method), message, tmp_path, capsys)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_calibrated_method_needs_a_file(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "load_float", lambda *_: pytest.fail("opened"))
    message = f"--calibration: expected a file of texts, which {method} looks at, got none"
    assert_refused(words(None, tmp_path / "out", "--sparsity", "0.5", method=method), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--skip", "no.such.layer"),
            "--skip: expected every pattern to name a layer that can be pruned, got 'no.such",
        ),
        (("--skip", "lm_head"), "--skip: expected every pattern to name a layer that can be pruned, got 'lm_head'"),
        (("--skip", "*"), "MODEL: expected at least one layer to prune, got none"),
        (("--samples", "1000"), "--calibration: expected 32064 tokens, 1000 windows of 32 to prune on and 2 held out"),
    ],
)
def test_what_the_model_and_the_text_do_not_have_is_refused(more, message, fox_text, tmp_path, capsys):
    assert_refused(words(fox_text, tmp_path / "out", "--sparsity", "0.5", *more), message, tmp_path, capsys)


def test_rows_that_the_pattern_does_not_divide_are_refused(fox_text, tmp_path, capsys):
    message = (
        "--pattern: expected rows of a multiple of 5 for '2:5', got 64 in 'model.layers.0.self_attn.q_proj.weight'"
    )
    assert_refused(words(fox_text, tmp_path / "out", "--pattern", "2:5"), message, tmp_path, capsys)


def test_bad_files_are_refused(fox_text, quantized_llama, tmp_path, capsys):
    more = ("--sparsity", "0.5")
    assert_refused(words(tmp_path / "no.txt", tmp_path / "out", *more), "got none", tmp_path, capsys)
    command = words(fox_text, tmp_path / "out", *more, model=quantized_llama.folder)
    assert_refused(command, "MODEL: expected a model in floating point", tmp_path, capsys)
    command = words(fox_text, tmp_path / "out", *more, model=tmp_path / "none")
    assert_refused(command, "MODEL: expected smollm2-135m, tiny-llama, ", tmp_path, capsys)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no space left")])
def test_nothing_is_left_of_a_run_that_stops_while_it_writes(error, fox_text, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", stop)
    command = words(fox_text, tmp_path / "out", "--sparsity", "0.5")
    if isinstance(error, KeyboardInterrupt):
        assert main(command) == EXIT_INTERRUPTED
    else:
        message = "--output: expected a place that the model can be written to, got no space left"
        assert_refused(command, message, tmp_path, capsys)
    assert not list(tmp_path.iterdir())
