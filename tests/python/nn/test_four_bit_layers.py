"""Layers of 4 bits and LoRA: against the operators and against float layers with the decoded weight; files, training, two ranks."""

import copy
import io
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantrain
import quantrain.nn as qnn

transformers = pytest.importorskip("transformers")

PACKED = ("nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64-affine")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def lora(rank=8, alpha=16, dropout=0.0, **fields):
    change = {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": dropout, **fields}
    return qnn.changed_recipe(qnn.as_recipe("qlora"), {"scheme": change})


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def qwen():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=256
    )
    return transformers.BertForSequenceClassification(config)


MODELS = {"llama": (llama, 14), "qwen": (qwen, 14), "gpt2": (gpt2, 8), "bert": (bert, 13)}


def ids(batch=2, length=16, seed=1):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def filled(model, seed=3):
    """The model, the matrices of its LoRA layers drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in qnn.lora_parameters(model):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def close(a, b, tolerance):
    """Relative to the largest of b."""
    assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", PACKED)
@pytest.mark.parametrize("shape", [(8, 64), (5, 128), (1, 63), (65, 1), (63, 65), (33, 3420)], ids=str)
def test_a_layer_gives_what_its_decoded_weight_gives(device, recipe, shape):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    layer = qnn.Linear4bit.from_float(linear, recipe).to(device)
    x = torch.randn(3, 2, shape[1], device=device, requires_grad=True)
    y = layer(x)
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    close(y, want, 1e-5)
    seed = torch.randn_like(y)
    close(torch.autograd.grad(y, x, seed)[0], seed.double() @ layer.weight.double(), 1e-5)
    rms = float(layer.weight.cpu().sub(linear.weight.detach()).norm() / linear.weight.detach().norm())
    assert shape[1] < 32 or rms < 0.2  # of uniform weights; NF4's on normal ones is 0.09


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lora_gives_what_separate_layers_give(device, dtype):
    torch.manual_seed(0)
    layer = filled(qnn.LoraLinear.from_float(nn.Linear(192, 40), lora())).to(device)
    x = torch.randn(7, 192, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    exact = x.detach().double().requires_grad_()
    want = F.linear(exact, layer.weight.double(), layer.bias.double()) + layer.scaling * (exact @ a.T) @ b.T
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    close(y, want, tolerance)
    seed = torch.randn(y.shape, device=device, dtype=dtype)
    y.backward(seed)
    want.backward(seed.double())
    for found, expected in ((x.grad, exact.grad), (layer.lora_a.grad, a.grad), (layer.lora_b.grad, b.grad)):
        close(found, expected, tolerance)
    layer.lora_enabled = False
    close(layer(x), F.linear(exact, layer.weight.double(), layer.bias.double()), tolerance)


def test_a_new_adapter_changes_nothing():
    linear = nn.Linear(64, 8)
    x = torch.randn(3, 64)
    base = qnn.Linear4bit.from_float(linear, "nf4-dq")
    assert torch.equal(qnn.LoraLinear.from_float(linear, "qlora")(x), base(x))


def test_dropout_is_of_training_alone():
    torch.manual_seed(0)
    layer = filled(qnn.LoraLinear.from_float(nn.Linear(64, 8), lora(dropout=0.5)))
    x = torch.randn(3, 64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [*PACKED, "qlora"])
def test_transformers_models(name, recipe):
    make, count = MODELS[name]
    model = make().eval()
    exact = make().eval()
    assert qnn.prepare(model, recipe) is model
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, qnn.FourBitLayer)]
    assert kinds == ["LoraLinear" if recipe == "qlora" else "Linear4bit"] * count
    assert qnn.convert(model) is model
    # The same function with the decoded weights in the float model: transposed in GPT-2.
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, qnn.FourBitLayer):
                exact.get_submodule(path).weight.copy_(layer.weight)
        close(model(ids()).logits, exact(ids()).logits, 1e-4)
    left = model.quantization_summary.left_float
    head = "classifier" if name == "bert" else "lm_head"
    assert left[head].startswith("gives the model's output")
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    if recipe == "qlora":
        # A new classifier is trained, a language model's head is not.
        assert trained == ({"lora_a", "lora_b", "weight", "bias"} if name == "bert" else {"lora_a", "lora_b"})
    assert str(model.quantization_summary).count("nf4 blocks of 64, compressed scales") == (
        count if recipe in ("nf4-dq", "qlora") else 0
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_qlora_learns_and_checkpointing_changes_nothing(name, checkpointing):
    def losses(checkpointing):
        model = filled(qnn.prepare(MODELS[name][0](), lora(dropout=0.1))).train()
        if name == "bert":
            model.config.hidden_dropout_prob = 0
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = False
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        labels = torch.tensor([0, 1]) if name == "bert" else ids()
        found = []
        torch.manual_seed(5)  # of dropout
        for _ in range(8):
            loss = model(ids(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    found = losses(checkpointing)
    assert found[-1] < 0.9 * found[0]
    if checkpointing:
        assert found == losses(False)


def test_the_head_and_embeddings_are_packed_where_asked():
    recipe = qnn.changed_recipe(qnn.as_recipe("nf4-dq"), {"scheme": {"head": True, "embedding": True}})
    model = qnn.prepare(llama(), recipe)
    assert type(model.lm_head) is qnn.Linear4bit and type(model.model.embed_tokens) is qnn.Embedding4bit
    table = model.model.embed_tokens
    assert table.weight_scale.dtype == torch.float32  # never compressed
    assert torch.equal(table(ids()), F.embedding(ids(), table.weight))
    assert qnn.prepare(llama(), "nf4", overrides={"lm_head": {"scheme": {"head": True}}}).lm_head.format == "nf4"
    left = qnn.prepare(nn.Sequential(nn.Embedding(9, 48), nn.Linear(48, 64), nn.Linear(64, 2)), recipe)
    assert left.quantization_summary.left_float == {"0": "its rows are no whole blocks of 64"}


def test_small_models():
    assert type(qnn.prepare(nn.Linear(64, 8), "nf4")) is qnn.Linear4bit
    pair = qnn.prepare(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), "qlora")
    assert type(pair[0]) is qnn.LoraLinear and type(pair[2]) is nn.Linear and pair[2].weight.requires_grad
    mixed = qnn.prepare(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 3)), "nf4", overrides={"1": "qat-w8a8-token"}
    )
    assert [type(m).__name__ for m in qnn.convert(mixed)] == ["Linear4bit", "QuantizedLinear", "Linear"]
    conv = qnn.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)), "nf4")
    assert conv.quantization_summary.left_float["0"] == "4-bit weights are for Linear and Embedding layers"


@pytest.mark.parametrize("recipe", [*PACKED, "qlora", "w8a16"])
def test_checkpoints(recipe, tmp_path):
    path = tmp_path / "model.safetensors"
    model = qnn.prepare(llama(), recipe)
    if recipe == "qlora":
        filled(model)
    model = qnn.convert(model).eval()
    quantrain.save_checkpoint(path, model)
    torch.manual_seed(9)
    fresh = transformers.LlamaForCausalLM(model.config)
    loaded = qnn.from_checkpoint(path, fresh)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    other = qnn.prepare(llama(), "fp4" if recipe != "fp4" else "nf4")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="expected"):
        qnn.load_checkpoint(path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_truncated_checkpoint_loads_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    model = qnn.prepare(llama(), "nf4")
    quantrain.save_checkpoint(path, model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        qnn.load_checkpoint(path, model)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_copies_casts_and_pickles_keep_the_codes(storage):
    recipe = qnn.changed_recipe(qnn.as_recipe("nf4-dq"), {"scheme": {"storage": storage}})
    layer = qnn.Linear4bit.from_float(nn.Linear(256, 8), recipe)
    x = torch.randn(3, 256)
    y = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), torch.load(stream, weights_only=False), copy.deepcopy(layer).half().float()]
    for other in copies:
        assert torch.equal(other(x), y) and torch.equal(other.weight, layer.weight)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.weight_scale_scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(3, 256, device="meta")).shape == (3, 8)
    fresh = qnn.Linear4bit(256, 8, recipe=recipe)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    assert len(list(layer.parameters())) == (2 if storage == "bfloat16" else 0)


def test_storage_as_bfloat16_wants_whole_rows():
    recipe = qnn.changed_recipe(qnn.as_recipe("nf4"), {"scheme": {"storage": "bfloat16"}})
    with pytest.raises(ValueError, match="whole blocks"):
        qnn.Linear4bit.from_float(nn.Linear(63, 5), recipe)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["nf4-dq", "qlora", "int4-g64-affine"])
def test_compiles_without_a_break(recipe, device):
    model = qnn.prepare(llama(), recipe).to(device)
    if recipe == "qlora":
        filled(model)
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = ids().to(device)
    close(compiled(tokens).logits, model(tokens).logits, 1e-5)
    if recipe == "qlora":
        compiled(tokens, labels=tokens).loss.backward()
        found = [p.grad.clone() for p in qnn.lora_parameters(model)]
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for a, p in zip(found, qnn.lora_parameters(model), strict=True):
            close(a, p.grad, 1e-4)


@pytest.mark.cuda
def test_cuda_graphs():
    """A training step of a QLoRA model, captured: replays equal eager steps."""

    def build():
        model = filled(qnn.prepare(llama().to("cuda", torch.bfloat16), lora()))
        model.config.use_cache = False
        return model, torch.optim.AdamW(qnn.lora_parameters(model), 1e-3, capturable=True)

    tokens = ids(4, 64).cuda()

    def step(model, optimizer):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    model, optimizer = build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer)
    found = []
    for _ in range(3):
        graph.replay()
        found.append(loss.item())
    other, optimizer = build()
    eager = [step(other, optimizer).item() for _ in range(6)][3:]
    for a, b in zip(found, eager, strict=True):
        assert abs(a - b) < 2e-3 * b


def test_adapters_go_through_files(tmp_path):
    model = filled(qnn.prepare(llama(), lora()))
    qnn.save_lora_adapter(tmp_path, qnn.lora_adapter(model))
    other = qnn.prepare(llama(), lora())
    assert not torch.equal(other(ids()).logits, model(ids()).logits)
    qnn.set_lora_adapter(other, qnn.load_lora_adapter(tmp_path))
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    qnn.enable_lora(model, False)
    assert torch.equal(model(ids()).logits, qnn.prepare(llama(), "nf4-dq")(ids()).logits)
    wrong = qnn.prepare(llama(), lora(rank=4))
    before = [p.clone() for p in wrong.parameters()]
    with pytest.raises(ValueError, match=r"expected lora_a of .* of shape \[4, 256\], got \[8, 256\]"):
        qnn.set_lora_adapter(wrong, qnn.load_lora_adapter(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, wrong.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"scaling 2 at .* \(lora_alpha of 16 in the recipe\), got 4"):
        qnn.set_lora_adapter(qnn.prepare(llama(), lora(alpha=32)), qnn.load_lora_adapter(tmp_path))
    with pytest.raises(ValueError, match="expected a model with LoraLinear"):
        qnn.set_lora_adapter(llama(), qnn.load_lora_adapter(tmp_path))
    short = qnn.load_lora_adapter(tmp_path)
    layers = short.layers
    layers.pop("model.layers.0.mlp.up_proj")
    short.layers = layers
    with pytest.raises(ValueError, match="got none for 'model.layers.0.mlp.up_proj'"):
        qnn.set_lora_adapter(other, short)


def test_a_trained_classifier_goes_with_the_adapter(tmp_path):
    model = filled(qnn.prepare(bert(), lora())).eval()
    with torch.no_grad():
        model.classifier.weight.add_(1)
    adapter = qnn.lora_adapter(model)
    assert sorted(adapter.others) == ["classifier.bias", "classifier.weight"]
    qnn.save_lora_adapter(tmp_path, adapter)
    other = qnn.prepare(bert(), lora()).eval()
    qnn.set_lora_adapter(other, qnn.load_lora_adapter(tmp_path))
    assert torch.equal(other(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("name", MODELS)
def test_merging(name):
    model = filled(qnn.prepare(MODELS[name][0](), lora())).eval()
    with torch.no_grad():
        want = model(ids()).logits
        exact = qnn.merge(copy.deepcopy(model), torch.float32)
        close(exact(ids()).logits, want, 1e-4)
        assert not any(isinstance(m, qnn.FourBitLayer) for m in exact.modules())
        half = qnn.merge(copy.deepcopy(model), torch.bfloat16)
    assert {type(m).__name__ for m in half.modules() if hasattr(m, "weight")} == {
        type(m).__name__ for m in MODELS[name][0]().modules() if hasattr(m, "weight")
    }
    for row in half.merge_report.rows:
        layer = model.get_submodule(row["layer"])
        update = layer.scaling * (layer.lora_b @ layer.lora_a).double()
        exact = layer.dequantized_weight().double() + update
        merged = half.get_submodule(row["layer"]).weight.detach().double()
        error = (merged.T if layer.transposed else merged) - exact
        assert row["weight_error"] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-2)
        assert row["update_error"] == pytest.approx(float(error.norm() / update.norm()), rel=1e-2)
        assert 0 < row["weight_error"] < 2**-8
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got torch.uint8"):
        qnn.merge(model, torch.uint8)
    with pytest.raises(ValueError, match="expected a model with layers of 4 bits"):
        qnn.merge(half)


def test_a_lost_update_is_reported():
    layer = qnn.LoraLinear.from_float(nn.Linear(64, 8), lora())
    with torch.no_grad():
        layer.lora_b.fill_(1e-6)
    report = qnn.merge(nn.Sequential(layer), torch.bfloat16).merge_report
    assert report.rows[0]["update_error"] > 1 and "update error %" in str(report)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_others_become_layers(version):
    """GPTQ with act-order, whose columns are permuted; a bias; GPT-2's transposed layers."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 16)
    packed = qnn.Linear4bit.from_float(
        linear, qnn.changed_recipe(qnn.as_recipe("int4-g128"), {"weight": {"group_size": 32}})
    ).packed_weight()
    tensors = qnn.to_gptq(packed, "0", version, round_scale=True)
    group = tensors["0.g_idx"][torch.randperm(128)]
    tensors["0.g_idx"] = group
    given = qnn.from_gptq(tensors, "0", version)
    assert given.permutation is not None
    given.bias = linear.bias.detach()
    model = qnn.load_packed_layers(nn.Sequential(nn.Linear(128, 16)), {"0": given})
    x = torch.randn(5, 128)
    close(model(x), F.linear(x, model[0].weight, model[0].bias), 1e-5)
    columns = torch.empty(128, dtype=torch.long)
    columns[given.permutation] = torch.arange(128)
    decoded = quantrain.dequantize_4bit(
        given.codes, given.scale, given.zero_point, size=given.size, format=given.format
    )
    assert torch.equal(model[0].weight, decoded[:, columns])
    assert quantrain.Recipe.from_json(model[0].recipe.to_json()).weight.group_size == 32


def test_files_of_others_must_fit():
    packed = qnn.Linear4bit.from_float(nn.Linear(64, 8), "nf4").packed_weight()
    with pytest.raises(ValueError, match=r"of shape \[9, 64\], got \[8, 64\]"):
        qnn.load_packed_layers(nn.Sequential(nn.Linear(64, 9)), {"0": packed})
    with pytest.raises(ValueError, match="a float linear layer at '1', got nothing"):
        qnn.load_packed_layers(nn.Sequential(nn.Linear(64, 8)), {"1": packed})
    with pytest.raises(ValueError, match="'0' without bias, got the other"):
        qnn.load_packed_layers(nn.Sequential(nn.Linear(64, 8, bias=False)), {"0": packed})
    packed.scale = packed.scale[:4]
    with pytest.raises(ValueError, match="expected"):
        qnn.Linear4bit.from_packed(packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[3, 5] = value
    with pytest.raises(ValueError, match="layer '0': expected finite weights to pack, got NaN or Inf"):
        qnn.prepare(model, "nf4")
    assert type(model[0]) is nn.Linear


BAD = [
    ({"weight": {"bits": 8}}, "4 bits and symmetric with format 'nf4', got 8 bits"),
    ({"weight": {"bits": 8, "format": "int"}, "scheme": {"compress_scale": False}}, "weight of 4 bits"),
    ({"weight": {"group_size": 48}}, "group_size"),
    ({"weight": {"group_size": 16}}, "group_size"),
    ({"weight": {"granularity": "per_channel"}}, "per_group and dynamic"),
    ({"weight": {"symmetric": False}}, "4 bits and symmetric with format 'nf4'"),
    ({"weight": None}, "a spec for weight"),
    ({"input": {"bits": 8}}, "no spec for input"),
    ({"edge_bits": 8}, "edge_bits of 0"),
    ({"scheme": {"lora_rank": -1}}, "lora_rank"),
    ({"scheme": {"lora_dropout": 1.0}}, "lora_dropout"),
    ({"scheme": {"scale_rule": "largest"}}, "scale_rule"),
    ({"scheme": {"scale_rule": "signed"}}, "scale_rule"),
    ({"scheme": {"storage": "int8"}}, "storage"),
    ({"scheme": None}, "format 'int'"),
]


@pytest.mark.parametrize(("change", "rule"), BAD, ids=[str(b[0]) for b in BAD])
def test_recipes_that_mean_nothing_are_refused(change, rule):
    with pytest.raises(ValueError, match=rule):
        qnn.changed_recipe(qnn.as_recipe("nf4"), change)


def test_layers_of_other_recipes():
    with pytest.raises(ValueError, match="expected a recipe without packed weights of 4 bits"):
        qnn.QuantLinear(64, 8, recipe="nf4")
    with pytest.raises(ValueError, match="four_bit"):
        qnn.Linear4bit(64, 8, recipe="qat-w8a8")
    with pytest.raises(ValueError, match="lora_rank of at least 1"):
        qnn.LoraLinear(64, 8, recipe="nf4")
    with pytest.raises(ValueError, match="float64"):
        qnn.prepare(nn.Sequential(nn.Linear(64, 8).double(), nn.Linear(8, 2)), "nf4")


def test_model_size_and_hooks():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 2))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model = qnn.prepare(model, "nf4-dq")
    model(torch.randn(2, 1024))
    assert seen == [1]
    row = quantrain.model_size(model).rows[0]
    assert row["bits"] == 4 and row["bytes"] == 1024 * 512 + 1024 * 16 + 4 * 64 + 4 + 4 * 1024


def test_double_backward():
    layer = qnn.Linear4bit.from_float(nn.Linear(64, 8), "nf4")
    x = torch.randn(3, 64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    weight = layer.weight.double()
    exact = x.detach().double().requires_grad_()
    (a,) = torch.autograd.grad(F.linear(exact, weight, layer.bias.double()).square().sum(), exact, create_graph=True)
    close(second, torch.autograd.grad(a.square().sum(), exact)[0], 1e-5)


def _training(model, tokens, parameters):
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def _sharded(dtype=None):
    recipe = qnn.changed_recipe(lora(storage="bfloat16"), {"weight": {"group_size": 32}})
    return filled(qnn.prepare(llama() if dtype is None else llama().to(dtype), recipe))


def _two_ranks(rank, folder, backend, results):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    kind = "cpu" if backend == "gloo" else "cuda"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    mesh = torch.distributed.init_device_mesh(kind, (2,))
    tokens = ids(4)[2 * rank : 2 * rank + 2].to(kind)

    def add(name, losses):
        losses = losses.to(kind)
        torch.distributed.all_reduce(losses)
        if rank == 0:
            results[name] = (losses / 2).cpu()

    model = filled(qnn.prepare(llama(), lora())).to(kind)
    parameters = qnn.lora_parameters(model)
    add("ddp", _training(nn.parallel.DistributedDataParallel(model), tokens, parameters))
    for name, policy in (("fsdp", MixedPrecisionPolicy()), ("fsdp bf16", MixedPrecisionPolicy(torch.bfloat16))):
        model = _sharded().to(kind)
        codes = model.model.layers[0].mlp.up_proj.packed_weight().codes.clone()
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        add(name, _training(model, tokens, [p for p in model.parameters() if p.requires_grad]))
        stored = model.model.layers[0].mlp.up_proj.weight_codes
        if rank == 0:
            results[f"{name} share"] = stored.to_local().shape[0] / stored.shape[0]
        whole = stored.full_tensor().view(torch.uint8)  # a collective: both ranks
        if rank == 0:
            results[f"{name} codes"] = torch.equal(whole, codes)
    torch.distributed.destroy_process_group()


def _check_two_ranks(folder, backend):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_two_ranks, args=(str(folder), backend, results), nprocs=2)
        found = dict(results)
    model = filled(qnn.prepare(llama(), lora()))
    close(found["ddp"], _training(model, ids(4), qnn.lora_parameters(model)), 1e-3)
    model = _sharded()
    alone = _training(model, ids(4), qnn.lora_parameters(model))
    close(found["fsdp"], alone, 1e-3)
    close(found["fsdp bf16"], alone, 2e-2)  # activations in bfloat16
    for name in ("fsdp", "fsdp bf16"):  # sharded, and the bits came through training
        assert found[f"{name} share"] == 0.5 and found[f"{name} codes"]


def test_two_ranks_train_as_one(tmp_path):
    os.environ["OMP_NUM_THREADS"] = "1"
    _check_two_ranks(tmp_path, "gloo")


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    _check_two_ranks(tmp_path, "nccl")


# ---- heads, and files of models with them ----------------------------------------------------------------------------


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 2))


class Wrapped(nn.Module):
    def __init__(self, model, head=None):
        super().__init__()
        self.model = model
        if head is not None:
            self.head = head

    def forward(self, tokens):
        return self.model(tokens).logits


class Tied(nn.Module):
    """As nanoGPT."""

    def __init__(self, tie=True):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        if tie:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.body(self.table(tokens)))


def trained(model):
    return {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize("case", ["skip", "subclass", "parametrized", "float", "int8"])
def test_no_other_layer_takes_the_place_of_a_head(case):
    model, more = perceptron(), {}
    if case == "skip":
        more = {"skip": ["4"]}
    elif case == "subclass":
        model[4] = Subclass(64, 2)
    elif case == "parametrized":
        nn.utils.parametrizations.weight_norm(model[4])
    elif case == "int8":
        more = {"overrides": {"4": "w8a16"}}
    model = qnn.prepare(model, "qlora", **more)
    assert [type(model[i]).__name__ for i in (0, 2)] == ["LoraLinear", "LoraLinear"]
    if case == "float":
        assert trained(model) == {"4"}


def test_whose_heads_are_trained():
    cases = [
        (perceptron(), {"4"}),
        (Wrapped(llama()), set()),
        (Wrapped(qwen()), set()),  # tied
        (Wrapped(llama(), nn.Linear(8, 2)), set()),
        (Wrapped(bert()), {"model.classifier"}),
        (Wrapped(bert().bert, nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 2))), {"head.0", "head.1"}),
        (llama().model, set()),
        (bert().bert, set()),
        (Tied(), set()),
        (Tied(tie=False), set()),  # of a language model
    ]
    for model, expected in cases:
        qnn.prepare(model, "qlora")
        assert trained(model) == expected, type(model)
    packed = [name for name, m in llama().model.named_modules() if isinstance(m, nn.Linear)]
    assert len(packed) == len([m for m in qnn.prepare(llama().model, "nf4").modules() if isinstance(m, qnn.Linear4bit)])


@pytest.mark.parametrize("recipe", [*PACKED, "qlora"])
@pytest.mark.parametrize(
    "make", [perceptron, bert, lambda: llama().model, lambda: Tied()], ids=["nn", "bert", "body", "tied"]
)
def test_models_with_heads_come_back(recipe, make, tmp_path):
    path = tmp_path / "m.safetensors"
    model = qnn.prepare(make(), recipe).eval()
    x = torch.randn(3, 64) if isinstance(model, nn.Sequential) else ids() % 32
    quantrain.save_checkpoint(path, model)
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():  # its own values do not matter
            parameter.fill_(torch.nan)
    first, second = model(x), qnn.from_checkpoint(path, fresh)(x)
    outputs = [next(iter(y.values())) if isinstance(y, dict) else y for y in (first, second)]
    assert torch.equal(*outputs)


def test_a_file_of_another_scaling_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    quantrain.save_checkpoint(path, qnn.prepare(perceptron(), lora(alpha=16)))
    with pytest.raises(ValueError, match=r"lora_rank 8, lora_alpha 128.* got .*lora_rank 8, lora_alpha 16"):
        qnn.load_checkpoint(path, qnn.prepare(perceptron(), lora(alpha=128)))
    with pytest.raises(ValueError, match="to have memory|have memory"):
        qnn.from_checkpoint(path, perceptron().to("meta"))


def test_a_mix_of_schemes_is_prepared_until_it_is_converted(tmp_path):
    path = tmp_path / "m.safetensors"
    model = qnn.prepare(perceptron(), "qlora", overrides={"2": "qat-w8a8-token"}).eval()
    x = torch.randn(3, 64)
    for _ in range(2):
        quantrain.save_checkpoint(path, model)
        assert torch.equal(qnn.from_checkpoint(path, perceptron())(x), model(x))
        if _ == 0:
            model = qnn.convert(model)
    assert type(model[2]).__name__ == "QuantizedLinear"


def imported(kind):
    torch.manual_seed(1)
    linear = nn.Linear(128, 16)
    recipe = qnn.changed_recipe(qnn.as_recipe("int4-g64-affine"), {"weight": {"group_size": 32}})
    weight = qnn.Linear4bit.from_float(linear, "nf4" if kind == "table" else recipe).packed_weight()
    if kind == "table":
        weight.format, weight.table = "table", torch.linspace(-1, 1, 16)
    elif kind == "permutation":
        weight.permutation = torch.randperm(128)
    elif kind == "float zero points":
        weight.zero_point = weight.zero_point.float() + 0.25
    return weight


@pytest.mark.parametrize("recipe", [None, "qlora"])
@pytest.mark.parametrize("kind", ["plain", "table", "permutation", "float zero points"])
def test_imported_weights_take_lora_and_go_through_files(kind, recipe, tmp_path):
    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(128, 16), nn.Linear(16, 2))

    model = qnn.load_packed_layers(make(), {"0": imported(kind)}, recipe).eval()
    x = torch.randn(3, 128)
    close(model[0](x), F.linear(x, model[0].weight, model[0].bias), 1e-5)
    if recipe:
        assert trained(model) == set() and len(qnn.lora_parameters(model)) == 2
        filled(model)
        qnn.set_lora_adapter(model, qnn.lora_adapter(model))
    path = tmp_path / "m.safetensors"
    quantrain.save_checkpoint(path, model)
    assert torch.equal(qnn.from_checkpoint(path, make())(x), model(x))
    with pytest.raises(ValueError, match="a float linear layer at '0', got"):
        qnn.load_packed_layers(model, {"0": imported(kind)})


def test_imports_that_make_no_sense():
    weight = imported("permutation")
    weight.permutation = torch.zeros(128, dtype=torch.int64)
    with pytest.raises(ValueError, match="every column once"):
        qnn.Linear4bit.from_packed(weight)
    weight = imported("plain")
    weight.bias = torch.zeros(3)
    with pytest.raises(ValueError, match=r"bias of '0' of shape \[16\], got \[3\]"):
        qnn.load_packed_layers(nn.Sequential(nn.Linear(128, 16)), {"0": weight})
    with pytest.raises(ValueError, match="got Embedding"):
        qnn.load_packed_layers(nn.Sequential(nn.Embedding(16, 128)), {"0": imported("plain")})
    on_meta = qnn.load_packed_layers(nn.Sequential(nn.Linear(128, 16)).to("meta"), {"0": imported("plain")})
    assert on_meta[0](torch.randn(2, 128)).isfinite().all()  # the file's tensors, where they are


def test_adapters_name_modules_as_peft_finds_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)
            self.inner = nn.ModuleDict({"a": nn.Linear(64, 64)})

        def forward(self, x):
            return self.head(self.inner["a"](self.b(self.a(x))))

    whole = qnn.lora_adapter(qnn.prepare(Two(), lora()))
    assert whole.target_modules == ["a", "b"] and whole.modules_to_save == ["head"]
    part = qnn.lora_adapter(qnn.prepare(Two(), lora(), skip=["inner.*"]))
    assert part.target_modules == [] and part.target_pattern == "a|b"  # the list would mean inner.a too


def test_details_of_merging_and_tables():
    model = filled(qnn.prepare(perceptron(), lora()))
    qnn.enable_lora(model, False)
    x = torch.randn(3, 64)
    want = model(x)
    merged = qnn.merge(model)
    close(merged(x), want, 1e-5)
    assert merged[0].weight.dtype == torch.float32 and not merged[0].weight.requires_grad
    table = qnn.Embedding4bit.from_float(nn.Embedding(10, 64, padding_idx=3), "nf4")
    with pytest.raises(IndexError):
        table(torch.tensor([-1]))
    assert qnn.merge(nn.Sequential(table))[0].padding_idx == 3
    recipe = qnn.changed_recipe(qnn.as_recipe("nf4-dq"), {"scheme": {"storage": "bfloat16"}})
    odd = qnn.Linear4bit.from_float(nn.Linear(576, 8), recipe)  # 9 scales a row
    assert [name for name, _ in odd.named_parameters()] == ["weight_codes"]
    close(odd(torch.ones(1, 576)), F.linear(torch.ones(1, 576), odd.weight, odd.bias), 1e-5)
    with pytest.raises(ValueError, match="lora_rank in 0 to 65536"):
        lora(rank=2**40)
    falcon_like = nn.Sequential(Subclass(64, 64), Subclass(64, 2))
    with pytest.raises(ValueError, match="expected a Linear"):
        qnn.prepare(falcon_like, "qlora")
