"""quantrain.optim.AdamW8bit: options, state, loss scaling, and states of torch.optim.AdamW and bitsandbytes."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from reference import adamw_8bit as oracle
from torch import Tensor, nn

import quantrain
from quantrain.amp import GradScaler
from quantrain.optim import AdamW8bit

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
ON = pytest.mark.parametrize("device", DEVICES)


def make_model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A weight with codes, biases without, and one in memory of another order than its dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80), nn.GELU(), nn.Linear(80, 64)).to(device, dtype)
    with torch.no_grad():
        model[2].weight = nn.Parameter(model[2].weight.t().contiguous().t())
    return model


def give_gradients(model: nn.Module, step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p.device, p.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def same_state(a: AdamW8bit, b: AdamW8bit) -> bool:
    first, second = (
        [state for group in o.param_groups for state in (o.state[p] for p in group["params"])] for o in (a, b)
    )
    return all(
        x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k].cpu(), y[k].cpu()) for k in x)
        for x, y in zip(first, second, strict=True)
    )


# ---- options and steps ----------------------------------------------------------------------------------------------


@ON
def test_the_state_is_plain_tensors_in_the_order_of_memory(device):
    model = make_model(device)
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    weight, bias, turned, _ = model.parameters()
    state = optimizer.state[weight]
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == {
        "step": (torch.float32, ()),
        "exp_avg": (torch.uint8, weight.shape),
        "exp_avg_scale": (torch.float32, (30,)),
        "exp_avg_sq": (torch.uint8, weight.shape),
        "exp_avg_sq_scale": (torch.float32, (30,)),
    }
    assert optimizer.state[turned]["exp_avg"].stride() == turned.stride()
    assert optimizer.state[bias]["exp_avg"].dtype == torch.float32 and "exp_avg_scale" not in optimizer.state[bias]
    assert all(t.device == weight.device and not t.requires_grad for t in state.values())


@ON
def test_it_is_the_oracle_and_stays_near_adamw(device):
    model, exact = make_model(device), make_model(device)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.1, min_8bit_size=0)
    other = torch.optim.AdamW(exact.parameters(), lr=1e-3, weight_decay=0.1)
    oracles = [oracle.Adam(p.detach().cpu().t().reshape(-1) if p is model[2].weight else p.detach().cpu().reshape(-1),
                           weight_decay=0.1) for p in model.parameters()]  # fmt: skip
    start = values(model)
    for step in range(20):
        give_gradients(model, step)
        give_gradients(exact, step)
        optimizer.step()
        other.step()
        for one, p in zip(oracles, model.parameters(), strict=True):
            one.step((p.grad.t() if p is model[2].weight else p.grad).cpu().reshape(-1))
    for one, p, q, before in zip(oracles, model.parameters(), exact.parameters(), start, strict=True):
        found = (p.detach().t() if p is model[2].weight else p.detach()).cpu().reshape(-1).double()
        moved = float((q.detach() - before).double().square().mean().sqrt())
        assert float((found - one.param).square().mean().sqrt()) < 2e-3 * moved
        assert float((p.detach() - q.detach()).double().square().mean().sqrt()) < 2e-2 * moved


def test_options_by_group():
    model = make_model()
    groups = [
        {"params": [model[0].weight], "bits": 32, "lr": 0.0},
        {"params": [model[2].weight], "weight_decay": 0.5, "betas": (0.0, 0.0), "lr": 1.0},
        {"params": [model[0].bias, model[2].bias], "min_8bit_size": 10},
    ]
    optimizer = AdamW8bit(groups, lr=1e-2)
    before = values(model)
    train(model, optimizer, range(1))
    assert (
        torch.equal(model[0].weight, before[0]) and optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    )
    wanted = before[2] * 0.5 - model[2].weight.grad.sign()
    torch.testing.assert_close(model[2].weight.detach(), wanted, rtol=0, atol=1e-4)
    assert optimizer.state[model[0].bias]["exp_avg"].dtype == torch.uint8


@ON
def test_a_rate_may_be_a_number_or_a_tensor_and_change(device):
    runs = []
    for rate in (0.1, torch.tensor(0.1, device=device)):
        model = make_model(device)
        optimizer = AdamW8bit(model.parameters(), lr=rate)
        for step in range(3):
            train(model, optimizer, range(step, step + 1))
            if isinstance(rate, Tensor):
                rate.mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        runs.append(model)
    assert equal(*runs)


def test_schedulers_and_closures():
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 96)).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 32) and losses[-1] < losses[0]


def test_parameters_without_gradients_stay_and_have_no_state():
    model = make_model()
    optimizer = AdamW8bit(model.parameters())
    give_gradients(model, 0)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before) and not optimizer.state[model[0].weight]


@ON
def test_bfloat16_with_stochastic_rounding_follows_float32(device):
    drift = {}
    exact = make_model(device, torch.bfloat16).float()
    start = exact[0].weight.detach().clone()
    reference = AdamW8bit(exact.parameters(), lr=1e-5, weight_decay=0.0)
    for step in range(100):
        give_gradients(exact, step % 3)
        reference.step()
    for stochastic in (False, True):
        model = make_model(device, torch.bfloat16)
        optimizer = AdamW8bit(model.parameters(), lr=1e-5, weight_decay=0.0, stochastic_rounding=stochastic)
        torch.manual_seed(1)
        for step in range(100):
            give_gradients(model, step % 3)
            optimizer.step()
        moved, wanted = model[0].weight.detach().float() - start, exact[0].weight.detach() - start
        drift[stochastic] = float((moved * wanted).sum() / wanted.square().sum())
    assert drift[True] == pytest.approx(1.0, abs=0.15) and drift[False] < 0.5


def test_a_generator_of_its_own():
    runs = []
    for _ in range(2):
        model = make_model(dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(3)
        train(model, AdamW8bit(model.parameters(), stochastic_rounding=True, generator=generator), range(2))
        runs.append(model)
    assert equal(*runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "expected lr >= 0, got -1.0"),
        ({"lr": math.nan}, "expected lr >= 0, got nan"),
        ({"lr": torch.ones(2)}, r"expected lr with one element, got shape \[2\]"),
        ({"betas": (1.0, 0.9)}, r"expected betas in \[0, 1\), got 1.0 and 0.9"),
        ({"eps": -1e-8}, "expected eps >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "expected weight_decay >= 0, got -0.1"),
        ({"bits": 4}, "expected bits of 8 or 32, got 4"),
        ({"min_8bit_size": -1}, "expected min_8bit_size >= 0, got -1"),
    ],
)
def test_options_outside_their_ranges(options, message):
    model = make_model()
    with pytest.raises(ValueError, match=f"AdamW8bit: {message}"):
        AdamW8bit(model.parameters(), **options)
    with pytest.raises(ValueError, match=f"AdamW8bit: {message}"):
        AdamW8bit([{"params": list(model.parameters()), **options}])


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="AdamW8bit: expected dense gradients, got layout torch.sparse_coo"):
        AdamW8bit(embedding.parameters()).step()


# ---- saving and loading ---------------------------------------------------------------------------------------------


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, device):
    whole = make_model(device, dtype)
    train(whole, AdamW8bit(whole.parameters(), lr=1e-2), range(6))
    first = make_model(device, dtype)
    optimizer = AdamW8bit(first.parameters(), lr=1e-2)
    train(first, optimizer, range(3))
    state, weights = through_file(optimizer.state_dict()), through_file(first.state_dict())
    second = make_model(device, dtype)
    second.load_state_dict(weights)
    resumed = AdamW8bit(second.parameters(), lr=0.5)
    resumed.load_state_dict(state)
    assert same_state(optimizer, resumed) and resumed.param_groups[0]["lr"] == 1e-2
    train(second, resumed, range(3, 6))
    assert equal(whole, second)


def test_a_loaded_state_is_a_copy():
    model, other = make_model(), make_model()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    twin = AdamW8bit(other.parameters())
    twin.load_state_dict(optimizer.state_dict())
    train(other, twin, range(1, 2))
    assert float(optimizer.state[model[0].weight]["step"]) == 1.0 and not same_state(optimizer, twin)


def test_copies_and_pickles():
    model = make_model()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(2))
    both = copy.deepcopy((model, optimizer))
    third = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), both, third):
        train(m, o, range(2, 4))
    assert equal(model, both[0]) and equal(model, third[0])


def test_the_state_of_adamw_is_taken_over():
    model = make_model()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, plain, range(3))
    twin = copy.deepcopy(model)
    optimizer = AdamW8bit(twin.parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["bits"] == 8 and optimizer.param_groups[0]["lr"] == 1e-2
    state = optimizer.state[twin[0].weight]
    assert state["exp_avg"].dtype == torch.uint8 and float(state["step"]) == 3.0
    before = values(model)
    train(model, plain, range(3, 5))
    train(twin, optimizer, range(3, 5))
    for p, q, start in zip(model.parameters(), twin.parameters(), before, strict=True):
        moved = float((p.detach() - start).square().mean().sqrt())
        assert float((p.detach() - q.detach()).square().mean().sqrt()) < 2e-2 * moved


@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8)])
def test_moments_change_their_bits_with_the_group(before, after):
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), bits=before)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["bits"] = after
    other = AdamW8bit(make_model().parameters(), bits=after)
    other.load_state_dict(saved)
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        old, new = optimizer.state[p], other.state[q]
        assert ("exp_avg_scale" in new) == (after == 8 and p.numel() >= 4096)
        flat = [s["exp_avg"].as_strided((p.numel(),), (1,)) for s in (old, new)]
        coded = [oracle.decode(f, s["exp_avg_scale"], True) if f.dtype == torch.uint8 else f for f, s in zip(flat, (old, new), strict=True)]  # fmt: skip
        assert float((coded[0] - coded[1]).abs().max()) <= 0.02 * float(coded[0].abs().max())


def test_a_state_of_other_parameters_is_refused():
    optimizer = AdamW8bit([torch.zeros(5000, requires_grad=True)])
    other = AdamW8bit([torch.zeros(6000, requires_grad=True)])
    other.param_groups[0]["params"][0].grad = torch.ones(6000)
    other.step()
    with pytest.raises(ValueError, match=r"AdamW8bit: expected exp_avg of shape \[5000\], got \[6000\]"):
        optimizer.load_state_dict(other.state_dict())


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def bitsandbytes_state(model: nn.Module, block: int = 256, wrapped: bool = False) -> dict:
    """As bitsandbytes' AdamW8bit.state_dict(): blocks by rows, small parameters in float32."""
    states = {}
    generator = torch.Generator().manual_seed(9)
    for index, p in enumerate(model.parameters()):
        if p.numel() < 4096:
            states[index] = {"step": 7, "state1": torch.randn(p.shape), "state2": torch.rand(p.shape)}
            continue
        blocks = -(-p.numel() // block)
        tensors = {
            "state1": torch.randint(0, 256, p.shape, generator=generator, dtype=torch.uint8),
            "state2": torch.randint(1, 256, p.shape, generator=generator, dtype=torch.uint8),
            "absmax1": torch.rand(blocks, generator=generator),
            "absmax2": torch.rand(blocks, generator=generator),
            "qmap1": oracle.dynamic_map(True),
            "qmap2": oracle.dynamic_map(False),
        }
        states[index] = {"step": 7, **({"__bnb_optimizer_quant_state__": tensors} if wrapped else tensors)}
    group = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2, "alpha": 0.0}
    return {"state": states, "param_groups": [group | {"params": list(range(len(states)))}]}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("block", [256, 2048])
def test_states_of_bitsandbytes_are_taken_over(block, wrapped):
    model = make_model()
    optimizer = AdamW8bit(model.parameters())
    saved = bitsandbytes_state(model, block, wrapped)
    optimizer.load_bitsandbytes_state(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.8, 0.95), 1e-6, 0.2)
    for index, p in enumerate(model.parameters()):
        theirs = saved["state"][index]
        theirs = theirs | theirs.get("__bnb_optimizer_quant_state__", {})
        ours = optimizer.state[p]
        assert float(ours["step"]) == 7.0
        for name, code, absmax, signed in (
            ("exp_avg", "state1", "absmax1", True),
            ("exp_avg_sq", "state2", "absmax2", False),
        ):
            if p.numel() < 4096:
                assert torch.equal(ours[name], theirs[code])
                continue
            rows = theirs[code].reshape(-1)
            table = oracle.dynamic_map(signed)[rows.long()]
            wanted = (table * theirs[absmax].repeat_interleave(block)[: len(rows)]).view(p.shape)
            memory = ours[name].as_strided((p.numel(),), (1,))
            found = torch.empty_like(p).detach()
            found.as_strided((p.numel(),), (1,)).copy_(oracle.decode(memory, ours[f"{name}_scale"], signed))
            if p.is_contiguous():
                assert torch.equal(ours[name], theirs[code]) and torch.equal(found, wanted)
            else:
                assert float((found - wanted).abs().max()) < 0.02
    train(model, optimizer, range(1))


def test_states_go_to_bitsandbytes_and_come_back():
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=0.02)
    train(model, optimizer, range(3))
    exported = optimizer.to_bitsandbytes_state()
    assert sorted(exported["state"][0]) == ["absmax1", "absmax2", "qmap1", "qmap2", "state1", "state2", "step"]
    assert exported["state"][0]["step"] == 3 and isinstance(exported["state"][0]["step"], int)
    assert sorted(exported["state"][1]) == ["state1", "state2", "step"]
    assert torch.equal(exported["state"][0]["qmap1"], oracle.dynamic_map(True))
    assert all(t.is_contiguous() for s in exported["state"].values() for t in s.values() if isinstance(t, Tensor))
    twin = AdamW8bit(make_model().parameters())
    twin.load_bitsandbytes_state(through_file(exported))
    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        if p.is_contiguous():
            for name, tensor in optimizer.state[p].items():
                assert torch.equal(tensor, twin.state[q][name])


def test_codes_of_another_map_are_rounded_anew():
    model = make_model()
    saved = bitsandbytes_state(model)
    linear = torch.linspace(-1, 1, 256)
    saved["state"][0]["qmap1"] = linear
    optimizer = AdamW8bit(model.parameters())
    optimizer.load_bitsandbytes_state(saved)
    state = optimizer.state[model[0].weight]
    theirs = saved["state"][0]
    wanted = linear[theirs["state1"].long()].reshape(-1) * theirs["absmax1"].repeat_interleave(256)[: 96 * 80]
    found = oracle.decode(state["exp_avg"].reshape(-1), state["exp_avg_scale"], True)
    assert float((found - wanted).abs().max()) < 0.01 and not torch.equal(state["exp_avg"], theirs["state1"])


def test_wrong_states_of_bitsandbytes_are_refused():
    model = make_model()
    optimizer = AdamW8bit(model.parameters())
    saved = bitsandbytes_state(model)
    del saved["state"][0]["state1"]
    with pytest.raises(ValueError, match="load_bitsandbytes_state: expected a state with state1, got"):
        optimizer.load_bitsandbytes_state(saved)
    saved = bitsandbytes_state(model)
    saved["state"][0]["absmax1"] = torch.ones(7)
    with pytest.raises(ValueError, match="expected a scale for 256 elements of 7680.*got 7 scales"):
        optimizer.load_bitsandbytes_state(saved)
    assert not optimizer.state
    saved = bitsandbytes_state(model)
    saved["param_groups"] = saved["param_groups"] * 2
    with pytest.raises(ValueError, match="expected 1 parameter groups, got 2"):
        optimizer.load_bitsandbytes_state(saved)


# ---- loss scaling and graphs ----------------------------------------------------------------------------------------


@ON
@pytest.mark.parametrize("scaler_class", [GradScaler, torch.amp.GradScaler])
def test_under_a_loss_scaler(scaler_class, device):
    scaled, plain = make_model(device), make_model(device)
    scaler = scaler_class(device, init_scale=1024.0, growth_interval=1000)
    one, two = AdamW8bit(scaled.parameters()), AdamW8bit(plain.parameters())
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(2)).to(device)
    for step in range(6):
        bad = step in (2, 3)
        one.zero_grad()
        scaler.scale(scaled(x).square().mean() * (math.inf if bad else 1.0)).backward()
        scaler.step(one)
        scaler.update()
        two.zero_grad()
        plain(x).square().mean().backward()
        if not bad:
            two.step()
    assert equal(scaled, plain) and same_state(one, two)
    assert scaler.get_scale() == 256.0 and float(one.state[scaled[0].weight]["step"]) == 4.0
    assert not hasattr(one, "found_inf")


@ON
def test_clipping_by_the_scaler(device):
    clipped, plain = make_model(device), make_model(device)
    scaler = GradScaler(device, init_scale=4096.0)
    one, two = AdamW8bit(clipped.parameters()), AdamW8bit(plain.parameters())
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(2)).to(device)
    for _ in range(3):
        one.zero_grad()
        scaler.scale(clipped(x).square().sum()).backward()
        scaler.clip_grad_norm_(one, 0.1)
        scaler.step(one)
        scaler.update()
        two.zero_grad()
        plain(x).square().sum().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        two.step()
    for p, q in zip(clipped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=5e-5)


@pytest.mark.cuda
def test_a_whole_step_as_a_cuda_graph():
    torch.manual_seed(0)
    eager, captured = make_model("cuda"), make_model("cuda")
    rate = torch.tensor(1e-2, device="cuda")
    one, two = AdamW8bit(eager.parameters(), lr=rate), AdamW8bit(captured.parameters(), lr=rate)
    for model, optimizer in ((eager, one), (captured, two)):
        train(model, optimizer, range(2))
    grads = [p.grad for p in captured.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two.step()
    for step in range(2, 5):
        rate.mul_(0.7)
        give_gradients(eager, step)
        one.step()
        for held, p in zip(grads, eager.parameters(), strict=True):
            held.copy_(p.grad)
        graph.replay()
    assert equal(eager, captured) and same_state(one, two)


@pytest.mark.cuda
def test_no_waiting():
    model = make_model("cuda")
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    train(model, optimizer, range(1))
    give_gradients(model, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_package_names_it():
    assert quantrain.optim.AdamW8bit is AdamW8bit and quantrain.optim.__all__ == ["AdamW8bit"]


@ON
@pytest.mark.parametrize("page", [1, 9000, 1 << 30])
def test_a_state_on_the_host_takes_the_same_steps(device, page, monkeypatch):
    from quantrain.optim import host_state

    monkeypatch.setattr(host_state, "PAGE_BYTES", page)
    plain, paged = make_model(device), make_model(device)
    first = AdamW8bit(plain.parameters(), lr=1e-2)
    second = AdamW8bit(paged.parameters(), lr=1e-2, state_on_host=True)
    train(plain, first, range(3))
    train(paged, second, range(3))
    assert equal(plain, paged)
    saved = copy.deepcopy(second.state_dict())
    assert same_state(first, second)
    if device == "cuda":
        held = [t for s in second.state.values() for name, t in s.items() if name != "step"]
        assert held and all(t.is_pinned() for t in held)
    resumed = make_model(device)
    resumed.load_state_dict(paged.state_dict())
    third = AdamW8bit(resumed.parameters(), lr=1e-2, state_on_host=True)
    third.load_state_dict(saved)
    fourth = pickle.loads(pickle.dumps(second))
    assert fourth._state_on_host
    train(plain, first, range(3, 6))
    train(resumed, third, range(3, 6))
    assert equal(plain, resumed) and len(third.state_dict()["state"]) == 4
    assert same_state(first, third)


@pytest.mark.cuda
def test_a_state_on_the_host_takes_loss_scales_and_no_capture():
    plain, paged = make_model("cuda"), make_model("cuda")
    both = AdamW8bit(plain.parameters(), lr=1e-2), AdamW8bit(paged.parameters(), lr=1e-2, state_on_host=True)
    for model, optimizer in zip((plain, paged), both, strict=True):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for step, factor in enumerate((2.0**10, math.inf, 2.0**9)):
            give_gradients(model, step, factor)
            scaler.scale(torch.ones((), device="cuda"))
            scaler.step(optimizer)
            scaler.update()
    assert equal(plain, paged)
    give_gradients(paged, 0)
    with (
        pytest.raises(ValueError, match="no capture of a CUDA graph with state_on_host"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        both[1].step()


def test_states_that_do_not_fit_change_nothing():
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())

    def refused(rule, change, kind=ValueError):
        saved = copy.deepcopy(before)
        change(saved)
        with pytest.raises(kind, match=rule):
            optimizer.load_state_dict(saved)
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        for key, state in before["state"].items():
            assert all(torch.equal(now["state"][key][name], value) for name, value in state.items())

    refused("exp_avg_scale beside codes", lambda s: s["state"][0].pop("exp_avg_scale"))
    refused("a state with exp_avg_sq", lambda s: s["state"][2].pop("exp_avg_sq"))
    refused("exp_avg of shape", lambda s: s["state"][2].update(exp_avg=torch.zeros(3)))
    refused("betas in", lambda s: s["param_groups"][0].update(betas=(2.0, 0.9)))
    refused("two betas", lambda s: s["param_groups"][0].update(betas=(0.9, 0.9, 0.9)))
    refused("a state without maximize", lambda s: s["param_groups"][0].update(maximize=True))
    theirs = optimizer.to_bitsandbytes_state()
    theirs["state"][0].pop("qmap1")
    with pytest.raises(ValueError, match="absmax1 and a map of 256 values"):
        optimizer.load_bitsandbytes_state(theirs)


def test_a_gradient_that_cannot_be_taken_stops_every_group():
    first, second = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(10, 4))
    optimizer = AdamW8bit([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad, second.grad = torch.ones(5000), torch.ones(10, 4).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()
    assert torch.equal(first, torch.ones(5000))
