"""Whole transformers for inference: int8 blocks of one call each against float16, as users call them and as CUDA graphs.

    python benchmarks/bench_transformer.py [--device cpu|cuda] [--only SECTION,...] [--quick] [--json FILE]

Sections:
    layer      one encoder layer of BERT-large's sizes, captured, over float16 with SDPA
    bert       transformers' BERT-large by prepare and convert over its own float16 with SDPA, eager and captured
    zeroquant  Table 6 of ZeroQuant (Yao et al., NeurIPS 2022): BERT-base and BERT-large, 128 and 256 tokens, batch 1 to 128; float16
               unfused (attention without SDPA, as the paper's), float16 with SDPA, the same compiled, bitsandbytes' and torchao's int8
               where they are installed, ours eager and captured
    attention  our attention over PyTorch's, with and without a mask
    decode     tokens a second of a Llama 2048 wide, batch 1, captured: w8a16, weights of 4 bits and zeroquant-w8a8 with int8 keys and values
               over bfloat16 (PyTorch's fused operators, captured too)
    cpu        a layer of BERT-base's sizes on two threads over float32, and over onnxruntime's int8 where it is installed

Results are checked against the float16 model first. Milliseconds; the ratio is how many times as fast ours is.
"""

from __future__ import annotations

import sys

from common.sections import run_sections
from transformer import attention, bert, cpu, decode, layer, zeroquant

SECTIONS = {
    "layer": layer.layer,
    "bert": bert.bert,
    "zeroquant": zeroquant.zeroquant,
    "attention": attention.attention,
    "decode": decode.decode,
    "cpu": cpu.cpu,
}


def main(arguments: list[str] | None = None) -> int:
    return run_sections("bench_transformer", __doc__, SECTIONS, arguments)


if __name__ == "__main__":
    sys.exit(main())
