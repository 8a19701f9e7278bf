"""Section zeroquant: Table 6 of ZeroQuant (Yao et al., NeurIPS 2022) with today's alternatives beside it.

The paper times int8 BERT on an A100 against float16 without fusion: 2.3 times as fast at batch 1 and 5.2 times at 128 (BERT-large, 128
tokens). The ratio is that of float16 with SDPA to ours, the faster of eager and captured.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from common.checks import relative_error, require
from common.sections import SectionReport
from common.timing import Captured, step_seconds
from torch import nn

from .models import bert_model, hidden, make_models, tokens

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
COMPILED = ((1, 128), (16, 128), (128, 128))  # batch and tokens; a minute for each, at the end


def with_bitsandbytes(model: nn.Module) -> nn.Module | None:
    """LLM.int8() without its threshold: the faster of bitsandbytes' two."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    model = copy.deepcopy(model)
    for parent in list(model.encoder.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                made = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
                made.weight = bitsandbytes.nn.Int8Params(
                    linear.weight.data, requires_grad=False, has_fp16_weights=False
                )
                made.bias = linear.bias
                setattr(parent, name, made)
    return model.cuda()


def with_torchao(model: nn.Module) -> nn.Module | None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    model = copy.deepcopy(model)
    quantize_(model.encoder, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, dynamic=False)


@torch.no_grad()
def zeroquant(report: SectionReport, device: str, quick: bool) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    for size in ("quick",) if quick else ("BERT-base", "BERT-large"):
        models = make_models(size, device, dtype, separate=False)
        unfused = bert_model(size, "eager").to(dtype).to(device)
        others: dict[str, nn.Module | None] = {"unfused": unfused}
        if device == "cuda" and not quick:
            others |= {
                "compiled": torch.compile(models.wide, dynamic=False),
                "bitsandbytes": with_bitsandbytes(models.wide),
                "torchao": with_torchao(models.wide),
            }
        eager = {name: model for name, model in others.items() if name not in ("compiled", "torchao")}
        for length in (8,) if quick else (128, 256):
            for batch in (2,) if quick else BATCHES:
                _row(report, device, size, models, eager, tokens(batch, length, device))
        for batch, length in COMPILED if device == "cuda" and size == "BERT-large" else ():
            _row(report, device, f"{size} beside compiled", models, others, tokens(batch, length, device))
        del models, unfused, others
        torch._dynamo.reset()
        gc.collect()


def _row(report: SectionReport, device: str, size: str, models, others: dict, ids) -> None:
    exact = hidden(models.wide, ids)
    error = relative_error(hidden(models.fused, ids), exact)
    require(error < 0.08, f"relative error {error:.4f}")
    runs: dict[str, Callable] = {
        "sdpa": lambda i: hidden(models.wide, ids),
        "ours": lambda i: hidden(models.fused, ids),
    }
    for name, model in others.items():
        if model is None:
            continue
        runs[name] = lambda i, model=model: hidden(model, ids)
    if device == "cuda":
        runs["ours_captured"] = Captured(runs["ours"])
        runs["sdpa_captured"] = Captured(runs["sdpa"])
    seconds = dict(zip(runs, step_seconds(list(runs.values()), device, repeats=5, group_seconds=0.02), strict=True))
    best = min(seconds["ours"], seconds.get("ours_captured", seconds["ours"]))
    figures = {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    case = f"{size}, {ids.shape[1]} tokens, batch {ids.shape[0]}"
    report.row(
        "zeroquant", case, min(seconds["sdpa"], seconds.get("sdpa_captured", 9e9)) / best, None, **figures, error=error
    )
