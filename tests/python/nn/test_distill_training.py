"""Quantization-aware distillation: prepared models nearer to the float model, the loop as written, quantized teachers."""

import copy
import itertools
import math

import pytest
import torch
from samples.distill import Tokens, hooks_of, ids
from torch import nn

import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe
from quantrain.distill import Distillation, Distiller, TopkTeacher, distill, distill_layers, write_topk

W4A8 = Recipe(
    weight=QuantSpec(bits=4, granularity="per_channel", observer="dynamic"),
    input=QuantSpec(bits=8, granularity="per_token", observer="dynamic"),
    training=False,
)
RECIPES = {"qat-w4a4": "qat-w4a4", "qat-w8a8": "qat-w8a8", "qlora": "qlora", "w4a8": W4A8}
BATCHES = [ids(seed, (8, 6)) for seed in range(4)]


def float_model(seed=0, width=32):
    torch.manual_seed(seed)
    model = Tokens(width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that few bits hurt
    return model.eval()


def prepared(teacher, recipe="qat-w4a4"):
    return qnn.prepare(copy.deepcopy(teacher), RECIPES[recipe], skip=("embedding",))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:prepare")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pairs", [None, {"layers.*": "layers.*"}], ids=["logits", "hidden"])
def test_prepared_models_come_nearer(recipe, pairs):
    teacher = float_model()
    student = prepared(teacher, recipe)
    before = state_of(teacher)
    rate = 3e-5 if recipe == "qat-w8a8" else 3e-4  # in 8 bits there is little to gain, which larger steps lose
    result = distill(student, BATCHES, teacher=teacher, steps=40, lr=rate, pairs=pairs)
    assert isinstance(result, Distillation)
    assert list(result.after)[:2] == ["loss", "kl"] and len(result.after) == (2 if pairs is None else 4)
    assert all(result.after[name] < 0.8 * result.before[name] for name in ("loss", "kl")), str(result)
    assert all(result.after[name] < result.before[name] for name in result.after), str(result)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert hooks_of(teacher) == 0 and not teacher.training
    with torch.no_grad():
        measured = [Distiller(student.eval(), teacher, pairs)(batch).floats() for batch in BATCHES]
    assert sum(m["loss"] for m in measured) / 4 == pytest.approx(result.after["loss"], rel=1e-4)
    with torch.no_grad():
        found = qnn.convert(copy.deepcopy(student))(BATCHES[0]) if recipe != "qlora" else student(BATCHES[0])
        torch.testing.assert_close(found, student(BATCHES[0]), rtol=0, atol=0.05)


def test_it_is_the_loop_that_it_says():
    teacher = float_model()
    student, expected = prepared(teacher), prepared(teacher)
    qnn.calibrate(student, BATCHES)
    qnn.calibrate(expected, BATCHES)
    steps, seen = 6, []
    state = torch.get_rng_state()
    result = distill(
        student, BATCHES, teacher=teacher, steps=steps, lr=1e-3, temperature=3.0, progress=lambda *now: seen.append(now)
    )
    assert torch.equal(state, torch.get_rng_state())
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], weight_decay=0.0)
    losses = []
    expected.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        loss = Distiller(expected, teacher, temperature=3.0)(BATCHES[step % 4])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.floats()["loss"])
    assert result.history == pytest.approx(losses, rel=1e-4) and seen == list(enumerate(result.history, 1))
    for (name, got), (_, wanted) in zip(student.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_table():
    teacher = float_model()
    result = distill(prepared(teacher), BATCHES, teacher=teacher, steps=2, pairs={"head": "head"})
    lines = str(result).splitlines()
    assert lines[0] == "distillation, 2 steps" and lines[1].split() == ["loss", "before", "after"]
    assert lines[3].split() == ["kl", f"{result.before['kl']:.4g}", f"{result.after['kl']:.4g}"]
    assert [row["loss"] for row in result.rows] == ["loss", "kl", "mse:head"]


def test_batches_begin_again_and_an_iterator_is_read_once():
    teacher, every = float_model(), BATCHES[:3]
    states = []
    for source in (every, iter(every), every * 3):
        student = qnn.calibrate(prepared(teacher), every)
        distill(student, source, teacher=teacher, steps=7, lr=1e-3)
        states.append(state_of(student))
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in other)


def test_modes_hooks_and_gradients_are_given_back():
    teacher = float_model().train()
    student = prepared(teacher).eval()
    student.layers[0].train()
    modes = [m.training for m in (*student.modules(), *teacher.modules())]
    distill(student, BATCHES, teacher=teacher, steps=2, pairs={"layers.*": "layers.*"})
    assert modes == [m.training for m in (*student.modules(), *teacher.modules())]
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    assert hooks_of(teacher) == 0


def test_an_optimizer_of_ones_own():
    teacher = float_model()
    student = prepared(teacher)
    optimizer = torch.optim.SGD(student.layers[1].parameters(), lr=1e-2)
    before = state_of(student)
    result = distill(student, BATCHES, teacher=teacher, steps=5, optimizer=optimizer, max_norm=None)
    moved = {name for name, p in student.named_parameters() if not torch.equal(before[name], p)}
    moved = {name for name in moved if not name.endswith("fake_quant.scale")}  # ranges follow in training
    assert moved and all(name.startswith("layers.1.") for name in moved)
    assert optimizer.param_groups[0]["lr"] == 1e-2 and len(result.history) == 5


def test_projections_train_too():
    teacher = float_model(width=48)
    student = prepared(float_model(1))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    options = {"pairs": {"layers.*": "layers.*"}, "kl_weight": 0, "steps": 30, "teacher": teacher}
    alone = distill(student, BATCHES, optimizer=optimizer, **options)
    assert alone.after["loss"] < alone.before["loss"]  # the student has not moved
    both = distill(student, BATCHES, lr=3e-3, **options)
    assert both.after["loss"] < 0.7 * both.before["loss"]


@pytest.mark.filterwarnings("ignore:prepare")
@pytest.mark.parametrize("recipe", ["nf4", "zeroquant-w8a8", "qat-w8a8"])
def test_a_quantized_teacher(recipe):
    teacher = float_model()
    exact = copy.deepcopy(teacher)
    if recipe == "nf4":
        qnn.prepare(teacher, recipe)
    else:
        qnn.prepare(teacher, recipe)
        qnn.calibrate(teacher, BATCHES)
        teacher = qnn.convert(teacher)
    state = state_of(teacher)
    student = float_model(3)
    pairs = {"layers.*": "layers.*"}
    with torch.no_grad():
        far = Distiller(student, exact, pairs)(BATCHES[0]).floats()["loss"]
    result = distill(student, BATCHES, teacher=teacher, steps=60, lr=3e-3, pairs=pairs)
    assert result.after["loss"] < 0.7 * result.before["loss"]
    with torch.no_grad():
        assert Distiller(student, exact, pairs)(BATCHES[0]).floats()["loss"] < 0.8 * far
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_stored_teacher(tmp_path):
    teacher = float_model()
    write_topk(teacher, BATCHES, tmp_path, k=8)
    student = prepared(teacher)
    result = distill(student, BATCHES, teacher=TopkTeacher(tmp_path), steps=40, lr=1e-3)
    assert result.after["kl"] < 0.8 * result.before["kl"]


def test_a_task_of_ones_own():
    teacher = float_model()
    batches = [(x, torch.roll(x, -1, 1)) for x in BATCHES]

    def task(output, batch):
        return nn.functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())

    forward = lambda model, batch: model(batch[0])
    student = prepared(teacher)
    result = distill(student, batches, teacher=teacher, steps=3, task=task, task_weight=0.5, forward=forward)
    assert list(result.after) == ["loss", "task", "kl"]
    assert result.after["loss"] == pytest.approx(0.5 * result.after["task"] + result.after["kl"], rel=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing():
    teacher = float_model()
    student = float_model(1)
    before = state_of(student)
    broken = itertools.chain(BATCHES[:1], [BATCHES[1]])
    calls = []

    def forward(model, batch):
        output = model(batch)
        calls.append(model)
        return output * (math.nan if len(calls) > 6 else 1.0)  # two batches measured by two models, then a step

    with pytest.raises(ValueError, match="distill: expected a finite loss 'kl', got nan"):
        distill(student, broken, teacher=teacher, steps=2, lr=0.0, forward=forward)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert hooks_of(student, teacher) == 0


def refusals():
    teacher = float_model()
    student, frozen = float_model(1), float_model(1).requires_grad_(False)
    half = float_model(1).bfloat16()
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    return {
        "no module": (TypeError, "torch.nn.Module, got str", ("student", BATCHES), {"teacher": teacher}),
        "no steps": (ValueError, "at least one step, got 0", (student, BATCHES), {"teacher": teacher, "steps": 0}),
        "no batches": (ValueError, "at least one batch, got none", (student, []), {"teacher": teacher}),
        "one batch": (TypeError, "iterable of batches, got one Tensor", (student, BATCHES[0]), {"teacher": teacher}),
        "frozen": (ValueError, "parameters that train, got none", (frozen, BATCHES), {"teacher": teacher}),
        "16 bits": (ValueError, "in float32, got 'embedding.weight' in torch.bfloat16", (half, BATCHES), {"teacher": teacher}),
        "both": (ValueError, "lr or an optimizer", (student, BATCHES), {"teacher": teacher, "lr": 1.0, "optimizer": sgd}),
        "temperature": (ValueError, "temperature above 0", (student, BATCHES), {"teacher": teacher, "temperature": 0}),
        "pairs": (ValueError, "to name a module", (student, BATCHES), {"teacher": teacher, "pairs": {"no": "head"}}),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name):
    error, message, arguments, options = REFUSALS[name]
    with pytest.raises(error, match=rf"^(distill|Distiller): .*{message}"):
        distill(*arguments, **options)
    for model in (arguments[0], options["teacher"]):
        assert not isinstance(model, nn.Module) or (hooks_of(model) == 0 and not model.training)


def test_layer_by_layer_distillation_is_here_too():
    teacher = float_model()
    student = prepared(teacher, "w4a8")
    result = distill_layers(student, teacher, BATCHES, steps=5, lr=1e-4)
    assert [row["layer"] for row in result.rows] == ["layers.0", "layers.1"]
