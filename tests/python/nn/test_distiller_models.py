"""Distiller: nothing left in either model, teachers of every kind, projections, and how a student may run."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from reference import distillation as oracle
from samples.distill import Tokens, close, gradients, hooks_of, ids, models
from torch import nn

from quantrain.distill import Distiller, Pair

# ---- nothing is left ------------------------------------------------------------------------------------------------------


def test_the_models_do_not_have_the_distiller():
    student, teacher = models()
    keys, x = list(student.state_dict()), ids()
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        assert list(student.state_dict()) == keys and list(dict(student.named_modules())) == list(
            dict(copy.deepcopy(student).named_modules())
        )
        saved = io.BytesIO()
        torch.save(student, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(student),
            pickle.loads(pickle.dumps(student)),
            torch.load(saved, weights_only=False),
        ]
        assert b"quantrain" not in pickle.dumps(student).replace(b"test_distiller", b"")
        taught = distiller.teach(x)
        output = student(x)
        expected = distiller.loss(output, taught).floats()
        taught, output = distiller.teach(x), student(x)
        for other in copies:
            assert torch.equal(other(x + 0), output)  # not captured in place of the student's
            other.layers[0].up.weight.data.zero_()
            other(x)
        assert distiller.loss(output, taught).floats() == expected
    assert hooks_of(student, teacher) == 0


class Breaks(Tokens):
    breaks = False

    def forward(self, input_ids):
        x = super().forward(input_ids)
        if self.breaks:
            raise RuntimeError("broken")
        return x


@pytest.mark.parametrize("where", ["nowhere", "body", "student", "teacher", "loss", "call"])
def test_hooks_and_modes_are_given_back(where):
    torch.manual_seed(0)
    student, teacher = Breaks(), Breaks()
    teacher.layers[0].eval()
    teacher.head.bias.requires_grad_(False)
    modes = [m.training for m in (*student.modules(), *teacher.modules())]
    wanted = [p.requires_grad for p in teacher.parameters()]
    student.breaks, teacher.breaks = where in ("student", "call"), where == "teacher"
    distiller = Distiller(student, teacher, {"layers.*": "layers.*"})
    assert hooks_of(student, teacher) == 0
    try:
        if where == "call":
            distiller(ids())
        else:
            with distiller:
                assert hooks_of(student, teacher) == 8 and not teacher.training
                assert not any(p.requires_grad for p in teacher.parameters())
                taught = distiller.teach(ids())
                output = student(ids())
                distiller.loss(output, taught[:2] if where == "loss" else taught)
                if where == "body":
                    raise RuntimeError("broken")
        assert where == "nowhere"
    except (RuntimeError, ValueError):
        assert where != "nowhere"
    assert hooks_of(student, teacher) == 0
    assert modes == [m.training for m in (*student.modules(), *teacher.modules())]
    assert wanted == [p.requires_grad for p in teacher.parameters()]
    assert not distiller._student.kept and not distiller._teacher.kept
    student.breaks = teacher.breaks = False
    assert math.isfinite(distiller(ids()).floats()["loss"])  # and it can be used again


def test_hidden_states_do_not_outlive_the_step():
    student, teacher = models()
    alive = []

    def watch(module, args, output):
        alive.append(weakref.ref(output))

    for model in (student, teacher):
        for layer in model.layers:
            layer.register_forward_hook(watch)
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        losses = distiller(ids())
        losses.backward()
        del losses
        gc.collect()
        assert len(alive) == 6 and not any(ref() is not None for ref in alive)
        distiller.teach(ids())
        student(ids())  # and no loss: until the next pass at most
        student(ids())
        gc.collect()
        assert sum(ref() is not None for ref in alive[6:]) <= 6


def test_passes_without_gradients_are_not_seen():
    student, teacher = models()
    x, other = ids(), ids(7)
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        expected = distiller(x).floats()
        taught, output = distiller.teach(x), student(x)
        with torch.no_grad():
            student(other)
        assert distiller.loss(output, taught).floats() == expected
        with torch.no_grad():
            student(x)
        taught = distiller.teach(x)
        with pytest.raises(ValueError, match="'layers.0' of the student to be called in a forward pass of the student"):
            distiller.loss(output, taught)


def test_a_loss_forgets_its_passes():
    student, teacher = models()
    x = ids()
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        taught, output = distiller.teach(x), student(x)
        distiller.loss(output, taught)
        with pytest.raises(ValueError, match="before each loss, got no call"):
            distiller.loss(output, taught)
        student(x)
        with pytest.raises(ValueError, match="'layers.1' of the teacher"):
            distiller.loss(output, taught)
    with pytest.raises(RuntimeError, match=r"expected attach\(\) or `with` around the forward passes"):
        distiller.loss(output, taught)
    with pytest.raises(RuntimeError, match=r"before teach\(\)"):
        distiller.teach(x)
    distiller.attach()
    with pytest.raises(RuntimeError, match="got it attached"):
        distiller.attach()
    distiller.detach()
    distiller.detach()
    assert hooks_of(student, teacher) == 0


def test_results_that_are_written_in_place_are_refused():
    student, teacher = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)) for _ in range(2))
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="'0' of the student gives to stay as it is, got it written in place"):
        Distiller(student, teacher, {"0": "1"})(x)
    with pytest.raises(ValueError, match="'0' of the teacher gives to stay as it is, got it written in place"):
        Distiller(student, teacher, {"1": "0"})(x)
    assert math.isfinite(Distiller(student, teacher, {"1": "1"})(x).floats()["loss"])


# ---- teachers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_of_another_type(dtype):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    teacher = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(6, 8)
    losses = Distiller(student, teacher, {"0": "0"})(x)
    losses.backward()
    t = teacher[0](x.to(dtype))
    assert losses.floats()["mse:0"] == pytest.approx(oracle.mse(student[0](x), t).mean().item(), rel=1e-5)
    expected = oracle.kl(student(x), teacher[1](t), temperature=2.0).mean()
    assert losses.floats()["kl"] == pytest.approx(expected.item(), rel=1e-5)
    assert student[0].weight.grad.dtype == torch.float32


def test_a_teacher_run_in_inference_mode():
    student, teacher = models()
    x = ids()
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        expected = distiller(x).floats()
        with torch.inference_mode():
            taught = teacher(x)
        losses = distiller.loss(student(x), taught)
        losses.backward()
        assert losses.floats() == expected


def test_the_inference_path_of_torchs_encoder_is_not_taken():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    student, teacher = nn.TransformerEncoder(layer, 1), nn.TransformerEncoder(layer, 2)
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[0, 4:] = True
    forward = lambda model, x: model(x, src_key_padding_mask=hidden)
    pairs = {"layers.*.linear1": "layers.*.linear1", "layers.*": "layers.*"}
    losses = Distiller(student, teacher, pairs, forward=forward, mask=lambda _: ~hidden)(torch.randn(3, 6, 16))
    assert all(math.isfinite(value) for value in losses.floats().values()) and len(losses) == 4
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.cuda
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_teacher_on_another_device(devices):
    student, teacher = models(width=(8, 12))
    pairs = {"layers.*": "layers.*"}
    exact = Distiller(student, teacher, pairs)
    exact.build(ids())
    expected, state = exact(ids()).floats(), exact.state_dict()
    student.to(devices[0])
    teacher.to(devices[1])
    distiller = Distiller(student, teacher, pairs, mask=lambda batch: torch.ones(batch.shape))
    distiller.load_state_dict(state)
    losses = distiller(ids().to(devices[0]))
    losses.backward()
    assert losses["loss"].device.type == devices[0] and losses.floats() == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is not None and p.device.type == devices[0] for p in distiller.parameters())


# ---- projections ----------------------------------------------------------------------------------------------------------


def test_projections_learn_and_are_the_same_for_a_seed():
    student, teacher = models(width=(8, 12))
    x = ids()
    state = torch.get_rng_state()
    distillers = [Distiller(student, teacher, {"layers.*": "layers.*"}, kl_weight=0.0, seed=seed) for seed in (5, 5, 6)]
    with pytest.raises(RuntimeError, match=r"call build\(batch\) before parameters"):
        distillers[0].parameters()
    for distiller in distillers:
        distiller.build(x)
    assert torch.equal(state, torch.get_rng_state())
    one, same, other = (distiller.state_dict() for distiller in distillers)
    assert list(one) == [f"layers.{i}->layers.{2 * i + 1}.{n}" for i in range(2) for n in ("weight", "bias")]
    weight = "layers.1->layers.3.weight"
    assert torch.equal(one[weight], same[weight]) and not torch.equal(one[weight], other[weight])
    torch.testing.assert_close(one[weight].T @ one[weight], torch.eye(8))  # orthogonal
    assert not torch.equal(one[weight], one["layers.0->layers.1.weight"])

    distiller = distillers[0]
    student.requires_grad_(False)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.01)
    values = []
    with distiller, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            losses = distiller(x)
            values.append(losses.floats()["loss"])
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
    assert values[-1] < 0.6 * values[0]
    assert not any("projection" in name for name in student.state_dict())

    resumed = Distiller(student, teacher, {"layers.*": "layers.*"}, kl_weight=0.0)
    resumed.load_state_dict(distiller.state_dict())
    assert len(resumed.parameters()) == 4
    assert resumed(x).floats() == distiller(x).floats()
    distillers[1].load_state_dict(distiller.state_dict())  # in place, where they are
    assert distillers[1](x).floats() == distiller(x).floats()


def test_projections_that_no_optimizer_can_have_are_warned_of():
    student, teacher = models(width=(8, 12))
    distiller = Distiller(student, teacher, {"layers.*": "layers.*"})
    with pytest.warns(UserWarning, match="Distiller: made 2 projections"):
        distiller(ids())
    assert len(distiller.parameters()) == 4


def test_widths_may_be_given():
    student, teacher = models(width=(8, 12))
    pairs = {"layers.*": "layers.*"}
    distiller = Distiller(student, teacher, pairs, projections={"layers.*": (8, 12)})
    assert len(distiller.parameters()) == 4
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    distiller(ids()).backward()
    before = distiller.parameters()[0].clone()
    optimizer.step()
    assert not torch.equal(before, distiller.parameters()[0])
    assert Distiller(student, models()[1], pairs, projections={}).parameters() == []
    with pytest.raises(ValueError, match="keep the widths of its projection, 7 and 12, got 8 and 12"):
        Distiller(student, teacher, pairs, projections={"layers.*": (7, 12)})(ids())
    with pytest.raises(ValueError, match=r"to give \[3, 5, 12\]"):
        Distiller(student, teacher, pairs, projections={})(ids())
    with pytest.raises(ValueError, match="keys of projections to be those of pairs .*, got 'head'"):
        Distiller(student, teacher, pairs, projections={"head": (8, 12)})


def test_two_losses_of_the_same_modules_share_a_projection():
    student, teacher = models(layers=(1, 1), width=(8, 12))
    pairs = [Pair("layers.0", "layers.0"), Pair("layers.0", "layers.0", "cosine")]
    distiller = Distiller(student, teacher, pairs, kl_weight=0)
    distiller.build(ids())
    assert len(distiller.parameters()) == 2
    distiller(ids()).backward()
    assert distiller.parameters()[0].grad.any()


def test_a_state_of_other_pairs_is_refused_whole():
    student, teacher = models(width=(8, 12))
    distiller = Distiller(student, teacher, {"layers.*": "layers.*"})
    distiller.build(ids())
    state, kept = distiller.state_dict(), {k: v.clone() for k, v in distiller.state_dict().items()}
    key = "layers.0->layers.1"
    ones = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    for wrong, message in (
        ({**ones, "head->head.weight": torch.ones(2, 2), "head->head.bias": torch.ones(2)}, "'head->head' in no pair"),
        ({k: v for k, v in ones.items() if key not in k}, f"'{key}' in the distiller alone"),
        ({k: v for k, v in ones.items() if k != f"{key}.bias"}, f"weight and bias of each projection, got {key}.bias"),
        ({**ones, f"{key}.weight": torch.ones(3, 8)}, rf"'{key}' to be \[12, 8\], got \[3, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            distiller.load_state_dict(wrong)
        assert all(torch.equal(kept[name], tensor) for name, tensor in distiller.state_dict().items())


# ---- how a student may run ------------------------------------------------------------------------------------------------


def stepped(student, teacher, x, **options):
    losses = Distiller(student, teacher, {"layers.*": "layers.*"}, **options)(x)
    losses.backward()
    return losses.floats(), gradients(student)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_recomputed_layers_count_once(which):
    student, teacher = models()
    expected, exact = stepped(student, teacher, ids())
    student.zero_grad()
    for layer in (student if which == "student" else teacher).layers:
        layer.recomputed = False
    with Distiller(student, teacher, {"layers.*": "layers.*", "layers.*.up": "layers.*.up"}) as distiller:
        losses = distiller(ids())
        losses.backward()
        assert not distiller._student.kept and not distiller._teacher.kept
        again = distiller(ids())
        assert again.floats() == losses.floats()
    student.zero_grad()
    found, own = stepped(student, teacher, ids())
    assert found == pytest.approx(expected)
    close(own, exact)


def test_recomputing_without_a_graph_is_refused():
    student, teacher = models()
    for layer in student.layers:
        layer.recomputed = True
    with pytest.raises(ValueError, match="'layers.0.up' of the student to run with gradients.*use_reentrant=False"):
        Distiller(student, teacher, {"layers.*.up": "layers.*.up"})(ids())
    stepped(student, teacher, ids())  # the layers themselves are outside of it


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["compile", "in place"])
def test_a_compiled_student(backend, how):
    student, teacher = models()
    expected, exact = stepped(student, teacher, ids())
    student.zero_grad()
    torch._dynamo.reset()
    if how == "in place":
        student.compile(backend=backend, fullgraph=True)
        compiled = student
    else:
        compiled = torch.compile(student, backend=backend, fullgraph=True)
    with Distiller(compiled, teacher, {"layers.*": "layers.*"}) as distiller:
        for seed in (1, 2, 1):
            student.zero_grad()
            losses = distiller(ids(seed))
            losses.backward()
        assert losses.floats() == pytest.approx(expected, rel=1e-5)
        close(gradients(student), exact)
    compiled(ids())
    assert not distiller._student.kept
    torch._dynamo.reset()
    compiled(ids())  # without hooks: the compiled code has none
    with pytest.raises(ValueError, match="a compiled model is to be compiled"):
        Distiller(compiled, teacher, {"layers.*": "layers.*"})(ids())


def _shards(rank, folder, kind):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        student, teacher = models(width=(8, 12))
        if kind == "ddp":
            trained = nn.parallel.DistributedDataParallel(student)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for model in (student, teacher):
                for layer in model.layers:
                    fully_shard(layer, mesh=mesh)
            trained = fully_shard(student, mesh=mesh)
        distiller = Distiller(trained, teacher, {"layers.*": "layers.*"}, "cosine")
        distiller.build(ids())
        optimizer = torch.optim.SGD([*trained.parameters(), *distiller.parameters()], lr=0.1)
        found = []
        with distiller:
            for seed in range(3):
                losses = distiller(ids(seed, (4, 5))[2 * rank : 2 * rank + 2])
                optimizer.zero_grad()
                losses.backward()
                optimizer.step()
                found.append(losses.floats()["loss"])
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in student.named_parameters()}
        torch.save((found, {n: p.detach() for n, p in whole.items()}, distiller.state_dict()), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_two_processes_train_as_one_does(kind, tmp_path):
    torch.multiprocessing.spawn(_shards, (str(tmp_path), kind), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    student, teacher = models(width=(8, 12))
    distiller = Distiller(student, teacher, {"layers.*": "layers.*"}, "cosine")
    distiller.build(ids())
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    for seed in range(3):
        losses = distiller(ids(seed, (4, 5)))
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        each = [found[seed] for found, _, _ in ranks]
        assert sum(each) / 2 == pytest.approx(losses.floats()["loss"], rel=1e-5)
    for _, parameters, state in ranks:
        close(parameters, {n: p.detach() for n, p in student.named_parameters()}, rtol=1e-4, atol=1e-6)
        close(state, distiller.state_dict(), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, ranks[1][2][name]) for name, a in ranks[0][2].items())
