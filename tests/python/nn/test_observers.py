"""Observers against sorted and searched ranges, and FakeQuantize's life: observe, freeze, learn, load."""

import copy
import math
import pickle

import pytest
import torch

import quantrain
import quantrain.nn as qnn
from quantrain import QuantSpec
from quantrain.nn import FakeQuantize

SHAPES = [  # (tensor shape, scale shape, how a block is cut out of the tensor by its scale index)
    ((6, 10), (1,), lambda x, i: x),
    ((6, 10), (6, 1), lambda x, i: x[i]),
    ((6, 10), (6, 2), lambda x, i: x[i // 2, 5 * (i % 2) : 5 * (i % 2) + 5]),
    ((4, 3, 2, 2), (4, 1, 1, 1), lambda x, i: x[i]),
    ((4, 6), (2, 3), lambda x, i: x[2 * (i // 3) : 2 * (i // 3) + 2, 2 * (i % 3) : 2 * (i % 3) + 2]),
]
KINDS = ["min_max", "moving_average", "percentile", "mse"]


def spec(observer, **fields):
    return QuantSpec(observer=observer, **fields)


@pytest.mark.parametrize("shape, scale_shape, block", SHAPES)
def test_min_max_is_the_extreme_of_all_batches(shape, scale_shape, block):
    torch.manual_seed(0)
    observer = qnn.MinMaxObserver(scale_shape)
    batches = [torch.randn(shape) * k for k in (1, 3, 2)]
    for batch in batches:
        observer(batch)
    for i in range(math.prod(scale_shape)):
        seen = torch.cat([block(batch, i).flatten() for batch in batches])
        assert observer.min_val.flatten()[i] == seen.min()
        assert observer.max_val.flatten()[i] == seen.max()


def test_moving_average_starts_at_the_first_batch():
    observer = qnn.MovingAverageMinMaxObserver(averaging_constant=0.25)
    observer(torch.tensor([-1.0, 4.0]))
    assert (observer.min_val, observer.max_val) == (torch.tensor([-1.0]), torch.tensor([4.0]))
    observer(torch.tensor([-3.0, 8.0]))
    assert (observer.min_val, observer.max_val) == (torch.tensor([-1.5]), torch.tensor([5.0]))


@pytest.mark.parametrize("shape, scale_shape, block", SHAPES)
@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 100.0])
def test_percentile_is_the_nearest_rank_of_the_sorted_block(shape, scale_shape, block, percentile):
    torch.manual_seed(1)
    observer, x = qnn.PercentileObserver(scale_shape, percentile=percentile), torch.randn(shape)
    observer(x)
    for i in range(math.prod(scale_shape)):
        ordered = block(x, i).flatten().sort().values
        n = len(ordered)
        k = min(max(math.ceil(percentile / 100.0 * n), 1), n)
        assert observer.max_val.flatten()[i] == ordered[k - 1]
        assert observer.min_val.flatten()[i] == ordered[n - k]


def test_percentile_takes_more_elements_than_torch_quantile():
    n = (1 << 24) + 5
    x = torch.arange(n, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.99)
    observer = qnn.PercentileObserver(percentile=99.0)
    observer(x)
    k = math.ceil(99.0 / 100.0 * n)
    assert observer.max_val.item() == x[k - 1].item()
    assert observer.min_val.item() == x[n - k].item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape, scale_shape, block", SHAPES)
def test_mse_range_has_the_least_error_of_all_ratios(shape, scale_shape, block, symmetric):
    torch.manual_seed(2)
    limits = {"quant_min": -8 if symmetric else 0, "quant_max": 7 if symmetric else 15, "symmetric": symmetric}
    observer, x = qnn.MSEObserver(scale_shape, **limits), torch.randn(shape) ** 3
    observer(x)

    def error(values, low, high):
        if symmetric:
            scale, zero = max(abs(low), abs(high)) / 7, 0
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / 15
            zero = min(max(-round(low / scale), 0), 15)
        codes = (torch.round(values / scale) + zero).clamp(limits["quant_min"], limits["quant_max"])
        return float(((codes - zero) * scale - values).square().sum())

    for i in range(math.prod(scale_shape)):
        values = block(x, i).double().flatten()
        low, high = values.min().item(), values.max().item()
        best = min(error(values, low * r / 80, high * r / 80) for r in range(1, 81))
        got = error(values, observer.min_val.flatten()[i].item(), observer.max_val.flatten()[i].item())
        assert got <= best * 1.001 + 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_batch_raises_naming_the_observer_and_changes_nothing(kind, bad):
    observer = qnn.make_observer(spec(kind), (1,), name="layer1.conv.input_fake_quant.observer")
    observer(torch.tensor([-1.0, 1.0, 0.5]))
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(ValueError, match=r"Observer 'layer1.conv.input_fake_quant.observer': expected a finite batch"):
        observer(torch.tensor([5.0, bad, -9.0]))
    assert all(torch.equal(before[key], value) for key, value in observer.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_skip_leaves_out_the_blocks_that_are_not_finite(kind, bad):
    observer = qnn.make_observer(spec(kind, nan_policy="skip"), (2, 1))
    observer(torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    before = observer.max_val.clone()
    observer(torch.tensor([[-3.0, bad], [-3.0, 3.0]]))
    assert torch.equal(observer.max_val[0], before[0])
    assert observer.max_val[1] > before[1]
    assert observer.min_val.isfinite().all() and observer.max_val.isfinite().all()


def test_a_range_without_any_finite_batch_gives_no_scale():
    for symmetric in (True, False):
        observer = qnn.MinMaxObserver(nan_policy="skip", symmetric=symmetric)
        observer(torch.tensor([math.nan]))
        assert observer.calculate_qparams()[0].isnan().all()


def test_empty_batches_and_reset():
    observer = qnn.MinMaxObserver()
    observer(torch.empty(0, 3))
    assert observer.min_val.item() == math.inf
    observer(torch.tensor([1.0]))
    observer.reset()
    assert (observer.min_val.item(), observer.max_val.item()) == (math.inf, -math.inf)


def test_qparams_formula():
    observer = qnn.MinMaxObserver(quant_min=0, quant_max=255, symmetric=False)
    observer(torch.tensor([-1.0, 3.0]))
    scale, zero_point = observer.calculate_qparams()
    assert scale.item() == torch.tensor(4.0).div(255).item()
    assert (zero_point.item(), zero_point.dtype) == (64, torch.int32)
    observer = qnn.MinMaxObserver(quant_min=-8, quant_max=7)
    observer(torch.tensor([-1.0, 0.5]))
    assert observer.calculate_qparams()[0].item() == torch.tensor(1.0).div(7).item()
    observer = qnn.MinMaxObserver((2, 1))
    observer(torch.tensor([[0.0, 0.0], [127.0, 0.0]]))
    assert observer.calculate_qparams()[0].flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_input_and_module_keep_a_float32_range(kind, dtype):
    observer = qnn.make_observer(spec(kind), (1,)).to(dtype)
    observer(torch.tensor([-2.0, 1.0], dtype=dtype))
    assert observer.min_val.dtype == torch.float32
    assert observer.min_val.item() == pytest.approx(-2.0, rel=0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: qnn.MinMaxObserver(nan_policy="ignore"),
        lambda: qnn.MovingAverageMinMaxObserver(averaging_constant=0.0),
        lambda: qnn.PercentileObserver(percentile=50.0),
        lambda: qnn.make_observer(QuantSpec(), (1,)) and QuantSpec(observer="entropy"),
    ],
)
def test_bad_arguments_raise(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_dynamic_has_no_observer():
    assert qnn.make_observer(spec("dynamic"), (1,)) is None


def test_fake_quantize_observes_in_training_only():
    fq = FakeQuantize(spec("moving_average", symmetric=False, averaging_constant=1.0))
    fq(torch.tensor([-1.0, 1.0]))
    scale = fq.scale.clone()
    fq.eval()
    fq(torch.tensor([-100.0, 100.0]))
    assert torch.equal(fq.scale, scale)
    fq.train()
    fq.enable_observer(False)
    fq(torch.tensor([-100.0, 100.0]))
    assert torch.equal(fq.scale, scale)
    fq.enable_observer(True)
    fq(torch.tensor([-100.0, 100.0]))
    assert fq.scale.item() == pytest.approx(200 / 255)


def test_fake_quantize_equals_the_op_with_its_qparams():
    x = torch.randn(64)
    fq = FakeQuantize(spec("min_max", bits=4, symmetric=False))
    y = fq(x)
    scale, zero_point = fq.calculate_qparams()
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, scale[0], zero_point[0], 0, 15))
    fq.enable_fake_quant(False)
    assert fq(x) is x


@pytest.mark.parametrize("learnable", [False, True])
def test_without_a_scale_fake_quantize_raises(learnable):
    fq = FakeQuantize(spec("min_max", learnable=learnable), name="fc.input_fake_quant").eval()
    with pytest.raises(
        ValueError, match="'fc.input_fake_quant': expected a scale that was observed or loaded, got none"
    ):
        fq(torch.ones(3))
    with pytest.raises(ValueError, match="expected a tensor"):
        FakeQuantize(spec("dynamic")).calculate_qparams()


def test_a_loaded_scale_counts_and_an_unset_one_does_not():
    trained = FakeQuantize(spec("min_max", symmetric=False))
    unset = copy.deepcopy(trained.state_dict())
    x = torch.randn(10)
    y = trained(x)
    fresh = FakeQuantize(spec("min_max", symmetric=False)).eval()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), y)
    fresh.load_state_dict(unset)
    assert not fresh.ready
    with torch.no_grad():  # a scale written past load_state_dict, as distributed checkpoints do
        fresh.scale.copy_(trained.scale)
        fresh.zero_point.copy_(trained.zero_point)
    assert torch.equal(fresh(x), y)


def test_a_learned_scale_is_set_once_then_trained():
    fq = FakeQuantize(spec("min_max", bits=4, learnable=True))
    assert isinstance(fq.scale, torch.nn.Parameter)
    x = torch.randn(32)
    fq(x).sum().backward()
    first = fq.scale.detach().clone()
    assert first.item() == pytest.approx(x.abs().max().item() / 7)
    assert fq.scale.grad is not None
    fq(10 * x)
    assert torch.equal(fq.scale.detach(), first)


def test_calibration_shows_a_learned_scale_every_batch():
    layer = qnn.QuantLinear(2, 1, recipe=quantrain.Recipe(input=spec("min_max", bits=4, learnable=True)))
    qnn.calibrate(layer, [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 14.0]])])
    assert layer.input_fake_quant.scale.item() == 2.0


def test_the_lsq_gradient_carries_its_factor():
    x, fq = torch.tensor([-9.0, 0.3, 0.7, 9.0]), FakeQuantize(spec("min_max", bits=4, learnable=True))
    with torch.no_grad():
        fq.scale.fill_(0.5)
    fq.enable_observer(False)
    fq(x).sum().backward()
    per_element = [-8.0, 1 - 0.6, 1 - 1.4, 7.0]
    assert fq.scale.grad.item() == pytest.approx(sum(per_element) / math.sqrt(4 * 7), rel=1e-5)


def test_a_learned_scale_below_zero_is_pulled_back_and_keeps_its_gradient():
    fq = FakeQuantize(spec("min_max", learnable=True))
    fq(torch.randn(8))
    with torch.no_grad():
        fq.scale.fill_(-0.5)
    reloaded = FakeQuantize(spec("min_max", learnable=True)).eval()
    reloaded.load_state_dict(fq.state_dict())
    assert reloaded(torch.ones(2)).isfinite().all()
    fq(torch.ones(8)).sum().backward()
    assert fq.scale.item() == pytest.approx(1e-8)
    assert fq.scale.grad.item() > 0


def test_dynamic_passes_nan_and_keeps_nothing():
    fq = FakeQuantize(spec("dynamic", granularity="per_token"))
    y = fq(torch.tensor([[1.0, math.nan], [1.0, 2.0]]))
    assert y[0].isnan().all() and y[1].isfinite().all()
    assert not fq.state_dict()


@pytest.mark.parametrize("observer", KINDS)
@pytest.mark.parametrize("learnable", [False, True])
def test_fake_quantize_copies_pickles_and_casts(observer, learnable):
    fq = FakeQuantize(spec(observer, bits=6, symmetric=False, learnable=learnable))
    x = torch.randn(50)
    fq(x)
    fq.eval()
    y = fq(x)
    for twin in (copy.deepcopy(fq), pickle.loads(pickle.dumps(fq)), fq.frozen()):
        assert torch.equal(twin(x), y)
    assert fq.frozen().observer is None
    assert set(fq.frozen().state_dict()) == {"scale", "zero_point"}
    half = copy.deepcopy(fq)
    scale = half.scale
    half.to(torch.bfloat16)
    assert not learnable or half.scale is scale
    assert half.scale.dtype == torch.float32 and torch.equal(half.scale, fq.scale)
    assert isinstance(half.scale, torch.nn.Parameter) == learnable
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_calibration_restores_and_survives_an_error():
    model = qnn.QuantLinear(4, 2, recipe="qat-w8a8")
    with pytest.raises(ValueError, match="input_fake_quant.observer': expected a finite batch"):
        quantrain.nn.calibrate(model, [torch.full((2, 4), math.nan)])
    fq = model.input_fake_quant
    assert (model.training, fq.observer_enabled, fq.fake_quant_enabled, fq.calibrating) == (True, True, True, False)
    qnn.calibrate(model, [torch.randn(2, 4)])  # the range goes on following training
    assert (model.training, fq.observer_enabled, fq.fake_quant_enabled, fq.calibrating) == (True, True, True, False)
    with pytest.raises(ValueError, match="at least one batch"):
        qnn.calibrate(model, [])
    with pytest.raises(ValueError, match="prepared model"):
        qnn.calibrate(torch.nn.Linear(2, 2), [torch.randn(2, 2)])


def test_calibration_sees_the_float_activations():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    x = torch.randn(8, 4)
    expected = model[0](x).max()
    quantrain.prepare(model, "qat-w8a8", overrides={"0": {"weight": {"bits": 2}}})
    qnn.calibrate(model, [x])
    assert torch.equal(model[1].input_fake_quant.observer.max_val[0], expected)


def test_calibrate_takes_tuples_mappings_and_a_forward():
    model = qnn.QuantLinear(4, 2, recipe="ptq-w8a8")
    x = torch.rand(8, 4)
    for batch, forward in [((x,), None), ([x], None), ({"input": x}, None), ((x, "label"), lambda m, b: m(b[0]))]:
        fresh = copy.deepcopy(model)
        qnn.calibrate(fresh, [batch, batch], forward=forward, max_batches=1)
        assert fresh.input_fake_quant.ready
