"""Rotated decoders: the same function, fewer outliers, nothing left of the pass, and models of another kind refused."""

import copy
import doctest
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantrain.nn as qnn
from quantrain import ptq
from quantrain.ptq.export import export_model

transformers = pytest.importorskip("transformers")
module = pytest.importorskip("quantrain.ptq.rotate")  # the name in the package is the function

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
KINDS = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head per head": ("Llama", {"num_key_value_heads": 4}),
    "llama, heads of 24": ("Llama", {"head_dim": 24, "hidden_size": 72}),
    "llama, an odd width": (
        "Llama",
        {"head_dim": 10, "hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def decoder(kind="Llama", **options):
    """Random, and no parameter of it is what a pass could take for nothing: gains are not 1, biases not 0."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 2.0)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def ids(rows=3, length=16):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(), use_cache=False).logits


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def with_exact_norms(model):
    """In float64 throughout: transformers' norms compute in float32."""
    for name, norm in list(model.named_modules()):
        if name.endswith("norm") and getattr(norm, "weight", None) is not None:
            exact = nn.RMSNorm(norm.weight.shape, eps=model.config.rms_norm_eps, dtype=torch.float64)
            exact.weight = norm.weight
            model.set_submodule(name, exact)
    return model


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_logits_stay(name, head):
    kind, options = KINDS[name]
    model = decoder(kind, **options)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    assert ptq.rotate(model, heads=head) is model
    assert relative(logits(model), before) < 1e-4
    after = model.state_dict()
    assert after.keys() == weights.keys()
    stays = (".q_proj.bias", ".k_proj.bias", ".gate_proj.bias", ".up_proj.bias", "q_norm.weight", "k_norm.weight")
    stays += () if head else (".v_proj.bias",)
    for key, value in after.items():
        assert value.dtype == weights[key].dtype
        assert torch.equal(value, weights[key]) == key.endswith(stays), key
        if key.endswith("norm.weight") and not key.endswith(stays):
            assert torch.equal(value, torch.ones_like(value))


@pytest.mark.parametrize("name", KINDS)
def test_logits_stay_in_float64(name):
    kind, options = KINDS[name]
    model = with_exact_norms(decoder(kind, **options).double())
    before = logits(model)
    assert relative(logits(ptq.rotate(model)), before) < 1e-9


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_models_of_16_bits(dtype, limit):
    model = decoder().to(dtype)
    before = logits(model)
    assert relative(logits(ptq.rotate(model)), before) < limit
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_generated_text_stays_and_modes_do():
    model = decoder().train()
    model.model.layers[0].eval()
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids()))
    before = copy.deepcopy(model).eval().generate(ids(), **options)
    ptq.rotate(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert torch.equal(model.eval().generate(ids(), **options), before)


# ---- the rotations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 256, 576, 640])
def test_a_rotation_is_what_the_docstring_says(size):
    """R = D (Q (x) H) / sqrt(n), with Q and H as dense matrices."""
    rotation = module._Rotation.drawn(size, torch.Generator().manual_seed(3))
    odd = size
    while odd % 2 == 0:
        odd //= 2
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] * odd < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    assert rotation.mixer.shape == (odd, odd) and set(rotation.signs.tolist()) <= {-1.0, 1.0}
    dense = rotation.signs[:, None] * torch.kron(rotation.mixer.contiguous(), hadamard) / hadamard.shape[0] ** 0.5
    torch.testing.assert_close(rotation(torch.eye(size, dtype=torch.float64)), dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(dense @ dense.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(2, 3 * size, dtype=torch.float64)
    whole = x.view(2, 3, size) @ dense
    torch.testing.assert_close(rotation(x), whole.flatten(1), rtol=0, atol=1e-12)


def test_the_weights_are_the_formulas():
    """With R1 and R2 as dense matrices, R2 per KV head of v_proj's rows and per query head of o_proj's columns."""
    before = decoder(attention_bias=True)
    after = ptq.rotate(copy.deepcopy(before), seed=5)
    generator = torch.Generator().manual_seed(5)
    dense = lambda size: module._Rotation.drawn(size, generator)(torch.eye(size, dtype=torch.float64))
    stream, values = dense(48), dense(12)
    old, new = before.double().model.layers[0], after.double().model.layers[0]
    gain = old.input_layernorm.weight
    kv, heads = torch.block_diag(values, values), torch.block_diag(*[values] * 4)
    close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    a, b = old.self_attn, new.self_attn
    close(after.model.embed_tokens.weight, before.model.embed_tokens.weight @ stream)
    close(b.q_proj.weight, a.q_proj.weight * gain @ stream)
    close(b.v_proj.weight, kv.T @ (a.v_proj.weight * gain) @ stream)
    close(b.v_proj.bias, a.v_proj.bias @ kv)
    close(b.o_proj.weight, stream.T @ a.o_proj.weight @ heads)
    close(b.o_proj.bias, a.o_proj.bias @ stream)
    close(new.mlp.up_proj.weight, old.mlp.up_proj.weight * old.post_attention_layernorm.weight @ stream)
    close(new.mlp.down_proj.weight, stream.T @ old.mlp.down_proj.weight)
    close(after.lm_head.weight, before.lm_head.weight * before.model.norm.weight @ stream)


def test_the_seed_decides():
    """And nothing else: the global generator neither gives nor loses numbers."""
    one = ptq.rotate(decoder(), seed=1).state_dict()
    model = decoder()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    same = ptq.rotate(model, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    other = ptq.rotate(decoder(), seed=2).state_dict()
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


# ---- heads tied to embeddings ----------------------------------------------------------------------------------------


def test_a_tied_head_gets_its_own_weight():
    model = decoder(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = logits(model)
    ptq.rotate(model)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert isinstance(model.lm_head.weight, nn.Parameter) and not model.config.tie_word_embeddings
    model.tie_weights()  # transformers, asked to tie what its configuration ties
    assert relative(logits(model), before) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_by_transformers(tied, tmp_path):
    model = ptq.rotate(decoder(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    read, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True
    )
    assert type(read) is type(model) and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert torch.equal(logits(read.eval()), logits(model))


def exported(tied, recipe, folder):
    model = decoder(tie_word_embeddings=tied)
    exact = logits(model)
    skip = ["lm_head", "*embed*"] if recipe == "w8a16" else []  # as the other recipe does by itself
    ptq.quantize(ptq.rotate(model), recipe, [{"input_ids": ids()}], skip=skip)
    export_model(model, folder, "vllm")
    return model, exact


@pytest.mark.parametrize("tied", [True, False])
def test_exported_in_int8(tied, tmp_path):
    """A reader of the file's weights finds a Llama that knows of no rotation."""
    model, exact = exported(tied, "zeroquant-w8a8", tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLM"] and not config["tie_word_embeddings"]
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    for name in [key.removesuffix("_scale") for key in tensors if key.endswith(".weight_scale")]:
        tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale")
        assert torch.equal(tensors[name], model.get_submodule(name.removesuffix(".weight")).dequantized_weight())
    read = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    read.load_state_dict(tensors)
    assert relative(logits(read), exact) < 0.03 and relative(logits(read), logits(model)) < 0.03


@pytest.mark.parametrize(("recipe", "limit"), [("w8a16", 1e-4), ("zeroquant-w8a8", 0.04)])
@pytest.mark.parametrize("tied", [True, False])
def test_exported_and_loaded_by_transformers(tied, recipe, limit, tmp_path):
    """The package compressed_tensors rounds inputs of 8 bits with other scales than vLLM and we, by absmax / 127.5."""
    for package in ("compressed_tensors", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    model, exact = exported(tied, recipe, tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert relative(logits(read), logits(model)) < limit
    assert relative(logits(read), exact) < 0.04


# ---- what it is for --------------------------------------------------------------------------------------------------


def with_an_outlier(size=100.0):
    """One column of the residual stream is large in every token and says nothing, as in trained models."""
    model = decoder(hidden_size=256, intermediate_size=384, tie_word_embeddings=False, initializer_range=0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.8, 1.2)
        model.model.embed_tokens.weight.normal_()[:, 5] = size
        model.lm_head.weight[:, 5] = 0
    return model


def test_int8_loses_less_after_it():
    model = with_an_outlier()
    exact = logits(model)
    plain = ptq.quantize(copy.deepcopy(model), "zeroquant-w8a8", check_batch=False)
    rotated = ptq.quantize(ptq.rotate(copy.deepcopy(model)), "zeroquant-w8a8", check_batch=False)
    assert relative(logits(rotated), exact) < 0.6 * relative(logits(plain), exact)


def crest(model):
    """Largest magnitude over root mean square of what the first norm gives: of 256 columns, at most 16."""
    given = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *call: given.append(call[-1]))
    logits(model)
    handle.remove()
    return float(given[0].abs().max() / given[0].square().mean().sqrt())


def test_the_outlier_is_spread_over_the_columns():
    model = with_an_outlier()
    assert crest(model) > 12
    assert crest(ptq.rotate(model)) < 3


# ---- refused, and unchanged then -------------------------------------------------------------------------------------


def refused(model, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        ptq.rotate(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def small(name, **options):
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def changed(change, **options):
    model = decoder(**options)
    change(model, model.model.layers[1])
    return model


def set_norm(norm):
    return lambda model, block: setattr(block, "post_attention_layernorm", norm)


class OnePlus(nn.RMSNorm):
    """Gemma's."""

    def forward(self, x):
        return torch.rms_norm(x, self.normalized_shape, None, self.eps) * (1 + self.weight)


class Scaled(nn.Embedding):
    pass


def test_gpt2_is_refused():
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=1, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    refused(model, "^rotate: expected a part 'model.embed_tokens', as Llama has, got none in GPT2LMHeadModel$")


def test_opt_is_refused():
    model = small("OPT", vocab_size=97, hidden_size=48, ffn_dim=80, num_hidden_layers=1, num_attention_heads=4,
                  word_embed_proj_dim=48)  # fmt: skip
    refused(model, "^rotate: expected a part 'model.embed_tokens', as Llama has, got none in OPTForCausalLM$")


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("Gemma", {"head_dim": 12}, "rotate: expected 'model.embed_tokens' to be an nn.Embedding, got GemmaText"),
        ("Cohere", {}, "rotate: expected 'model.layers.0.input_layernorm' to give x / rms"),  # and blocks in parallel
        ("Olmo2", {}, "rotate: expected a part 'model.layers.0.input_layernorm', as Llama has, got none"),
        ("Phi3", {"pad_token_id": 0}, "rotate: expected a part 'model.layers.0.self_attn.q_proj'"),
        ("StableLm", {}, "rotate: expected 'model.layers.0.input_layernorm' to be an RMSNorm of 48 weights alone"),
        ("Mixtral", {"num_local_experts": 2}, "rotate: expected a part 'model.layers.0.mlp.gate_proj'"),
        ("Glm4", {"head_dim": 12, "pad_token_id": 0}, "rotate: expected a part 'model.layers.0.mlp.gate_proj'"),
    ],
)
def test_models_of_another_kind_are_refused(kind, options, match):
    refused(decoder(kind, **options), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            set_norm(OnePlus(48)),
            r"'model.layers.1.post_attention_layernorm' to give x / rms\(x\) \* weight, got .* OnePlus",
        ),
        (set_norm(nn.LayerNorm(48, bias=False)), "'model.layers.1.post_attention_layernorm' to give x / rms"),
        (set_norm(nn.LayerNorm(48)), "'model.layers.1.post_attention_layernorm' to be an RMSNorm of 48 weights alone"),
        (lambda model, block: setattr(model.model, "embed_tokens", Scaled(97, 48)), "an nn.Embedding, got Scaled$"),
        (lambda model, block: setattr(model, "lm_head", nn.Identity()), "'lm_head' to be an nn.Linear, got Identity$"),
        (
            lambda model, block: setattr(model.model, "layers", nn.ModuleList()),
            "'model.layers' to hold blocks, got none",
        ),
        (
            lambda model, block: setattr(block.mlp, "up_proj", nn.Linear(40, 80)),
            "^rotate: expected 'model.layers.1.mlp.up_proj' to have 48 columns, got 40$",
        ),
        (
            lambda model, block: setattr(block.self_attn, "v_proj", nn.Linear(48, 12)),
            "'model.layers.1.self_attn' to have rows of q_proj .* whole heads of 12 in both, got 48 and 48, 24 and 12$",
        ),
        (
            lambda model, block: setattr(block.self_attn, "head_dim", None),
            "'model.layers.1.self_attn' to have a head_dim, got None$",
        ),
        (
            lambda model, block: setattr(block, "adapter", nn.Linear(48, 48)),
            "no parameters but those of Llama's parts, got 'model.layers.1.adapter.weight'$",
        ),
        (
            lambda model, block: setattr(block.mlp, "up_proj", model.model.layers[0].mlp.up_proj),
            "own, got 'model.layers.1.mlp.up_proj.weight', which is 'model.layers.0.mlp.up_proj.weight'$",
        ),
        (lambda model, block: block.mlp.up_proj.to(torch.float8_e4m3fn), "float numbers of 16 to 64 bits, got float8"),
        (lambda model, block: nn.init.constant_(block.mlp.up_proj.weight, torch.nan), "expected finite logits"),
    ],
)
def test_a_part_that_does_not_fit_is_named(change, match):
    model = changed(change)
    before = [p.detach().clone().float().nan_to_num(7.0) for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        ptq.rotate(model)
    assert all(torch.equal(p.float().nan_to_num(7.0), b) for p, b in zip(model.parameters(), before, strict=True))


def test_prepared_and_quantized_models_are_refused():
    refused(
        qnn.prepare(decoder(), "zeroquant-w8a8"),
        r"^rotate: expected a float model, got 'model.layers.0.self_attn.q_proj' as \w+$",
    )
    model = ptq.quantize(decoder(), "zeroquant-w8a8", check_batch=False)
    refused(model, "^rotate: expected a float model, got 'model.layers.0.self_attn.q_proj' as QuantizedPtqLinear$")


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = decoder()
    with pytest.raises(
        ValueError, match="'model.embed_tokens.weight' to hold float numbers .*, got a tensor without data"
    ):
        ptq.rotate(model)
    with pytest.raises(TypeError, match="rotate: expected model to be a torch.nn.Module, got dict"):
        ptq.rotate({})


@pytest.mark.parametrize("tied", [True, False])
def test_what_only_the_logits_show_is_undone(tied):
    """A block that clips what it adds: every part is Llama's, the function is not."""
    model = decoder(tie_word_embeddings=tied)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.clamp(-0.1, 0.1))
    before = logits(model)
    refused(model, "^rotate: expected the float model's logits to within 0.001 of their norm, got 0")
    assert torch.equal(logits(model), before) and model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert bool(model.all_tied_weights_keys) is tied


def test_the_docstrings_example():
    assert doctest.testmod(module).failed == 0
