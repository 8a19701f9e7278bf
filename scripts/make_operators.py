#!/usr/bin/env python3
"""Writes docs/operators.md: every public operator with its schema, what it does, where it runs, its gradient and its
speed.

Usage: make_operators.py [--check] [--out FILE]     --check writes nothing, and fails where FILE is not what would be
written

Schemas, devices and the kind of gradient come from the operators that the installed package registers, the descriptions
from the first sentences of the docstrings in quantrain. The families, the words about a gradient and the measured
figures are in the table below; a figure names the file of benchmarks/results that it is from. A public operator without
a line there is an error."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import quantrain

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "../benchmarks/results"
H200 = "nvidia-h200-2026-11-22.txt"
FIXED = "fixed-point-ops-h100-2026-11-25.txt"
LAYERS = "fixed-point-others-h100-2026-11-25.txt"
RESNET50 = "fixed-point-resnet50-h100-2026-11-25.txt"
GRADIENT = "gradient-quant-gpu-check-h200-2026-11-22.txt"
BUILDS = "compare-builds-h100-2026-11-27.txt"
FOUR_BIT = "four-bit-h200-2026-11-28.txt"
ADAMW_8BIT = "adamw-8bit-h200-2026-11-28.txt"
INT8_WEIGHT = "int8-weight-h200-2026-11-28.txt"
INT8 = "int8-bench-h200-2026-11-23.txt"
PTQ = "ptq-bench-h200-2026-11-28.txt"
TRANSFORMER = "transformer-h200-2026-11-28.txt"
DISTILLATION = "distillation-h200-2026-11-29.txt"
NOT_MEASURED = "not measured alone"


@dataclass(frozen=True)
class Family:
    title: str
    page: str  # of docs, with the formulas
    text: str
    # name -> (measured, result file); measured says the GPU where the family's line does not
    operators: dict[str, tuple[str, str]] = field(default_factory=dict)
    needs: str = ""  # of a GPU


FAMILIES = (
    Family(
        "Fake quantization and codes",
        "fake_quant.md",
        "Integer codes with a float32 scale, simulated or stored. Measured on one NVIDIA H200, float32 and bfloat16, "
        "two shapes, "
        "every granularity.",
        {
            "fake_quantize": (
                "91 to 98 % of the byte floor forward, 91 to 97 % with backward; PyTorch's operators take 1.2x to "
                "12.8x as long",
                H200,
            ),
            "fake_quantize_learnable": (
                "89 to 98 % of the byte floor, forward and backward; PyTorch's operators take 2.2x to 4.7x as long",
                H200,
            ),
            "fake_quantize_dynamic": ("73 to 96 % of the byte floor", H200),
            "choose_qparams": ("51 to 99 % of the byte floor", H200),
            "quantize": ("43 to 101 % of the byte floor; stochastic 31 to 58 %", H200),
            "dequantize": ("69 to 86 % of the byte floor", H200),
            "pack_int4": (NOT_MEASURED, ""),
            "unpack_int4": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Batch norm in training",
        "batch_norm.md",
        "The batch norm of a convolution whose weight was folded, with residual, activation and rounding in the same "
        "pass.",
        {
            "batch_norm_act": (NOT_MEASURED, ""),
            "batch_norm_act_fake_quantize": (NOT_MEASURED, ""),
            "fold_fake_quantize": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "A convolution that keeps codes",
        "batch_norm.md",
        "PyTorch's convolution of a fake-quantized input, which keeps a byte per element for the backward pass.",
        {
            "quant_conv2d": (NOT_MEASURED, ""),
            "fake_quantize_codes": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Before a linear layer",
        "norm_act.md",
        "A norm, an activation or a gate and the rounding of its result in one pass, and PyTorch's linear layer of it, "
        "which keeps a byte per element for the backward pass.",
        {
            "norm_act_fake_quantize": (NOT_MEASURED, ""),
            "norm_act_fake_quantize_dynamic": (NOT_MEASURED, ""),
            "quant_linear": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Quantized gradients",
        "gradient_quant.md",
        "Unbiased quantizers of gradients for fully quantized training (StatQuant). Measured on one NVIDIA H200; the "
        "byte floor here is "
        "two reads and one write, for `householder` three reads.",
        {
            "quantize_gradient": (
                "`per_sample` 84 to 127 % of the byte floor (short rows stay in registers and are read once), "
                "PyTorch's operators "
                "take 6.4x to 14.7x as long; `per_tensor` 62 to 91 %, `per_channel` 15 to 27 %, `householder` 27 to "
                "50 %",
                GRADIENT,
            ),
            "quantize_gradient_codes": (
                "`per_sample` 73 to 119 % of the byte floor; `per_tensor` 55 to 80 %, `per_channel` 13 to 21 %, "
                "`householder` 32 to 47 %",
                GRADIENT,
            ),
            "dequantize_gradient": (NOT_MEASURED, ""),
            "fqt_linear": (NOT_MEASURED + "; [whole training steps](gradient_quant.md#time-of-a-step) are", ""),
            "fqt_conv2d": (NOT_MEASURED + "; [whole training steps](gradient_quant.md#time-of-a-step) are", ""),
        },
    ),
    Family(
        "8-bit optimizer states",
        "optim.md",
        "AdamW with moments of 8 bits a number in blocks of 256 (Dettmers et al., 2021).",
        {
            "adamw_8bit_": ("1.7x to 1.8x the speed of PyTorch's fused AdamW in float32", ADAMW_8BIT),
            "quantize_8bit_blockwise": (NOT_MEASURED, ""),
            "dequantize_8bit_blockwise": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Int8 products and their operands",
        "int8.md",
        "Int8 codes with one scale per row, and matrix products of them with exact int32 sums. Measured on one "
        "NVIDIA H200 with "
        "bfloat16 inputs.",
        {
            "int8_linear": (
                '1.08x to 1.66x as fast as `nn.Linear` in bfloat16, forward and backward, with "auto"',
                INT8,
            ),
            "int8_mm": ("1.25x to 2.04x as fast as cuBLAS in bfloat16", INT8),
            "int8_mm_accumulate_": (NOT_MEASURED, ""),
            "int8_weight_mm": (
                "1.0x to 1.46x the speed of bfloat16 up to 8 rows, 0.67x to 1.05x at 16 and 32",
                INT8_WEIGHT,
            ),
            "int8_quantize_rows": (
                "94 to 100 % of the byte floor; stochastic 70 to 75 %, with a factor 48 to 61 %",
                INT8,
            ),
            "int8_quantize_columns": ("68 to 91 % of the byte floor; stochastic 59 to 75 %", INT8),
            "int8_quantize_rows_and_columns": ("52 to 61 % of the byte floor, stochastic with both factors", INT8),
            "int8_transpose": ("87 to 97 % of the byte floor", INT8),
            "int8_weight_transpose": ("48 us in bfloat16 and 70 us in float32 for 8192 x 4096, on an H100", BUILDS),
        },
        "; products on CUDA need compute capability 8.0 (Ampere) or later",
    ),
    Family(
        "Int8 products with outlier columns",
        "llm_int8.md",
        "Products of int8 rows some of whose columns are far larger than the others (LLM.int8(), Dettmers et al., "
        "2022), as integers throughout.",
        {
            "int8_quantize_rows_outliers": ("0.46x to 0.53x the speed of int8_quantize_rows on an H200", PTQ),
            "int8_mm_outliers": (NOT_MEASURED, ""),
            "int8_outlier_columns": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Post-training quantization",
        "transformers.md",
        "Statistics of a layer's input by column, and what is chosen from them: SmoothQuant, GPTQ, AWQ.",
        {
            "column_statistics_": (NOT_MEASURED, ""),
            "smooth_factor": (NOT_MEASURED, ""),
            "gptq_round": (
                "0.32 s at [4096, 14336], 0.03 s at [4096, 4096] on an H200, its Hessian given",
                PTQ,
            ),
            "awq_scale": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Weights of 4 bits",
        "four_bit.md",
        "Codes in blocks that share a scale, and products whose weight is decoded inside. Measured on one NVIDIA H200 "
        "in bfloat16, passes by the bytes of a copy in the same run, products in CUDA graphs with weights that rotate "
        "past the cache.",
        {
            "quantize_4bit": ("57 to 70 % of the byte floor in nf4", FOUR_BIT),
            "quantize_4bit_affine": ("48 to 50 % of the byte floor", FOUR_BIT),
            "dequantize_4bit": ("86 to 89 % of the byte floor in nf4", FOUR_BIT),
            "compress_scale": (NOT_MEASURED, ""),
            "decompress_scale": (NOT_MEASURED, ""),
            "linear_4bit": (
                "1.7x to 1.9x the speed of bfloat16 at one row, 1.1x to 1.5x at 32, 0.8x to 1.3x at 64, 0.8x to 1.0x at 256",
                FOUR_BIT,
            ),
            "linear_4bit_lora": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Norms and activations that leave as int8",
        "int8.md",
        "For int8 inference: what a norm or an activation gives is quantized while it is in registers. Measured on "
        "one NVIDIA H200 in "
        "bfloat16, against PyTorch's operator followed by `int8_quantize_rows`.",
        {
            "int8_layer_norm": ("the separate operators take 1.5x to 1.8x as long", INT8),
            "int8_rms_norm": ("the separate operators take 1.2x to 1.5x as long", INT8),
            "int8_add_layer_norm": ("the separate operators take 1.7x to 1.9x as long", INT8),
            "int8_add_rms_norm": ("the separate operators take 1.5x to 1.7x as long", INT8),
            "int8_gelu": ("the separate operators take 1.4x to 1.5x as long", INT8),
            "int8_relu": (NOT_MEASURED, ""),
            "int8_silu_mul": ("the separate operators take 2.1x to 2.5x as long", INT8),
        },
    ),
    Family(
        "Transformer layers",
        "inference.md",
        "Inference of whole blocks, and keys and values in int8. Measured on one NVIDIA H200 against float16 with "
        "PyTorch's fused attention, as CUDA graphs.",
        {
            "int8_transformer_layer": (
                "BERT-large's layer, 128 tokens: 1.25x the speed of float16 at batch 1, 1.5x at 16, 1.6x at 64 and 128",
                TRANSFORMER,
            ),
            "int8_transformer_qkv": (NOT_MEASURED, ""),
            "int8_transformer_output": (NOT_MEASURED, ""),
            "rotate_heads_": (NOT_MEASURED, ""),
            "kv_cache_append_": (NOT_MEASURED, ""),
            "kv_cache_attention": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Fixed-point numbers",
        "fixed_point.md",
        "Codes times a power of two: a scale that is a shift (F8Net). Measured on one NVIDIA H100, float32 and "
        "bfloat16, three shapes.",
        {
            "fixed_point_quantize": (
                "76 to 115 % of the byte floor forward, 80 to 99 % with backward; PyTorch's operators take 1.1x to "
                "27x as long",
                FIXED,
            ),
            "fixed_point_fraction_length": (
                "standard deviation of a tensor 23 to 93 % of the byte floor, of channels 20 to 75 %; least squared "
                "error 7 to 24 %",
                FIXED,
            ),
            "fixed_point_requantize": (
                "55 to 101 % of the byte floor; PyTorch's operators take 6.5x to 8.8x as long",
                FIXED,
            ),
        },
    ),
    Family(
        "Layers of fixed-point networks",
        "fixed_point.md",
        "What an integer-only network is made of: 8-bit codes in, int32 sums or 8-bit codes out. Measured on one "
        "NVIDIA H100 at batch 64, "
        "against PyTorch's float16 operators.",
        {
            "fixed_point_conv2d": (
                "0.27x the speed of float16 where the int32 sums are four times the bytes of the codes",
                LAYERS,
            ),
            "fixed_point_conv2d_requantize": (
                "ResNet-50's convolutions 1.53x as fast as float16 in all, by layer 1.04x to 2.29x",
                RESNET50,
            ),
            "fixed_point_linear": ("0.65x the speed of float16", LAYERS),
            "fixed_point_add": ("48 % of the byte floor, 0.39x the speed of float16", LAYERS),
            "fixed_point_max_pool2d": ("74 % of the byte floor, 6.2x as fast as float16", LAYERS),
            "fixed_point_sum_pool2d": ("51 % of the byte floor, 1.9x as fast as float16", LAYERS),
        },
    ),
    Family(
        "Distillation",
        "distillation.md",
        "Losses of a student's rows against its teacher's, without a temporary of their size. Measured on one NVIDIA "
        "H200, forward and backward, against PyTorch's operators in the same type.",
        {
            "distillation_kl": (
                "5.0x to 5.8x the speed, on bfloat16 logits 12x to 13x that of float32 losses, before a change that "
                "the file names",
                DISTILLATION,
            ),
            "distillation_kl_topk": (NOT_MEASURED, ""),
            "hidden_mse": ("1.9x the speed in bfloat16", DISTILLATION),
            "hidden_cosine": ("10.6x the speed in bfloat16", DISTILLATION),
            "attention_kl": (NOT_MEASURED, ""),
        },
    ),
    Family(
        "Pruning",
        "pruning.md",
        "Which weights stay, as a bit per element, and weights that stay at zero.",
        {
            "prune_mask": (NOT_MEASURED, ""),
            "prune_masks": (NOT_MEASURED, ""),
            "pack_mask": (NOT_MEASURED, ""),
            "unpack_mask": (NOT_MEASURED, ""),
            "apply_masks_": (
                "0.74x the speed of a product with dense masks in float32, 1.18x in bfloat16, on an H200, before a "
                "change that the file names",
                DISTILLATION,
            ),
            "sparsegpt_prune": (NOT_MEASURED, ""),
        },
    ),
)

# Operators with a derivative, and what it is. The others have none, or raise: the dispatcher says which.
GRADIENTS = {
    "fake_quantize": "straight-through; one mask bit per element is kept",
    "fake_quantize_learnable": "straight-through; scale and zero point by LSQ and LSQ+",
    "fake_quantize_dynamic": "straight-through, the scale held constant",
    "batch_norm_act": "exact, through the batch's statistics too; one mask bit per element is kept; no second derivative",
    "batch_norm_act_fake_quantize": "straight-through, and through the batch's statistics; one mask bit per element is kept; no second derivative",
    "fold_fake_quantize": "straight-through, in weight and bn_weight; one mask bit per element is kept; no second derivative",
    "quant_conv2d": "conv2d's; the input's codes are kept; no second derivative",
    "fake_quantize_codes": "straight-through, one mask bit per element is kept; of a learned scale LSQ's, and the input is kept",
    "norm_act_fake_quantize": "straight-through, in input, other, weight and bias; the inputs and one mask bit per element are kept; no second derivative",
    "norm_act_fake_quantize_dynamic": "straight-through, the scale held constant; the inputs are kept, and mask bits where a row may clip; no second derivative",
    "quant_linear": "linear's; the input's codes are kept; no second derivative",
    "fixed_point_quantize": "straight-through without the end codes; one mask bit per element is kept",
    "fqt_linear": "unbiased, from the quantized gradient; no second derivative",
    "fqt_conv2d": "unbiased, from the quantized gradient; no second derivative",
    "linear_4bit": "exact, through the packed weight; any number of times",
    "linear_4bit_lora": "exact, in input, lora_a, lora_b and bias; no second derivative",
    "int8_weight_mm": "exact; any number of times",
    "int8_linear": "unbiased, at the rounded input and weight; no second derivative",
    "distillation_kl": "exact, in student; no second derivative",
    "distillation_kl_topk": "exact, in student; no second derivative",
    "hidden_mse": "exact, in student; no second derivative",
    "hidden_cosine": "exact, in student; no second derivative",
    "attention_kl": "exact, in student, 0 below the floor; no second derivative",
}

# Operators that Python calls by another name than their own.
WRAPPERS = {"dequantize_gradient": (quantrain.QuantizedGradient.dequantize, "QuantizedGradient.dequantize")}

TYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64"}  # c10's

INTRODUCTION = """\
# Operators

<!-- Written by scripts/make_operators.py; a test compares. Change the table there, or the docstrings, and run it. -->

Every operator is `quantrain.<name>` in Python, `quantrain::<name>` in C++ (`#include <quantrain/quantrain.h>`) and
`torch.ops.quantrain.<name>` for `torch.compile` and `torch.export`. Names that begin with an underscore are private
and not listed. Loss scaling, optimizers and layers are classes: [amp.md](amp.md), [optim.md](optim.md), [nn.md](nn.md).

**Byte floor**: the time that the bytes which an operator must read and write would take at the rate of a
device-to-device copy measured in the same run. 100 % is as fast as that copy, 50 % takes twice as long. Ranges are from
the slowest case to the fastest; every figure links the file it is from, which names the GPU, the date and the command.

**Gradient**: "none" means that the result is a constant for autograd; "raises" that a backward pass through it raises
`NotImplementedError` rather than giving a silent zero.

Contents: {contents}
"""


def registered() -> dict[str, list[torch._C.FunctionSchema]]:
    """Public operator -> its schemas, the one without an overload's name first, the others by name."""
    found: dict[str, list] = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "quantrain" and not name.startswith("_"):
            found.setdefault(name, []).append(schema)
    return {name: sorted(schemas, key=lambda schema: schema.overload_name) for name, schemas in sorted(found.items())}


def full_name(schema: torch._C.FunctionSchema) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def devices(schema: torch._C.FunctionSchema) -> list[str]:
    """Where the operator has a kernel. A build without CUDA cannot tell of CUDA and believes that it has one."""
    keys = ["CPU"] + (["CUDA"] if quantrain.built_with_cuda else [])
    missing = [
        key for key in keys if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(full_name(schema), key)
    ]
    return [key for key in ("CPU", "CUDA") if key not in missing]


def runs_on(family: Family, schemas: dict[str, list]) -> str:
    """Where the family runs, in words; an operator without a kernel for a device ends the program."""
    for name in family.operators:
        for schema in schemas[name]:
            if devices(schema) != ["CPU", "CUDA"]:
                raise SystemExit(f"make_operators: expected {full_name(schema)} on CPU and CUDA, got {devices(schema)}")
    return f"Runs on CPU and CUDA{family.needs}."


def gradient(name: str, schema: torch._C.FunctionSchema) -> str:
    """The words of GRADIENTS; else "none" where autograd falls through or knows nothing, "raises" where it refuses. An
    operator that is composed of others has their derivative."""
    dump = torch._C._dispatch_dump(full_name(schema))
    kernels = re.findall(r"^(?:Autograd|CompositeImplicitAutograd)\S*: (.*)$", dump, re.MULTILINE)
    text = " ".join(kernels)
    kind = "none" if "fallthrough" in text or not kernels else "raises" if ":: (none)" in text else "derivative"
    if (kind == "derivative") != (name in GRADIENTS):
        raise SystemExit(f"make_operators: GRADIENTS and the registration of {name} disagree: {kind}, {text}")
    return GRADIENTS.get(name, kind)


def description(name: str) -> str:
    """The first sentence of the Python function's docstring, as Markdown."""
    function, called = WRAPPERS.get(name, (getattr(quantrain, name, None), None))
    text = inspect.getdoc(function) if function else None
    if not text:
        raise SystemExit(f"make_operators: quantrain.{name} has no docstring")
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=[.:])\s", paragraph, maxsplit=1)[0] if "." not in paragraph[-1:] else paragraph
    sentence = re.split(r"\.\s(?=[A-Z`])", sentence, maxsplit=1)[0].rstrip(".")
    sentence = re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", sentence).replace("``", "`")
    return sentence + (f" (in Python `{called}`)" if called else "")


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def table(family: Family, schemas: dict[str, list]) -> str:
    lines = ["| operator | what it does | gradient | measured |", "|---|---|---|---|"]
    for name, (measured, path) in family.operators.items():
        source = f" ([file]({RESULTS}/{path}))" if path else ""
        what = description(name).replace("|", r"\|")  # a cell's end, also within code
        cells = (f"`{name}`", what, gradient(name, schemas[name][0]), measured + source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text_of(schema: torch._C.FunctionSchema) -> str:
    """A schema as one writes it: types by name, numbers as short as they are."""
    text = str(schema).removeprefix("quantrain::")
    text = re.sub(r"(?<=ScalarType )(\w+)=(\d+)", lambda found: f"{found[1]}={TYPES[int(found[2])]}", text)
    return re.sub(r"(?<=float )(\w+)=([\d.e+-]+)", lambda found: f"{found[1]}={float(found[2])!r}", text)


def schema_block(family: Family, schemas: dict[str, list]) -> str:
    lines = [text_of(schema) for name in family.operators for schema in schemas[name]]
    return "\n".join(["```text", *lines, "```"])


def page() -> str:
    """The whole page; an operator without a line in FAMILIES, or the other way round, ends the program."""
    schemas = registered()
    listed = [name for family in FAMILIES for name in family.operators]
    if sorted(listed) != sorted(schemas):
        different = sorted(set(listed) ^ set(schemas))
        raise SystemExit(f"make_operators: FAMILIES and the registered operators differ by {', '.join(different)}")
    links = [f"[{family.title.lower()}](#{anchor(family.title)})" for family in FAMILIES]
    parts = [INTRODUCTION.format(contents=" ·\n".join(links))]
    for family in FAMILIES:
        parts += [
            f"## {family.title}\n",
            f"{family.text} Formulas: [{family.page}]({family.page}).\n",
            f"{runs_on(family, schemas)}\n",
            table(family, schemas) + "\n",
            "Schemas:\n",
            schema_block(family, schemas) + "\n",
        ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "operators.md")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page differs")
    options = parser.parse_args()
    text = page()
    if options.check:
        same = options.out.exists() and options.out.read_text(encoding="utf-8") == text
        print(f"make_operators: {options.out} is {'as it should be' if same else 'out of date'}")
        return 0 if same else 1
    options.out.write_text(text, encoding="utf-8")
    print(f"make_operators: {sum(len(family.operators) for family in FAMILIES)} operators in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
