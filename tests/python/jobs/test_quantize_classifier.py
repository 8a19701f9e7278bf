"""``quantrain quantize`` and ``quantrain evaluate`` on a sequence classifier: a tiny random BERT, and MiniLM on SST-2
where both are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from samples.quantize_command import assert_refused, edit_config, kept_models, logits  # noqa: E402

from quantrain.finetune import minilm  # noqa: E402
from quantrain.finetune.arguments import EXIT_ERROR  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.quantize import report  # noqa: E402
from quantrain.finetune.quantize.classifier import CLASSIFIER, Sentences  # noqa: E402
from quantrain.finetune.quantize.evaluate import EvaluateSettings, run_evaluate  # noqa: E402
from quantrain.finetune.quantize.job import QuantizeSettings, run_quantize  # noqa: E402
from quantrain.finetune.quantize.models import load_quantized, task_of  # noqa: E402
from quantrain.finetune.text import read_tsv  # noqa: E402

WORDS = (
    "a",
    "an",
    "the",
    "film",
    "is",
    "was",
    "good",
    "bad",
    "dull",
    "bright",
    "very",
    "not",
    "and",
    "but",
    "it",
    "plot",
)
SAMPLES, ROWS = 12, 60
RECIPES = ("zeroquant-w8a8", "llm-int8", "smoothquant-w8a8-static", "gptq-w4a16", "awq-w4a16", "w8a16", "nf4")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder of transformers with a BERT of two layers, random weights and a word for a token."""
    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=24,
        num_labels=2,
        initializer_range=0.2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(first: int = 0, last: int = ROWS) -> list[tuple[str, int]]:
    """Sentences of 1 to 30 words, some beyond the model's positions."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for place in range(ROWS):
        length = int(torch.randint(1, 31 if place % 10 == 0 else 9, (1,), generator=generator))
        chosen = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        found.append((" ".join(WORDS[word] for word in chosen), place % 2))
    return found[first:last]


def write_rows(path: Path, sentences: list[tuple[str, object]]) -> Path:
    separator = "," if path.suffix == ".csv" else "\t"
    lines = [f"sentence{separator}label", *(f"{sentence}{separator}{label}" for sentence, label in sentences)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("text") / "dev.tsv", rows())


def words(model: Path, text: Path, output: Path, *more: str, recipe: str = "llm-int8") -> list[str]:
    named = ["quantize", str(model), "--recipe", recipe, "--calibration", str(text), "--output", str(output)]
    return [*named, "--samples", str(SAMPLES), *more]


def settings(model: Path, text: Path, output: Path, recipe: str = "llm-int8", **changes) -> QuantizeSettings:
    return QuantizeSettings(str(model), recipe, text, output, **{"samples": SAMPLES} | changes)


@pytest.fixture
def no_picture(monkeypatch):
    """Leave the map of outliers out of runs whose test is about something else."""
    monkeypatch.setattr(report, "plot_outliers", lambda _, path: path.write_bytes(b""))


@torch.no_grad()
def answers(folder: Path, sentences: list[str]) -> torch.Tensor:
    """Log-probabilities ``[N, classes]`` of a float model, sentence by sentence."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cut = model.config.max_position_embeddings
    encoded = [tokenizer(s, truncation=True, max_length=cut, return_tensors="pt") for s in sentences]
    return torch.cat([model(**one).logits for one in encoded]).double().log_softmax(-1)


# What quantize leaves


def test_a_classifier_is_quantized_and_measured(tiny_bert, labelled, tmp_path, capsys):
    assert main(words(tiny_bert, labelled, tmp_path / "out")) == 0
    held_out = ROWS - SAMPLES
    printed = capsys.readouterr().out
    assert (
        f"tiny-bert, llm-int8: calibrated on {SAMPLES} sentences of dev.tsv; measured on {held_out} sentences"
        in printed
    )
    assert all(column.header in printed for column in CLASSIFIER.columns) and "without padding" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "quantrain.json", "report.html"} <= names
    facts = json.loads((tmp_path / "out" / "quantrain.json").read_text())
    assert facts["task"] == "sequence classifier"
    assert facts["calibration"]["sentences"] == SAMPLES and facts["held_out"]["sentences"] == held_out
    found = answers(tiny_bert, [sentence for sentence, _ in rows(SAMPLES)])
    labels = torch.tensor([label for _, label in rows(SAMPLES)])
    accuracy = float((found.argmax(-1) == labels).double().mean())
    assert facts["float"] == {"accuracy": pytest.approx(accuracy), "kl": None, "same": None}
    assert 0 < facts["quantized"]["kl"] < 0.01 and facts["quantized"]["same"] > 0.9
    assert facts["sizes"]["layers"] == 2 * 6 + 1  # the pooler's too, the classifier stays
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 and "accuracy" in page and "perplexity" not in page
    assert f"calibrated on {SAMPLES} sentences of dev.tsv" in page


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluate_gives_the_figures_of_the_folder(recipe, tiny_bert, labelled, tmp_path, monkeypatch, no_picture):
    kept = kept_models(monkeypatch)
    result = run_quantize(settings(tiny_bert, labelled, tmp_path / "out", recipe))
    held_out = write_rows(tmp_path / "held_out.tsv", rows(SAMPLES))
    measured = run_evaluate(EvaluateSettings(str(tmp_path / "out"), held_out, against=str(tiny_bert)))
    assert measured == result.after
    facts = json.loads((tmp_path / "out" / "quantrain.json").read_text())
    assert CLASSIFIER.named(measured) == facts["quantized"]
    lm = load_quantized(tmp_path / "out", CLASSIFIER)
    texts = CLASSIFIER.read(held_out, lm, 512, None)
    assert facts["held_out"]["sha256"] == texts.sha256
    assert torch.equal(logits(CLASSIFIER, lm.model, texts), logits(CLASSIFIER, kept[0], texts))


def test_a_recipe_without_calibration_is_only_measured(tiny_bert, labelled, tmp_path, no_picture, capsys):
    run_quantize(settings(tiny_bert, labelled, tmp_path / "out", "zeroquant-w8a8"))
    assert "no calibration needed; measured on 48 sentences of dev.tsv, after its first 12" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "quantrain.json").read_text())["calibration"] is None


def test_labels_may_be_names_in_a_tsv(tiny_bert, labelled, tmp_path, capsys):
    names = json.loads((tiny_bert / "config.json").read_text())["id2label"]
    named = tmp_path / "named.tsv"
    lines = labelled.read_text().splitlines()
    cells = [line.rsplit("\t", 1) for line in lines[1:]]
    text = "\n".join([lines[0], *(f"{sentence}\t{names[label]}" for sentence, label in cells)])
    named.write_text(text, encoding="utf-8-sig")  # a mark of the byte order too
    found = []
    for path in (labelled, named):
        assert main(["evaluate", str(tiny_bert), "--text", str(path)]) == 0
        found.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy")])
    assert found[0] == found[1] and found[0]
    named.write_bytes(named.read_bytes() + b"\xff\xfe\t0\n")
    assert main(["evaluate", str(tiny_bert), "--text", str(named)]) == EXIT_ERROR
    assert "named.tsv: expected text in UTF-8" in capsys.readouterr().err


def test_evaluate_prints_what_it_found(tiny_bert, labelled, capsys):
    command = ["evaluate", str(tiny_bert), "--text", str(labelled), "--windows", "20", "--against", str(tiny_bert)]
    assert main(command) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.strip().split("\n"))
    printed = {name: value.strip() for name, value in printed.items()}
    found = answers(tiny_bert, [sentence for sentence, _ in rows(0, 20)]).argmax(-1)
    right = int((found == torch.tensor([label for _, label in rows(0, 20)])).sum())
    assert printed["accuracy"] == f"{100 * right / 20:.2f} %"
    assert printed["KL"].startswith("0.00000 nats") and printed["same"] == "100.00 % of the answers agree"
    assert printed["protocol"].startswith("20 sentences of dev.tsv, 20 answers, sentences of one length in calls of up")


def test_labels_are_read_by_name_and_from_csv(tiny_bert, labelled, tmp_path):
    named = [(sentence, ("negative", "positive")[label]) for sentence, label in rows()]
    path = write_rows(tmp_path / "dev.csv", named)
    expected = run_evaluate(EvaluateSettings(str(tiny_bert), labelled))
    assert run_evaluate(EvaluateSettings(str(tiny_bert), path)) == expected


def test_the_task_is_that_of_the_architecture(tiny_bert, tiny_llama):
    assert task_of(str(tiny_bert)) is CLASSIFIER
    assert {task_of(name).name for name in (str(tiny_llama), "tiny-llama", "nothing.gguf")} == {"language model"}


# Sentences


def test_calls_have_sentences_of_one_length_and_all_of_them():
    lengths = [3, 5, 3, 4, 5, 3] + [7] * 40
    sentences = Sentences("x.tsv", [[place] * n for place, n in enumerate(lengths)], list(range(46)), 9)
    assert [tuple(ids.shape) for ids in sentences.calls] == [(3, 3), (1, 4), (2, 5), (32, 7), (8, 7)]
    for ids, targets in zip(sentences.calls, sentences.targets, strict=True):
        assert ids[:, 0].tolist() == targets.tolist()
    assert sorted(torch.cat(sentences.targets).tolist()) == list(range(46)) and sentences.predictions == 46
    raw = b"".join(number.to_bytes(4, "little") for ids in sentences.ids for number in ids)
    assert sentences.sha256 == hashlib.sha256(raw).hexdigest()


def test_no_padding_is_calibrated_on(tiny_bert, labelled, tmp_path, monkeypatch, no_picture):
    seen = []
    forward = transformers.BertForSequenceClassification.forward

    def watch(self, input_ids, attention_mask, **more):
        seen.append(bool((input_ids == 0).any()) or not bool(attention_mask.all()))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", watch)
    kept = kept_models(monkeypatch)
    run_quantize(settings(tiny_bert, labelled, tmp_path / "out", "llm-int8"))
    assert seen and not any(seen)
    layer = kept[0].bert.encoder.layer[0].attention.self.query
    lm, amounts = CLASSIFIER.load(str(tiny_bert)), settings(tiny_bert, labelled, tmp_path).amounts(CLASSIFIER)
    texts, _ = CLASSIFIER.split(labelled, lm, amounts, "to calibrate on")
    model = transformers.BertForSequenceClassification.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        states = [model.bert.embeddings(ids).abs().flatten(0, -2).amax(0) for ids in texts.calls]
    assert torch.allclose(layer.input_absmax, torch.stack(states).amax(0))


def test_the_measures_are_the_formulas():
    generator = torch.Generator().manual_seed(0)
    mine, other = (torch.randn(5, 3, generator=generator).double().log_softmax(-1) for _ in range(2))
    texts = Sentences("x.tsv", [[1, 2]] * 3 + [[1, 2, 3]] * 2, [0, 1, 2, 1, 0], 8)
    measured = CLASSIFIER.compare(mine.split([3, 2]), texts, other.split([3, 2]))
    assert measured.score == pytest.approx(float((mine.argmax(-1) == torch.tensor(texts.labels)).double().mean()))
    assert measured.kl == pytest.approx(float((other.exp() * (other - mine)).sum(-1).mean()))
    assert measured.agreement == pytest.approx(float((mine.argmax(-1) == other.argmax(-1)).double().mean()))


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.tsv", None, "expected a .tsv or .csv file with the columns sentence and label, got none"),
        ("text.txt", "a film", "a .tsv or .csv file with the columns sentence and label, got one that ends in '.txt'"),
        ("a.tsv", "text\ta\n", "expected the header 'sentence<TAB>label', got 'text\\ta'"),
        (
            "b.tsv",
            "sentence\tlabel\na film\t1\n",
            "expected at least 13 sentences, 12 to calibrate on and one held out",
        ),
        (
            "c.tsv",
            "sentence\tlabel\n" + "film\t2\n" * 20,
            "labels 0 to 1, or negative, positive, as the model has clas",
        ),
        ("d.csv", "sentence,label\n" + "film,fine\n" * 20, "as the model has classes, got 'fine' in "),
    ],
)
def test_a_bad_file_is_refused(name, content, message, tiny_bert, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert_refused(words(tiny_bert, path, tmp_path / "out"), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            edit_config(architectures=["BertModel"]),
            "expected a causal language model (...ForCausalLM) or a sequence cla",
        ),
        (edit_config(problem_type="multi_label_classification"), "a classifier that gives each sentence one of its"),
        (edit_config(num_hidden_layers=3), "every weight of BertForSequenceClassification, got none for bert.encoder"),
    ],
)
def test_a_bad_model_folder_is_refused(edit, message, tiny_bert, labelled, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny_bert, source)
    edit(source)
    assert_refused(words(source, labelled, tmp_path / "out"), message, tmp_path, capsys)
    assert_refused(["evaluate", str(source), "--text", str(labelled)], message, tmp_path, capsys)


def test_other_options_are_refused(tiny_bert, tiny_llama, labelled, tmp_path, capsys):
    command = ["evaluate", str(tiny_bert), "--text", str(labelled)]
    message = "--against: expected a sequence classifier, as MODEL is, got a causal language model in "
    assert_refused([*command, "--against", str(tiny_llama)], message, tmp_path, capsys)
    assert_refused([*command, "--windows", "99"], "--text: expected at least 99 sentences, got 60", tmp_path, capsys)
    command = words(tiny_bert, labelled, tmp_path / "out", "--target", "vllm", recipe="w8a16")
    assert_refused(command, "got 'bert.embeddings.word_embeddings' (Embedding), ", tmp_path, capsys)
    command = words(tiny_bert, labelled, tmp_path / "out", "--max-kl", "1e-9")
    assert_refused(command, "--max-kl: expected a KL of at most 1e-09 nats", tmp_path, capsys)


# The real one


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason=f"needs {minilm.REQUIREMENT}")
def test_minilm_on_sst2(data_folder, tmp_path, no_picture):
    """MiniLM under a head fitted to its pooled states: of little accuracy, but weights and sentences are real."""
    source, text = minilm.package_file("config.json").parent, data_folder / "sst2" / "dev.tsv"
    if not text.is_file():
        pytest.skip(f"no test data: expected {text}")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    sentences, labels = read_tsv(text)
    _fit_head(model, tokenizer, sentences[:200], labels[:200])
    model.save_pretrained(tmp_path / "minilm")
    tokenizer.save_pretrained(tmp_path / "minilm")
    path = write_rows(tmp_path / "dev.tsv", list(zip(sentences[200:360], labels[200:360], strict=True)))
    result = run_quantize(settings(tmp_path / "minilm", path, tmp_path / "out", "llm-int8", samples=32))
    assert abs(result.after.score - result.before.score) < 0.05
    assert 0 < result.after.kl < 0.002 and result.after.agreement > 0.95
    assert result.sizes["layers"] == 37 and result.sizes["float_bytes"] / result.sizes["bytes"] > 1.8


@torch.no_grad()
def _fit_head(model: nn.Module, tokenizer, sentences: list[str], labels: list[int]) -> None:
    """Least squares from the pooled states to +-1."""
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    pooled = model.bert(**encoded).pooler_output
    wanted = torch.nn.functional.one_hot(torch.tensor(labels), 2).float() * 4 - 2
    gram = pooled.T @ pooled + 1.0 * torch.eye(pooled.shape[1])
    model.classifier.weight.copy_(torch.linalg.solve(gram, pooled.T @ wanted).T)
    model.classifier.bias.zero_()
