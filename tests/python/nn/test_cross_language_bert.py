"""One converted BERT in both languages: serve_bert gives what transformers' model gives whose blocks Python fused.

The C++ side is the built example, looked for in $QUANTRAIN_EXAMPLES_DIR and in the build folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from samples.examples import run_example
from torch import Tensor, nn

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
transformers = pytest.importorskip("transformers")

from quantrain import nn as qnn  # noqa: E402
from quantrain import ptq  # noqa: E402
from quantrain.nn.int8_blocks import unfuse_int8_blocks  # noqa: E402

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "num_labels": 3,
}
RECIPES = ["int8-training", "int8-static", "zeroquant-w8a8", "llm-int8"]
LENGTHS = {"one length": [24] * 6, "several lengths": [24, 3, 17, 48, 1, 9]}
KINDS = {"classifier": transformers.BertForSequenceClassification, "pooler": transformers.BertModel}

Rows = list[list[int]]

pytestmark = pytest.mark.usefixtures("one_thread")


def float_model(kind: str = "classifier", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind](transformers.BertConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "embeddings" in name else 0.15
            parameter.copy_(torch.randn_like(parameter) * spread + name.endswith("LayerNorm.weight"))
    return model


def sequences(lengths: Sequence[int], seed: int = 1) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def batch_of(rows: Rows) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def converted(model: nn.Module, recipe: str, **options: object) -> nn.Module:
    """The model under the recipe, calibrated on padded batches where it needs that."""
    batches = [batch_of(sequences([24, 48, 12], seed)) for seed in (2, 3)]
    if qnn.as_recipe(recipe).scheme.kind == "ptq":
        return ptq.quantize(model, recipe, batches, check_batch=False)
    model = qnn.prepare(model, recipe)
    with torch.no_grad():
        return qnn.convert(qnn.calibrate(model, batches) if recipe == "int8-static" else model, **options)


def saved(folder: Path, model: nn.Module, **changes: object) -> Path:
    """A folder as serve_bert takes it."""
    folder.mkdir(exist_ok=True)
    fields = json.loads(model.config.to_json_string(use_diff=False)) | changes
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    qnn.save_checkpoint(folder / "model.safetensors", model)
    return folder


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return getattr(model, "bert", model).encoder.layer


def expected_rows(model: nn.Module, rows: Rows) -> Tensor:
    with torch.no_grad():
        output = model(**batch_of(rows))
    return output.logits if hasattr(output, "logits") else output.pooler_output[:, :8]


def write_ids(path: Path, rows: Rows) -> Path:
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows), encoding="ascii")
    return path


def served(folder: Path, rows: Rows, *flags: object) -> tuple[Tensor, list[str]]:
    """What serve_bert prints: values by line, and what it says about them."""
    ids = write_ids(folder / "ids.txt", rows)
    lines = run_example("serve_bert", "--folder", folder, "--ids", ids, *flags).stdout.splitlines()
    values = [[float(word) for word in line.split()] for line in lines if not line.startswith("#")]
    return torch.tensor(values), [line for line in lines if line.startswith("#")]


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=RECIPES)
def models(request, tmp_path_factory) -> dict[str, tuple[nn.Module, Path]]:
    """Both kinds of model under a recipe, with their folders."""
    root = tmp_path_factory.mktemp("bert")
    made = {kind: converted(float_model(kind), request.param) for kind in KINDS}
    return {kind: (model, saved(root / kind, model)) for kind, model in made.items()}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_pythons(kind, lengths, models):
    model, folder = models[kind]
    assert all(type(block).__name__ == "Int8BertLayer" for block in blocks_of(model)), model.quantization_summary
    rows = sequences(LENGTHS[lengths])
    expected = expected_rows(model, rows)
    found, said = served(folder, rows)
    assert said == ["# 2 of 2 blocks as one call each"]
    assert relative_error(found, expected) <= 1e-3
    assert relative_error(served(folder, rows, "--captured")[0], found) == 0  # on the CPU a call as any other
    separate, said = served(folder, rows, "--separate")
    assert said == ["# 0 of 2 blocks as one call each"]
    assert relative_error(separate, expected) <= 2e-2


def test_the_separate_layers_are_pythons_too(models):
    model, folder = models["classifier"]
    rows = sequences(LENGTHS["several lengths"])
    separate = unfuse_int8_blocks(deepcopy(model))
    assert relative_error(served(folder, rows, "--separate")[0], expected_rows(separate, rows)) <= 1e-3


def test_padding_changes_no_token(models):
    model, folder = models["classifier"]
    rows = sequences(LENGTHS["several lengths"])
    together, _ = served(folder, rows)
    alone, _ = served(folder, rows, "--batch", 1)
    assert relative_error(together, alone) <= 2e-2  # few rows are multiplied unrounded under zeroquant-w8a8
    expected = torch.cat([expected_rows(model, [row]) for row in rows])
    assert relative_error(alone, expected) <= 1e-3


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations(activation, tmp_path):
    model = converted(float_model(hidden_act=activation), "int8-training")
    rows = sequences(LENGTHS["several lengths"])
    found, _ = served(saved(tmp_path, model), rows)
    assert relative_error(found, expected_rows(model, rows)) <= 1e-3


def test_layers_that_the_file_has_as_float(tmp_path):
    model = converted(float_model(), "int8-training", skip=["classifier", "*layer.1.output.dense"])
    assert isinstance(model.classifier, nn.Linear)
    rows = sequences(LENGTHS["several lengths"])
    found, said = served(saved(tmp_path, model), rows)
    assert said[0] == "# 1 of 2 blocks as one call each"
    assert said[1] == "# block 1 layer by layer: bert.encoder.layer.1.output.dense is a float layer"
    assert relative_error(found, expected_rows(model, rows)) <= 1e-3


def test_blocks_that_cannot_be_joined_run_layer_by_layer(tmp_path):
    model = converted(float_model(), "smoothquant-w8a8")  # queries, keys and values have factors of their own
    rows = sequences(LENGTHS["several lengths"])
    found, said = served(saved(tmp_path, model), rows)
    reason = (
        "int8_transformer_product: expected layers of one input factor, input scale and outlier columns, got several"
    )
    assert said == ["# 0 of 2 blocks as one call each", *(f"# block {i} layer by layer: {reason}" for i in range(2))]
    assert relative_error(found, expected_rows(model, rows)) <= 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_stay_close(dtype, tmp_path):
    model = converted(float_model(), "int8-training")
    rows = sequences(LENGTHS["several lengths"])
    found, _ = served(saved(tmp_path, model), rows, "--dtype", dtype)
    assert relative_error(found, expected_rows(model, rows)) <= 5e-2


def test_the_time_says_what_was_timed(tmp_path):
    folder = saved(tmp_path, converted(float_model(), "int8-training"))
    rows = sequences(LENGTHS["several lengths"])
    found, said = served(folder, rows, "--repeat", 3, "--batch", 4)
    assert len(found) == len(rows)
    median = r"# median \d+\.\d+ ms of 3 forward passes, from ids on the device: "
    assert re.fullmatch(median + "4 sequences of 48 ids with padding, cpu, float32", said[1])
    assert re.fullmatch(median + "2 sequences of 9 ids with padding, cpu, float32", said[2])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_serves_the_same(dtype, models):
    model, folder = models["classifier"]
    rows = [row for lengths in LENGTHS.values() for row in sequences(lengths)]
    expected = expected_rows(model, rows)
    flags = ["--device", "cuda", "--dtype", dtype]
    found, said = served(folder, rows, *flags)
    assert said == ["# 2 of 2 blocks as one call each"]
    assert relative_error(found, expected) <= (1e-2 if dtype == "float32" else 5e-2)
    assert relative_error(served(folder, rows, *flags, "--separate")[0], expected) <= 5e-2
    for batch in (0, 4):
        plain, _ = served(folder, rows, *flags, "--batch", batch)
        captured, _ = served(folder, rows, *flags, "--batch", batch, "--captured")
        assert relative_error(captured, plain) <= 1e-3


# ---- errors ----------------------------------------------------------------------------------------------------------


def refusal(*arguments: object) -> str:
    result = run_example("serve_bert", *arguments, check=False)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path]:
    """A folder and a file of ids without fault."""
    root = tmp_path_factory.mktemp("good")
    folder = saved(root / "model", converted(float_model(), "int8-training"))
    return folder, write_ids(root / "ids.txt", sequences([4]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folder", "/nonexistent"], "/nonexistent: expected the folder of a model, got none"),
        (["--ids", "/nonexistent"], "/nonexistent: expected a file of ids that can be read, got none"),
        (["--wrong", "1"], "expected arguments of --help, got '--wrong'"),
        (["--device", "tpu"], "expected --device cpu or cuda, got 'tpu'"),
        (["--dtype", "int8"], "expected --dtype float32 or float16 or bfloat16, got 'int8'"),
        (["--repeat", "-1"], "expected --repeat of at least 0, got -1"),
        (["--folder", ""], "expected --folder FOLDER, got none"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(flags, message, good):
    given = {"--folder": good[0], "--ids": good[1]} | dict(zip(flags[::2], flags[1::2], strict=True))
    assert message in refusal(*(part for pair in given.items() for part in pair))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2\n3 256\n", "ids.txt line 2: expected ids from 0 to 255, got 256"),
        ("1 -2\n", "ids.txt line 1: expected ids from 0 to 255, got -2"),
        ("1 two\n", "ids.txt line 1: expected ids as whole numbers, got 'two'"),
        ("1\n" + "2 " * 49, "ids.txt line 2: expected 1 to 48 ids (max_position_embeddings), got 49"),
        ("1\n\n2\n", "ids.txt line 2: expected 1 to 48 ids (max_position_embeddings), got 0"),
        ("", "ids.txt: expected at least one line of ids, got none"),
    ],
)
def test_bad_ids_are_refused(content, message, good, tmp_path):
    (tmp_path / "ids.txt").write_text(content, encoding="ascii")
    assert message in refusal("--folder", good[0], "--ids", tmp_path / "ids.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, 'config.json: expected "model_type" to be "bert", got "roberta"'),
        ({"hidden_act": "silu"}, '"hidden_act" to be gelu, gelu_new, gelu_pytorch_tanh or relu, got "silu"'),
        ({"is_decoder": True}, 'expected an encoder, "is_decoder" false, got true'),
        ({"num_attention_heads": 5}, '"num_attention_heads" to divide 64, got 5'),
        ({"position_embedding_type": "relative_key"}, '"position_embedding_type" to be "absolute", got "relative_key"'),
        ({"hidden_size": None}, '"hidden_size" to be a whole number of at least 1, got null'),
        ({"intermediate_size": 96}, "intermediate.dense"),
        ({"num_hidden_layers": 3}, "encoder.layer.2"),
    ],
)
def test_bad_configs_are_refused(changes, message, good, tmp_path):
    config = json.loads((good[0] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((good[0] / "model.safetensors").read_bytes())
    assert message in refusal("--folder", tmp_path, "--ids", good[1])


def test_files_of_other_models_are_refused(good, tmp_path):
    flags = ["--folder", tmp_path, "--ids", good[1]]
    file = tmp_path / "model.safetensors"
    model = float_model()
    model.save_pretrained(tmp_path)
    assert f"{file}: expected metadata format 'quantrain', got 'pt'" in refusal(*flags)
    qnn.save_checkpoint(file, model)
    not_converted = f"{file}: expected a checkpoint of converted layers, got one that is not converted"
    assert not_converted in refusal(*flags)
    prepared = qnn.prepare(float_model(), "int8-training")
    qnn.save_checkpoint(file, prepared)
    assert not_converted in refusal(*flags)
    saved(tmp_path, qnn.convert(qnn.prepare(float_model(), "qat-w8a8-token"), check_observed=False))
    assert "expected layers of scheme int8 or ptq, got 'qat-w8a8-token' at bert." in refusal(*flags)
    file.unlink()
    assert str(file) in refusal(*flags)
