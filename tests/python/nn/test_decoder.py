"""Decoding with int8 blocks and int8 keys and values; models as CUDA graphs; the compiler's pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantrain
import quantrain.nn as qnn

transformers = pytest.importorskip("transformers")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def llama(**changes):
    torch.manual_seed(0)
    return wide(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | changes)))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    return wide(transformers.GPT2LMHeadModel(config))


def wide(model):
    """Branches as large as what they are added to."""
    for name, parameter in model.named_parameters():
        if (
            parameter.dim() == 2
            and "emb" not in name
            and "wte" not in name
            and "wpe" not in name
            and "head" not in name
        ):
            parameter.data *= 8
    return model.eval().requires_grad_(False)


def converted(model, recipe, **arguments):
    return qnn.convert(qnn.prepare(copy.deepcopy(model), recipe, **arguments))


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("recipe", ["w8a16", "zeroquant-w8a8", "int8-training"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("device", DEVICES)
def test_steps_give_what_the_whole_text_gives(device, make, recipe):
    """Up to the rounding of keys and values to int8."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = converted(make().to(dtype).to(device), recipe, skip=["lm_head"])
    ids = torch.randint(0, 100, (2, 20), device=device)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    decoder = qnn.Int8Decoder(model, batch=2, capacity=32)
    assert error(decoder.prefill(ids[:, :12]), exact[:, 11]) < 0.05
    for place in range(12, 20):
        found = decoder.step(ids[:, place])
        assert error(found, exact[:, place]) < 0.05
    assert decoder.length == 20 and int(decoder.position) == 20


@pytest.mark.parametrize("device", DEVICES)
def test_generate_repeats_and_continues(device):
    model = converted(llama().to(device), "w8a16")
    prompt = torch.randint(0, 100, (1, 6), device=device)
    decoder = qnn.Int8Decoder(model, capacity=24)
    first = decoder.generate(prompt, 8)
    assert torch.equal(decoder.generate(prompt, 8), first)
    plain = qnn.Int8Decoder(model, capacity=24, captured=False).generate(prompt, 8)
    assert torch.equal(plain, first)
    assert decoder.nbytes == 2 * 2 * 2 * 24 * (16 + 4)


def test_what_a_decoder_refuses():
    with pytest.raises(
        ValueError, match="expected a causal language model of 2 fused blocks, got 0 of them in a LlamaForCausalLM"
    ):
        qnn.Int8Decoder(llama())
    decoder = qnn.Int8Decoder(converted(llama(), "w8a16"), capacity=8)
    with pytest.raises(ValueError, match="expected at most 8 tokens, got 0 and 9 more"):
        decoder.prefill(torch.zeros(1, 9, dtype=torch.int64))
    for ids in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), [[1, 2]]):
        with pytest.raises(ValueError, match=r"expected ids \[B, T\] of 1 sequences \(batch=1\), got (shape|a list)"):
            decoder.generate(ids, 2)
    with pytest.raises(
        ValueError, match="expected a prompt and 7 new tokens within the capacity of 8, got a prompt of 3"
    ):
        decoder.generate(torch.zeros(1, 3, dtype=torch.int64), 7)
    assert decoder.generate(torch.zeros(1, 3, dtype=torch.int64), 6).shape == (1, 6)
    with pytest.raises(ValueError, match="expected new_tokens of 1 or more, got 0"):
        decoder.generate(torch.zeros(1, 3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="expected a capacity of 1 or more, got 0"):
        qnn.Int8Decoder(decoder.model, capacity=0)
    with pytest.raises(ValueError, match="at most the model's 64 positions, got 65"):
        qnn.Int8Decoder(converted(gpt2(), "w8a16"), capacity=65)
    with pytest.raises(ValueError, match="expected a model in evaluation mode"):
        qnn.Int8Decoder(converted(llama(), "w8a16").train())
    base = transformers.BertModel(transformers.BertConfig(**SIZES))
    with pytest.raises(ValueError, match="expected one of transformers' decoders .*, got a BertModel"):
        qnn.Int8Decoder(converted(wide(base), "w8a16"))


def test_a_decoder_of_a_model_that_computes_more_is_refused():
    torch.manual_seed(0)
    config = {"num_key_value_heads": 2, "pad_token_id": 0} | SIZES
    window = wide(transformers.MistralForCausalLM(transformers.MistralConfig(**config, sliding_window=16)))
    window = converted(window, "w8a16")
    with pytest.raises(ValueError, match="within the model's sliding window of 16 tokens, got 17"):
        qnn.Int8Decoder(window, capacity=17)
    ids = torch.randint(100, (1, 16))
    assert error(qnn.Int8Decoder(window, capacity=16).prefill(ids), window(ids).logits[:, -1]) < 0.03
    scaled = transformers.GraniteConfig(**config, embedding_multiplier=12.0, logits_scaling=8.0)
    scaled = converted(wide(transformers.GraniteForCausalLM(scaled)), "w8a16")
    assert scaled.quantization_summary.fused
    with pytest.raises(ValueError, match="a GraniteForCausalLM computes something besides"):
        qnn.Int8Decoder(scaled, capacity=16)


# ---- captured ----


@pytest.mark.parametrize("device", DEVICES)
def test_captured_by_shape(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(device)
    fast = qnn.Captured(model, most=2)
    for rows in (3, 5, 3, 7, 5, 3):
        x = torch.randn(rows, 8, device=device)
        torch.testing.assert_close(fast(x).clone(), model(x).detach(), rtol=1e-5, atol=1e-6)
    assert fast.graphs == (2 if device == "cuda" else 0)
    with pytest.raises(ValueError, match="expected most of at least 1, got 0"):
        qnn.Captured(model, most=0)


@pytest.mark.cuda
def test_a_captured_fused_model():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    model = converted(wide(transformers.BertModel(config)).half().cuda(), "int8-training")
    fast = qnn.Captured(model)
    for batch, length in ((2, 33), (1, 17), (2, 33)):
        ids = torch.randint(0, 100, (batch, length), device="cuda")
        with torch.no_grad():
            exact = model(ids).last_hidden_state
        # Captured, transformers makes a mask, and another kernel computes the attention: codes flip.
        assert error(fast(ids).last_hidden_state.float(), exact.float()) < 2e-2
    assert fast.graphs == 2


# ---- the compiler's pass ----


class Feeding(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        h = self.norm(x)
        h = self.q(h) * self.k(h)
        h = self.down(F.gelu(self.up(h)))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_roundings_go_into_what_is_before_them(monkeypatch):
    from quantrain.nn import inductor

    torch.manual_seed(0)
    model = converted(Feeding().eval(), "int8-training")
    x = torch.randn(4, 10, 64)
    changed = []
    original = inductor.fuse_roundings
    monkeypatch.setattr(inductor, "fuse_roundings", lambda graph: changed.append(original(graph)))
    torch._dynamo.reset()
    inductor.enable_inductor_pass()
    try:
        with torch.no_grad():
            found = torch.compile(model, fullgraph=True)(x)
            torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-3)
    finally:
        inductor.enable_inductor_pass(False)
        torch._dynamo.reset()
    # q and k share the norm's codes, gate and up those of h; the norm, gelu and silu times up round themselves.
    assert changed == [5]


def test_the_pass_keeps_what_others_read():
    from torch import fx

    from quantrain.nn.inductor import fuse_roundings

    class Twice(nn.Module):
        def forward(self, x):
            h = F.relu(x)
            codes, scale = torch.ops.quantrain.int8_quantize_rows.nearest(h)
            return codes, scale, h

    graph = fx.symbolic_trace(Twice()).graph
    assert fuse_roundings(graph) == 0
    assert quantrain.int8_relu(torch.ones(1, 4))[0].tolist() == [[127] * 4]
