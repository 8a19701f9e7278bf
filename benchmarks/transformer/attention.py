"""Section attention: ours over PyTorch's scaled_dot_product_attention, float16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common.checks import require
from common.sections import SectionReport
from common.timing import kernel_seconds

SHAPES = (  # batch, tokens, heads, head size, causal
    (1, 128, 16, 64, False),
    (16, 128, 16, 64, False),
    (128, 128, 16, 64, False),
    (128, 128, 12, 64, False),
    (32, 256, 16, 64, False),
    (16, 512, 16, 64, False),
    (16, 512, 32, 128, True),
    (4, 2048, 32, 128, True),
)


@torch.inference_mode()
def attention(report: SectionReport, device: str, quick: bool) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    for batch, length, heads, size, causal in ((1, 8, 2, 32, False),) if quick else SHAPES:
        qkv = torch.randn(batch, length, 3 * heads, size, device=device).to(dtype)
        q, k, v = qkv.split(heads, dim=2)
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=device)
        if causal:
            mask = mask.tril()
        for name, given in (("no mask", None), ("bool mask", mask)):

            def ours(i, given=given):
                only_causal = causal and given is None
                return torch.ops.quantrain._attention(q, k, v, given, only_causal, scale=size**-0.5)

            def theirs(i, given=given):
                parts = (t.transpose(1, 2) for t in (q, k, v))
                only_causal = causal and given is None
                return F.scaled_dot_product_attention(*parts, attn_mask=given, is_causal=only_causal)

            difference = (ours(0).float() - theirs(0).transpose(1, 2).float()).abs().max()
            require(float(difference) < 0.01, f"attention: {float(difference):.4f} off")
            seconds = kernel_seconds([ours, theirs], device)
            case = f"{batch} x {length}, {heads} heads of {size}{', causal' if causal else ''}, {name}"
            report.row(
                "attention", case, seconds[1] / seconds[0], None, ours_us=1e6 * seconds[0], sdpa_us=1e6 * seconds[1]
            )
