"""Wanda and SparseGPT on whole models: what layers read, block after block, and models left alone by errors."""

import copy
import math

import pytest
import torch
from reference import pruning as oracle
from torch import nn
from torch.nn import functional as F

import quantrain.nn as qnn
import quantrain.prune as prune
from quantrain import QuantSpec
from quantrain.finetune.minilm import BertConfig, SentenceClassifier
from quantrain.prune import calibrated
from quantrain.pruning import unpack_mask

HEAD = ("classifier",)


def bert(seed=0):
    torch.manual_seed(seed)
    return SentenceClassifier(BertConfig(50, 32, 3, 4, 64, 16), 2)


def sentences(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 12, dtype=torch.bool)
    return [(torch.randint(0, 50, (4, 12), generator=generator), mask) for _ in range(count)]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def kept_of(model, name="weight"):
    return unpack_mask(prune.masks_of(model)[name], model.get_parameter(name).shape)


def unfolded(layer, x):
    """What the columns of each group of a convolution read, ``[rows, K]``."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    parts = []
    for group in x.chunk(layer.groups, 1):
        columns = F.unfold(group, layer.kernel_size, layer.dilation, 0, layer.stride)  # [N, K, L]
        parts.append(columns.transpose(1, 2).flatten(0, 1))
    return parts


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 2), dilation=(2, 1)),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "reflected": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
}


# ---- Wanda -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.5), ("row", 0.3), ("layer", 0.6), ("2:4", 0.5)])
def test_wanda_of_a_linear_layer(pattern, sparsity):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10)
    x = torch.randn(3, 5, 24) * torch.logspace(-1, 1, 24)
    before = layer.weight.detach().clone()
    table = prune.wanda(layer, sparsity, [x[:1], x[1:]], pattern=pattern)
    norm = x.flatten(0, 1).double().norm(dim=0)
    expected = oracle.mask(before, sparsity, pattern, norm)
    assert torch.equal(kept_of(layer), expected)
    assert torch.equal(layer.weight, torch.where(expected, before, 0))
    assert table.rows[0]["zeros"] == int((~expected).sum())
    assert not torch.equal(expected, oracle.mask(before, sparsity, pattern))


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_wanda_of_a_convolution(kind):
    torch.manual_seed(0)
    layer = copy.deepcopy(CONVOLUTIONS[kind])
    x = torch.randn(5, 4, 9, 8) * torch.logspace(-1, 1, 4)[:, None, None]
    before = layer.weight.detach().clone()
    prune.wanda(layer, 0.5, [x[:2], x[2:]])
    norms = [columns.double().norm(dim=0) for columns in unfolded(layer, x)]
    rows = before.flatten(1).chunk(layer.groups)
    expected = torch.cat([oracle.mask(part, 0.5, "row", norm) for part, norm in zip(rows, norms, strict=True)])
    assert torch.equal(kept_of(layer).flatten(1), expected)


def test_wanda_in_one_and_three_dimensions():
    torch.manual_seed(0)
    line, solid = nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.Conv3d(2, 3, 2, padding=1)
    x = torch.randn(2, 3, 11)
    before = line.weight.detach().clone()
    prune.wanda(line, 0.5, [x])
    columns = F.unfold(x.unsqueeze(-1), (3, 1), 1, (1, 0), (2, 1)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(kept_of(line).flatten(1), oracle.mask(before, 0.5, "row", columns.norm(dim=0)).flatten(1))
    before, x = solid.weight.detach().clone(), torch.randn(2, 2, 3, 4, 5)
    prune.wanda(solid, 0.5, [x])
    padded = F.pad(x, (1,) * 6)
    places = padded.unfold(2, 2, 1).unfold(3, 2, 1).unfold(4, 2, 1)
    norm = places.square().sum((0, 2, 3, 4)).sqrt()
    assert torch.equal(kept_of(solid), oracle.mask(before, 0.5, "row", norm.flatten()))


def test_wanda_of_transformers_conv1d():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(6, 16)
    x, before = torch.randn(9, 16) * torch.logspace(-1, 1, 16), layer.weight.detach().clone()
    prune.wanda(layer, 0.5, [x], pattern="2:4")
    assert torch.equal(kept_of(layer), oracle.mask(before.t().contiguous(), 0.5, "2:4", x.norm(dim=0)).t())


def test_wanda_goes_block_by_block():
    model, every = bert().eval(), sentences()
    expected = copy.deepcopy(model)
    prune.wanda(model, 0.5, every, skip=HEAD)
    blocks = expected.bert.encoder.layer
    with torch.no_grad():
        hidden = [expected.bert.embeddings(ids) for ids, _ in every]
        for block in blocks:
            read = {}
            hooks = [
                module.register_forward_pre_hook(lambda m, args, read=read: read.setdefault(m, []).append(args[0]))
                for module in block.modules()
                if isinstance(module, nn.Linear)
            ]
            for x in hidden:
                block(x, every[0][1][:, None, None, :])
            for hook in hooks:
                hook.remove()
            for module, inputs in read.items():
                norm = torch.cat([x.flatten(0, -2) for x in inputs]).norm(dim=0)
                module.weight.mul_(oracle.mask(module.weight, 0.5, "row", norm))
            hidden = [block(x, every[0][1][:, None, None, :]) for x in hidden]
    for name, parameter in expected.named_parameters():
        agree = (parameter == 0) == (model.get_parameter(name) == 0)
        assert agree.float().mean() > 0.999, name  # sums in another order may swap neighbours
    once = bert().eval()
    prune.wanda(once, 0.5, every, skip=HEAD, sequential=False)
    deep = "bert.encoder.layer.2.output.dense.weight"
    assert not torch.equal(kept_of(once, deep), kept_of(model, deep))


def test_modes_switches_and_hooks_are_what_they_were():
    model = bert().train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    prune.wanda(model, 0.5, sentences(), skip=HEAD)
    prune.sparsegpt(model, 0.5, sentences(), skip=HEAD)
    assert [module.training for module in model.modules()] == modes
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == 0
    assert torch.backends.mha.get_fastpath_enabled() and torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pytorchs_encoder_whose_fast_path_calls_no_layer():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    table = prune.wanda(model, 0.5, [torch.randn(2, 5, 16)])
    assert [row["weight"] for row in table.rows] == [f"layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w8a8-token"])
def test_prepared_models_are_measured_without_rounding(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(64, 16) * torch.logspace(-1, 1, 16)
    prepared = qnn.prepare(copy.deepcopy(model), recipe)
    prune.wanda(model, 0.5, [x])
    prune.wanda(prepared, 0.5, [x])
    for name, mask in prune.masks_of(model).items():
        assert torch.equal(mask, prune.masks_of(prepared)[name])
    assert all(
        fake_quant.fake_quant_enabled for fake_quant in prepared.modules() if isinstance(fake_quant, qnn.FakeQuantize)
    )


# ---- SparseGPT -------------------------------------------------------------------------------------------------------


def correlated(rows, columns):
    return torch.randn(rows, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)


def hessian_of(x):
    rows = x.flatten(0, -2).double()
    return 2 * rows.T @ rows / len(rows)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("layer", 0.5), ("row", 0.5), ("row", 0.7), ("2:4", 0.5), ("4:8", 0.5)]
)
def test_sparsegpt_of_a_linear_layer(pattern, sparsity):
    torch.manual_seed(0)
    layer = nn.Linear(160, 6)
    x = correlated(300, 160).view(3, 100, 160)
    before = layer.weight.detach().clone()
    prune.sparsegpt(layer, sparsity, [x[:1], x[1:]], pattern=pattern)
    expected, kept = oracle.sparsegpt(before, hessian_of(x), sparsity, pattern)
    assert (kept_of(layer) == kept).float().mean() > 0.995
    if torch.equal(kept_of(layer), kept):
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert bool((layer.weight[~kept_of(layer)] == 0).all())
    with torch.no_grad():
        magnitude = torch.where(oracle.mask(before, sparsity, pattern), before, 0)
        ours, theirs = (F.linear(x, w - before).norm() for w in (layer.weight, magnitude))
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("kind", ["plain", "strided", "grouped"])
def test_sparsegpt_of_a_convolution(kind):
    torch.manual_seed(0)
    layer = copy.deepcopy(CONVOLUTIONS[kind])
    x, before = torch.randn(40, 4, 9, 8), layer.weight.detach().clone()
    prune.sparsegpt(layer, 0.5, [x[:20], x[20:]], pattern="row")
    rows = before.flatten(1).chunk(layer.groups)
    parts = [
        oracle.sparsegpt(part, hessian_of(columns), 0.5, "row")
        for part, columns in zip(rows, unfolded(layer, x), strict=True)
    ]
    kept = torch.cat([part for _, part in parts])
    assert (kept_of(layer).flatten(1) == kept).float().mean() > 0.98
    if torch.equal(kept_of(layer).flatten(1), kept):
        torch.testing.assert_close(
            layer.weight.flatten(1).double(), torch.cat([w for w, _ in parts]), rtol=1e-3, atol=1e-4
        )


def test_long_inputs_of_convolutions_are_unfolded_in_parts(monkeypatch):
    torch.manual_seed(0)
    whole, parts = (copy.deepcopy(CONVOLUTIONS["plain"]) for _ in range(2))
    x = torch.randn(7, 4, 9, 8)
    prune.sparsegpt(whole, 0.5, [x])
    monkeypatch.setattr(calibrated, "kElements", 5000)
    prune.sparsegpt(parts, 0.5, [x])
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-3, atol=1e-4)


def test_later_layers_read_what_pruned_blocks_give():
    model, dense, every = bert().eval(), bert().eval(), sentences(6)
    once = bert().eval()
    prune.sparsegpt(model, 0.6, every, skip=HEAD)
    prune.sparsegpt(once, 0.6, every, skip=HEAD, sequential=False)
    magnitude = bert().eval()
    prune.magnitude(magnitude, 0.6, skip=HEAD)

    @torch.no_grad()
    def error(other):
        pairs = [(dense.bert(*batch), other.bert(*batch)) for batch in every]
        return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))

    assert error(model) < error(magnitude)
    deep = "bert.encoder.layer.2.output.dense.weight"
    assert not torch.equal(once.get_parameter(deep), model.get_parameter(deep))


def test_one_blocks_hessians_live_at_a_time(monkeypatch):
    alive, most = [], []

    class Counted(calibrated.Hessians):
        def __init__(self, weight):
            super().__init__(weight)
            alive.append(1)
            most.append(len(alive))

        def __del__(self):
            alive.pop()

    monkeypatch.setattr(calibrated, "Hessians", Counted)
    told = []
    prune.sparsegpt(bert(), 0.5, sentences(), progress=lambda *a: told.append(a))
    assert max(most) == 6 and not alive  # query, key, value, output, up, down
    assert told == [*((i, 4, f"bert.encoder.layer.{i}") for i in range(3)), (3, 4, "classifier")]


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_stay_lie_on_the_grid(bits):
    joint, after = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = nn.Linear(64, 8)
        x, before, apart = correlated(300, 64), layer.weight.detach().clone(), copy.deepcopy(layer)
        spec = QuantSpec(bits=bits, granularity="per_channel")
        table = prune.sparsegpt(layer, 0.5, [x], pattern="2:4", quantize=spec)
        prune.sparsegpt(apart, 0.5, [x], pattern="2:4")
        scale = table.scales["weight"]
        torch.testing.assert_close(scale, apart.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))
        codes = layer.weight / scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.abs().max() <= 2 ** (bits - 1) and int((layer.weight == 0).sum()) >= 256
        nearest = (apart.weight / scale).round() * scale
        with torch.no_grad():
            for errors, weight in ((joint, layer.weight), (after, nearest)):
                errors.append(float(F.linear(x, weight - before).norm()))
    assert sum(joint) < sum(after) * (1.01 if bits == 8 else 0.98)


@pytest.mark.parametrize("kind", ["row", "layer"])
def test_columns_that_no_input_uses_are_dropped_first(kind):
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    x = torch.randn(50, 16)
    x[:, 5] = 0
    prune.sparsegpt(layer, 0.25, [x], pattern=kind)
    assert bool((layer.weight[:, 5] == 0).all()) and bool((~kept_of(layer)[:, 5]).all())


# ---- refusals --------------------------------------------------------------------------------------------------------


METHODS = [prune.wanda, prune.sparsegpt]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least one batch, got none"),
        (torch.randn(4, 8), TypeError, "an iterable of batches, got one Tensor"),
        ([torch.full((4, 8), math.nan)], ValueError, "layer '0': expected finite inputs, got NaN or Inf"),
    ],
)
def test_bad_batches(method, batches, error, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = state_of(model)
    with pytest.raises(error, match=f"{method.__name__}: {'expected ' if 'layer' not in message else ''}.*{message}"):
        method(model, 0.5, batches)
    assert_same(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_in_the_last_block_leaves_the_first_as_it_was(method):
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[2].attention.output.LayerNorm.weight.fill_(math.inf)  # no weight that is pruned
    before = state_of(model)
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.layer.2.*': expected finite inputs"):
        method(model, 0.5, sentences(), skip=HEAD)
    assert_same(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_no_batch_reaches_are_named(method):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"every layer to be called by a batch, got none for 'expert' \(skip="):
        method(model, 0.5, [torch.randn(4, 8)])
    assert_same(model, before)
    assert len(method(model, 0.5, [torch.randn(4, 8)], skip=["expert"]).rows) == 1


def test_a_hessian_without_a_factor_names_its_layer(monkeypatch):
    def fails(weight, *args, **kwargs):
        if weight.shape[0] == 4:
            raise ValueError("sparsegpt_prune: expected a Hessian that damping makes positive definite, got none")
        return oracle.sparsegpt(weight, *args, kwargs["sparsity"])[0].float(), oracle.pack(torch.ones_like(weight))

    monkeypatch.setattr(calibrated, "sparsegpt_prune", fails)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = state_of(model)
    with pytest.raises(
        ValueError, match="sparsegpt: layer '2': expected a Hessian that damping makes positive definite"
    ):
        prune.sparsegpt(model, 0.5, [torch.randn(64, 8)])
    assert_same(model, before)


def test_damping_that_is_not_above_zero():
    model = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="sparsegpt: layer '': expected damping above 0, got 0"):
        prune.sparsegpt(model, 0.5, [torch.randn(64, 8)], damping=0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sparsity=1.0), r"sparsity in \[0, 1\)"),
        (dict(sparsity=0.5, pattern="block"), "'row' or 'n:m' such as '2:4', got 'block'"),
        (dict(sparsity=0.5, pattern="2:4"), "a multiple of 4 for '2:4', got 6 in '1.weight'"),
        (dict(sparsity=0.5, layers=["7"]), "every pattern of layers to name a layer"),
        (dict(sparsity=0.5, sequential=True), "expected blocks .* with sequential=True, got none"),
    ],
)
def test_bad_arguments(method, arguments, message):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{method.__name__}: .*{message}"):
        method(model, batches=[torch.randn(4, 8)], **arguments)
    assert_same(model, before)


def test_blocks_that_are_no_chain():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            return self.blocks[0](x) + self.blocks[1](x)

    model = Branches()
    with pytest.raises(ValueError, match="wanda: expected blocks that run one after the other"):
        prune.wanda(model, 0.5, [torch.randn(4, 8)], sequential=True)
    assert len(prune.wanda(model, 0.5, [torch.randn(4, 8)]).rows) == 2


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("int8", TypeError, "quantize to be a QuantSpec, got str"),
        (
            QuantSpec(symmetric=False, granularity="per_channel"),
            ValueError,
            "one scale per row, got affine per_channel",
        ),
        (QuantSpec(granularity="per_tensor"), ValueError, "one scale per row, got symmetric per_tensor"),
    ],
)
def test_bad_grids(spec, error, message):
    with pytest.raises(error, match=f"sparsegpt: expected {message}|sparsegpt: expected quantize.*{message}"):
        prune.sparsegpt(nn.Linear(8, 4), 0.5, [torch.randn(4, 8)], quantize=spec)


def test_layers_whose_columns_are_no_inputs():
    with pytest.raises(
        ValueError, match=r"wanda: expected a linear layer or a convolution.* got '' \(ConvTranspose2d\)"
    ):
        prune.wanda(nn.ConvTranspose2d(3, 4, 2), 0.5, [torch.randn(1, 3, 4, 4)])


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_as_on_the_cpu(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    other, x = copy.deepcopy(model).cuda(), torch.randn(256, 64)
    method(model, 0.5, [x])
    method(other, 0.5, [x.cuda()])
    for name in prune.masks_of(model):
        assert (kept_of(model, name) == kept_of(other, name).cpu()).float().mean() > 0.99
