"""One checkpoint, two languages: the C++ example and the Python trainer give the same logits and the same losses.

The C++ side is the built example ``finetune_fashion_mnist``, looked for in $QUANTRAIN_EXAMPLES_DIR and in the build folders.
"""

from __future__ import annotations

import copy
import gzip
import json
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from samples.examples import example, run_example, why_missing
from torch import Tensor, nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")

from safetensors.torch import load_file  # noqa: E402

from quantrain import Recipe  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain._C import FixedPointNetwork  # noqa: E402
from quantrain.finetune import data as image_data  # noqa: E402
from quantrain.finetune.distillation import Distilled  # noqa: E402
from quantrain.finetune.metrics import Metrics  # noqa: E402
from quantrain.finetune.models import resnet20  # noqa: E402
from quantrain.finetune.recipes import pruned  # noqa: E402
from quantrain.finetune.trainer import CLASSIFICATION, StopRequest, TrainSettings, train  # noqa: E402

NAME = "finetune_fashion_mnist"
CPU = torch.device("cpu")
STEPS = {
    "qat-w8a8": 50,
    "qat-w4a4": 15,
    "qat-w4a8": 15,
    "qat-w8a8-token": 15,
    # The same draws in both languages: one that differed would move the loss by far more than the bound.
    "fqt-bhq5": 15,
    "fqt-psq4-paper": 15,
}


EXAMPLE = example(NAME)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(EXAMPLE is None, reason=why_missing(NAME)),
]


def write_idx(path: Path, tensor: Tensor) -> None:
    header = struct.pack(f">BBBB{tensor.dim()}I", 0, 0, 8, tensor.dim(), *tensor.shape)
    path.write_bytes(gzip.compress(header + tensor.numpy().tobytes(), compresslevel=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten classes of noisy 28x28 patterns, in the files and under a folder name that mean Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("fashion-small")
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 160, (10, 28, 28), generator=generator)
    for part, rows in (("train", 160), ("t10k", 64)):
        labels = torch.arange(rows) % 10
        noise = torch.randint(0, 96, (rows, 28, 28), generator=generator)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", (patterns[labels] + noise).to(torch.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels.to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def data(folder) -> image_data.ImageData:
    return image_data.load_idx_folder(folder)


@pytest.fixture(scope="module")
def baseline() -> nn.Module:
    torch.manual_seed(0)
    return resnet20()


def prepared(baseline: nn.Module, data, recipe: str, batch_size: int) -> nn.Module:
    model = qnn.prepare(copy.deepcopy(baseline), Recipe.from_name(recipe))
    batches = image_data.calibration_batches(data, batch_size, 2, 0)
    qnn.calibrate(model, batches, forward=lambda module, batch: module(*batch[0]))
    return model


def python_losses(model: nn.Module, data, recipe: str, settings: TrainSettings, folder: Path, **more) -> list[float]:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(folder / "metrics.jsonl")
    state = folder / "state.pt"
    train(
        model, data, settings, stage=recipe, metrics=metrics, state_path=state, device=CPU, stop=StopRequest(), **more
    )
    return step_losses(folder / "metrics.jsonl", recipe)


def step_losses(path: Path, stage: str) -> list[float]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["stage"] == stage and entry["event"] == "step"]


@torch.inference_mode()
def python_logits(model: nn.Module, data) -> Tensor:
    model.eval()
    return torch.cat([model(*inputs) for inputs, _ in data.test_batches(256)])


def cpp_logits(checkpoint: Path, folder: Path, out: Path) -> Tensor:
    run_example(NAME, "--evaluate", "--checkpoint", checkpoint, "--data", folder, "--logits", out)
    return load_file(out)["logits"]


def relative_differences(mine: list[float], other: list[float]) -> list[float]:
    return [abs(a - b) / abs(a) for a, b in zip(mine, other, strict=True)]


def trained_alike(model, recipe, start, batch_size, steps, data, folder, tmp_path):
    """Trains `model` here and its file `start` in C++, with equal losses; C++'s folder."""
    settings = TrainSettings(epochs=3, lr=0.02, batch_size=batch_size, max_steps=steps)
    mine = python_losses(model, data, recipe, settings, tmp_path / "py")
    out = tmp_path / "cpp"
    common = ["--data", folder, "--output", out, "--epochs", 3, "--lr", 0.02, "--batch-size", batch_size]
    run_example(NAME, "--checkpoint", start, "--max-steps", steps, *common)
    theirs = step_losses(out / "metrics.jsonl", recipe)
    assert len(mine) == len(theirs) == steps
    assert max(relative_differences(mine, theirs)) <= 1e-4
    return out


@pytest.mark.parametrize("recipe", STEPS)
def test_losses_and_checkpoints_pass_between_the_languages(recipe, baseline, data, folder, tmp_path):
    batch_size, steps = 8, STEPS[recipe]
    model = prepared(baseline, data, recipe, batch_size)
    start = tmp_path / "prepared.safetensors"
    qnn.save_checkpoint(start, model, Recipe.from_name(recipe))
    torch.testing.assert_close(cpp_logits(start, folder, tmp_path / "l"), python_logits(model, data), rtol=0, atol=1e-5)

    out = trained_alike(model, recipe, start, batch_size, steps, data, folder, tmp_path)

    # What C++ wrote, Python reads, trained and converted; the conversion gives the same predictions.
    trained = qnn.prepare(copy.deepcopy(baseline), Recipe.from_name(recipe))
    qnn.load_checkpoint(out / f"{recipe}.trained.safetensors", trained)
    expected = cpp_logits(out / f"{recipe}.trained.safetensors", folder, tmp_path / "l")
    torch.testing.assert_close(python_logits(trained, data), expected, rtol=0, atol=1e-5)
    skeleton = qnn.convert(qnn.prepare(copy.deepcopy(baseline), Recipe.from_name(recipe)), check_observed=False)
    qnn.load_checkpoint(out / f"{recipe}.converted.safetensors", skeleton)
    torch.testing.assert_close(python_logits(skeleton, data), expected, rtol=0, atol=1e-5)

    # And the other way round, converted by Python.
    converted = qnn.convert(trained.eval())
    qnn.save_checkpoint(tmp_path / "converted.safetensors", converted, Recipe.from_name(recipe))
    torch.testing.assert_close(
        cpp_logits(tmp_path / "converted.safetensors", folder, tmp_path / "l"), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("recipe", ["f8net", "f8net-tiny"])
def test_fixed_point_networks_pass_between_the_languages(recipe, baseline, data, folder, tmp_path):
    batch_size, steps = 8, 15
    model = prepared(baseline, data, recipe, batch_size)
    start = tmp_path / "prepared.safetensors"
    qnn.save_checkpoint(start, model, Recipe.from_name(recipe))
    assert torch.equal(cpp_logits(start, folder, tmp_path / "l"), python_logits(model, data))

    out = trained_alike(model, recipe, start, batch_size, steps, data, folder, tmp_path)

    # Python's trained model, evaluated and converted by C++: the same bits.
    trained = tmp_path / "trained.safetensors"
    qnn.save_checkpoint(trained, model, Recipe.from_name(recipe))
    expected = python_logits(model, data)
    network = tmp_path / "network.safetensors"
    run_example(
        NAME, "--evaluate", "--checkpoint", trained, "--data", folder, "--logits", tmp_path / "l", "--network", network
    )
    assert torch.equal(load_file(tmp_path / "l")["logits"], expected)
    converted = qnn.convert(model)
    assert torch.equal(python_logits(converted, data), expected)
    ours, found = converted.network.tensors(), load_file(network)
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)

    # C++'s integer network, evaluated by C++ and read by Python; then Python's, evaluated by C++.
    integers = out / f"{recipe}.converted.safetensors"
    theirs_read = FixedPointNetwork.load(str(integers))
    images = torch.cat([inputs[0] for inputs, _ in data.test_batches(256)])
    read = theirs_read.dequantize_output(theirs_read(theirs_read.quantize_input(images)))
    assert torch.equal(cpp_logits(integers, folder, tmp_path / "l"), read)
    converted.network.save(str(tmp_path / "python.safetensors"))
    assert torch.equal(cpp_logits(tmp_path / "python.safetensors", folder, tmp_path / "l"), expected)


def test_cpp_calibrates_a_float_checkpoint_as_python_does(baseline, data, folder, tmp_path):
    qnn.save_checkpoint(tmp_path / "float32.safetensors", baseline)
    arguments = ["--checkpoint", tmp_path / "float32.safetensors", "--recipe", "ptq-w4a8", "--data", folder]
    run_example(NAME, *arguments, "--output", tmp_path / "cpp", "--batch-size", 16, "--calibration-batches", 2)
    expected = prepared(baseline, data, "ptq-w4a8", 16).state_dict()
    found = load_file(tmp_path / "cpp" / "ptq-w4a8.prepared.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    entries = [json.loads(line) for line in (tmp_path / "cpp" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["event"] for entry in entries] == ["eval"]
    assert entries[0].keys() == {"stage", "event", "step", "epoch", "accuracy", "loss"}


def test_cpp_trains_a_float_baseline_that_python_reads(data, folder, tmp_path):
    arguments = [
        "--data",
        folder,
        "--output",
        tmp_path,
        "--recipe",
        "ptq-w8a8",
        "--batch-size",
        32,
        "--calibration-batches",
        1,
    ]
    run_example(NAME, *arguments, "--float-epochs", 2)
    assert len(step_losses(tmp_path / "metrics.jsonl", "float32")) == 10
    model = resnet20()
    qnn.load_checkpoint(tmp_path / "float32.safetensors", model)
    assert torch.isfinite(python_logits(model, data)).all()


def test_ctrl_c_saves_a_checkpoint_that_goes_on(baseline, data, folder, tmp_path):
    model = prepared(baseline, data, "qat-w8a8", 16)
    qnn.save_checkpoint(tmp_path / "prepared.safetensors", model, Recipe.from_name("qat-w8a8"))
    out = tmp_path / "out"
    arguments = ["--checkpoint", tmp_path / "prepared.safetensors", "--data", folder, "--output", out, "--epochs", 2000]
    process = subprocess.Popen([str(part) for part in (EXAMPLE, *arguments)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted after step" in errors
    run_example(NAME, "--evaluate", "--checkpoint", out / "qat-w8a8.interrupted.safetensors", "--data", folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "w1a1"], "expected name to be one of qat-w8a8"),
        (["--lr", "fast"], "--lr: expected a number of at least 0, got 'fast'"),
        (["--batch-size", "1.5"], "--batch-size: expected a number of at least 0, got '1.5'"),
        (["--wrong"], "expected a flag of --help, got '--wrong'"),
        (["--lr"], "--lr: expected a value, got none"),
        (["--data", "/nonexistent"], "/nonexistent: expected the file train-images-idx3-ubyte.gz, got none"),
        (["--checkpoint", "/nonexistent"], "/nonexistent: expected a file that can be read"),
    ],
)
def test_cpp_refuses_bad_arguments_in_one_line(arguments, message, tmp_path):
    result = run_example(NAME, "--output", tmp_path / "out", *arguments, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_cpp_refuses_truncated_data_and_a_foreign_checkpoint(folder, tmp_path):
    for path in folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if "train-images" in path.name else content)
    result = run_example(NAME, "--data", tmp_path, "--output", tmp_path / "out", check=False)
    assert result.returncode == 1
    assert "train-images-idx3-ubyte.gz: expected" in result.stderr and "truncated or damaged" in result.stderr
    (tmp_path / "foreign").write_bytes(b"PK\x03\x04" + bytes(100))
    result = run_example(NAME, "--checkpoint", tmp_path / "foreign", "--data", folder, check=False)
    assert result.returncode == 1
    assert "foreign: expected a safetensors header" in result.stderr


def test_the_first_fifty_losses_on_fashion_mnist_agree(baseline, tmp_path):
    folder = image_data.fashion_mnist_folder()
    if folder is None:
        pytest.skip("Fashion-MNIST is not here: install dataset-fashion-mnist or set QUANTRAIN_DATA")
    data = image_data.load_fashion_mnist(download=False)
    model = prepared(baseline, data, "qat-w8a8", 32)
    start = tmp_path / "prepared.safetensors"
    qnn.save_checkpoint(start, model, Recipe.from_name("qat-w8a8"))
    settings = TrainSettings(epochs=0.5, lr=0.02, batch_size=32, max_steps=50)
    mine = python_losses(model, data, "qat-w8a8", settings, tmp_path / "py")
    run_example(
        NAME,
        "--checkpoint",
        start,
        "--output",
        tmp_path / "cpp",
        "--epochs",
        0.5,
        "--lr",
        0.02,
        "--max-steps",
        50,
        "--batch-size",
        32,
    )
    theirs = step_losses(tmp_path / "cpp" / "metrics.jsonl", "qat-w8a8")
    assert len(mine) == len(theirs) == 50
    assert max(relative_differences(mine, theirs)) <= 1e-4


@pytest.mark.parametrize("schedule", ["cubic", "one-shot"])
@pytest.mark.parametrize("taught", [False, True], ids=["labels", "taught"])
def test_the_first_fifty_losses_of_pruning_and_distillation_agree(taught, schedule, baseline, data, folder, tmp_path):
    """Train, prune, retrain, and the float model's answers: the same masks and the same losses in both languages."""
    recipe, steps = Recipe.from_name("qat-w8a8"), 50
    model = prepared(baseline, data, recipe.name, 8)
    start, out = tmp_path / "prepared.safetensors", tmp_path / "cpp"
    qnn.save_checkpoint(start, model, recipe)
    more = {"prune": pruned(recipe, 0.5, schedule).prune}
    if taught:
        teacher = copy.deepcopy(model)  # folded as C++'s is: 50 steps of rounding turn a last bit into a code
        qnn.enable_fake_quant(teacher, False)
        qnn.enable_observer(teacher, False)
        more["task"] = Distilled(CLASSIFICATION, teacher)
    settings = TrainSettings(epochs=3, lr=0.02, batch_size=8, max_steps=steps)
    mine = python_losses(model, data, recipe.name, settings, tmp_path / "py", **more)
    common = ["--data", folder, "--output", out, "--epochs", 3, "--lr", 0.02, "--batch-size", 8, "--max-steps", steps]
    common += ["--prune", 0.5, "--schedule", schedule, *(["--distill"] if taught else [])]
    run_example(NAME, "--checkpoint", start, *common)
    theirs = step_losses(out / "metrics.jsonl", recipe.name)
    assert len(mine) == len(theirs) == steps
    assert max(relative_differences(mine, theirs)) <= 1e-4
    trained = load_file(out / f"{recipe.name}.trained.safetensors")
    masks = {name: value for name, value in model.state_dict().items() if name.endswith("weight_mask")}
    assert masks and sorted(masks) == sorted(name for name in trained if name.endswith("weight_mask"))
    differing = sum(int((masks[name] != trained[name]).sum()) for name in masks)
    assert differing <= sum(mask.numel() for mask in masks.values()) // 1000  # near ties of 8 weights to a byte
    zeros = sum(int((trained[name.removesuffix("_mask")] == 0).sum()) for name in masks)
    assert zeros > 0
