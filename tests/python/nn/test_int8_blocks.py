"""Transformer blocks as one call each: against the same model's separate layers, and in everything else that users do with a model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import quantrain
import quantrain.nn as qnn
import quantrain.ptq
from quantrain.nn import int8_blocks

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 97, "max_position_embeddings": 64}
LLAMA = SIZES | TEXT | {"num_key_value_heads": 2}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DISTILBERT = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)),
    "qwen2": lambda: transformers.Qwen2Model(transformers.Qwen2Config(**LLAMA)),
    "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**LLAMA, sliding_window=None)),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTILBERT, **TEXT)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)),
    "llama head": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "gpt2 head": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}
ENCODERS = ("bert", "distilbert", "vit")
DECODERS = ("gpt2", "llama", "qwen2", "mistral")
RECIPES = ("int8-training", "int8-static", "zeroquant-w8a8", "llm-int8", "zeroquant-w4a8", "smoothquant-w8a8")
TOKENS = 20
# Of the float model's last hidden state; weights of 4 bits have 15 levels.
NEAR_FLOAT = {"zeroquant-w4a8": 0.35, "int8-static": 0.1}
# Fused and separate layers round the same values; what float32 makes of them may fall to the other side of a tie.
NEAR_SEPARATE = 0.02


def each_model(*names):
    return pytest.mark.parametrize("name", names)


def model(name, seed=0, attention="sdpa"):
    """A tiny model whose blocks change what they are given: random weights of transformers are too small for that."""
    torch.manual_seed(seed)
    made = MODELS[name]().eval()
    made.set_attn_implementation(attention)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if weight.dim() == 2 and not any(part in path for part in ("embed", "wte", "wpe", "lm_head")):
                weight.mul_(8)
    return made


def inputs(name, seed=0):
    g = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}
    return {"input_ids": torch.randint(3, 97, (3, TOKENS), generator=g)}


def prepared(name, recipe="int8-training", seed=0, attention="sdpa"):
    made = qnn.prepare(model(name, seed, attention), recipe, skip=["lm_head"] if "head" in name else [])
    if any(layer.needs_range for layer in made.modules() if isinstance(layer, qnn.QuantLayer)):
        qnn.calibrate(made, [inputs(name, 1), inputs(name, 2)])
    return made


def converted(name, recipe="int8-training", seed=0, attention="sdpa", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BERT's pooler and others that a batch does not reach
        return qnn.convert(prepared(name, recipe, seed, attention), **options)


def separate(fused):
    return qnn.unfuse_int8_blocks(copy.deepcopy(fused))


def blocks(made):
    return [module for module in made.modules() if isinstance(module, qnn.Int8Block)]


@torch.no_grad()
def hidden(made, given, **more):
    return made(**given | more).last_hidden_state


def error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture
def calls(monkeypatch):
    """Blocks that ran as one call, one after the other."""
    seen, run = [], qnn.Int8Block._run_int8

    def counted(self, *args):
        seen.append(self)
        return run(self, *args)

    monkeypatch.setattr(qnn.Int8Block, "_run_int8", counted)
    return seen


# ---- which blocks, and what they give ----


@pytest.mark.parametrize("recipe", RECIPES)
@each_model(*ENCODERS, *DECODERS)
def test_blocks_become_one_call(name, recipe, calls):
    fused, given = converted(name, recipe), inputs(name)
    summary = fused.quantization_summary
    with_own_factors = (
        recipe == "smoothquant-w8a8" and name != "gpt2"
    )  # queries, keys and values are layers of their own
    calls.clear()
    found = hidden(fused, given)
    expected = hidden(separate(fused), given)
    if with_own_factors:
        assert not blocks(fused) and not calls and not summary.fused and len(summary.separate) == 2
        assert all("do not share their input_factor" in reason for reason in summary.separate.values())
        assert "separate layers: " in str(summary)
    else:
        assert len(blocks(fused)) == len(calls) == 2 and not summary.separate
        assert len(summary.fused) == 1 and "2 blocks like " in summary.fused[0]
        assert f"joined: {summary.fused[0]}" in str(summary)
    assert error(found, expected) < NEAR_SEPARATE
    assert error(found, hidden(model(name), given)) < NEAR_FLOAT.get(recipe, 0.07)
    assert error(hidden(fused, given), found) == 0


@each_model(*ENCODERS, *DECODERS)
def test_a_model_that_trains_may_be_converted(name, calls):
    given = inputs(name)
    training = qnn.convert(qnn.prepare(model(name).train(), "int8-training"))
    assert len(blocks(training)) == 2 and not training.quantization_summary.separate
    expected = hidden(converted(name), given)
    calls.clear()
    hidden(training, given)
    assert not calls
    assert torch.equal(hidden(training.eval(), given), expected) and len(calls) == 2


def test_names_in_the_summary():
    fused = converted("bert")
    (line,) = fused.quantization_summary.fused
    assert line == "2 blocks like BERT's, one call each: encoder.layer.0 to encoder.layer.1"
    assert type(blocks(fused)[0]).__name__ == "Int8BertLayer"
    assert isinstance(blocks(fused)[0], type(model("bert").encoder.layer[0]))


@each_model("bert", "llama")
def test_separate_layers_where_they_are_asked_for(name):
    fused, plain = converted(name), converted(name, fuse_blocks=False)
    assert not blocks(plain) and plain.quantization_summary.fused == () and not plain.quantization_summary.separate
    given = inputs(name)
    assert torch.equal(hidden(plain, given), hidden(separate(fused), given))
    found = qnn.fuse_int8_blocks(plain)
    assert len(found.fused) == 2 and len(blocks(plain)) == 2
    assert torch.equal(hidden(plain, given), hidden(fused, given))
    assert qnn.fuse_int8_blocks(plain).fused == {}  # they are already
    back = qnn.unfuse_int8_blocks(plain)
    assert (
        back is plain and not blocks(back) and not any(n.startswith("_int8") for b in back.modules() for n in vars(b))
    )


def test_a_copy_is_fused_too():
    made = prepared("gpt2")
    fused = qnn.convert(made, inplace=False)
    assert len(blocks(fused)) == 2 and not blocks(made)
    assert not blocks(qnn.convert(made, inplace=False, fuse_blocks=False))


def test_models_without_known_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)

        def forward(self, x):
            return self.norm(x + self.second(self.first(x).relu()))

    torch.manual_seed(0)
    made = nn.Sequential(Block(), Block())
    x, expected = torch.randn(30, 32), made(torch.zeros(30, 32))
    assert expected.shape == x.shape
    exact = made(x)
    made = qnn.convert(qnn.prepare(made, "int8-training"))
    assert not blocks(made) and not made.quantization_summary.fused and not made.quantization_summary.separate
    assert "joined" not in str(made.quantization_summary) and "separate" not in str(made.quantization_summary)
    assert error(made(x), exact) < 0.03


def test_a_block_with_something_else_inside_keeps_its_layers():
    made = model("bert")
    made.encoder.layer[1].scale = nn.Parameter(torch.ones(64))
    made.encoder.layer[0].output.extra = nn.LayerNorm(64)
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    reasons = fused.quantization_summary.separate
    assert set(reasons) == {"encoder.layer.0", "encoder.layer.1"}
    assert "it holds 'output.extra' besides" in reasons["encoder.layer.0"]
    assert "it holds parameters of its own" in reasons["encoder.layer.1"]


def test_a_block_that_does_something_else_keeps_its_layers():
    """The same parts, another forward: the trial finds it."""

    class Other(type(model("bert").encoder.layer[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return 2 * super().forward(hidden_states, *args, **kwargs)

    made = model("bert")
    made.encoder.layer[1].__class__ = Other
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    assert list(fused.quantization_summary.separate) == ["encoder.layer.1"] and len(blocks(fused)) == 1
    given = inputs("bert")
    assert error(hidden(fused, given), hidden(separate(fused), given)) < NEAR_SEPARATE


def positions(kind):
    """Llama's structure, other positions: SmolLM3 has none in every fourth layer, Helium rotates neighbours."""
    classes = {
        "smollm3": (transformers.SmolLM3ForCausalLM, transformers.SmolLM3Config, {}),
        "helium": (transformers.HeliumForCausalLM, transformers.HeliumConfig, {"head_dim": 16}),
    }
    made, config, more = classes[kind]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return made(config(**LLAMA | tokens | more | {"num_hidden_layers": 4})).eval()


@pytest.mark.parametrize("kind", ["smollm3", "helium"])
@pytest.mark.parametrize("factor", [1, 10])
def test_what_weights_of_a_new_model_hide_is_found(kind, factor, tmp_path):
    """Attention that hardly looks at positions, as a new model's, and a trained model's, loaded into it."""
    torch.manual_seed(0)
    made = positions(kind)
    for name, weight in made.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= factor
    fused = qnn.convert(qnn.prepare(made, "w8a16"))
    unlike = ["model.layers.3"] if kind == "smollm3" else [f"model.layers.{i}" for i in range(4)]
    assert list(fused.quantization_summary.separate) == unlike and len(blocks(fused)) == 4 - len(unlike)
    ids = torch.randint(3, 97, (1, 24))
    expected = separate(fused)(ids).logits
    assert error(fused(ids).logits, expected) < 1e-4
    qnn.save_checkpoint(tmp_path / "trained.safetensors", fused)
    other = qnn.convert(qnn.prepare(positions(kind), "w8a16"))
    qnn.load_checkpoint(tmp_path / "trained.safetensors", other)
    for read in (other, qnn.from_checkpoint(tmp_path / "trained.safetensors", positions(kind))):
        assert list(read.quantization_summary.separate) == unlike
        assert error(read(ids).logits, expected) < 1e-4


@pytest.mark.parametrize("recipe", ["w8a16", "int8-static"])
def test_the_summary_says_how_blocks_run_now(recipe, tmp_path):
    given = inputs("bert")
    made = qnn.prepare(model("bert"), recipe)
    if recipe == "int8-static":
        qnn.calibrate(made, [given], forward=lambda of, batch: of(**batch))
    made = qnn.convert(made)
    said = made.quantization_summary.fused
    assert len(said) == 1 and said[0].startswith("2 blocks like BERT's")
    qnn.save_checkpoint(tmp_path / "m.safetensors", made)
    read = qnn.from_checkpoint(tmp_path / "m.safetensors", model("bert"))
    assert read.quantization_summary.fused == said and not read.quantization_summary.separate and len(blocks(read)) == 2
    plain = qnn.from_checkpoint(tmp_path / "m.safetensors", model("bert"), fuse_blocks=False)
    assert not blocks(plain) and plain.quantization_summary.fused == ()
    torch.testing.assert_close(hidden(plain, given), hidden(qnn.unfuse_int8_blocks(made), given), rtol=0, atol=0)
    assert made.quantization_summary.fused == () and len(made.quantization_summary.rows) == len(
        read.quantization_summary.rows
    )


class Doubled(nn.Module):
    """An adapter around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 2


def _set_data(part, name, value):
    getattr(part, name).data = value


CHANGES = {
    "norm weight's data": lambda b: _set_data(b.output.LayerNorm, "weight", torch.linspace(-2, 2, 64)),
    "bias's data": lambda b: _set_data(b.output.dense, "bias", torch.linspace(-2, 2, 64)),
    "scale's data": lambda b: _set_data(b.output.dense, "weight_scale", b.output.dense.weight_scale * 3),
    "activation": lambda b: setattr(b.intermediate, "intermediate_act_fn", nn.ReLU()),
    "function": lambda b: setattr(b.intermediate, "intermediate_act_fn", nn.Tanh()),
    "eps": lambda b: setattr(b.output.LayerNorm, "eps", 2.0),
    "scaling": lambda b: setattr(b.attention.self, "scaling", 2.0),
    "dropout": lambda b: setattr(b.output, "dropout", nn.Sequential(nn.Tanh())),
    "adapter": lambda b: setattr(b.attention.self, "query", Doubled(b.attention.self.query)),
    "norm": lambda b: setattr(b.output, "LayerNorm", nn.Identity()),
    "norm's parameter": lambda b: setattr(b.output.LayerNorm, "weight", nn.Parameter(torch.linspace(-2, 2, 64))),
    "hook": lambda b: b.intermediate.register_forward_hook(lambda module, args, output: output * 2),
    "writing hook": lambda b: b.register_forward_hook(lambda module, args, output: _write(output)),
}


def _write(output):
    (output[0] if isinstance(output, tuple) else output).numpy()[:] *= -3


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_changed_after_conversion_is_computed_with(change, called, compiled):
    if compiled and change == "writing hook":
        pytest.skip("the compiler has no memory to write into")
    fused, given = converted("bert"), inputs("bert")
    plain = separate(fused)
    before = hidden(plain, given)
    if called:
        hidden(fused, given)
    for of in (fused, plain):
        CHANGES[change](of.encoder.layer[0])
    if compiled:
        torch._dynamo.reset()
        fused, plain = torch.compile(fused, backend="eager"), torch.compile(plain, backend="eager")
    found, expected = hidden(fused, given), hidden(plain, given)
    assert error(found, expected) < NEAR_SEPARATE < error(expected, before)


@torch.no_grad()
def test_dropout_that_trains_alone_is_run():
    fused, given = converted("bert"), inputs("bert")
    for module in fused.encoder.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(hidden(fused, given), hidden(fused, given))


@torch.no_grad()
def test_a_parametrized_norm_is_computed_each_time():
    class Times(nn.Module):
        factor = 1.0

        def forward(self, weight):
            return weight * self.factor

    fused, given = converted("bert"), inputs("bert")
    plain = separate(fused)
    for of in (fused, plain):
        nn.utils.parametrize.register_parametrization(of.encoder.layer[0].output.LayerNorm, "weight", Times())
        hidden(of, given)
        of.encoder.layer[0].output.LayerNorm.parametrizations.weight[0].factor = -3.0
    assert error(hidden(fused, given), hidden(plain, given)) < NEAR_SEPARATE


def test_a_gradient_is_refused_where_only_norms_train():
    fused = converted("bert")
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    fused.encoder.layer[1].output.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="derivative for quantrain::int8_mm is not implemented"):
        fused.encoder.layer[1].attention.output.LayerNorm.requires_grad_(True)
        fused(**inputs("bert")).last_hidden_state.sum().backward()


@pytest.mark.parametrize("activation", ["relu6", "gelu_10"])
def test_clipped_activations_are_none_of_the_known(activation):
    made = qnn.convert(
        qnn.prepare(
            transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT, hidden_act=activation)).eval(),
            "int8-training",
        )
    )
    assert all("has no kernel there" in reason for reason in made.quantization_summary.separate.values())
    assert len(made.quantization_summary.separate) == 2


def test_structures_that_come_near_are_left():
    config = transformers.GPTBigCodeConfig(n_embd=64, n_layer=1, n_head=4, vocab_size=97)
    made = qnn.convert(qnn.prepare(transformers.GPTBigCodeModel(config).eval(), "zeroquant-w8a8"))
    assert "of different sizes" in made.quantization_summary.separate["h.0"]
    made = model("bert")
    made.encoder.layer[0].output.LayerNorm = nn.LayerNorm(64, elementwise_affine=False)
    made.encoder.layer[1].attention.register_forward_hook(lambda module, args, output: None)
    reasons = qnn.convert(qnn.prepare(made, "int8-training")).quantization_summary.separate
    assert "a norm has no weight" in reasons["encoder.layer.0"] and "attention has hooks" in reasons["encoder.layer.1"]


def test_hooks_do_not_hear_of_the_trial():
    made, heard = model("bert"), []
    made.encoder.layer[0].register_forward_hook(lambda module, args, output: heard.append(args[0].shape))
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    assert len(blocks(fused)) == 2 and not heard
    hidden(fused, inputs("bert"))
    assert len(heard) == 1


def test_a_torch_encoder_refuses_what_its_layers_refuse():
    made = nn.TransformerEncoderLayer(32, 4, 64, batch_first=False).eval()
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    x = torch.randn(12, 3, 32)
    with torch.no_grad():
        fused(x)
        for wrong in (
            {"is_causal": True},
            {"src_mask": torch.zeros(1, 12)},
            {"src_key_padding_mask": torch.zeros(1, 12, dtype=torch.bool)},
        ):
            with pytest.raises((RuntimeError, AssertionError)):
                fused(x, **wrong)


@pytest.mark.parametrize("sequential", [True, False])
def test_quantize_block_by_block_says_what_is_fused(sequential):
    ids = [torch.randint(0, 97, (2, 16)) for _ in range(2)]
    made = quantrain.ptq.quantize(model("llama head"), "gptq-w4a16", ids, sequential=sequential)
    assert len(blocks(made)) == 2 and made.quantization_summary.fused[0].startswith("2 blocks like Llama's")


def test_a_transformer_without_a_known_block_says_so():
    config = transformers.OPTConfig(
        **TEXT, hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64
    )
    made = qnn.convert(qnn.prepare(transformers.OPTForCausalLM(config).eval(), "w8a16"))
    reasons = made.quantization_summary.separate
    assert list(reasons) == [""] and "no block has the structure of a known one: BERT, DistilBERT" in reasons[""]


def test_a_trial_that_fails_is_named(monkeypatch, calls):
    monkeypatch.setattr(int8_blocks, "_LARGEST_ERROR", -1)
    made, given = converted("llama"), inputs("llama")
    reasons = made.quantization_summary.separate
    assert set(reasons) == {"layers.0", "layers.1"} and not blocks(made)
    assert all("off what its layers give" in reason for reason in reasons.values())
    assert "separate layers: layers.0 (a block like Llama's: " in str(made.quantization_summary)
    calls.clear()
    assert error(hidden(made, given), hidden(model("llama"), given)) < 0.07 and not calls


def test_different_recipes_in_a_block():
    made = qnn.prepare(model("bert"), "zeroquant-w8a8", overrides={"*.0.output.dense": "llm-int8"})
    qnn.calibrate(made, [inputs("bert")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = qnn.convert(made)
    given = inputs("bert")
    assert error(hidden(fused, given), hidden(separate(fused), given)) < NEAR_SEPARATE
    made = qnn.convert(qnn.prepare(model("bert"), "int8-training", skip=["encoder.layer.0.intermediate.dense"]))
    assert list(made.quantization_summary.separate) == ["encoder.layer.0"] and len(blocks(made)) == 1
    assert "without an int8 product" in made.quantization_summary.separate["encoder.layer.0"]


# ---- masks ----


def padding(left):
    mask = torch.ones(3, TOKENS, dtype=torch.int64)
    for row, length in enumerate((TOKENS, 13, 7)):
        mask[row, : TOKENS - length] = 0 if left else 1
        mask[row, length:] = 1 if left else 0
    return mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@each_model("bert", "distilbert", "gpt2", "llama")
def test_padding(name, left, attention, calls):
    fused, given, mask = converted(name, attention=attention), inputs(name), padding(left)
    calls.clear()
    found = hidden(fused, given, attention_mask=mask)
    assert len(calls) == 2
    expected = hidden(separate(fused), given, attention_mask=mask)
    real = mask.bool()
    assert error(found[real], expected[real]) < NEAR_SEPARATE and found.isfinite().all()
    # A padded sequence is what it is alone.
    positions = {} if name in ("bert", "distilbert", "llama") else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if not left or name == "gpt2":
        found = hidden(fused, given, attention_mask=mask, **positions)
        for row in (1, 2):
            alone = hidden(fused, {"input_ids": given["input_ids"][row : row + 1, real[row]]})
            assert error(found[row : row + 1, real[row]], alone) < NEAR_SEPARATE


@each_model("bert", "gpt2", "llama")
def test_masks_of_four_dimensions(name, calls):
    given, g = inputs(name), torch.Generator().manual_seed(4)
    allowed = (torch.rand(3, 1, TOKENS, TOKENS, generator=g) < 0.6) | torch.eye(TOKENS, dtype=torch.bool)
    added = torch.zeros(3, 1, TOKENS, TOKENS).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for attention, masks in (("sdpa", (allowed, added)), ("eager", (added,))):
        fused = converted(name, attention=attention)
        plain, results = separate(fused), []
        for mask in masks:
            calls.clear()
            results.append(hidden(fused, given, attention_mask=mask))
            assert len(calls) == 2
            assert error(results[-1], hidden(plain, given, attention_mask=mask)) < NEAR_SEPARATE
        assert error(results[0], results[-1]) < NEAR_SEPARATE
        assert error(hidden(fused, given), results[0]) > 0.03  # the mask matters


@each_model("bert", "llama", "vit")
def test_another_attention_implementation_after_conversion(name, calls):
    fused, given = converted(name), inputs(name)
    first = hidden(fused, given)
    fused.set_attn_implementation("eager")
    calls.clear()
    assert error(hidden(fused, given), first) < NEAR_SEPARATE and len(calls) == 2


# ---- generation ----


@pytest.mark.parametrize("recipe", ["int8-training", "zeroquant-w8a8", "llm-int8"])
@each_model("llama head", "gpt2 head")
def test_generation(name, recipe, calls):
    fused, given = converted(name, recipe), inputs(name)["input_ids"]
    assert len(blocks(fused)) == 2
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(given)
    calls.clear()
    found = fused.generate(given, attention_mask=mask, **settings)
    assert len(calls) == 16
    expected = separate(fused).generate(given, attention_mask=mask, **settings)
    assert found.shape == (3, TOKENS + 8) and (found == expected)[:, TOKENS:].float().mean() > 0.7
    mask = padding(left=True)
    found = fused.generate(given, attention_mask=mask, **settings)
    expected = separate(fused).generate(given, attention_mask=mask, **settings)
    assert (found == expected)[:, TOKENS:].float().mean() > 0.7


@each_model("llama head", "gpt2 head")
@torch.no_grad()
def test_a_cache_changes_nothing(name, calls):
    """Rows in int8 have a scale for each token, so a token alone is what it is among others."""
    fused, given = converted(name), inputs(name)["input_ids"]
    expected = fused(given, use_cache=False).logits
    calls.clear()
    result = fused(given[:, :12], use_cache=True)
    logits = [result.logits]
    for part in (given[:, 12:13], given[:, 13:18], given[:, 18:]):  # one token and several beside what is kept
        result = fused(part, past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    assert len(calls) == 8
    assert error(torch.cat(logits, 1), expected) < 1e-3


@torch.no_grad()
def test_a_cache_of_fixed_size():
    fused, given = converted("llama head"), inputs("llama head")["input_ids"]
    cache = transformers.StaticCache(config=fused.config, max_cache_len=TOKENS + 4)
    logits = [fused(given[:, :15], past_key_values=cache, use_cache=True).logits]
    for at in range(15, TOKENS):
        logits.append(fused(given[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    assert error(torch.cat(logits, 1), fused(given, use_cache=False).logits) < 1e-3


# ---- when the separate layers run ----


@each_model("bert", "gpt2", "llama", "vit")
@torch.no_grad()
def test_states_and_attentions_of_all_layers(name, calls):
    fused, given = converted(name, attention="eager"), inputs(name)
    plain, float_model = separate(fused), model(name, attention="eager")
    expected = hidden(fused, given)
    for _ in range(2):
        states = fused(**given, output_hidden_states=True).hidden_states
        assert len(states) == 3
        for one, other in zip(states, plain(**given, output_hidden_states=True).hidden_states, strict=True):
            assert error(one, other) < NEAR_SEPARATE
        calls.clear()
        weights = fused(**given, output_attentions=True).attentions
        assert len(weights) == 2 and not calls  # one call has no weights of attention
        for one, other in zip(weights, float_model(**given, output_attentions=True).attentions, strict=True):
            assert one.shape == other.shape and error(one, other) < 0.1
        calls.clear()
        assert torch.equal(hidden(fused, given), expected) and len(calls) == 2


def test_hooks_inside_a_block_are_called(calls):
    fused, given = converted("bert"), inputs("bert")
    expected, block, seen = hidden(fused, given), blocks(fused)[0], []
    for inner in (block.attention.self.query, block.intermediate, block.output.LayerNorm):
        for register in (inner.register_forward_hook, inner.register_forward_pre_hook):
            calls.clear()
            handle = register(lambda *args: seen.append(args[0]))
            assert error(hidden(fused, given), expected) < NEAR_SEPARATE
            assert seen == [inner] and calls == [blocks(fused)[1]]
            seen.clear()
            handle.remove()
    handle = block.attention.self.query.register_forward_hook(lambda module, args, output: 0 * output)
    assert error(hidden(fused, given), expected) > 0.03
    handle.remove()
    calls.clear()
    handles = [block.register_forward_hook(lambda *args: seen.append(args[2])), block.register_forward_pre_hook(lambda *args: None)]  # fmt: skip
    assert torch.equal(hidden(fused, given), expected)
    assert len(calls) == 2 and len(seen) == 1  # hooks of the block itself need nothing from inside
    for handle in handles:
        handle.remove()


@each_model("bert", "llama")
def test_training_gradients_and_autocast(name, calls):
    fused, given = converted(name), inputs(name)
    hidden(fused, given)
    embedded = fused.get_input_embeddings()(given["input_ids"]).detach()
    calls.clear()
    fused.train()
    hidden(fused, given)
    fused.eval()
    assert not calls
    fused(inputs_embeds=embedded.clone().requires_grad_())
    assert not calls
    for given_embeddings in (embedded, embedded.clone().requires_grad_()):
        calls.clear()
        found = hidden(fused, {"inputs_embeds": given_embeddings})
        assert len(calls) == 2 and not found.requires_grad
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(hidden(fused, given), found) < 0.05
    assert not calls
    with torch.inference_mode():
        assert error(fused(**given).last_hidden_state, found) == 0
    assert len(calls) == 2


def test_cross_attention_keeps_its_layers():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **TEXT, is_decoder=True, add_cross_attention=True)
    made = transformers.BertModel(config).eval()
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    given, states = inputs("bert"), torch.randn(3, 9, 64)
    assert not blocks(fused) and set(fused.quantization_summary.separate) == {"encoder.layer.0", "encoder.layer.1"}
    assert hidden(fused, given, encoder_hidden_states=states).isfinite().all()


def test_a_decoder_of_bert(calls):
    """Causal, though its attention serves encoders as well."""
    torch.manual_seed(0)
    made = transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT, is_decoder=True)).eval()
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if weight.dim() == 2 and "embed" not in path:
                weight.mul_(8)
    fused, given = qnn.convert(qnn.prepare(made, "int8-training")), inputs("bert")
    calls.clear()
    found = hidden(fused, given)
    assert error(found, hidden(separate(fused), given)) < NEAR_SEPARATE
    shorter = hidden(fused, {"input_ids": given["input_ids"][:, :11]})
    assert error(found[:, :11], shorter) < NEAR_SEPARATE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window(attention):
    """Fused or not: a token sees its window, whether the mask says so or the attention."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**LLAMA, sliding_window=5, attn_implementation=attention)
    made = transformers.MistralModel(config).eval()
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if weight.dim() == 2 and "embed" not in path:
                weight.mul_(8)
    given = inputs("mistral")
    exact = hidden(made, given)
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    found = hidden(fused, given)
    assert error(found, hidden(separate(fused), given)) < NEAR_SEPARATE and error(found, exact) < 0.07


# ---- torch.nn.TransformerEncoder ----


def encoder(batch_first, norm_first, activation="gelu"):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0.0, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if weight.dim() == 2:
                weight.mul_(2 if "in_proj" in path else 4)
    return made


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["tokens first", "batch first"])
@torch.no_grad()
def test_torch_encoder(batch_first, norm_first, activation, calls):
    made, g = encoder(batch_first, norm_first, activation), torch.Generator().manual_seed(3)
    x = torch.randn((3, TOKENS, 64) if batch_first else (TOKENS, 3, 64), generator=g)
    left_out = (torch.rand(TOKENS, TOKENS, generator=g) < 0.4) & ~torch.eye(TOKENS, dtype=torch.bool)
    added = torch.zeros(TOKENS, TOKENS).masked_fill(left_out, -torch.inf)
    padding_mask = ~padding(left=False).bool()
    by_head = left_out.repeat(12, 1, 1)
    forms = [
        {},
        {"mask": left_out},
        {"mask": added},
        {"mask": by_head},
        {"src_key_padding_mask": padding_mask},
        {"mask": left_out, "src_key_padding_mask": padding_mask},
        {"mask": added, "src_key_padding_mask": torch.zeros(3, TOKENS).masked_fill(padding_mask, -torch.inf)},
        {"mask": nn.Transformer.generate_square_subsequent_mask(TOKENS), "is_causal": True},
    ]
    with pytest.MonkeyPatch.context() as patch:  # PyTorch's fast path gives NaN for some rows of padding
        patch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
        exact = [made(x, **given) for given in forms]
    fused = qnn.convert(qnn.prepare(made, "int8-training"))
    assert len(blocks(fused)) == 2 and not fused.quantization_summary.separate
    plain = separate(fused)
    for given, wanted in zip(forms, exact, strict=True):
        calls.clear()
        found, expected = fused(x, **given), plain(x, **given)
        assert len(calls) == 2 and found.shape == x.shape
        real = torch.ones(3, TOKENS, dtype=torch.bool)
        if "src_key_padding_mask" in given:  # of a padding token nobody asks
            real = padding(left=False).bool()
        real = real if batch_first else real.t()
        assert error(found[real], expected[real]) < NEAR_SEPARATE and error(found[real], wanted[real]) < 0.05
    calls.clear()
    assert error(fused(x[:, 0]), plain(x[:, 0])) < NEAR_SEPARATE  # one sequence without a batch
    fused.train()(x)
    assert not calls


# ---- codes from block to block ----


def test_codes_go_from_block_to_block(monkeypatch):
    fused, given, found = converted("bert"), inputs("bert"), []
    take = int8_blocks._handed_over

    def taken(tensor):
        found.append(take(tensor)[0] is not None)
        return take(tensor)

    monkeypatch.setattr(int8_blocks, "_handed_over", taken)
    expected = hidden(fused, given)
    assert found == [False, True]
    with torch.inference_mode():  # writes are not counted there
        assert error(fused(**given).last_hidden_state, expected) < NEAR_SEPARATE
    assert found[2:] == [False, False]


@pytest.mark.parametrize("change", ["in place", "new"])
def test_codes_of_a_state_that_was_changed_are_dropped(change):
    fused, given = converted("bert"), inputs("bert")
    plain, before = separate(fused), hidden(fused, given)

    def hook(module, args, output):
        return output.add_(1) if change == "in place" else output + 1

    for made in (fused, plain):
        made.encoder.layer[0].register_forward_hook(hook)
    found, expected = hidden(fused, given), hidden(plain, given)
    assert error(found, expected) < NEAR_SEPARATE and error(found, before) > 0.05


# ---- files, copies, types ----


@pytest.mark.parametrize("recipe", RECIPES)
@each_model("bert", "llama")
def test_files(name, recipe, tmp_path):
    fused, given = converted(name, recipe), inputs(name)
    expected = hidden(fused, given)
    plain = converted(name, recipe, fuse_blocks=False).state_dict()
    assert list(fused.state_dict()) == list(plain)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in fused.state_dict().items())
    path = tmp_path / "model.safetensors"
    qnn.save_checkpoint(path, fused)
    skeleton = qnn.convert(qnn.prepare(model(name, seed=9), recipe), check_observed=False)
    qnn.load_checkpoint(path, skeleton)
    assert error(hidden(skeleton, given), expected) < (NEAR_SEPARATE if recipe == "smoothquant-w8a8" else 1e-6)
    again = qnn.from_checkpoint(path, model(name, seed=9).train())
    assert len(blocks(again)) == len(blocks(fused)) == (0 if recipe == "smoothquant-w8a8" else 2)
    assert error(hidden(again, given), expected) < (NEAR_SEPARATE if recipe == "smoothquant-w8a8" else 1e-6)


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@each_model("bert", "llama", "gpt2")
def test_copies(name, called, calls, tmp_path):
    fused, given = converted(name), inputs(name)
    expected = hidden(fused, given) if called else hidden(separate(fused), given)
    torch.save(fused, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(fused),
        copy.copy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in copies:
        assert len(blocks(other)) == 2 and type(blocks(other)[0]) is type(blocks(fused)[0])
        calls.clear()
        assert error(hidden(other, given), expected) < NEAR_SEPARATE and len(calls) == 2
    with torch.no_grad():  # a copy is a model of its own
        for tensor in blocks(copies[0])[0].buffers():
            tensor.zero_()
    assert error(hidden(copies[0], given), expected) > 0.03
    assert error(hidden(fused, given), expected) < NEAR_SEPARATE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_model("bert", "gpt2", "llama")
def test_types_of_16_bits(name, dtype, calls):
    fused, given = converted(name), inputs(name)
    expected = hidden(fused, given)
    plain = separate(fused).to(dtype)
    fused = fused.half() if dtype == torch.float16 else fused.to(dtype)
    calls.clear()
    found = hidden(fused, given)
    assert found.dtype == dtype and len(calls) == 2
    room = 0.06  # the rounding to 16 bits between the layers moves codes, of the separate layers too
    assert error(found, hidden(plain, given)) < room and error(found, expected) < room
    assert error(hidden(fused.float(), given), expected) < room


@each_model("bert", "llama")
def test_loading_after_a_call_is_seen(name):
    fused, other, given = converted(name), converted(name, seed=5), inputs(name)
    first, expected = hidden(fused, given), hidden(other, given)
    assert error(first, expected) > 0.1
    fused.load_state_dict(other.state_dict())
    assert error(hidden(fused, given), expected) < 1e-6
    fused.load_state_dict(copy.deepcopy(converted(name)).state_dict(), assign=True)
    assert error(hidden(fused, given), first) < 1e-6
    mine, theirs = blocks(fused), blocks(other)
    for block, another in zip(mine, theirs, strict=True):  # part by part
        for (_, child), (_, source) in zip(block.named_children(), another.named_children(), strict=True):
            child.load_state_dict(source.state_dict())
    fused.get_input_embeddings().load_state_dict(other.get_input_embeddings().state_dict())
    found = separate(fused)
    assert error(hidden(fused, given), hidden(found, given)) < 1e-6


@each_model("bert", "llama")
def test_changed_values_are_seen(name):
    fused, given = converted(name), inputs(name)
    before = hidden(fused, given)
    for block in blocks(fused):
        norm = next(m for m in block.modules() if "norm" in type(m).__name__.lower())
        with torch.no_grad():
            norm.weight.mul_(1.5)
        changed = hidden(fused, given)
        assert error(changed, hidden(separate(fused), given)) < NEAR_SEPARATE and error(changed, before) > 0.01
        with torch.no_grad():
            norm.weight.div_(1.5)
        assert error(hidden(fused, given), before) < NEAR_SEPARATE


@each_model("bert", "llama")
def test_replaced_tensors_are_seen(name):
    fused, given = converted(name), inputs(name)
    before = hidden(fused, given)
    for block in blocks(fused):
        norm = next(m for m in block.modules() if "norm" in type(m).__name__.lower())
        norm.weight = nn.Parameter(2 * norm.weight.detach())
    found = hidden(fused, given)
    assert error(found, hidden(separate(fused), given)) < NEAR_SEPARATE and error(found, before) > 0.01


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
def test_replaced_modules_are_called(called):
    """What adapters do: another module in the layer's place."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    fused, given = converted("bert"), inputs("bert")
    before = hidden(fused, given) if called else hidden(separate(fused), given)
    block = blocks(fused)[0]
    block.intermediate.dense = Doubled(block.intermediate.dense)
    expected = hidden(separate(fused), given)
    assert error(expected, before) > 0.03
    assert error(hidden(fused, given), expected) < NEAR_SEPARATE


def storages(made):
    held = {}
    for tensor in (*made.parameters(), *made.buffers()):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    for block in blocks(made):
        for tensor in () if block._int8_state is None else block._int8_state.weights:
            if tensor is not None:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.parametrize("recipe", ["int8-training", "zeroquant-w4a8", "llm-int8"])
@each_model("bert", "llama", "qwen2")
def test_joined_weights_are_held_once(name, recipe):
    fused, plain = converted(name, recipe), converted(name, recipe, fuse_blocks=False)
    hidden(fused, inputs(name))
    assert storages(fused) <= storages(plain) * 1.001 + 64
    attention = blocks(fused)[0].attention.self if name == "bert" else blocks(fused)[0].self_attn
    parts = [attention.query, attention.key] if name == "bert" else [attention.q_proj, attention.k_proj]
    first, second = (part.weight_codes for part in parts)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.data_ptr() + first.nbytes == second.data_ptr() and first.is_contiguous()


# ---- compilers ----


@each_model("bert", "gpt2", "llama")
def test_compiled(name):
    torch.compiler.reset()
    fused, given = converted(name), inputs(name)
    expected = hidden(fused, given)
    compiled = torch.compile(fused, backend="aot_eager")
    assert error(hidden(compiled, given), expected) < NEAR_SEPARATE
    shorter = {"input_ids": given["input_ids"][:2, :15]}
    assert error(hidden(compiled, shorter), hidden(fused, shorter)) < NEAR_SEPARATE
    assert error(hidden(fused, given), expected) < 1e-6
