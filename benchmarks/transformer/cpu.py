"""Section cpu: a layer of BERT-base's sizes on two threads over float32 PyTorch, and onnxruntime's int8 where it is installed."""

from __future__ import annotations

import copy
import io

import torch
from common.checks import relative_error, require
from common.sections import SectionReport
from common.timing import wall_seconds
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

import quantrain.nn as qnn

WIDTH, HEADS, GROWN = 768, 12, 3072


class Layer(nn.Module):
    """transformers' layer, called with hidden states alone."""

    def __init__(self, width: int, heads: int, grown: int) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=grown, attn_implementation="sdpa"
        )
        self.layer = BertLayer(config)
        for module in self.layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def onnx_session(model: nn.Module, x: Tensor):
    """The layer in onnxruntime, weights int8 per channel, activations quantized as they come; None without it."""
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return None
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder) / "wide.onnx", Path(folder) / "narrow.onnx"
        buffer = io.BytesIO()
        torch.onnx.export(model, (x,), buffer, input_names=["x"], dynamo=False)
        wide.write_bytes(buffer.getvalue())
        quantize_dynamic(wide, narrow, per_channel=True, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(narrow.read_bytes(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def cpu(report: SectionReport, device: str, quick: bool) -> None:
    torch.set_num_threads(1 if quick else 2)
    torch.manual_seed(0)
    wide = Layer(*((64, 4, 128) if quick else (WIDTH, HEADS, GROWN))).eval()
    narrow = qnn.convert(qnn.prepare(copy.deepcopy(wide), "int8-training"))
    for batch in (1,) if quick else (1, 16):
        x = torch.randn(batch, 16 if quick else 128, 64 if quick else WIDTH)
        error = relative_error(narrow(x), wide(x))
        require(error < 0.03, f"relative error {error:.4f}")
        runs = {"float32": lambda i: wide(x), "ours": lambda i: narrow(x)}
        session = None if quick else onnx_session(wide, x)
        if session is not None:
            array = x.numpy()
            runs["onnxruntime"] = lambda i: session.run(None, {"x": array})
        seconds = dict(zip(runs, wall_seconds(list(runs.values()), repeats=9), strict=True))
        case = f"768 wide, {batch} x 128, two threads"
        # Times of a shared machine: the ratios alone.
        report.row("cpu", f"{case}, over float32", seconds["float32"] / seconds["ours"], 2.0, error=error)
        if session is not None:
            report.row("cpu", f"{case}, over onnxruntime", seconds["onnxruntime"] / seconds["ours"], 1.0)
