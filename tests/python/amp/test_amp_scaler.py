"""GradScaler against torch.amp.GradScaler and PyTorch's own clipping, and quantized layers under it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import quantrain
from quantrain.amp import GradScaler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}


def make_model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)).to(device)


def train(scaler, optimizer_name, steps, device, dtype, bad_steps=(), clip=None):
    """Losses' scale after each step, which steps were made, and the trained parameters."""
    model = make_model(device)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    generator = torch.Generator().manual_seed(1)
    scales, moved = [], []
    for step in range(steps):
        x = torch.randn(16, 12, generator=generator).to(device)
        y = torch.randint(0, 4, (16,), generator=generator).to(device)
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        if step in bad_steps:
            loss = loss * (math.inf if step % 2 else math.nan)
        scaler.scale(loss).backward()
        if clip == "torch":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        elif clip == "fused":
            scaler.clip_grad_norm_(optimizer, 0.1)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, model[0].weight))
    return scales, moved, [parameter.detach() for parameter in model.parameters()]


BAD_STEPS = (3, 4, 57, 58, 59, 130, 131, 300, 301, 302, 303, 488)
SCALER = {"init_scale": 2.0**15, "growth_interval": 25, "growth_factor": 2.0, "backoff_factor": 0.5}


@pytest.mark.parametrize("clip", [None, "torch"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "AdamW fused"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        ("cpu", torch.float16),
        pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    ],
)
def test_500_steps_equal_pytorch_bit_for_bit(device, dtype, optimizer, clip):
    ours = train(GradScaler(device, **SCALER), optimizer, 500, device, dtype, BAD_STEPS, clip)
    theirs = train(torch.amp.GradScaler(device, **SCALER), optimizer, 500, device, dtype, BAD_STEPS, clip)
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1] and not any(ours[1][step] for step in BAD_STEPS) and sum(ours[1]) >= 480
    assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_optimizer_equals_pytorch(device, optimizer):
    arguments = (optimizer, 20, device, torch.bfloat16, (2, 9))
    ours = train(GradScaler(device, **SCALER), *arguments)
    theirs = train(torch.amp.GradScaler(device, **SCALER), *arguments)
    assert ours[0] == theirs[0] and ours[1] == theirs[1]
    assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("device", DEVICES)
def test_fused_clipping_is_unscale_and_clip(device, optimizer):
    arguments = (optimizer, 40, device, torch.bfloat16, (2, 9))
    ours = train(GradScaler(device, **SCALER), *arguments, clip="fused")
    theirs = train(torch.amp.GradScaler(device, **SCALER), *arguments, clip="torch")
    assert ours[0] == theirs[0] and ours[1] == theirs[1]
    for a, b in zip(ours[2], theirs[2], strict=True):  # the norm is summed in another order
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_one_fused_clip_of_one_step_equals_pytorch(device):
    results = []
    for scaler, fused in ((GradScaler(device), True), (torch.amp.GradScaler(device), False)):
        model = make_model(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(torch.ones(3, 12, device=device)).square().sum() * 100).backward()
        if fused:
            norm = scaler.clip_grad_norm_(optimizer, 1.0)
        else:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        results.append((float(norm), [parameter.grad.clone() for parameter in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6) and results[0][0] > 1.0
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_an_optimizer_that_takes_the_scale_clips_itself(device):
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = GradScaler(device, init_scale=1024.0)
    scaler.scale(model(torch.ones(3, 12, device=device)).sum()).backward()
    scaled = [parameter.grad.clone() for parameter in model.parameters()]
    norm = scaler.clip_grad_norm_(optimizer, 1e-3)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), scaled, strict=True))
    scaler.step(optimizer)
    coefficient = 1e-3 / (float(norm) + 1e-6)
    for parameter, grad in zip(model.parameters(), scaled, strict=True):  # Adam's first average is 0.1 g
        average = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(average, 0.1 * coefficient * grad / 1024.0, rtol=1e-5, atol=1e-9)


# ---- the state machine ------------------------------------------------------------------------------------------------------


def backward(scaler, model, bad=False):
    loss = model(torch.ones(2, 12, device=next(model.parameters()).device)).sum()
    scaler.scale(loss * math.inf if bad else loss).backward()


def test_wrong_order_of_calls():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu")
    for call in (lambda: scaler.unscale_(optimizer), lambda: scaler.step(optimizer), scaler.update):
        with pytest.raises(RuntimeError, match=r"expected scale\(loss\) to be called before"):
            call()
    backward(scaler, model)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_: expected one call .* got a second"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="clip_grad_norm_: expected gradients that are still scaled"):
        scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step: expected update\(\) between two steps"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_: expected update\(\) between two steps"):
        scaler.unscale_(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="update: expected a step"):
        scaler.update()


def test_an_optimizer_without_gradients():
    for fused in (False, True):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match="expected an optimizer with gradients, got none"):
            scaler.step(optimizer)


def test_bad_gradients_change_nothing():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight, other], lr=0.1)
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    weight.grad, other.grad = torch.full((3,), 5.0), torch.ones(3, dtype=torch.float16)
    with pytest.raises(ValueError, match="got float16.*MasterWeights"):
        scaler.unscale_(optimizer)
    assert torch.equal(weight.grad, torch.full((3,), 5.0))
    complex_weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    complex_weight.grad = torch.ones_like(complex_weight)
    with pytest.raises(TypeError, match="floating-point gradients, got ComplexFloat"):
        GradScaler.unscale_(scaler, torch.optim.SGD([complex_weight], lr=0.1))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_and_float32_gradients_are_unscaled_together(device):
    weights = [nn.Parameter(torch.ones(300, device=device, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    scaler = GradScaler(device, init_scale=8.0)
    scaler.scale(sum(weight.float().sum() for weight in weights)).backward()
    weights[0].grad[7] = math.nan
    optimizer = torch.optim.SGD(weights, lr=0.1)
    scaler.unscale_(optimizer)
    assert torch.equal(weights[1].grad, torch.ones_like(weights[1])) and float(weights[0].grad[0]) == 1.0
    scaler.step(optimizer)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in weights)
    scaler.update()
    assert scaler.get_scale() == 4.0


@pytest.mark.cuda
def test_gradients_on_two_devices_are_refused():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="cuda"))
    a.grad, b.grad = torch.ones(3), torch.ones(3, device="cuda")
    scaler = GradScaler()
    scaler.scale(torch.ones((), device="cuda"))
    with pytest.raises(TypeError, match="every gradient on cuda:0.*got one on cpu"):
        scaler.unscale_(torch.optim.SGD([a, b], lr=0.1))


def test_closures_are_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu")
    backward(scaler, model)
    for arguments, keywords in (((lambda: 0.0,), {}), ((), {"closure": lambda: 0.0})):
        with pytest.raises(RuntimeError, match="expected no closure"):
            scaler.step(optimizer, *arguments, **keywords)
    assert GradScaler("cpu", enabled=False).step(optimizer, lambda: torch.tensor(3.0)) == 3.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"init_scale": 0.0},
        {"init_scale": math.inf},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
    ],
)
def test_numbers_outside_their_range(arguments):
    with pytest.raises(ValueError, match=f"GradScaler: expected .*{next(iter(arguments))}"):
        GradScaler("cpu", **arguments)


def test_a_scale_that_runs_out_says_so():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=1e-38, backoff_factor=1e-5)
    with pytest.raises(RuntimeError, match="expected a positive, finite scale, got 0.*overflow_report"):
        for _ in range(10):
            optimizer.zero_grad()
            backward(scaler, model, bad=True)
            scaler.step(optimizer)
            scaler.update()
    report = scaler.overflow_report(model)
    assert report.rows[0]["name"] == "4.bias"


def test_update_with_a_given_scale():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu")
    backward(scaler, model)
    scaler.step(optimizer)
    scaler.update(128.0)
    assert scaler.get_scale() == 128.0
    given = torch.tensor([32.0])
    scaler.update(given)
    given.fill_(5.0)
    assert scaler.get_scale() == 32.0
    for bad, error in (
        (0.0, ValueError),
        (math.nan, ValueError),
        (torch.ones(2), ValueError),
        (torch.ones(1).int(), TypeError),
    ):
        with pytest.raises(error, match="GradScaler.update: expected"):
            scaler.update(bad)
    assert scaler.get_scale() == 32.0


def test_several_optimizers_share_the_scale():
    model = make_model()
    first, second = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[4].parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=16.0)
    backward(scaler, model)
    model[4].bias.grad[0] = math.nan
    before = [parameter.clone() for parameter in model.parameters()]
    scaler.step(first)
    scaler.step(second)
    scaler.update()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False, False, False]
    assert scaler.get_scale() == 8.0


def test_scale_takes_lists_and_keeps_types():
    scaler = GradScaler("cpu", init_scale=4.0)
    half = scaler.scale(torch.ones(2, dtype=torch.float16))
    assert half.dtype == torch.float16 and torch.equal(half, torch.full((2,), 4.0, dtype=torch.float16))
    a, (b, c) = scaler.scale([torch.ones(()), (torch.ones(2), torch.ones(3))])
    assert (float(a), b.tolist(), c.tolist()) == (4.0, [4.0, 4.0], [4.0, 4.0, 4.0])
    assert [float(x) for x in scaler.scale(torch.ones(()) for _ in range(2))] == [4.0, 4.0]
    with pytest.raises(TypeError, match="expected a tensor or an iterable of tensors, got float"):
        scaler.scale(1.0)


def test_not_enabled_passes_everything_through():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", enabled=False, init_scale=-1.0)
    loss = model(torch.ones(2, 12)).sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    expected = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    norm = scaler.clip_grad_norm_(optimizer, 0.5)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    clipped = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert float(clipped) == pytest.approx(0.5, rel=1e-4)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.get_scale(), scaler.state_dict(), scaler.is_enabled()) == (1.0, {}, False)


def test_states_move_to_pytorch_and_back():
    ours, theirs = GradScaler("cpu", **SCALER), torch.amp.GradScaler("cpu", **SCALER)
    for scaler in (ours, theirs):
        train(scaler, "SGD", 30, "cpu", torch.bfloat16, (3,))
    assert ours.state_dict() == theirs.state_dict()
    fresh, fresh_torch = GradScaler("cpu"), torch.amp.GradScaler("cpu")
    fresh.load_state_dict(theirs.state_dict())
    fresh_torch.load_state_dict(ours.state_dict())
    continued = [train(scaler, "SGD", 60, "cpu", torch.bfloat16, (7,)) for scaler in (fresh, fresh_torch)]
    assert continued[0][0] == continued[1][0]
    with pytest.raises(RuntimeError, match="got an empty one"):
        fresh.load_state_dict({})
    with pytest.raises(ValueError, match="expected the key _growth_tracker"):
        fresh.load_state_dict({key: value for key, value in theirs.state_dict().items() if key != "_growth_tracker"})


def test_pickle_and_copy():
    scaler = GradScaler("cpu", **SCALER)
    train(scaler, "SGD", 30, "cpu", torch.bfloat16, (3,))
    for twin in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert twin.state_dict() == scaler.state_dict()
    model = make_model()
    backward(scaler, model)
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="after update"):
        pickle.dumps(scaler)


def test_sparse_gradients_are_coalesced():
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    for clip in (False, True):
        optimizer.zero_grad()
        scaler = GradScaler("cpu", init_scale=8.0)
        scaler.scale(table(torch.tensor([1, 1, 3])).sum()).backward()
        norm = scaler.clip_grad_norm_(optimizer, 1e9) if clip else scaler.unscale_(optimizer)
        grad = table.weight.grad
        assert (
            grad.is_coalesced()
            and grad.to_dense()[1].tolist() == [2.0] * 4
            and grad.to_dense()[3].tolist() == [1.0] * 4
        )
        if clip:
            assert float(norm) == pytest.approx(math.sqrt(20))
        scaler.step(optimizer)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_overflow_report_names_parameters(device, fused):
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = GradScaler(device)
    for step in range(6):
        optimizer.zero_grad()
        backward(scaler, model)
        if step in (2, 4):
            model[2].weight.grad[0, 0] = math.inf
            model[0].bias.grad[0] = math.nan
        if step == 4:
            model[4].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    rows = scaler.overflow_report(model).rows
    assert rows == [
        {"name": "2.weight", "count": 2, "first_step": 2},
        {"name": "0.bias", "count": 2, "first_step": 2},
        {"name": "4.weight", "count": 1, "first_step": 4},
    ]
    assert "2.weight" in str(scaler.overflow_report(model))


def test_capturable_wants_an_optimizer_that_takes_the_scale():
    model = make_model()
    scaler = GradScaler("cpu", capturable=True)
    backward(scaler, model)
    with pytest.raises(RuntimeError, match="expected an optimizer that takes the scale in capturable mode"):
        scaler.step(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.cuda
def test_capturable_step_is_a_cuda_graph_without_synchronization():
    model, twin = make_model("cuda"), make_model("cuda")
    x = torch.ones(4, 12, device="cuda")
    results = []
    for net, captured in ((model, True), (twin, False)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True, capturable=True)
        scaler = GradScaler(capturable=captured, init_scale=2.0**10, growth_interval=3)
        factor = torch.ones((), device="cuda")

        def step(net=net, optimizer=optimizer, scaler=scaler, factor=factor):
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.float16, cache_enabled=False):
                loss = net(x).float().square().mean()
            scaler.scale(loss * factor).backward()
            scaler.clip_grad_norm_(optimizer, 0.5)
            scaler.step(optimizer)
            scaler.update()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.graph(graph):
                step()
            torch.cuda.set_sync_debug_mode("default")
            step = graph.replay
        scales = []
        for index in range(12):
            factor.fill_(math.inf if index in (4, 5) else 1.0)
            step()
            scales.append(scaler.get_scale())
        results.append((scales, [parameter.detach().clone() for parameter in net.parameters()]))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) > 2
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)


# ---- autocast and quantized layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_quant_ops_keep_their_input_type_under_autocast(dtype):
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype):
        for value in (x, x.to(dtype)):
            scale, zero_point = quantrain.choose_qparams(value, [4, 1])
            assert scale.dtype == torch.float32
            assert quantrain.fake_quantize(value, scale).dtype == value.dtype
            assert quantrain.fake_quantize_learnable(value, scale).dtype == value.dtype
            assert quantrain.fake_quantize_dynamic(value, [4, 1]).dtype == value.dtype
            codes = quantrain.quantize(value, scale)
            assert codes.dtype == torch.int8
            assert quantrain.dequantize(codes, scale).dtype == torch.float32


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_power_of_two_loss_scale_leaves_quantized_gradients_bit_identical(device, recipe):
    grads = []
    for init_scale in (1.0, 2.0**12):
        model = quantrain.prepare(make_model(device), quantrain.Recipe.from_name(recipe))
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(4)).to(device)
        quantrain.calibrate(model, [x])
        model.train()
        scaler = GradScaler(device, init_scale=init_scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(x).square().sum()).backward()
        scaler.unscale_(optimizer)
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) >= 6
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
