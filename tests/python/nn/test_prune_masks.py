"""Masks of whole models: what magnitude drops against the definition, where masks go, what survives saving and loading."""

import copy
import pickle

import pytest
import torch
from reference import pruning as oracle
from torch import nn

import quantrain.nn as qnn
import quantrain.prune as prune
from quantrain.pruning import unpack_mask


def layers():
    """Every kind of layer: module -> its weight as rows ``[O, ...]`` and back."""
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(24, 10),
        "conv1d": nn.Conv1d(4, 6, 3),
        "conv2d": nn.Conv2d(4, 6, 3),
        "conv3d": nn.Conv3d(4, 3, 2),
        "depthwise": nn.Conv2d(8, 8, 2, groups=8),
        "transposed": nn.ConvTranspose2d(4, 6, 2, groups=2),
    }


def rows_of(layer, weight):
    if isinstance(layer, nn.ConvTranspose2d):
        parts = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return parts.flatten(0, 1)
    return weight


def kept_of(model, name="weight"):
    mask = prune.masks_of(model)[name]
    return unpack_mask(mask, dict(model.named_parameters())[name].shape)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) or tensor.isnan().any() for name, tensor in before.items())


@pytest.mark.parametrize("kind", list(layers()))
@pytest.mark.parametrize(("pattern", "sparsity"), [(None, 0.6), ("row", 0.3), ("2:4", 0.5), ("1:4", 0.75), (None, 0.0)])
def test_masks_are_the_definitions(kind, pattern, sparsity):
    layer = layers()[kind]
    before = layer.weight.detach().clone()
    table = prune.magnitude(layer, sparsity, pattern=pattern)
    expected = oracle.mask(rows_of(layer, before), sparsity, pattern or "layer")
    assert torch.equal(rows_of(layer, kept_of(layer)), expected)
    assert torch.equal(layer.weight_mask, oracle.pack(kept_of(layer)))
    assert torch.equal(layer.weight, torch.where(kept_of(layer), before, 0))
    assert table.rows[0]["zeros"] == int((~expected).sum()) and "bias_mask" not in dict(layer.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    layer = nn.Linear(32, 8).to(dtype)
    before = layer.weight.detach().clone()
    prune.magnitude(layer, 0.5)
    assert torch.equal(kept_of(layer), oracle.mask(before, 0.5))


def test_one_threshold_for_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(5)
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    table = prune.magnitude(model, 0.5, scope="global")
    for index, expected in zip((0, 2), oracle.global_masks(weights, 0.5), strict=True):
        assert torch.equal(kept_of(model, f"{index}.weight"), expected)
    assert table.total["zeros"] == 80 and table.rows[0]["sparsity"] < 0.5 < table.rows[1]["sparsity"]


def test_the_weights_of_transformers_conv1d_lie_the_other_way_round():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    layer = transformers.pytorch_utils.Conv1D(6, 16)
    before = layer.weight.detach().clone()
    prune.magnitude(layer, 0.5, pattern="2:4")
    assert torch.equal(kept_of(layer), oracle.mask(before.t(), 0.5, "2:4").t())


def test_channels_last_weights_have_masks_in_row_major_order():
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    before = layer.weight.detach().clone()
    prune.magnitude(layer, 0.5)
    assert torch.equal(kept_of(layer), oracle.mask(before, 0.5))
    assert torch.equal(layer.weight, torch.where(kept_of(layer), before, 0))


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token"])
def test_prepared_layers(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model(torch.randn(4, 3, 8, 8))
    model = qnn.prepare(model, recipe)
    weights = {name: model.get_parameter(name).detach().clone() for name in ("0.weight", "4.weight")}
    prune.magnitude(model, 0.5)
    assert type(model[0]) is qnn.QuantConvBn2d and type(model[4]) is qnn.QuantLinear
    for name, before in weights.items():
        assert torch.equal(kept_of(model, name), oracle.mask(before, 0.5))
    x = torch.randn(8, 3, 8, 8)
    model(x).square().mean().backward()
    predicted = model.eval()(x)
    masks = {name: kept_of(model, name) for name in weights}
    converted = qnn.convert(model)
    torch.testing.assert_close(converted(x), predicted, rtol=0.02, atol=0.02)
    for name, kept in masks.items():
        codes = converted.get_submodule(name.removesuffix(".weight")).codes()
        assert int(codes.reshape(kept.shape)[~kept].abs().max()) == 0


def test_masks_from_before_prepare_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    prune.magnitude(model, 0.5)
    masks = {name: mask.clone() for name, mask in prune.masks_of(model).items()}
    prepared = qnn.prepare(model, "qat-w8a8")
    assert prune.masks_of(prepared).keys() == masks.keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in prune.masks_of(prepared).items())


def test_shared_weights_are_pruned_once_and_every_owner_has_the_mask():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    table = prune.magnitude(model, 0.5)
    assert [row["weight"] for row in table.rows] == ["0.weight"] and list(prune.masks_of(model)) == ["0.weight"]
    assert model[0].weight_mask is model[2].weight_mask
    assert {"0.weight_mask", "2.weight_mask"} <= model.state_dict().keys()
    fresh = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fresh[2].weight = fresh[0].weight
    assert prune.load_masks(fresh, model.state_dict()) == ["0.weight"]
    assert fresh[0].weight_mask is fresh[2].weight_mask
    fresh.load_state_dict(model.state_dict())
    assert prune.remove_masks(model) == ["0.weight"]
    assert not any(name.endswith("_mask") for name in model.state_dict())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def test_embeddings_and_what_is_tied_to_them_are_left_unless_asked_for():
    model = Tied()
    assert [row["weight"] for row in prune.magnitude(model, 0.5).rows] == ["body.weight"]
    with pytest.raises(
        ValueError, match=r"got 'head' \(a Linear, whose weight is an embedding's too, .*embeddings=True"
    ):
        prune.magnitude(model, 0.5, layers=["head"])
    table = prune.magnitude(model, 0.5, embeddings=True)
    assert [row["weight"] for row in table.rows] == ["embed.weight", "body.weight"]
    assert model.embed.weight_mask is model.head.weight_mask


def test_the_projections_of_multihead_attention():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    before = model.self_attn.in_proj_weight.detach().clone()
    prune.magnitude(model, 0.5, layers=["self_attn", "linear?"])
    assert list(prune.masks_of(model)) == ["self_attn.in_proj_weight", "linear1.weight", "linear2.weight"]
    assert torch.equal(kept_of(model, "self_attn.in_proj_weight"), oracle.mask(before, 0.5))
    assert torch.isfinite(model(torch.randn(1, 3, 16))).all()


def test_what_was_pruned_is_pruned_first_and_the_buffer_stays_the_same_tensor():
    layer = nn.Linear(16, 8)
    prune.magnitude(layer, 0.5)
    first, mask = kept_of(layer), layer.weight_mask
    prune.magnitude(layer, 0.75)
    assert layer.weight_mask is mask
    assert not (kept_of(layer) & ~first).any() and int(kept_of(layer).sum()) == 32


def test_layers_and_skip():
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), "third": nn.Linear(8, 8)})
    prune.magnitude(model, 0.5, layers=["s*", "third"], skip=["third"])
    assert list(prune.masks_of(model)) == ["second.weight"]
    assert [row["zeros"] for row in prune.sparsity(model).rows] == [0, 32, 0]


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_a_state_dict_loads_into_a_fresh_model_after_load_masks():
    torch.manual_seed(0)
    model, fresh = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    prune.magnitude(model, 0.5, skip=["2"])
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="0.weight_mask"):
        fresh.load_state_dict(state)
    dense = fresh[0].weight.detach().clone()
    assert prune.load_masks(fresh, state) == ["0.weight"]
    assert torch.equal(fresh[0].weight, torch.where(kept_of(model, "0.weight"), dense, 0))
    fresh[0].weight_mask.fill_(0)
    assert not torch.equal(model[0].weight_mask, fresh[0].weight_mask)  # a copy of its own
    fresh.load_state_dict(state)
    assert_same(fresh, state_of(model))


def test_the_checkpoint_of_a_masked_model(tmp_path):
    model, fresh = (nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
    prune.magnitude(model, 0.5)
    qnn.save_checkpoint(tmp_path / "m.safetensors", model)
    prune.load_masks(fresh, model.state_dict())
    qnn.load_checkpoint(tmp_path / "m.safetensors", fresh)
    assert_same(fresh, state_of(model))


def test_copies_pickles_and_casts_keep_masks():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.magnitude(model, 0.5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half()):
        assert torch.equal(other[0].weight_mask, model[0].weight_mask) and other[0].weight_mask.dtype == torch.uint8
        assert int((other[0].weight == 0).sum()) == 32


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.weight": torch.zeros(8, 8)}, "expected masks .* got 1 other entries"),
        ({"1.weight_mask": torch.zeros(8, dtype=torch.uint8)}, "a parameter of the model, got '1.weight_mask'"),
        ({"0.weight_mask": torch.zeros(7, dtype=torch.uint8)}, r"'0.weight_mask' to be uint8 \[8\].* got uint8 \[7\]"),
        ({"0.weight_mask": torch.zeros(8, 8, dtype=torch.uint8)}, r"got uint8 \[8, 8\]"),
    ],
)
def test_load_masks_refuses_and_changes_nothing(state, message):
    model = nn.Sequential(nn.Linear(8, 8))
    before = state_of(model)
    with pytest.raises(ValueError, match=f"load_masks: .*{message}"):
        prune.load_masks(model, state)
    assert_same(model, before)


def test_a_buffer_of_the_model_that_ends_like_a_mask_is_none():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 2)
            self.register_buffer("token_mask", torch.ones(4, dtype=torch.uint8))

    model = Masked()
    prune.magnitude(model, 0.5)
    assert list(prune.masks_of(model)) == ["fc.weight"]
    assert prune.load_masks(Masked(), model.state_dict()) == ["fc.weight"]
    prune.remove_masks(model)
    assert "token_mask" in model.state_dict()


def test_remove_masks_leaves_dense_zeros():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.magnitude(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1)  # somebody trained without keep_pruned
    assert prune.remove_masks(model) == ["0.weight"]
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"] and int((model[0].weight == 0).sum()) == 32
    assert prune.remove_masks(model) == [] and prune.masks_of(model) == {}


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_bytes():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4).half(), nn.Embedding(5, 4))
    prune.magnitude(model, 0.75, layers=["0"])
    table = prune.sparsity(model)
    assert [(row["weight"], row["elements"], row["zeros"]) for row in table.rows] == [
        ("0.weight", 128, 96),
        ("2.weight", 32, 0),
    ]
    assert [(row["dense_bytes"], row["packed_bytes"]) for row in table.rows] == [(512, 16 + 32 * 4), (64, 64)]
    assert table.total["packed_bytes"] == 208 and "96 of 160 are zero (60.0 %)" in str(table)


def test_the_report_of_a_model_with_nan():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert prune.sparsity(model).rows[0]["zeros"] == 0


def test_measured_times_are_of_linear_layers():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(16, 8))
    table = prune.sparsity(model, measure=True, rows=4)
    assert table.rows[0]["dense_us"] is None and table.rows[1]["dense_us"] > 0
    assert all(row["sparse_us"] is None for row in table.rows) and "2:4 us" in str(table)


@pytest.mark.cuda
def test_two_of_four_is_measured_on_a_gpu():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).cuda().bfloat16()
    prune.magnitude(model, 0.5, pattern="2:4", layers=["0"])
    rows = prune.sparsity(model, measure=True).rows
    assert rows[0]["sparse_us"] is None or rows[0]["sparse_us"] > 0
    assert rows[1]["sparse_us"] is None and rows[1]["dense_us"] > 0


@pytest.mark.cuda
def test_masks_on_a_gpu_are_the_cpus():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    other = copy.deepcopy(model).cuda()
    for each in (model, other):
        prune.magnitude(each, 0.7, scope="global")
    for name, mask in prune.masks_of(other).items():
        assert torch.equal(mask.cpu(), prune.masks_of(model)[name])
    other.cpu()
    assert_same(other, state_of(model))


# ---- refusals --------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(8, 8), "decoder": nn.Linear(6, 8), "norm": nn.LayerNorm(8)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sparsity=1.0), r"sparsity in \[0, 1\), got 1.0"),
        (dict(sparsity=-0.1), r"sparsity in \[0, 1\), got -0.1"),
        (dict(sparsity=float("nan")), r"sparsity in \[0, 1\), got nan"),
        (dict(sparsity=0.5, scope="all"), "scope 'layer' or 'global', got 'all'"),
        (dict(sparsity=0.5, pattern="column"), "pattern None, 'row' or 'n:m' such as '2:4', got 'column'"),
        (dict(sparsity=0.5, pattern="4:2"), "pattern '4:2' to keep fewer"),
        (dict(sparsity=0.7, pattern="2:4"), "at its sparsity 0.5, got 0.7"),
        (
            dict(sparsity=0.5, pattern="2:4"),
            r"a multiple of 4 for '2:4', got 6 in 'decoder.weight' \(skip=\['decoder'\]",
        ),
        (dict(sparsity=0.5, scope="global", pattern="row"), "no pattern with scope 'global'.* got 'row'"),
        (dict(sparsity=0.5, layers=["encodre"]), "got 'encodre' .*the nearest are 'encoder', 'decoder'"),
        (dict(sparsity=0.5, skip=["x"]), "every pattern of skip to name a layer that can be pruned, got 'x'"),
        (dict(sparsity=0.5, layers=["norm"]), r"got 'norm' \(a LayerNorm, which has no rows and columns\)"),
        (dict(sparsity=0.5, skip=["*coder"]), "at least one layer to prune, got none"),
    ],
)
def test_bad_arguments(arguments, message):
    model = small()
    before = state_of(model)
    with pytest.raises(ValueError, match=f"magnitude: .*{message}"):
        prune.magnitude(model, **arguments)
    assert_same(model, before)


def test_bad_types():
    with pytest.raises(TypeError, match="magnitude: expected model to be a torch.nn.Module, got list"):
        prune.magnitude([], 0.5)
    with pytest.raises(TypeError, match="magnitude: expected layers to be a list of patterns, got the str 'fc'"):
        prune.magnitude(small(), 0.5, layers="fc")
    with pytest.raises(TypeError, match="magnitude: expected sparsity to be a number, got str"):
        prune.magnitude(small(), "half")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = small()
    with torch.no_grad():
        model.decoder.weight[0, 0] = value
    before = state_of(model)
    with pytest.raises(ValueError, match="finite weights, got NaN or Inf in 'decoder.weight'"):
        prune.magnitude(model, 0.5)
    assert_same(model, before)


def test_a_mask_of_another_shape_and_an_attribute_in_its_place():
    model = small()
    model.encoder.register_buffer("weight_mask", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"'encoder.weight_mask' to be uint8 \[8\], one bit per element of \[8, 8\]"):
        prune.magnitude(model, 0.5)
    model = small()
    model.encoder.weight_mask = "mine"
    with pytest.raises(
        ValueError, match="no attribute 'weight_mask' but a packed mask beside 'encoder.weight', got str"
    ):
        prune.magnitude(model, 0.5)
    assert prune.masks_of(model) == {}


def test_computed_weights_are_left_and_refused_by_name():
    model = small()
    nn.utils.prune.random_unstructured(model.encoder, "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model.decoder)
    with pytest.raises(ValueError, match=r"'encoder' \(a Linear, whose weight is computed, or is no parameter\)"):
        prune.magnitude(model, 0.5, layers=["encoder"])
    with pytest.raises(ValueError, match="at least one layer to prune, got none"):
        prune.magnitude(model, 0.5)
    nn.utils.prune.remove(model.encoder, "weight")
    assert [row["weight"] for row in prune.magnitude(model, 0.5).rows] == ["encoder.weight"]


def test_a_model_without_weights():
    with pytest.raises(ValueError, match=r"magnitude: .* got none \(a ReLU, which has no rows and columns\)"):
        prune.magnitude(nn.ReLU(), 0.5)
    with pytest.raises(ValueError, match=r"first modules: '0' \(Embedding\)"):
        prune.magnitude(nn.Sequential(nn.Embedding(4, 4)), 0.5)
    with pytest.raises(ValueError, match="sparsity: expected a model with a layer that can be pruned, got none"):
        prune.sparsity(nn.Sequential())
