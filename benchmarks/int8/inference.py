"""Section inference: encoder layers of BERT-large's and GPT-3-350M's sizes in W8A8 against float16, eager and as CUDA graphs."""

from __future__ import annotations

import gc

import torch
from common.checks import poisoned, relative_error, require
from common.encoder import EncoderConfig, make_encoders
from common.sections import SectionReport
from common.timing import Captured, step_seconds

MODELS = {"BERT-large": EncoderConfig(), "GPT-3-350M": EncoderConfig(pre_norm=True)}
QUICK = {
    "post-norm": EncoderConfig(64, 4, 128, layers=2),
    "pre-norm": EncoderConfig(64, 4, 128, layers=2, pre_norm=True),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LENGTH = 128


def target(batch: int) -> float | None:
    """Never slower from 16 on, 1.5 times as fast at 128."""
    if batch >= 128:
        return 1.5
    return 1.0 if batch >= 16 else None


@torch.inference_mode()
def inference(report: SectionReport, device: str, quick: bool) -> None:
    """Milliseconds per layer; the ratio is that of eager calls, ``graph_ratio`` that of captured ones."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    for name, config in (QUICK if quick else MODELS).items():
        wide, narrow = make_encoders(config, device, dtype)
        for batch in (2,) if quick else BATCHES:
            x = torch.randn(batch, 8 if quick else LENGTH, config.hidden, device=device).to(dtype)
            with poisoned():
                found = narrow(x)
            error = relative_error(found, wide(x))
            require(error < 0.05, f"{name}: relative error {error:.4f}")
            runs = [lambda i: wide(x), lambda i: narrow(x)]
            eager = [seconds / config.layers for seconds in step_seconds(runs, device, group_seconds=0.02)]
            figures = {"fp16_ms": 1e3 * eager[0], "int8_ms": 1e3 * eager[1], "error": error}
            if device == "cuda":
                graphs = [Captured(run) for run in runs]
                alone = [seconds / config.layers for seconds in step_seconds(graphs, device, group_seconds=0.02)]
                figures |= {
                    "graph_ratio": alone[0] / alone[1],
                    "graph_fp16_ms": 1e3 * alone[0],
                    "graph_int8_ms": 1e3 * alone[1],
                }
                del graphs
            report.row(
                "inference",
                f"{name} layer, batch {batch} x {x.shape[1]}",
                eager[0] / eager[1],
                target(batch),
                **figures,
            )
        del wide, narrow
        gc.collect()
