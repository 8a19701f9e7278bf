"""Section decode: tokens per second of a Llama, one sequence, each step a CUDA graph."""

from __future__ import annotations

import copy
import gc

import torch
import torch.nn.functional as F
from common.checks import relative_error, require
from common.sections import SectionReport
from common.timing import turns
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import quantrain
import quantrain.nn as qnn

CONFIG = {  # TinyLlama's sizes
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
QUICK = CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
CAPACITY, PROMPT, STEPS = 1024, 512, 64
RECIPES = {"w8a16": 1.6, "w4a16": 2.3, "zeroquant-w8a8": None}  # to reach


class FloatDecoder:
    """The same loop in PyTorch's fused operators: joined projections, rms_norm, scaled_dot_product_attention over keys and values of
    fixed capacity. Faster than transformers' own modules, which a captured step would otherwise be compared with."""

    def __init__(self, model: LlamaForCausalLM, capacity: int) -> None:
        config = model.config
        self.model, self.heads, self.kv = model, config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        weight = model.lm_head.weight
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    layer,
                    torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    *(weight.new_zeros(1, self.kv, capacity, self.size) for _ in range(2)),
                )
            )
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.kept = torch.arange(capacity, device=weight.device)
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)

    def run(self, ids: Tensor) -> Tensor:
        model, length = self.model.model, ids.shape[1]
        places = self.position + torch.arange(length, device=ids.device)
        x = model.embed_tokens(ids)
        cos, sin = model.rotary_emb(x, places[None])
        mask = (self.kept <= places[:, None])[None, None]
        for layer, qkv_weight, up_weight, keys, values in self.layers:
            eps = layer.input_layernorm.variance_epsilon
            h = F.rms_norm(x, (x.shape[-1],), layer.input_layernorm.weight, eps)
            qkv = F.linear(h, qkv_weight).view(1, length, -1, self.size)
            quantrain.rotate_heads_(qkv, cos, sin, self.heads + self.kv)
            q, k, v = qkv.transpose(1, 2).split([self.heads, self.kv, self.kv], dim=1)
            keys.index_copy_(2, places, k)
            values.index_copy_(2, places, v)
            group = self.heads // self.kv
            # The query heads of one key head as its queries: PyTorch then needs no copies of keys.
            packed = q.reshape(1, self.kv, group * length, self.size) if length == 1 else q
            shared = length > 1
            y = F.scaled_dot_product_attention(packed, keys, values, mask, enable_gqa=shared)
            y = y.reshape(1, self.heads, length, self.size).transpose(1, 2).flatten(2)
            x = x + F.linear(y, layer.self_attn.o_proj.weight)
            h = F.rms_norm(x, (x.shape[-1],), layer.post_attention_layernorm.weight, eps)
            gate, up = F.linear(h, up_weight).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
        x = F.rms_norm(x[:, -1:], (x.shape[-1],), model.norm.weight, model.norm.variance_epsilon)
        self.position += length
        return F.linear(x, self.model.lm_head.weight)[:, 0]

    def capture(self) -> None:
        before, side = self.position.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run(self.ids)
                self.position.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run(self.ids)

    def step(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids.view(1, 1))
        self.graph.replay()
        return self.logits


def four_bit_recipe(name: str):
    """Weights of 4 bits in groups of 128, to nearest: what the product costs does not depend on how codes were chosen."""
    return qnn.changed_recipe(qnn.as_recipe(name), {"scheme": {"rounding": "nearest"}})


@torch.no_grad()
def decode(report: SectionReport, device: str, quick: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(QUICK if quick else CONFIG), tie_word_embeddings=False)).eval()
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model = model.requires_grad_(False).to(torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    capacity, prompt = (32, 8) if quick else (CAPACITY, PROMPT)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    wide = FloatDecoder(model, capacity)
    exact = wide.run(ids)
    if device == "cuda":
        wide.capture()
    else:
        wide.step = wide.run
    following = exact.argmax(-1)
    for name, target in RECIPES.items():
        recipe = four_bit_recipe("gptq-w4a16") if name == "w4a16" else name
        narrow = copy.deepcopy(model)
        qnn.prepare(narrow, recipe, skip=["lm_head", "model.embed_tokens"] if name != "w4a16" else ["lm_head"])
        decoder = qnn.Int8Decoder(qnn.convert(narrow), capacity=capacity)
        found = decoder.prefill(ids)
        # Random weights suffer from 4 bits more than trained ones; what is checked is the arithmetic.
        expected = narrow(ids, use_cache=False).logits[:, -1]
        require(
            relative_error(found, expected) < 0.08, f"{name}: {relative_error(found, expected):.3f} off its own model"
        )
        error = relative_error(found, exact)
        times = turns([_timer(wide, following, prompt, device), _timer(decoder, following, prompt, device)], 5)
        seconds = [min(each) for each in times]
        report.row(
            "decode",
            f"{model.config.hidden_size} wide, {prompt} tokens before, {name}",
            seconds[0] / seconds[1],
            target,
            wide_tokens_s=1 / seconds[0],
            tokens_s=1 / seconds[1],
            error=error,
            cache_mb=decoder.nbytes / 1e6,
        )
        del decoder, narrow
        gc.collect()


def _timer(decoder, first: Tensor, prompt: int, device: str):
    """Seconds per token of greedy steps after the prompt."""
    import time

    steps = STEPS if device == "cuda" else 4

    def once(turn: int) -> float:
        decoder.position.fill_(prompt)
        if isinstance(decoder, qnn.Int8Decoder):
            decoder.length = prompt
        token = first
        decoder.step(token if device == "cuda" or isinstance(decoder, qnn.Int8Decoder) else token.view(1, 1))
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            logits = decoder.step(
                token if device == "cuda" or isinstance(decoder, qnn.Int8Decoder) else token.view(1, 1)
            )
            token = logits.argmax(-1)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    return once
