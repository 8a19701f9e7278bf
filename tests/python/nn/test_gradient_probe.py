"""GradientProbe: its statistics against dense formulas, hooks that change nothing, advice, files, and the command line.

An unbiased quantizer's z-score passes 5 by chance in 6e-7 of all rows; other statistical limits are five standard deviations of
the measured mean, stated where they are used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")

import quantrain  # noqa: E402
from quantrain import GradientSpec  # noqa: E402
from quantrain import nn as qnn  # noqa: E402

ALARM = 5.0
QUANTIZERS = ["per_tensor:4", "per_sample:4", "per_channel:4", "householder:4", "householder:8"]
reflect_rows = torch.ops.quantrain._reflect_rows


def gradient(rows: int = 48, columns: int = 64, seed: int = 0) -> Tensor:
    """Rows of unequal size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(rows, columns, generator=generator) * (2 * torch.randn(rows, 1, generator=generator)).exp()
    g[rows // 2] = 0
    return g


def fixed_gradient() -> Tensor:
    """The gradient of the numbers that the C++ test expects too."""
    i, j = torch.arange(24.0).unsqueeze(1), torch.arange(40.0)
    return torch.sin(1 + 7 * i + j) * torch.exp2(-i)


def back_map(grad: Tensor, quantized) -> Tensor:
    """T^-1 dense, float64, rows that are known to be zero left out; T is the identity without a reflection."""
    identity = torch.eye(len(grad))
    if quantized.order.numel() == 0:
        return identity.double()
    return reflect_rows(identity, quantized.order, quantized.reflector, inverse=True).double()


def noise(grad: Tensor, spec: GradientSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(p, scale, T^-1): the place of each element of T x between its neighbours on the grid, dense."""
    quantized = quantrain.quantize_gradient_codes(grad, spec.bits, spec.quantizer, preserve_zero=spec.preserve_zero)
    y = grad.double()
    if quantized.order.numel():
        y = reflect_rows(torch.eye(len(grad)), quantized.order, quantized.reflector).double() @ y
    scale = quantized.scale.double()
    steps = (y - quantized.offset.double()) / scale
    p = steps - steps.floor()
    return p, scale.expand_as(p), back_map(grad, quantized)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bound_and_exact_variance_are_the_dense_formulas(name):
    grad = gradient()
    grad[24] = 1e-4 * gradient(seed=1)[0]  # a constant row has no range, and its scale in the plan is a convention
    probe = qnn.GradientProbe(quantizers=[name])
    probe.observe("layer", grad)
    (row,) = probe.rows
    p, scale, back = noise(grad, row["quantizer"])
    weights = back.square().sum(0).unsqueeze(1)
    assert row["exact_variance"] == pytest.approx(float((weights * scale**2 * p * (1 - p)).sum()), rel=1e-3)
    assert row["bound"] == pytest.approx(float((weights * scale**2).sum() / 4), rel=1e-4)
    assert row["gradient_square"] == pytest.approx(float(grad.double().square().sum()))
    assert (row["rows"], row["columns"], row["observations"], row["skipped"]) == (48, 64, 1, 0)


@pytest.mark.parametrize("name", ["per_tensor:4", "per_sample:4", "per_sample:2", "per_channel:4"])
def test_measured_variance_is_the_exact_one_within_its_error(name):
    """Var of e^2 for an element that is rounded at p is scale^4 p (1 - p) (1 - 2 p)^2: five deviations, 6e-7."""
    draws = 64
    probe = qnn.GradientProbe(quantizers=[name], draws=draws)
    probe.observe("layer", gradient())
    (row,) = probe.rows
    p, scale, _ = noise(gradient(), row["quantizer"])
    deviation = float((scale**4 * p * (1 - p) * (1 - 2 * p) ** 2).sum() / draws) ** 0.5
    assert abs(row["variance"] - row["exact_variance"]) < 5 * deviation
    assert abs(row["bias_z"]) < ALARM


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_unbiased_quantizers_have_small_z_and_keep_the_bound(name, seed):
    probe = qnn.GradientProbe(quantizers=[name], draws=16, seed=seed)
    for batch in range(4):
        probe.observe("layer", gradient(seed=10 * seed + batch))
    (row,) = probe.rows
    assert abs(row["bias_z"]) < ALARM
    # Each draw's squared error lies within 25 % of its mean here (a dozen rows carry it): the mean of 64, within 16 %.
    assert row["variance"] < 1.16 * row["bound"]
    assert row["variance"] == pytest.approx(row["exact_variance"], rel=0.16)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rounding_to_nearest_is_caught(name):
    def nearest(x: Tensor, spec: GradientSpec, number: int) -> Tensor:
        return quantrain.quantize_gradient(x, spec.bits, spec.quantizer, stochastic=False)

    probe = qnn.GradientProbe(quantizers=[name], quantize=nearest)
    probe.observe("layer", gradient())
    assert probe.rows[0]["bias_z"] > ALARM


def test_a_small_bias_under_the_noise_is_caught():
    """One per cent of the gradient, a seventh of the noise: clear after eight batches, though no single draw shows it."""

    def shrunk(x: Tensor, spec: GradientSpec, number: int) -> Tensor:
        return 0.99 * quantrain.quantize_gradient(x, spec.bits, spec.quantizer)

    torch.manual_seed(0)
    probe = qnn.GradientProbe(quantizers=["per_sample:5"], quantize=shrunk, draws=16)
    for seed in range(8):
        probe.observe("layer", torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)))
    (row,) = probe.rows
    assert 0.01**2 * row["gradient_square"] < 0.1 * row["variance"]
    assert row["bias_z"] > ALARM


def test_z_is_standard_normal_at_most_also_where_jumps_are_rare():
    """300 gradients whose elements almost never move: one large, the rest at 1e-5 of a step."""
    scores = []
    for seed in range(300):
        grad = 1e-5 * torch.rand(20, 50, generator=torch.Generator().manual_seed(seed))
        grad[0, 0] = 15.0
        probe = qnn.GradientProbe(quantizers=["per_tensor:4"], draws=16, seed=seed)
        probe.observe("layer", grad)
        scores.append(probe.rows[0]["bias_z"])
    dense = []
    for seed in range(300):
        probe = qnn.GradientProbe(quantizers=["per_sample:3"], draws=16, seed=seed)
        probe.observe("layer", gradient(8, 16, seed))
        dense.append(probe.rows[0]["bias_z"])
    for z in (torch.tensor(scores), torch.tensor(dense)):
        assert float(z.abs().max()) < ALARM  # 300 chances of 6e-7
        assert float(z.square().mean()) < 1 + 5 * (2 / 300) ** 0.5
        assert abs(float(z.mean())) * 300**0.5 < ALARM
    assert float(torch.tensor(dense).std()) > 0.5  # it is not zero by construction


# (exact_variance, bound, gradient_square) of fixed_gradient, the same in tests/cpp/test_gradient_probe.cpp. Numbers from draws would
# tie the test to the order in which kernels use random numbers; that C++ and Python draw alike is the kernels' own test.
EXPECTED = {
    "per_tensor:4": (0.892134449, 4.89709522, 27.0738595),
    "per_sample:4": (0.176893992, 0.236920628, 27.0738595),
    "householder:4": (0.025876665, 0.0392873597, 27.0738595),
}


def test_python_and_cpp_give_the_same_numbers():
    probe = qnn.GradientProbe(quantizers=list(EXPECTED), draws=8, seed=5)
    probe.observe("layer", fixed_gradient())
    measured = [(row["exact_variance"], row["bound"], row["gradient_square"]) for row in probe.rows]
    for got, want in zip(measured, EXPECTED.values(), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def model_of(kind: str) -> nn.Module:
    """A convolution with batch norm and a linear layer: float, or prepared with the recipe ``kind`` and calibrated."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    )
    if kind != "float":
        qnn.prepare(model, kind)
        qnn.calibrate(model, [images(9)])
    return model


def images(seed: int) -> Tensor:
    return torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int) -> list[Tensor]:
    model.zero_grad()
    model(images(seed)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["float", "qat-w8a8"])
def test_a_probe_sees_every_layer_and_changes_nothing(kind):
    plain, probed = model_of(kind), model_of(kind)
    want = [backward(plain, seed) for seed in range(3)]
    random_state = torch.get_rng_state()
    with qnn.GradientProbe(probed, ["per_sample:4", "householder:4"]) as probe:
        got = []
        for seed in range(3):
            got.append(backward(probed, seed))
            probe.end_batch()
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [(row["layer"], row["quantizer"].rows) for row in probe.rows] == [
        ("0", "sample"),
        ("0", "sample"),
        ("4", "token"),
        ("4", "token"),
    ]
    assert [(row["rows"], row["columns"]) for row in probe.rows[1:3]] == [(12, 6 * 16), (12, 4)]
    assert all(row["observations"] == 3 and row["weight_variance"] > 0 for row in probe.rows)
    weights = torch.stack([grads[0] for grads in want]).double()
    assert probe.layers[0]["batch_variance"] == pytest.approx(float(weights.var(0).sum()), rel=1e-6)
    assert probe.layers[0]["batches"] == 3
    backward(probed, 0)  # outside the block nothing is watched
    assert all(row["observations"] == 3 for row in probe.rows)


def test_weight_variance_is_that_of_the_product():
    """dW = E^T X with uncorrelated E: sum over samples of their noise |x|^2; the mean of 400 draws is within 10 %."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 5), torch.randn(32, 12)
    with qnn.GradientProbe(layer, ["per_sample:4"], draws=400) as probe:
        y = layer(x)
        y.square().sum().backward()
    (row,) = probe.rows
    assert row["layer"] == "(model)"
    p, scale, _ = noise(2 * y.detach(), row["quantizer"])
    expected = ((scale**2 * p * (1 - p)).sum(1) * x.double().square().sum(1)).sum()
    assert row["weight_variance"] == pytest.approx(float(expected), rel=0.1)


def test_rows_of_a_linear_layer_are_tokens_whatever_its_input():
    layer = nn.Linear(6, 5)
    with qnn.GradientProbe(layer, ["per_sample:4", "per_sample:4:sample"]) as probe:
        layer(torch.randn(2, 3, 4, 6)).square().mean().backward()
    assert [(row["rows"], row["columns"], row["quantizer"].rows) for row in probe.rows] == [
        (24, 5, "token"),
        (2, 60, "sample"),
    ]


def test_a_layer_that_runs_twice_is_observed_twice():
    layer = nn.Linear(6, 6)
    with qnn.GradientProbe(layer, ["per_sample:4"]) as probe:
        layer(layer(torch.randn(3, 6))).square().mean().backward()
    assert probe.rows[0]["observations"] == 2


def test_models_that_quantize_their_gradients():
    model = model_of("fqt-psq4")
    with qnn.GradientProbe(model, ["per_sample:4"]) as probe:
        for seed in range(2):
            backward(model, seed)
            probe.end_batch()
            for _ in range(3):
                backward(model, seed)
                probe.end_repeat()
        with pytest.raises(ValueError, match="expected a backward pass that repeats itself"):
            probe.measure_network(lambda: model(images(0)).square().mean())
        assert all(row["weight_variance"] is None for row in probe.rows)
        assert all(layer["batches"] == 2 and layer["repeat_variance"] > 0 for layer in probe.layers)
        qnn.enable_gradient_quant(model, False)
        probe.measure_network(lambda: model(images(0)).square().mean())
        assert all(row["network_variance"] > 0 for row in probe.rows)


def test_network_variance_is_the_spread_of_gradients_with_one_layer_quantized():
    """Against the definition: the last layer's gradient replaced by a draw, all weights' gradients compared."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6)), torch.randn(16, 10)
    with qnn.GradientProbe(model, ["per_sample:3"], draws=200) as probe:
        model(x).square().mean().backward()
        probe.end_batch()
        model.zero_grad()
        probe.measure_network(lambda: model(x).square().mean(), repeats=400)
        assert all(p.grad is None for p in model.parameters())
    first, last = probe.rows
    assert first["network_variance"] == pytest.approx(first["weight_variance"], rel=0.1)  # nothing lies before it

    h = model[1](model[0](x))
    y = model[2](h)
    (g,) = torch.autograd.grad(y.square().mean(), y, retain_graph=True)
    weights = [model[0].weight, model[2].weight]
    exact = torch.autograd.grad(y, weights, g, retain_graph=True)
    spread = 0.0
    for _ in range(400):
        drawn = torch.autograd.grad(y, weights, quantrain.quantize_gradient(g, 3, "per_sample"), retain_graph=True)
        spread += sum(float((a - b).double().square().sum()) for a, b in zip(drawn, exact, strict=True)) / 400
    assert last["network_variance"] == pytest.approx(spread, rel=0.15)


def test_advice_is_sorted_and_follows_the_law():
    model = model_of("float")
    with qnn.GradientProbe(model, ["per_tensor:2", "per_tensor:8"], fraction=0.05) as probe:
        for seed in range(4):
            backward(model, seed)
            probe.end_batch()
    advice = probe.recommend()
    assert len(advice) == 4
    for entry in advice:

        def ratio(bits, entry=entry):
            return entry["ratio"] * ((2 ** entry["quantizer"].bits - 1) / (2**bits - 1)) ** 2

        assert entry["basis"] == "weight" and entry["allowed"] == 0.05
        assert entry["bits_needed"] == 9 or ratio(entry["bits_needed"]) <= 0.05
        assert entry["bits_needed"] == 2 or ratio(entry["bits_needed"] - 1) > 0.05
    lacks = [max(entry["bits_needed"] - entry["quantizer"].bits, 0) for entry in advice]
    assert lacks == sorted(lacks, reverse=True) and lacks[0] > 0
    assert all(entry["bits_needed"] == 2 for entry in probe.recommend(1e9))
    assert all(entry["bits_needed"] == 9 for entry in probe.recommend(1e-15))
    assert "needs" in str(probe.table)


def test_json_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
    model = model_of("qat-w8a8")
    probe = qnn.GradientProbe(model)
    with pytest.raises(ValueError, match="expected an observed gradient"):
        probe.plot(tmp_path / "empty.png")
    with probe:
        for seed in range(2):
            backward(model, seed)
            probe.end_batch()
    report = json.loads(probe.to_json())
    assert report["rows"][0]["variance"] == probe.rows[0]["variance"]
    assert report["rows"][2]["quantizer"]["quantizer"] == "householder"
    assert len(report["rows"]) == 6 and len(report["layers"]) == 2 and len(report["advice"]) == 6
    lines = str(probe.table).splitlines()
    assert lines[1].split()[:3] == ["layer", "quantizer", "bias"]
    assert len(lines) >= 8
    probe.plot(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_that_cannot_be_measured():
    probe = qnn.GradientProbe(quantizers=["per_sample:4"])
    probe.observe("layer", torch.tensor([[1.0, math.nan]]))
    probe.observe("layer", torch.tensor([[1.0, math.inf]]))
    probe.observe("layer", torch.empty(0, 3))
    (row,) = probe.rows
    assert (row["observations"], row["skipped"], row["variance"]) == (0, 3, 0.0)
    probe.observe("layer", torch.zeros(3, 4))
    (row,) = probe.rows
    assert (row["observations"], row["variance"], row["exact_variance"], row["bound"], row["bias_z"]) == (1, 0, 0, 0, 0)
    probe.observe("half", torch.randn(4, 8).to(torch.bfloat16))
    probe.observe("vector", torch.randn(8))
    probe.observe("tokens", torch.randn(2, 3, 8), rows="token")
    assert [(row["rows"], row["columns"]) for row in probe.rows[1:]] == [(4, 8), (1, 8), (6, 8)]
    with pytest.raises(TypeError, match="expected a floating-point gradient"):
        probe.observe("layer", torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="got 'row'"):
        probe.observe("layer", torch.ones(2, 2), rows="row")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 5}, "expected an even number of draws, at least 4, got 5"),
        ({"draws": 2}, "got 2"),
        ({"fraction": 0.0}, "expected a positive fraction, got 0"),
        ({"quantizers": ["per_sample"]}, "expected quantizer:bits"),
        ({"quantizers": ["per_sample:12"]}, "expected quantizer:bits"),
        ({"quantizers": ["per_sample:9"]}, "9"),
        ({"quantizers": ["hadamard:5"]}, "hadamard"),
        ({"quantizers": [GradientSpec(quantizer="auto")]}, "auto"),
    ],
)
def test_what_a_probe_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        qnn.GradientProbe(**change)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="expected a model with a linear layer"), qnn.GradientProbe(nn.ReLU()):
        pass


@pytest.mark.cuda
def test_cuda_gives_the_cpus_numbers():
    probes = []
    for device in ("cpu", "cuda"):
        probe = qnn.GradientProbe(quantizers=QUANTIZERS, seed=2)
        probe.observe("layer", gradient().to(device))
        probes.append(probe)
    for cpu, cuda in zip(probes[0].rows, probes[1].rows, strict=True):
        for key in ("variance", "exact_variance", "bound", "gradient_square", "bias_z"):
            assert cuda[key] == pytest.approx(cpu[key], rel=1e-4, abs=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["float", "qat-w8a8", "fqt-psq4"])
def test_a_model_on_cuda(kind):
    """Hooks run on autograd's device thread, and a Python stand-in is called from there."""
    model = model_of(kind).cuda()

    def stand_in(x: Tensor, spec: GradientSpec, number: int) -> Tensor:
        return quantrain.quantize_gradient(x, spec.bits, spec.quantizer)

    for quantize in (None, stand_in):
        with qnn.GradientProbe(model, ["per_sample:4", "householder:4"], quantize=quantize) as probe:
            for seed in range(2):
                model.zero_grad()
                model(images(seed).cuda()).square().mean().backward()
                probe.end_batch()
            qnn.enable_gradient_quant(model, False)
            probe.measure_network(lambda: model(images(0).cuda()).square().mean())
            qnn.enable_gradient_quant(model)
        for row in probe.rows:
            assert row["observations"] == 2 and abs(row["bias_z"]) < ALARM
            assert 0 < row["variance"] < 1.5 * row["bound"] and row["network_variance"] > 0
            assert (row["weight_variance"] is None) == (kind == "fqt-psq4")


def tiny(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """The model of the command-line tests."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, num_classes)
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run of quantrain finetune on scikit-learn's digits."""
    for package in ("matplotlib", "sklearn", "safetensors"):
        pytest.importorskip(package)
    from quantrain.finetune.cli import main

    folder = tmp_path_factory.mktemp("runs")
    words = "finetune --data digits --model test_gradient_probe:tiny --name t --epochs 1 --qat-epochs 1 --batch-size 64"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        arguments = [*words.split(), "--runs", str(folder), "--calibration-batches", "2", "--recipes"]
        assert main([*arguments, "fqt-psq5", "qat-w8a8"]) == 0
    return folder / "t"


@pytest.fixture
def command(monkeypatch):
    """``quantrain probe`` with arguments."""
    from quantrain.finetune.cli import main

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return lambda folder, *words: main(["probe", *map(str, (folder, "--model", "test_gradient_probe:tiny", *words))])


def test_command_line_on_a_run(run_folder, command, capsys):
    assert command(run_folder, "--batches", 3, "--draws", 4, "--network", 1) == 0
    text = capsys.readouterr().out
    assert "fqt-psq5.trained.safetensors: 3 batches of 64, 4 draws" in text
    assert "per_sample:5" in text and "bits needed" in text
    report = json.loads((run_folder / "probe" / "probe.json").read_text())
    assert {row["layer"] for row in report["rows"]} == {"0", "4"}
    assert all(row["observations"] == 3 and row["network_variance"] > 0 for row in report["rows"])
    assert {entry["basis"] for entry in report["advice"]} == {"network"}
    assert (run_folder / "probe" / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_on_checkpoints_and_other_recipes(run_folder, command, capsys, tmp_path):
    some = ("--batches", 2, "--draws", 4, "--out", tmp_path)
    assert (
        command(run_folder / "qat-w8a8.trained.safetensors", "--quantizers", "per_tensor:8,householder:5", *some) == 0
    )
    report = json.loads((tmp_path / "probe.json").read_text())
    assert [row["quantizer"]["bits"] for row in report["rows"]] == [8, 5, 8, 5]
    assert command(run_folder / "float32.safetensors", *some) == 0
    assert command(run_folder, "--recipe", "fqt-bhq4", *some) == 0
    assert "float32.safetensors" in capsys.readouterr().out
    report = json.loads((tmp_path / "probe.json").read_text())
    assert {(row["quantizer"]["quantizer"], row["quantizer"]["bits"]) for row in report["rows"]} == {("householder", 4)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/qat-w8a8.converted.safetensors"], "got a converted one"),
        (["{run}/config.json"], "expected a checkpoint"),
        (["{run}/plots"], "expected the config.json of a run"),
        (["{run}", "--quantizers", "psq:5"], "psq"),
        (["{run}", "--draws", "3"], "even number of draws"),
        (["{run}", "--recipe", "qat-w9a9"], "qat-w9a9"),
    ],
)
def test_command_line_errors(run_folder, command, capsys, words, message):
    assert command(*[word.format(run=run_folder) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("quantrain probe: error: ") and message in error


EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
def model(num_classes=10): ...
def dataset(): ...
"""


@pytest.mark.parametrize("option", ["model", "data"])
@pytest.mark.parametrize("words", [[], ["--{option}", "test_gradient_probe:tiny"], ["--{option}", "resnet20"]])
def test_a_folder_alone_makes_no_code_run(run_folder, capsys, tmp_path, monkeypatch, option, words):
    from quantrain.finetune.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_of_the_folder.py").write_text(EVIL)
    found = {**json.loads((run_folder / "config.json").read_text()), "model": "resnet20"}
    (tmp_path / "config.json").write_text(json.dumps({**found, option: f"evil_of_the_folder:{option}"}))
    assert main(["probe", str(tmp_path), *(word.format(option=option) for word in words)]) == 2
    error = capsys.readouterr().err
    assert f"--{option}: expected" in error and f"'evil_of_the_folder:{option}'" in error
    assert not (tmp_path / "ran").exists()


def test_a_built_in_model_needs_no_option(run_folder, tmp_path, capsys):
    from quantrain.finetune.cli import main
    from quantrain.finetune.models import resnet20

    qnn.save_checkpoint(tmp_path / "float32.safetensors", resnet20())
    found = json.loads((run_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**found, "model": "resnet20"}))
    assert main(["probe", str(tmp_path), "--batches", "2", "--batch-size", "4", "--draws", "4"]) == 0
    assert "float32.safetensors: 2 batches of 4" in capsys.readouterr().out
