"""What ``quantrain quantize`` and ``quantrain evaluate`` refuse: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from samples.quantize_command import assert_refused, edit_config, remove, words, write  # noqa: E402

from quantrain import nn as qnn  # noqa: E402
from quantrain.finetune.arguments import EXIT_ERROR  # noqa: E402
from quantrain.finetune.cli import main  # noqa: E402
from quantrain.finetune.lm import models  # noqa: E402
from quantrain.finetune.quantize import job  # noqa: E402


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.txt", "expected a .txt or .jsonl file, got none"),
        ("", "empty.txt", "expected text, got an empty file"),
        ("too short", "short.txt", "expected 160 tokens, 3 windows of 32 to calibrate on and 2 held out, got 9"),
        ("a,b", "table.csv", "expected a .txt or .jsonl file, got one that ends in '.csv'"),
        ('{"text": 3}', "rows.jsonl", "expected text in the field text in line 1, got 3"),
    ],
)
def test_a_bad_text_is_refused(content, name, message, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert_refused(words(path, tmp_path / "out"), message, tmp_path, capsys)


def test_a_short_text_is_refused_where_nothing_calibrates(tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    message = "expected 160 tokens, 3 windows of 32 that other recipes calibrate on and 2 held out, got 9"
    assert_refused(words(path, tmp_path / "out", recipe="zeroquant-w8a8"), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", "tensorrt"), "--target: expected quantrain, vllm or bitsandbytes, got 'tensorrt'"),
        (("--length", "1"), "--length: expected at least 2 tokens, got 1"),
        (("--device", "nowhere"), "--device: expected a device that this machine has"),
        (("--skip", "no.such.layer"), "no.such.layer"),
        (("--max-kl", "1e-9"), "--max-kl: expected a KL of at most 1e-09 nats from the float model under 'gptq-w4a16'"),
    ],
)
def test_a_bad_option_is_refused(more, message, fox_text, tmp_path, capsys):
    assert_refused(words(fox_text, tmp_path / "out", *more), message, tmp_path, capsys)


def test_an_unknown_recipe_is_refused_with_the_names_of_those_without_training(fox_text, tmp_path, capsys):
    command = words(fox_text, tmp_path / "out", recipe="gptq-w9")
    message = "--recipe: expected a JSON file, or a recipe that needs no training (ptq-w8a8, w8a16, "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_float", lambda *_: pytest.fail("loaded"))
        assert_refused(command, message, tmp_path, capsys)
        with pytest.raises(ValueError) as error:
            job._recipe("gptq-w9")
        names = str(error.value).partition("(")[2].partition(")")[0].split(", ")
        assert {"gptq-w4a16", "nf4", "int8-static"} <= set(names)
        assert not {name for name in names if name.startswith(("qat", "fqt", "f8net", "qlora", "int8-training"))}
        message = "--recipe: expected one for layers, got 'f8net', which makes a new network"
        assert_refused(words(fox_text, tmp_path / "out", recipe="f8net"), message, tmp_path, capsys)


def test_a_length_beyond_the_model_is_refused(fox_text, tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text(fox_text.read_text() * 3)
    command = words(path, tmp_path / "out", "--length", "1025", "--samples", "1")
    assert_refused(command, "expected at most the 1024 tokens that tiny Llama (random) has positions", tmp_path, capsys)


def test_an_output_with_files_is_refused(fox_text, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert_refused(words(fox_text, folder), "which has files; --force replaces it", tmp_path, capsys)
    assert_refused(words(fox_text, folder, "--force"), "which has files and no quantrain.json", tmp_path, capsys)
    (tmp_path / "file").write_text("mine")
    assert_refused(words(fox_text, tmp_path / "file"), "which is a file or a link", tmp_path, capsys)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("model-*.safetensors"), "model-00001-of-"),
        (remove("config.json"), "a folder without config.json"),
        (remove("tokenizer.json"), "a tokenizer (tokenizer.json)"),
        (edit_config(model_type="nothing"), "a config.json that transformers knows"),
        (edit_config(intermediate_size=100), "of shape [64, 100], as config.json says, got [64, 192]"),
        (edit_config(num_hidden_layers=3), "every weight of LlamaForCausalLM, got none for model.layers.2."),
        (edit_config(num_hidden_layers=1), "no block beyond config.json's, got model.layers.1."),
        (edit_config(quantization_config={"quant_method": "gptq"}), "weights in floating point, got them quantized"),
        (
            edit_config(architectures=["BertForMaskedLM"]),
            "MODEL: expected a causal language model (...ForCausalLM) or a sequence classifier "
            "(...ForSequenceClassification), got BertForMaskedLM in ",
        ),
    ],
)
def test_a_bad_model_folder_is_refused(edit, message, tiny_llama, fox_text, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    edit(source)
    assert_refused(words(fox_text, tmp_path / "out", model=source), message, tmp_path, capsys)
    assert_refused(["evaluate", str(source), "--text", str(fox_text)], message, tmp_path, capsys)


def test_a_file_that_is_no_gguf_is_refused(fox_text, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    command = words(fox_text, tmp_path / "out", model=tmp_path / "model.gguf")
    assert_refused(command, "model.gguf", tmp_path, capsys)
    command = words(fox_text, tmp_path / "out", model=tmp_path / "none.gguf")
    assert_refused(command, "MODEL: expected a GGUF file, got ", tmp_path, capsys)


def test_a_disk_that_is_full_leaves_nothing(fox_text, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(job.qnn, "save_checkpoint", fail)
    assert_refused(words(fox_text, tmp_path / "out"), "no space left on device", tmp_path, capsys)


def test_a_quantized_folder_is_not_quantized_again(quantized_llama, fox_text, tmp_path, capsys):
    command = words(fox_text, tmp_path / "out", model=quantized_llama.folder)
    assert_refused(command, "expected a model in floating point", tmp_path, capsys)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("model.safetensors"), "expected a file model.safetensors, got none"),
        (write("model.safetensors", "x"), "expected a whole safetensors file"),
        (write("quantrain.json", "{"), "expected what quantrain quantize writes"),
        (write("config.json", "{"), "expected config.json and tokenizer.json of the model"),
        (edit_config(intermediate_size=128), "model.safetensors: expected"),
        (edit_config(num_hidden_layers=1), "model.safetensors: expected"),
    ],
)
def test_a_damaged_folder_is_refused(edit, message, quantized_llama, fox_text, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(quantized_llama.folder, folder)
    edit(folder)
    assert_refused(["evaluate", str(folder), "--text", str(fox_text)], message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--windows", "99"), "--text: expected at least 50688 tokens, 99 windows of 512, got "),
        (("--length", "1"), "--length: expected at least 2 tokens, got 1"),
        (("--against", "nope"), "--against: expected smollm2-135m, tiny-llama"),
    ],
)
def test_bad_options_of_evaluate_are_refused(more, message, fox_text, tmp_path, capsys):
    assert_refused(["evaluate", models.TINY, "--text", str(fox_text), *more], message, tmp_path, capsys)


def test_a_second_model_with_other_tokens_is_refused(tiny_llama, fox_text, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["evaluate", models.TINY, "--text", str(fox_text), "--against", str(other)]
    assert_refused(command, "--against: expected a model with the tokens of tiny Llama", tmp_path, capsys)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"title": "a", "target": "quantrain", "version": 99}'])
def test_damaged_facts_are_named(content, quantized_llama, fox_text, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(quantized_llama.folder, folder)
    (folder / "quantrain.json").write_text(content)
    assert main(["evaluate", str(folder), "--text", str(fox_text), "--length", "32"]) == EXIT_ERROR
    assert "quantrain.json: expected what quantrain quantize writes" in capsys.readouterr().err


def test_a_target_cannot_hold_int8_keys_and_values(fox_text, tmp_path, capsys):
    recipe = tmp_path / "both.json"
    both = qnn.changed_recipe(qnn.as_recipe("zeroquant-w8a8"), {"scheme": {"kv_cache": "int8"}})
    recipe.write_text(both.to_json())
    assert main(words(fox_text, tmp_path / "out", "--target", "vllm", recipe=str(recipe))) == EXIT_ERROR
    assert "keys and values stay in floating point, got kv_cache 'int8'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rotations_of_other_models_are_refused_before_anything_is_measured(fox_text, tmp_path, monkeypatch, capsys):
    def kept_from(model):
        model.model.layers[0].mlp.gate_proj = torch.nn.Identity()
        return check_rotation(model)

    check_rotation = job.check_rotation
    monkeypatch.setattr(job, "check_rotation", kept_from)
    assert main(words(fox_text, tmp_path / "out", "--rotate", recipe="zeroquant-w8a8")) == EXIT_ERROR
    printed = capsys.readouterr()
    assert "--rotate: expected 'model.layers.0.mlp.gate_proj' to be an nn.Linear" in printed.err
    assert "measured on" not in printed.out
