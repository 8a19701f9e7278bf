"""Pruning while a model trains: schedules, renewed masks, and optimizers that leave what is pruned at zero."""

import copy
import math
import sys

import pytest
import torch
from reference import pruning as oracle
from torch import nn

import quantrain.nn as qnn
import quantrain.prune as prune
from quantrain.optim import AdamW8bit
from quantrain.pruning import unpack_mask

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adamw8bit": lambda p: AdamW8bit(p, lr=1e-2, min_8bit_size=0),
    "adamw8bit-32": lambda p: AdamW8bit(p, lr=1e-2, bits=32),
}
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def train(model, optimizer, steps, after=lambda: None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        after()
        optimizer.zero_grad()


def bits_of(model):
    return {name: mask.clone() for name, mask in prune.masks_of(model).items()}


def dropped(model, name):
    return ~unpack_mask(prune.masks_of(model)[name], model.get_parameter(name).shape)


def assert_pruned(model, optimizer, masks):
    for name, mask in prune.masks_of(model).items():
        assert torch.equal(mask, masks[name])
        parameter, gone = model.get_parameter(name), dropped(model, name)
        assert bool((parameter[gone] == 0).all()) and bool((parameter[~gone] != 0).any())
        for key in STATES:
            state = optimizer.state[parameter].get(key)
            if state is not None:
                zero = 127 if state.dtype == torch.uint8 and key == "exp_avg" else 0  # as a code of AdamW8bit
                assert bool((state[gone] == zero).all()), key


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_the_cubic_schedule_is_the_papers():
    schedule = prune.CubicSchedule(0.8, initial=0.2, begin=10, end=110, every=20)
    for step in range(0, 130):
        assert schedule.sparsity_at(step) == pytest.approx(oracle.cubic(step, 0.8, 0.2, 10, 110), abs=1e-12)
    assert [step for step in range(200) if schedule.renews_at(step)] == [10, 30, 50, 70, 90, 110]


def test_the_last_masks_come_at_the_end_though_every_does_not_divide():
    schedule = prune.CubicSchedule(0.5, begin=0, end=25, every=10)
    assert [step for step in range(40) if schedule.renews_at(step)] == [0, 10, 20, 25]
    assert schedule.sparsity_at(25) == 0.5
    assert prune.CubicSchedule(0.5, initial=0.1, begin=5, end=5).sparsity_at(4) == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sparsity=1.0), r"sparsity in \[0, 1\), got 1.0"),
        (dict(sparsity=0.5, initial=0.6), "initial of at most sparsity 0.5, got 0.6"),
        (dict(sparsity=0.5, begin=10, end=5), "0 <= begin <= end, got 10 and 5"),
        (dict(sparsity=0.5, begin=-1), "0 <= begin <= end, got -1 and 1000"),
        (dict(sparsity=0.5, every=0), "every of at least 1, got 0"),
    ],
)
def test_schedules_refuse(arguments, message):
    with pytest.raises(ValueError, match=f"CubicSchedule: expected {message}"):
        prune.CubicSchedule(**arguments)


def test_schedules_want_integers():
    with pytest.raises(TypeError, match="CubicSchedule: expected every to be an integer, got 0.5"):
        prune.CubicSchedule(0.5, every=0.5)
    with pytest.raises(ValueError, match="ConstantSchedule: expected at of at least 0, got -1"):
        prune.ConstantSchedule(0.5, at=-1)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_stay_at_zero(kind):
    model = mlp()
    prune.magnitude(model, 0.5)
    optimizer, masks = OPTIMIZERS[kind](model.parameters()), bits_of(model)
    prune.keep_pruned(optimizer, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 30)
    assert_pruned(model, optimizer, masks)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused", "adamw8bit"])
def test_a_thousand_steps(kind):
    torch.manual_seed(0)
    model = nn.Linear(64, 8, bias=False)
    prune.magnitude(model, 0.5)
    optimizer, masks = OPTIMIZERS[kind](model.parameters()), bits_of(model)
    prune.keep_pruned(optimizer, model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        model.weight.grad = torch.randn(8, 64, generator=generator)
        optimizer.step()
    assert_pruned(model, optimizer, masks)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_stay_at_zero_on_a_gpu(kind):
    model = mlp().cuda()
    prune.magnitude(model, 0.5)
    optimizer, masks = OPTIMIZERS[kind](model.parameters()), bits_of(model)
    prune.keep_pruned(optimizer, model)
    for _ in range(30):
        model(torch.randn(8, 16, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_pruned(model, optimizer, masks)


def test_without_it_momentum_revives_them():
    model = mlp()
    prune.magnitude(model, 0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = prune.keep_pruned(optimizer, model)
    train(model, optimizer, 3)
    handle.remove()
    train(model, optimizer, 1)
    assert bool((model[0].weight[dropped(model, "0.weight")] != 0).any())


def test_adamw8bit_without_the_handle():
    model = mlp()
    prune.magnitude(model, 0.5)
    optimizer = OPTIMIZERS["adamw8bit"](model.parameters())
    handle = prune.keep_pruned(optimizer, model)
    train(model, optimizer, 3)
    assert bool((model[0].weight[dropped(model, "0.weight")] == 0).all())
    handle.remove()
    train(model, optimizer, 1)
    assert bool((model[0].weight[dropped(model, "0.weight")] != 0).any())


@pytest.mark.parametrize("kind", ["sgd", "adamw8bit"])
def test_weights_that_stay_train_as_with_a_masked_gradient(kind):
    model, other = mlp(), mlp()
    for each in (model, other):
        prune.magnitude(each, 0.5)
    first = OPTIMIZERS[kind](model.parameters())
    prune.keep_pruned(first, model)
    second = OPTIMIZERS[kind](other.parameters())
    for name in prune.masks_of(other):
        parameter, gone = other.get_parameter(name), dropped(other, name)
        parameter.register_hook(lambda grad, gone=gone: grad.masked_fill(gone, 0))
    train(model, first, 5)
    train(other, second, 5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0 if kind == "sgd" else 2e-3)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_groups_and_masks_that_come_later_count(kind):
    model = mlp()
    prune.magnitude(model, 0.5, layers=["0"])
    optimizer = OPTIMIZERS[kind](model[0].parameters())
    prune.keep_pruned(optimizer, model)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    prune.magnitude(model, 0.75, layers=["2"])
    train(model, optimizer, 3)
    assert_pruned(model, optimizer, bits_of(model))
    assert int(dropped(model, "2.weight").sum()) == 72
    prune.remove_masks(model)
    train(model, optimizer, 2)
    assert bool((model[2].weight != 0).all())


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw8bit"])
def test_a_state_that_is_loaded_is_cleared_too(kind):
    dense = mlp()
    other = OPTIMIZERS[kind](dense.parameters())
    train(dense, other, 3)
    model = copy.deepcopy(dense)
    prune.magnitude(model, 0.5)
    optimizer = OPTIMIZERS[kind](model.parameters())
    prune.keep_pruned(optimizer, model)
    optimizer.load_state_dict(other.state_dict())
    train(model, optimizer, 1)
    assert_pruned(model, optimizer, bits_of(model))


@pytest.mark.parametrize("kind", ["sgd", "fused", "adamw8bit"])
def test_steps_that_a_scaler_skips(kind):
    model = mlp()
    prune.magnitude(model, 0.5)
    optimizer, masks = OPTIMIZERS[kind](model.parameters()), bits_of(model)
    prune.keep_pruned(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for step in range(6):
        loss = model(torch.randn(8, 16)).square().mean()
        scaler.scale(loss * (math.inf if step == 2 else 1)).backward()
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model[0].weight) == (step == 2)
        for name in masks:
            assert bool((model.get_parameter(name)[dropped(model, name)] == 0).all())


def test_masters_of_a_16_bit_model():
    model = mlp().bfloat16()
    prune.magnitude(model, 0.5)
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-2)
    with pytest.raises(ValueError, match="keep_pruned: expected an optimizer that holds pruned parameters"):
        prune.keep_pruned(optimizer, model)
    prune.keep_pruned(optimizer, model, masters=dict(zip(parameters, masters, strict=True)))
    for _ in range(3):
        model(torch.randn(8, 16, dtype=torch.bfloat16)).square().mean().backward()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
    for name in prune.masks_of(model):
        assert bool((model.get_parameter(name)[dropped(model, name)] == 0).all())


def test_keep_pruned_refuses():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="keep_pruned: expected a model with masks, got none"):
        prune.keep_pruned(optimizer, model)
    prune.magnitude(model, 0.5)
    with pytest.raises(TypeError, match="keep_pruned: expected a torch.optim.Optimizer, got list"):
        prune.keep_pruned([], model)
    with pytest.raises(ValueError, match=r"got none of them \(was one of the two made from a copy\?\)"):
        prune.keep_pruned(optimizer, copy.deepcopy(model))


def test_shards_are_refused(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        mesh = init_device_mesh("cpu", (1,))
        shard = nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh, [Replicate()]))
        masked = mlp()
        prune.magnitude(masked, 0.5)
        for each in (model, masked):
            each[0].weight = shard
        with pytest.raises(ValueError, match="magnitude: expected whole tensors, got a shard in '0.weight'"):
            prune.magnitude(model, 0.5)
        with pytest.raises(ValueError, match="keep_pruned: expected whole tensors, got a shard in '0.weight'"):
            prune.keep_pruned(torch.optim.SGD(masked.parameters(), lr=0.1), masked)
    finally:
        torch.distributed.destroy_process_group()


def test_layers_that_keep_a_rounded_weight_see_the_zeros():
    torch.manual_seed(0)
    model = qnn.prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), "int8-training")
    qnn.enable_weight_cache(model)
    x = torch.randn(4, 16)
    before = model(x)
    prune.magnitude(model, 0.5)
    after = model(x)
    qnn.enable_weight_cache(model, False)
    assert not torch.equal(before, after) and torch.equal(model(x), after)


# ---- the pruner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw8bit"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_grow_by_the_schedule_and_are_fixed_at_its_end(kind, scope):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = prune.CubicSchedule(0.8, begin=2, end=10, every=4)
    pruner = prune.Pruner(model, schedule, optimizer, scope=scope)
    assert all(bool((mask == 255).all()) for mask in prune.masks_of(model).values())
    seen, renewed = [], []
    before = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.bool) for name in prune.masks_of(model)}

    def after():
        renewed.append(pruner.step())
        zeros = {name: dropped(model, name) for name in before}
        assert all(bool((zeros[name] >= gone).all()) for name, gone in before.items())  # monotone
        assert all(bool((model.get_parameter(name)[gone] == 0).all()) for name, gone in zeros.items())
        before.update(zeros)
        seen.append(sum(int(gone.sum()) for gone in zeros.values()))

    train(model, optimizer, 15, after)
    assert [step for step, new in enumerate(renewed, 1) if new] == [2, 6, 10]
    counts = [384, 96] if scope == "layer" else [480]
    of = [sum(round(oracle.cubic(step, 0.8, 0.0, 2, 10) * count) for count in counts) for step in (2, 6, 10)]
    assert seen == [0] + [of[0]] * 4 + [of[1]] * 4 + [of[2]] * 6
    assert pruner.finished and pruner.sparsity == 0.8
    assert_pruned(model, optimizer, bits_of(model))


def test_a_renewal_drops_the_least_of_that_moment():
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruner = prune.Pruner(model, prune.ConstantSchedule(0.5, at=3), optimizer)
    train(model, optimizer, 2, pruner.step)
    train(model, optimizer, 1)
    weights = {name: model.get_parameter(name).detach().clone() for name in prune.masks_of(model)}
    assert pruner.step()
    for name, weight in weights.items():
        assert torch.equal(~dropped(model, name), oracle.mask(weight, 0.5))


def test_pruning_at_once():
    model = mlp()
    pruner = prune.Pruner(model, prune.ConstantSchedule(0.5), pattern="2:4", skip=["2"])
    assert pruner.finished and list(prune.masks_of(model)) == ["0.weight"]
    assert bool((dropped(model, "0.weight").view(-1, 4).sum(1) == 2).all())
    with torch.no_grad():
        model[0].weight.add_(1)  # no optimizer was given
    pruner.step()
    assert bool((model[0].weight[dropped(model, "0.weight")] == 0).all())


def test_weights_that_come_to_zero_by_themselves_do_not_bring_pruned_ones_back():
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, 4, 3, 2, 1, 6, 7, 8]]))
    pruner = prune.Pruner(layer, prune.CubicSchedule(0.5, initial=0.5, begin=1, end=2, every=1))
    pruner.step()
    with torch.no_grad():
        layer.weight[0, 7] = 0  # of equal magnitudes the later goes first
    pruner.step()
    assert dropped(layer, "weight").tolist() == [[False, True, True, True, True, False, False, True]]


def test_wandas_norms_are_measured_at_each_renewal():
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    x = torch.randn(32, 16) * torch.linspace(0.1, 3, 16)
    schedule = prune.ConstantSchedule(0.5, at=3)
    pruner = prune.Pruner(model, schedule, optimizer, score="wanda", batches=[x[:16], x[16:]])
    train(model, optimizer, 2, pruner.step)
    train(model, optimizer, 1)
    expected = copy.deepcopy(model)
    prune.wanda(expected, 0.5, [x])
    assert pruner.step()
    for name, mask in prune.masks_of(expected).items():
        assert torch.equal(prune.masks_of(model)[name], mask)
    assert model.training


def test_regrown_weights_are_those_of_the_largest_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(20, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    schedule = prune.CubicSchedule(0.5, initial=0.5, begin=0, end=2, every=1)
    pruner = prune.Pruner(layer, schedule, optimizer, regrow=0.2)
    first = ~dropped(layer, "weight")
    weight = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(1, 20).masked_fill(first, 0.0)  # what was dropped just now would come back else
    pruner.step()
    now = ~dropped(layer, "weight")
    assert int(now.sum()) == 10 and int((first & ~now).sum()) == 2
    kept = weight[first].abs()
    assert bool((weight[first & ~now].abs() <= kept.sort().values[1]).all())
    gone = layer.weight.grad[~first].abs().sort(descending=True).values
    assert bool((layer.weight.grad[now & ~first].abs() >= gone[1]).all())
    assert bool((layer.weight[now & ~first] == 0).all())
    layer.weight.grad = None
    with pytest.raises(ValueError, match="expected 'weight' to have a gradient to regrow by, got none"):
        pruner.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw8bit"])
def test_a_run_that_is_resumed_comes_to_the_same_masks(kind):
    def parts():
        model = mlp()
        optimizer = OPTIMIZERS[kind](model.parameters())
        return model, optimizer, prune.Pruner(model, prune.CubicSchedule(0.8, begin=0, end=9, every=3), optimizer)

    model, optimizer, pruner = parts()
    train(model, optimizer, 4, pruner.step, seed=1)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, 8, pruner.step, seed=2)
    other = parts()
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    train(other[0], other[1], 8, other[2].step, seed=2)
    assert other[2].finished
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other[0].state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(score="taylor"), "score 'magnitude' or 'wanda', got 'taylor'"),
        (dict(score="wanda"), "batches with score 'wanda', and with no other, got none"),
        (dict(batches=[1]), "got some with score 'magnitude'"),
        (dict(score="wanda", batches=[1], scope="global"), "scope 'layer' with score 'wanda', got 'global'"),
        (dict(pattern="2:4"), "a ConstantSchedule with pattern '2:4', got CubicSchedule"),
        (dict(pattern="rows"), "pattern None, 'row' or 'n:m'"),
        (dict(regrow=1.0), r"regrow in \[0, 1\), got 1.0"),
        (dict(regrow=0.1, score="wanda", batches=[1]), "no regrow with score 'wanda' or an n:m pattern"),
        (dict(layers=["1"]), r"got '1' \(a ReLU, which has no rows and columns\)"),
    ],
)
def test_the_pruner_refuses_and_changes_nothing(arguments, message):
    model = mlp()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"Pruner: expected .*{message}"):
        prune.Pruner(model, prune.CubicSchedule(0.5), **arguments)
    assert list(model.state_dict()) == before


def test_the_pruner_of_another_models_optimizer():
    model = mlp()
    with pytest.raises(ValueError, match="keep_pruned: expected an optimizer that holds"):
        prune.Pruner(model, prune.CubicSchedule(0.5), torch.optim.SGD(mlp().parameters(), lr=0.1))
    assert prune.masks_of(model) == {}
    with pytest.raises(TypeError, match="Pruner: expected a CubicSchedule or a ConstantSchedule, got float"):
        prune.Pruner(model, 0.5)
    pruner = prune.Pruner(model, prune.CubicSchedule(0.5))
    with pytest.raises(ValueError, match="Pruner.load_state_dict: expected a state with steps, got {}"):
        pruner.load_state_dict({})


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(rank)) * (1 + rank)
    pruner = prune.Pruner(model, prune.CubicSchedule(0.6, begin=0, end=4, every=2), optimizer)
    for _ in range(6):
        (model(x) - rank).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    norms = copy.deepcopy(model.module)
    prune.remove_masks(norms)
    prune.wanda(norms, 0.5, [x], layers=["0"])
    torch.save((bits_of(model.module), bits_of(norms)), f"{folder}/{rank}.pt")
    broken = mlp(seed=rank)
    try:
        prune.Pruner(broken, prune.ConstantSchedule(0.5))
        message = ""
    except ValueError as error:
        message = str(error)
    torch.save(message, f"{folder}/message{rank}.pt")
    torch.distributed.barrier()  # whoever leaves first would cut off the other
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo by file")
def test_all_ranks_have_the_same_masks_and_wanda_sums_their_norms(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    (first, wanda_first), (second, wanda_second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, mask in first.items():
        assert torch.equal(mask, second[name])
    assert torch.equal(wanda_first["0.weight"], wanda_second["0.weight"])
    for rank in range(2):
        message = torch.load(tmp_path / f"message{rank}.pt")
        assert "expected equal masks on all ranks, got other ones of '0.weight'" in message
