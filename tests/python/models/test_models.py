"""Public models through the whole flow: prepare, calibrate, train two steps, convert, save, and load in a fresh process."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from model_zoo import NEEDS, ZOO, built, output_of

import quantrain.nn as qnn

pytestmark = pytest.mark.usefixtures("one_thread")

# What stays in floating point beside norms and the class of which it is (docs/models.md lists it); {} where nothing does.
LEFT_FLOAT = {
    "convnext": {"CNBlock"},
    "vision-transformer": {"VisionTransformer", "Encoder", "MultiheadAttention", "NonDynamicallyQuantizableLinear"},
    "swin": {"ShiftedWindowAttention", "Linear"},
    "transformer-encoder": {"MultiheadAttention", "NonDynamicallyQuantizableLinear"},
    "hf-vit": {"ViTEmbeddings"},
    "hf-dinov2": {"Dinov2Embeddings"},
    "hf-siglip": {"SiglipMultiheadAttentionPoolingHead", "MultiheadAttention", "NonDynamicallyQuantizableLinear"},
    "hf-deberta-v2": {"Embedding"},
    "hf-mixtral": {"MixtralTopKRouter", "MixtralExperts"},
    "hf-whisper": {"WhisperPositionalEmbedding"},
    "hf-swin": {"SwinRelativePositionBias"},
    "hf-mamba": {"MambaMixer", "Conv1d", "Linear"},
}
# More than a tenth of the parameters: prepare warns.
WARNED = {"vision-transformer", "swin", "transformer-encoder", "hf-mixtral"}


def needed(name: str) -> None:
    package = NEEDS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} needs the package {package}: pip install 'quantrain[hf,data]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def flow(name: str, recipe: str, folder: Path | None = None) -> torch.nn.Module:
    """Runs all of it and asserts that converted equals simulated; the converted model."""
    model, batch = built(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()
        with torch.no_grad():
            output_of(model, batch)  # batch norms have seen a batch
        qnn.prepare(model, recipe)
        qnn.calibrate(model, [batch])
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            loss = output_of(model, batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        model.eval()
        with torch.no_grad():
            simulated = output_of(model, batch)
            before = dict(model.quantization_summary.left_float)
            qnn.convert(model)
            assert torch.equal(output_of(model, batch), simulated)
    model.warnings = [str(w.message) for w in caught if str(w.message).startswith(("prepare:", "convert:"))]
    if folder is not None:
        added = [left for left in model.quantization_summary.left_float if left not in before]
        qnn.save_checkpoint(folder / f"{name}.safetensors", model)
        torch.save(simulated, folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps({"recipe": recipe, "skip": added}))
    return model


@pytest.mark.parametrize("name", ZOO)
def test_flow(name, folder):
    needed(name)
    model = flow(name, "qat-w8a8", folder)
    modules = dict(model.named_modules())
    left = {type(modules[path]).__name__ for path in model.quantization_summary.left_float}
    assert left == LEFT_FLOAT.get(name, set())
    assert any("% of the parameters stay in floating point" in w for w in model.warnings) == (name in WARNED)
    assert any(w.startswith("convert:") for w in model.warnings) == (name in ("hf-deberta-v2", "hf-mamba"))


@pytest.mark.parametrize("name", ZOO)
def test_flow_in_four_bits(name):
    needed(name)
    flow(name, "qat-w4a4")


@pytest.mark.parametrize("name", [name for name in ZOO if name != "hf-mamba"])
def test_flow_with_dynamic_ranges(name):
    needed(name)
    flow(name, "qat-w8a8-token")


def test_a_function_that_reads_a_weight_is_named_where_nothing_is_observed():
    needed("hf-mamba")
    model, batch = built("hf-mamba")
    qnn.prepare(model, "qat-w8a8-token").eval()
    simulated = output_of(model, batch)
    with pytest.warns(UserWarning, match="not called since .*mixer.dt_proj.*skip="):
        qnn.convert(model, inplace=False)
    qnn.convert(model, skip=["*.conv1d", "*.dt_proj"])
    assert torch.equal(output_of(model, batch), simulated)


def test_every_file_loads_in_a_fresh_process(folder):
    names = [name for name in ZOO if importlib.util.find_spec(NEEDS[name]) is not None]
    for name in names:
        if not (folder / f"{name}.json").exists():
            flow(name, "qat-w8a8", folder)
    program = Path(__file__).with_name("model_zoo.py")
    result = subprocess.run([sys.executable, str(program), str(folder)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


def test_the_page_lists_the_models_and_what_stays_float():
    page = (Path(__file__).resolve().parents[3] / "docs" / "models.md").read_text()
    rows = {cells[1].strip(" `"): cells[3] for line in page.splitlines() if len(cells := line.split("|")) == 5}
    assert rows.keys() - {"test", "---"} == ZOO.keys()
    for name in ZOO:
        named = {word for word in re.findall(r"`(\w+)`", rows[name]) if word not in ("convert",)}
        assert named == LEFT_FLOAT.get(name, set()), name
