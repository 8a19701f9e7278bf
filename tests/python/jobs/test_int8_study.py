"""bench_int8 and the study of training in int8 in their tiny form on a CPU; that the benchmark's checks find wrong kernels; the page."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import quantrain

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("matplotlib")

import bench_int8  # noqa: E402
from common import encoder, operands, pages, timing  # noqa: E402
from common.checks import poisoned, relative_error  # noqa: E402
from common.recipes import int8_recipe  # noqa: E402
from common.sections import Row  # noqa: E402
from int8 import checks  # noqa: E402
from studies.int8_training import curves, figures, finetune, results, study, tables  # noqa: E402

from quantrain.finetune import job, minilm, text  # noqa: E402

BENCH = ("mm", "quantize", "fused", "linear", "inference", "cpu", "grid")  # gpt compiles: half a minute


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The results of the tiny benchmark and study."""
    folder = tmp_path_factory.mktemp("int8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operators: a second thread would only be waited for
    try:
        flags = ["--device", "cpu", "--quick", "--only", ",".join(BENCH), "--csv", str(folder / "grid.csv")]
        assert bench_int8.main([*flags, "--json", str(folder / "int8-bench-cpu-2000-01-01.json")]) == 0
        flags = ["curves", "--quick", "--data", "random", "--device", "cpu", "--out", str(folder)]
        assert study.main(flags) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


def test_the_tiny_benchmark_measures_every_section(out):
    content = results.newest(out, "bench")[1]
    assert {row["section"] for row in content["rows"]} == set(BENCH) and not content["notes"]
    assert all(row["ratio"] > 0 for row in content["rows"] if not row["case"].startswith("copy"))
    assert content["commit"] and content["command"].startswith("python ") and "/" not in content["on"]
    lines = [line for line in (out / "grid.csv").read_text().splitlines() if not line.startswith("#")]
    assert lines[0].startswith("tokens,in,out,gemm,m,n,k,bf16_us,int8_mm_us") and len(lines) == 4
    assert all(len(line.split(",")) == len(lines[0].split(",")) and ",," not in line for line in lines)


def test_the_tiny_training_follows_bf16(out):
    rows = results.newest(out, "curves")[1]["rows"]
    assert {(row["text"], row["kind"]) for row in rows} == {
        (t, k) for t in curves.TEXTS for k in ("bf16", "int8-training")
    }
    for title in curves.TEXTS:
        losses = {kind: results.finals(rows, title, kind)[0] for kind in ("bf16", "int8-training")}
        # Byte-wise entropy of the random text is log 3 = 1.10; the untrained loss is log 256 = 5.55.
        assert losses["bf16"] < 3 and abs(losses["int8-training"] / losses["bf16"] - 1) < 0.02, losses
        assert losses["int8-training"] != losses["bf16"]


def test_a_tiny_fine_tuning_runs_in_both_precisions(tmp_path, monkeypatch):
    """A BERT of one layer on sentences whose first word tells their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (64,), generator=generator)
    ids = [[1 + int(label), *torch.randint(3, 40, (5,), generator=generator).tolist()] for label in labels]
    data = text.TextData("tiny", "here", ("no", "yes"), labels, labels[:16], ids, ids[:16])
    config = minilm.BertConfig(40, 32, 1, 2, 64, 16)
    monkeypatch.setattr(job, "load_text_data", lambda *_: data)
    monkeypatch.setattr(minilm, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(minilm, "sentence_classifier", lambda classes: minilm.SentenceClassifier(config, classes))
    monkeypatch.setattr(finetune, "stored_type", lambda: "float32")
    settings = finetune.Settings(seeds=1, train_rows=64, batch_size=8, epochs=4, lr=1e-2)
    monkeypatch.setattr(finetune, "QUICK", settings)
    assert study.main(["finetune", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = results.newest(tmp_path, "finetune")[1]
    assert [row["kind"] for row in content["rows"]] == [finetune.FLOAT, finetune.FROM_START, finetune.ON_TOP]
    assert [row["steps"] for row in content["rows"]] == [32, 32, 2]
    assert all(row["accuracy"] > 90 for row in content["rows"]), content["rows"]
    page = tables.finetune_text(Path("int8-finetune-cpu.json"), content)
    assert "| int8-training after float32 | 100.00 | 100.00 | +0.00 |" in page


def test_the_page_takes_the_results_over(out, tmp_path):
    page = tmp_path / "int8.md"
    page.write_text((ROOT / "docs" / "measured" / "int8.md").read_text(encoding="utf-8"), encoding="utf-8")
    figures.draw_all(out, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "int8_gemms.png",
        "int8_curves.png",
    }  # int8_speed: of a GPU
    tables.fill(page, tmp_path / "none", tmp_path)
    blocks = pages.BLOCK.findall(page.read_text())
    parts = [name for _, name, _ in blocks]
    assert sorted(parts) == sorted({*tables.SECTIONS, "gpt", "gpt_compiled", "torchao", "curves", "finetune"})
    assert page.read_text().count(tables.UNMEASURED) == len(parts)
    tables.fill(page, out, tmp_path)
    filled = page.read_text()
    assert filled.count(tables.UNMEASURED) == 4  # gpt, gpt_compiled, torchao, finetune
    for part in ("| tinyshakespeare | held out |", "](../figures/int8_curves.png)", "| int8_gelu 300x776 |"):
        assert part in filled
    tables.fill(page, out, tmp_path)
    assert page.read_text() == filled


def test_tables_and_figures_of_a_gpu(tmp_path):
    """Rows as a GPU gives them: memory beside the step; the page names no targets."""

    def rows(section: str, *cases: tuple) -> list[dict]:
        return [dataclasses.asdict(Row(section, *case)) for case in cases]

    step = {"ms": 46.0, "over_bf16_eager": 1.2, "peak_gib": 10.0}
    linear = {"bf16_ms": 1.0, "int8_ms": 0.8, "device_ratio": 1.3}
    layer = {"fp16_ms": 1.0, "int8_ms": 0.8, "graph_ratio": 1.3, "graph_fp16_ms": 1.0, "graph_int8_ms": 0.8}
    content = {
        "on": "NVIDIA H200",
        "cpu": "a CPU",
        "torch": "2.11",
        "date": "2000-01-01",
        "command": "python x",
        "notes": [],
    }
    content["rows"] = [
        *rows("gpt", ("GPT 768 wide: bf16 compiled", 1.0, None, step), ("GPT 768 wide: int8 auto", 1.1, 1.2, step)),
        *rows("memory", ("GPT 768 wide: int8 auto over bf16 eager", 0.85, 0.9, {})),
        *rows("linear", ("1x2x3 int8", 1.25, 1.2, linear)),
        *rows("inference", ("BERT-large layer, batch 16 x 128", 1.25, 1.0, layer)),
    ]
    (tmp_path / "int8-bench-h200-2000-01-01.json").write_text(json.dumps(content))
    gpt = tables.bench_part("gpt", tmp_path)
    assert "| GPT 768 wide: int8 auto | 46.0 | 1.20x | 1.10x | 10.00 | 0.85 |" in gpt
    assert "| 1x2x3 int8 | 1.000 | 0.800 | 1.25x | 1.30x |" in tables.bench_part("linear", tmp_path)
    figures.draw_all(tmp_path, tmp_path)
    assert (tmp_path / "int8_speed.png").is_file()
    assert tables.bench_part("gpt_compiled", tmp_path) == tables.UNMEASURED
    content["rows"] = rows("gpt", ("GPT 768 wide: int8 auto compiled", 1.3, None, step))
    (tmp_path / "int8-gpt-compiled-h200-2000-01-01.json").write_text(json.dumps(content))
    assert "int8 auto compiled" in tables.bench_part("gpt_compiled", tmp_path)
    assert tables.bench_part("gpt", tmp_path) == gpt
    content["rows"] = rows("linear", ("1x2x3 int8", 1.35, 1.2, linear))
    (tmp_path / "int8-linear-h200-2000-01-02.json").write_text(json.dumps(content))
    assert "| 1.35x |" in tables.bench_part("linear", tmp_path)
    assert Row("memory", "a", 0.95, 0.9).missed and not Row("memory", "a", 0.85, 0.9).missed
    assert (
        Row("mm", "a", 1.1, 1.2).missed and not Row("mm", "a", 1.3, 1.2).missed and not Row("mm", "a", 1.3, None).missed
    )


# ---- the checks that a kernel passes before it is timed --------------------------------------------------------------------


def product_operands() -> tuple:
    torch.manual_seed(0)
    a, b = operands.random_codes(96, 160, "cpu"), operands.random_codes(80, 160, "cpu")
    return a, b, operands.random_scale(96, "cpu"), operands.random_scale(80, "cpu"), torch.randn(80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_product_is_found(monkeypatch, dtype):
    operands = product_operands()
    checks.check_mm(*operands, dtype)
    real = quantrain.int8_mm

    def spoiled(change):
        def call(*arguments, **keywords):
            result = real(*arguments, **keywords)
            return change(result) if change(result) is not None else result

        return call

    def tile(result):
        result[32:64, 16:48] *= 1.5

    changes = {
        "a tile": tile,
        "unwritten": lambda result: torch.cat([result[:-1], torch.empty_like(result[-1:])]),
        "bias left out": lambda result: (result.float() - operands[4]).to(dtype),
        "rows of another": lambda result: result.roll(1, 0),
    }
    for name, change in changes.items():
        monkeypatch.setattr(quantrain, "int8_mm", spoiled(change))
        with pytest.raises(AssertionError):
            checks.check_mm(*operands, dtype)
            pytest.fail(f"{name} passed")


def test_wrong_codes_are_found(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(64, 96)
    for stochastic in (False, True):
        checks.check_rows(x, stochastic)
        checks.check_columns(x, stochastic)
    real = quantrain.int8_quantize_rows
    codes, scale = real(x)
    off_by_one = codes.clone()
    off_by_one[3, 5] += 1 if codes[3, 5] < 100 else -1
    for wrong in ((off_by_one, scale), (codes, scale * 1.001), (codes.roll(1, 1), scale)):
        with pytest.raises(AssertionError):
            checks.check_codes("test", *wrong, x, False)
    truncated = (x / scale).floor().to(torch.int8)  # within a step, but biased
    for wrong in (codes, truncated):
        with pytest.raises(AssertionError):
            checks.check_codes("test", wrong, scale, x, True)
    with pytest.raises(AssertionError):
        checks.check_fused("test", codes.roll(1, 1), scale, x)


def test_memory_is_poisoned_while_a_kernel_is_checked():
    with poisoned():
        assert torch.empty(4, 4).isnan().all() and (torch.empty(8, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- the encoder layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_int8_encoder_is_the_float_one_with_its_operands_rounded(pre_norm):
    config = encoder.EncoderConfig(48, 4, 96, layers=2, pre_norm=pre_norm)
    wide, narrow = encoder.make_encoders(config, "cpu", torch.float32)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return quantrain.dequantize(*quantrain.int8_quantize_rows(t))

    for layer in wide:
        for linear in (layer.qkv, layer.projection, layer.up, layer.down):
            linear.weight.data = rounded(linear.weight.data)
            linear.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
    x = torch.randn(3, 16, 48)
    with torch.no_grad():
        # Apart only where a sum's order moved a value over the edge of a code.
        assert relative_error(narrow(x), wide(x)) < 2e-3


# ---- small parts -----------------------------------------------------------------------------------------------------------


def test_the_recipe_takes_the_choice():
    recipe = int8_recipe("none")
    assert (recipe.scheme.output, recipe.scheme.grad_input, recipe.scheme.grad_weight) == ("none",) * 3
    assert int8_recipe("auto") == quantrain.Recipe.from_name("int8-training")


def test_rotating_operands_exceed_the_cache():
    assert timing.sets_for(40 << 20, "cuda") * (40 << 20) >= timing.CACHE_BYTES
    assert timing.sets_for(1 << 30, "cuda") == 2 and timing.sets_for(1, "cuda") == 12


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_int8.main(["--only", "everything"])
    assert "expected sections of mm," in capsys.readouterr().err
