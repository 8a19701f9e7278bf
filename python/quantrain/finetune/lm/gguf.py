"""Llama models in GGUF files: transformers' LlamaForCausalLM of the weights, and a tokenizer of the metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantrain
from quantrain.nn import EightBitWeight, FourBitWeight, GgufFile, read_gguf

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
# tokenizer.ggml.pre -> whether each digit is a token of its own; GPT-2's splitting otherwise.
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "default": False}


class _Metadata:
    """The metadata of a GGUF file, of which what is missing or of another type is named."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.values.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{self.path}: expected {key} of type {names}, got {value!r:.60}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise ValueError(f"{self.path}: expected {key} of at least 1, got {value}")
        return value


def load_gguf(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """The model, the tokenizer and the name in a GGUF file of the architecture llama.

    The weights are what the file's codes stand for, in ``dtype``. llama.cpp's order of the rows of the q and k
    projections (rotary pairs 2i, 2i + 1) becomes transformers' (pairs i, i + half).

    Raises:
        ValueError: Another architecture, tokenizer or rotary scaling, metadata that is missing, or tensors that do not
            fit it; the message names the file, the rule and the value.
        RuntimeError: The file cannot be opened.
    """
    file = Path(path)
    content = read_gguf(file)
    metadata = _Metadata(file, content.metadata)
    model = _model(metadata, content, dtype)
    return model, _tokenizer(metadata), str(metadata.values.get("general.name", file.stem))


def _model(metadata: _Metadata, content: GgufFile, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise ValueError(f"{metadata.path}: expected the architecture llama, got {architecture!r}")
    scaling = metadata.values.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in content.tensors:
        raise ValueError(f"{metadata.path}: expected rotary embeddings without scaling, got {scaling!r}")
    hidden, heads = metadata.count("llama.embedding_length"), metadata.count("llama.attention.head_count")
    kv_heads = metadata.count("llama.attention.head_count_kv", heads)
    size = metadata.count("llama.rope.dimension_count", hidden // heads)
    if hidden % heads or size != hidden // heads or heads % kv_heads or size % 2:
        raise ValueError(
            f"{metadata.path}: expected heads of one even size that rotate whole and share keys evenly, got width "
            f"{hidden}, {heads} heads, {kv_heads} of keys, {size} rotating"
        )
    weights = {
        _name(metadata.path, name): _ordered(name, value, heads, kv_heads).to(dtype)
        for name, value in _floats(content).items()
    }
    config = LlamaConfig(
        vocab_size=len(metadata.get("tokenizer.ggml.tokens", list)),
        hidden_size=hidden,
        intermediate_size=metadata.count("llama.feed_forward_length"),
        num_hidden_layers=metadata.count("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=metadata.count("llama.context_length"),
        rms_norm_eps=metadata.get("llama.attention.layer_norm_rms_epsilon", float),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(metadata.get("llama.rope.freq_base", (int, float), 10000.0)),
        },
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=metadata.values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.values.get("tokenizer.ggml.eos_token_id"),
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return _filled(metadata.path, model, weights)


def _filled(path: Path, model: Any, weights: dict[str, Tensor]) -> Any:
    """``model``, whose tensors are on the meta device, with ``weights`` as its parameters."""
    expected = {name: list(value.shape) for name, value in model.named_parameters()}
    found = {name: list(value.shape) for name, value in weights.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise ValueError(f"{path}: expected {odd} of shape {expected.get(odd)}, got {found.get(odd)}")
    rotary = type(model.model.rotary_emb)(model.config)  # its frequencies are no part of a state dict
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head is the embedding
    model.tie_weights()
    model.model.rotary_emb = rotary
    return model.eval()


def _floats(content: GgufFile) -> dict[str, Tensor]:
    """Every tensor of the file by its name there, in float32 where it has codes."""
    decoded = {name: _decoded(weight) for name, weight in {**content.four_bit, **content.eight_bit}.items()}
    return {**content.tensors, **decoded}


def _decoded(weight: FourBitWeight | EightBitWeight) -> Tensor:
    if isinstance(weight, FourBitWeight):
        return quantrain.dequantize_4bit(
            weight.codes, weight.scale, weight.zero_point, size=weight.size, format=weight.format
        )
    blocks = weight.codes.float().unflatten(-1, (weight.scale.shape[-1], -1))
    return (blocks * weight.scale.float().unsqueeze(-1)).flatten(-2)


def _name(path: Path, name: str) -> str:
    """transformers' name of llama.cpp's tensor."""
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.{kind}"
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{kind}"
    raise ValueError(f"{path}: expected tensors of a Llama model, got {name!r}")


def _ordered(name: str, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Rows of q and k from pairs (2i, 2i + 1) to pairs (i, i + half); every other tensor as it is."""
    count = heads if ".attn_q." in name else kv_heads if ".attn_k." in name else 0
    if not count or value.shape[0] % (2 * count):
        return value
    return value.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _tokenizer(metadata: _Metadata) -> Any:
    """The byte-level BPE that the metadata describes, as transformers' fast tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path, kind = metadata.path, metadata.get("tokenizer.ggml.model", str)
    split = metadata.get("tokenizer.ggml.pre", str, "default")
    if kind != "gpt2" or split not in _SPLITS_DIGITS:
        raise ValueError(
            f"{path}: expected a tokenizer of the kind gpt2, split as {', '.join(_SPLITS_DIGITS)}, "
            f"got {kind!r}, {split!r}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens", list)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", list)]
    kinds = metadata.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise ValueError(
            f"{path}: expected tokens that differ and a type for each, got {len(tokens)} tokens, {len(vocabulary)} of "
            f"them different, {len(kinds)} types"
        )
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # what the package raises has no narrower type
        raise ValueError(f"{path}: expected merges of two tokens into a third, got {error}") from error
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
        if _SPLITS_DIGITS[split]
        else bytes_of
    )
    tokenizer.decoder = decoders.ByteLevel()
    for special, number in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == number]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.count("llama.context_length"),
        **_special_tokens(metadata, tokens),
    )
    wrapped.chat_template = metadata.values.get("tokenizer.chat_template")
    return wrapped


def _special_tokens(metadata: _Metadata, tokens: list[str]) -> dict[str, str]:
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for name, word in named.items():
        key = f"tokenizer.ggml.{word}_token_id"
        if key not in metadata.values:
            continue
        index = metadata.get(key, int)
        if not 0 <= index < len(tokens):
            raise ValueError(f"{metadata.path}: expected {key} below {len(tokens)}, got {index}")
        found[name] = tokens[index]
    return found
