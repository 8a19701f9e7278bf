"""Exported folders: the bytes of the formats' pages, read by a reader of our own and by the programs they are for."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe
from quantrain.ptq.export import check_target, export_model

transformers = pytest.importorskip("transformers")

W8A8 = Recipe(
    weight=QuantSpec(bits=8, granularity="per_channel", observer="dynamic"),
    input=QuantSpec(bits=8, granularity="per_token", observer="dynamic"),
    training=False,
)
AFFINE = qnn.changed_recipe(W8A8, {"input": {"symmetric": False}})
STATIC = qnn.changed_recipe(W8A8, {"input": {"granularity": "per_tensor", "observer": "min_max"}})
TENSOR = qnn.changed_recipe(W8A8, {"weight": {"granularity": "per_tensor"}})
W4 = qnn.changed_recipe(W8A8, {"weight": {"bits": 4}, "input": None})
W4G32 = qnn.changed_recipe(W4, {"weight": {"granularity": "per_group", "group_size": 32}})
W8G32 = qnn.changed_recipe(W4G32, {"weight": {"bits": 8}})
G32 = qnn.changed_recipe("int4-g128", {"weight": {"group_size": 32}})
AFFINE4 = qnn.changed_recipe("int4-g64-affine", {"weight": {"group_size": 32}})
INT8_STATIC = qnn.as_recipe("int8-static")
W8A16 = qnn.as_recipe("w8a16")
GPTQ = qnn.as_recipe("gptq-w4a16")
STATIC_PTQ = qnn.changed_recipe("smoothquant-w8a8-static", {"scheme": {"smooth_alpha": 0.0}})

HELD = {
    "W8A8": (W8A8, "vllm"),
    "W8A8 affine inputs": (AFFINE, "vllm"),
    "W8A8 static": (STATIC, "vllm"),
    "W8A8 integer products": (INT8_STATIC, "vllm"),
    "W8A8 one weight scale": (TENSOR, "vllm"),
    "W8A16": (W8A16, "vllm"),
    "W8A16 groups": (W8G32, "vllm"),
    "W4A16 rows": (W4, "vllm"),
    "W4A16 groups": (W4G32, "vllm"),
    "W4A16 packed": (G32, "vllm"),
    "W4A16 packed, affine": (AFFINE4, "vllm"),
    "zeroquant-w8a8": (qnn.as_recipe("zeroquant-w8a8"), "vllm"),
    "smoothquant-w8a8-static, factors of 1": (STATIC_PTQ, "vllm"),
    "gptq-w4a16 rows": (qnn.changed_recipe(GPTQ, {"weight": {"granularity": "per_channel"}}), "vllm"),
    "gptq-w4a16 groups": (qnn.changed_recipe(GPTQ, {"weight": {"group_size": 32}}), "vllm"),
    "LLM.int8": (W8A8, "bitsandbytes"),
    "LLM.int8, zeroquant-w8a8": (qnn.as_recipe("zeroquant-w8a8"), "bitsandbytes"),
}
PER_TOKEN = ("W8A8", "W8A8 one weight scale", "zeroquant-w8a8", "mixed")
LAYERS = 14  # linear layers in the blocks of llama()
pytestmark = pytest.mark.filterwarnings("ignore:export. vLLM's 4-bit kernels", "ignore:prepare")


def llama(*, tied=True, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=bias, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def ids(rows=3, length=16):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def converted(recipe, model=None, skip=("lm_head", "*embed*"), **options):
    model = llama() if model is None else model
    if recipe.scheme is not None:  # whose handler knows embeddings, and but for int8 the head
        skip = [pattern for pattern in skip if pattern == "lm_head" and recipe.scheme.kind == "int8"]
    prepared = qnn.prepare(model, recipe, skip=skip, **options)
    return qnn.convert(qnn.calibrate(prepared, [{"input_ids": ids()}])).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


# ---- a reader of our own ---------------------------------------------------------------------------------------------


def unpacked(words, bits, columns):
    """compressed-tensors: element i in bits (i mod n) * bits of word i / n, as value + 2^(bits - 1)."""
    per_word = 32 // bits
    elements = torch.stack([(words.long() >> (bits * i)) & (2**bits - 1) for i in range(per_word)], -1)
    return elements.flatten(1)[:, :columns] - 2 ** (bits - 1)


def read_weight(tensors, name, group):
    weights = group["weights"]
    scale = tensors[f"{name}.weight_scale"].double()
    if f"{name}.weight" in tensors:
        assert tensors[f"{name}.weight"].dtype == torch.int8
        codes = tensors[f"{name}.weight"].double()
    else:
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        codes = unpacked(tensors[f"{name}.weight_packed"], weights["num_bits"], columns).double()
        assert codes.shape == (rows, columns) and tensors[f"{name}.weight_packed"].dtype == torch.int32
    zero_point = tensors.get(f"{name}.weight_zero_point")
    if zero_point is not None:
        zero_point = unpacked(zero_point.t(), weights["num_bits"], codes.shape[0]).t().double()
    each = lambda t: t.repeat_interleave(codes.shape[1] // t.shape[1], 1)
    assert scale.shape == (codes.shape[0], codes.shape[1] // weights["group_size"] if "group_size" in weights else 1)
    return (codes - (0 if zero_point is None else each(zero_point))) * each(scale)


def rounded_input(x, inputs, scale, divisor):
    if inputs is None:
        return x
    if not inputs["symmetric"]:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / 255
        zero_point = torch.round(-128 - low / scale)
        return (torch.clamp(torch.round(x / scale) + zero_point, -128, 127) - zero_point) * scale
    scale = x.abs().amax(-1, keepdim=True) / divisor if inputs["dynamic"] else scale
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


class Read(nn.Module):
    def __init__(self, weight, bias, *rounding):
        super().__init__()
        self.weight, self.bias, self.rounding = weight.float(), bias, rounding

    def forward(self, x):
        return F.linear(rounded_input(x, *self.rounding), self.weight, self.bias)


def own_reader(folder, like, divisor=127):
    """A float model with the layers that the folder has. Inputs with a scale per token: absmax / divisor."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    quantization = config["quantization_config"]
    names = {name.rpartition(".")[0] for name in tensors if name.endswith((".weight_scale", ".SCB"))}
    used = set()
    for name in names:
        mine = {key for key in tensors if key.startswith(f"{name}.")}
        used |= mine
        if quantization["quant_method"] == "bitsandbytes":
            codes, absmax = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
            assert codes.dtype == torch.int8 and absmax.dtype == torch.float32 and absmax.shape == codes.shape[:1]
            assert tensors[f"{name}.weight_format"].dtype == torch.uint8 and tensors[f"{name}.weight_format"] == 0
            weight, inputs = codes.double() * absmax.double()[:, None] / 127, {"symmetric": True, "dynamic": True}
        else:
            groups = quantization["config_groups"].values()
            group = next(g for g in groups if g["targets"] == ["Linear"] or name in g["targets"])
            weight, inputs = read_weight(tensors, name, group), group["input_activations"]
        layer = Read(weight, tensors.get(f"{name}.bias"), inputs, tensors.get(f"{name}.input_scale"), divisor)
        parent, _, child = name.rpartition(".")
        setattr(like.get_submodule(parent), child, layer)
    missing = like.load_state_dict({k: v for k, v in tensors.items() if k not in used}, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith(("lm_head.weight",)) for key in missing.missing_keys)
    return like.eval(), config, tensors, names


@pytest.mark.parametrize("name", HELD)
def test_a_reader_of_the_formats_pages_gives_our_logits(name, tmp_path):
    recipe, target = HELD[name]
    model = converted(recipe)
    export_model(model, tmp_path, target)
    read, config, tensors, names = own_reader(tmp_path, llama())
    assert len(names) == LAYERS
    assert (logits(read) - logits(model)).abs().max() < 1e-2
    for layer in names:  # exactly the values that our layer stands for
        expected = model.get_submodule(layer).dequantized_weight()
        torch.testing.assert_close(read.get_submodule(layer).weight, expected, rtol=1e-6, atol=0)
    assert "lm_head.weight" not in tensors and config["tie_word_embeddings"]
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"


def test_config_of_w8a8(tmp_path):
    export_model(converted(W8A8), tmp_path, "vllm")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
    }


def test_config_of_other_forms(tmp_path):
    found = {}
    for name in ("W8A8 static", "W4A16 packed", "W4A16 packed, affine", "W8A16", "LLM.int8"):
        recipe, target = HELD[name]
        export_model(converted(recipe), tmp_path / name, target)
        found[name] = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
    static = found["W8A8 static"]["config_groups"]["group_0"]["input_activations"]
    assert (static["strategy"], static["dynamic"]) == ("tensor", False)
    assert load_file(tmp_path / "W8A8 static" / "model.safetensors")[
        "model.layers.0.mlp.up_proj.input_scale"
    ].shape == (1,)
    packed = found["W4A16 packed"]
    assert packed["format"] == "pack-quantized" and packed["config_groups"]["group_0"]["input_activations"] is None
    weights = packed["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["num_bits"]) == ("group", 32, 4)
    assert not found["W4A16 packed, affine"]["config_groups"]["group_0"]["weights"]["symmetric"]
    assert found["W8A16"]["format"] == "pack-quantized"
    config = found["LLM.int8"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_8bit"] and config["llm_int8_threshold"] == 0.0
    assert config["llm_int8_skip_modules"] == ["lm_head"]


def test_layers_of_several_forms(tmp_path):
    model = converted(G32, overrides={"*self_attn*": W8A8, "*.k_proj": "w8a16"})
    export_model(model, tmp_path, "vllm")
    read, config, _, names = own_reader(tmp_path, llama())
    assert (logits(read) - logits(model)).abs().max() < 1e-2
    config = config["quantization_config"]
    assert config["format"] == "mixed-precision" and len(names) == LAYERS
    groups = config["config_groups"].values()
    assert sorted(g["format"] for g in groups) == ["int-quantized", "pack-quantized", "pack-quantized"]
    assert sorted(name for g in groups for name in g["targets"]) == sorted(names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_keep_scales_exact(dtype, tmp_path):
    model = converted(G32, llama(dtype=dtype))
    export_model(model, tmp_path, "vllm")
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    name = "model.layers.1.self_attn.q_proj"
    assert tensors[f"{name}.weight_scale"].dtype == torch.float32 and tensors[f"{name}.bias"].dtype == dtype
    assert tensors["model.norm.weight"].dtype == dtype
    assert torch.equal(tensors[f"{name}.weight_scale"], model.get_submodule(name).weight_scale)


def test_layers_left_float_and_a_head_of_its_own(tmp_path):
    model = converted(W8A8, llama(tied=False), skip=("lm_head", "*embed*", "*.down_proj"))
    export_model(model, tmp_path, "vllm")
    read, config, tensors, names = own_reader(tmp_path, llama(tied=False))
    assert (logits(read) - logits(model)).abs().max() < 1e-2
    kept = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert config["quantization_config"]["ignore"] == kept and len(names) == LAYERS - 2
    assert all(tensors[f"{name}.weight"].dtype == torch.float32 for name in kept)


def test_a_quantized_head_is_not_tied_by_the_reader(tmp_path):
    model = converted(W8A8, skip=("*embed*",))
    export_model(model, tmp_path, "vllm")
    _, config, tensors, names = own_reader(tmp_path, llama(tied=False))
    assert not config["tie_word_embeddings"] and config["quantization_config"]["ignore"] == []
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32 and len(names) == LAYERS + 1


def test_a_model_without_config_and_odd_sizes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model = qnn.convert(qnn.prepare(model, "w8a16"))
    export_model(model, tmp_path, "vllm")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["0.weight_packed"].shape == (5, 2)
    assert torch.equal(unpacked(tensors["0.weight_packed"], 8, 6), model[0].weight_codes.long())
    assert list(json.loads((tmp_path / "config.json").read_text())) == ["quantization_config"]


# ---- converted layers by their attributes alone ----------------------------------------------------------------------


class PtqLinear(nn.Module):
    """Stands for a layer of the scheme ``ptq``: its buffers and what they are called."""

    def __init__(self, weight, bits=8, group_size=0, input="per_token", **beyond):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size = bits, group_size
        wide = F.pad(weight, (0, -weight.shape[1] % group_size)) if group_size else weight
        limit, size = 2 ** (bits - 1) - 1, group_size or wide.shape[1]
        scale = wide.unflatten(1, (-1, size)).abs().amax(-1) / limit
        codes = torch.round(wide / scale.repeat_interleave(size, 1)).to(torch.int8)
        self.register_buffer("weight_codes", codes if bits == 8 else torch.ops.quantrain.pack_int4(codes))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.zeros(weight.shape[0]))
        self.weight_zero_point = self.input_factor = self.outlier_columns = None
        self.register_buffer("input_scale", torch.tensor([0.05]) if input == "per_tensor" else None)
        observer = "dynamic" if input == "per_token" else "min_max"
        spec = QuantSpec(bits=8, granularity=input, observer=observer) if input else None
        self.recipe = SimpleNamespace(input=spec, output=None, scheme=None)
        for name, value in beyond.items():
            setattr(self, name, value)
        self.expected = (codes.double() * scale.double().repeat_interleave(size, 1))[:, : weight.shape[1]]


def ptq_model(**options):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": PtqLinear(torch.randn(6, 64), **options), "b": nn.Linear(6, 2)})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input": "per_tensor"},
        {"input": None},
        {"bits": 4, "input": None},
        {"bits": 4, "input": None, "group_size": 32},
    ],
)
def test_layers_of_the_scheme_ptq(options, tmp_path):
    model = ptq_model(**options)
    export_model(model, tmp_path, "vllm")
    tensors = load_file(tmp_path / "model.safetensors")
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    torch.testing.assert_close(read_weight(tensors, "a", group), model["a"].expected, rtol=1e-6, atol=0)
    assert ("a.input_scale" in tensors) == (options.get("input") == "per_tensor")
    assert torch.equal(tensors["b.weight"], model["b"].weight)


BEYOND = {
    "input_factor": ({"input_factor": torch.ones(64)}, "a factor per input column"),
    "outlier_columns": ({"outlier_columns": torch.zeros(4, dtype=torch.int32)}, "outlier columns"),
    "groups": ({"bits": 4, "input": None, "group_size": 48}, "64 columns are not whole groups of 48"),
    "W4A8": ({"bits": 4}, "inputs of 8 bits with weights of 4 bits"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_vllm_cannot_hold(name, tmp_path):
    options, reason = BEYOND[name]
    message = rf"^export: expected layers that target 'vllm' can hold, got 1 that it cannot: 'a' \({reason}\)$"
    with pytest.raises(ValueError, match=message):
        export_model(ptq_model(**options), tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4, "input": None}, "weights of 4 bits"),
        ({"input": None}, "inputs as they come: LLM.int8 rounds them"),
        ({"input": "per_tensor"}, "inputs with a stored scale"),
        ({"input_factor": torch.ones(64)}, "a factor per input column"),
    ],
)
def test_what_bitsandbytes_cannot_hold(options, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"target 'bitsandbytes' can hold, got 1 that it cannot: 'a' \({reason}"):
        export_model(ptq_model(**options), tmp_path, "bitsandbytes")


def test_one_error_names_five_layers(tmp_path):
    model = converted(G32)
    with pytest.raises(ValueError, match=r"got 14 that it cannot: 'model.layers.0.self_attn.q_proj' .* and 9 more$"):
        export_model(model, tmp_path, "bitsandbytes")
    sizes = {f"layer{index}": (8, 100) for index in range(7)}
    with pytest.raises(ValueError, match=r"got 7 that it cannot: 'layer0' \(100 .* of 32\), .* and 2 more$"):
        check_target(sizes, G32, "vllm")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "one without layers of integer codes"),
        (qnn.prepare(nn.Sequential(nn.Linear(4, 4)), W8A8), "got 1 prepared layers: '0'"),
        (qnn.convert(qnn.prepare(nn.Sequential(nn.Linear(4, 4)), W8A8))[0], "got a single QuantizedLinear"),
        (qnn.prepare(nn.Sequential(nn.Linear(64, 4)), "nf4", overrides={"0": "nf4"}), "'0' .weights of format nf4"),
        (qnn.convert(qnn.prepare(nn.Sequential(nn.Embedding(4, 4)), W8A8)), "a QuantizedEmbedding, which is no linear"),
    ],
)
def test_models_that_are_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=f"^export: expected .*{message}"):
        export_model(model, tmp_path, "vllm")


def test_gpt2s_layers_are_refused(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=8, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = qnn.convert(qnn.prepare(transformers.GPT2LMHeadModel(config), W8A8, skip=("lm_head", "*wte", "*wpe")))
    with pytest.raises(ValueError, match="got 4 that it cannot: 'transformer.h.0.attn.c_attn' .a Conv1D"):
        export_model(model, tmp_path, "vllm")


# ---- before any work -------------------------------------------------------------------------------------------------


UP, ATTENTION = "layers.0.mlp.up", "layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", HELD)
def test_check_target_takes_what_export_takes(name):
    recipe, target = HELD[name]
    check_target({"up": (96, 64), "down": (64, 96)}, recipe, target)


def test_check_target_says_what_export_says(tmp_path):
    for recipe, target in (
        (qnn.as_recipe("llm-int8"), "vllm"),
        (qnn.as_recipe("llm-int8-threshold"), "vllm"),
        (qnn.as_recipe("smoothquant-w8a8-static"), "vllm"),
        (qnn.as_recipe("awq-gptq-w4a8"), "bitsandbytes"),
        (qnn.as_recipe("gptq-w4a16"), "vllm"),
        (G32, "bitsandbytes"),
        (STATIC, "bitsandbytes"),
        (W8A16, "bitsandbytes"),
        (AFFINE, "bitsandbytes"),
    ):
        model = converted(recipe)
        linears = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if hasattr(m, "weight_codes")}
        with pytest.raises(ValueError) as late:
            export_model(model, tmp_path, target)
        with pytest.raises(ValueError) as early:
            check_target(linears, recipe, target)
        assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    ("recipe", "target", "reason"),
    [
        ("zeroquant-w8a8", "vllm", ""),
        ("zeroquant-w8a8", "bitsandbytes", ""),
        ("gptq-w4a16", "vllm", ""),
        ("gptq-w4a16", "bitsandbytes", "weights of 4 bits in groups"),
        ("llm-int8", "vllm", "outlier columns"),
        ("llm-int8", "bitsandbytes", "outlier columns"),
        ("llm-int8-threshold", "vllm", "outlier columns"),
        ("llm-int8-threshold", "bitsandbytes", ""),
        ("smoothquant-w8a8", "vllm", "a factor per input column"),
        ("smoothquant-w8a8-static", "bitsandbytes", "a factor per input column"),
        ("awq-w4a16", "vllm", "a factor per input column"),
        ("zeroquant-w4a8", "vllm", "inputs of 8 bits with weights of 4 bits in groups"),
    ],
)
def test_check_target_reads_the_scheme(recipe, target, reason):
    if not reason:
        check_target({UP: (8, 256)}, recipe, target)
        return
    with pytest.raises(ValueError, match=rf"'{UP}' \({reason}\)"):
        check_target({UP: (8, 256)}, recipe, target)


def test_check_target_knows_the_bits_of_attention():
    check_target({ATTENTION: (8, 60)}, "zeroquant-w4a8", "vllm")
    with pytest.raises(ValueError, match=rf"got 1 that it cannot: '{UP}' .inputs of 8 bits with weights of 4"):
        check_target({ATTENTION: (8, 60), UP: (8, 256)}, "zeroquant-w4a8", "vllm")


def test_an_outlier_threshold_is_bitsandbytes_own(tmp_path):
    token = QuantSpec(bits=8, granularity="per_token", observer="dynamic")
    scheme = SimpleNamespace(outlier_columns=128, outlier_threshold=6.0)
    model = ptq_model(recipe=SimpleNamespace(input=token, output=None, scheme=scheme))
    with pytest.raises(ValueError, match=r"'a' \(outlier columns\)"):
        export_model(model, tmp_path, "vllm")
    export_model(model, tmp_path, "bitsandbytes")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 6.0 and config["llm_int8_skip_modules"] == ["b"]
    model["c"] = PtqLinear(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"got 1 that it cannot: 'c' \(another outlier threshold\)"):
        export_model(model, tmp_path, "bitsandbytes")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("qat-w4a8", "weights of 4 bits"),
        ("qat-w4a4", "inputs of 4 bits"),
        ("ptq-w8a8", "affine inputs with a stored scale"),
        ("nf4", "weights of format nf4"),
        ("qlora", "LoRA matrices beside the weight .merge adds them."),
        ("f8net", ""),
    ],
)
def test_recipes_that_vllm_cannot_hold(recipe, reason):
    with pytest.raises(ValueError, match=rf"'up' \(.*{reason}"):
        check_target(dict.fromkeys(("first", "up", "last"), (256, 256)), recipe, "vllm")


def test_kernels_of_vllm_are_warned_of():
    with pytest.warns(
        UserWarning, match="multiples of 128 and groups of 128 or one per row, which 1 layers have not: 'down'"
    ):
        check_target({"up": (8, 256), "down": (8, 192)}, W4, "vllm")
    with pytest.raises(ValueError, match="^export: expected target to be one of vllm, bitsandbytes, got 'gguf'$"):
        check_target({}, W4, "gguf")


# ---- by compressed-tensors and bitsandbytes themselves ---------------------------------------------------------------


def need(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")


VLLM = [name for name, (_, target) in HELD.items() if target == "vllm"]


@pytest.mark.parametrize("name", VLLM)
def test_compressed_tensors_reads_our_weights(name, tmp_path):
    need("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = converted(HELD[name][0])
    export_model(model, tmp_path, "vllm")
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        mine = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{layer}.")}
        compressor = BaseCompressor.load_from_registry(config.format)
        read = compressor.decompress(mine, config.config_groups["group_0"])["weight"]
        expected = model.get_submodule(layer).dequantized_weight()
        torch.testing.assert_close(read, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*(name for name in VLLM if name != "W4A16 packed, affine"), "mixed"])
def test_transformers_loads_it_by_compressed_tensors(name, tmp_path):
    """All but packed zero points, for which transformers 5.24 makes room in another shape than the package writes."""
    need("compressed_tensors", "accelerate")
    mixed = {"*self_attn*": W8A8} if name == "mixed" else {}
    model = converted(G32 if mixed else HELD[name][0], overrides=mixed)
    export_model(model, tmp_path, "vllm")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    found, ours = logits(read), logits(model)
    if name in PER_TOKEN:
        # the package's own products, unlike vLLM's, round inputs by absmax / 127.5
        theirs = logits(own_reader(tmp_path, llama(), divisor=127.5)[0])
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
        assert (found - ours).abs().max() < 1e-2 * ours.abs().max()
    else:
        assert (found - ours).abs().max() < 1e-4


def test_transformers_loads_it_by_bitsandbytes(tmp_path):
    need("bitsandbytes", "accelerate")
    model = converted(W8A8)
    export_model(model, tmp_path, "bitsandbytes")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    found, ours = logits(read), logits(model)
    assert (found - ours).abs().max() < 2e-2 * ours.abs().max()  # it casts inputs to float16 before it rounds them
    layers = {name: layer for name, layer in read.named_modules() if type(layer).__name__ == "Linear8bitLt"}
    assert len(layers) == LAYERS
    for name, layer in layers.items():
        assert torch.equal(layer.weight.data, model.get_submodule(name).weight_codes)


def test_files_may_be_read_by_others(tmp_path):
    model = qnn.convert(qnn.prepare(nn.Sequential(nn.Linear(64, 8)), "qat-w8a8-token"))
    export_model(model, tmp_path, "vllm")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
