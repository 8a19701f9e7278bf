"""The study of gradient quantizers: its parts in their tiny form, its optimizer and schedule, its figures and tables."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "studies" / "gradient_quant" / "study.py"
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("matplotlib")

from common import captured, data, tasks  # noqa: E402
from studies.gradient_quant import accuracy, figures, results, tables, variance  # noqa: E402
from studies.gradient_quant.recipes import prepared, recipe_of  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The results of every part in its tiny form, on random data."""
    out = tmp_path_factory.mktemp("study")
    flags = ["--quick", "--data", "random", "--device", "cpu", "--recipes", "qat-w8a8,fqt-bhq4", "--no-page"]
    command = [sys.executable, str(SCRIPT), "all", *flags, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def rows_of(folder: Path, part: str) -> list[dict]:
    return results.newest(folder, part)[1]["rows"]


def test_the_tiny_study_measures_every_case(quick):
    rows = rows_of(quick, "variance")
    cases = {(row["model"], row["mode"], row["quantizer"], row["bits"]) for row in rows}
    assert len(cases) == len(rows) == 2 * 2 * 4 * 2
    for row in rows:
        assert row["variance"] > 0 and row["batch_variance"] > 0, row
        # K ||mean||^2 / mean ||error||^2 of K unbiased draws has the mean 1; a bias as large as the noise would make it K = 2.
        assert 0.3 < row["bias"] < 1.7, row
    assert {row["recipe"] for row in rows_of(quick, "accuracy")} == {"qat-w8a8", "fqt-bhq4"}
    assert all(0 <= row["resnet20"]["value"] <= 100 and row["gpt"]["value"] > 0 for row in rows_of(quick, "accuracy"))
    assert all(row["ms"] > 0 for row in rows_of(quick, "step"))


@pytest.mark.parametrize("quantizer", results.QUANTIZERS)
def test_four_bits_make_more_noise_than_eight(quick, quantizer):
    noise = {
        (row["model"], row["mode"], row["bits"]): row["variance"]
        for row in rows_of(quick, "variance")
        if row["quantizer"] == quantizer
    }
    for model in ("resnet20", "gpt"):
        for mode in ("hardware", "paper"):
            # (255/15)^2 = 289 for grad_input's own noise; grad_weight's 8 bits add the same to both.
            assert noise[model, mode, 4] > 3 * noise[model, mode, 8]


def test_the_page_takes_the_results_over(quick, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- measured: variance -->\nstale\n<!-- end -->\nb\n<!-- measured: accuracy -->\n<!-- end -->\n"
    )
    figures.draw_all(quick, tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert names == {f"gradient_quant_{name}.png" for name in ("householder", "variance", "accuracy")}
    tables.fill(page, quick, tmp_path / "figures")
    text = page.read_text()
    assert "stale" not in text and "| `householder` |" in text and "](figures/gradient_quant_accuracy.png)" in text
    assert tables.step_text(*results.newest(quick, "step")).count("`fqt-bhq5`") == 2
    tables.fill(page, quick, tmp_path / "figures")
    assert page.read_text() == text


def test_a_page_without_results_says_so(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: step -->\n<!-- end -->\n")
    tables.fill(page, tmp_path, tmp_path)
    assert "No result is committed yet" in page.read_text()


def test_momentum_is_that_of_pytorch():
    torch.manual_seed(0)
    ours = nn.Linear(3, 2)
    theirs = copy.deepcopy(ours)
    lr = torch.tensor(0.1)
    optimizer = captured.Momentum(ours.parameters(), lr)
    reference = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    for step in range(6):
        lr.fill_(0.1 / (step + 1))
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        x = torch.randn(4, 3)
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            model(x).square().sum().backward()
            stepper.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_the_schedule_rises_and_falls():
    rates = [captured.learning_rate(step, 100, 0.2) for step in range(100)]
    assert max(rates) == rates[9] == pytest.approx(0.2) and rates[0] == pytest.approx(0.02) and 0 < rates[-1] < 1e-3


def test_crops_and_flips_move_pixels_within_the_image():
    images = data.random_images(32, 16)
    task = tasks.ImageTask(images, 8, "cpu")
    index = torch.arange(8)
    plain, labels = task.batch(index, augment=False)
    wanted = (images.train_images[:8].float() / 255 - torch.tensor(tasks.MEAN).view(1, 3, 1, 1)) / torch.tensor(
        tasks.STD
    ).view(1, 3, 1, 1)
    torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, images.train_labels[:8])
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        moved, _ = task.batch(index)
        row, column = divmod(int((moved[0, 0, 8:24, 8:24] - plain[0, 0, 16, 16]).abs().argmin()), 16)
        seen.add((row, column))
        assert moved.shape == plain.shape
    assert len(seen) > 10  # 2 * 81 places of the middle pixel


def test_runs_come_seed_after_seed_and_stop_in_time():
    runs = accuracy.runs_of(("a", "b"), 2)
    assert [(run.recipe, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    saved = []
    failed = accuracy.run_all(runs, lambda run: [sys.executable, "-c", "raise SystemExit(3)"], 2, 1e9, saved.append)
    assert (failed, saved) == (4, [])
    reply = f"print({accuracy.MARK + json.dumps({'recipe': 'a', 'seed': 0})!r})"
    assert accuracy.run_all(runs, lambda run: [sys.executable, "-c", reply], 2, 1e9, saved.append) == 0
    assert len(saved) == 4
    assert accuracy.run_all(runs, lambda run: [sys.executable, "-c", reply], 2, 0.0, saved.append) == 0
    assert len(saved) == 4


def test_epochs_fit_the_time():
    trial = {"resnet20": {"seconds": 3.0, "steps": 300}, "gpt": {"seconds": 1.0, "steps": 200}, "wall": 12.0}
    epochs = accuracy.chosen_epochs(trial, 480, 33, 4, 195, 1000)
    total = 33 * (epochs * 195 * 0.01 + 1000 * 0.005)
    assert epochs >= 3 and total < 480
    assert accuracy.chosen_epochs(trial, 10, 33, 4, 195, 1000) == 3


def test_preserving_zero_is_asked_for():
    assert recipe_of("per_sample, zero kept", 5).scheme.grad_input.preserve_zero
    assert not recipe_of("per_sample", 5).scheme.grad_input.preserve_zero
    assert recipe_of("householder", 6).scheme.grad_input.bits == 6


def test_draws_differ_and_the_exact_gradient_does_not():
    task = tasks.TextTask(
        data.random_text(4000), tasks.GPTConfig(layers=1, heads=2, width=32, context=16, vocab=256), 4, "cpu"
    )
    batch = task.batch(torch.arange(4))
    exact = variance.gradients(task, prepared(task, task.model(0), variance.QAT), batch, 2)
    assert torch.equal(exact[0], exact[1]) and float(exact[0].abs().max()) > 0
    noisy = variance.gradients(task, prepared(task, task.model(0), "fqt-psq4"), batch, 2)
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["float", "qat-w8a8", "fqt-bhq5", "fqt-ptq8-paper"])
def test_a_step_trains_both_networks(device, recipe):
    for task, lr in (
        (tasks.ImageTask(data.random_images(256, 64), 16, device), 0.02),
        (
            tasks.TextTask(
                data.random_text(),
                tasks.GPTConfig(layers=1, heads=2, width=32, context=16, vocab=256),
                16,
                device,
            ),
            1e-2,
        ),
    ):
        captured.set_precision("fp32")
        step = captured.TrainingStep(task, prepared(task, task.model(0), recipe), "fp32")
        assert (step.graph is not None) == (device == "cuda")
        losses = []
        for index in task.indices(0, 24):
            step(index, lr)
            losses.append(step.mean_loss(1))
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), (task.name, losses)


@pytest.mark.cuda
def test_replays_draw_new_numbers():
    task = tasks.ImageTask(data.random_images(64, 16), 16, "cuda")
    step = captured.TrainingStep(task, prepared(task, task.model(0), "fqt-psq4"), "fp32")
    index = next(iter(task.indices(0, 1)))
    losses = []
    for _ in range(6):  # learning rate 0: only crops and flips change the loss
        step(index, 0.0)
        losses.append(step.mean_loss(1))
    assert len({round(loss, 6) for loss in losses}) > 1
