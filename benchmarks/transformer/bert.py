"""Section bert: transformers' BERT-large, as a user calls it and as a CUDA graph of that call."""

from __future__ import annotations

import gc

import torch
from common.checks import poisoned, relative_error, require
from common.sections import SectionReport
from common.timing import Captured, step_seconds

from .models import hidden, make_models, tokens

BATCHES = {1: (4.0, 1.0), 16: (3.0, 1.15), 64: (1.6, 1.5), 128: (1.6, 1.5)}  # to reach, eager and captured
MORE_ERROR = 1.05  # of the last hidden state, over that of separate int8 layers


@torch.no_grad()
def bert(report: SectionReport, device: str, quick: bool) -> None:
    """``graph``: as transformers captures, with a mask that it makes for the capture; ``encoder``: the layers alone, without."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    models = make_models("quick" if quick else "BERT-large", device, dtype)
    for batch, (eager_target, graph_target) in ({2: (None, None)} if quick else BATCHES).items():
        ids = tokens(batch, 128, device)
        with poisoned():
            found = hidden(models.fused, ids)
        exact = hidden(models.wide, ids)
        error, apart = relative_error(found, exact), relative_error(hidden(models.separate, ids), exact)
        require(error < MORE_ERROR * apart, f"relative error {error:.4f}, of separate layers {apart:.4f}")
        runs = [lambda i, m=m: hidden(m, ids) for m in (models.wide, models.separate, models.fused)]
        eager = step_seconds(runs, device, group_seconds=0.05)
        figures = {"fp16_ms": 1e3 * eager[0], "separate_ms": 1e3 * eager[1], "fused_ms": 1e3 * eager[2]}
        errors = {"error": error, "error_separate": apart}
        report.row("bert", f"eager, batch {batch} x 128", eager[0] / eager[2], eager_target, **figures, **errors)
        if device != "cuda":
            continue
        x = torch.randn(batch, 128, models.wide.config.hidden_size, device=device).to(dtype)
        encoders = [lambda i, m=m: m.encoder(x).last_hidden_state for m in (models.wide, models.separate, models.fused)]
        for name, of, target in (("graph", runs, graph_target), ("encoder, graph", encoders, graph_target)):
            graphs = [Captured(run) for run in of]
            alone = step_seconds(graphs, device, group_seconds=0.05)
            figures = {"fp16_ms": 1e3 * alone[0], "separate_ms": 1e3 * alone[1], "fused_ms": 1e3 * alone[2]}
            report.row("bert", f"{name}, batch {batch} x 128", alone[0] / alone[2], target, **figures)
            del graphs
    del models
    gc.collect()
