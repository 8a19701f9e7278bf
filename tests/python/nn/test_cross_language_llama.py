"""One Llama model in both languages: the examples qlora_llama and evaluate_llama take the steps and give the numbers
that transformers' model takes and gives under the Python layers.

The C++ side is the built examples, looked for in $QUANTRAIN_EXAMPLES_DIR and in the build folders.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from samples.examples import example, run_example, why_missing
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from quantrain import Recipe, ptq  # noqa: E402
from quantrain import nn as qnn  # noqa: E402
from quantrain.nn.int8_blocks import Int8Block  # noqa: E402
from quantrain.optim import AdamW8bit  # noqa: E402

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "tied": {},
    "biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama3": {"rope_parameters": LLAMA3},
    "steep": {"tie_word_embeddings": False, "initializer_range": 0.2},  # whose likeliest ids change with the context
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}
RECIPES = ["nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64-affine", "w8a16"]
LENGTH = 64  # of windows and sequences
GENERATED = 8
STEPS, BATCH, RANK, LR = 20, 2, 8, 5e-3
pytestmark = pytest.mark.usefixtures("one_thread")
QLORA = qnn.changed_recipe(qnn.as_recipe("qlora"), {"scheme": {"lora_rank": RANK}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small random models, saved as transformers saves them; the one with biases in shards."""
    root = tmp_path_factory.mktemp("llama")
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.randn_like(parameter) * changes.get("initializer_range", 0.06) + (parameter.dim() == 1)
                )
        model.save_pretrained(root / name, **({"max_shard_size": "100KB"} if name == "biases" else {}))
    assert (root / "biases" / "model.safetensors.index.json").is_file()
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def ids(tmp_path_factory) -> tuple[Path, Tensor]:
    """A file of ids, and the ids: a walk that is easy to learn."""
    steps = torch.randint(1, 4, (2000,), generator=torch.Generator().manual_seed(0))
    ids = steps.cumsum(0) % 8 * 31
    path = tmp_path_factory.mktemp("ids") / "ids.txt"
    path.write_text(" ".join(map(str, ids.tolist())), encoding="ascii")
    return path, ids


def load(folder: Path, recipe: str | Recipe | None = None) -> torch.nn.Module:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if recipe is None:
        return model
    if recipe not in ("w8a16", "zeroquant-w8a8"):
        return qnn.prepare(model, recipe)
    return qnn.convert(qnn.prepare(model, recipe, skip=["lm_head", "model.embed_tokens"]))


def log_probabilities(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each prediction the distribution, and the id that came."""
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        return log_softmax(model(windows[:, :-1]).logits.float(), -1).flatten(0, 1), windows[:, 1:].flatten()


def perplexity(distribution: Tensor, targets: Tensor) -> float:
    return (-distribution.gather(-1, targets[:, None]).double().mean()).exp().item()


def python_generated(model: torch.nn.Module, prompt: Tensor) -> list[int]:
    return qnn.Int8Decoder(model, capacity=LENGTH + GENERATED).generate(prompt[None], GENERATED)[0].tolist()


def evaluated(folder: Path, ids: Path, out: Path, *flags: object) -> dict[str, dict]:
    """evaluate_llama's numbers by recipe."""
    run_example("evaluate_llama", "--model", folder, "--ids", ids, "--length", LENGTH, "--log", out, *flags)
    return {line["recipe"]: line for line in map(json.loads, out.read_text().splitlines())}


def saved(model: torch.nn.Module, source: Path, out: Path) -> Path:
    """The folder of a converted model, as `quantrain quantize` writes it."""
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    qnn.save_checkpoint(out / "model.safetensors", model)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_perplexities_equal_transformers(name, folders, ids, tmp_path):
    path, tokens = ids
    flags = ["--recipe", "float,nf4-dq", "--batch", 4]
    found = evaluated(folders[name], path, tmp_path / "log", *flags)
    for recipe in (None, "nf4-dq"):
        expected = perplexity(*log_probabilities(load(folders[name], recipe), tokens))
        assert found[recipe or "float"]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_what_weights_of_each_recipe_cost(folders, ids, tmp_path):
    path, tokens = ids
    found = evaluated(folders["tied"], path, tmp_path / "log", "--recipe", ",".join(RECIPES), "--against", "float")
    exact, targets = log_probabilities(load(folders["tied"]), tokens)
    for recipe in RECIPES:
        ours, _ = log_probabilities(load(folders["tied"], recipe), tokens)
        line = found[recipe]
        assert line["predictions"] == len(targets)
        assert line["perplexity"] == pytest.approx(perplexity(ours, targets), rel=1e-5)
        divergence = (exact.exp() * (exact - ours)).sum(-1).double().mean().item()
        assert line["kl"] == pytest.approx(divergence, rel=1e-3)
        agreement = (exact.argmax(-1) == ours.argmax(-1)).double().mean().item()
        assert line["top1"] == pytest.approx(agreement, abs=2 / len(targets))  # near ties
    assert found["w8a16"]["kl"] < 0.1 * min(found[recipe]["kl"] for recipe in RECIPES if recipe != "w8a16")
    assert found["nf4-dq"]["megabytes"] < found["nf4"]["megabytes"] < found["w8a16"]["megabytes"]


@pytest.mark.parametrize(
    "recipe",
    [
        "zeroquant-w4a8",
        "llm-int8",
        "llm-int8-threshold",
        "smoothquant-w8a8-static",
        "gptq-w4a16",
        "awq-gptq-w4a8",
        "nf4",
        "kv-int8",
        "llm-int8 with kv_cache int8",
    ],
)
def test_a_quantized_folder_is_evaluated_as_python_has_it(recipe, folders, ids, tmp_path):
    path, tokens = ids
    model = load(folders["steep"])
    name, _, cache = recipe.partition(" with kv_cache ")
    recipe = qnn.changed_recipe(qnn.as_recipe(name), {"scheme": {"kv_cache": cache}}) if cache else name
    ptq.quantize(model, recipe, [tokens[start : start + LENGTH][None] for start in range(0, 512, LENGTH)])
    folder = saved(model, folders["steep"], tmp_path / "quantized")
    fused = all(isinstance(block, Int8Block) for block in model.model.layers)
    flags = ["--generate", GENERATED] if fused else []
    line = evaluated(folder, path, tmp_path / "log", "--against", folders["steep"], *flags)["as-is"]
    exact, targets = log_probabilities(load(folders["steep"]), tokens)
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():  # a window per call, as there
        ours = torch.cat([log_softmax(model(row[None, :-1]).logits[0], -1) for row in windows])
    assert line["perplexity"] == pytest.approx(perplexity(ours, targets), rel=1e-4)
    assert line["kl"] == pytest.approx((exact.exp() * (exact - ours)).sum(-1).double().mean().item(), rel=2e-2)
    apart = evaluated(folder, path, tmp_path / "log", "--separate")["as-is"]
    assert apart["perplexity"] == pytest.approx(line["perplexity"], rel=1e-3)
    assert not fused or line["ids"] == python_generated(model, tokens[:LENGTH])


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [*((name, "cpu", "float32") for name in MODELS), ("biases", "cpu", "bfloat16")]
    + [pytest.param("llama3", "cuda", dtype, marks=pytest.mark.cuda) for dtype in ("float32", "bfloat16")],
)
def test_blocks_as_one_call_give_what_their_layers_give(name, device, dtype, folders, ids, tmp_path):
    path, tokens = ids
    flags = ["--recipe", "zeroquant-w8a8", "--batch", 4, "--device", device, "--dtype", dtype]
    fused = evaluated(folders[name], path, tmp_path / "log", *flags, "--generate", GENERATED)["zeroquant-w8a8"]
    apart = evaluated(folders[name], path, tmp_path / "log", *flags, "--separate")["zeroquant-w8a8"]
    tolerance = 1e-3 if dtype == "float32" else 1e-2  # layer by layer more is rounded to 16 bits
    assert fused["perplexity"] == pytest.approx(apart["perplexity"], rel=tolerance)
    assert fused["megabytes"] == apart["megabytes"]  # no second copy of codes
    if dtype == "float32":
        model = load(folders[name], "zeroquant-w8a8").to(device)
        expected = perplexity(*log_probabilities(model, tokens.to(device)))
        assert fused["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert fused["ids"] == python_generated(model, tokens[:LENGTH])
        assert fused["tokens_per_second"] > 0


def test_a_note_says_which_blocks_are_one_call(folders, ids, tmp_path):
    model = load(folders["tied"])
    first = {"model.layers.0.self_attn.q_proj": {"scheme": {"outlier_columns": 8}}}
    calibration = [ids[1][:LENGTH][None]]
    ptq.quantize(model, "zeroquant-w8a8", calibration, overrides=first)
    folder = saved(model, folders["tied"], tmp_path / "quantized")
    flags = ["--model", folder, "--ids", ids[0], "--length", LENGTH, "--windows", 2]
    notes = [line for line in run_example("evaluate_llama", *flags).stdout.splitlines() if line.startswith("#")]
    assert notes == [
        "# as-is: 1 of 2 blocks as one call each",
        "# as-is: 1 layer by layer: k_proj multiplies otherwise than q_proj",
    ]
    printed = run_example("evaluate_llama", *flags, "--separate").stdout
    assert printed.startswith("# as-is: 0 of 2 blocks as one call each\nas-is")
    result = run_example("evaluate_llama", *flags, "--generate", 4, check=False)
    assert result.returncode == 1
    assert "one call each, got 1 of 2 in 'as-is': k_proj multiplies otherwise than q_proj" in result.stderr


def python_losses(model: torch.nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    """The loop of qlora_llama."""
    model.train()
    parameters = qnn.lora_parameters(model)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
        tokens = ids[starts + torch.arange(LENGTH + 1)]
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1]).logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        losses.append(loss.item())
    return losses


def cpp_losses(folder: Path, ids: Path, out: Path, *flags: object) -> list[float]:
    sizes = ["--steps", STEPS, "--batch", BATCH, "--length", LENGTH, "--lr", LR]
    log = out.with_suffix(".jsonl")
    run_example("qlora_llama", "--model", folder, "--ids", ids, "--out", out, "--log", log, *sizes, *flags)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("name", ["tied", "biases"])
def test_qlora_takes_the_same_steps_in_both_languages(name, optimizer, folders, ids, tmp_path):
    path, tokens = ids
    torch.manual_seed(0)
    model = load(folders[name], QLORA)
    qnn.save_lora_adapter(tmp_path / "start", qnn.lora_adapter(model))
    kind = AdamW8bit if optimizer == "adamw8bit" else torch.optim.AdamW
    mine = python_losses(model, tokens, kind(qnn.lora_parameters(model), lr=LR, weight_decay=0), seed=3)

    flags = ["--adapter", tmp_path / "start", "--optimizer", optimizer, "--seed", 3]
    theirs = cpp_losses(folders[name], path, tmp_path / "out", *flags)
    assert max(abs(a - b) / a for a, b in zip(mine, theirs, strict=True)) <= 1e-5
    assert theirs[-1] < 0.8 * theirs[0]

    # What C++ trained, Python reads: the same predictions, and its own matrices but for rounding.
    trained = load(folders[name], QLORA)
    qnn.set_lora_adapter(trained, qnn.load_lora_adapter(tmp_path / "out"))
    found = evaluated(folders[name], path, tmp_path / "log", "--recipe", "nf4-dq", "--adapter", tmp_path / "out")
    assert found["nf4-dq"]["perplexity"] == pytest.approx(perplexity(*log_probabilities(trained, tokens)), rel=1e-4)
    a, b = (torch.cat([p.detach().flatten() for p in qnn.lora_parameters(m)]) for m in (model, trained))
    assert (a - b).norm() <= 1e-3 * a.norm()
    assert qnn.load_lora_adapter(tmp_path / "out").base_model == str(folders[name])


def test_some_layers_alone_are_trained(folders, ids, tmp_path):
    path, tokens = ids
    targets = ["q_proj", "v_proj"]
    overrides = {f"*.{name}": {"scheme": {"lora_rank": RANK}} for name in targets}
    plain = qnn.changed_recipe(QLORA, {"scheme": {"lora_rank": 0}})
    model = qnn.prepare(load(folders["tied"]), plain, overrides=overrides)
    qnn.save_lora_adapter(tmp_path / "start", qnn.lora_adapter(model))
    mine = python_losses(model, tokens, AdamW8bit(qnn.lora_parameters(model), lr=LR, weight_decay=0), seed=0)
    theirs = cpp_losses(folders["tied"], path, tmp_path / "out", "--adapter", tmp_path / "start")
    assert max(abs(a - b) / a for a, b in zip(mine, theirs, strict=True)) <= 1e-5
    flags = ["--rank", RANK, "--targets", ",".join(targets)]
    cpp_losses(folders["tied"], path, tmp_path / "named", *flags)
    for out in ("out", "named"):
        adapter = qnn.load_lora_adapter(tmp_path / out)
        assert adapter.target_modules == targets and len(adapter.layers) == 4


def test_checkpointing_changes_no_loss(folders, ids, tmp_path):
    flags = ["--rank", RANK, "--dropout", 0.2]
    plain = cpp_losses(folders["tied"], ids[0], tmp_path / "plain", *flags)
    assert cpp_losses(folders["tied"], ids[0], tmp_path / "again", *flags, "--checkpointing") == plain
    assert cpp_losses(folders["tied"], ids[0], tmp_path / "dry", "--rank", RANK) != plain  # so the dropout was one


def test_ctrl_c_saves_the_adapter(folders, ids, tmp_path):
    if example("qlora_llama") is None:
        pytest.skip(why_missing("qlora_llama"))
    flags = ["--model", folders["tied"], "--ids", ids[0], "--steps", 1000000, "--length", LENGTH, "--rank", RANK]
    log, out = tmp_path / "log", tmp_path / "out"
    command = [example("qlora_llama"), "--threads", 1, "--out", out, "--log", log, *flags]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"after {len(log.read_text().splitlines())} steps" in printed
    assert len(qnn.load_lora_adapter(out).layers) == 14


def test_an_adapter_that_trained_more_is_refused(folders, ids, tmp_path):
    adapter = qnn.lora_adapter(load(folders["tied"], QLORA))
    adapter.others = {"model.norm.weight": torch.ones(64)}
    adapter.modules_to_save = ["norm"]
    qnn.save_lora_adapter(tmp_path / "start", adapter)
    flags = ["--model", folders["tied"], "--ids", ids[0], "--out", tmp_path / "out", "--length", LENGTH]
    result = run_example("qlora_llama", *flags, "--adapter", tmp_path / "start", check=False)
    assert result.returncode == 1
    assert "expected an adapter of low-rank updates alone, got 'model.norm.weight' too" in result.stderr


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_a_gpu_takes_the_same_steps(dtype, tolerance, folders, ids, tmp_path):
    qnn.save_lora_adapter(tmp_path / "start", qnn.lora_adapter(load(folders["biases"], QLORA)))
    flags = ["--adapter", tmp_path / "start"]
    host = cpp_losses(folders["biases"], ids[0], tmp_path / "host", *flags)
    flags += ["--device", "cuda", "--dtype", dtype]
    device = cpp_losses(folders["biases"], ids[0], tmp_path / "device", *flags)
    assert max(abs(a - b) / a for a, b in zip(host, device, strict=True)) <= tolerance
    flags += ["--dropout", 0.2]
    plain = cpp_losses(folders["biases"], ids[0], tmp_path / "plain", *flags)
    again = cpp_losses(folders["biases"], ids[0], tmp_path / "again", *flags, "--checkpointing")
    assert max(abs(a - b) / a for a, b in zip(plain, again, strict=True)) <= 1e-4  # products may be summed otherwise


@pytest.mark.cuda
def test_a_gpu_gives_the_same_perplexities(folders, ids, tmp_path):
    flags = ["--recipe", ",".join(["float", *RECIPES]), "--against", "float", "--windows", 8]
    host = evaluated(folders["llama3"], ids[0], tmp_path / "log", *flags)
    device = evaluated(folders["llama3"], ids[0], tmp_path / "log", *flags, "--device", "cuda")
    for recipe, line in host.items():
        assert device[recipe]["perplexity"] == pytest.approx(line["perplexity"], rel=1e-4)
        assert device[recipe]["megabytes"] == line["megabytes"]


def test_binary_ids_are_the_text(folders, ids, tmp_path):
    text = evaluated(folders["tied"], ids[0], tmp_path / "log", "--recipe", "float")
    for dtype in ("int32", "uint16"):
        ids[1].to(getattr(torch, dtype)).numpy().tofile(tmp_path / "ids.bin")
        flags = ["--recipe", "float", "--ids-dtype", dtype]
        assert evaluated(folders["tied"], tmp_path / "ids.bin", tmp_path / "log", *flags) == text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_stay_close(dtype, folders, ids, tmp_path):
    flags = ["--recipe", "float,nf4,w8a16", "--windows", 4]
    exact = evaluated(folders["tied"], ids[0], tmp_path / "log", *flags)
    found = evaluated(folders["tied"], ids[0], tmp_path / "log", *flags, "--dtype", dtype)
    for recipe, line in exact.items():
        assert found[recipe]["perplexity"] == pytest.approx(line["perplexity"], rel=0.02)
        assert found[recipe]["megabytes"] < line["megabytes"]


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("qlora_llama", ["--model", "/nonexistent"], "/nonexistent: expected the folder of a model, got none"),
        ("qlora_llama", ["--ids", "/nonexistent"], "/nonexistent: expected a file of ids that can be read, got none"),
        ("qlora_llama", ["--wrong", "1"], "expected arguments of --help, got '--wrong'"),
        ("qlora_llama", ["--recipe", "qat-w8a8"], "expected --recipe qlora or nf4 or nf4-dq"),
        ("qlora_llama", ["--length", "2000"], "expected --length of at most the model's context 128, got 2000"),
        ("qlora_llama", ["--dropout", "1"], "expected lora_dropout in [0, 1)"),
        ("qlora_llama", ["--rank", "0"], "expected --rank of at least 1, got 0"),
        ("qlora_llama", ["--adapter", "/nonexistent"], "/nonexistent"),
        ("qlora_llama", ["--targets", "q_proj,lm_head"], "expected --targets q_proj or k_proj"),
        ("qlora_llama", ["--adapter", "/x", "--targets", "q_proj"], "expected no --rank, --alpha and --targets with"),
        ("evaluate_llama", ["--recipe", "float,w1"], "expected --recipe float or nf4"),
        ("evaluate_llama", ["--generate", "65"], "of at most the model's context 128 together, got 64 and 65"),
        ("evaluate_llama", ["--generate", "-1"], "expected --generate of at least 0, got -1"),
        ("evaluate_llama", ["--generate", "8"], "got 0 of 2 in 'float': no layer is of scheme ptq"),
        ("evaluate_llama", ["--against", "nf4"], "nf4: expected the folder of a model, got none"),
        ("evaluate_llama", ["--recipe", "as-is"], "expected metadata format 'quantrain', got 'pt'"),
        ("evaluate_llama", ["--adapter", "/x"], "expected --recipe of weights of 4 bits with --adapter, got 'float'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(program, flags, message, folders, ids, tmp_path):
    given = {"--model": folders["tied"], "--ids": ids[0], "--length": LENGTH}
    given |= {"--out": tmp_path / "out"} if program == "qlora_llama" else {}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    result = run_example(program, *(part for pair in given.items() for part in pair), check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2 256 3 " + "4 " * LENGTH, "expected ids from 0 to 255, got 256 at place 2"),
        ("1 2 -1 3 " + "4 " * LENGTH, "expected ids from 0 to 255, got -1 at place 2"),
        ("1 2 3", f"expected at least {LENGTH} ids, got 3"),
        ("1 2 three", "expected ids as whole numbers, got 'three'"),
    ],
)
def test_bad_ids_are_refused(content, message, folders, tmp_path):
    (tmp_path / "ids.txt").write_text(content, encoding="ascii")
    flags = ["--model", folders["tied"], "--ids", tmp_path / "ids.txt", "--length", LENGTH]
    result = run_example("evaluate_llama", *flags, check=False)
    assert result.returncode == 1
    assert message in result.stderr


def changed_folder(folder: Path, out: Path, config: dict, tensors: dict[str, Tensor | None]) -> Path:
    """A copy of a model's folder; None takes a tensor away."""
    out.mkdir()
    fields = json.loads((folder / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(fields))
    merged = load_file(folder / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, out / "model.safetensors")
    return out


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "mistral"}, {}, 'config.json: expected "model_type" to be "llama", got "mistral"'),
        ({"hidden_size": "wide"}, {}, '"hidden_size" to be a whole number of at least 1, got "wide"'),
        ({"hidden_size": None}, {}, '"hidden_size" to be a whole number of at least 1, got null'),
        ({"num_key_value_heads": 3}, {}, '"num_key_value_heads" to divide 4 heads, got 3'),
        ({"hidden_act": "gelu"}, {}, '"hidden_act" to be "silu", got "gelu"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, '"rope_type" to be default, linear or llama3, got "yarn"'),
        ({"rope_parameters": {"rope_type": "linear"}}, {}, '"factor" to be a number above 0.0, got none'),
        ({"quantization_config": {}}, {}, 'without "quantization_config", got {}'),
        ({"tie_word_embeddings": False}, {}, "expected a tensor 'lm_head.weight', got none"),
        ({"intermediate_size": 96}, {}, "expected 'model.layers.0.mlp.gate_proj.weight' of floats and shape [96, 64]"),
        ({}, {NORM: None}, f"expected a tensor '{NORM}', got none"),
        ({}, {NORM: torch.ones(64, dtype=torch.int32)}, f"expected '{NORM}' of floats and shape [64], got Int"),
        ({}, {"model.extra.weight": torch.ones(1)}, "got 'model.extra.weight' too"),
        ({}, {"model.layers.1.mlp.up_proj.weight": torch.full((160, 64), torch.nan)}, "up_proj"),
    ],
)
def test_bad_folders_are_refused(config, tensors, message, folders, ids, tmp_path):
    folder = changed_folder(folders["tied"], tmp_path / "model", config, tensors)
    flags = ["--model", folder, "--ids", ids[0], "--length", LENGTH, "--recipe", "nf4"]
    result = run_example("evaluate_llama", *flags, check=False)
    assert result.returncode == 1
    assert message in result.stderr


def test_a_tied_head_and_old_frequencies_in_the_file_change_nothing(folders, ids, tmp_path):
    old = {"lm_head.weight": torch.ones(256, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    config = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
    folder = changed_folder(folders["tied"], tmp_path / "model", config, old)
    exact = evaluated(folders["tied"], ids[0], tmp_path / "log", "--recipe", "float")
    assert evaluated(folder, ids[0], tmp_path / "log", "--recipe", "float") == exact
