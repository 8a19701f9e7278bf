"""Texts and models of the language-model job: text and jsonl files, what is learned of an example, GGUF files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import four_bit_formats as reference

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

from quantrain.finetune.lm import data as lm_data  # noqa: E402
from quantrain.finetune.lm import models  # noqa: E402
from quantrain.finetune.lm.data import IGNORED, load_lm_data  # noqa: E402
from quantrain.finetune.lm.gguf import load_gguf  # noqa: E402
from quantrain.finetune.lm.task import CausalLM, perplexity  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FOX = "the quick brown fox jumps over the lazy dog\n"


@pytest.fixture(scope="module")
def lm():
    return models.load_language_model(models.TINY)


@pytest.fixture
def tokenizer(lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", TEMPLATE)
    return lm.tokenizer


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def learned(tokenizer, ids: torch.Tensor, labels: torch.Tensor) -> tuple[str, str]:
    """The text of a sequence and of what is learned of it."""
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != IGNORED])


# Text files


def test_a_text_is_cut_into_windows_and_its_end_is_held_out(tokenizer, tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(FOX * 50)  # 2,200 bytes
    data = load_lm_data(str(path), tokenizer, 100)
    assert (data.name, data.train_size, data.test_size) == ("fox", 20, 2)
    whole = torch.cat([*data.train.ids, *data.test.ids])
    assert tokenizer.decode(whole) == FOX * 50
    assert all(torch.equal(ids, labels) for ids, labels in zip(data.train.ids, data.train.labels, strict=True))


def test_pieces_of_a_long_text_are_the_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_data, "_PIECE", 100)
    assert "".join(lm_data._pieces(FOX * 9)) == FOX * 9 and len(lm_data._pieces(FOX * 9)) == 3
    assert lm_data._pieces("no line ends here" * 20) == ["no line ends here" * 20]
    path = tmp_path / "fox.txt"
    path.write_text(FOX * 9)
    assert tokenizer.decode(load_lm_data(str(path), tokenizer, 8).train.ids[2]) == (FOX * 9)[16:24]


def test_a_folder_has_files_to_train_on_and_to_hold_out(tokenizer, tmp_path):
    (tmp_path / "valid.txt").write_text(FOX * 3)
    with pytest.raises(
        FileNotFoundError, match="expected a file to hold out, test or valid, beside valid.txt, got none"
    ):
        load_lm_data(str(tmp_path), tokenizer, 16)
    (tmp_path / "test.txt").write_text(FOX)
    data = load_lm_data(str(tmp_path), tokenizer, 16)
    assert (data.train_size, data.test_size) == (8, 2)
    jsonl(tmp_path / "train.jsonl", {"text": FOX * 5})
    assert load_lm_data(str(tmp_path), tokenizer, 16).train_size == 13


def test_hold_out_and_subset(tokenizer, tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(FOX * 50)
    data = load_lm_data(str(path), tokenizer, 100)
    held_out = data.hold_out(5)
    assert (held_out.train_size, held_out.test_size) == (15, 5)
    assert torch.equal(held_out.test.ids[0], data.train.ids[15])
    few = data.subset(3, 1)
    assert (few.train_size, few.test_size) == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(few.train.ids, data.subset(3, 1).train.ids, strict=True))
    with pytest.raises(ValueError, match="expected fewer than the 20 training sequences, got 20"):
        data.hold_out(20)


# jsonl files


def test_texts_of_a_jsonl_file_are_joined_with_the_end(tokenizer, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"text": "abcdefg"}, "", {"text": "hijklmn", "other": 1})
    data = load_lm_data(path, tokenizer, 8)
    texts = sorted(tokenizer.decode(ids) for ids in (*data.train.ids, *data.test.ids))
    assert texts == ["abcdefg<|end|>", "hijklmn<|end|>"]


def test_of_a_prompt_the_completion_is_learned(tokenizer, tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl", *({"prompt": f"say {word}: ", "completion": word} for word in ("yes", "no", "maybe"))
    )
    data = load_lm_data(path, tokenizer, 64)
    parts = [*zip(data.train.ids, data.train.labels, strict=True), *zip(data.test.ids, data.test.labels, strict=True)]
    found = sorted(learned(tokenizer, *part) for part in parts)
    assert found[0] == ("say maybe: maybe<|end|>", "maybe<|end|>")
    (ids,), labels = data.train_batch(torch.tensor([0, 1]), None)  # padded at the end
    assert ids.shape == labels.shape and set(labels[labels != ids].tolist()) == {IGNORED}
    assert CausalLM("float32", 64).terms(((ids,), labels)) == int((labels != IGNORED).sum())


def test_of_messages_the_assistant_is_learned(tokenizer, tmp_path):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = load_lm_data(jsonl(tmp_path / "x.jsonl", row, row), tokenizer, 128)
    text, answers = learned(tokenizer, data.train.ids[0], data.train.labels[0])
    assert text == "[user]hi;[assistant]hello;[user]bye;[assistant]so long;"
    assert answers == "hello;so long;"
    cut = load_lm_data(jsonl(tmp_path / "y.jsonl", row, row), tokenizer, 30)
    assert len(cut.train.ids[0]) == 30 and learned(tokenizer, cut.train.ids[0], cut.train.labels[0])[1] == "hello;"


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "expected a JSON object in line 3, got '{'"),
        ("[1]", r"expected a JSON object in line 3, got '\[1\]'"),
        ({}, "or messages in line 3, got the fields none"),
        ({"sentence": "x", "label": 1}, "or messages in line 3, got the fields sentence, label"),
        ({"text": 5}, "expected text in the field text in line 3, got 5"),
        ({"text": ""}, "expected text in the field text in line 3, got ''"),
        ({"prompt": "x"}, "expected text in the field completion in line 3, got None"),
        ({"messages": "hi"}, "expected messages with role and content, one of them the assistant's, in line 3"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "one of them the assistant's, in line 3"),
        ({"prompt": "x" * 40, "completion": "y"}, "expected tokens to learn among the first 32 in line 3, got none"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tokenizer, tmp_path, row, message):
    path = jsonl(tmp_path / "x.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(ValueError, match=message):
        load_lm_data(path, tokenizer, 32)


def test_messages_need_a_template_that_only_adds(tokenizer, tmp_path, monkeypatch):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    path = jsonl(tmp_path / "x.jsonl", row, row)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}" + TEMPLATE)
    with pytest.raises(
        ValueError, match="that adds turns for the messages in line 1, got one that changes earlier turns"
    ):
        load_lm_data(path, tokenizer, 32)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(ValueError, match="that adds turns for the messages in line 1, got no such role"):
        load_lm_data(path, tokenizer, 32)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="a tokenizer with a chat template for the messages in line 1, got none"):
        load_lm_data(path, tokenizer, 32)


# Files that are no data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "expected text, got an empty file"),
        ("x.jsonl", b"\n \n", "expected text, got an empty file"),
        ("x.txt", b"\xff\xfe\x00", "expected text in UTF-8"),
        ("x.txt", b"short", "expected tokens for at least one sequence of 32 to train on, got 0 in all"),
        ("x.txt", b"s" * 40, "expected tokens for at least one sequence of 32 to train on, got 32 in all"),
        ("x.jsonl", b'{"text": "short"}', "expected at least two rows, got 0"),
        ("x.csv", b"text,label", "expected a .txt or .jsonl file, tinyshakespeare or wikitext-2, got"),
    ],
)
def test_files_that_are_refused(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_lm_data(str(tmp_path / name), tokenizer, 32)


def test_the_known_texts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUANTRAIN_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match="expected QUANTRAIN_DATA to name a folder with tinyshakespeare/input.txt"
    ):
        load_lm_data("tinyshakespeare", tokenizer, 16)
    monkeypatch.setenv("QUANTRAIN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="wikitext-2: expected a .txt or .jsonl file, or a folder"):
        load_lm_data("wikitext-2", tokenizer, 16)
    assert lm_data.default_data() == "tinyshakespeare"
    (tmp_path / "wikitext-2").mkdir()
    for part in ("valid", "test"):
        (tmp_path / "wikitext-2" / f"{part}.txt").write_text(FOX)
    assert lm_data.default_data() == "wikitext-2"
    assert load_lm_data("wikitext-2", tokenizer, 16).name == "WikiText-2"


# The loss


def test_the_loss_is_that_of_transformers_and_padding_changes_nothing(lm):
    task, ids = CausalLM("float32", 16), torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = task.loss(lm.model, ((ids,), ids))
        theirs = lm.model(input_ids=ids, labels=ids).loss
        padded = lm_data.pad(lm_data.Sequences([ids[0], ids[1, :9]], [ids[0], ids[1, :9]]))
        parts = [
            task.loss(lm.model, ((ids[:1],), ids[:1])) * 15,
            task.loss(lm.model, ((ids[1:, :9],), ids[1:, :9])) * 8,
        ]
        torch.testing.assert_close(task.loss(lm.model, padded), sum(parts) / 23)
    torch.testing.assert_close(ours, theirs)


def test_perplexity_of_losses_that_a_float_does_not_hold():
    assert perplexity(0.0) == 1 and perplexity(1e5) == math.inf and math.isnan(perplexity(math.nan))


# GGUF


def _gguf(lm, *, drop: str = "", **metadata) -> bytes:
    """The tiny model as llama.cpp would write it, q and k in its order of rows."""
    heads = {"q_proj": 4, "k_proj": 2}
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = []
    for name, value in lm.model.named_parameters():
        for theirs, ours in (*names.items(), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm")):
            name = name.replace(theirs, ours)
        name = name.replace("model.layers", "blk")
        count = heads.get({"attn_q": "q_proj", "attn_k": "k_proj"}.get(name.split(".")[-2], ""), 0)
        value = value.detach()
        if count:  # convert_hf_to_gguf.py, LlamaModel.permute
            value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if name != drop:
            tensors.append((name, "F32", list(value.shape), value.contiguous().numpy().astype(np.float32).tobytes()))
    vocabulary = sorted(lm.tokenizer.get_vocab().items(), key=lambda item: item[1])
    values = {
        "general.architecture": ("string", "llama"),
        "general.name": ("string", "tiny"),
        "llama.embedding_length": ("uint32", 64),
        "llama.attention.head_count": ("uint32", 4),
        "llama.attention.head_count_kv": ("uint32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-6),
        "llama.block_count": ("uint32", 2),
        "llama.context_length": ("uint32", 1024),
        "llama.feed_forward_length": ("uint32", 192),
        "llama.rope.freq_base": ("float32", 10000.0),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "smollm"),
        "tokenizer.ggml.tokens": ("string[]", [token for token, _ in vocabulary]),
        "tokenizer.ggml.token_type": ("int32[]", [1] * 256 + [3]),
        "tokenizer.ggml.merges": ("string[]", []),
        "tokenizer.ggml.eos_token_id": ("uint32", 256),
        **metadata,
    }
    return reference.gguf_bytes(tensors, [(key, *value) for key, value in values.items() if value is not None])


def test_a_gguf_file_is_the_model_and_its_tokenizer(lm, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_gguf(lm))
    model, tokenizer, name = load_gguf(path)
    text = "Fox 42 jumps<|end|>"
    ids = torch.tensor([tokenizer(text).input_ids])
    assert name == "tiny" and ids.tolist() == [lm.tokenizer(text).input_ids]
    assert tokenizer.eos_token_id == 256 and tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_gguf(path, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": ("string", "mamba")}, "expected the architecture llama, got 'mamba'"),
        ({"llama.rope.scaling.type": ("string", "yarn")}, "expected rotary embeddings without scaling, got 'yarn'"),
        ({"llama.block_count": None}, "expected llama.block_count of type int, got None"),
        ({"llama.block_count": ("uint32", 0)}, "expected llama.block_count of at least 1, got 0"),
        ({"llama.block_count": ("uint32", 3)}, "expected model.layers.2.*, got None"),
        ({"llama.attention.head_count": ("uint32", 5)}, "expected heads of one even size"),
        ({"llama.feed_forward_length": ("uint32", 96)}, r"expected .* of shape \[64, 96\], got \[64, 192\]"),
        ({"tokenizer.ggml.model": ("string", "llama")}, "expected a tokenizer of the kind gpt2"),
        ({"tokenizer.ggml.pre": ("string", "other")}, "split as smollm, gpt-2, default, got 'gpt2', 'other'"),
        ({"tokenizer.ggml.merges": ("string[]", ["no such"])}, "expected merges of two tokens into a third"),
        ({"tokenizer.ggml.merges": ("string[]", ["alone"])}, "expected merges of two tokens into a third"),
        ({"tokenizer.ggml.token_type": ("int32[]", [1])}, "expected tokens that differ and a type for each"),
        ({"tokenizer.ggml.eos_token_id": ("uint32", 999)}, "expected tokenizer.ggml.eos_token_id below 257, got 999"),
        ({"drop": "output_norm.weight"}, r"expected model.norm.weight of shape \[64\], got None"),
    ],
)
def test_gguf_files_that_are_refused(lm, tmp_path, change, message):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_gguf(lm, **change))
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


@pytest.mark.skipif(models.smollm2_file() is None, reason=f"needs {models.REQUIREMENT}")
def test_smollm2_has_the_perplexity_that_was_measured(data_folder):
    lm = models.load_language_model(models.SMOLLM2)
    data = load_lm_data(str(data_folder / "wikitext-2"), lm.tokenizer, 512).subset(None, 4)
    found = CausalLM("float32", 512).evaluate(lm.model, data, torch.device("cpu"))["perplexity"]
    assert abs(found - 25.494) < 0.002  # gguf 0.19.0's reader and transformers, the same four windows
