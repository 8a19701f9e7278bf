"""The language-model loops: both languages take the same steps, resume exactly, and read each other's checkpoints.

The C++ side is the built example ``train_gpt``, looked for in $QUANTRAIN_EXAMPLES_DIR and in the build folders.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from samples.examples import example, why_missing

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
pytest.importorskip("quantrain.amp", reason="the compiled library has no loss scaler")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import quantrain.nn as qnn  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "examples" / "python"
sys.path.insert(0, str(SCRIPTS))

import train_gpt  # noqa: E402
from gpt import FLOAT_LAYERS, GPT, GPTConfig, init_weights, loss_of  # noqa: E402

TINY = shlex.split("--layers 2 --heads 2 --width 32 --context 16 --batch-size 4 --threads 1 --eval-batches 2")
TRAINING = shlex.split("--steps 100 --warmup 10 --accumulate 2 --dropout 0.1 --eval-every 50 --save-every 0")
# A first scale that overflows float16, and a short interval, so that the scale moves both ways.
FP16 = shlex.split("--precision fp16 --init-scale 1073741824 --growth-interval 20")
PRECISIONS = {"fp32": ["--precision", "fp32"], "bf16": ["--precision", "bf16"], "fp16": FP16}
BROKEN_AT, RESUMED_TO = 20, 45


def command(language: str) -> list[str]:
    if language == "python":
        return [sys.executable, str(SCRIPTS / "train_gpt.py")]
    if example("train_gpt") is None:
        pytest.skip(why_missing("train_gpt"))
    return [str(example("train_gpt"))]


both = pytest.mark.parametrize("language", ["python", "c++"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums are equal in both languages where the number of threads is."""
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Eight thousand bytes of words."""
    words = shlex.split("the of and to in is that for it as was with be by on not he his but at are this have")
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = random.Random(0)
    path.write_text(" ".join(generator.choice(words) for _ in range(2100))[:8000], encoding="ascii")
    return path


class Runs:
    """Runs of the tiny model, each made once: ``runs("c++", "fp16")`` is the folder of the unbroken one."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.text = root, text

    def start(self, language: str, out: Path, *flags: object) -> int:
        """One run's exit status; what it prints is printed. Python runs in this process, which saves importing torch."""
        arguments = ["--data", str(self.text), "--out", str(out), *TINY, *[str(flag) for flag in flags]]
        if language == "python":
            return train_gpt.main(arguments)
        result = subprocess.run([*command(language), *arguments], capture_output=True, text=True, timeout=300)
        sys.stdout.write(result.stdout)
        sys.stderr.write(result.stderr)
        return result.returncode

    def __call__(self, language: str, precision: str, *flags: object, name: str = "whole") -> Path:
        out = self.root / f"{language}-{precision}-{name}"
        if not out.exists():
            arguments = [*TRAINING, *PRECISIONS[precision], "--no-tensorboard", *flags]
            assert self.start(language, out, *arguments) == 0
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), text)


def entries(out: Path, event: str = "step") -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def column(out: Path, name: str, event: str = "step") -> list[float]:
    return [entry[name] for entry in entries(out, event)]


def relative_difference(mine: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3), ("fp16", 1e-3)])
def test_the_first_hundred_losses_agree(precision, tolerance, runs):
    mine, theirs = runs("python", precision), runs("c++", precision)
    losses = column(mine, "loss")
    assert len(losses) == 100
    assert losses[-1] < 0.8 * losses[0]
    assert relative_difference(losses, column(theirs, "loss")) <= tolerance
    assert relative_difference(column(mine, "loss", "eval"), column(theirs, "loss", "eval")) <= tolerance
    assert column(mine, "lr") == column(theirs, "lr")
    assert column(mine, "scale") == column(theirs, "scale")
    if precision == "fp16":
        scales = column(mine, "scale")
        assert column(mine, "skipped") == column(theirs, "skipped")
        assert column(mine, "skipped")[-1] > 0
        assert any(after > before for before, after in zip(scales, scales[1:], strict=False))


def test_checkpoints_of_both_languages_have_the_same_form(runs):
    paths = [runs(language, "fp16") / "checkpoint.safetensors" for language in ("python", "c++")]
    mine, theirs = (load_file(path) for path in paths)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].numel() == theirs[name].numel() for name in mine)
    metadata = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            metadata.append(file.metadata())
    for key in ("format", "version", "step", "skipped", "recipe"):
        assert metadata[0][key] == metadata[1][key]
    for key in ("scaler", "config", "settings"):
        assert json.loads(metadata[0][key]) == json.loads(metadata[1][key])


@both
def test_a_resumed_run_equals_an_unbroken_one(language, runs):
    whole = runs(language, "fp16")
    broken = runs(language, "fp16", "--max-steps", BROKEN_AT, name="broken")
    resumed = runs.root / f"{language}-resumed"
    shutil.copytree(broken, resumed)
    flags = [*TRAINING, *FP16, "--no-tensorboard", "--max-steps", RESUMED_TO]
    assert runs.start(language, resumed, *flags) == 0
    for name in ("loss", "scale", "skipped", "grad_norm"):
        assert column(resumed, name) == column(whole, name)[:RESUMED_TO], name


@both
def test_one_language_resumes_the_other(language, runs):
    other = "c++" if language == "python" else "python"
    broken = runs(other, "fp16", "--max-steps", BROKEN_AT, name="broken")
    resumed = runs.root / f"{language}-resumes-{other}"
    shutil.copytree(broken, resumed)
    flags = [*TRAINING, *FP16, "--no-tensorboard", "--max-steps", RESUMED_TO]
    assert runs.start(language, resumed, *flags) == 0
    own = column(runs(language, "fp16"), "loss")[:RESUMED_TO]
    assert relative_difference(column(resumed, "loss"), own) <= 1e-3
    assert column(resumed, "scale") == column(runs(language, "fp16"), "scale")[:RESUMED_TO]


@both
def test_init_takes_the_weights_alone(language, runs):
    start = runs("python", "fp32") / "checkpoint.safetensors"
    out = runs.root / f"{language}-init"
    assert runs.start(language, out, "--init", start, "--steps", 3, "--no-tensorboard") == 0
    assert len(entries(out)) == 3
    assert entries(out)[0]["loss"] < 0.8 * column(runs("python", "fp32"), "loss")[0]


def test_a_recipe_trains_alike_in_both_languages(runs):
    flags = ["--recipe", "qat-w4a4", "--calibration-batches", 2, "--max-steps", 10]
    mine, theirs = (runs(language, "fp16", *flags, name="recipe") for language in ("python", "c++"))
    assert relative_difference(column(mine, "loss"), column(theirs, "loss")) <= 1e-3
    tensors = [load_file(out / "checkpoint.safetensors") for out in (mine, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    assert "h.0.attn.c_attn.input_fake_quant.scale" in tensors[0]
    assert not any(name.startswith("wte.") and "fake_quant" in name for name in tensors[0])


def test_int8_training_draws_the_same_in_both_languages(runs):
    flags = ["--recipe", "int8-training", "--accumulate", 2, "--steps", 60]
    mine, theirs = (runs(language, "bf16", *flags, name="int8") for language in ("python", "c++"))
    losses = column(mine, "loss")
    assert relative_difference(losses, column(theirs, "loss")) <= 1e-3
    assert losses[-1] < 0.9 * losses[0]
    exact = column(runs("python", "bf16", "--accumulate", 2, "--steps", 60, name="accumulated"), "loss")
    assert 0 < relative_difference(losses, exact) < 0.02
    names = [set(load_file(out / "checkpoint.safetensors")) for out in (mine, theirs)]
    assert names[0] == names[1] and not any("fake_quant" in name for name in names[0])


def test_a_float_checkpoint_starts_quantization_aware_training(runs):
    start = runs("python", "fp32") / "checkpoint.safetensors"
    losses = []
    for language in ("python", "c++"):
        out = runs.root / f"{language}-qat-init"
        flags = ["--init", start, "--recipe", "qat-w8a8", "--steps", 3, "--no-tensorboard"]
        assert runs.start(language, out, *flags) == 0
        losses.append(column(out, "loss"))
    assert relative_difference(*losses) <= 1e-4
    assert losses[0][0] < 0.8 * column(runs("python", "fp32"), "loss")[0]


@pytest.mark.parametrize("recipe", ["qat-w8a8", "qat-w4a4", "qat-w8a8-token"])
def test_a_power_of_two_scale_leaves_quantized_gradients_bit_for_bit(recipe):
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=32, context=16, vocab=256))
    init_weights(model, 2)
    qnn.prepare(model, recipe, skip=FLOAT_LAYERS)
    tokens = torch.randint(256, (4, 17))
    qnn.calibrate(model, [tokens[:, :-1]])
    qnn.enable_observer(model, False)  # ranges would follow the first pass
    gradients = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        (loss_of(model(tokens[:, :-1]), tokens[:, 1:]) * scale).backward()
        gradients.append([parameter.grad / scale for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@both
def test_ctrl_c_saves_and_the_same_command_goes_on(language, runs, text):
    out = runs.root / f"{language}-stopped"
    flags = ["--steps", "1000000", "--eval-every", "0", "--save-every", "0", "--no-tensorboard"]
    arguments = ["--data", str(text), "--out", str(out), *TINY, *flags]
    process = subprocess.Popen([*command(language), *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted after step" in errors
    done = len(entries(out))
    assert done > 0
    assert runs.start(language, out, *flags, "--max-steps", done + 1) == 0
    assert column(out, "step") == list(range(done + 1))


def test_tensorboard_reads_the_events_of_the_cpp_example(runs):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    out = runs.root / "c++-tensorboard"
    for last in (2, 4):
        assert runs.start("c++", out, "--steps", 4, "--max-steps", last) == 0
    files = sorted((out / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    events = [event for path in files for event in loader.EventFileLoader(str(path)).Load()]
    scalars = [(event.step, value) for event in events for value in event.summary.value]
    found = [(step, value.tensor.float_val[0]) for step, value in scalars if value.tag == "step/loss"]
    expected = [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in entries(out)]
    assert found == expected
    assert {value.tag for _, value in scalars} >= {"step/lr", "step/scale", "step/grad_norm", "eval/loss"}
    assert [event.step for event in events if event.HasField("session_log")] == [2]


@both
def test_benchmark_prints_one_json_line_and_writes_nothing(language, runs, tmp_path, capfd):
    assert runs.start(language, tmp_path / "out", "--benchmark", 2, "--precision", "bf16") == 0
    line = json.loads(capfd.readouterr().out)
    keys = "language precision captured batch context step_ms_median host_ms_median peak_memory_bytes final_loss"
    assert list(line) == keys.split()
    assert (line["language"], line["precision"], line["batch"]) == (language, "bf16", 4)
    assert line["step_ms_median"] > 0 and line["peak_memory_bytes"] > 0
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cuda_run(runs):
    """Runs on the GPU."""

    def run(language: str, name: str, *flags: object) -> Path:
        out = runs.root / f"{language}-cuda-{name}"
        status = runs.start(language, out, "--device", "cuda", "--eval-every", 0, "--no-tensorboard", *flags)
        assert status == 0
        return out

    return run


@pytest.mark.cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_captured_step_trains_as_kernel_by_kernel(precision, cuda_run):
    flags = ["--steps", 60, "--warmup", 10, "--accumulate", 2, *PRECISIONS[precision]]
    eager = cuda_run("c++", f"{precision}-eager", *flags)
    captured = cuda_run("c++", f"{precision}-captured", *flags, "--captured")
    python = cuda_run("python", precision, *flags)
    for other in (captured, python):
        assert relative_difference(column(eager, "loss"), column(other, "loss")) <= 1e-3
        assert column(eager, "scale") == column(other, "scale")
        assert column(eager, "skipped") == column(other, "skipped")


@pytest.mark.cuda
def test_dropout_varies_between_replays(cuda_run, tmp_path):
    (tmp_path / "same.txt").write_bytes(b"a" * 1000)  # every batch is the same, and nothing is learned at lr 0
    flags = ["--data", tmp_path / "same.txt", "--steps", 12, "--lr", 0, "--captured"]
    varied = column(cuda_run("c++", "dropout", *flags, "--dropout", 0.5), "loss")
    constant = column(cuda_run("c++", "no-dropout", *flags), "loss")
    assert len(set(varied[4:])) == len(varied[4:])
    assert len({round(loss, 4) for loss in constant}) == 1


INJECT = """
import json, os, sys
sys.path.insert(0, {scripts!r})
import torch
import train_gpt

rank, steps = int(os.environ["RANK"]), 0

def inject(gradient):
    global steps
    steps += 1
    return gradient + torch.inf if rank == 1 and steps == 4 else gradient

def train(trainer, stop, whole=train_gpt.train):
    trainer.model.ln_f.bias.register_hook(inject)
    status = whole(trainer, stop)
    checksum = sum(float(p.detach().double().sum()) for p in trainer.model.parameters())
    result = {{"scale": trainer.scaler.get_scale(), "skipped": trainer.skipped, "checksum": checksum}}
    open({out!r} + "/rank" + str(rank), "w").write(json.dumps(result))
    return status

train_gpt.train = train
sys.exit(train_gpt.main(sys.argv[1:]))
"""


def test_two_ranks_skip_together_where_one_has_an_infinite_gradient(runs, text, tmp_path):
    script = tmp_path / "inject.py"
    script.write_text(INJECT.format(scripts=str(SCRIPTS), out=str(tmp_path)))
    flags = ["--precision", "fp16", "--init-scale", "1024", "--steps", "8", "--warmup", "2", "--no-tensorboard"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    arguments = ["--data", text, "--out", tmp_path / "ranks", *TINY, *flags]
    result = subprocess.run([*map(str, torchrun), *map(str, arguments)], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert (first["skipped"], first["scale"]) == (1, 512.0)
    assert column(tmp_path / "ranks", "skipped") == [0, 0, 0, 1, 1, 1, 1, 1]
    assert entries(tmp_path / "ranks")[3]["grad_norm"] is None
    # Without dropout, two ranks of two sequences are one process of four; the step after the skipped one differs.
    assert runs.start("python", tmp_path / "one", *flags) == 0
    assert relative_difference(column(tmp_path / "ranks", "loss")[:4], column(tmp_path / "one", "loss")[:4]) <= 1e-3
    assert "rng.cpu.1" in load_file(tmp_path / "ranks" / "checkpoint.safetensors")


ERRORS = {
    "preset": (["--preset", "big"], "expected --preset small or gpt2, got 'big'"),
    "heads": (["--heads", "3"], "expected --width to be a multiple of --heads, got 32 and 3"),
    "least": (["--accumulate", "0"], "expected --accumulate of at least 1, got 0"),
    "flag": (["--wrong", "1"], "expected arguments of --help, got "),
    "number": (["--lr", "fast"], "'fast'"),
    "post-training": (["--recipe", "ptq-w8a8"], "expected --recipe for training (qat-...), got 'ptq-w8a8'"),
    "no recipe": (["--recipe", "w1a1"], "expected name to be one of qat-w8a8"),
    "no GPU": (["--device", "cuda"], "expected a GPU for --device cuda, got none"),
    "no file": (["--data", "/nonexistent"], "/nonexistent: expected a text file, got none"),
}


@both
@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_are_refused_in_one_line(language, case, runs, tmp_path, capfd):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags, message = ERRORS[case]
    assert runs.start(language, tmp_path / "out", *flags) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("train_gpt: ") and message in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@both
@pytest.mark.parametrize("size", [0, 169])
def test_a_text_that_is_too_short_is_named(language, size, runs, tmp_path, capfd):
    (tmp_path / "short.txt").write_bytes(b"a" * size)
    assert runs.start(language, tmp_path / "out", "--data", tmp_path / "short.txt") == 1
    message = f"short.txt: expected at least 170 bytes (10 times --context + 1), got {size} bytes"
    assert message in capfd.readouterr().err


@both
def test_no_data_is_said(language, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("QUANTRAIN_DATA", raising=False)
    if language == "python":
        assert train_gpt.main(["--out", str(tmp_path / "out")]) == 1
    else:
        assert subprocess.run([*command(language), "--out", str(tmp_path / "out")]).returncode == 1
    message = "expected --data FILE or $QUANTRAIN_DATA/tinyshakespeare/input.txt, got neither"
    assert message in capfd.readouterr().err


@both
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", 64], "expected a checkpoint with the size width = 64, got 32"),
        (["--recipe", "qat-w8a8"], "expected a checkpoint of recipe qat-w8a8, got none"),
        (["--lr", 0.5], "expected a checkpoint with the setting lr = 0.5, got 0.001"),
        (["--precision", "bf16"], "expected a checkpoint with the setting precision = bf16, got fp32"),
    ],
)
def test_another_trainings_checkpoint_is_refused(language, flags, message, runs, capfd):
    out = runs("python", "fp32")
    before = (out / "checkpoint.safetensors").read_bytes()
    assert runs.start(language, out, *TRAINING, *flags) == 1
    assert message in capfd.readouterr().err
    assert (out / "checkpoint.safetensors").read_bytes() == before


@both
def test_a_damaged_or_foreign_checkpoint_is_refused(language, runs, tmp_path, capfd):
    content = (runs("python", "fp32") / "checkpoint.safetensors").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.safetensors").write_bytes(content[: len(content) // 2])
    assert runs.start(language, out) == 1
    qnn.save_checkpoint(out / "other.safetensors", torch.nn.Linear(2, 2))
    assert runs.start(language, tmp_path / "fresh", "--init", out / "other.safetensors") == 1
    assert "expected metadata format quantrain-train-gpt 1, got quantrain 1" in capfd.readouterr().err
