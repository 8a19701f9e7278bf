"""Section layer: one encoder layer, captured, over float16 with SDPA."""

from __future__ import annotations

import torch
from common.checks import poisoned, relative_error, require
from common.encoder import EncoderConfig, make_encoders
from common.sections import SectionReport
from common.timing import Captured, step_seconds

BATCHES = {128: 1.6, 64: 1.55, 32: 1.35, 16: 1.15, 8: None, 4: None, 2: None, 1: 1.0}
MODELS = {"post-norm": EncoderConfig(), "pre-norm": EncoderConfig(pre_norm=True)}


@torch.inference_mode()
def layer(report: SectionReport, device: str, quick: bool) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    small = EncoderConfig(64, 4, 128, layers=2)
    for name, config in ({"post-norm": small} if quick else MODELS).items():
        wide, narrow = make_encoders(config, device, dtype)
        for batch, target in ({2: None} if quick else BATCHES).items():
            x = torch.randn(batch, 128, config.hidden, device=device).to(dtype)
            with poisoned():
                found = narrow(x)
            error = relative_error(found, wide(x))
            require(error < 0.05, f"{name}: relative error {error:.4f}")
            runs = [lambda i, run=run: run(x) for run in (wide, narrow)]
            if device == "cuda":
                runs = [Captured(run) for run in runs]
            seconds = [each / config.layers for each in step_seconds(runs, device, group_seconds=0.02)]
            report.row(
                "layer",
                f"1024 wide, {name}, batch {batch} x 128",
                seconds[0] / seconds[1],
                target if name == "post-norm" else None,
                fp16_us=1e6 * seconds[0],
                int8_us=1e6 * seconds[1],
                error=error,
            )
            del runs
