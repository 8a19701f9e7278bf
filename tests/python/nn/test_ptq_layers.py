"""Layers of scheme ptq: what calibration sees, what conversion stores, files, models; quantize and its report."""

import copy

import pytest
import torch
from reference import ptq as reference
from torch import nn

import quantrain.nn as qnn
from quantrain import ptq

RECIPES = [
    "zeroquant-w8a8", "zeroquant-w4a8", "llm-int8", "llm-int8-threshold", "smoothquant-w8a8",
    "smoothquant-w8a8-static", "gptq-w4a16", "awq-w4a16", "awq-gptq-w4a8",
]  # fmt: skip
BITS4 = [name for name in RECIPES if "w4" in name]


def changed(name, **change):
    return qnn.changed_recipe(qnn.as_recipe(name), change)


def data(rows=256, k=96, seed=0, outliers=(5, 60)):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g)
    x[:, list(outliers)] *= 40
    return x


def calibrated(recipe, n=48, k=96, x=None, bias=True):
    torch.manual_seed(1)
    layer = qnn.PtqLinear(k, n, bias=bias, recipe=recipe)
    exact = nn.functional.linear(x if x is not None else data(k=k), layer.weight, layer.bias).detach()
    model = nn.Sequential(layer)
    if layer.missing_range() is not None:
        qnn.calibrate(model, [x if x is not None else data(k=k)])
    return model, exact


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", RECIPES)
def test_a_converted_layer_is_near_the_float_one(name):
    model, exact = calibrated(name)
    qnn.convert(model)
    assert error(model(data()), exact) < (0.15 if name in BITS4 else 0.03)
    layer = model[0]
    weight = layer.dequantized_weight()
    assert weight.shape == (48, 96) and layer.weight.dtype == torch.float32
    if layer.recipe.input is None:  # nothing else is rounded
        y = nn.functional.linear(data(), weight, layer.bias)
        torch.testing.assert_close(model(data()), y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_types_of_16_bits(name, dtype):
    model, _ = calibrated(name)
    want = qnn.convert(model)(data())
    found = model.to(dtype)(data().to(dtype))
    assert found.dtype == dtype and model[0].weight_scale.dtype == torch.float32
    assert error(found.float(), want) < 0.02


def test_outlier_columns_are_the_largest_and_help():
    model, exact = calibrated("llm-int8", x=data())
    plain, _ = calibrated("zeroquant-w8a8")
    layer = qnn.convert(model)[0]
    assert {5, 60} <= set(layer.outlier_columns.tolist()) and layer.outlier_columns.numel() == 16
    assert layer.outlier_columns.tolist() == sorted(layer.outlier_columns.tolist())
    assert error(model(data()), exact) < 0.5 * error(qnn.convert(plain)(data()), exact)
    want = reference.outlier_product(data(), layer.outlier_columns.tolist(), layer.weight_codes, layer.weight_scale)
    torch.testing.assert_close(model(data()).double(), want + layer.bias.double(), rtol=1e-4, atol=2e-3)


def test_static_columns_do_not_depend_on_the_other_rows():
    model, _ = calibrated(changed("llm-int8", scheme={"few_rows": "int8"}))
    x, y = data(64), qnn.convert(model)(data(64))
    for rows in (slice(0, 1), slice(3, 40)):
        assert torch.equal(model(x[rows]), y[rows])


def test_few_rows_are_not_rounded():
    model, _ = calibrated("zeroquant-w8a8")
    layer = qnn.convert(model)[0]
    exact = nn.functional.linear(data(8), layer.dequantized_weight(), layer.bias)
    torch.testing.assert_close(model(data(8)), exact, rtol=1e-4, atol=1e-3)
    assert error(model(data(9)), nn.functional.linear(data(9), layer.dequantized_weight(), layer.bias)) > 1e-3


def test_smoothing_makes_one_scale_usable():
    plain, exact = calibrated(changed("smoothquant-w8a8-static", scheme={"smooth_alpha": 0.0}))
    smooth, _ = calibrated("smoothquant-w8a8-static")
    assert error(qnn.convert(smooth)(data()), exact) < 0.7 * error(qnn.convert(plain)(data()), exact)
    layer = smooth[0]
    assert float(layer.input_scale) == pytest.approx(
        float((data().abs().amax(0) * layer.input_factor).max()) / 127, rel=1e-5
    )


def test_weights_of_4_bits_with_columns_at_8():
    base, exact = calibrated(changed("gptq-w4a16", scheme={"rounding": "nearest"}))
    apart, _ = calibrated(changed("gptq-w4a16", scheme={"rounding": "nearest", "outlier_columns": 8}))
    found = error(qnn.convert(apart)(data()), exact)
    assert found < 0.6 * error(qnn.convert(base)(data()), exact)
    assert (
        apart[0].outlier_codes.abs().max() == 127 and (apart[0].codes()[:, apart[0].outlier_columns.long()] == 0).all()
    )


@pytest.mark.parametrize("k, group", [(96, 64), (97, 32), (64, 128), (1, 128), (130, 64)])
@pytest.mark.parametrize("name", ["gptq-w4a16", "awq-gptq-w4a8", "zeroquant-w4a8"])
def test_the_last_group_may_be_short(name, k, group):
    model, exact = calibrated(changed(name, weight={"group_size": group}), k=k, x=data(k=k, outliers=()))
    layer = qnn.convert(model)[0]
    assert layer.weight_scale.shape[1] == -(-k // min(group, k + k % 2))
    assert error(model(data(k=k, outliers=())), exact) < 0.2


@pytest.mark.parametrize("name", RECIPES)
def test_files_of_prepared_and_converted_models(name, tmp_path):
    model, _ = calibrated(name)
    path = tmp_path / "prepared.safetensors"
    qnn.save_checkpoint(path, model)
    again = qnn.from_checkpoint(path, nn.Sequential(nn.Linear(96, 48)))
    want = qnn.convert(model)(data())
    assert torch.equal(qnn.convert(again)(data()), want)
    path = tmp_path / "converted.safetensors"
    qnn.save_checkpoint(path, model)
    loaded = qnn.from_checkpoint(path, nn.Sequential(nn.Linear(96, 48)))
    assert torch.equal(loaded(data()), want)
    assert torch.equal(copy.deepcopy(loaded)(data()), want)


def test_a_file_of_other_columns_is_refused(tmp_path):
    model, _ = calibrated("llm-int8")
    path = tmp_path / "model.safetensors"
    qnn.save_checkpoint(path, qnn.convert(model))
    other = qnn.convert(nn.Sequential(qnn.PtqLinear(96, 48, recipe="zeroquant-w8a8")), check_observed=False)
    with pytest.raises(ValueError, match="outlier_columns 16"):
        qnn.load_checkpoint(path, other)


def test_calibration_starts_anew_and_restores_where_it_fails():
    model, _ = calibrated("llm-int8")
    first = model[0].input_observer.absmax.clone()
    qnn.calibrate(model, [data(seed=1)])
    assert not torch.equal(model[0].input_observer.absmax, first)
    before = model[0].input_observer.absmax.clone()
    with pytest.raises(RuntimeError, match="stop"), qnn.calibration(model):
        model(data(seed=2))
        raise RuntimeError("stop")
    assert torch.equal(model[0].input_observer.absmax, before)


def test_what_was_not_calibrated_does_not_convert():
    with pytest.raises(ValueError, match="input_observer"):
        qnn.convert(nn.Sequential(qnn.PtqLinear(8, 4, recipe="llm-int8")))


def test_compiled_without_breaks():
    for name in ("llm-int8", "smoothquant-w8a8-static", "awq-gptq-w4a8", "llm-int8-threshold"):
        model, _ = calibrated(name)
        qnn.convert(model)
        found = torch.compile(model, fullgraph=True)(data(64))
        torch.testing.assert_close(found, model(data(64)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": {"bits": 5}}, "weight of 4 or 8 bits"),
        ({"weight": {"granularity": "per_group"}}, "weight per_group of 4 bits"),
        ({"input": None}, "a spec for input with outlier_columns"),
        ({"scheme": {"smooth_alpha": 1.5}}, r"smooth_alpha in \[0, 1\], got 1.5"),
        ({"scheme": {"outlier_columns": -1}}, "outlier_columns in 0 to 4096"),
        ({"scheme": {"outlier_threshold": 6.0, "outlier_columns": 0}}, "outlier_columns above 0"),
        ({"scheme": {"rounding": "up"}}, "rounding to be one of nearest, gptq, got 'up'"),
        ({"scheme": {"few_rows": "half"}}, "few_rows to be one of"),
        ({"scheme": {"smooth_alpha": 0.5, "scale_search": "awq"}}, "smooth_alpha or scale_search"),
        ({"input": {"granularity": "per_tensor", "observer": "min_max"}}, "input per_token with weights of 4 bits or"),
    ],
)
def test_recipes_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        qnn.PtqLinear(8, 4, recipe=changed("llm-int8", **change))


# ---- whole models ----------------------------------------------------------------------------------------------------


def llama(layers=2):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def batches(count=3):
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, 97, (2, 48), generator=g) for _ in range(count)]


@pytest.mark.parametrize("name", RECIPES)
def test_quantize_a_llama(name):
    model = llama()
    seen = []
    ptq.quantize(model, name, batches(), check_batch=batches(4)[3], progress=lambda *step: seen.append(step))
    report = model.ptq_report
    assert len(report.rows) == 14 and report.kl < 0.05 and report.top1 > 0.5
    assert report.total["bytes"] < report.total["float_bytes"]
    assert isinstance(model.lm_head, nn.Linear) and seen[-1][0] == seen[-1][1] == 2
    weights = {row["layer"].split(".")[-1]: row["weight"] for row in report.rows}
    if name == "zeroquant-w4a8":
        assert weights["q_proj"] == "int8 per channel" and weights["up_proj"] == "int4 groups of 128"
    assert "KL" in str(report)


def test_block_by_block_is_on_quantized_inputs():
    once, step = llama(3), llama(3)
    ptq.quantize(once, "gptq-w4a16", batches(), sequential=False)
    ptq.quantize(step, "gptq-w4a16", batches())
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"
    rows = [{row["layer"]: row["error"] for row in model.ptq_report.rows} for model in (once, step)]
    assert rows[0][first] == pytest.approx(rows[1][first], rel=1e-3) and rows[0][last] != rows[1][last]
    assert step.config.use_cache and not any("calibration_report" in m.__dict__ for m in step.modules())


def test_quantize_bert_with_a_mask():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertForSequenceClassification(config).eval()
    mask = torch.ones(2, 48, dtype=torch.int64)
    mask[1, 30:] = 0
    given = [{"input_ids": b, "attention_mask": mask} for b in batches()]
    ptq.quantize(model, "awq-gptq-w4a8", given)
    assert model.ptq_report.kl < 0.05 and isinstance(model.classifier, nn.Linear)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ptq.quantize(llama(), "llm-int8"), ValueError, "expected batches to calibrate 'llm-int8' on, got none"),
        (lambda: ptq.quantize(llama(), "gptq-w4a16", batches()[0]), TypeError, "an iterable of batches, got one Tensor"),
        (lambda: ptq.quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "llm-int8", [torch.randn(4, 8)],
                              sequential=True), ValueError, "expected blocks"),
        (lambda: ptq.quantize(llama(), "gptq-w4a16", batches(), max_kl=1e-9), ValueError, "KL of at most 1e-09 nats"),
        (lambda: ptq.quantization_report(llama(), batches()[0]), ValueError, "expected a converted model"),
    ],
)  # fmt: skip
def test_calls_that_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("sequential", [False, True])
def test_nan_in_calibration_names_the_layer(sequential):
    model = llama()

    def forward(model, batch):
        return model(inputs_embeds=model.get_input_embeddings()(batch))

    class Spoiled(nn.Module):
        def forward(self, x):
            return torch.where(x.abs() > 0, float("nan"), x)

    prepared = llama()
    exact = ptq.log_probabilities(prepared, batches()[0])
    assert torch.isfinite(exact).all()
    model.model.layers[1].input_layernorm = Spoiled()
    with pytest.raises(ValueError, match="finite logits of the float model"):
        ptq.quantize(model, "llm-int8", batches(), sequential=sequential)
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.self_attn.*': expected finite inputs in calibration"):
        ptq.quantize(model, "llm-int8", batches(), sequential=sequential, check_batch=batches()[0],
                     forward=lambda m, b: forward(m, b).logits.nan_to_num())  # fmt: skip


class Chain(nn.Module):
    """Blocks of a linear layer; `around` says how they are called."""

    def __init__(self, around=lambda block, x: block(x), blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(blocks))
        self.head, self.around = nn.Linear(32, 8), around

    def forward(self, x):
        for block in self.blocks:
            x = self.around(block, x)
        return self.head(x)


def rows_of_32(count=3):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(40, 32, generator=g) for _ in range(count)]


def seen_by(model):
    return {name: m.input_absmax for name, m in model.named_modules() if isinstance(m, qnn.QuantizedPtqLinear)}


def test_blocks_that_are_no_chain_are_calibrated_at_once():
    torch.manual_seed(0)
    residual = Chain(lambda block, x: x + block(x))
    twice = Chain(lambda block, x: block(block(x)))
    for model in (residual, twice):
        once = ptq.quantize(copy.deepcopy(model), "gptq-w4a16", rows_of_32(), sequential=False)
        found = ptq.quantize(copy.deepcopy(model), "gptq-w4a16", rows_of_32())
        for name, absmax in seen_by(once).items():
            assert torch.equal(seen_by(found)[name], absmax), name
    with pytest.raises(ValueError, match="got block 1 on something else"):
        ptq.quantize(residual, "gptq-w4a16", rows_of_32(), sequential=True)
    with pytest.raises(ValueError, match="expected every block to run once per batch"):
        ptq.quantize(twice, "gptq-w4a16", rows_of_32(), sequential=True)


def test_blocks_called_by_name_and_blocks_that_change_their_input():
    torch.manual_seed(0)
    plain = Chain()
    named = Chain(lambda block, x: block(input=x))
    named.load_state_dict(plain.state_dict())
    want = ptq.quantize(plain, "gptq-w4a16", rows_of_32(), sequential=True)
    found = ptq.quantize(named, "gptq-w4a16", rows_of_32(), sequential=True)
    assert all(torch.equal(seen_by(found)[name], absmax) for name, absmax in seen_by(want).items())

    class Changing(nn.Sequential):
        def forward(self, input):
            return super().forward(input.add_(1.0))

    model = Chain()
    model.blocks = nn.ModuleList(Changing(*block) for block in model.blocks)
    batches = rows_of_32()
    once = ptq.quantize(copy.deepcopy(model), "gptq-w4a16", [b.clone() for b in batches], sequential=False,
                        check_batch=False)  # fmt: skip
    step = ptq.quantize(model, "gptq-w4a16", [b.clone() for b in batches], sequential=True, check_batch=False)
    assert torch.equal(seen_by(step)["blocks.0.0"], seen_by(once)["blocks.0.0"])


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", ["gptq-w4a16", "llm-int8"])
def test_layers_that_no_batch_reaches_stay_float_and_are_named(name, sequential, tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, x):
            return x + self.experts[0](x)

    def model():
        torch.manual_seed(0)
        made = Chain()
        made.blocks = nn.ModuleList(Experts() for _ in range(2))
        made.spare, made.head = nn.Linear(32, 32), made._modules.pop("head")
        return made

    left = {"blocks.0.experts.1", "blocks.1.experts.1", "spare"}
    with pytest.warns(UserWarning, match="quantize: 3 layers stay in floating point, as no batch reached them"):
        found = ptq.quantize(model(), name, rows_of_32(), sequential=sequential)
    assert {key for key, m in found.named_modules() if isinstance(m, nn.Linear)} - {"head"} == left
    assert left <= set(found.quantization_summary.left_float)
    assert not left & {row["layer"] for row in found.quantization_summary.rows}
    qnn.save_checkpoint(tmp_path / "m.safetensors", found)
    again = qnn.from_checkpoint(tmp_path / "m.safetensors", model())
    assert torch.equal(again(rows_of_32()[0]), found(rows_of_32()[0]))


def test_models_within_a_model_keep_no_cache_block_by_block():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    torch.manual_seed(0)
    part = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**part), transformers.BertConfig(**{**part, "num_hidden_layers": 3})
    )
    model = transformers.EncoderDecoderModel(config).eval()
    given = [{"input_ids": b, "decoder_input_ids": b[:, :5]} for b in batches()]
    model = ptq.quantize(model, "gptq-w4a16", given)  # the keys and values of cross-attention were not called
    assert not any("crossattention" in name for name in model.quantization_summary.left_float)
    assert model.config.decoder.use_cache


def test_a_bare_layer_a_network_of_integers_and_a_second_time():
    recipe = changed("gptq-w4a16", scheme={"head": True})
    assert isinstance(ptq.quantize(nn.Linear(32, 8), recipe, rows_of_32()), qnn.QuantizedPtqLinear)
    chain = Chain()
    chain.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    ptq.quantize(chain, "gptq-w4a16", rows_of_32())
    assert all(isinstance(block, qnn.QuantizedPtqLinear) for block in chain.blocks)
    with pytest.raises(ValueError, match="a recipe for layers, got 'f8net'"):
        ptq.quantize(Chain(), "f8net", rows_of_32())
    model = ptq.quantize(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), "llm-int8", rows_of_32())
    with (
        pytest.warns(UserWarning, match="quantized already"),
        pytest.raises(ValueError, match="gives the model's output"),
    ):
        ptq.quantize(model, "llm-int8", rows_of_32())


def test_errors_of_conversion_name_the_layer_and_a_skeleton_may_be_on_meta():
    model = qnn.prepare(Chain(), "zeroquant-w8a8")
    with torch.no_grad():
        model.blocks[1][0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"convert: 'blocks.1.0': ptq_weight: expected a finite weight"):
        qnn.convert(model)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    for name in ("llm-int8", "gptq-w4a16"):
        converted = qnn.convert(qnn.prepare(copy.deepcopy(skeleton), name), check_observed=False)
        assert converted[0].weight_codes.is_meta


@pytest.mark.parametrize("scheme", [{}, {"outlier_columns": 4}, {"outlier_columns": 4, "rounding": "gptq"}], ids=str)
def test_the_error_told_is_that_of_the_layer(scheme):
    x = data(outliers=())
    model, _ = calibrated(changed("awq-w4a16", scheme=scheme), x=x)
    weight = model[0].weight.detach().double()
    layer = qnn.convert(model)[0]
    hessian = reference.statistics(x)[2]
    d = weight - layer.dequantized_weight().double()
    exact = float((d @ hessian * d).sum() / (weight @ hessian * weight).sum())
    assert layer.error == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", "nf4"])
def test_a_layer_that_is_never_called_is_no_head(recipe):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.unused = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 64)

        def forward(self, x):
            return self.head(self.body(x))

    model = qnn.prepare(Model(), recipe)
    assert "head" in model.quantization_summary.left_float and "body" not in model.quantization_summary.left_float


@pytest.mark.cuda
def test_statistics_in_host_memory_convert_alike():
    torch.manual_seed(3)
    batches = [torch.randn(64, 32, device="cuda") for _ in range(3)]
    layers = [qnn.PtqLinear(32, 16, recipe="gptq-w4a16").cuda() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].input_observer.to("cpu")
    for layer in layers:
        qnn.calibrate(layer, batches)
    assert layers[1].input_observer.hessian.device.type == "cpu"
    near, host = (qnn.convert(layer) for layer in layers)
    assert host.weight_codes.is_cuda and torch.equal(near.weight_codes, host.weight_codes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name, k", [("zeroquant-w4a8", 256), ("awq-gptq-w4a8", 256), ("zeroquant-w4a8", 200)])
def test_two_levels_of_scales_multiply_codes_as_they_are(name, k, device):
    model, exact = calibrated(changed(name, weight={"group_size": 64}, scheme={"group_scales": "two_level"}), k=k)
    plain, _ = calibrated(changed(name, weight={"group_size": 64}), k=k)
    x = data(k=k).to(device)
    layer = qnn.convert(model.to(device))[0]
    scale = layer.weight_scale
    unit = scale.amax(1, keepdim=True) / 15
    multiple = scale / unit
    assert (multiple - multiple.round()).abs().max() < 1e-5 and multiple.min() > 0.99
    codes = nn.functional.pad(layer.codes(), (0, scale.shape[1] * 64 - k))
    whole = codes.view(48, -1, 64) * multiple.round().to(torch.int8)[..., None]  # at most 8 times 15
    rows, s = torch.ops.quantrain.int8_quantize_rows.nearest(
        nn.functional.pad(x if layer.input_factor is None else (x * layer.input_factor), (0, codes.shape[1] - k))
    )
    want = torch.ops.quantrain.int8_mm(rows, whole.view(48, -1), s, unit, layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert error(layer(x).cpu(), exact) < 1.15 * error(qnn.convert(plain)(data(k=k)), exact)


def test_two_levels_of_scales_need_groups():
    with pytest.raises(ValueError, match="weight per_group with group_scales 'two_level'"):
        changed("llm-int8", scheme={"group_scales": "two_level"}).validate()
    layer = qnn.PtqLinear(64, 4, recipe=changed("zeroquant-w4a8", scheme={"group_scales": "two_level"}))
    with torch.no_grad():
        layer.weight[1] = 0
    assert (qnn.convert(layer).weight_scale[1] == 0).all()
